"""Dynamic sparse training for continual learning (Yildirim et al. 2024, PMLR 234; arXiv:2308.14831).

Each task trains a sparse sub-network of one dense network. Its topology moves while it learns: every ΔT batches some
connections are pruned and as many grown. What a task has trained stays as it is; later tasks may use it.

    V = the network as it was drawn, U = nothing
    for each task:
        w = V; a new mask m; w = w · m
        for each batch:
            g = gradient of the cross-entropy over the task's own outputs, that of w = 0 included
            g[U] = 0; step of a fresh optimiser; w = w · m
            every ΔT batches:  prune ⌈p |m|⌉ of m, grow as many, p falls along a cosine
            after each epoch: keep (w, m) if it fits the training samples better than before
        V[m \\ U] = w[m \\ U];  U = U ∪ m;  the task is tested with V · m

From the authors' code and the abstract, as the body of the paper could not be read; every choice is a setting
(specs/dynamic-sparse-training.md). Optimiser, epochs and batch are the benchmark's. Works with: task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import functional_call

from continual.memory import Batch
from continual.sparse import allocation
from continual.sparse.adaptation import POLICIES, Adapt, History, Policy
from continual.sparse.allocation import INITS, Init
from continual.sparse.masks import counted, density, lowest, over_members
from continual.sparse.rules import GROWTHS, PRUNES, Growth, Prune, grown, prune_rate, pruned
from continual.sparse.scores import GrowthScore
from continual.sparse.store import SubnetworkStore
from continual.sparse.subnetwork import Subnetwork, plain_batch_norm, prunable, reset_statistics_
from continual.strategy import Metrics, Setting, Strategy
from continual.streams import Task
from plasticity.adam import Adam
from plasticity.sgd import SGD

HEAD = "head.weight"
PER_TASK = ("init", "density", "growth", "update_every")  # settings that may be given for each task
UPDATE_EVERY = 400  # batches, in the authors' code


@dataclass(frozen=True, kw_only=True)
class Config:
    """The defaults of the authors' code. Where it has no equal, or a defect, ours: spec, section 10."""

    init: Init = "uniform"
    """how the density is spread over layers: uniform or erk"""
    density: float = 0.2
    """share of all weights that one task has"""
    mask_sampling: Literal["exact", "bernoulli"] = "exact"
    """the number of weights of a new mask: exact, or as it falls (the authors')"""
    growth: Growth = "random"
    """connections to grow: random, unfired (not active in this task yet), gradient (RigL), momentum, none (fixed)"""
    prune: Prune = "magnitude"
    """connections to prune: magnitude, set (smallest of each sign), taylor ((w g)²)"""
    strict: bool = False
    """prune by magnitude with a threshold, as the authors: equal weights go together"""
    prune_rate: float = 0.5
    """share of a layer's connections pruned at first; falls along a cosine"""
    prune_rate_min: float = 0.005
    """and at last"""
    update_every: int | None = None
    """ΔT, batches between updates; default: 400, in shorter tasks the 20th part of one"""
    update_stop: float = 1.0
    """part of a task's batches after which the topology stays"""
    free_weight_init: Literal["zero", "reinit"] = "zero"
    """weights that no task owns begin at zero, or as they were drawn (the first task's always)"""
    regrow: Literal["stored", "zero"] = "stored"
    """another task's weight that is grown acts with its value, or as 0 until the end of the task (the authors')"""
    classifier: Literal["masked", "own_rows"] = "masked"
    """the last layer is masked as all others, or each task has its dense rows, which the density does not count"""
    bias: Literal["per_task", "shared"] = "per_task"
    """biases: of each task, or of all, and then they drift (the authors')"""
    head_bias: bool = False
    """the last layer has a bias"""
    bn: Literal["batch", "per_task_stats"] = "batch"
    """batch normalisation, without gain and offset: by the batch also in tests, or with each task's statistics"""
    eval_slice: bool = True
    """only a task's own outputs compete in its test; off: all (the authors')"""
    checkpoint: Literal["best_train", "last"] = "best_train"
    """what is kept of a task: the epoch that fits its training samples best, or the last"""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """parts of a task's epochs after which the learning rate falls"""
    gamma: float = 0.1
    """by this factor"""
    policy: Policy = "none"
    """ours: explore-then-exploit, erk-then-uniform or free-capacity-density, from task to task"""
    init_per_task: tuple[Init, ...] = ()
    """of each task, instead of --init"""
    density_per_task: tuple[float, ...] = ()
    """of each task, instead of --density"""
    growth_per_task: tuple[Growth, ...] = ()
    """of each task, instead of --growth"""
    update_every_per_task: tuple[int, ...] = ()
    """of each task, instead of --update-every"""

    def __post_init__(self) -> None:
        choices = {
            "init": INITS, "mask_sampling": ("exact", "bernoulli"), "growth": GROWTHS, "prune": PRUNES,
            "free_weight_init": ("zero", "reinit"), "regrow": ("stored", "zero"), "bias": ("per_task", "shared"),
            "classifier": ("masked", "own_rows"), "bn": ("batch", "per_task_stats"),
            "checkpoint": ("best_train", "last"), "policy": tuple(POLICIES),
        }  # fmt: skip
        for name, allowed in choices.items():
            for value in (vars(self)[name], *vars(self).get(f"{name}_per_task", ())):
                if value not in allowed:
                    raise ValueError(f"{name} must be one of {', '.join(allowed)}, got '{value}'")
        for value in (self.density, *self.density_per_task):
            if not 0 < value <= 1:
                raise ValueError(f"density must be above 0 and at most 1, got {value:g}")
        for every in (self.update_every, *self.update_every_per_task):
            if every is not None and every < 1:
                raise ValueError(f"update_every must be at least 1, got {every}")
        if not 0 <= self.prune_rate_min <= self.prune_rate <= 1:
            raise ValueError("prune_rate and prune_rate_min must be in [0, 1], the second not above the first")
        if not 0 <= self.update_stop <= 1:
            raise ValueError(f"update_stop must be in [0, 1], got {self.update_stop:g}")
        if not all(0 < part < 1 for part in self.milestones) or not 0 < self.gamma <= 1:
            raise ValueError("milestones must be parts of a task in (0, 1), gamma in (0, 1]")
        if self.strict and self.prune != "magnitude":
            raise ValueError(f"strict is for --prune magnitude, not for {self.prune}")


class DST(Strategy):
    """adapt: settings of a task from what is known before it; None: those of `config.policy`.

    Raises ValueError for settings that do not fit the network, the optimiser or the tasks.
    """

    needs_task_labels = True
    takes_interventions = False

    def __init__(self, setting: Setting, config: Config, adapt: Adapt | None = None):
        tracked = config.bn == "per_task_stats"
        network, fresh = setting.network, setting.fresh
        setting = dataclasses.replace(
            setting,
            network=lambda bias: plain_batch_norm(network(bias), tracked),
            fresh=lambda bias, source: plain_batch_norm(fresh(bias, source), tracked),
        )
        super().__init__(setting, config.head_bias)
        self.config, self._adapt = config, adapt or POLICIES[config.policy]
        self.answers_with_all = not config.eval_slice
        self.random = setting.random()
        self.weights = dict(prunable(self.network))
        self.masked = [name for name in self.weights if config.classifier == "masked" or name != HEAD]
        trained = [name for name, p in self.network.named_parameters() if p.requires_grad]
        self._place = {name: trained.index(name) for name in self.weights}
        self._check()
        self._initial = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.store = SubnetworkStore(self._initial)
        self.in_training: int | None = None  # the task
        self.learned: Metrics = {}  # of the last task, [K] by name, as `History` has them

    def _check(self) -> None:
        setting, config = self.setting, self.config
        if not self.masked:
            raise ValueError("'dst' found no layer to make sparse; with classifier own_rows it needs a hidden one")
        if config.bn == "batch" and self.network.mixes_samples and setting.batch == 1:
            raise ValueError("batch normalisation needs more than one sample in a batch; raise --batch-size")
        for name in PER_TASK:
            count = len(vars(config)[f"{name}_per_task"])
            if count not in (0, setting.tasks):
                raise ValueError(f"{name}_per_task needs a value for each of the {setting.tasks} tasks, got {count}")
        for index, steps in enumerate(setting.steps):
            own = self._of_task(index)
            if own.growth == "momentum" and isinstance(self.optimizer, SGD) and not self.optimizer.momentum:
                raise ValueError("growth by momentum needs an optimiser with one: --optimizer adam, or --momentum 0.9")
            if own.growth != "none" and (own.update_every or 0) >= steps:
                raise ValueError(
                    f"the topology would never change: update_every is {own.update_every}, and a task has {steps} "
                    "batches; take fewer, more --epochs, or --growth none"
                )
            allocation.densities(own.init, self._shapes, own.density)

    def _of_task(self, index: int) -> Config:
        lists = {name: vars(self.config)[f"{name}_per_task"] for name in PER_TASK}
        return dataclasses.replace(self.config, **{name: given[index] for name, given in lists.items() if given})

    @property
    def _shapes(self) -> list[tuple[int, ...]]:
        return [tuple(self.weights[name].shape[1:]) for name in self.masked]

    # A task begins

    @torch.no_grad()
    def begin_task(self, task: Task) -> None:
        self.settings = self._settings(task)
        masks, values = self._new_masks(task), self._values()
        for name, weight in self.weights.items():
            weight.copy_(values[name] * masks[name])
        reset_statistics_(self.network)
        self._begin(task.index, masks)
        self._kept = self._snapshot() if self.config.checkpoint == "best_train" else {}

    def _begin(self, index: int, masks: Mapping[str, Tensor]) -> None:
        self.in_training, self.step = index, 0
        self.optimizer = optimizer = self.setting.optimizer(self.network)
        assert isinstance(optimizer, Adam | SGD)  # as there are no interventions
        self._learning_rate = self.optimizer.learning_rate
        owned, hides = self.store.owned, self.config.regrow == "zero"
        self.subnetwork = Subnetwork(masks, self.store.values, owned, hides)
        self._growth = GrowthScore(self.settings[0].growth, optimizer, self._place, self.weights)
        head = self.network.head.weight
        self._right = torch.zeros(len(head), dtype=torch.float64, device=head.device)  # of this epoch
        self._most_right = torch.full_like(self._right, -1)
        self._restarted = torch.zeros_like(self._right, dtype=torch.bool)

    def _settings(self, task: Task) -> list[Config]:
        """Of each member; a policy may give them another density and init, nothing else."""
        config = self._of_task(task.index)
        found = [dataclasses.replace(config, **self._adapt(known, config)) for known in self._histories(task)]
        same = [dataclasses.replace(own, init=config.init, density=config.density) for own in found]
        if any(own != same[0] for own in same):
            raise ValueError("a policy may give members another init or density, nothing else")
        return found

    def _histories(self, task: Task) -> Iterator[History]:
        free = {name: (1 - density([self.store.owned[name]])).tolist() for name in self.masked}
        all_free = (1 - density(self.store.owned[name] for name in self.masked)).tolist()
        last = {name: value.tolist() for name, value in self.learned.items()}
        for k, of_all in enumerate(all_free):
            layers = {name: values[k] for name, values in free.items()}
            own = {name: values[k] for name, values in last.items()}
            yield History(task.index, self.setting.tasks, layers, of_all, **own)

    def _values(self) -> dict[str, Tensor]:
        """Weights before a task: earlier tasks' own, and where no one owns any, 0 or what was drawn."""
        drawn = dict.fromkeys(self.weights, self.config.free_weight_init == "reinit" or not self.store.tasks)
        drawn[HEAD] |= HEAD not in self.masked  # a task's own rows begin as they were drawn
        return {
            name: torch.where(self.store.owned[name], value, self._initial[name] if drawn[name] else 0)
            for name, value in self.store.values.items()
        }

    def _new_masks(self, task: Task) -> dict[str, Tensor]:
        """Drawn anew, whatever earlier tasks own: bool [K, *shape] by layer."""
        shares = [allocation.densities(own.init, self._shapes, own.density) for own in self.settings]
        masks = {}
        for layer, name in enumerate(self.masked):
            weight = self.weights[name]
            wanted = torch.tensor([own[layer] for own in shares], dtype=torch.float64, device=weight.device)
            numbers = self.random.uniform(weight[0].numel())
            exact = self.config.mask_sampling == "exact"
            count = counted(wanted, weight[0].numel())
            masks[name] = (lowest(numbers, count) if exact else numbers < wanted.unsqueeze(1)).view(weight.shape)
        if HEAD not in masks:
            masks[HEAD] = task.outputs.unsqueeze(2).expand_as(self.weights[HEAD]).clone()
        return masks

    # A batch

    def observe(self, batch: Batch, task: Task) -> Metrics:
        (outputs,) = self.network.outputs_of(batch.x)
        loss = self.cross_entropy(outputs, batch.y)
        gradients = torch.autograd.grad(loss.sum(), self.parameters)
        self.optimizer.learning_rate = self._learning_rate * self._decay(task)
        self.optimizer.step(self._without_owned(gradients))
        self.subnetwork.settle_(self.weights)
        dense = {name: gradients[self._place[name]] for name in self.weights}
        self._growth.follow_(dense, self.subnetwork)
        if self.step == 0 and task.index and self.config.free_weight_init == "zero":
            self._restart_dead_(dense)
        self.step += 1
        if self._updates_topology(task):
            self._update_topology_(dense, task)
        self._right = self._right + right_answers(outputs.detach(), batch.y, task.outputs)
        if self.step % (task.steps // task.epochs) == 0:
            self._end_epoch()
        return {"loss/current": loss.detach()}

    def _decay(self, task: Task) -> float:
        """Of the learning rate."""
        epoch = self.step // (task.steps // task.epochs)
        return self.config.gamma ** sum(1 <= int(part * task.epochs) <= epoch for part in self.config.milestones)

    def _without_owned(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """g[U] = 0."""
        own = list(gradients)
        for name, free in self.subnetwork.free.items() if self.store.tasks else ():
            own[self._place[name]] = own[self._place[name]] * free
        return own

    @torch.no_grad()
    def _restart_dead_(self, gradients: Mapping[str, Tensor]) -> None:
        """Where every gradient of a member is 0, as all ways to its outputs are, begin with what was drawn instead."""
        self._restarted = ~torch.stack([gradient.flatten(1).any(1) for gradient in gradients.values()]).any(0)
        for name, weight in self.weights.items():
            begins = self.subnetwork.masks[name] & ~self.store.owned[name] & over_members(self._restarted, weight)
            weight.copy_(torch.where(begins, self._initial[name], weight))

    def _updates_topology(self, task: Task) -> bool:
        config = self.settings[0]
        every = config.update_every or (UPDATE_EVERY if task.steps > UPDATE_EVERY else max(1, task.steps // 20))
        return config.growth != "none" and self.step % every == 0 and self.step <= config.update_stop * task.steps

    @torch.no_grad()
    def _update_topology_(self, gradients: Mapping[str, Tensor], task: Task) -> None:
        """Prune some of each layer's connections, grow as many."""
        config, now = self.settings[0], self.subnetwork
        rate = prune_rate(self.step, task.steps, config.prune_rate, config.prune_rate_min)
        left, come = {}, {}
        for name in self.masked:
            layers = (self.weights, gradients, now.masks, now.fired, self.store.owned)
            weight, gradient, mask, fired, owned = (layer[name].flatten(1) for layer in layers)
            ties = self.random.uniform(2, weight.shape[1])
            gone = pruned(config.prune, weight, gradient, mask, rate, ties[:, 0], config.strict)
            wanted = self._growth.wanted(name, gradients[name]).flatten(1)
            new = grown(config.growth, mask & ~gone, gone.sum(1), wanted, fired, owned, ties[:, 1])
            left[name], come[name] = (part.view_as(now.masks[name]) for part in (mask & ~gone, new))
        now.move_(left, come, self.weights)

    @torch.no_grad()
    def _end_epoch(self) -> None:
        """What fits better than after every epoch before is kept, of each member."""
        better = self._right > self._most_right
        for name, value in self._snapshot().items() if self._kept else ():
            self._kept[name] = torch.where(over_members(better, value), value, self._kept[name])
        last = self.config.checkpoint == "last"
        self._most_right = self._right if last else torch.maximum(self._right, self._most_right)
        self._right = torch.zeros_like(self._right)

    # A task ends

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        for name, value in self._parts().items():
            value.copy_(self._kept.get(name, value))
        masks, before = self.subnetwork.masks, self.store.owned
        reused = density(masks[name] & before[name] for name in self.masked)
        self.learned = {
            "exploration": density(self.subnetwork.fired[name] for name in self.masked),
            "reused": reused / density(masks[name] for name in self.masked),
            "accuracy": self._most_right / (task.steps // task.epochs),
        }
        self.store.claim(self.weights, masks, self._extras())
        self.in_training = None

    def _parts(self) -> dict[str, Tensor]:
        """All that the present task's network is: weights, masks, biases, statistics."""
        masks = {f"masks/{name}": mask for name, mask in self.subnetwork.masks.items()}
        return {**self.weights, **masks, **self._extras()}

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._parts().items()}

    def _extras(self) -> dict[str, Tensor]:
        """What a task has beside weights: biases, if they are not shared, and statistics of batch normalisation."""
        biases = {n: p for n, p in self.network.named_parameters() if n not in self.weights}
        return {**(biases if self.config.bias == "per_task" else {}), **dict(self.network.named_buffers())}

    def predict(self, x: Tensor, task: Task | None) -> Tensor:
        """With the network of that task; of one that did not come yet, with the present one."""
        if task is None or task.index >= len(self.store.tasks):
            return self.network(x)
        return functional_call(self.network, self.store.subnetwork(task.index), (x,))

    def measurements(self) -> Iterator[tuple[int | None, Metrics]]:
        count = len(self.store.tasks)
        masks = [[self.store.mask(task, name) for name in self.masked] for task in range(count)]
        size = density(masks[-1])
        yield None, {"sparse/used_capacity": density(self.store.owned[name] for name in self.masked)}
        layers = {name.removesuffix(".weight"): density([self.store.owned[name]]) for name in self.masked}
        yield None, {f"sparse/used_capacity/{layer}": value for layer, value in layers.items()}
        last = {name: self.learned[name] for name in ("exploration", "reused")}
        told = {"density": size, "restarted": self._restarted.double(), **last}
        yield count, {f"sparse/{name}": value for name, value in told.items()}
        for earlier, mask in enumerate(masks[:-1]):
            both = density(old & new for old, new in zip(mask, masks[-1], strict=True))
            yield count, {f"sparse/overlap_with_{earlier + 1}": both / size}

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict() | {
            "store": self.store.state_dict(),
            "random": [generator.get_state() for generator in self.random.generators],
            "learned": self.learned,
            "in_training": self.in_training,
        }
        if self.in_training is None:
            return state
        return state | {
            "step": self.step,
            "settings": [dataclasses.asdict(own) for own in self.settings],
            "subnetwork": self.subnetwork.state_dict(),
            "growth": self._growth.averages,
            "kept": self._kept,
            "epochs": [self._right, self._most_right, self._restarted],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.store.load_state_dict(state["store"])
        for generator, saved in zip(self.random.generators, state["random"], strict=True):
            generator.set_state(saved)
        self.learned = self._here(state["learned"])
        self.in_training = state["in_training"]
        if self.in_training is None:
            return
        self.settings = [Config(**own) for own in state["settings"]]
        self._begin(self.in_training, self.store.owned)  # masks follow
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.subnetwork.load_state_dict(state["subnetwork"])
        self._growth.averages = self._here(state["growth"])
        self._kept = self._here(state["kept"])
        self._right, self._most_right, self._restarted = self._here(dict(enumerate(state["epochs"]))).values()

    def _here(self, saved: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
        return {name: value.to(self.random.device) for name, value in saved.items()}


def right_answers(outputs: Tensor, labels: Tensor, own: Tensor) -> Tensor:
    """Their share [K] of a batch [K, B]; only a task's own outputs [K, C] compete."""
    answers = outputs.masked_fill(~own.unsqueeze(1), -torch.inf).argmax(2)
    return (answers == labels).double().mean(1)
