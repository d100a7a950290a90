"""Videos: uint8 frames to an mp4 file that every browser plays (H.264, yuv420p)."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runs.files import replacing

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.stream import VideoStream


def write_mp4(path: Path | str, frames: Iterable[np.ndarray], fps: float) -> int:
    """Write frames [H, W, 3] uint8 (RGB), all of one size, at `fps` frames a second. Returns how many were written.

    Odd heights and widths get one more row or column, a copy of the edge, because yuv420p needs even ones. Frames are
    taken one by one and not kept. `path` appears when the video is complete.
    Raises ValueError for no frames, another dtype or shape, sizes that change, or `fps` not above 0.
    """
    import av

    if not fps > 0:
        raise ValueError(f"fps must be above 0, got {fps}")
    count, size = 0, (0, 0)
    rate = Fraction(fps).limit_denominator(1001)
    with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4", options=_FAST_START) as container:
        stream: VideoStream | None = None
        for frame in frames:
            _check(frame)
            if stream is None:
                size = frame.shape[:2]
                stream = _h264_stream(container, size, rate)
            if frame.shape[:2] != size:
                raise ValueError(f"frame {count} is {frame.shape[:2]}, the first was {size}")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_even(frame), format="rgb24")))
            count += 1
        if stream is None:
            raise ValueError(f"no frames to write to {path}")
        container.mux(stream.encode(None))
    return count


# The index goes in front, so that a page can start playing before the whole file is loaded.
_FAST_START = {"movflags": "+faststart"}


def _h264_stream(container: OutputContainer, size: tuple[int, ...], rate: Fraction) -> VideoStream:
    stream = container.add_stream("libx264", rate=rate)
    stream.height, stream.width = (side + side % 2 for side in size)
    stream.pix_fmt = "yuv420p"
    stream.options = {"crf": "18"}  # visually lossless
    return stream


def _check(frame: np.ndarray) -> None:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise ValueError(f"a frame must be uint8 [height, width, 3], got {frame.dtype} {list(frame.shape)}")


def _even(frame: np.ndarray) -> np.ndarray:
    """[H, W, 3] -> the same with even sides, contiguous."""
    height, width = frame.shape[:2]
    if height % 2 or width % 2:
        frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return np.ascontiguousarray(frame)
