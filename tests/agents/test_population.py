"""A population is its seeds: each does in it what it does alone, whatever the others do."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from agents import dqn
from agents.agent import gradient_step
from agents.networks import Critics, DeterministicActor, NatureCNN
from agents.population import require_one_seed
from agents.replay import Replay
from envs import Step
from plasticity.adam import Adam
from plasticity.networks.stacked import stack
from plasticity.population import RandomStream, copy_state_
from runs import checkpoint
from runs.catalogue import AGENTS
from tests.agents.fakes import (
    BOX,
    BUTTONS,
    CPU,
    FRAMES,
    SAYA,
    SMALL,
    VALUING_ACTIONS,
    VECTOR,
    fake_gradients,
    make_step,
    stream,
    streams,
)

SEEDS = [3, 5, 11]
# Every path that an update may take.
SETTINGS: dict[str, dict[str, Any]] = {
    "ddpg": {"policy_delay": 3, "n_step": 3, "layer_norm": True},
    "td3": {"policy_delay": 2},
    "td3 with LayerNorm": {"layer_norm": True, "n_step": 2},
    "sac": {"initial_temperature": 0.3},
    "sac with a fading replay": {"replay": "fading"},
    "sac with SimBa": {
        "architecture": "simba",
        "hidden": (16,),
        "critic_hidden": (8, 8),
        "critics": 1,
        "weight_decay": 0.01,
        "normalise_observations": True,
        "representation": "dr3",
    },
    "beer": {"representation_weight": 1.0},
    "beer with InFeR": {"representation": "infer", "feature_heads": 3},
    "td3 with BEER": {"representation": "beer", "n_step": 3},
    "dqn with BEER": {"representation": "beer", "update_every": 1},
    "dqn with InFeR": {"representation": "infer", "feature_heads": 3, "update_every": 1, "max_gradient_norm": 0.5},
    "symphony": {"nodes": 4, "updates_per_step": 2, "gradient_dropout": True, "fall_window": 2, "episode_limit": 9},
    "symphony of August 2026": {"nodes": 4, "updates_per_step": 2, **SAYA},
    "sac with LayerNorm": {"layer_norm": True},
    "crossq": {"critic_hidden": (16, 16), "policy_delay": 2, "renormalise_after": 60, "n_step": 2},
    "dqn": {"update_every": 2, "updates_per_round": 3, "max_gradient_norm": 0.05, "target_update_every": 10},
    "dqn with a prioritised replay": {"replay": "prioritised", "update_every": 1, "n_step": 2},
    "qrdqn": {"update_every": 1, "quantiles": 9, "double": True, "n_step": 2},
    "rainbow": {"update_every": 1},
    "rainbow without noise": {"update_every": 1, "noisy": False, "layer_norm": True, "replay": "fading"},
    "dqn with LayerNorm": {"update_every": 1, "layer_norm": True, "huber": True, "epsilon_decay_steps": 50},
}


def build(case: str, seeds: int | list[int], num_envs: int = 2, device=CPU, **more):
    module = AGENTS[case.split()[0]]
    config = module.Config(**{**SMALL, **SETTINGS[case], **more})
    spec = BUTTONS if case.split()[0] in VALUING_ACTIONS else BOX
    agent = module.Agent(VECTOR, spec, config, num_envs=num_envs, device=device, streams=streams(seeds, device))
    if case == "symphony":  # its advantage divides by each value: near 0 that makes any rounding as large as one likes
        for critics in (agent.critics, agent.target_critics):
            critics.block.net[-1].bias.data += 2
    return agent


class World:
    """Random observations and rewards for two environments of one seed."""

    def __init__(self, seed: int):
        self.numbers = torch.Generator().manual_seed(seed)
        self.obs, self.clock = torch.randn(2, 3, generator=self.numbers), 0

    def step(self) -> Step:
        self.clock += 1
        obs, reward = (torch.randn(*shape, generator=self.numbers) for shape in ((2, 3), (2,)))
        ended = torch.rand(2, generator=self.numbers) < 0.1
        self.obs = obs
        return make_step(obs, reward, terminated=ended, truncated=self.clock % 9 == 0)


def together(steps: list[Step]) -> Step:
    return Step(**{name: torch.stack([getattr(step, name) for step in steps]) for name in Step.__slots__})


def live_alone(agent, world: World, rounds: int) -> dict[str, torch.Tensor]:
    metrics: dict[str, torch.Tensor] = {}
    for _ in range(rounds):
        agent.act(world.obs, explore=True)
        agent.observe(world.step())
        metrics |= agent.update()
    return metrics


def live_together(agent, worlds: list[World], rounds: int) -> dict[str, torch.Tensor]:
    metrics: dict[str, torch.Tensor] = {}
    for _ in range(rounds):
        action = agent.act(torch.stack([world.obs for world in worlds]), explore=True)
        assert action.shape[:2] == (len(worlds), 2)
        agent.observe(together([world.step() for world in worlds]))
        metrics |= agent.update()
    return metrics


def assert_close(ours: Any, theirs: Any, **tolerance: float) -> None:
    """Nested states: tensors close, everything else equal."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert_close(ours[name], theirs[name], **tolerance)
    elif isinstance(theirs, list):
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b, **tolerance)
    elif isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, **tolerance)
    else:
        assert type(ours) is type(theirs)


def without_replay(state: dict[str, Any]) -> dict[str, Any]:
    """Rings hold actions, which are rounded like everything else."""
    return {**state, "parts": {name: part for name, part in state["parts"].items() if name != "replay"}}


@pytest.mark.parametrize("case", SETTINGS)
def test_population_does_what_its_seeds_do_alone(case):
    """A hundred updates and more: same draws, same counters, same parameters, moments and metrics to rounding."""
    population = build(case, SEEDS)
    metrics = live_together(population, [World(seed) for seed in SEEDS], 58)
    for index, seed in enumerate(SEEDS):
        alone = build(case, seed)
        expected = live_alone(alone, World(seed), 58)
        assert population.updates == alone.updates >= 100
        ours, theirs = population.state_dict(index), alone.state_dict()
        assert_close(without_replay(ours), without_replay(theirs), rtol=1e-4, atol=1e-6)
        for name in ("exploration", "noise", "evaluation"):
            if name in theirs["parts"]:
                assert torch.equal(ours["parts"][name], theirs["parts"][name])
        assert torch.equal(ours["parts"]["replay"]["generator"], theirs["parts"]["replay"]["generator"])
        for name, ring in theirs["parts"]["replay"]["rings"].tensors.items():
            torch.testing.assert_close(ours["parts"]["replay"]["rings"].tensors[name], ring, rtol=1e-4, atol=1e-6)
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert metrics[name].shape == (3,)
            torch.testing.assert_close(metrics[name][index], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", SETTINGS)
def test_before_the_first_product_everything_is_equal_to_the_bit(case):
    population = build(case, SEEDS, warmup_steps=100)
    live_together(population, [World(seed) for seed in SEEDS], 40)
    for index, seed in enumerate(SEEDS):
        alone = build(case, seed, warmup_steps=100)
        live_alone(alone, World(seed), 40)
        if "dqn" in case or "symphony" in case:  # acts by its network from the second step on
            continue
        assert checkpoint.state_hash(population.state_dict(index)) == checkpoint.state_hash(alone.state_dict())


@pytest.mark.parametrize("case", SETTINGS)
def test_a_seed_leaves_the_others_alone_even_when_it_breaks(case):
    """Other data, and then nan, for one seed: not a bit of the other two moves."""
    calm, torn = build(case, SEEDS), build(case, SEEDS)
    live_together(calm, [World(seed) for seed in SEEDS], 40)
    worlds = [World(seed) for seed in (3, 99, 11)]
    live_together(torn, worlds, 20)
    worlds[1].obs = torch.full((2, 3), torch.nan)
    metrics = live_together(torn, worlds, 20)
    assert metrics["loss/critic"].isfinite().tolist() == [True, False, True]
    for index in (0, 2):
        hashes = [checkpoint.state_hash(agent.state_dict(index)) for agent in (calm, torn)]
        assert hashes[0] == hashes[1]


@pytest.mark.parametrize("case", SETTINGS)
def test_population_goes_on_from_the_states_of_its_seeds(case):
    """From its own to the bit, and from those of seeds that were alone; and a seed alone from its part of it."""
    whole, restored = build(case, SEEDS), build(case, [1, 2, 4])
    worlds = [World(seed) for seed in SEEDS]
    live_together(whole, worlds, 20)
    for index in range(3):
        file = io.BytesIO()
        torch.save(whole.state_dict(index), file)
        file.seek(0)
        restored.load_state_dict(torch.load(file, weights_only=True), index)
    alone = build(case, 17)
    alone.load_state_dict(whole.state_dict(1))
    copied = copy.deepcopy(worlds)
    live_together(whole, worlds, 15)
    live_together(restored, copied, 15)
    for index in range(3):
        ours, theirs = restored.state_dict(index), whole.state_dict(index)
        assert checkpoint.state_hash(ours) == checkpoint.state_hash(theirs)
    live_alone(alone, replayed(5, 20), 15)
    assert_close(without_replay(alone.state_dict()), without_replay(whole.state_dict(1)), rtol=1e-4, atol=1e-6)


def replayed(seed: int, rounds: int) -> World:
    world = World(seed)
    for _ in range(rounds):
        world.step()
    return world


def test_state_of_another_size_is_refused():
    population = build("td3", SEEDS)
    with pytest.raises(ValueError, match=r"the saved 'actor\.net\.0\.weight' is \[8, 3\], here it is \[16, 3\]"):
        population.load_state_dict(build("td3", 0, hidden=(8, 16)).state_dict(), 1)
    with pytest.raises(ValueError, match=r"the saved 'actor' does not fit: 'net\.1\.bias' is in one of the two only"):
        population.load_state_dict(build("td3 with LayerNorm", 0).state_dict(), 1)
    with pytest.raises(ValueError, match="the saved 'x' is float, here it is"):
        copy_state_(torch.zeros(2), 1.0, "x")


def test_gradients_are_clipped_for_each_seed():
    parameters = [torch.ones(3, 2, requires_grad=True), torch.ones(3, requires_grad=True)]
    seen: list[torch.Tensor] = []

    class Watched(Adam):
        def step(self, gradients):
            seen.extend(gradients)

    size = torch.tensor([0.01, 1.0, 50.0])
    loss = size * (3 * parameters[0].sum(1) + 2 * parameters[1])  # gradient size x (3, 3, 2)
    gradient_step(Watched(parameters, 1e-3), loss, max_norm=2.0)
    norms = (seen[0].square().sum(1) + seen[1].square()).sqrt()
    torch.testing.assert_close(norms, torch.tensor([0.01 * 22**0.5, 2.0, 2.0]), rtol=1e-5, atol=0)


def test_sampled_rows_are_those_of_the_seed_alone():
    """Rings of unequal filling, one of which has wrapped; also n-step returns."""
    population = Replay(24, 2, VECTOR, BOX, CPU, stream([0, 1]))
    alone = [Replay(24, 2, VECTOR, BOX, CPU, stream(seed)) for seed in (0, 1)]
    worlds = [World(0), World(1)]
    for t in range(30):
        obs, action = torch.stack([world.obs for world in worlds]), torch.rand(2, 2, 2, generator=worlds[0].numbers)
        steps = [world.step() for world in worlds]
        steps[1].terminated[:] = t % 2 == 0
        population.add(obs, action, together(steps))
        for index in range(2):
            alone[index].add(obs[index], action[index], steps[index])
    for n_step in (1, 3):
        ours = population.sample(40, 0.9, n_step)
        for index in range(2):
            theirs = alone[index].sample(40, 0.9, n_step)
            for field in ours.__slots__:
                assert torch.equal(getattr(ours, field)[index], getattr(theirs, field)), field


def test_streams_of_a_population_are_those_of_its_seeds():
    ours, theirs = stream([7, 8]), [stream(7), stream(8)]
    for draw in (
        lambda s: s.normal(2, 3),
        lambda s: s.uniform(5, dtype=torch.float64),
        lambda s: s.integers(9, 6),
    ):
        assert torch.equal(draw(ours), torch.stack([draw(one) for one in theirs]))
    ours.manual_seed([1, 2])
    assert torch.equal(ours.normal(4)[1], stream(2).normal(4))


def test_streams_of_different_populations_are_refused():
    mixed = {**streams([0, 1]), "update": RandomStream(torch.Generator())}
    with pytest.raises(ValueError, match="must be of the same number of seeds"):
        AGENTS["td3"].Agent(VECTOR, BOX, AGENTS["td3"].Config(), num_envs=1, device=CPU, streams=mixed)
    with pytest.raises(ValueError, match="'hermit' cannot train its seeds as a population"):
        require_one_seed("hermit", (2,))


@pytest.mark.parametrize("layer_norm", [False, True])
def test_seeds_that_see_frames_are_one_grouped_convolution(layer_norm):
    settings = {**SMALL, "update_every": 1, "replay_capacity": 60, "warmup_steps": 4, "layer_norm": layer_norm}
    config, worlds = dqn.Config(**settings), [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    agents = [dqn.Agent(FRAMES, BUTTONS, config, num_envs=1, device=CPU, streams=streams(s)) for s in ([0, 1], 0, 1)]
    obs = torch.zeros(2, 1, 4, 36, 36, dtype=torch.uint8)
    for t in range(8):
        frames = [torch.randint(0, 255, (1, 1, 36, 36), dtype=torch.uint8, generator=world) for world in worlds]
        following = torch.cat([obs[:, :, 1:], torch.stack(frames)], 2)
        for index, agent in enumerate(agents):
            agent.act(obs if index == 0 else obs[index - 1], explore=True)
            steps = [make_step(one, float(t)) for one in following]
            agent.observe(together(steps) if index == 0 else steps[index - 1])
            agent.update()
        obs = following
    for index in range(2):
        ours, theirs = agents[0].state_dict(index), agents[1 + index].state_dict()
        assert_close(without_replay(ours), without_replay(theirs), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", SETTINGS)
def test_population_runs_on_a_fake_gpu(case, monkeypatch):
    """As for one seed, see `test_every_agent`: no mixed devices, no read of a value, gradients stood in for."""
    device = torch.device("cuda")
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, raising=False)
    monkeypatch.setattr(torch.autograd, "grad", fake_gradients)
    with FakeTensorMode():
        agent = build(case, SEEDS, device=device, warmup_steps=2 if case.startswith("symphony") else 0)
        obs = torch.zeros(3, 2, 3, device=device)
        flags = torch.zeros(3, 2, dtype=torch.bool, device=device)
        scalars = torch.zeros(3, 2, device=device)
        for _ in range(3):
            action = agent.act(obs, explore=True)
            agent.observe(Step(obs, scalars, flags, flags, obs, scalars, scalars.long(), flags))
            metrics = agent.update()
        assert agent.updates > 4
        assert action.device.type == "cuda"
        assert {(value.device.type, value.shape) for value in metrics.values()} == {("cuda", (3,))}


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("name", ["critics", "actor", "CNN"])
def test_no_activation_is_written_over_a_view(name, seeds):
    """Autograd would copy the whole tensor and its gradient for it, which took half the time of an update."""
    networks = {
        "critics": (lambda: Critics(2, 3, 1, (4, 4), False), (torch.zeros(seeds, 5, 3), torch.zeros(seeds, 5, 1))),
        "actor": (lambda: DeterministicActor(3, 1, (4, 4), False), (torch.zeros(seeds, 5, 3),)),
        "CNN": (lambda: NatureCNN((1, 36, 36), False), (torch.zeros(seeds, 2, 1, 36, 36, dtype=torch.uint8),)),
    }
    make, inputs = networks[name]
    if seeds == 1:
        output = make()(*(tensor[0] for tensor in inputs))
    else:
        output = stack([make() for _ in range(seeds)])(*inputs)
    waiting, seen = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    names = {type(node).__name__ for node in seen}
    assert any("Relu" in name for name in names)
    assert not any("CopySlices" in name for name in names), names
