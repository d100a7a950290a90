"""Progress with a clock of our own: what it says, how often, and where."""

import io

import pytest

from runs.progress import Progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_state_share_speed_return_and_time_left():
    """1,000 steps a second in each of two seeds: 20,000 of 100,000 after 10 s, so 40 s are left."""
    clock, stream = Clock(), io.StringIO()
    with Progress(50_000, [0, 1], stream=stream, clock=clock) as progress:
        for second in range(1, 11):
            clock.now += 1
            progress.update(0, 1000 * second, return_=100.0 + second)
            progress.update(1, 1000 * second, return_=200.0)
    first = stream.getvalue().splitlines()[0]
    # Seed 1's last 1,000 steps come after the line.
    assert first == "19,000 of 100,000 steps (19 %) · 1.9k steps/s · return 155 · 43s left"


def test_plain_lines_come_every_ten_seconds_at_most_and_a_last_one_at_the_end():
    clock, stream = Clock(), io.StringIO()
    with Progress(10_000, [0], stream=stream, clock=clock) as progress:
        for step in range(1, 10_001):
            clock.now += 0.0035
            progress.update(0, step)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3 + 1  # 35 seconds
    assert lines[-1] == "10,000 of 10,000 steps (100 %) · 286 steps/s"


def test_resumed_steps_are_done_but_no_part_of_the_speed():
    clock, stream = Clock(), io.StringIO()
    with Progress(10_000, [0], start={0: 9000}, stream=stream, clock=clock) as progress:
        clock.now += 10
        progress.update(0, 9100)
    assert stream.getvalue().splitlines()[0] == "9,100 of 10,000 steps (91 %) · 10 steps/s · 1m30s left"


def test_the_speed_is_that_of_the_last_half_minute():
    """Random steps at 5,000 a second, then learning at 100: after a minute of learning only the 100 count."""
    clock, stream = Clock(), io.StringIO()
    with Progress(1_000_000, [0], stream=stream, clock=clock) as progress:
        step = 0
        for second in range(70):
            clock.now += 1
            step += 5000 if second < 10 else 100
            progress.update(0, step)
    assert "· 100 steps/s ·" in stream.getvalue().splitlines()[-1]


def test_seeds_one_after_the_other_add_up():
    clock, stream = Clock(), io.StringIO()
    with Progress(60, [5, 6], stream=stream, clock=clock) as progress:
        for seed in (5, 6):
            for step in range(1, 61):
                clock.now += 0.125
                progress.update(seed, step)
    assert stream.getvalue().splitlines()[0] == "80 of 120 steps (67 %) · 8 steps/s · 5s left"


def test_a_terminal_gets_one_live_line():
    clock, stream = Clock(), Terminal()
    with Progress(1000, [0], stream=stream, clock=clock) as progress:
        clock.now += 1
        progress.update(0, 250, return_=12.5)
    text = stream.getvalue()
    assert "25%" in text
    assert "250 steps/s · return 12.5 · 3s left" in text
    assert text.count("steps/s · return") <= 3  # redrawn in place, not once a step


def test_quiet_says_nothing_and_stdout_is_never_used(capsys: pytest.CaptureFixture[str]):
    for stream in (Terminal(), io.StringIO()):
        clock = Clock()
        with Progress(10, [0], quiet=True, stream=stream, clock=clock) as progress:
            clock.now += 100
            progress.update(0, 10, return_=1.0)
        assert stream.getvalue() == ""
    clock = Clock()
    with Progress(10, [0], clock=clock) as progress:
        clock.now += 100
        progress.update(0, 10, return_=1.0)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "10 of 10 steps (100 %)" in captured.err


def test_foreign_seeds_and_empty_runs_are_refused():
    with pytest.raises(KeyError, match="seed 9"):
        Progress(10, [0], quiet=True).update(9, 1)
    with pytest.raises(ValueError, match="at least one step"):
        Progress(0, [0])
    with pytest.raises(ValueError, match="one seed"):
        Progress(10, [])


@pytest.mark.parametrize(
    ("left", "text"), [(45, "45s"), (150, "2m30s"), (3599.6, "1h00m"), (7500, "2h05m"), (200_000, "2d07h")]
)
def test_durations(left: float, text: str):
    clock, stream = Clock(), io.StringIO()
    with Progress(1000 + round(left * 10), [0], stream=stream, clock=clock, every=100) as progress:
        clock.now += 100
        progress.update(0, 1000)  # ten steps a second
    assert stream.getvalue().splitlines()[0].endswith(f"{text} left")
