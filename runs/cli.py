"""The `neoteny` command: reads what the user typed, checks all of it, then starts the work.

Exit codes: 0 done, 2 bad input (one sentence, nothing written), 3 stopped early with a checkpoint, 1 a defect or a run
that failed.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Sequence

import agents
from continual import BASELINES as baselines
from continual import NAMES as strategies
from runs.errors import UsageError, nearest
from runs.offline_options import CollectOptions, InspectOptions, OfflineOptions
from runs.options import (
    COLLECT_EXAMPLE,
    CONTINUAL_EXAMPLE,
    INSPECT_EXAMPLE,
    OFFLINE_EXAMPLE,
    TRAIN_EXAMPLE,
    CompareOptions,
    ContinualOptions,
    DataOptions,
    DoctorOptions,
    EvaluateOptions,
    ListOptions,
    PlasticityOptions,
    ProbeOptions,
    ReportOptions,
    ResumeOptions,
    SweepOptions,
    TrainOptions,
    WatchOptions,
)
from runs.parsing import asks_for_help, help_page, parse

OVERVIEW = """usage: neoteny COMMAND [options]

A continual- and reinforcement-learning laboratory.

  train AGENT --env ID   train an agent online, several seeds side by side
  offline AGENT --data D train an agent on fixed data
  collect  inspect DATA  make a dataset with trained agents; say what one holds
  resume RUN             continue a run that was stopped, killed or cut off
  evaluate RUN           scores of a run's newest checkpoint
  watch RUN              a video of one episode, without a display
  report RUN [RUN ...]   learning curves with intervals as one HTML page and a PNG
  compare A B [...]      which run is better, by how much, how sure
  continual STRATEGY     learn the tasks of a benchmark one after another
  data fetch NAME        image-caption pairs from the npm registry: emoji, icons
  plasticity             what interventions do to the ability to learn, side by side
  probe RUN              what a checkpoint can still learn, compared with a fresh network
  sweep FILE             train every combination that a file lists
  bench                  the runner's speed against other libraries and the bare simulator
  list                   agents, environments, presets, strategies, benchmarks, problems, interventions
  doctor                 check this installation

Example: neoteny train sac --env gym/Pendulum-v1 --preset small --steps 10000
`neoteny COMMAND --help` shows the options of a command.
"""


def train(arguments: Sequence[str]) -> int:
    if asks_for_help(arguments) and arguments[0].startswith("-"):  # of no agent, whose module would import torch
        print(help_page([TrainOptions], [None], "neoteny train AGENT", TRAIN_EXAMPLE))
        print(f"Agents: {', '.join(agents.NAMES)}; their")
        print("hyper-parameters: `neoteny train AGENT --help`.")
        return 0
    from runs.train import train_command

    return train_command(arguments)


def resume(arguments: Sequence[str]) -> int:
    options = parse(ResumeOptions, arguments, "neoteny resume", "neoteny resume results/td3-dmc-cartpole-swingup")
    from runs.continual import resume_continual
    from runs.continual_run import CONTINUAL
    from runs.groups import GROUP, refuse_single_arm
    from runs.plasticity import resume_plasticity
    from runs.resume import resume_run
    from runs.settings import read_config

    try:
        command = read_config(options.run)["command"]
    except ValueError as error:
        raise UsageError(str(error)) from error
    refuse_single_arm(options.run)
    return {GROUP: resume_plasticity, CONTINUAL: resume_continual}.get(command, resume_run)(options)


def evaluate(arguments: Sequence[str]) -> int:
    options = parse(EvaluateOptions, arguments, "neoteny evaluate", "neoteny evaluate results/td3-dmc-cartpole-swingup")
    from runs.play import evaluate_run

    if options.fqe < 0:
        raise UsageError(f"--fqe must not be negative, got {options.fqe}")
    scores = evaluate_run(options.run, options.episodes, options.seed, options.device)
    if options.fqe:
        from runs.offline_evaluation import values_without_environment

        scores["metrics"] |= values_without_environment(options.run, options.fqe, options.device)
    if options.json:
        print(json.dumps(scores))
        return 0
    for name, summary in scores["metrics"].items():
        interval = "" if summary["low"] is None else f" [{summary['low']:.1f}, {summary['high']:.1f}]"
        print(f"{name}: {summary['mean']:.1f}{interval} over {summary['seeds']} seeds")
    return 0


def watch(arguments: Sequence[str]) -> int:
    options = parse(WatchOptions, arguments, "neoteny watch", "neoteny watch results/td3-dmc-cartpole-swingup")
    from runs.play import film_run

    path, steps, return_ = film_run(
        options.run, options.seed, options.episode_seed, options.out, options.max_steps, options.size, options.fps
    )
    print(f"{path}: {steps} steps, return {return_:.1f}")
    return 0


def report(arguments: Sequence[str]) -> int:
    options = parse(ReportOptions, arguments, "neoteny report", "neoteny report results/td3-dmc-cartpole-swingup")
    from runs.groups import expand
    from runs.report import write_report

    if not options.runs:
        raise UsageError("report needs at least one run folder")
    try:
        folders = expand(options.runs)
    except ValueError as error:
        raise UsageError(str(error)) from error
    out, formats = options.out or options.runs[0], [name.strip() for name in options.format.split(",")]
    try:
        for path in write_report(folders, out, formats):
            print(path)
    except ValueError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(f"cannot write to '{out}': {error.strerror}; choose another folder with --out") from error
    return 0


def compare(arguments: Sequence[str]) -> int:
    """Say which run is better; see `runs.compare`."""
    options = parse(CompareOptions, arguments, "neoteny compare", "neoteny compare results/sac results/td3")
    from runs.compare import compare_runs, print_comparison

    comparison = compare_runs(options.runs, options.metric, options.at)
    if options.json:
        print(json.dumps(comparison.as_json()))
    else:
        print_comparison(comparison)
    return 0


def list_(arguments: Sequence[str]) -> int:
    options = parse(ListOptions, arguments, "neoteny list", "neoteny list envs")
    import envs
    from continual.catalogue import BENCHMARKS, KNOWN
    from continual.pairs.benchmarks import COLLECTIONS
    from continual.presets import PRESETS as STRATEGY_PRESETS
    from plasticity import registry
    from plasticity.problems.published import PROBLEMS
    from runs.catalogue import AGENTS, OFFLINE, PRESETS
    from runs.datasets import minari_files
    from runs.growth_options import PRESETS as GROWTH_PRESETS
    from runs.sweep_file import SHIPPED

    known_presets = {**PRESETS, **STRATEGY_PRESETS, "growclip": GROWTH_PRESETS}
    listings: dict[str, Callable[[], list[str]]] = {
        "agents": lambda: [*AGENTS, *OFFLINE],
        "presets": lambda: [f"{whose} {preset}" for whose, presets in (known_presets).items() for preset in presets],
        "strategies": lambda: [*KNOWN, "growclip"],
        "benchmarks": lambda: [*BENCHMARKS, *COLLECTIONS],
        "sweeps": lambda: sorted(path.stem for path in SHIPPED.glob("*.toml")),
        "problems": lambda: list(PROBLEMS),
        "interventions": registry.names,
        "envs": envs.known_ids,
        "data": lambda: minari_files.local_ids(minari_files.root()),
    }
    if options.what not in (*listings, "all"):
        raise UsageError(f"cannot list '{options.what}'.{nearest(options.what, (*listings, 'all'))}")
    for name, listing in listings.items():
        if options.what == "all":
            print(f"{name}:")
        if options.what in (name, "all"):
            indent = "  " if options.what == "all" else ""
            print("\n".join(indent + line for line in listing()))
    return 0


def doctor(arguments: Sequence[str]) -> int:
    parse(DoctorOptions, arguments, "neoteny doctor", "neoteny doctor")
    from runs.doctor import doctor as examine
    from runs.doctor import print_doctor

    return print_doctor(examine())


def sweep(arguments: Sequence[str]) -> int:
    """Runs `neoteny sweep`."""
    options = parse(SweepOptions, arguments, "neoteny sweep", "neoteny sweep rates.toml --dry-run")
    from runs.sweep import run_sweep

    return run_sweep(options, arguments)


def probe(arguments: Sequence[str]) -> int:
    """Runs `neoteny probe`."""
    options = parse(ProbeOptions, arguments, "neoteny probe", "neoteny probe results/td3-dmc-cartpole-swingup")
    from runs.probe import probe_command

    return probe_command(options)


def plasticity(arguments: Sequence[str]) -> int:
    """Runs `neoteny plasticity`."""
    example = "neoteny plasticity --problem permuted-digits --preset small --with none,l2-init,redo,nap"
    options = parse(PlasticityOptions, arguments, "neoteny plasticity", example)
    from runs.plasticity import plasticity_command

    return plasticity_command(options)


def continual(arguments: Sequence[str]) -> int:
    """Runs `neoteny continual`."""
    if asks_for_help(arguments) and arguments[0].startswith("-"):  # of no strategy, whose module would import torch
        print(help_page([ContinualOptions], [None], "neoteny continual STRATEGY", CONTINUAL_EXAMPLE))
        theirs = [name.removeprefix("avalanche-") for name in baselines]
        listed = f"Strategies: {', '.join(strategies)}; run by Avalanche, avalanche-: {', '.join(theirs)}."
        print(textwrap.fill(listed, 110))
        print("`neoteny continual STRATEGY --help` shows the settings of one.")
        raise SystemExit(0)
    from runs.continual import continual_command

    return continual_command(arguments)


def offline(arguments: Sequence[str]) -> int:
    """Runs `neoteny offline`."""
    if asks_for_help(arguments) and arguments[0].startswith("-"):  # of no agent, whose module would import torch
        print(help_page([OfflineOptions], [None], "neoteny offline AGENT", OFFLINE_EXAMPLE))
        print(f"Agents: {', '.join(agents.OFFLINE_NAMES)}.\n`neoteny offline AGENT --help` shows the settings of one.")
        raise SystemExit(0)
    from runs.offline import offline_command

    return offline_command(arguments)


def collect(arguments: Sequence[str]) -> int:
    """Runs `neoteny collect`."""
    if asks_for_help(arguments):
        print(help_page([CollectOptions], [None], "neoteny collect", COLLECT_EXAMPLE))
        raise SystemExit(0)
    from runs.collect import collect_command

    return collect_command(arguments)


def inspect(arguments: Sequence[str]) -> int:
    """Runs `neoteny inspect`."""
    if asks_for_help(arguments):
        print(help_page([InspectOptions], [None], "neoteny inspect", INSPECT_EXAMPLE))
        raise SystemExit(0)
    from runs.offline import inspect_command

    return inspect_command(arguments)


def data(arguments: Sequence[str]) -> int:
    """Runs `neoteny data`."""
    options = parse(DataOptions, arguments, "neoteny data", "neoteny data fetch emoji")
    from runs.data import data_command

    return data_command(options)


def bench(arguments: Sequence[str]) -> int:
    """Runs `neoteny bench`."""
    from runs.bench import bench_command

    return bench_command(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "offline": offline,
    "collect": collect,
    "inspect": inspect,
    "resume": resume,
    "evaluate": evaluate,
    "watch": watch,
    "report": report,
    "compare": compare,
    "continual": continual,
    "data": data,
    "plasticity": plasticity,
    "probe": probe,
    "sweep": sweep,
    "bench": bench,
    "list": list_,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `neoteny`. Returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(OVERVIEW, end="")
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("neoteny"))
        return 0
    try:
        if arguments[0] not in COMMANDS:
            raise UsageError(f"unknown command '{arguments[0]}'.{nearest(arguments[0], COMMANDS)}")
        return COMMANDS[arguments[0]](arguments[1:])
    except UsageError as error:
        print(f"neoteny: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("neoteny: interrupted", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
