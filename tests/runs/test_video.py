"""mp4 files, proved by decoding them."""

import io
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from envs.classic_control import ClassicControl
from envs.graphics import OpenGLMissing
from runs.cli import main
from runs.video import show_in_tensorboard, write_mp4


def ramp(count: int, height: int, width: int) -> Iterator[np.ndarray]:
    """Frames whose brightness says which one they are, left half redder than the right."""
    for index in range(count):
        frame = np.full((height, width, 3), 20 * index, dtype=np.uint8)
        frame[:, : width // 2, 0] += 40
        yield frame


def decode(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_every_frame_comes_back_in_order(tmp_path: Path):
    assert write_mp4(tmp_path / "a.mp4", ramp(10, 64, 96), fps=25) == 10
    frames = decode(tmp_path / "a.mp4")
    assert [frame.shape for frame in frames] == [(64, 96, 3)] * 10
    for decoded, original in zip(frames, ramp(10, 64, 96), strict=True):
        # Chroma is halved, so the middle columns blur; elsewhere the codec is off by a few levels.
        error = np.abs(decoded.astype(int) - original)
        assert error[:, :40].max() <= 6
        assert error[:, 56:].max() <= 6


def test_the_file_plays_in_browsers(tmp_path: Path):
    write_mp4(tmp_path / "a.mp4", ramp(10, 32, 32), fps=30)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 30
        assert container.duration is not None
        assert container.duration / av.time_base == pytest.approx(1 / 3, abs=0.01)
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # the index comes first


def test_odd_sizes_are_padded_with_a_copy_of_the_edge(tmp_path: Path):
    """The Atari screen is 210 x 160; a 211 x 161 picture must become 212 x 162."""
    frame = np.full((211, 161, 3), 200, dtype=np.uint8)
    write_mp4(tmp_path / "a.mp4", [frame] * 3, fps=15)
    first, *_ = decode(tmp_path / "a.mp4")
    assert first.shape == (212, 162, 3)
    assert np.abs(first.astype(int) - 200).max() <= 6


def test_a_broken_source_leaves_no_file(tmp_path: Path):
    def broken() -> Iterator[np.ndarray]:
        yield from ramp(3, 32, 32)
        raise RuntimeError("simulator stopped")

    with pytest.raises(RuntimeError, match="simulator stopped"):
        write_mp4(tmp_path / "a.mp4", broken(), fps=30)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "no frames"),
        ([np.zeros((8, 8, 3), np.float32)], "uint8"),
        ([np.zeros((8, 8), np.uint8)], "height, width, 3"),
        ([np.zeros((3, 8, 8), np.uint8)], "height, width, 3"),
        ([np.zeros((16, 16, 3), np.uint8), np.zeros((16, 18, 3), np.uint8)], "the first was"),
    ],
)
def test_frames_that_make_no_video_are_refused(tmp_path: Path, frames: list[np.ndarray], message: str):
    with pytest.raises(ValueError, match=message):
        write_mp4(tmp_path / "a.mp4", frames, fps=30)
    assert list(tmp_path.iterdir()) == []


def test_fps_must_be_positive(tmp_path: Path):
    with pytest.raises(ValueError, match="fps"):
        write_mp4(tmp_path / "a.mp4", ramp(2, 16, 16), fps=0)


def test_a_film_is_among_the_images_of_tensorboard(tmp_path: Path):
    """100 pictures of 320 x 240 become 50 of 160 x 120, played in the same time."""
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_mp4(tmp_path / "a.mp4", (np.full((240, 320, 3), i, dtype=np.uint8) for i in range(100)), fps=25)
    folder = tmp_path / "tensorboard" / "seed_3"
    folder.mkdir(parents=True)
    show_in_tensorboard(tmp_path, 3, 5000, tmp_path / "a.mp4")
    events = EventAccumulator(str(folder / "film"))
    events.Reload()
    (found,) = events.Images("film")
    assert (found.step, found.width, found.height) == (5000, 160, 120)
    with Image.open(io.BytesIO(found.encoded_image_string)) as gif:
        assert (gif.format, gif.size) == ("GIF", (160, 120))
        assert 40 <= getattr(gif, "n_frames", 1) <= 50  # equal neighbours may be joined
        length = 0
        for index in range(getattr(gif, "n_frames", 1)):
            gif.seek(index)
            length += gif.info["duration"]
    assert length == pytest.approx(4000)


def test_training_with_film_ends_with_one_in_the_folder_and_in_tensorboard(tmp_path: Path, capsys):
    """Of the first seed, at the last step; the numbers of the run stay readable beside it."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    train = ["train", "td3", "--env", "gym/Pendulum-v1", "--steps", "40", "--hidden", "8", "--warmup-steps", "10"]
    train += ["--batch-size", "4", "--eval-episodes", "1", "--seeds", "1", "--seed", "2", "--film"]
    assert main([*train, "--out", str(tmp_path), "--name", "run"]) == 0
    film = tmp_path / "run" / "videos" / "step_40_seed_2.mp4"
    assert f"film: {film}" in capsys.readouterr().err
    assert len(decode(film)) == 200
    told = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "run" / "tensorboard"))
    told.Reload()
    assert [image.step for image in told.Images("seed_2/film", "film")] == [40]
    assert [scalar.step for scalar in told.Scalars("seed_2", "eval/return")][-1] == 40


def test_a_run_that_cannot_be_filmed_is_refused_before_it_begins(tmp_path: Path, monkeypatch, capsys):
    def blind(self, index, height, width):
        raise OpenGLMissing("no pictures here: install libegl1")

    monkeypatch.setattr(ClassicControl, "render", blind)
    assert main(["train", "td3", "--env", "gym/Pendulum-v1", "--film", "--out", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err == "neoteny: no pictures here: install libegl1\n"
    assert not (tmp_path / "new").exists()


def test_a_run_without_event_files_gets_none(tmp_path: Path):
    write_mp4(tmp_path / "a.mp4", ramp(3, 32, 32), fps=30)
    show_in_tensorboard(tmp_path, 0, 5, tmp_path / "a.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
