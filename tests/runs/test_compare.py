"""`neoteny compare`: the numbers of two runs by hand, the words for them, and the one sentence for bad input."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from runs import cli, statistics
from runs.compare import Comparison, compare_runs
from runs.errors import UsageError
from runs.files import write_json
from runs.record import Record, Row, write_status
from runs.report import read_report

STEPS = range(0, 1001, 100)


def write_run(folder: Path, finals: dict[int, float], rows: list[Row] | None = None, **config: Any) -> Path:
    """A run of straight lines from 0 to each seed's final return."""
    if rows is None:
        rows = [Row(step, "eval/return", final * step / 1000, seed) for seed, final in finals.items() for step in STEPS]
    with Record(folder, range(100), tensorboard=False) as record:
        record.write(rows)
    settings = {"command": "train", "agent": folder.name, "env": "gym/Pendulum-v1", "seeds": list(finals)}
    write_json(folder / "config.json", settings | config)
    write_status(folder, "done", 1000, 1000, wall_seconds=60.0)
    return folder


GOOD = {0: 100.0, 1: 110.0, 2: 120.0, 3: 90.0, 4: 105.0}
BAD = {0: 50.0, 1: 65.0, 2: 60.0, 3: 45.0, 4: 95.0}


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return [write_run(tmp_path / "sac", GOOD), write_run(tmp_path / "td3", BAD)]


def test_numbers_of_mujoco_warp_are_not_mixed_with_those_of_the_c_engine(pair: list[Path]):
    """Nor in one panel of a report."""
    environment = {"runner": {"backend": "mujoco.warp"}}
    pair.append(write_run(pair[0].with_name("on-a-gpu"), GOOD, environment=environment))
    with pytest.raises(UsageError, match=r"gym/Pendulum-v1, gym/Pendulum-v1 \(mujoco.warp\): compare those of one"):
        compare_runs(pair)
    assert read_report(pair).places == ["gym/Pendulum-v1", "gym/Pendulum-v1 (mujoco.warp)"]


def test_two_runs_with_shared_seeds_by_hand(pair: list[Path]):
    comparison = compare_runs(pair)
    (verdict,) = comparison.verdicts
    x, y = np.array(list(GOOD.values())), np.array(list(BAD.values()))
    assert (verdict.a, verdict.b) == ("sac", "td3")
    assert verdict.difference == pytest.approx(105 - 63)
    # The differences are 50, 45, 60, 45, 10: their own interval, and all 32 choices of signs.
    expected = statistics.stratified_bootstrap_interval(
        (x - y)[:, None], statistics.mean, statistics.report_generator()
    )
    assert (verdict.low, verdict.high) == pytest.approx(expected)
    assert verdict.low is not None
    assert verdict.low > 0
    assert verdict.p == verdict.smallest_p == 0.0625
    assert verdict.probability == pytest.approx(24 / 25)  # only 90 against 95 is lost
    assert verdict.paired
    assert verdict.sentence.startswith("sac is better than td3: eval/return is higher by 42 [")
    assert "probability 0.96 [" in verdict.sentence
    assert comparison.warnings == []


def test_the_order_of_the_runs_does_not_change_what_is_said(pair: list[Path]):
    (one,), (other,) = compare_runs(pair).verdicts, compare_runs(pair[::-1]).verdicts
    assert other.difference == -one.difference
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low), rel=0.05)  # type: ignore[operator]
    assert other.sentence.startswith("sac is better than td3: eval/return is higher by 42 [")
    assert other.probability == pytest.approx(1 - one.probability)


def test_other_seeds_are_an_independent_group(tmp_path: Path):
    runs = [write_run(tmp_path / "sac", GOOD), write_run(tmp_path / "td3", {7: 50.0, 8: 65.0, 9: 60.0, 10: 45.0})]
    comparison = compare_runs(runs)
    (verdict,) = comparison.verdicts
    assert not verdict.paired
    assert verdict.test == "Mann-Whitney test"
    reference = scipy.stats.mannwhitneyu(list(GOOD.values()), [50, 65, 60, 45], method="exact")
    assert verdict.p == pytest.approx(reference.pvalue)
    assert any("independent groups" in warning for warning in comparison.warnings)


def test_what_is_unclear_is_said_to_be_unclear(tmp_path: Path):
    runs = [
        write_run(tmp_path / "sac", GOOD),
        write_run(tmp_path / "td3", {0: 95.0, 1: 120.0, 2: 110.0, 3: 99.0, 4: 100.0}),
    ]
    (verdict,) = compare_runs(runs).verdicts
    assert verdict.sentence.startswith("No clear difference between sac and td3: sac is ahead by 0.2, but the 95 %")
    assert verdict.p is not None
    assert verdict.p > 0.5
    same = [write_run(tmp_path / "a", GOOD), write_run(tmp_path / "b", GOOD)]
    assert compare_runs(same).verdicts[0].sentence == "No difference between a and b: their means are equal"


def test_less_loss_is_better_and_a_norm_is_only_higher(tmp_path: Path):
    def rows(level: float, name: str) -> list[Row]:
        return [Row(1000, name, level + seed / 100, seed) for seed in range(5)]

    for name, said in (
        ("loss/critic", "b is better than a: loss/critic is lower by 1 ["),
        ("plasticity/weight_norm", "a is higher than b: plasticity/weight_norm is higher by 1 ["),
    ):
        runs = [write_run(tmp_path / name / run, GOOD, rows(level, name)) for run, level in (("a", 3.0), ("b", 2.0))]
        assert compare_runs(runs, name).verdicts[0].sentence.startswith(said)
        assert compare_runs(runs, name).verdicts[0].difference == pytest.approx(1.0)


def write_group(group: Path, arms: dict[str, dict[int, float]]) -> Path:
    """A run of `neoteny plasticity` whose arms have an accuracy of so much in every task."""
    for name, values in arms.items():
        intervention, stationary = name.removesuffix("-stationary"), name.endswith("-stationary")
        rows = [Row(step, "plasticity/online_accuracy", v, seed) for seed, v in values.items() for step in (50, 100)]
        own = {"command": "plasticity-arm", "intervention": intervention, "stationary": stationary, "agent": None}
        place = "label-shuffle, stationary" if stationary else "label-shuffle"
        write_run(group / name, values, rows, env=None, problem="label-shuffle", place=place, **own)
    write_json(group / "config.json", {"command": "plasticity", "arms": list(arms), "jobs": 0})
    return group


def test_a_run_of_interventions_is_compared_arm_by_arm_with_the_plain_one(tmp_path: Path, capsys):
    plain = {seed: 0.5 + seed / 100 for seed in range(6)}
    better, worse = ({s: v + by + s * s / 1000 for s, v in plain.items()} for by in (0.2, -0.1))
    group = write_group(tmp_path / "run", {"nap": better, "none": plain, "redo": worse, "none-stationary": better})
    comparison = compare_runs([group])
    assert comparison.metric == "plasticity/online_accuracy"
    assert [(v.a, v.b) for v in comparison.verdicts] == [("nap", "none"), ("redo", "none")]
    nap, redo = comparison.verdicts
    assert nap.difference == pytest.approx(0.2 + 55 / 6000)
    assert nap.paired
    assert nap.p == nap.smallest_p == 2 / 2**6
    assert nap.p_holm == redo.p_holm == 2 * nap.p
    assert nap.sentence.startswith("nap is better than none: plasticity/online_accuracy is higher by 0.209")
    assert redo.sentence.startswith("none is better than redo")
    assert comparison.warnings == ["arms in which nothing changes (1) are left out; name their folders for those"]
    assert cli.main(["compare", str(group), "--at", "auc"]) == 0
    assert "nap is better than none" in capsys.readouterr().out
    twins = [group / "none-stationary", write_group(tmp_path / "b", {"nap-stationary": plain}) / "nap-stationary"]
    assert [(v.a, v.b) for v in compare_runs(twins).verdicts] == [("nap", "none")]


def test_without_the_plain_arm_the_first_is_what_others_are_compared_with(tmp_path: Path, capsys):
    values = [{seed: level + seed / 100 for seed in range(5)} for level in (0.1, 0.2, 0.3)]
    group = write_group(tmp_path / "run", dict(zip(("redo", "cbp", "nap"), values, strict=True)))
    assert [(v.a, v.b) for v in compare_runs([group]).verdicts] == [("cbp", "redo"), ("nap", "redo")]
    assert cli.main(["compare", str(write_group(tmp_path / "one", {"none": values[0]}))]) == 2
    assert "compare needs at least two run folders" in capsys.readouterr().err
    other = write_run(tmp_path / "sac", GOOD)
    assert cli.main(["compare", str(group), str(other)]) == 2
    assert "the runs are not of one environment, but of label-shuffle, gym/Pendulum-v1" in capsys.readouterr().err


def test_the_area_under_the_curve_is_taken_up_to_the_shorter_run(tmp_path: Path):
    short = [
        row
        for seed in range(5)
        for row in [Row(0, "eval/return", 0.0, seed), Row(500, "eval/return", 40.0 + seed, seed)]
    ]
    runs = [write_run(tmp_path / "sac", GOOD), write_run(tmp_path / "td3", GOOD, short)]
    comparison = compare_runs(runs, at="auc")
    assert comparison.horizon == 500
    (verdict,) = comparison.verdicts
    assert verdict.mean_a == pytest.approx(105 / 4)  # half the slope, half the way
    assert verdict.mean_b == pytest.approx(42 / 2)
    assert any("not equally long" in warning for warning in comparison.warnings)


def test_steps_to_a_threshold_keep_the_seeds_that_never_got_there(pair: list[Path]):
    comparison = compare_runs(pair, at="threshold:60")
    (verdict,) = comparison.verdicts
    # First evaluation at or above 60: GOOD at 600, 600, 500, 700, 600; BAD never, 1000, 1000, never, 700.
    assert verdict.mean_a == 600
    assert verdict.mean_b == pytest.approx((1000 + 1000 + 1000 + 1000 + 700) / 5)
    sac, td3 = comparison.runs
    assert (sac["reached"], td3["reached"]) == (5, 3)
    assert (sac["median_steps"], td3["median_steps"]) == (600, 1000)
    assert verdict.probability == pytest.approx((4 * 5 + 4 + 0.5) / 25)  # 700 ties with 700
    assert verdict.sentence.startswith("sac is better than td3: it is faster by 340 of the first 1\u202f000 steps [")
    assert any("2 of 5 seeds did not reach the threshold; censored, not dropped" in w for w in comparison.warnings)


def test_three_runs_are_compared_pair_by_pair_with_corrected_p(tmp_path: Path):
    runs = [
        write_run(tmp_path / name, {s: v - 20 * i + s * i for s, v in GOOD.items()}) for i, name in enumerate("abc")
    ]
    verdicts = compare_runs(runs).verdicts
    assert [(v.a, v.b) for v in verdicts] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [v.p for v in verdicts] == [0.0625] * 3
    assert [v.p_holm for v in verdicts] == [0.1875] * 3


def test_lost_seeds_are_named_and_left_out(tmp_path: Path):
    rows = [Row(step, "eval/return", step / 10, seed) for seed in range(4) for step in STEPS if seed < 3 or step < 500]
    rows.append(Row(450, "loss/critic", float("nan"), 3))
    runs = [write_run(tmp_path / "sac", GOOD), write_run(tmp_path / "td3", GOOD, rows)]
    comparison = compare_runs(runs)
    assert comparison.verdicts[0].seeds_b == 3
    told = " ".join(comparison.warnings)
    assert "td3: seed 3 has no eval/return after step 400; loss/critic became nan at step 450; it is left out" in told
    assert "td3: seed 4 has no eval/return; it is left out" in told


def test_fewer_than_three_seeds_get_a_warning_and_one_seed_no_interval(tmp_path: Path):
    comparison = compare_runs([write_run(tmp_path / "a", {0: 1.0, 1: 2.0}), write_run(tmp_path / "b", {0: 5.0})])
    (verdict,) = comparison.verdicts
    assert (verdict.low, verdict.high, verdict.p) == (None, None, None)
    assert "cannot be compared with one seed on a side" in verdict.sentence
    assert any("a has 2 seeds: with fewer than 3" in warning for warning in comparison.warnings)
    assert any("b has 1 seed: with fewer than 3" in warning for warning in comparison.warnings)


def test_metrics_of_several_tasks_are_averaged_over_tasks(tmp_path: Path):
    def rows(level: float) -> list[Row]:
        return [Row(9, "eval/return", level * task + seed, seed, task) for task in (1, 3) for seed in range(3)]

    runs = [write_run(tmp_path / name, GOOD, rows(level)) for name, level in (("a", 10.0), ("b", 5.0))]
    (verdict,) = compare_runs(runs).verdicts
    assert (verdict.mean_a, verdict.mean_b) == (21.0, 11.0)
    with pytest.raises(UsageError, match="several tasks"):
        compare_runs(runs, at="auc")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["a"], "at least two"),
        (["a", "nothing"], "is not the folder of a run"),
        (["a", "a"], "given twice"),
        (["a", "elsewhere"], "not of one environment, but of gym/Pendulum-v1, atari/Pong"),
        (["a", "b", "--metric", "eval/retrun"], "Did you mean 'eval/return'?"),
        (["a", "b", "--at", "best"], "last, auc or threshold:NUMBER"),
        (["a", "b", "--at", "threshold:high"], "last, auc or threshold:NUMBER"),
        (["a", "empty"], "has recorded nothing yet"),
        (["a", "lost"], "no seed of 'lost' has a complete eval/return"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    sentence: str,
):
    monkeypatch.chdir(tmp_path)
    write_run(Path("a"), GOOD)
    write_run(Path("b"), BAD)
    write_run(Path("elsewhere"), BAD, env="atari/Pong")
    write_run(Path("empty"), {}, [])
    write_run(Path("lost"), GOOD, [Row(5, "eval/return", float("nan"), 0)])
    assert cli.main(["compare", *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert sentence in error
    assert error.count("\n") == 1


def test_what_the_command_prints(pair: list[Path], capsys: pytest.CaptureFixture[str]):
    assert cli.main(["compare", *map(str, pair)]) == 0
    out, error = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("sac is better than td3")
    assert "eval/return (last) on gym/Pendulum-v1" in lines
    row = next(line for line in lines if line.startswith("sac - td3"))
    assert "0.96 [" in row
    assert "0.0625 (least possible)" in row
    assert "5, 5 paired" in row
    assert error == ""


def test_the_json_says_the_same(pair: list[Path], capsys: pytest.CaptureFixture[str]):
    assert cli.main(["compare", *map(str, pair), "--json"]) == 0
    said = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    comparison: Comparison = compare_runs(pair)
    assert said == json.loads(json.dumps(comparison.as_json()))
    assert said["verdicts"][0]["difference"] == pytest.approx(42)
    assert said["runs"][0]["values"] == {"0": 100.0, "1": 110.0, "2": 120.0, "3": 90.0, "4": 105.0}
    assert (said["runs"][1]["mean"], said["runs"][1]["seeds"]) == (63.0, 5)
