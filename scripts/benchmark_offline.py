"""Gradient steps a second of A2PR and TD3+BC at their papers' sizes against a plain eager loop, and loading of data.

The plain loop is what single-file implementations do, written from their description: transitions in NumPy arrays that
are indexed and copied to tensors for every batch, `nn.Linear` networks one after the other, `loss.backward()`,
`torch.optim.Adam`, targets moved parameter by parameter, losses read as numbers in every step. Same shapes, same
losses, same work. Contestants take turns in one process; ratios are taken inside a round. Where oneDNN's products are
exact enough, `neoteny` uses them, and the plain loop is measured with them too.

    python scripts/benchmark_offline.py --rounds 5 --seconds 4
    python scripts/benchmark_offline.py --load 1000000
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agents.offline.transitions import Transitions
from envs.runner import ContinuousActionSpec, ObservationSpec
from runs import compute
from runs.catalogue import find_agent
from runs.randomness import spawn_streams

Step = Callable[[], None]
OBSERVED, ACTIONS, ROWS, BATCH = 17, 6, 100_000, 256  # of HalfCheetah


def fixed_data(rows: int) -> Transitions:
    """Random numbers of the wanted shape."""
    draws = torch.Generator().manual_seed(0)
    packed = torch.randn(rows, 2 * OBSERVED + ACTIONS + 2, generator=draws)
    packed[:, OBSERVED : OBSERVED + ACTIONS].tanh_()
    packed[:, -1] = 0
    starts = torch.arange(0, rows + 1, 1_000)
    return Transitions(
        packed, OBSERVED, ACTIONS, torch.zeros(rows, dtype=torch.bool), starts, torch.ones(len(starts) - 1).bool()
    )


def ours(name: str, data: Transitions, seeds: int) -> Step:
    """One gradient step of an agent of this house, or of a population of several seeds."""
    spec = ContinuousActionSpec(-np.ones(ACTIONS, np.float32), np.ones(ACTIONS, np.float32))
    module, cpu = find_agent(name), torch.device("cpu")
    streams = spawn_streams(0 if seeds == 1 else range(seeds), cpu)
    agent = module.Agent(ObservationSpec((OBSERVED,)), spec, module.Config(), num_envs=1, device=cpu, streams=streams)
    agent.read(data, 1_000_000)
    return agent.update


def layers(inputs: int, hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Linear and ReLU in turns."""
    sizes = [inputs, *hidden]
    pairs = [(nn.Linear(i, o), nn.ReLU()) for i, o in zip(sizes[:-1], hidden, strict=True)]
    return nn.Sequential(*(layer for pair in pairs for layer in pair), nn.Linear(sizes[-1], outputs))


class PlainLoop:
    """TD3+BC, or with `a2pr` A2PR, step by step."""

    def __init__(self, name: str, data: Transitions):
        self.a2pr, self.log, self.count = name == "a2pr", dict[str, list[float]](), 0
        self.draws = np.random.default_rng(0)
        self.arrays = [
            part.numpy().copy() for part in (data.obs, data.action, data.next_obs, data.reward, data.terminal.float())
        ]
        mean, std = self.arrays[0].mean(0), self.arrays[0].std(0) + 1e-3
        self.arrays[0], self.arrays[2] = (self.arrays[0] - mean) / std, (self.arrays[2] - mean) / std
        actor, critic = ((256,) * 3, (256,) * 4) if self.a2pr else ((256,) * 2, (256,) * 2)
        self.actor, self.target_actor = layers(OBSERVED, actor, ACTIONS), layers(OBSERVED, actor, ACTIONS)
        self.critics = nn.ModuleList(layers(OBSERVED + ACTIONS, critic, 1) for _ in range(2))
        self.target_critics = nn.ModuleList(layers(OBSERVED + ACTIONS, critic, 1) for _ in range(2))
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), 3e-4)
        self.critic_adam = torch.optim.Adam(self.critics.parameters(), 3e-4)
        self.value = layers(OBSERVED, critic, 1)
        self.encoder = layers(OBSERVED + ACTIONS, (750, 750), 4 * ACTIONS)
        self.decoder = layers(OBSERVED + 2 * ACTIONS, (750, 750), ACTIONS)
        self.value_adam = torch.optim.Adam(self.value.parameters(), 3e-4)
        self.vae_adam = torch.optim.Adam([*self.encoder.parameters(), *self.decoder.parameters()], 1e-3)

    def __call__(self) -> None:
        index = self.draws.integers(0, len(self.arrays[0]), BATCH)
        obs, action, next_obs, reward, terminal = (torch.tensor(array[index]) for array in self.arrays)
        reward, going = reward.unsqueeze(1), 1 - terminal.unsqueeze(1)
        self.count += 1
        with torch.no_grad():
            noise = (torch.randn_like(action) * 0.2).clamp(-0.5, 0.5)
            next_action = (self.target_actor(next_obs).tanh() + noise).clamp(-1, 1)
            both = [critic(torch.cat([next_obs, next_action], 1)) for critic in self.target_critics]
            target = reward + 0.99 * going * torch.minimum(*both)
        values = [critic(torch.cat([obs, action], 1)) for critic in self.critics]
        self._step("critic", self.critic_adam, sum(F.mse_loss(value, target) for value in values))
        state_value = self._a2pr_step(obs, action, next_obs, next_action, reward + 0 * going, going, target)
        if self.count % 2 == 0:
            self._actor_step(obs, action, state_value)

    def _a2pr_step(self, obs: Tensor, action: Tensor, next_obs: Tensor, next_action: Tensor, *rest: Tensor) -> Tensor:
        if not self.a2pr:
            return obs
        reward, going, target = rest
        with torch.no_grad():
            both = [critic(torch.cat([next_obs, next_action], 1)) for critic in self.critics]
            aim = torch.minimum(reward + 0.99 * going * torch.minimum(*both), target)
        found = self.value(obs)
        self._step("value", self.value_adam, F.mse_loss(found, aim))
        found = found.detach()
        with torch.no_grad():
            good = (self.critics[0](torch.cat([obs, action], 1)) > found).float()
        made, mean, log_std = self._vae(obs, action)
        divergence = -0.5 * (1 + 2 * log_std - mean.pow(2) - (2 * log_std).exp()).mean()
        self._step("vae", self.vae_adam, (good * (made - action) ** 2).mean() + 0.5 * divergence)
        return found

    def _vae(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_std = self.encoder(torch.cat([obs, action], 1)).chunk(2, 1)
        log_std = log_std.clamp(-4, 15)
        latent = mean + log_std.exp() * torch.randn_like(mean)
        return self.decoder(torch.cat([obs, latent], 1)).tanh(), mean, log_std

    def _actor_step(self, obs: Tensor, action: Tensor, state_value: Tensor) -> None:
        own = self.actor(obs).tanh()
        value = self.critics[0](torch.cat([obs, own], 1))
        goal, on = action, torch.ones_like(value)
        if self.a2pr:
            made = self._vae(obs, own)[0]
            with torch.no_grad():
                of_data = self.critics[0](torch.cat([obs, action], 1)) - state_value
                of_vae = self.critics[0](torch.cat([obs, made], 1)) - state_value
                on = ((of_vae >= 0) | (of_data > 0)).float()
            goal = torch.where(of_vae >= of_data, made, action)
        loss = -2.5 / value.abs().mean().detach() * value.mean() + (on * (own - goal) ** 2).mean()
        self._step("actor", self.actor_adam, loss)
        for net, slow in ((self.actor, self.target_actor), (self.critics, self.target_critics)):
            for parameter, target in zip(net.parameters(), slow.parameters(), strict=True):
                target.data.copy_(0.005 * parameter.data + 0.995 * target.data)

    def _step(self, name: str, adam: torch.optim.Adam, loss: Any) -> None:
        adam.zero_grad()
        loss.backward()
        adam.step()
        self.log.setdefault(name, []).append(float(loss.detach()))


def measure(name: str, rounds: int, seconds: float, chosen: str) -> None:
    """Print steps a second of each contestant, and of ours over the plain loop. chosen: precision of `neoteny`."""
    data = fixed_data(ROWS)
    contestants = {
        "plain": (PlainLoop(name, data), "highest", 1),
        "neoteny": (ours(name, data, 1), chosen, 1),
        "neoteny, 3 seeds": (ours(name, data, 3), chosen, 3),
    }
    if chosen == "medium":
        contestants["plain oneDNN"] = PlainLoop(name, data), "medium", 1
    rates: dict[str, list[tuple[float, float]]] = {one: [] for one in contestants}
    order = np.random.default_rng(0)
    for number in range(rounds + 1):
        for one in order.permutation(list(contestants)):
            step, precision, seeds = contestants[one]
            torch.set_float32_matmul_precision(precision)
            start, start_cpu, count = time.perf_counter(), time.process_time(), 0
            while time.perf_counter() - start < seconds:
                step()
                count += seeds
            found = count / (time.perf_counter() - start), count / (time.process_time() - start_cpu)
            if number:  # the first round is a warm-up
                rates[one].append(found)
    print(f"{name}: gradient steps a second (of one network each), median of {rounds} rounds")
    for one, found in rates.items():
        told = [statistics.median(column) for column in zip(*found, strict=True)]
        ratios = []
        for other in [other for other in rates if other.startswith("plain")]:
            clock, cpu = (
                statistics.median(a[i] / b[i] for a, b in zip(found, rates[other], strict=True)) for i in (0, 1)
            )
            ratios.append(f"over {other} {clock:.2f} (CPU {cpu:.2f})")
        print(f"  {one:<18} {told[0]:8.1f} /s {told[1]:8.1f} per CPU second;  {', '.join(ratios)}")


def measure_loading(rows: int) -> None:
    """Print seconds and memory of reading so many transitions of Hopper's shape, by format."""
    from runs.datasets.d4rl_files import read_d4rl, write_d4rl
    from runs.datasets.dataset import fingerprint
    from runs.datasets.minari_files import read_minari, write_minari

    data, spaces = fixed_data(rows), _spaces()
    data.truncated[data.starts[1:] - 1] = True
    raw = sum(part.numpy().nbytes for part in (data.obs, data.action, data.reward, data.next_obs, data.terminal))
    raw += data.truncated.numpy().nbytes
    with tempfile.TemporaryDirectory() as folder:
        write_d4rl(Path(folder) / "data.hdf5", data)
        write_minari(Path(folder) / "lab" / "x-v0", "lab/x-v0", data, spaces, {})
        readers = {
            "D4RL HDF5 (gzip), rule exact": lambda: read_d4rl(Path(folder) / "data.hdf5", "exact"),
            "Minari HDF5": lambda: read_minari(Path(folder) / "lab" / "x-v0"),
        }
        for name, read in readers.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            found = read().transitions
            seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
            kept = sum(part.numpy().nbytes for part in (found.rows, found.truncated, found.starts, found.whole))
            begun = time.perf_counter()
            fingerprint(found)
            hashed = time.perf_counter() - begun
            print(
                f"  {name}: {len(found):,} transitions in {seconds:.2f} s ({cpu:.2f} CPU s; and {hashed:.2f} s for "
                f"the fingerprint), "
                f"{kept / raw - 1:+.1%} of {raw / 1e6:.0f} MB raw; peak of the process "
                f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB"
            )
            del found


def _spaces() -> tuple[Any, Any]:
    import gymnasium

    box = gymnasium.spaces.Box
    return box(-np.inf, np.inf, (OBSERVED,), np.float32), box(-1, 1, (ACTIONS,), np.float32)


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", nargs="*", default=["a2pr", "td3_bc"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--load", type=int, default=0, help="instead: read so many transitions")
    given = parser.parse_args()
    chosen = compute.set_up(torch.device("cpu"), given.threads)
    print(f"products: {chosen}, {given.threads} threads")
    if given.load:
        measure_loading(given.load)
        return
    for name in given.agents:
        measure(name, given.rounds, given.seconds, chosen)


if __name__ == "__main__":
    main()
