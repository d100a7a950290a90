"""Updates recorded once and replayed, on a stand-in for CUDA graphs that runs on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import agents
from agents.diagnostics import AgentDiagnostics
from agents.graphs import WARM_UPS, GraphedUpdates, graph_updates
from agents.plastic import Plasticity
from plasticity import registry
from plasticity.schedules import Linear
from tests.agents.fakes import CPU, streams
from tests.agents.test_every_agent import build, live, specs_of


def promises_variants(name: str) -> bool:
    return getattr(build(name, *next(specs_of(name))), "update_variant", None) is not None


GRAPHED = [name for name in agents.NAMES if promises_variants(name)]


class Tape(TorchDispatchMode):
    """Kernels as they were launched: the same memory and the same host numbers at every replay, as in a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.launched.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, result in self.launched:
                if func.is_view:
                    continue
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old is not new and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Recorder:
    """Records as `record_cuda_graph` does: what is recorded is not executed. limit: fails after so many recordings."""

    def __init__(self, agent: Any, limit: int | None = None):
        self.agent, self.limit, self.tapes = agent, limit, []

    def __call__(self, update, generators: Sequence[torch.Generator]):
        if len(self.tapes) == self.limit:
            self.agent.updates += 1  # what a half-way recording may leave
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA error: more of it")
        before = copy.deepcopy(self.agent.state_dict())
        with Tape() as tape:
            metrics = update()
        self.agent.load_state_dict(before)
        self.tapes.append(tape)
        return tape.replay, metrics


def graphed(name: str, tell=lambda line: pytest.fail(line), limit: int | None = None):
    agent = build(name, *next(specs_of(name)))
    recorder = Recorder(agent, limit)
    agent._update_once = GraphedUpdates(agent, [], tell, recorder)
    return agent, recorder


def assert_same(one: Any, other: Any) -> None:
    states = (tree_leaves(agent.state_dict()["parts"]) for agent in (one, other))
    for mine, theirs in zip(*states, strict=True):
        if isinstance(mine, Tensor):
            assert torch.equal(mine, theirs)
    assert (one.steps, one.updates) == (other.steps, other.updates)


def test_there_are_agents_with_graphs():
    assert {"beer", "ddpg", "dqn", "sac", "td3"} <= set(GRAPHED)


@pytest.mark.parametrize("name", GRAPHED)
def test_replayed_updates_are_the_eager_ones(name):
    """Bit for bit, with environment steps in between and a checkpoint loaded in the middle."""
    observations, actions = next(specs_of(name))
    eager = build(name, observations, actions)
    other, recorder = graphed(name)
    found = []
    for agent in (eager, other):
        live(agent, observations, 4 + 2 * WARM_UPS)
        agent.load_state_dict(copy.deepcopy(agent.state_dict()))
        found.append(live(agent, observations, 6))
    variants = 2 if hasattr(eager.config, "policy_delay") else 1
    assert len(recorder.tapes) == variants
    assert_same(eager, other)
    mine, theirs = found
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("name", GRAPHED)
def test_updates_recorded_before_a_replay_was_cleared_draw_what_came_after(name):
    observations, actions = next(specs_of(name))
    eager = build(name, observations, actions)
    other, recorder = graphed(name)
    for agent in (eager, other):
        live(agent, observations, 4 + 2 * WARM_UPS)
        agent.replay.clear()
        live(agent, observations, 4 + 2 * WARM_UPS)
    assert_same(eager, other)
    assert len(recorder.tapes) == (2 if hasattr(eager.config, "policy_delay") else 1)


@pytest.mark.parametrize("limit", [0, 1])
def test_a_recording_that_fails_leaves_all_updates_eager_and_says_so_once(limit):
    eager = build("td3")
    lines: list[str] = []
    other, recorder = graphed("td3", lines.append, limit)
    observations, _ = next(specs_of("td3"))
    for agent in (eager, other):
        live(agent, observations, 16)
    assert_same(eager, other)
    assert len(recorder.tapes) == limit
    assert lines == [
        "updates stay eager, because recording a CUDA graph failed: operation not permitted when stream is capturing"
    ]


def test_what_cannot_be_recorded_says_why():
    lines: list[str] = []
    cuda, made = torch.device("cuda"), streams()
    assert not graph_updates(build("td3"), made, CPU, lines.append)
    assert not graph_updates(build("ppo"), made, cuda, lines.append)
    agent = build("td3")
    agent.plasticity = Plasticity(schedule=Linear(100))
    assert not graph_updates(agent, made, cuda, lines.append)
    agent.plasticity = Plasticity(lambda: registry.make("l2"))
    agent.plasticity.network(lambda: copy.deepcopy(agent.actor), made["initialisation"])
    assert not graph_updates(agent, made, cuda, lines.append)
    agent = build("td3")
    AgentDiagnostics(agent)
    assert not graph_updates(agent, made, cuda, lines.append)
    assert [line.split(": ")[1] for line in lines] == [
        "the device is cpu",
        "this agent's updates need numbers from the host",
        *["interventions or a schedule change them"] * 2,
        "diagnostics watch their gradients",
    ]
    assert graph_updates(build("td3"), made, cuda, lines.append)
    assert len(lines) == 5
