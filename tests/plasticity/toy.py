"""A label-shuffle problem of a few milliseconds, and the loop that trains one network or a population on it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plasticity.intervention import Batch, Intervention, Learner
from plasticity.networks.stacked import stack
from plasticity.networks.structure import activations, find_structure
from plasticity.optimisers.adamp import AdamP
from plasticity.optimisers.proposing import scaled_step
from plasticity.registry import make

MEMBERS, STEPS, TASK, BATCH, CLASSES = 3, 30, 10, 16, 4
NOTHING = Batch(torch.zeros(1, 1, 1), torch.zeros(1, 1), {})


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, CLASSES))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, CLASSES),
    )  # fmt: skip


class Residual(nn.Module):
    """The units of its first layer are also added to those of its second."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.head((x + self.b(x)).relu())


SHAPES: dict[Callable[[], nn.Module], tuple[int, ...]] = {mlp: (6,), cnn: (2, 4, 4)}


def draw_(network: nn.Module, generator: torch.Generator) -> nn.Module:
    """torch's own law, from a generator: uniform in ± 1 / √fan_in."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())
            for parameter in module.parameters(recurse=False):
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return network


def learner_of(network: nn.Module, optimizer: Any = None, members: int | None = None, seed: int = 0) -> Learner:
    """A learner around a network as it is; `fresh` draws torch's law in a copy."""
    template = network if members is None else None
    return Learner(
        network=network,
        structure=find_structure(network),
        optimizer=optimizer if optimizer is not None else torch.optim.SGD(network.parameters(), lr=0.1),
        members=members,
        generators=[torch.Generator().manual_seed(seed + k) for k in range(members or 1)],
        fresh=lambda generator: draw_(copy.deepcopy(template), generator),  # type: ignore[arg-type]
    )


def relu_mlp(*sizes: int, seed: int = 0) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(inputs, outputs, dtype=torch.float64), nn.ReLU()]
    return draw_(nn.Sequential(*layers[:-1]), torch.Generator().manual_seed(seed))  # type: ignore[return-value]


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_axis(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.unsqueeze(0) for name, p in network.named_parameters()}


def watched(learner, x):
    """The batch [1, B, ...] as interventions see it, and the output."""
    with activations(learner.network, learner.structure) as seen:
        output = learner.network(x)
    return Batch(x.unsqueeze(0), torch.zeros(1, len(x)), {n: h.unsqueeze(0) for n, h in seen.items()}), output.detach()


class Training:
    """One run of the members in `seeds`; a single seed with `single` is an ordinary network."""

    def __init__(
        self,
        text: str = "none",
        seeds: Sequence[int] = range(MEMBERS),
        single: bool = False,
        network: Callable[[], nn.Module] = mlp,
        optimizer: Callable[..., Any] | None = None,
        device: str = "cpu",
    ):
        self.shape, self.device, self.single = SHAPES[network], device, single
        self.interventions: list[Intervention] = make(text)

        torch.set_default_dtype(torch.float64)
        with torch.random.fork_rng(devices=[]), torch.device(device):
            built = network()
            for intervention in self.interventions:
                built = intervention.build(built)
        torch.set_default_dtype(torch.float32)

        def fresh(generator: torch.Generator) -> nn.Module:
            return draw_(copy.deepcopy(built), generator)

        networks = [fresh(torch.Generator().manual_seed(seed)) for seed in seeds]
        whole = networks[0] if single else stack(networks)
        chosen = [i.optimizer(whole, dict(whole.named_parameters()), 1e-2, not single) for i in self.interventions]
        chosen = [o for o in chosen if o is not None]
        make_optimizer = optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=1e-2, fused=True))
        if any(i.scales_steps for i in self.interventions):
            make_optimizer = partial(AdamP, lr=1e-2, delta=0.0, stacked=not single)
        self.learner = Learner(
            network=whole,
            structure=find_structure(whole),
            optimizer=chosen[0] if chosen else make_optimizer(list(whole.parameters())),
            members=None if single else len(networks),
            generators=[torch.Generator().manual_seed(1000 + seed) for seed in seeds],
            fresh=fresh,
        )
        self.seeds = seeds
        for intervention in self.interventions:
            intervention.begin(self.learner)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs [K, B, ...] and classes [K, B]; inputs repeat in each task, their classes are drawn anew."""
        inputs, targets = [], []
        for seed in self.seeds:
            of_step = torch.Generator().manual_seed(10_000 * seed + step % TASK)
            of_task = torch.Generator().manual_seed(10_000 * seed + 100 + step)
            inputs.append(torch.randn(BATCH, *self.shape, generator=of_step, dtype=torch.float64))
            targets.append(torch.randint(CLASSES, (BATCH,), generator=of_task))
        return torch.stack(inputs).to(self.device), torch.stack(targets).to(self.device)

    def run(self, steps: int = STEPS) -> Training:
        for _ in range(steps):
            self.step()
        return self

    def step(self) -> None:
        learner = self.learner
        if learner.steps and learner.steps % TASK == 0:
            for intervention in self.interventions:
                if intervention.uses_boundaries:
                    intervention.at_boundary(learner)
        x, y = self.batch(learner.steps)
        with activations(learner.network, learner.structure) as seen:
            output = learner.network(x[0] if self.single else x)
        output = output.unsqueeze(0) if self.single else output
        seen = {name: h.unsqueeze(0) if self.single else h for name, h in seen.items()}
        losses = F.cross_entropy(output.transpose(1, 2), y, reduction="none").mean(1)
        parameters = {name: p.unsqueeze(0) if self.single else p for name, p in learner.network.named_parameters()}
        for intervention in self.interventions:
            penalty = intervention.penalty(learner, parameters)
            if penalty is not None:
                assert penalty.shape == losses.shape
                losses = losses + penalty
        self.backward(losses.sum())
        if any(intervention.scales_steps for intervention in self.interventions):
            scaled_step(learner, Batch(x, y, {}), self.interventions)
        elif isinstance(learner.optimizer, torch.optim.Optimizer):
            learner.optimizer.step()
        else:
            learner.optimizer.step([p.grad for p in learner.optimizer.parameters])
        learner.steps += 1
        for intervention in self.interventions:
            intervention.after_step(learner, Batch(x, y, seen))

    def backward(self, loss: Tensor) -> None:
        self.learner.network.zero_grad()
        loss.backward()

    def values(self) -> dict[str, Tensor]:
        """Parameters and buffers, [K, *shape]."""
        network = self.learner.network
        tensors = {n: t.detach() for n, t in (*network.named_parameters(), *network.named_buffers())}
        return {name: t.unsqueeze(0) for name, t in tensors.items()} if self.single else tensors

    def state(self) -> dict[str, Any]:
        learner = self.learner
        return {
            "network": learner.network.state_dict(),
            "optimizer": learner.optimizer.state_dict(),
            "generators": [g.get_state() for g in learner.generators],
            "interventions": [intervention.state_dict() for intervention in self.interventions],
            "steps": learner.steps,
        }

    def load(self, state: dict[str, Any]) -> Training:
        learner = self.learner
        learner.network.load_state_dict(state["network"])
        learner.optimizer.load_state_dict(state["optimizer"])
        for generator, saved in zip(learner.generators, state["generators"], strict=True):
            generator.set_state(saved)
        for intervention, saved in zip(self.interventions, state["interventions"], strict=True):
            intervention.load_state_dict(saved)
        learner.steps = state["steps"]
        return self
