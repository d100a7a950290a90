"""`neoteny collect`: trains an agent where none is given, and writes datasets of what it did and does."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

import envs
from agents.offline.transitions import Transitions
from envs.cores import available_cores
from envs.mujoco_simulation import compiler_unheard
from envs.runner import ContinuousActionSpec
from runs.datasets import minari_files
from runs.datasets.card import page
from runs.datasets.collection import alive_share
from runs.datasets.d4rl_files import write_d4rl
from runs.datasets.dataset import About, Dataset, fingerprint
from runs.datasets.extras import require_minari
from runs.datasets.mix import mix
from runs.datasets.source import DataSource, locate, references_of
from runs.errors import UsageError, nearest
from runs.files import write_atomically
from runs.folders import describe_machine
from runs.offline_options import CollectOptions
from runs.options import COLLECT_EXAMPLE
from runs.parsing import parse
from runs.record import read_status
from runs.snapshots import RandomSource, Source

KINDS = ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert")
# Mixtures by name: components with their fractions. A number behind the name is the percentage of the better part.
MIXTURES = {
    "random-medium": {"random": 0.5, "medium": 0.5},
    "random-expert": {"random": 0.5, "expert": 0.5},
    "random-medium-expert": {"random": 1 / 3, "medium": 1 / 3, "expert": 1 / 3},
}
_SIZES = {"tiny": 10_000, "small": 100_000, "full": 1_000_000}
_TRAIN_STEPS = {"tiny": 10_000, "small": 100_000, "full": 1_000_000}
_ALIVE_WARNING = 0.95


@dataclass(frozen=True)
class Job:
    """The datasets of one environment: `names` of its id, kinds and how its agent is trained."""

    env: str
    kinds: tuple[str, ...]
    transitions: int
    agent: str
    train_steps: int
    eval_every: int
    flags: tuple[str, ...]
    suffix: str


_MIXED = ("random", "medium", "medium-replay", "medium-expert", "expert")
# Of a few minutes each; the robots learn to run a little, not to win.
PRESETS: dict[str, tuple[Job, ...]] = {
    "offline-small": (
        Job("mujoco/Hopper-v5", (*_MIXED, "random-medium-20"), 30_000, "sac", 60_000, 1_500, (), "-small"),
        Job("mujoco/HalfCheetah-v5", (*_MIXED, "random-medium-20"), 30_000, "sac", 60_000, 1_500, (), "-small"),
        Job(
            "gym/Pendulum-v1",
            (*_MIXED, "random-medium-20", "random-expert-6"),
            10_000,
            "td3",
            12_000,
            250,
            ("--hidden", "64", "64"),
            "-small",
        ),
    )
}


def collect_command(arguments: Sequence[str]) -> int:
    """Run `neoteny collect ARGUMENTS`. Returns the exit code; raises UsageError, with no dataset half-written."""
    options = parse(CollectOptions, arguments, "neoteny collect", COLLECT_EXAMPLE)
    root = (options.out or minari_files.root()).absolute()
    if options.mix is not None:
        made = [_write_mixture(options, root)]
    else:
        jobs = list(_jobs(options))
        targets = [(job, [(kind, _name(options, job, kind)) for kind in job.kinds]) for job in jobs]
        for _, named in targets:
            for _, name in named:
                _require_free(root, name)
        require_minari()
        folders = _train_all(jobs, options)
        try:
            made = [_collect(job, named, folders[job], options, root) for job, named in targets]
        except ValueError as error:
            raise UsageError(str(error)) from error
        made = [one for of_job in made for one in of_job]
    if options.json:
        print(json.dumps({"datasets": made}))
    return 0


def _jobs(options: CollectOptions) -> Iterator[Job]:
    if options.preset is not None:
        if options.preset not in PRESETS:
            raise UsageError(f"collect has no preset '{options.preset}'.{nearest(options.preset, PRESETS)}")
        if options.name is not None or options.from_ is not None:
            raise UsageError("--preset names its datasets and trains its agents itself; leave --name and --from away")
        yield from PRESETS[options.preset]
        return
    env = options.env or (_env_of(options.from_) if options.from_ is not None else None)
    if env is None:
        raise UsageError(f"collect needs an environment, for example: {COLLECT_EXAMPLE}")
    for kind in options.policy:
        if kind not in KINDS:
            fractions_of(kind)
    if options.name is not None and len(options.policy) > 1:
        raise UsageError(f"--name is of one dataset, --policy names {len(options.policy)}")
    for flag in ("train_steps", "train_eval_every", "transitions", "num_envs"):
        if vars(options)[flag] is not None and vars(options)[flag] < 1:
            raise UsageError(f"--{flag.replace('_', '-')} must be at least 1, got {vars(options)[flag]}")
    runner = envs.make(env)
    runner.close()
    if not isinstance(runner.action_spec, ContinuousActionSpec):
        raise UsageError(f"collect is for continuous actions, '{env}' has {runner.action_spec.count} discrete ones")
    train_steps = options.train_steps or _TRAIN_STEPS[options.size]
    every = options.train_eval_every or max(1, train_steps // 40)
    size = options.transitions or _SIZES[options.size]
    suffix = "" if options.size == "full" else f"-{options.size}"
    flags = tuple(shlex.split(options.train_flags))
    yield Job(env, options.policy, size, options.agent, train_steps, every, flags, suffix)


def _env_of(folder: Path) -> str:
    from runs.config import RunConfig

    try:
        env = RunConfig.load(folder).env
    except ValueError as error:
        raise UsageError(str(error)) from error
    return env if isinstance(env, str) else env[0]


def fractions_of(kind: str) -> dict[str, float]:
    """The components of a mixture by name. Raises UsageError for a name that is none."""
    name, _, percent = kind.rpartition("-")
    if percent.isdigit() and name in MIXTURES and len(MIXTURES[name]) == 2 and 0 < int(percent) < 100:
        worse, better = MIXTURES[name]
        return {worse: 1 - int(percent) / 100, better: int(percent) / 100}
    if kind in MIXTURES:
        return MIXTURES[kind]
    raise UsageError(f"unknown policy '{kind}'.{nearest(kind, (*KINDS, *MIXTURES))}")


def _name(options: CollectOptions, job: Job, kind: str) -> str:
    if options.name is not None:
        return minari_files.check_id(options.name)
    env = re.sub(r"-v\d+$", "", job.env.partition("/")[2]).lower().replace("/", "-")
    return f"lab/{env}/{kind}{job.suffix}-v0"


def _require_free(root: Path, name: str) -> None:
    if (root / name).exists():
        raise UsageError(f"'{root / name}' exists already; choose another --name or --out, or remove it")


def _train_all(jobs: Sequence[Job], options: CollectOptions) -> dict[Job, Path | None]:
    """The runs to collect from: the one given, or one trained for each job, as many at a time as there are cores.

    None for jobs of random actions alone.
    """
    if options.from_ is not None:
        return dict.fromkeys(jobs, options.from_)
    folders = {job: options.work / _run_name(job, options.seed) for job in jobs if set(job.kinds) != {"random"}}
    commands = {
        job: _training_command(job, folder, options.seed)
        for job, folder in folders.items()
        if not folder.exists() or read_status(folder).get("state") != "done"
    }
    waiting, running = list(commands.items()), dict[Job, subprocess.Popen[bytes]]()
    try:
        while waiting or running:
            while waiting and len(running) < available_cores():
                job, command = waiting.pop(0)
                if not options.quiet:
                    print(f"training {job.agent} on {job.env}: {folders[job]}", file=sys.stderr)
                running[job] = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            for job, child in list(running.items()):
                if child.poll() is not None:
                    del running[job]
                    if child.returncode:
                        raise UsageError(f"training for the datasets of {job.env} ended early, see {folders[job]}")
    finally:
        for child in running.values():
            child.terminate()
            child.wait()
    return {job: folders.get(job) for job in jobs}


def _run_name(job: Job, seed: int) -> str:
    return f"collect-{job.agent}-{job.env.replace('/', '-')}-{job.train_steps}-seed{seed}"


def _training_command(job: Job, folder: Path, seed: int) -> list[str]:
    program = [sys.executable, "-m", "runs.cli"]
    if folder.exists():
        return [*program, "resume", str(folder), "--quiet"]
    every = str(job.eval_every)
    flags = {
        "env": job.env,
        "preset": "small",
        "steps": str(job.train_steps),
        "replay-capacity": str(2 * job.train_steps + 2),  # a slot more for every episode
        "eval-every": every,
        "checkpoint-every": every,
        "keep-every": every,
        "seeds": "1",
        "seed": str(seed),
        "out": str(folder.parent),
        "name": folder.name,
    }
    pairs = [part for name, value in flags.items() for part in (f"--{name}", value)]
    return [*program, "train", job.agent, *pairs, "--quiet", "--no-tensorboard", *job.flags]


def _collect(
    job: Job, named: Sequence[tuple[str, str]], folder: Path | None, options: CollectOptions, root: Path
) -> list[dict[str, Any]]:
    if folder is None:
        source: RandomSource = RandomSource(job.env, {}, options.seed, options.num_envs)
    else:
        source = Source(folder, options.seed, options.num_envs, options.deterministic)
    if source.env != job.env:
        raise UsageError(f"'{folder}' is a run in '{source.env}', not in '{job.env}'")
    known: dict[str, Transitions] = {}
    found = []
    for kind, name in named:
        parts = {kind: 1.0} if kind in KINDS else fractions_of(kind)
        for part in parts:
            if part not in known:
                known[part] = source.collected(part, job.transitions)
        components: dict[str, int] = {}
        if kind in KINDS:
            data = known[kind]
        else:
            data, labels = mix([(known[part], amount) for part, amount in parts.items()], "fraction", options.seed)
            components = dict(zip(parts, np.bincount(labels).tolist(), strict=True))
        card = {**source.described(kind), "kind": kind, "seed": options.seed, "components": components}
        pairs = {} if source.pair is None else {"lab": source.pair}
        about = About(name, "collected here", job.env, kind, pairs)
        about = dataclasses.replace(about, references=references_of(Dataset(data, about), job.env))
        found.append(_write(Dataset(data, about), name, card, options, root))
    return found


def _write(data: Dataset, name: str, card: dict[str, Any], options: CollectOptions, root: Path) -> dict[str, Any]:
    """One dataset: Minari's files, a card, on request D4RL's file."""
    about, found = data.about, data.transitions
    assert about.env is not None
    share = alive_share(about.env, found)
    card |= {"fingerprint": fingerprint(found), "returns": [round(r, 4) for r in found.returns().tolist()]}
    card |= {} if share is None else {"alive_share_of_return": share}
    if share is not None and share >= _ALIVE_WARNING and about.kind in ("medium", "expert"):
        print(f"neoteny: {share:.0%} of the return in {name} is for standing, not for moving", file=sys.stderr)
    pair = about.references.get("d4rl") or about.references.get("lab")
    metadata = {
        "algorithm_name": str(card.get("agent", "mixture")),
        "description": f"{about.kind} data of {about.env}, made by `neoteny collect`",
        **({} if pair is None else {"ref_min_score": pair[0], "ref_max_score": pair[1]}),
        minari_files.ENV: about.env,
        minari_files.KIND: about.kind,
        minari_files.REFERENCES: {who: list(both) for who, both in about.references.items()},
        minari_files.CARD: card,
    }
    target = root / name
    try:
        # Minari makes the environment, which compiles its model.
        with compiler_unheard() if about.env.startswith("mujoco/") else contextlib.nullcontext():
            minari_files.write_minari(target, name, found, _spaces(about.env), metadata, _env_spec(about.env))
        if options.d4rl:
            write_d4rl(target / f"{target.name}.hdf5", found)
        write_atomically(target / "CARD.md", _card_page(data, card))
    except OSError as error:
        raise UsageError(f"cannot write '{target}': {error.strerror or error}") from error
    if not options.quiet:
        print(f"{target}: {len(found):,} transitions in {len(found.lengths):,} episodes", file=sys.stderr)
    return {"id": name, "path": str(target), "transitions": len(found), "fingerprint": card["fingerprint"]}


def _card_page(data: Dataset, card: dict[str, Any]) -> str:
    told = {key: value for key, value in card.items() if key not in ("returns", "evaluations")}
    lines = [
        f"# {data.about.source}",
        "",
        "```",
        *page(data),
        "```",
        "",
        "```json",
        json.dumps(told, indent=2),
        "```",
        "",
    ]
    return "\n".join(lines)


def _spaces(env: str) -> tuple[Any, Any]:
    runner = envs.make(env)
    runner.close()
    spec = runner.action_spec
    assert isinstance(spec, ContinuousActionSpec)
    observations = gymnasium.spaces.Box(-np.inf, np.inf, runner.observation_spec.shape, np.float32)
    return observations, gymnasium.spaces.Box(spec.low, spec.high, dtype=np.float32)


def _env_spec(env: str) -> Any:
    """Gymnasium's own of the environment, None where it has none."""
    suite, _, name = env.partition("/")
    return gymnasium.spec(name) if suite in ("gym", "mujoco") and name in gymnasium.registry else None


def _write_mixture(options: CollectOptions, root: Path) -> dict[str, Any]:
    """`--mix`: a dataset of whole episodes of others."""
    if options.name is None:
        raise UsageError("--mix needs a --name for the mixture, for example lab/hopper/mine-v0")
    name = minari_files.check_id(options.name)
    _require_free(root, name)
    wanted = []
    for word in (options.mix or "").split(","):
        place, colon, amount = word.rpartition(":")
        if not colon or not re.fullmatch(r"\d*\.?\d+", amount):
            raise UsageError(f"--mix is ID:AMOUNT,ID:AMOUNT, got '{word}'")
        wanted.append((place, float(amount)))
    try:
        parts = [(DataSource(path=str(locate(place))).open(), amount) for place, amount in wanted]
        environments = {part.about.env for part, _ in parts}
        if len(environments) > 1 or None in environments:
            raise UsageError(f"a mixture is of data of one environment, these are of {sorted(map(str, environments))}")
        data, labels = mix([(part.transitions, amount) for part, amount in parts], options.unit, options.seed)
    except ValueError as error:
        raise UsageError(str(error)) from error
    counts = np.bincount(labels).tolist()
    first = parts[0][0].about
    origins = [
        {"source": part.about.source, "transitions": count, "fingerprint": fingerprint(part.transitions)}
        for (part, _), count in zip(parts, counts, strict=True)
    ]
    card = {"kind": "mixture", "components": origins, "seed": options.seed, "made_by": describe_machine()}
    about = About(name, "mixed here", first.env, "mixture", references_of(parts[0][0], first.env))
    return _write(Dataset(data, about), name, card, options, root)
