"""Videos: uint8 frames to an mp4 file that every browser plays (H.264, yuv420p), and a small copy for TensorBoard."""

from __future__ import annotations

import io
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runs.files import replacing
from runs.record import TENSORBOARD

FILM = "film"  # in TensorBoard

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


def show_in_tensorboard(run: Path, seed: int, step: int, video: Path) -> None:
    """Add a film to the images of a run's TensorBoard, as a GIF of at most 60 pictures, 160 pixels wide.

    Nothing for a run without event files. The film has a folder of its own below the seed's: TensorBoard follows the
    newest event file of a folder only, and the run may still write into that of its numbers.
    `SummaryWriter.add_video` would need moviepy, which forces an old Pillow.
    """
    folder = run / TENSORBOARD / f"seed_{seed}"
    if not folder.is_dir():
        return
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
    from torch.utils.tensorboard.writer import SummaryWriter

    gif, (width, height) = _gif(video, most=60, widest=160)
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
    with SummaryWriter(str(folder / FILM)) as writer:
        writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=FILM, image=image)]), step)


def _gif(video: Path, most: int, widest: int) -> tuple[bytes, tuple[int, int]]:
    """A video as an animated GIF in its own time, and its size (width, height)."""
    import av
    from PIL import Image

    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        stride = max(1, -(-stream.frames // most))
        milliseconds = float(1000 * stride / (stream.average_rate or 30))
        frames = [frame for index, frame in enumerate(container.decode(stream)) if index % stride == 0]
    width = min(widest, frames[0].width)
    size = (width, max(1, round(frames[0].height * width / frames[0].width)))
    pictures = [Image.fromarray(frame.to_ndarray(format="rgb24")).resize(size) for frame in frames]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)
    return buffer.getvalue(), size


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
