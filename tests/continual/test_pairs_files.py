"""Pairs from a user's files, and how packages are fetched and refused."""

import io
import json
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image

from continual.pairs import files, packaged, packages
from continual.pairs.benchmarks import open_pairs
from runs.cli import main


def picture(shade: int, mode: str = "RGB", size: tuple[int, int] = (20, 10)) -> bytes:
    content = io.BytesIO()
    Image.new(mode, size, shade if mode in ("L", "P") else (shade,) * len(mode)).save(content, "PNG")
    return content.getvalue()


def test_images_with_text_files(tmp_path):
    for number in range(4):
        place = tmp_path / ("cats" if number < 2 else "dogs")
        place.mkdir(exist_ok=True)
        (place / f"{number}.png").write_bytes(picture(60 * number, "RGB" if number else "L"))
        (place / f"{number}.txt").write_text(f"animal number {number}\na {number}\n")
    pairs = open_pairs(str(tmp_path), size=8, tasks=2)
    assert pairs.images.shape == (4, 3, 8, 8)
    assert pairs.images[:, 0, 0, 0].tolist() == [0, 60, 120, 180]
    assert pairs.parts.tolist() == [0, 0, 1, 1]
    assert pairs.concepts[3].captions == ("animal number 3", "a 3")
    assert [concept.category for concept in pairs.concepts] == ["cats", "cats", "dogs", "dogs"]
    (tmp_path / "cats" / "0.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"caption of '.*0\.png' is empty"):
        files.read(tmp_path)
    (tmp_path / "cats" / "0.txt").unlink()
    with pytest.raises(ValueError, match=r"0\.txt' is not beside it"):
        files.read(tmp_path)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(picture(9))
    rows = [
        {"image": "a.png", "caption": "one thing", "tags": "small; red", "part": "2"},
        {"image": "a.png", "caption": "another thing", "tags": "", "part": "10"},
        {"image": "a.png", "caption": "one thing", "tags": "", "part": "2"},
    ]
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)] if kind == "csv" else map(json.dumps, rows)
    (tmp_path / f"captions.{kind}").write_text("\n".join(lines))
    pairs = files.read(tmp_path, 4)
    assert pairs.concept.tolist() == [0, 1, 0]  # equal captions are of one concept
    assert pairs.parts.tolist() == [0, 1]  # 2 comes before 10
    assert pairs.concepts[0].tags == ("small", "red")
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png' is no image that can be read"):
        files.read(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match="row 1 .* names 'a.png', which is not there"):
        files.read(tmp_path)


def test_shards(tmp_path):
    with tarfile.open(tmp_path / "00.tar", "w") as shard:
        for name, content in (
            ("x/1.png", picture(1)), ("x/1.txt", b"first"),
            ("x/2.png", picture(2, "RGBA")), ("x/2.json", b'{"caption": "second", "category": "k"}'),
        ):  # fmt: skip
            told = tarfile.TarInfo(name)
            told.size = len(content)
            shard.addfile(told, io.BytesIO(content))
    pairs = open_pairs(str(tmp_path / "00.tar"), size=4)
    assert [concept.captions[0] for concept in pairs.concepts] == ["first", "second"]
    assert pairs.images[1].float().mean() > 250  # nearly transparent on white
    with pytest.raises(ValueError, match="has no pairs"):
        files.read(_empty(tmp_path))


def _empty(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def test_captions_of_torchvision():
    found = [(Image.new("RGB", (30, 20), "red"), ["a red image", "it is red"]), (Image.new("L", (9, 9)), ["black"])]
    pairs = files.from_captions(found, "coco-captions", 8)
    assert pairs.concepts[0].captions == ("a red image", "it is red")
    assert pairs.images[0, :, 4, 4].tolist() == [255, 0, 0]


def test_what_keeps_a_package_from_being_fetched(tmp_path, monkeypatch, capsys):
    def refused(words: str) -> None:
        assert main(["data", "fetch", "emoji", "--data", str(tmp_path)]) == 2
        assert words in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(packages.shutil, "which", lambda _: None)
    refused("npm, which is not installed")
    monkeypatch.setattr(packages.shutil, "which", lambda _: "npm")

    def npm(code: int, out: str, archive: bytes | None = None):
        def run(command, cwd, **_):
            if archive is not None:
                (cwd / "found.tgz").write_bytes(archive)
            return subprocess.CompletedProcess(command, code, out, "npm error code ENOTFOUND\n")

        monkeypatch.setattr(packages.subprocess, "run", run)

    npm(1, '{"error": {"code": "ENOTFOUND", "summary": "network request failed"}}')
    refused("ENOTFOUND network request failed")
    npm(0, "", b"something else")
    refused("has the SHA-256")


def test_what_data_are_here(tmp_path, capsys):
    assert main(["data", "list", "--data", str(tmp_path)]) == 0
    assert "not here, 143 MB to fetch" in capsys.readouterr().out
    assert main(["data", "fetch", "emojis", "--data", str(tmp_path)]) == 2
    assert "Did you mean 'emoji'?" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`neoteny data fetch emoji` downloads 143 MB"):
        packaged.load("emoji", tmp_path)


def test_emoji_are_joined_by_any_of_their_codes(tmp_path):
    """The join, the versions and the colours under transparency, on three archives made here."""
    entries = [
        {"unified": "0023-FE0F-20E3", "non_qualified": "0023-20E3", "image": "a.png", "category": "Symbols"},
        {"unified": "1F913", "non_qualified": None, "image": "b.png", "category": "Component"},
        {"unified": "1F999-FE0F", "non_qualified": None, "image": "b.png", "category": "Symbols"},
        {"unified": "1F000", "non_qualified": None, "image": "b.png", "category": "Symbols"},
    ]
    entries = [{"subcategory": "s", "has_img_google": True, "has_img_twitter": True, **entry} for entry in entries]
    told = [
        {"hexcode": "0023-20E3", "label": "hash", "tags": ["key"], "version": 0.6},
        {"hexcode": "1F913", "label": "nerd", "version": 12.1},
        {"hexcode": "1F999", "label": "llama", "version": 12},
    ]
    contents = {
        packaged.GOOGLE.name: {"emoji.json": json.dumps(entries).encode()},
        packaged.TWITTER.name: {},
        packaged.EMOJIBASE.name: {"en/data.json": json.dumps(told).encode()},
    }
    for vendor, name in (("google", packaged.GOOGLE.name), ("twitter", packaged.TWITTER.name)):
        contents[name] |= {f"img/{vendor}/64/a.png": picture(0, "RGBA"), f"img/{vendor}/64/b.png": picture(7, "P")}
    archives = {}
    for name, members in contents.items():
        archives[name] = tmp_path / f"{name}.tgz"
        with tarfile.open(archives[name], "w:gz") as archive:
            for member, content in members.items():
                entry = tarfile.TarInfo(f"package/{member}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    (images, numbers, views), concepts = packaged.read_emoji(archives)
    assert [concept.captions[0] for concept in concepts] == ["hash", "nerd", "llama"]
    assert [concept.version for concept in concepts] == [(0, 6), (12, 1), (12,)]
    assert (numbers, views) == ([0, 0, 1, 1, 2, 2], [0, 1] * 3)
    assert images.shape == (6, 64, 64, 3)
    assert images[0].min() == 255  # transparent
    assert images.dtype == np.uint8
