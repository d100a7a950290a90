"""What the user types: one typed dataclass for each command, which `runs.parsing` turns into flags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from runs.errors import UsageError
from runs.files import parse_json

FAMILIES = ("labels", "network", "next")  # of a probe's targets
CONTINUAL_EXAMPLE = "neoteny continual uer --benchmark split-digits --seeds 5"
OFFLINE_EXAMPLE = "neoteny offline a2pr --data lab/hopper/medium-replay-small --preset small --steps 20000"
COLLECT_EXAMPLE = "neoteny collect --env gym/Pendulum-v1 --policy medium --size tiny --name lab/pendulum/medium-v0"
INSPECT_EXAMPLE = "neoteny inspect lab/hopper/medium-replay-small"
TRAIN_EXAMPLE = "neoteny train td3 --env dmc/cartpole-swingup --steps 50000"


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train an agent online, several seeds side by side, into a run folder."""

    env: tuple[str, ...]
    """environment id, see `neoteny list envs`; several: tasks learnt one after the other"""
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """a run of `neoteny offline` that goes on online; no agent and no --env are needed then"""
    switch_every: int | None = None
    """steps of each task; a named sequence has its own"""
    switch_episodes: int | None = None
    """or episodes of each task, over all its environments"""
    eval_tasks: Literal["all", "current"] = "all"
    """evaluated during a task; at its end it is always all of them"""
    replay_at_switch: Literal["keep", "clear"] = "keep"
    """what becomes of older tasks' transitions; --replay fading lets them fade"""
    reference: tuple[Path, ...] = ()
    """runs that learnt each task from scratch, for forward transfer"""
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
    value_error: bool = False
    """when evaluated, compare Q with the discounted returns that follow (docs/agents.md)"""
    device: str = "auto"
    """auto, cpu or cuda"""
    threads: int = 0
    """threads for each process; 0 chooses"""
    compile: bool = False
    """torch.compile the losses (pays on GPUs, on CPUs for Symphony)"""
    overlap: bool = False
    """simulate while the networks learn; an update then misses the newest step"""
    bf16: bool = False
    """bfloat16 products in gradient steps: faster, fewer digits (docs/results/speed.md)"""
    cuda_graphs: bool = False
    """replay gradient steps as CUDA graphs where that is possible"""
    with_: Annotated[str, tyro.conf.arg(name="with")] = "none"
    """keeps the networks able to learn, joined by +: nap, layernorm, rmsnorm, l2, l2-init"""
    lr_schedule: Literal["constant", "linear", "cosine", "cosine-restart"] = "constant"
    """of all learning rates, over --steps; cosine-restart: over each task"""
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
    for name in ("image_size", "frame_stack", "render_profile", "switch_every", "switch_episodes"):
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
    fqe: int = 0
    """steps of fitted-Q evaluation, which judges offline runs from their data"""
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
    """Train every combination that a TOML file lists; started again, it goes on."""

    file: Annotated[Path, tyro.conf.Positional]
    """what to train, see docs/sweep.md; or one of `neoteny list sweeps`"""
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
class ContinualOptions:
    """Learn one task after another with a strategy; all seeds in one process."""

    benchmark: str
    """stream of tasks, see `neoteny list benchmarks`"""
    kind: Literal["task", "class", "domain"] | None = None
    """what is told of tasks: task, class or domain incremental; default: the benchmark's"""
    preset: str | None = None
    """small: cut down to minutes; or published settings, see `neoteny list presets`"""
    seeds: int = 5
    """how many independent repetitions"""
    seed: int = 0
    """the first seed; the others follow it"""
    tasks: int | None = None
    """into how many; default: the benchmark's, as everywhere below"""
    epochs: int | None = None
    """passes over each task; 1: online"""
    batch_size: int | None = None
    """samples of the stream in a step"""
    blurry: float | None = None
    """part of each task's samples that is exchanged with other tasks"""
    class_groups: tuple[int, ...] = ()
    """how many classes each task has; default: all as many"""
    class_order: tuple[int, ...] = ()
    """of all seeds; default: drawn for each"""
    train_per_class: int | None = None
    """only so many training images of each class"""
    test_per_class: int | None = None
    """only so many test images of each class"""
    augmentation: Literal["none", "crop-flip", "doubled"] | None = None
    """none, crop-flip, or doubled (each image and a strongly augmented copy)"""
    network: str | None = None
    """mlp, cnn, resnet18-reduced, lenet, mlp-bn, resnet18, ..."""
    hidden: tuple[int, ...] = ()
    """sizes of its layers"""
    optimizer: Literal["sgd", "adam"] | None = None
    """sgd or adam"""
    learning_rate: float | None = None
    """constant"""
    momentum: float | None = None
    """of sgd"""
    nesterov: bool = False
    """sgd looks ahead along its momentum"""
    with_: Annotated[str, tyro.conf.arg(name="with")] = "none"
    """keeps the network able to learn, joined by +: nap, redo, l2-init"""
    mask_unseen: bool = True
    """classes that did not come yet are no answer"""
    eval_every: int | None = None
    """steps between looks within a task; default: ten in each; 0: none"""
    checkpoint_every: float = 60.0
    """seconds between checkpoints"""
    data: Path | None = None
    """folder of data sets; default: $NEOTENY_DATA"""
    device: str = "auto"
    """auto, cpu or cuda"""
    threads: int = 1
    """of the process"""
    tensorboard: bool = True
    """also write TensorBoard event files"""
    out: Path = Path("results")
    """folder of all runs"""
    name: str | None = None
    """folder of this run in --out; default: strategy and benchmark, numbered"""
    quiet: bool = False
    """no progress"""
    json: bool = False
    """print the closing summary as one JSON object on stdout"""


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """What the networks of a checkpoint can still learn, compared with fresh ones of the same kind."""

    run: Annotated[Path, tyro.conf.Positional]
    """folder of a run, or a file with the state_dict of a torch module"""
    families: tuple[str, ...] = FAMILIES
    """targets: drawn labels, outputs of a random network, next tasks"""
    step: int | None = None
    """which checkpoint; default: the newest"""
    seeds: int = 3
    """how many of the run's seeds, its first ones"""
    network: str | None = None
    """only this one, such as actor, critics, or an intervention"""
    layers: bool = True
    """also layer by layer"""
    draws: int = 5
    """how often targets are drawn"""
    steps: int = 300
    """training steps"""
    batch_size: int = 64
    samples: int = 256
    """inputs that are trained on; half as many are held out"""
    learning_rate: float | None = None
    """also tried: a third and three times it; default: that of the run"""
    builder: str | None = None
    """of a file: MODULE:FUNCTION that builds its network"""
    inputs: Path | None = None
    """of a file: its inputs, .pt or .npy, [N, ...]"""
    input_shape: tuple[int, ...] = ()
    """of a file: shape of one input, to be drawn from the normal distribution"""
    outputs: Literal["classes", "numbers"] = "classes"
    """of a file: what its outputs are"""
    device: str = "auto"
    """auto, cpu or cuda"""
    threads: int = 1
    out: Path | None = None
    """where the results go; default: into the run, or beside the file"""
    quiet: bool = False
    """no progress and no table"""
    json: bool = False
    """print everything measured as one JSON object on stdout"""


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """What there is to name on the command line."""

    what: Annotated[str, tyro.conf.Positional] = "all"
    """agents, presets, strategies, benchmarks, sweeps, problems, interventions, envs, data"""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Fetch image-caption pairs by npm, or list them with where they are."""

    action: Annotated[str, tyro.conf.Positional]
    """fetch or list"""
    name: Annotated[str, tyro.conf.Positional] = ""
    """emoji or icons"""
    data: Path | None = None
    """folder that they go to; default: $NEOTENY_DATA, else the cache"""
    quiet: bool = False
    """say nothing but errors"""


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
