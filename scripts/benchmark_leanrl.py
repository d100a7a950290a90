"""Gradient steps a second of our TD3, SAC and DQN against the tricks for which LeanRL is known, applied by hand.

LeanRL (github.com/pytorch-labs/LeanRL) speeds single-file agents up by: networks of twin critics run at once by `vmap`
over stacked parameters, the update compiled by `torch.compile`, a fused and capturable Adam, replay and metrics kept as
tensors so that the host never waits, and CUDA graphs around it all. This script was written from that description, not
from its code: the same networks, batch, uniform replay and losses as ours, in plain modules and `torch.optim`. On a GPU
the compiled update uses "reduce-overhead", which are CUDA graphs, and ours `--cuda-graphs`; a CPU has neither.

All contestants live in this process on the same transitions; they take turns in random order, ratios are taken inside a
round. Compilation and warm-up are outside.

    python scripts/benchmark_leanrl.py --agents td3 sac dqn --rounds 9
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from agents.graphs import graph_updates
from envs import ContinuousActionSpec, DiscreteActionSpec, ObservationSpec, Step
from plasticity.population import RandomStream
from runs import compute
from runs.catalogue import find_agent

OBSERVATIONS, ACTIONS, ROWS, BATCH, HIDDEN = 17, 6, 20_000, 256, 256
DISCOUNT, RATE = 0.99, 0.005
Update = Callable[[], Any]


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs)
    )


class Twins(nn.Module):
    """Two critics as one module of stacked parameters, run by vmap."""

    def __init__(self) -> None:
        super().__init__()
        networks = [mlp(OBSERVATIONS + ACTIONS, 1) for _ in range(2)]
        values, _ = stack_module_state(networks)  # type: ignore[arg-type]
        self.names = list(values)
        self.values = nn.ParameterList([nn.Parameter(value.detach()) for value in values.values()])
        self.skeleton = [copy.deepcopy(networks[0]).to("meta")]  # in a list, so that its parameters do not count

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], -1)
        stacked = dict(zip(self.names, self.values, strict=True))
        return vmap(lambda values: functional_call(self.skeleton[0], values, (x,)).squeeze(-1))(stacked)


class ByHand:
    """A flat replay of tensors, and updates compiled as wholes."""

    def __init__(self, data: dict[str, Tensor], compiled: bool):
        self.data, self.device = data, data["obs"].device
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        self.compile = (lambda f: torch.compile(f, mode=mode)) if compiled else (lambda f: f)

    def adam(self, *modules: nn.Module, extra: tuple[Tensor, ...] = ()) -> torch.optim.Adam:
        parameters = [parameter for module in modules for parameter in module.parameters()]
        capturable = self.device.type == "cuda"
        return torch.optim.Adam([*parameters, *extra], lr=3e-4, fused=True, capturable=capturable)

    def sample(self) -> dict[str, Tensor]:
        rows = torch.randint(ROWS, (BATCH,), device=self.device)
        return {name: column.index_select(0, rows) for name, column in self.data.items()}

    @staticmethod
    def follow(target: nn.Module, source: nn.Module) -> None:
        with torch.no_grad():
            torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), RATE)

    @staticmethod
    def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def td3(data: dict[str, Tensor], compiled: bool) -> Update:
    own = ByHand(data, compiled)
    actor, critics = mlp(OBSERVATIONS, ACTIONS).to(own.device), Twins().to(own.device)
    old_actor, old_critics = copy.deepcopy(actor), copy.deepcopy(critics)
    of_actor, of_critics = own.adam(actor), own.adam(critics)

    def critic_loss(b: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            noise = (0.2 * torch.randn_like(b["action"])).clamp(-0.5, 0.5)
            action = (old_actor(b["next_obs"]).tanh() + noise).clamp(-1, 1)
            target = b["reward"] + DISCOUNT * b["going"] * old_critics(b["next_obs"], action).amin(0)
        return (critics(b["obs"], b["action"]) - target).square().mean(-1).sum()

    def actor_loss(b: dict[str, Tensor]) -> Tensor:
        return -critics(b["obs"], actor(b["obs"]).tanh())[0].mean()

    first, second, count = own.compile(critic_loss), own.compile(actor_loss), [0]

    def update() -> None:
        batch = own.sample()
        own.descend(first(batch), of_critics)
        count[0] += 1
        if count[0] % 2 == 0:
            own.descend(second(batch), of_actor)
            own.follow(old_actor, actor)
            own.follow(old_critics, critics)

    return update


def sac(data: dict[str, Tensor], compiled: bool) -> Update:
    own = ByHand(data, compiled)
    actor, critics = mlp(OBSERVATIONS, 2 * ACTIONS).to(own.device), Twins().to(own.device)
    old_critics = copy.deepcopy(critics)
    log_alpha = torch.zeros((), device=own.device, requires_grad=True)
    of_actor, of_critics = own.adam(actor), own.adam(critics)
    of_alpha = own.adam(extra=(log_alpha,))

    def policy(obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = actor(obs).chunk(2, -1)
        spread = -5 + 3.5 * (spread.tanh() + 1)
        noise = torch.randn_like(mean)
        action = (mean + spread.exp() * noise).tanh()
        log = (-0.5 * noise.square() - spread - 0.9189385 - (1 - action.square() + 1e-6).log()).sum(-1)
        return action, log

    def critic_loss(b: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            action, log = policy(b["next_obs"])
            soft = old_critics(b["next_obs"], action).amin(0) - log_alpha.exp() * log
            target = b["reward"] + DISCOUNT * b["going"] * soft
        return (critics(b["obs"], b["action"]) - target).square().mean(-1).sum()

    def actor_loss(b: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        action, log = policy(b["obs"])
        loss = (log_alpha.detach().exp() * log - critics(b["obs"], action).amin(0)).mean()
        return loss, log.detach().mean()

    first, second = own.compile(critic_loss), own.compile(actor_loss)

    def update() -> None:
        batch = own.sample()
        own.descend(first(batch), of_critics)
        loss, log = second(batch)
        own.descend(loss, of_actor)
        own.descend(-log_alpha.exp() * (log - ACTIONS), of_alpha)
        own.follow(old_critics, critics)

    return update


def dqn(data: dict[str, Tensor], compiled: bool) -> Update:
    own = ByHand(data, compiled)
    net = mlp(OBSERVATIONS, ACTIONS).to(own.device)
    old = copy.deepcopy(net)
    optimizer = own.adam(net)

    def loss_of(b: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            target = b["reward"] + DISCOUNT * b["going"] * old(b["next_obs"]).amax(-1)
        return (net(b["obs"]).gather(-1, b["button"][:, None]).squeeze(-1) - target).square().mean()

    loss = own.compile(loss_of)

    def update() -> None:
        own.descend(loss(own.sample()), optimizer)

    return update


BY_HAND = {"td3": td3, "sac": sac, "dqn": dqn}


def ours(name: str, data: dict[str, Tensor], compiled: bool) -> Update:
    """The agent of `neoteny train`, or with `--compile`, on the same rows in its replay; only its gradient steps."""
    device = data["obs"].device
    limit = np.ones(ACTIONS, np.float32)
    spec = DiscreteActionSpec(ACTIONS) if name == "dqn" else ContinuousActionSpec(-limit, limit)
    module = find_agent(name)
    changes = {"hidden": (HIDDEN, HIDDEN), "batch_size": BATCH, "replay_capacity": ROWS + 2, "learning_rate": 3e-4}
    purposes = ("initialisation", "exploration", "sampling", "update", "evaluation")
    streams = {p: RandomStream(torch.Generator(device).manual_seed(i)) for i, p in enumerate(purposes)}
    config, observations = module.Config(**changes), ObservationSpec((OBSERVATIONS,))
    agent = module.Agent(observations, spec, config, num_envs=1, device=device, streams=streams, compiled=compiled)
    never = torch.zeros(1, dtype=torch.bool, device=device)
    action = data["button" if name == "dqn" else "action"]
    for row in range(ROWS):
        at = slice(row, row + 1)
        step = Step(data["next_obs"][at], data["reward"][at], ~data["going"][at], never, data["next_obs"][at],
                    data["reward"][at], never.long(), never)  # fmt: skip
        agent.replay.add(data["obs"][at], action[at], step)
    if device.type == "cuda":
        graph_updates(agent, streams, device, print)
    return agent._update_once


def rows(device: torch.device) -> dict[str, Tensor]:
    """Transitions as a ring holds them: each begins where the one before ended."""
    generator = torch.Generator(device).manual_seed(0)
    obs = torch.randn(ROWS + 1, OBSERVATIONS, device=device, generator=generator)
    return {
        "obs": obs[:-1],
        "next_obs": obs[1:],
        "action": torch.rand(ROWS, ACTIONS, device=device, generator=generator) * 2 - 1,
        "button": torch.randint(ACTIONS, (ROWS,), device=device, generator=generator),
        "reward": torch.randn(ROWS, device=device, generator=generator),
        "going": torch.ones(ROWS, dtype=torch.bool, device=device),
    }


def seconds(update: Update, steps: int, device: torch.device) -> float:
    """Of one update."""
    began = time.perf_counter()
    for _ in range(steps):
        update()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", nargs="+", default=list(BY_HAND), choices=list(BY_HAND))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    device = compute.resolve_device("auto")
    torch.manual_seed(0)
    print(f"{device}, {options.threads} thread(s), products: {compute.set_up(device, options.threads)}, "
          f"load {os.getloadavg()[0]:.1f}; medians of {options.rounds} rounds")  # fmt: skip
    data, order = rows(device), random.Random(0)
    for name in options.agents:
        updates = {"ours": ours(name, data, False), "ours, compiled": ours(name, data, True)}
        updates |= {"by hand": BY_HAND[name](data, False), "by hand, compiled": BY_HAND[name](data, True)}
        for update in updates.values():
            seconds(update, 20, device)
        turns: dict[str, list[float]] = {title: [] for title in updates}
        for _ in range(options.rounds):
            for title in order.sample(list(updates), len(updates)):
                turns[title].append(seconds(updates[title], options.steps, device))
        for title, own in turns.items():
            eager, compiled = (
                statistics.median(a / b for a, b in zip(own, turns[which], strict=True))
                for which in ("ours", "ours, compiled")
            )
            rate = statistics.median(1 / turn for turn in own)
            print(f"{name:<4} {title:<18} {rate:6.0f} updates/s   ours is {eager:.2f} x, compiled {compiled:.2f} x",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
