"""`neoteny bench`: the runner against other libraries and the bare simulator, on this machine.

Contestants take turns of a short time in changing order; a ratio is taken inside a round, so that a noisy machine
cancels out, and medians over rounds are shown.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runs.contestants import CONTESTANTS, Case
from runs.errors import UsageError, nearest
from runs.files import replacing, write_json
from runs.options import BenchOptions
from runs.parsing import parse
from runs.turns import Contender, ContestantFailed, Turn, take_turns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXAMPLE = "neoteny bench --env mujoco/HalfCheetah-v5 --num-envs 1 64 --threads 2"
OURS, LIMIT = "neoteny", "limit"
COLUMNS = (
    "environment",
    "rows",
    "contestant",
    "steps/s",
    "of limit",
    "ours / it",
    "per CPU s",
    "of limit",
    "ours / it",
)
LEFT_ALIGNED = ("environment", "contestant")


@dataclass(frozen=True)
class Result:
    """One contestant on one case: medians over rounds. Ratios are of steps a second, or (`cpu_`) a processor second.

    ratio: ours to this one's, above 1 where ours is faster. of_limit: this one's to the bare simulator's.
    None where one of the two was not measured.
    """

    env: str
    num_envs: int
    contestant: str
    steps_per_second: float
    ratio: float
    of_limit: float | None
    steps_per_cpu_second: float | None
    cpu_ratio: float | None
    cpu_of_limit: float | None
    turns: Sequence[Turn]


def bench_command(arguments: Sequence[str]) -> int:
    """Run `neoteny bench ARGUMENTS`. Returns the exit code. Raises UsageError before it measures or writes anything."""
    options = parse(BenchOptions, arguments, "neoteny bench", EXAMPLE)
    cases = check_cases(options)
    names, left_out = choose(options.against)
    rounds = min(options.rounds, 3) if options.quick else options.rounds
    seconds = min(options.seconds, 0.1) if options.quick else options.seconds
    environments = {env: describe(env) for env in dict.fromkeys(case.env for case in cases)}
    if options.out is not None:
        make_folder(options.out)
    results: list[Result] = []
    began, load = time.time(), os.getloadavg()

    def summary() -> dict[str, Any]:
        return {
            "command": ["neoteny", "bench", *arguments],
            "rounds": rounds,
            "seconds": seconds,
            "threads": cases[0].threads,
            "load_before": load,
            "load_after": os.getloadavg(),
            "wall_seconds": time.time() - began,
            "environments": environments,
            "left_out": left_out,
            "results": [asdict(result) for result in results],
        }

    with contextlib.ExitStack() as processes:
        contenders = {name: processes.enter_context(Contender(name)) for name in names}
        for case in cases:
            say(options, f"{case.env}, {rows(case.num_envs)}")
            results += run_case(case, contenders, rounds, seconds, left_out)
            if options.out is not None:
                write_json(options.out / "bench.json", summary())
    if options.json:
        print(json.dumps(summary()))
    else:
        print("\n".join([table(results), "", *left_out, *legend(summary())]))
    if options.out is not None:
        with replacing(options.out / "bench.png") as path:
            bars(results).savefig(path, format="png", dpi=150)
        say(options, f"{options.out / 'bench.json'}\n{options.out / 'bench.png'}")
    return 0


def check_cases(options: BenchOptions) -> list[Case]:
    """Every environment at every number of rows. Raises UsageError for a number out of range."""
    for name in ("rounds", "seconds"):
        if not vars(options)[name] > 0:
            raise UsageError(f"{name} must be above 0, got {vars(options)[name]}")
    if options.threads < 0:
        raise UsageError(f"threads must be 0 (all cores) or more, got {options.threads}")
    if not options.env or not options.num_envs:
        raise UsageError(f"bench needs an environment and a number of rows, for example: {EXAMPLE}")
    if min(options.num_envs) < 1:
        raise UsageError(f"num_envs must be at least 1, got {min(options.num_envs)}")
    from envs.cores import available_cores

    threads = options.threads or available_cores()
    counts = dict.fromkeys(options.num_envs)
    return [Case(env, num_envs, threads) for env in dict.fromkeys(options.env) for num_envs in counts]


def choose(against: Sequence[str]) -> tuple[list[str], list[str]]:
    """Contestants that are wanted and installed, ours first, and a line for each that is not installed.

    against: names of peers, none for all. Raises UsageError for an unknown one.
    """
    peers = [name for name in CONTESTANTS if name != OURS]
    for name in against:
        if name not in peers:
            raise UsageError(f"unknown contestant '{name}'.{nearest(name, peers)}")
    chosen, lines = [OURS], []
    for name in peers:
        peer = CONTESTANTS[name]
        if against and name not in against:
            continue
        if peer.package and importlib.util.find_spec(peer.package) is None:
            lines.append(f"{peer.title} is not installed, its rows are left out: {peer.install}")
        else:
            chosen.append(name)
    return chosen, lines


def describe(env: str) -> dict[str, Any]:
    """Commit, machine, versions and settings. One row is built for it: UsageError if that is not possible."""
    import envs
    from runs.train import describe_environment

    try:
        with contextlib.closing(envs.make(env)) as runner:
            return describe_environment(runner)
    except ValueError as error:
        raise UsageError(str(error)) from error


def make_folder(folder: Path) -> None:
    """Raises UsageError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to '{folder}': {error.strerror}") from error


def run_case(
    case: Case, contenders: Mapping[str, Contender], rounds: int, seconds: float, left_out: list[str]
) -> list[Result]:
    """Open the case in everyone who takes part, let them take turns, close it. Failures of others go into `left_out`.

    Raises RuntimeError if our own runner fails.
    """
    playing: dict[str, Callable[[float], Turn]] = {}
    failed: dict[str, str] = {}
    for name, contender in contenders.items():
        if CONTESTANTS[name].takes_part(case):
            try:
                contender.open(case)
                contender.turn(seconds)  # warm-up
                playing[name] = contender.turn
            except ContestantFailed as error:
                failed[name] = str(error)
    turns, failed_later = take_turns(playing, rounds, seconds)
    for name in turns:
        contenders[name].close_case()
    for name, reason in (failed | failed_later).items():
        if name == OURS:
            raise RuntimeError(f"the runner failed on {case.env} with {rows(case.num_envs)}: {reason}")
        left_out.append(f"Without {CONTESTANTS[name].title} on {case.env}, {rows(case.num_envs)}: {reason}")
    return summarise(case, turns)


def summarise(case: Case, turns: Mapping[str, Sequence[Turn]]) -> list[Result]:
    """Medians over rounds of rates, and of ratios taken inside a round; the k-th turns of all are of round k."""
    wall = {name: [turn.steps / turn.seconds for turn in own] for name, own in turns.items()}
    cpu = {
        name: [turn.steps / turn.cpu_seconds for turn in own if turn.cpu_seconds]
        for name, own in turns.items()
        if all(turn.cpu_seconds for turn in own)
    }
    return [
        Result(
            env=case.env,
            num_envs=case.num_envs,
            contestant=name,
            steps_per_second=statistics.median(wall[name]),
            ratio=statistics.median(a / b for a, b in zip(wall[OURS], wall[name], strict=True)),
            of_limit=_median_ratio(wall[name], wall.get(LIMIT)),
            steps_per_cpu_second=statistics.median(cpu[name]) if name in cpu else None,
            cpu_ratio=_median_ratio(cpu.get(OURS), cpu.get(name)),
            cpu_of_limit=_median_ratio(cpu.get(name), cpu.get(LIMIT)),
            turns=own,
        )
        for name, own in turns.items()
    ]


def _median_ratio(upper: Sequence[float] | None, lower: Sequence[float] | None) -> float | None:
    if upper is None or lower is None:
        return None
    return statistics.median(a / b for a, b in zip(upper, lower, strict=True))


def table(results: Sequence[Result]) -> str:
    """The results as an aligned Markdown table, to be read in a terminal or pasted into a page."""
    lines = [_cells(result) for result in results]
    widths = [max(len(line[column]) for line in [COLUMNS, *lines]) for column in range(len(COLUMNS))]
    left = [name in LEFT_ALIGNED for name in COLUMNS]

    def row(cells: Sequence[str]) -> str:
        padded = zip(cells, widths, left, strict=True)
        return (
            f"| {' | '.join(cell.ljust(width) if is_left else cell.rjust(width) for cell, width, is_left in padded)} |"
        )

    rule = ["-" * width if is_left else "-" * (width - 1) + ":" for width, is_left in zip(widths, left, strict=True)]
    return "\n".join([row(COLUMNS), row(rule), *map(row, lines)])


def _cells(result: Result) -> list[str]:
    own = result.contestant == OURS
    return [
        result.env,
        str(result.num_envs),
        CONTESTANTS[result.contestant].title,
        _count(result.steps_per_second),
        _two_digits(result.of_limit),
        "" if own else _two_digits(result.ratio),
        _count(result.steps_per_cpu_second),
        _two_digits(result.cpu_of_limit),
        "" if own else _two_digits(result.cpu_ratio),
    ]


def _count(value: float | None) -> str:
    """Three digits of it: 36612.7 -> '36 600', 941.6 -> '942'."""
    return "-" if value is None else f"{float(f'{value:.3g}'):,.0f}".replace(",", " ")


def _two_digits(value: float | None) -> str:
    """1.234 -> '1.23', 16.4 -> '16'."""
    return "-" if value is None else f"{value:.2f}" if value < 9.995 else f"{value:.0f}"


def rows(num_envs: int) -> str:
    """'1 row', '64 rows'."""
    return "1 row" if num_envs == 1 else f"{num_envs} rows"


def legend(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of the table must know, in a few lines."""
    described = next(iter(summary["environments"].values()))
    before, after = summary["load_before"][0], summary["load_after"][0]
    return [
        f"Medians over {summary['rounds']} rounds of turns of {summary['seconds']:g} s, {summary['threads']} threads; "
        "ratios are taken inside a round, above 1 ours is faster.",
        "A step is one action in one row. CPU s: processor seconds of the whole process tree. "
        "Limit: the bare simulator, one loop a thread.",
        f"{described['machine']}; load {before:.1f} before, {after:.1f} after; commit {described['commit']}; "
        f"{summary['wall_seconds']:.0f} s.",
    ]


def bars(results: Sequence[Result]) -> Figure:
    """A panel for each environment and number of rows, a bar for each contestant, in print colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[Result]] = {}
    for result in results:
        panels.setdefault(f"{result.env}, {rows(result.num_envs)}", []).append(result)
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 2.1 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (title, own) in zip(places, panels.items(), strict=False):
        _draw_panel(axes, title, own)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    return figure


def _draw_panel(axes: Axes, title: str, results: Sequence[Result]) -> None:
    from matplotlib.ticker import EngFormatter

    from runs.figures import COLOURS, PRINT

    colours = {OURS: COLOURS[0], LIMIT: PRINT.grid}
    rates = [result.steps_per_second for result in results]
    names = [CONTESTANTS[result.contestant].title for result in results]
    drawn = axes.barh(names, rates, color=[colours.get(result.contestant, COLOURS[5]) for result in results])
    notes = ["" if result.contestant == OURS else f" ours / it {_two_digits(result.ratio)}" for result in results]
    axes.bar_label(drawn, notes, color=PRINT.soft, fontsize=8)
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize=10, color=PRINT.text)
    axes.set_xlim(0, 1.35 * max(rates))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("steps/s", color=PRINT.soft, fontsize=8)
    axes.tick_params(labelsize=8, labelcolor=PRINT.text, color=PRINT.grid)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(PRINT.grid)


def say(options: BenchOptions, line: str) -> None:
    """Progress, on stderr."""
    if not options.quiet:
        print(line, file=sys.stderr, flush=True)
