"""Strategies of Avalanche on our streams: same samples, network, order and record, one seed after the other.

Avalanche owns its loop over a task, so a task is trained at its end, from the samples in the order of our stream. Each
seed and task has random numbers of its own, so a seed is what it would be alone, and the state at the end of a task
(`continual.avalanche.state`) decides all that follows. Settings have Avalanche's names and, but for the size of a
memory, its defaults. Works with: task, class, domain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from continual.avalanche import require_avalanche
from continual.memory import Batch
from continual.networks.classifier import Classifier
from continual.strategy import Metrics, Setting, Strategy
from continual.streams import Task
from plasticity.adam import Adam
from plasticity.networks.functional import evaluating
from plasticity.networks.stacked import member
from plasticity.sgd import SGD


@dataclass(frozen=True, kw_only=True)
class Naive:
    """Fine-tuning."""

    avalanche: ClassVar[str] = "Naive"  # the name of the class in `avalanche.training`
    shuffled: ClassVar[bool] = False  # its loader draws an order of its own, as its memory would be read in turn else


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Replay of a batch of a memory that is balanced over experiences, from the second experience on."""

    avalanche: ClassVar[str] = "Replay"
    shuffled: ClassVar[bool] = True
    mem_size: int | None = None
    """samples kept; default: the benchmark's"""


@dataclass(frozen=True, kw_only=True)
class EWC:
    """Elastic weight consolidation. Its penalty has no factor 1/2, its Fisher squares gradients of batches."""

    avalanche: ClassVar[str] = "EWC"
    shuffled: ClassVar[bool] = False
    ewc_lambda: float = 0.4
    """weight of the penalty"""
    mode: str = "separate"
    """separate or online"""
    decay_factor: float | None = None
    """of online: what is left of old importance"""


@dataclass(frozen=True, kw_only=True)
class SI:
    """Synaptic intelligence."""

    avalanche: ClassVar[str] = "SynapticIntelligence"
    shuffled: ClassVar[bool] = False
    si_lambda: float = 0.0001
    """weight of the penalty"""
    eps: float = 1e-7
    """damping of the importance"""


@dataclass(frozen=True, kw_only=True)
class LwF:
    """Learning without forgetting."""

    avalanche: ClassVar[str] = "LwF"
    shuffled: ClassVar[bool] = False
    alpha: float = 1.0
    """weight of the old answers"""
    temperature: float = 2.0
    """by which outputs are divided"""


@dataclass(frozen=True, kw_only=True)
class MAS:
    """Memory aware synapses."""

    avalanche: ClassVar[str] = "MAS"
    shuffled: ClassVar[bool] = False
    lambda_reg: float = 1.0
    """weight of the penalty"""
    alpha: float = 0.5
    """what is left of old importance"""


@dataclass(frozen=True, kw_only=True)
class AGEM:
    """Averaged gradient episodic memory."""

    avalanche: ClassVar[str] = "AGEM"
    shuffled: ClassVar[bool] = False
    patterns_per_exp: int | None = None
    """samples kept of each task; default: the benchmark's memory in equal parts"""
    sample_size: int = 64
    """samples of the reference gradient"""


@dataclass(frozen=True, kw_only=True)
class GEM:
    """Gradient episodic memory; needs a solver, `pip install quadprog`."""

    avalanche: ClassVar[str] = "GEM"
    shuffled: ClassVar[bool] = False
    patterns_per_exp: int | None = None
    """samples kept of each task; default: the benchmark's memory in equal parts"""
    memory_strength: float = 0.5
    """margin of the constraints"""


@dataclass(frozen=True, kw_only=True)
class DER:
    """Dark experience replay, DER++ with beta above 0."""

    avalanche: ClassVar[str] = "DER"
    shuffled: ClassVar[bool] = False
    mem_size: int | None = None
    """samples kept; default: the benchmark's"""
    batch_size_mem: int = 10
    """samples replayed in a step"""
    alpha: float = 0.1
    """weight of the remembered outputs"""
    beta: float = 0.5
    """weight of the labels"""


@dataclass(frozen=True, kw_only=True)
class ERACE:
    """ER with an asymmetric cross-entropy."""

    avalanche: ClassVar[str] = "ER_ACE"
    shuffled: ClassVar[bool] = False
    mem_size: int | None = None
    """samples kept; default: the benchmark's"""
    batch_size_mem: int = 10
    """samples replayed in a step"""


@dataclass(frozen=True, kw_only=True)
class MIR:
    """Maximally interfered retrieval."""

    avalanche: ClassVar[str] = "MIR"
    shuffled: ClassVar[bool] = False
    mem_size: int | None = None
    """samples kept; default: the benchmark's"""
    subsample: int = 50
    """samples among which the most interfering are sought"""
    batch_size_mem: int = 10
    """samples replayed in a step"""


@dataclass(frozen=True, kw_only=True)
class GDumb:
    """A fresh network trained on the memory alone, after each task."""

    avalanche: ClassVar[str] = "GDumb"
    shuffled: ClassVar[bool] = True
    mem_size: int | None = None
    """samples kept; default: the benchmark's"""


@dataclass(frozen=True, kw_only=True)
class Cumulative:
    """Each task together with all data before it."""

    avalanche: ClassVar[str] = "Cumulative"
    shuffled: ClassVar[bool] = True


SETTINGS: dict[str, type[Any]] = {
    "avalanche-naive": Naive,
    "avalanche-replay": Replay,
    "avalanche-ewc": EWC,
    "avalanche-si": SI,
    "avalanche-lwf": LwF,
    "avalanche-mas": MAS,
    "avalanche-agem": AGEM,
    "avalanche-gem": GEM,
    "avalanche-der": DER,
    "avalanche-er_ace": ERACE,
    "avalanche-mir": MIR,
    "avalanche-gdumb": GDumb,
    "avalanche-cumulative": Cumulative,
}


class AvalancheStrategy(Strategy):
    """A strategy of Avalanche for each member. config: one of the settings above, or others of their form.

    plugins: makes those of Avalanche that a member, by number, has beside. Raises ValueError for what cannot be.
    """

    reviews = True
    learns_in_steps = False

    def __init__(self, setting: Setting, config: Any, plugins: Callable[[int], list[Any]] | None = None):
        require_avalanche()
        super().__init__(setting)
        if not isinstance(self.optimizer, SGD | Adam):
            raise ValueError("interventions act in our own strategies, not in those of Avalanche")
        if setting.inputs.augmentation != "none":
            raise ValueError("strategies of Avalanche learn from images as they are; take --augmentation none")
        if isinstance(config, GEM) and find_spec("quadprog") is None:
            raise ValueError("Avalanche's GEM needs a solver that is not installed: pip install quadprog")
        self.config = config
        # One seed for each member and task.
        self._seeds = setting.random().integers(2**31 - 1, setting.tasks).tolist()
        self._finished = 0
        self.members = [self._member(k, plugins(k) if plugins else []) for k in range(setting.members)]

    def _member(self, k: int, plugins: list[Any]) -> Any:
        """Avalanche's strategy of one member, with its network."""
        from continual.avalanche import parts

        device = self.seen.device
        template = self.setting.fresh(True, torch.Generator(device))
        model: nn.Module = member(self.network, template, k)
        if self.setting.labelled:
            model = parts.Told(model, self.setting.tasks, self.setting.outputs)
        return parts.build(
            self.config.avalanche, model.to(device), self._torch_optimizer(model), self._keywords(), plugins
        )

    def _torch_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        ours = self.optimizer
        if isinstance(ours, SGD):
            settings = {"weight_decay": ours.weight_decay, "nesterov": ours.nesterov}
            return torch.optim.SGD(model.parameters(), ours.learning_rate, ours.momentum, **settings)
        assert isinstance(ours, Adam)
        return torch.optim.AdamW(
            model.parameters(), ours.learning_rate, ours.betas, ours.epsilon, weight_decay=ours.weight_decay
        )

    def _keywords(self) -> dict[str, Any]:
        keywords = dataclasses.asdict(self.config)
        defaults = {
            "mem_size": self.setting.memory,
            "patterns_per_exp": max(1, self.setting.memory // self.setting.tasks),
        }
        return {n: defaults[n] if value is None and n in defaults else value for n, value in keywords.items()}

    def observe(self, batch: Batch, task: Task) -> Metrics:
        """Nothing: Avalanche trains at the end of the task."""
        return {}

    def review(self, batches: Iterable[Batch], task: Task) -> Metrics:
        from continual.avalanche import parts

        images, labels = zip(*((batch.x, batch.y) for batch in batches), strict=True)
        size = labels[0].shape[1]
        x, y = torch.cat(images, 1), torch.cat(labels, 1)
        losses = []
        for k, learner in enumerate(self.members):
            if self.setting.labelled:
                learner.model.newest = task.index
                learner.model.outputs[task.index] = task.outputs[k]
            old = self.seen[k].nonzero().flatten() if task.index else self.seen.new_zeros(0)
            experience = parts.experience(x[k], y[k], task.index, task.index if self.setting.labelled else 0, old)
            learner.train_mb_size, learner.train_epochs = size, task.epochs
            with parts.own_random_numbers(self._seeds[k][task.index]):
                losses.append(parts.train(learner, experience, self.config.shuffled or task.epochs > 1))
            self._copy(k)
        self._finished = task.index + 1
        return {"loss/current": torch.stack(losses)}

    @torch.no_grad()
    def _copy(self, k: int) -> None:
        """The stacked network shows what the member has learned."""
        own = {**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}
        learned = self._classifier(k)
        for name, value in [*learned.named_parameters(), *learned.named_buffers()]:
            own[name][k].copy_(value)

    def _classifier(self, k: int) -> Classifier:
        model = self.members[k].model
        return model.classifier if self.setting.labelled else model

    def predict(self, x: Tensor, task: Task | None) -> Tensor:
        scores = []
        for k, own in enumerate(x):
            classifier = self._classifier(k)
            with evaluating(classifier):
                scores.append(classifier(own))
        return torch.stack(scores)

    def state_dict(self) -> dict[str, Any]:
        from continual.avalanche import state

        saved = [state.state_of(learner) for learner in self.members] if self._finished else []
        return super().state_dict() | {"finished": self._finished, "members": saved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        from continual.avalanche.state import restore

        super().load_state_dict(state)
        self._finished = state["finished"]
        for learner, saved in zip(self.members, state["members"], strict=bool(self._finished)):
            restore(learner, saved)
