"""What holds for every agent that there is, found by its name alone: whole graphs, and updates that never wait."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import agents
from agents.networks import NatureCNN
from envs import Step
from runs.catalogue import AGENTS
from tests.agents.fakes import BOX, BUTTONS, CPU, FRAMES, VECTOR, fake_gradients, streams

# Small values of hyper-parameters, for whichever of them an agent has.
SMALL: dict[str, Any] = {
    "batch_size": 16,
    "checkpoints": False,  # wait to see the end of an episode
    "critic_hidden": (16, 16),
    "embedding": 8,
    "epochs": 1,
    "hidden": (16, 16),
    "minibatches": 2,
    "n_step": 3,
    "nodes": 4,
    "replay_capacity": 200,
    "rollout_steps": 5,
    "target_update_every": 2,
    "update_every": 1,
    "updates_per_step": 1,
    "warmup_steps": 8,
}

ROUNDS = 5  # of two environments, so that at least two updates follow the warm-up


def settings_of(name: str, **more: Any) -> dict[str, Any]:
    own = {field.name for field in dataclasses.fields(AGENTS[name].Config)}
    return {key: value for key, value in (SMALL | more).items() if key in own}


def specs_of(name: str) -> Iterator[tuple[Any, Any]]:
    """Observations and actions, of those that tests have, that the agent takes."""
    for observations in (VECTOR, FRAMES):
        for actions in (BOX, BUTTONS):
            try:
                build(name, observations, actions)
            except ValueError:
                continue
            yield observations, actions


def build(name: str, observations=VECTOR, actions=BOX, device=CPU, compiled=False, **settings):
    config = AGENTS[name].Config(**settings_of(name, **settings))
    made = streams(device=device)
    return AGENTS[name].Agent(observations, actions, config, num_envs=2, device=device, streams=made, compiled=compiled)


def live(agent, spec, rounds: int, device=CPU, learning=contextlib.nullcontext) -> dict[str, Tensor]:
    """Rounds of steps, all with the same reward; the metrics of the last update."""
    world, metrics = torch.Generator().manual_seed(0), {}

    def seen() -> Tensor:
        if device.type != "cpu":
            return torch.zeros(2, *spec.shape, dtype=spec.dtype, device=device)
        if spec.dtype == torch.uint8:
            return torch.randint(0, 256, (2, *spec.shape), dtype=torch.uint8, generator=world)
        return torch.randn(2, *spec.shape, generator=world)

    obs, scalars = seen(), torch.zeros(2, device=device)
    never = torch.zeros(2, dtype=torch.bool, device=device)
    for _ in range(rounds):
        agent.act(obs, explore=True)
        obs = seen()
        agent.observe(Step(obs, scalars + 1, never, never, obs, scalars, scalars.long(), never))
        with learning():
            metrics |= agent.update()
    return metrics


def options_of(name: str) -> Iterator[dict[str, Any]]:
    """The small settings, and every switch and every choice of the agent, one at a time."""
    yield {}
    kinds = typing.get_type_hints(AGENTS[name].Config)
    for field in dataclasses.fields(AGENTS[name].Config):
        if kinds[field.name] is bool:
            yield {field.name: not field.default}
        elif typing.get_origin(kinds[field.name]) is typing.Literal:
            yield from (
                {field.name: choice} for choice in typing.get_args(kinds[field.name]) if choice != field.default
            )


@pytest.mark.parametrize("name", agents.NAMES)
def test_updates_neither_wait_for_a_gpu_nor_mix_devices(name, monkeypatch):
    """FakeTensorMode refuses host/device mixing, and any read of a tensor's value (a hidden synchronisation).

    Without a CUDA driver two things have no fake: generators, which stay on the CPU here (fake draws do not use them),
    and autograd's engine, so gradients are stood in for by empty tensors. Autograd adds no device choice of its own.
    On all spaces that the agent takes, and with each of its options.
    """
    device = torch.device("cuda")
    # Copying a network for its target must not copy the mode that its tensors belong to.
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, raising=False)
    monkeypatch.setattr(torch.autograd, "grad", fake_gradients)
    monkeypatch.setattr(NatureCNN, "to", lambda net, **_: net)  # its memory layout; fake parameters cannot be swapped
    cases = [(spec, {}) for spec in specs_of(name)]
    assert cases
    cases += [(cases[0][0], options) for options in options_of(name) if options]
    for (observations, actions), options in cases:
        with FakeTensorMode():
            agent = build(name, observations, actions, device, **options)
            metrics = live(agent, observations, ROUNDS, device)
            assert agent.updates > 1, options
            assert {value.device.type for value in metrics.values()} == {"cuda"}, options


@pytest.mark.parametrize("name", agents.NAMES)
def test_losses_compile_to_whole_graphs_with_the_same_numbers(name, monkeypatch):
    """The compiler is replaced by its front end alone: a break in a graph is an error, the numbers stay."""
    real, compiled = torch.compile, []

    def whole(function: Any) -> Any:
        compiled.append(function)
        return real(function, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", whole)
    torch._dynamo.reset()
    observations, actions = next(specs_of(name))
    found = []
    for is_compiled in (False, True):
        agent = build(name, observations, actions, compiled=is_compiled)
        metrics = live(agent, observations, ROUNDS)
        assert agent.updates > 1
        found.append(metrics)
    assert compiled
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", agents.NAMES)
def test_with_bfloat16_products_losses_and_weights_stay_float32(name):
    """On all spaces that the agent takes; the first losses are those of float32 within 5 %, or 0.05 near 0."""
    for observations, actions in specs_of(name):
        found = []
        for half in (False, True):
            agent = build(name, observations, actions)
            learning = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=half, cache_enabled=False)
            metrics = live(agent, observations, ROUNDS, learning=learning)
            assert agent.updates > 1
            losses = {key: value for key, value in metrics.items() if key.startswith("loss/")}
            nets = [net for net in vars(agent).values() if isinstance(net, torch.nn.Module)]
            tensors = [*losses.values(), *(parameter for net in nets for parameter in net.parameters())]
            assert {tensor.dtype for tensor in tensors} == {torch.float32}
            found.append(losses)
        for key, value in found[0].items():
            torch.testing.assert_close(found[1][key], value, rtol=0.05, atol=0.05, msg=f"{key} {observations}")
