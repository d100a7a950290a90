"""What the user types for fixed data: `neoteny offline`, `inspect`, `collect`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class OfflineOptions:
    """Train an agent on fixed data, several seeds side by side; the environment is for evaluation alone."""

    data: str
    """id below Minari's root, a folder of a Minari dataset, or a D4RL .hdf5 or .npz file"""
    env: str | None = None
    """environment that evaluates; default: what the data say"""
    rule: Literal["d4rl", "exact"] = "d4rl"
    """of D4RL files: as d4rl.qlearning_dataset, or exact: their own next observations"""
    episode_limit: int | None = None
    """of D4RL's files without timeouts: steps of an episode"""
    observation_keys: tuple[str, ...] = ()
    """of dictionaries in Minari's datasets: which, in this order"""
    clip_actions: bool = False
    """move actions outside of the environment's bounds to them"""
    force: bool = False
    """train on AntMaze without shifted rewards"""
    stream: Path | None = None
    """folder for a mapped file, for data larger than memory"""
    ref_min: float | None = None
    """return that scores 0; default: what the data say, then D4RL's table"""
    ref_max: float | None = None
    """return that scores 100"""
    steps: int = 1_000_000
    """gradient steps of every seed"""
    seeds: int = 3
    """how many independent repetitions"""
    seed: int = 0
    """the first seed; the others follow it"""
    seeds_as: str = "auto"
    """population (one process for all), processes (one for each) or auto, see docs/seeds.md"""
    preset: str | None = None
    """published hyper-parameters by name, see `neoteny list presets`"""
    eval_every: int | None = None
    """steps between evaluations; default: a twentieth of --steps"""
    eval_episodes: int = 10
    """episodes of one evaluation"""
    diagnostics_every: int | None = None
    """steps between measurements of units, ranks and norms of the networks; default: none"""
    checkpoint_every: int | None = None
    """steps between checkpoints; default: a quarter of --steps"""
    keep_every: int | None = None
    """steps between checkpoints that stay for good; default: only the last two stay"""
    device: str = "auto"
    """auto, cpu or cuda"""
    threads: int = 0
    """threads for each process; 0 chooses"""
    compile: bool = False
    """torch.compile the losses (pays on GPUs, not for small networks on CPUs)"""
    bf16: bool = False
    """bfloat16 products in gradient steps: faster, fewer digits (docs/results/speed.md)"""
    cuda_graphs: bool = False
    """replay gradient steps as CUDA graphs where that is possible"""
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
    film: bool = False
    """film one episode of the first seed at the end, for report and TensorBoard"""
    out: Path = Path("results")
    """folder of all runs"""
    name: str | None = None
    """folder of this run in --out; default: agent and data, numbered"""
    quiet: bool = False
    """no progress"""
    json: bool = False
    """print the closing summary as one JSON object on stdout"""


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Say what data hold: episodes, flags, lengths, returns, reference pairs, fingerprint."""

    data: Annotated[str, tyro.conf.Positional]
    """as in `neoteny offline`"""
    rule: Literal["d4rl", "exact"] = "d4rl"
    """of D4RL's files, as in `neoteny offline`"""
    episode_limit: int | None = None
    """of D4RL's files without timeouts: steps of an episode"""
    observation_keys: tuple[str, ...] = ()
    """of dictionaries in Minari's datasets: which, in this order"""
    json: bool = False
    """print everything as one JSON object on stdout"""


@dataclass(frozen=True, kw_only=True)
class CollectOptions:
    """Make datasets as D4RL made its own: an agent is trained, and what it did and does is written down."""

    env: str | None = None
    """environment id, see `neoteny list envs`"""
    policy: tuple[str, ...] = ("medium",)
    """random, medium, expert, medium-replay, full-replay, medium-expert, random-expert-10"""
    name: str | None = None
    """id of the dataset; default: lab/ENV/POLICY-SIZE-v0"""
    size: Literal["tiny", "small", "full"] = "small"
    """transitions of a rollout: 10 000, 100 000 or 1 000 000"""
    transitions: int | None = None
    """or so many"""
    preset: str | None = None
    """offline-small: small sets of three environments, in minutes"""
    mix: str | None = None
    """instead: a mixture of datasets, as ID:AMOUNT,ID:AMOUNT"""
    unit: Literal["fraction", "transitions", "episodes"] = "fraction"
    """of the amounts behind --mix"""
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """a run of `neoteny train` with all its checkpoints; default: one is trained"""
    agent: Literal["sac", "td3"] = "sac"
    """which is trained, with --preset small"""
    train_steps: int | None = None
    """environment steps of that training; default: as many as a rollout of --size has"""
    train_eval_every: int | None = None
    """steps between its evaluations and snapshots; default: a fortieth"""
    train_flags: str = ""
    """further flags of `neoteny train`, as in --train-flags='--hidden 64 64'"""
    deterministic: bool = False
    """roll policies out without noise, unlike D4RL"""
    d4rl: bool = False
    """also write the dataset as D4RL-style HDF5 into its folder"""
    num_envs: int = 10
    """environments that are rolled out together"""
    seed: int = 0
    """of training, rollouts and mixtures"""
    out: Path | None = None
    """root of the datasets; default: Minari's"""
    work: Path = Path("results")
    """folder of the training runs"""
    quiet: bool = False
    """no progress"""
    json: bool = False
    """print what was made as one JSON object on stdout"""
