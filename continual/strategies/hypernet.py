"""Dependency-preserving hypernetworks (Chandra, Varshney, Srijith & Gupta, WACV 2023, arXiv:2209.07712).

An LSTM h(e, θ) writes the weights of the network, chunk after chunk, from the embedding e_t of a task:

    W_t = h(e_t, θ)
    L = CE of f(x, W_t) over the outputs of task t + β R(θ)                 R: `hypernetworks.regularisers`

R keeps the weights that it writes for earlier tasks. Their embeddings rest; e_t learns from the first term, for it is
not in the second. Growth: maps between hidden states learn in the first task only, and of each task a copy of the
others is kept, so that little is left to forget (`--growth inputs`), or nothing (`full`).

Only the abstract of the paper could be read; the rest follows its authors' code (specs/rnn-hypernetworks.md). Not in
here: their plateau rule of learning rates, training on of earlier embeddings, soft targets. Where the task is not told,
each earlier embedding answers, and the answer of least entropy counts, as in HNET. The benchmark's optimiser trains θ
and e_t; ours for hypernetworks is Adam. Works with: task, class, domain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from continual.hypernetworks.generators import Generator, Theta, normal, parameter_count
from continual.hypernetworks.lstm import GROWTHS, Growth, LSTMGenerator
from continual.hypernetworks.regularisers import anchor_distance, diagonal_fisher, output_distance, step_ahead
from continual.hypernetworks.settings import Settings
from continual.hypernetworks.target import Statistics, Target
from continual.memory import Batch
from continual.strategies.er_ace import classes_of
from continual.strategy import Metrics, Setting, Strategy
from continual.streams import Task
from plasticity.adam import Adam
from plasticity.networks.functional import evaluating
from plasticity.population import copy_state_
from plasticity.sgd import SGD


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """The LSTM's own settings; the paper's other ones are presets."""

    hidden_size: int = 32
    """H, of the LSTM; 96: [L]"""
    growth: Growth = "none"
    """of each task a copy is kept: of nothing, of input maps, or of all but the hidden maps [L]"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, got {self.hidden_size}")
        if self.growth not in GROWTHS:
            raise ValueError(f"growth must be one of {', '.join(GROWTHS)}, got '{self.growth}'")
        if self.growth == "full" and self.regulariser != "none":
            raise ValueError("growth 'full' keeps all that wrote earlier weights, so it needs regulariser 'none'")

    def generator(self, weights: int, tasks: int) -> Generator:
        sizes = self.hidden_size, self.task_embedding, self.chunk_embedding, self.head_scale, self.growth
        return self.sized(lambda chunk: LSTMGenerator(weights, chunk, *sizes), weights, tasks)


class Hypernet(Strategy):
    """A network whose weights a generator writes for each task."""

    takes_interventions = False
    trains_network = False

    def __init__(self, setting: Setting, config: Settings):
        super().__init__(setting)
        self.config, self.reviews = config, config.regulariser == "fisher"
        self.target = Target(self.network)
        self.generator = config.generator(self.target.size, setting.tasks)
        self.random = setting.random()
        drawn = [self._drawn(source) for source in self.random.generators]
        first = {name: torch.stack([member[name] for member in drawn]) for name in drawn[0]}
        embeddings = first.pop("task_embeddings").unbind(1)
        self.embeddings = [nn.Parameter(e.clone()) for e in embeddings]  # T of [K, d_e]
        self.theta = {name: nn.Parameter(value) for name, value in first.items()}  # [K, *shape] each
        self.begun = self.finished = self.step = 0  # tasks, tasks, steps in the present one
        self.outputs: list[Tensor] = []  # of each task begun, bool [K, C]
        self.copies: dict[str, list[Tensor]] = {name: [] for name in self.generator.grown}  # of each task finished
        self.kept_statistics: list[Statistics] = []
        self.learned: list[Tensor] = []  # W_j as it was when task j ended, [K, N]
        self.fisher: list[Tensor] = []  # [K, N]
        self.then: Theta = {}  # θ*
        self.targets: Tensor | None = None  # h(e_j, θ*), [K, t, N]
        self._prepare()

    def _drawn(self, source: torch.Generator) -> dict[str, Tensor]:
        embeddings = normal(source, self.setting.tasks, self.config.task_embedding)
        return self.generator.draw(source) | {"task_embeddings": embeddings}

    @property
    def parameter_count(self) -> int:
        """θ and the embeddings of all tasks; copies that growth keeps not."""
        return parameter_count(self.generator) + self.setting.tasks * self.config.task_embedding

    def begin_task(self, task: Task) -> None:
        self.begun, self.step = task.index + 1, 0
        self.outputs.append(task.outputs)
        self.target.reset_statistics()
        if task.index:
            if self.config.new_embedding == "copied":
                self.embeddings[task.index].data.copy_(self.embeddings[task.index - 1].data)
            self.then = {name: value.detach().clone() for name, value in self.theta.items()}
        self._prepare()
        if self._regularises and self.config.targets == "stored":
            with torch.no_grad():
                self.targets = self.written(self.then)[:, :-1]

    def _prepare(self) -> None:
        """What follows from the task that was begun: what is trained in it, by a new optimiser, and Q and F."""
        rests = self.generator.frozen if self.begun > 1 else ()
        self._trained = [name for name in self.theta if name not in rests]
        self.parameters = [*(self.theta[name] for name in self._trained), self.embeddings[max(0, self.begun - 1)]]
        self.optimizer = self.setting.optimizer(nn.ParameterList(self.parameters))
        self._first_rate = self.optimizer.learning_rate
        if self._regularises:
            self._own = self.target.own_weights(torch.stack(self.outputs[:-1], 1))
            self._importance = self._normalised() if self.fisher else None

    @property
    def _regularises(self) -> bool:
        return self.begun > 1 and self.config.regulariser != "none" and self.config.beta > 0

    def _normalised(self) -> Tensor:
        """F of all tasks so far, [K, t, N]; of mean 1 over the weights that each task uses, if that is wanted."""
        found = torch.stack(self.fisher[: self.begun - 1], 1)
        if self.config.fisher_norm == "none":
            return found
        mean = (found * self._own).sum(2, keepdim=True) / self._own.sum(2, keepdim=True)
        return found / mean.clamp_min(torch.finfo(found.dtype).tiny)

    def observe(self, batch: Batch, task: Task) -> Metrics:
        self._set_rate(task)
        tasks = self._regularised_tasks()
        # Both terms come from one walk of the generator, but for the regulariser that looks ahead.
        together = self._regularises and not self.config.lookahead
        written = self.written(self.theta, tasks) if together else self.weights_of(task.index).unsqueeze(1)
        own = task.outputs.unsqueeze(1) | classes_of(batch.y, self.setting.outputs)  # blurry tasks have others too
        terms = {"loss/current": self.cross_entropy(self.target(written[:, -1], batch.x), batch.y, own)}
        if self.config.head_anchor and self.then:
            heads = ([theta[name] for name in self.generator.head] for theta in (self.then, self.theta))
            terms["loss/head_anchor"] = self.config.head_anchor * anchor_distance(*heads)
        if together:
            terms["loss/regulariser"] = self.config.beta * self.distance(written[:, :-1], tasks)
        loss = torch.stack(list(terms.values())).sum(0)
        if self._regularises and self.config.lookahead:
            terms["loss/regulariser"] = self._descend_looking_ahead(loss, tasks)
        else:
            self.descend(loss)
        self.step += 1
        return {name: term.detach() for name, term in terms.items()}

    def _descend_looking_ahead(self, loss: Tensor, tasks: Tensor | None) -> Tensor:
        """One step on `loss` and β R(θ + Δθ), where Δθ is the step on `loss` alone. Returns the second, [K]."""
        gradients = torch.autograd.grad(loss.sum(), self.parameters)
        ahead = [p.requires_grad_(True) for p in step_ahead(cast(Adam | SGD, self.optimizer), gradients)[:-1]]
        theta = {**self.theta, **dict(zip(self._trained, ahead, strict=True))}
        penalty = self.config.beta * self.distance(self.written(theta, tasks)[:, :-1], tasks)
        more = torch.autograd.grad(penalty.sum(), ahead)
        self.optimizer.step([*(a + b for a, b in zip(gradients[:-1], more, strict=True)), gradients[-1]])
        return penalty

    def _set_rate(self, task: Task) -> None:
        drops = zip(self.config.rate_drops, self.config.rate_factors, strict=True)
        passed = [1.0, *(factor for part, factor in drops if self.step >= part * task.steps)]
        self.optimizer.learning_rate = self._first_rate * passed[-1]

    def _regularised_tasks(self) -> Tensor | None:
        """Earlier tasks drawn for each member, [K, s]; None: all."""
        wanted = self.config.regularised_tasks
        if not self._regularises or wanted is None or wanted >= self.begun - 1:
            return None
        return self.random.uniform(self.begun - 1).argsort(1)[:, :wanted]

    def weights_of(self, index: int) -> Tensor:
        """W of a task, [K, N], from what was kept for it and what was not."""
        kept = {name: copies[index] for name, copies in self.copies.items() if index < self.finished}
        return self.generator({**self.theta, **kept}, self.embeddings[index].unsqueeze(1))[:, 0]

    def written(self, theta: Theta, tasks: Tensor | None = None) -> Tensor:
        """W of earlier tasks and, last, of the present one: [K, t + 1, N]. tasks [K, s]: of the earlier only those."""
        *earlier, present = self.embeddings[: self.begun]
        embeddings = _with_present([e.detach() for e in earlier], present, tasks)
        own = {name: _with_present(copies, theta[name], tasks) for name, copies in self.copies.items()}
        return self.generator({**theta, **own}, embeddings)

    def distance(self, now: Tensor, tasks: Tensor | None = None) -> Tensor:
        """R [K] of weights [K, t, N] written for earlier tasks, or for these of them."""
        if self.targets is None:
            with torch.no_grad():
                then = self.written(self.then, tasks)[:, :-1]
        else:
            then = _picked(self.targets, tasks)
        importance = None if self._importance is None else _picked(self._importance, tasks)
        return output_distance(then, now, _picked(self._own, tasks), importance)

    def review(self, batches: Iterable[Batch], task: Task) -> Metrics:
        """The Fisher information of W, from samples of the task and its own outputs."""
        x, y, own = *_first_samples(batches, self.config.fisher_samples), task.outputs.unsqueeze(1)

        def log_likelihood(weights: Tensor, index: int) -> Tensor:
            here = slice(index, index + 1)
            labels = y[:, here]
            outputs = self.target(weights, x[:, here])
            return -self.cross_entropy(outputs, labels, own | classes_of(labels, self.setting.outputs))

        with evaluating(self.network):
            found = diagonal_fisher(log_likelihood, self.weights_of(task.index), y.shape[1])
        self.fisher.append(found + self.fisher[-1] if self.config.fisher == "online" and self.fisher else found)
        return {}

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        for name, copies in self.copies.items():
            copies.append(self.theta[name].detach().clone())
        self.kept_statistics.append(self.target.statistics())
        self.finished = self.begun
        self.then, self.targets = {}, None
        if self.config.targets == "stored":
            self.learned.append(self.weights_of(task.index))

    def predict(self, x: Tensor, task: Task | None) -> Tensor:
        if task is not None or not self.begun:
            return self._answer(x, 0 if task is None else task.index)
        answers = [self._answer(x, index) for index in range(self.begun)]
        own = [outputs.unsqueeze(1) for outputs in self.outputs]
        scores = torch.stack([a.masked_fill(~o, -torch.inf).log_softmax(2) for a, o in zip(answers, own, strict=True)])
        surest = torch.special.entr(scores.exp()).sum(3).argmin(0)  # [K, B]
        return scores.take_along_dim(surest[None, :, :, None], 0)[0]

    def _answer(self, x: Tensor, index: int) -> Tensor:
        statistics = self.kept_statistics[index] if index < self.finished else None
        return self.target(self.weights_of(index), x, statistics)

    @torch.no_grad()
    def head_of(self, task: Task) -> Tensor:
        return self.target.cut(self.weights_of(task.index))["head.weight"]

    @torch.no_grad()
    def measurements(self) -> Iterator[tuple[int | None, Metrics]]:
        """Parameters with all copies, for each weight of the target too; of each task how far its weights are from when
        they were learned, as Euclidean distance."""
        kept = parameter_count(self.generator, self.generator.grown) * max(0, self.finished - 1)
        count = torch.full((self.setting.members,), float(self.parameter_count + kept), dtype=torch.float64)
        yield None, {"growth/parameters": count, "hypernet/compression": count / self.target.size}
        for index, learned in enumerate(self.learned):
            yield index + 1, {"hypernet/drift": (self.weights_of(index) - learned).norm(dim=1)}

    def state_dict(self) -> dict[str, Any]:
        own = {name: value for name, value in self.network.state_dict().items() if name not in self.target.shapes}
        return {
            "theta": {name: value.detach() for name, value in self.theta.items()},
            "embeddings": [e.detach() for e in self.embeddings],
            "optimizer": self.optimizer.state_dict(),
            "network": own,
            "random": [generator.get_state() for generator in self.random.generators],
            "seen": self.seen,
            **{name: getattr(self, name) for name in _PLAIN_STATE},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in ("theta", "embeddings"):
            copy_state_(getattr(self, name), state[name], name)
        device = self.seen.device
        for name in _PLAIN_STATE:
            setattr(self, name, _moved(state[name], device))
        self._prepare()
        self.optimizer.load_state_dict(state["optimizer"])
        self.network.load_state_dict(state["network"], strict=False)
        for generator, saved in zip(self.random.generators, state["random"], strict=True):
            generator.set_state(saved)
        self.seen.copy_(state["seen"])


# What decides the future and has no shape of its own before the first task.
_PLAIN_STATE = (
    "begun", "finished", "step", "outputs", "copies", "kept_statistics", "learned", "fisher", "then", "targets",
)  # fmt: skip


def _first_samples(batches: Iterable[Batch], count: int) -> tuple[Tensor, Tensor]:
    """Inputs [K, n, *shape] and labels [K, n] of the first `count` samples, or of all if there are fewer."""
    taken: list[Batch] = []
    for batch in batches:
        taken.append(batch)
        if sum(each.y.shape[1] for each in taken) >= count:
            break
    return torch.cat([batch.x for batch in taken], 1)[:, :count], torch.cat([batch.y for batch in taken], 1)[:, :count]


def _picked(values: Tensor, tasks: Tensor | None) -> Tensor:
    """Of values [K, t, ...] those of tasks [K, s], [K, s, ...]; None: all."""
    if tasks is None:
        return values
    return values[torch.arange(len(values), device=values.device).unsqueeze(1), tasks]


def _with_present(earlier: Sequence[Tensor], present: Tensor, tasks: Tensor | None) -> Tensor:
    """[K, ...] of each earlier task, or of those drawn, and of the present one: [K, t + 1, ...]."""
    return torch.cat([_picked(torch.stack(list(earlier), 1), tasks), present.unsqueeze(1)], 1)


def _moved(value: Any, device: torch.device) -> Any:
    """The tensors of a nested state on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(inner, device) for name, inner in value.items()}
    return [_moved(inner, device) for inner in value] if isinstance(value, list) else value
