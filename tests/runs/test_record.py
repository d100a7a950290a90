"""The table of numbers: strict lines, exact cuts, torn ends; TensorBoard beside it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from runs.files import write_json
from runs.record import Record, Row, read_table, write_status

TABLE = "metrics.jsonl"


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not strict JSON")


def rows_of(seed: int, steps: range) -> list[Row]:
    return [Row(step, "eval/return", 10.0 * step + seed, seed) for step in steps]


def test_a_line_is_the_documented_object(tmp_path: Path):
    with Record(tmp_path, [0, 3], tensorboard=False) as record:
        record.write([Row(5, "eval/return", 1.5, 3), Row(5, "acc/task_1_after_2", 0.25, 0, task=1)])
    first, second = (tmp_path / TABLE).read_text().splitlines()
    assert json.loads(first) == {"step": 5, "name": "eval/return", "value": 1.5, "seed": 3}
    assert json.loads(second) == {"step": 5, "name": "acc/task_1_after_2", "value": 0.25, "seed": 0, "task": 1}


def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path):
    rows = [
        Row(0, "loss/critic", 0.1 + 0.2, 0),
        Row(1, "loss/critic", 5e-324, 0, task="dmc/walker-walk"),
        Row(2, "loss/critic", None, 0, missing="svd did not converge"),
    ]
    with Record(tmp_path, [0], tensorboard=False) as record:
        record.write(rows)
    assert read_table(tmp_path) == rows


@pytest.mark.parametrize(("value", "reason"), [(float("nan"), "nan"), (float("inf"), "inf"), (-np.inf, "-inf")])
def test_a_number_that_is_not_finite_is_missing_and_says_why(tmp_path: Path, value: float, reason: str):
    with Record(tmp_path, [0], tensorboard=False) as record:
        record.write([Row(1, "loss/actor", value, 0)])
    line = json.loads((tmp_path / TABLE).read_text(), parse_constant=refuse)
    assert line == {"step": 1, "name": "loss/actor", "value": None, "seed": 0, "missing": reason}


def test_rows_take_numpy_and_torch_numbers(tmp_path: Path):
    row = Row(np.int64(3), "loss/q", torch.tensor(0.5), np.int32(0))  # type: ignore[arg-type]
    assert (row.step, row.value, row.seed) == (3, 0.5, 0)
    with Record(tmp_path, [0], tensorboard=False) as record:
        record.write([row])
    assert read_table(tmp_path) == [Row(3, "loss/q", 0.5, 0)]


def test_rows_that_say_too_little_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="reason"):
        Row(1, "loss/q", None, 0)
    with pytest.raises(ValueError, match="reason"):
        Row(1, "loss/q", 2.0, 0, missing="though it is there")
    with pytest.raises(ValueError, match="needs a name"):
        Row(1, "", 2.0, 0)
    with pytest.raises(TypeError):
        Row(1.5, "loss/q", 2.0, 0)  # type: ignore[arg-type]
    with Record(tmp_path, [0, 1], tensorboard=False) as record:
        with pytest.raises(ValueError, match="seed 2"):
            record.write([Row(1, "loss/q", 2.0, 0), Row(1, "loss/q", 2.0, 2)])
        assert record.length == 0  # nothing of a refused call is written


def test_rows_are_visible_as_soon_as_write_returns(tmp_path: Path):
    with Record(tmp_path, [0], tensorboard=False) as record:
        record.write(rows_of(0, range(3)))
        assert read_table(tmp_path) == rows_of(0, range(3))
        assert record.length == (tmp_path / TABLE).stat().st_size


def test_cut_and_continue_gives_the_same_bytes_as_never_having_stopped(tmp_path: Path):
    with Record(tmp_path / "whole", [0], tensorboard=False) as record:
        record.write(rows_of(0, range(10)))
    with Record(tmp_path / "halves", [0], tensorboard=False) as record:
        record.write(rows_of(0, range(5)))
        length = record.length
        record.write([Row(step, "eval/return", -1.0, 0) for step in range(5, 8)])  # lost with the crash
    with Record(tmp_path / "halves", [0], tensorboard=False) as record:
        record.cut_to(length)
        assert record.length == length
        record.write(rows_of(0, range(5, 10)))
    assert (tmp_path / "halves" / TABLE).read_bytes() == (tmp_path / "whole" / TABLE).read_bytes()


def test_a_cut_inside_a_row_or_behind_the_end_is_refused(tmp_path: Path):
    with Record(tmp_path, [0], tensorboard=False) as record:
        record.write(rows_of(0, range(2)))
        before = (tmp_path / TABLE).read_bytes()
        for length in (1, record.length - 1):
            with pytest.raises(ValueError, match="inside a row"):
                record.cut_to(length)
        for length in (-1, record.length + 1):
            with pytest.raises(ValueError, match="it has"):
                record.cut_to(length)
        assert (tmp_path / TABLE).read_bytes() == before
        record.cut_to(0)
        assert read_table(tmp_path) == []


def test_keep_drops_the_rows_behind_each_seeds_checkpoint(tmp_path: Path):
    checkpoint = {0: 2, 1: 4}
    with Record(tmp_path, [0, 1], tensorboard=False) as record:
        record.write(rows_of(0, range(6)) + rows_of(1, range(6)))
        assert record.keep(lambda row: row.step <= checkpoint[row.seed]) == 3 + 1
        record.write(rows_of(0, range(3, 4)))
    assert read_table(tmp_path) == rows_of(0, range(3)) + rows_of(1, range(5)) + rows_of(0, range(3, 4))
    assert [path.name for path in tmp_path.iterdir()] == [TABLE]


def test_a_torn_last_line_is_left_out_and_cut_off_when_writing_goes_on(tmp_path: Path):
    with Record(tmp_path, [0], tensorboard=False) as record:
        record.write(rows_of(0, range(2)))
    with (tmp_path / TABLE).open("ab") as table:
        table.write(b'{"step": 2, "name": "eval/re')
    assert read_table(tmp_path) == rows_of(0, range(2))
    with Record(tmp_path, [0], tensorboard=False) as record:
        record.write(rows_of(0, range(2, 3)))
    assert read_table(tmp_path) == rows_of(0, range(3))


def test_a_torn_end_longer_than_a_block_is_cut_off(tmp_path: Path):
    (tmp_path / TABLE).write_bytes(b"x" * 200_000)
    with Record(tmp_path, [0], tensorboard=False) as record:
        assert record.length == 0


@pytest.mark.parametrize("damage", [b'{"step": 2, "na\n', b"\n", b'{"step": 2}\n', b"[1]\n", b"\x00\x00\n"])
def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path: Path, damage: bytes):
    with Record(tmp_path, [0], tensorboard=False) as record:
        record.write(rows_of(0, range(2)))
    whole = (tmp_path / TABLE).read_bytes()
    (tmp_path / TABLE).write_bytes(whole + damage + whole)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3 is damaged"):
        read_table(tmp_path)


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_shows_the_table_also_after_a_resume(tmp_path: Path):
    """Rows dropped by the resume must not come back as a second branch of the curve."""
    with Record(tmp_path, [0, 7]) as record:
        record.write(rows_of(7, range(6)) + [Row(1, "loss/q", 2.5, 0, task=4), Row(2, "loss/q", float("nan"), 0)])
    with Record(tmp_path, [0, 7]) as record:
        record.keep(lambda row: row.step <= 2)
        record.write([Row(3, "eval/return", -3.0, 7)])
    assert scalars(tmp_path / "tensorboard" / "seed_7", "eval/return") == [(0, 7), (1, 17), (2, 27), (3, -3)]
    assert scalars(tmp_path / "tensorboard" / "seed_0", "loss/q/4") == [(1, 2.5)]


def test_tensorboard_has_the_settings_beside_the_last_outcomes(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    config = {"command": "train", "agent": "td3", "preset": None, "agent_config": {"discount": 0.99, "hidden": [8, 8]}}
    write_json(tmp_path / "config.json", config)
    with Record(tmp_path, [0, 7]) as record:
        record.write(rows_of(7, range(6)) + [Row(1, "loss/q", 2.5, 7), Row(1, "acc/task_1_after_2", 0.5, 7)])
    events = EventAccumulator(str(tmp_path / "tensorboard" / "seed_7"))
    events.Reload()
    start = metadata.parse_session_start_info_plugin_data(
        events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    )
    values = {name: value.string_value or value.number_value for name, value in start.hparams.items()}
    assert values == {
        "agent": "td3",
        "preset": "null",
        "agent_config.discount": 0.99,
        "agent_config.hidden": "[8, 8]",
        "seed": 7,
    }
    experiment = metadata.parse_experiment_plugin_data(
        events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    )
    outcomes = {info.name.tag for info in experiment.metric_infos}
    assert outcomes == {"eval/return", "acc/task_1_after_2"}  # no loss
    assert outcomes <= set(events.Tags()["scalars"])  # the tab reads the values there
    assert not (tmp_path / "tensorboard" / "seed_0").exists()


def test_a_histogram_is_for_tensorboard_only(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Record(tmp_path / "on", [0]) as record, Record(tmp_path / "off", [0], tensorboard=False) as silent:
        for kept in (record, silent):
            kept.histogram(3, "weights/actor", torch.tensor([0.0, 0.5, 0.5, 1.0]), 0)
        assert record.length == 0
    events = EventAccumulator(str(tmp_path / "on" / "tensorboard" / "seed_0"))
    events.Reload()
    (found,) = events.Histograms("weights/actor")
    assert (found.step, found.histogram_value.num, found.histogram_value.sum) == (3, 4.0, 2.0)
    assert not (tmp_path / "off" / "tensorboard").exists()


def test_tensorboard_can_be_switched_off(tmp_path: Path):
    write_json(tmp_path / "config.json", {"agent": "td3"})
    with Record(tmp_path, [0], tensorboard=False) as record:
        record.write(rows_of(0, range(2)))
    assert not (tmp_path / "tensorboard").exists()


def test_status_is_one_strict_object(tmp_path: Path):
    write_status(tmp_path, "failed", 120, 500, error="FloatingPointError: row 3", wall_seconds=9.5)
    assert json.loads((tmp_path / "status.json").read_text()) == {
        "state": "failed",
        "step": 120,
        "of": 500,
        "error": "FloatingPointError: row 3",
        "wall_seconds": 9.5,
    }
    write_status(tmp_path, "done", 500, 500)
    assert json.loads((tmp_path / "status.json").read_text()) == {
        "state": "done",
        "step": 500,
        "of": 500,
        "error": None,
    }
