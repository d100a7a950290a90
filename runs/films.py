"""Films in a page: the newest video of a run as part of the HTML, or one picture of it if it is too large for that."""

from __future__ import annotations

import base64
import re
from html import escape
from pathlib import Path

_LARGEST = 3_000_000  # bytes of a video that still goes into the page


def newest_film(run: Path) -> Path | None:
    """The video of the latest step in a run's `videos/`; without a step in the names, the last by name."""
    films = sorted((run / "videos").glob("*.mp4"), key=lambda path: (_step(path), path.name))
    return films[-1] if films else None


def film_of(run: Path) -> str | None:
    """The newest video of a run as HTML that needs no other file: <video>, or <img> of its middle if it is large.

    None if there is no video, or none that can be read.
    """
    path = newest_film(run)
    if path is None:
        return None
    label = escape(f"The agent in its environment: {path.name}")
    if path.stat().st_size <= _LARGEST:
        data = base64.b64encode(path.read_bytes()).decode()
        return (
            f'<video controls muted loop playsinline aria-label="{label}" src="data:video/mp4;base64,{data}"></video>'
        )
    still = _middle_picture(path)
    if still is None:
        return None
    return f'<img alt="{label}" src="data:image/png;base64,{base64.b64encode(still).decode()}">'


def _step(path: Path) -> int:
    found = re.match(r"step_(\d+)", path.name)
    return int(found[1]) if found else -1


def _middle_picture(path: Path) -> bytes | None:
    """A PNG from the middle of a video, None if it cannot be decoded."""
    import io

    import av
    from matplotlib.image import imsave

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            container.seek((container.duration or 0) // 2)
            frame = next(container.decode(stream)).to_ndarray(format="rgb24")
    except (av.FFmpegError, IndexError, StopIteration):
        return None
    picture = io.BytesIO()
    imsave(picture, frame, format="png")
    return picture.getvalue()
