"""What the user types: one typed dataclass for each command, turned into flags by tyro."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import itertools
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from runs.errors import UsageError, nearest
from runs.files import parse_json

TRAIN_EXAMPLE = "neoteny train td3 --env dmc/cartpole-swingup --steps 50000"


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train an agent online, several seeds side by side, into a run folder."""

    env: str
    """environment id, see `neoteny list envs`"""
    obs: Literal["state", "pixels"] = "state"
    """what is seen of MuJoCo and dm_control tasks: numbers, or pictures"""
    image_size: int | None = None
    """height and width of these pictures; default: 84"""
    frame_stack: int | None = None
    """pictures in one observation; default: 3"""
    render_profile: str | None = None
    """how well pictures are drawn: reference (default) or fast"""
    env_set: tuple[str, ...] = ()
    """other settings of the environment, KEY=VALUE ..., for example sticky_actions=0.0"""
    steps: int = 1_000_000
    """environment steps (one agent action each) of every seed"""
    seeds: int = 3
    """how many independent repetitions"""
    seed: int = 0
    """the first seed; the others follow it"""
    seeds_as: str = "auto"
    """population (one process for all), processes (one for each) or auto, see docs/seeds.md"""
    preset: str | None = None
    """published hyper-parameters by name, see `neoteny list presets`"""
    num_envs: int = 1
    """environments stepped together for each seed"""
    eval_every: int | None = None
    """steps between evaluations; default: a twentieth of --steps"""
    eval_episodes: int = 10
    """episodes of one evaluation"""
    checkpoint_every: int | None = None
    """steps between checkpoints; default: a quarter of --steps"""
    keep_every: int | None = None
    """steps between checkpoints that stay for good; default: only the last two stay"""
    diagnostics_every: int | None = None
    """steps between measurements of dormant units, ranks and norms; default: none"""
    device: str = "auto"
    """auto, cpu or cuda"""
    threads: int = 0
    """threads for each process; 0 chooses"""
    compile: bool = False
    """torch.compile the losses (pays on GPUs, not for small networks on CPUs)"""
    overlap: bool = False
    """simulate while the networks learn; an update then misses the newest step"""
    bf16: bool = False
    """bfloat16 products in gradient steps: faster, fewer digits (docs/results/speed.md)"""
    with_: Annotated[str, tyro.conf.arg(name="with")] = "none"
    """keeps the networks able to learn, joined by +: nap, layernorm, rmsnorm, l2, l2-init"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """of all learning rates, over --steps"""
    lr_warmup: int = 0
    """steps over which a cosine schedule first rises"""
    lr_end: float = 0.0
    """part of the learning rate that is left when linear and cosine end"""
    tensorboard: bool = True
    """also write TensorBoard event files"""
    histograms: bool = False
    """also show the weights of every network there, as a histogram at each evaluation"""
    film: bool = False
    """film one episode of the first seed at the end, for report and TensorBoard"""
    out: Path = Path("results")
    """folder of all runs"""
    name: str | None = None
    """folder of this run in --out; default: agent and environment, numbered"""
    quiet: bool = False
    """no progress"""
    json: bool = False
    """print the closing summary as one JSON object on stdout"""


# What `envs.make` is given from elsewhere, and seeds, which every evaluation draws anew.
_NOT_SETTINGS = ("env_id", "num_envs", "seed", "device", "threads", "row_seeds")


def environment_settings(options: TrainOptions) -> dict[str, Any]:
    """What the flags say of the environment, as keyword arguments of `envs.make`. Plain values, as JSON keeps them.

    Values of `--env-set` are JSON: 0.25, true, null, [240, 320]; what is none is text. Raises UsageError for a setting
    without a value, given twice, or decided by other flags.
    """
    found: dict[str, Any] = {} if options.obs == "state" else {"obs": options.obs}
    for name in ("image_size", "frame_stack", "render_profile"):
        if vars(options)[name] is not None:
            found[name] = vars(options)[name]
    for text in options.env_set:
        name, has_value, value = text.partition("=")
        if not has_value or not name.isidentifier():
            raise UsageError(f"--env-set needs KEY=VALUE, for example sticky_actions=0.0, got '{text}'")
        if name in _NOT_SETTINGS:
            raise UsageError(f"--env-set cannot set '{name}', which other flags decide")
        if name in found:
            raise UsageError(f"the environment setting '{name}' is given twice")
        found[name] = _plain_value(value)
    return found


def _plain_value(text: str) -> Any:
    try:
        return parse_json(text.encode())
    except ValueError:
        return text


@dataclass(frozen=True, kw_only=True)
class ResumeOptions:
    """Continue a run that was stopped, killed or cut off; it ends as if that had never happened."""

    run: Annotated[Path, tyro.conf.Positional]
    """folder of the run"""
    threads: int | None = None
    """threads of a process; default: as before, another number may change the last digits"""
    seeds_as: str | None = None
    """as in train; default: as before, another way may change the last digits"""
    quiet: bool = False
    """no progress"""
    json: bool = False
    """print the closing summary as one JSON object on stdout"""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Score the newest checkpoint of a run on fresh episodes, every seed of it."""

    run: Annotated[Path, tyro.conf.Positional]
    """folder of the run"""
    episodes: int = 10
    """episodes for each seed"""
    seed: int = 1_000_000
    """seed of the environments; not one that training used"""
    device: str = "auto"
    """auto, cpu or cuda"""
    json: bool = False
    """print the scores as one JSON object on stdout"""


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """Write an mp4 of one episode played by the newest checkpoint of a run; needs no display."""

    run: Annotated[Path, tyro.conf.Positional]
    """folder of the run"""
    seed: int | None = None
    """which seed of the run plays; default: its first"""
    episode_seed: int = 1_000_000
    """seed of the environment"""
    out: Path | None = None
    """the video file; default: videos/step_N_seed_K.mp4 in the run"""
    max_steps: int = 1_000
    """longest film, in steps"""
    size: int = 480
    """height and width in pixels; Atari keeps the console's"""
    fps: int = 30
    """pictures a second"""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write one self-contained HTML page and a PNG of the learning curves of one or more runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders of the runs"""
    out: Path | None = None
    """where report.html goes; default: into the first run's folder"""
    format: str = "html,png"
    """any of html, png, svg, csv, latex, joined by commas"""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Which of two or more runs of one environment is better, by how much, and how sure that is."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders of the runs; one of `neoteny plasticity` stands for all its arms"""
    metric: str | None = None
    """any name in metrics.jsonl; default: eval/return, of arms plasticity/online_accuracy"""
    at: str = "last"
    """last, auc (mean over steps) or threshold:X (steps to reach X)"""
    json: bool = False
    """print the comparison as one JSON object on stdout"""


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Train every combination of agents, environments and options that a TOML file lists; started again, it goes on."""

    file: Annotated[Path, tyro.conf.Positional]
    """what to train, see docs/sweep.md"""
    out: Path = Path("results")
    """the runs go to OUT/NAME"""
    name: str | None = None
    """default: the name of the file, without its ending"""
    engine: str = "local"
    """local (processes of this machine) or ray (cluster of $RAY_ADDRESS, or this machine)"""
    cores: int = 0
    """cores that the trials running at a time may take together; 0 = all"""
    gpus: float = 0.0
    """GPUs, or a share of one, that Ray reserves for each trial"""
    retries: int = 3
    """how often a trial that dies is resumed"""
    dry_run: bool = False
    """check everything, print the commands, start nothing"""
    quiet: bool = False
    """no progress"""
    json: bool = False
    """print the closing summary as one JSON object on stdout"""


@dataclass(frozen=True, kw_only=True)
class PlasticityOptions:
    """What interventions do to a network's ability to learn task after task; all seeds of each in one process."""

    problem: str
    """stream of tasks, see `neoteny list problems`"""
    with_: Annotated[str, tyro.conf.arg(name="with")] = "none,l2-init,redo,cbp,nap"
    """side by side; nap+redo: both at once; redo(every=100): a setting"""
    preset: str | None = None
    """small: the published problem cut down to minutes"""
    seeds: int = 10
    """how many independent repetitions"""
    seed: int = 0
    """the first seed; the others follow it"""
    steps: int | None = None
    """steps of each seed in all; default: those of the problem"""
    tasks: int | None = None
    """how many tasks, instead of --steps"""
    steps_per_task: int | None = None
    """steps of each task; default: the problem's"""
    batch_size: int | None = None
    """samples of a step; default: the problem's"""
    learning_rate: float | None = None
    """default: the problem's"""
    optimizer: str | None = None
    """sgd or adam; default: the problem's"""
    hidden: tuple[int, ...] = ()
    """sizes of the hidden layers; default: the problem's"""
    fresh: bool = True
    """also a network that is drawn anew for each task: what could be learnt"""
    stationary: bool = True
    """also each intervention where nothing changes"""
    diagnostics_every: int | None = None
    """steps between cheap measurements; default: 20 in a run"""
    curvature: bool = False
    """also measure Hessian and tangent kernel 20 times in a run"""
    checkpoint_every: float = 60.0
    """seconds between checkpoints of each intervention"""
    data: Path | None = None
    """folder of data sets; default: $NEOTENY_DATA"""
    device: str = "auto"
    """auto, cpu or cuda"""
    threads: int = 1
    """threads of each process"""
    jobs: int = 0
    """interventions at a time, a process each; 0: as many as there are cores"""
    compile: bool = False
    """torch.compile the network; pays in long runs"""
    tensorboard: bool = False
    """also write TensorBoard event files"""
    out: Path = Path("results")
    """folder of all runs"""
    name: str | None = None
    """folder of this run in --out; default: the problem, numbered"""
    quiet: bool = False
    """no progress"""
    json: bool = False
    """print the closing summary as one JSON object on stdout"""


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """What there is to name on the command line: agents, presets, problems, interventions, envs."""

    what: Annotated[str, tyro.conf.Positional] = "all"
    """agents, presets, problems, interventions, envs or all"""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Try what an installation needs (simulators, rendering, video, checkpoints) and say how to mend what fails."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Measure the runner against other libraries and the bare simulator, in turns, on this machine."""

    env: tuple[str, ...] = ("mujoco/HalfCheetah-v5", "dmc/cheetah-run", "atari/Pong")
    """environment ids, see `neoteny list envs`"""
    num_envs: tuple[int, ...] = (1, 64)
    """environments stepped together; each number is measured"""
    against: tuple[str, ...] = ()
    """some of gymnasium sync async dm_control ale envpool limit; default: all"""
    threads: int = 0
    """simulator threads of whoever has a setting for them; 0 = all cores"""
    rounds: int = 9
    """turns of every contestant"""
    seconds: float = 0.5
    """length of a turn"""
    quick: bool = False
    """at most 3 rounds of 0.1 s: to try it, not to quote"""
    out: Path | None = None
    """also write bench.json and bench.png into this folder"""
    quiet: bool = False
    """no progress"""
    json: bool = False
    """print everything measured as one JSON object on stdout, no table"""


Options = TypeVar("Options")


def parse(options: type[Options], arguments: Sequence[str], prog: str, example: str) -> Options:
    """Read flags into one options dataclass. Exits with code 0 for --help.

    Raises UsageError for a flag that does not exist or a value that does not parse.
    """
    return _parse(options, None, [options], arguments, prog, example)


def parse_with_agent(
    options: type[Options], config: Any, arguments: Sequence[str], prog: str, example: str
) -> tuple[Options, Any]:
    """The same with every hyper-parameter of an agent as a flag of its own; `config` holds the defaults."""
    both = Annotated[
        tuple[
            Annotated[options, tyro.conf.arg(name="run")],
            Annotated[type(config), tyro.conf.arg(name="hyper-parameters")],
        ],
        tyro.conf.OmitArgPrefixes,
    ]
    default = (options(env=tyro.MISSING), config)  # type: ignore[call-arg]
    return _parse(both, default, [options, type(config)], arguments, prog, example)


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether the page of a command is wanted instead of its work."""
    return "-h" in arguments or "--help" in arguments


def given_value(arguments: Sequence[str], flag: str) -> str | None:
    """The value of `flag` on a command line that is not parsed yet, None if it is not there."""
    for index, argument in enumerate(arguments):
        if argument == flag and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}=")
    return None


def _parse(
    target: Any, default: Any, classes: Sequence[type], arguments: Sequence[str], prog: str, example: str
) -> Any:
    if asks_for_help(arguments):
        print(help_page(classes, [None] * len(classes), prog, example), end="")
        raise SystemExit(0)
    _check_flags(classes, arguments, prog)
    keywords = {} if default is None else {"default": default}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(target, prog=prog, args=list(arguments), **keywords)
    except SystemExit:
        sentence = _one_sentence(complaint.getvalue())
        if sentence.startswith("Missing from"):
            sentence = f"`{prog}` needs {' and '.join(_missing(classes, arguments))}, for example: {example}"
        raise UsageError(sentence) from None


def _missing(classes: Sequence[type], arguments: Sequence[str]) -> list[str]:
    """What has no default and is not on the command line, as the help page names it."""
    required = [(cls, f.name) for cls in classes for f in dataclasses.fields(cls) if _default(f) == "required"]
    names = [name.upper() if _is_positional(cls, name) else _flag(name) for cls, name in required]
    return [name for name in names if given_value(arguments, name) is None]


def help_page(classes: Sequence[type], defaults: Sequence[Any], prog: str, example: str) -> str:
    """One line for each flag: name, default, meaning. tyro's own page takes two screens for an agent."""
    positional = [f.name.upper() for cls in classes for f in dataclasses.fields(cls) if _is_positional(cls, f.name)]
    lines = [f"usage: {' '.join([prog, *positional])} [options]", "", (classes[0].__doc__ or "").strip(), ""]
    for cls, values in zip(classes, defaults, strict=True):
        meanings = _field_docstrings(cls)
        for field in dataclasses.fields(cls):
            flag = field.name.upper() if _is_positional(cls, field.name) else _flag(field.name)
            default = _default(field) if values is None else vars(values)[field.name]
            lines.append(f"  {flag:<20} {_shown(default):<10} {meanings.get(field.name, '')}".rstrip())
        lines.append("")
    return "\n".join([*lines, f"Example: {example}", ""])


def _flag(name: str) -> str:
    """--with for the field `with_`, whose own name Python keeps for itself."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def _is_positional(cls: type, name: str) -> bool:
    hint = get_type_hints(cls, include_extras=True)[name]
    return tyro.conf.Positional in getattr(hint, "__metadata__", ())


def _default(field: dataclasses.Field[Any]) -> Any:
    return "required" if field.default is dataclasses.MISSING else field.default


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else "" if value is None else str(value)


def _field_docstrings(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass, as one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, doc in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(str(doc.value.value).split())
    return found


def _one_sentence(box: str) -> str:
    """What tyro complains of, without its frame, title and hint."""
    lines = [line.strip(" │╭╮╰╯─-") for line in box.splitlines()]
    rules = [number for number, line in enumerate(lines) if not line]
    start = next(number for number in range(len(lines)) if lines[number]) + 1
    end = next((number for number in rules if number > start + 1), len(lines))
    return re.sub(r"^Error parsing \S+: ", "", " ".join(filter(None, lines[start:end])))


def _check_flags(classes: Sequence[type], arguments: Sequence[str], prog: str) -> None:
    """tyro would answer with a page; a mistyped flag or number gets one sentence instead."""
    types: dict[str, Any] = {}
    for cls in classes:
        hints = get_type_hints(cls)
        types |= {_flag(field.name): hints[field.name] for field in dataclasses.fields(cls)}
    positional = any(_is_positional(cls, field.name) for cls in classes for field in dataclasses.fields(cls))
    if arguments and not arguments[0].startswith("-") and not positional:
        raise UsageError(f"`{prog}` does not know what to do with '{arguments[0]}'")
    known = {*types, *(f"--no-{flag[2:]}" for flag, kind in types.items() if kind is bool)}
    lists: set[str] = set()
    for index, argument in enumerate(arguments):
        if not argument.startswith("--"):
            continue
        flag, has_value, value = argument.partition("=")
        flag = flag.replace("_", "-")
        if flag not in known:
            raise UsageError(f"`{prog}` has no flag '{flag}'.{nearest(flag, known)}")
        if get_origin(types.get(flag)) is tuple:
            if flag in lists:  # argparse would forget the first values
                raise UsageError(f"flag '{flag}' is given twice; write all its values behind one")
            lists.add(flag)
        if types.get(flag) in (None, bool):
            continue
        if not has_value:
            value = arguments[index + 1] if index + 1 < len(arguments) else "--"
            if value.startswith("--"):
                raise UsageError(f"flag '{flag}' needs a value")
        _check_number(flag, value, types[flag])
        if get_origin(types[flag]) is tuple:
            for further in itertools.takewhile(lambda word: not word.startswith("--"), arguments[index + 2 :]):
                _check_number(flag, further, types[flag])


def _check_number(flag: str, value: str, kind: Any) -> None:
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
    if get_origin(kind) is not None and type(None) in get_args(kind):
        if value == "None":
            return
        kind = next(inner for inner in get_args(kind) if inner is not type(None))
    if kind not in (int, float):
        return
    try:
        kind(value)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise UsageError(f"flag '{flag}' needs {wanted}, got '{value}'") from None
