"""`neoteny data`: fetch what a registry has of image-caption pairs, and say which are here."""

from __future__ import annotations

from continual.pairs import packaged
from continual.pairs.packages import FetchError
from runs.errors import UsageError, nearest
from runs.files import write_atomically
from runs.options import DataOptions


def data_command(options: DataOptions) -> int:
    """Run `neoteny data`. Returns the exit code; raises UsageError with nothing half-written."""
    folder = packaged.data_folder(options.data)
    if options.action == "list":
        for name, source in packaged.SOURCES.items():
            where = f"in {folder}" if packaged.is_here(name, folder) else f"not here, {source.megabytes} MB to fetch"
            print(f"{name:<8} {' / '.join(source.views)}: {where}")
        return 0
    if options.action != "fetch":
        raise UsageError(f"`neoteny data` has no '{options.action}'.{nearest(options.action, ('fetch', 'list'))}")
    if options.name not in packaged.SOURCES:
        known = nearest(options.name, packaged.SOURCES)
        raise UsageError(f"`neoteny data fetch` knows no '{options.name}'.{known}")
    if packaged.is_here(options.name, folder):
        try:
            packaged.load(options.name, folder)
        except ValueError:
            pass  # of another version or damaged: fetched again
        else:
            _tell(options, f"'{options.name}' is in {folder} already")
            return 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        packaged.make(options.name, folder, write_atomically)
    except FetchError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(f"cannot write to '{folder}': {error.strerror or error}") from error
    pairs = packaged.load(options.name, folder)
    sizes = ", ".join(str(count) for count in pairs.parts.bincount().tolist())
    _tell(options, f"{folder / options.name}.npz: {len(pairs.concepts)} concepts in parts of {sizes}")
    _tell(options, f"licences: {folder / options.name}-attribution.txt")
    return 0


def _tell(options: DataOptions, sentence: str) -> None:
    if not options.quiet:
        print(sentence)
