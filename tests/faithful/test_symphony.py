"""Symphony number by number: the faithfulness checks of specs/symphony.md, section 16, and what sections 3 to 8 add."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import symphony
from agents.agent import ActionScale
from agents.networks import initialise_
from agents.plastic import AgentOptimizer, Plasticity
from agents.replay import Batch
from agents.symphony import GOLDEN, Agent, Config, Passes
from agents.symphony_networks import Actor, Critics, ReSine, gradient_dropout
from envs import ContinuousActionSpec, ObservationSpec
from plasticity import registry
from plasticity.adam import Adam
from plasticity.networks.redraw import clear_step_counts
from plasticity.population import RandomStream
from tests.agents.fakes import CPU, make_step, streams

PHI = (math.sqrt(5) + 1) / 2


# 4: the aggregation of nodes


def test_weights_of_nodes_and_aggregation():
    weights = symphony.node_weights(6)
    expected = [0.2007778161, 0.2007778161, 0.2007776830, 0.2003423384, 0.1630784057, 0.0342459406]
    assert weights.tolist() == pytest.approx(expected, abs=1e-7)
    many = symphony.node_weights(384)
    assert many[0].item() == pytest.approx(0.00348463, abs=1e-8)
    assert many[-1].item() == pytest.approx(7.39e-9, rel=1e-2)
    assert many[:192].sum().item() == pytest.approx(0.66898, abs=1e-5)
    nodes = torch.tensor([5.0, -3, 2, 10, 0, 1]).view(3, 1, 2)
    assert symphony.aggregate(nodes, weights).item() == pytest.approx(1.1569803460, abs=1e-6)
    rising = torch.arange(1.0, 7).view(3, 1, 2)
    assert symphony.aggregate(rising, weights).item() == pytest.approx(3.0269035233, abs=1e-6)
    mixed = nodes.flatten()[torch.tensor([3, 5, 0, 1, 4, 2])].view(3, 1, 2)
    assert torch.equal(symphony.aggregate(mixed, weights), symphony.aggregate(nodes, weights))
    assert symphony.aggregate(nodes + 7, weights).item() == pytest.approx(1.1569803460 + 7, abs=1e-5)
    raised = nodes + (nodes == 10)
    difference = symphony.aggregate(raised, weights) - symphony.aggregate(nodes, weights)
    assert difference.item() == pytest.approx(expected[-1], abs=1e-6)


def test_gradient_reaches_each_node_with_the_weight_of_its_rank():
    nodes = torch.tensor([5.0, -3, 2, 10, 0, 1]).view(3, 1, 2).requires_grad_()
    weights = symphony.node_weights(6)
    symphony.aggregate(nodes, weights).sum().backward()
    ranks = torch.tensor([4, 0, 3, 5, 1, 2])
    assert nodes.grad is not None
    assert torch.equal(nodes.grad.flatten(), weights[ranks])


# 5: the temporal advantage


def test_temporal_advantage():
    value = torch.tensor([2.0, 0.5])
    advantage, reference = symphony.temporal_advantage(value, torch.tensor(1.0), GOLDEN)
    assert reference.tolist() == pytest.approx([1.3819660113, 0.8090169944])
    assert advantage.tolist() == pytest.approx([0.4472135955, -0.3819660113])
    assert -symphony.rehae(advantage).mean().item() == pytest.approx(-0.0131455816, abs=1e-7)
    assert reference.mean().item() == pytest.approx(1.0954915028)
    first, _ = symphony.temporal_advantage(torch.tensor([3.0, -0.2]), torch.tensor(0.0), GOLDEN)
    assert first.tolist() == pytest.approx([PHI, -PHI], rel=1e-6)
    assert symphony.rehae(first).tolist() == pytest.approx([1.0825418033, -1.0825418033], rel=1e-6)
    large, _ = symphony.temporal_advantage(8 * value, torch.tensor(8.0), GOLDEN)
    assert torch.equal(large, advantage)


def test_average_of_a_constant_value():
    average = torch.tensor(0.0)
    for expected in (0.382, 0.618, 0.764, 0.854):
        _, reference = symphony.temporal_advantage(torch.ones(5), average, GOLDEN)
        average = reference.mean()
        assert average.item() == pytest.approx(expected, abs=1e-3)


def test_actor_always_ascends_the_value():
    value = torch.linspace(-3, 5, 33).requires_grad_()
    advantage, reference = symphony.temporal_advantage(value, torch.tensor(1.0), GOLDEN)
    (-symphony.rehae(advantage).mean()).backward()
    assert value.grad is not None
    assert (value.grad <= 0).all()
    a = advantage.detach()
    weight = (a / 2).tanh().abs() + 0.5 * a.abs() / (a / 2).cosh().square()
    torch.testing.assert_close(value.grad, -weight / (33 * reference.abs()))
    assert value.grad[16] == 0  # where it equals the average, nothing pulls
    for advantage_, bracket in ((0.1, 0.0998336), (1.0, 0.8553410), (2.0, 1.1815685), (5.0, 1.0530949)):
        x = torch.tensor(advantage_, dtype=torch.float64, requires_grad=True)
        symphony.rehae(x).backward()
        assert x.grad is not None
        assert x.grad.item() == pytest.approx(bracket, abs=1e-6)


# 6, 7: where gradients go


def small(**settings) -> Config:
    values = {"warmup_steps": 8, "replay_capacity": 80, "batch_size": 12, "hidden": (16, 16), "nodes": 4}
    return Config(**{**values, **settings})


def networks(seed: int = 0) -> tuple[Actor, Critics, Critics]:
    made = Actor(3, 2, (16, 16)), Critics(3, 2, (16, 16), 4), Critics(3, 2, (16, 16), 4)
    for index, network in enumerate(made):
        initialise_(network, torch.Generator().manual_seed(seed + index))
    return made


def random_batch(rows: int = 12) -> Batch:
    source = torch.Generator().manual_seed(5)
    obs, next_obs = torch.randn(2, rows, 3, generator=source)
    action, reward = torch.rand(rows, 2, generator=source), torch.randn(rows, generator=source)
    return Batch(obs, action, reward, next_obs, torch.arange(rows) % 4 == 0, torch.full((rows,), 0.99))


BOX = ContinuousActionSpec(np.full(2, -1.0, np.float32), np.full(2, 1.0, np.float32))


def gradients(config: Config, metric: str | None = None) -> dict[str, list[Tensor | None]]:
    """Of the whole loss, or of one term of it, by network."""
    actor, critics, target = networks()
    noise = symphony.bounded_noise(torch.randn(12, 2, generator=torch.Generator().manual_seed(9)), 1 / math.e)
    kept = {}

    def keep(name, function):
        return lambda *arguments: kept.setdefault(name, []).append(function(*arguments)) or kept[name][-1]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rehae", "rehse", "swaddling"):
            patch.setattr(symphony, name, keep(name, getattr(symphony, name)))
        scale = ActionScale(BOX, CPU)
        weights = symphony.node_weights(12)
        total, _, _ = symphony.loss(
            actor, critics, target, random_batch(), torch.tensor(0.3), noise, Passes(), scale, weights, config
        )
    term = total if metric is None else {"rehae": -1, "rehse": 1, "swaddling": 1}[metric] * kept[metric][0].mean()
    found = {}
    for name, network in (("actor", actor), ("critics", critics), ("target", target)):
        found[name] = list(torch.autograd.grad(term, list(network.parameters()), retain_graph=True, allow_unused=True))
    return found


def is_zero(tensors: list[Tensor | None]) -> bool:
    return all(tensor is None or not tensor.any() for tensor in tensors)


def test_each_term_moves_only_what_it_should():
    config = small()
    advantage, critic, regulariser = (gradients(config, term) for term in ("rehae", "rehse", "swaddling"))
    assert is_zero(advantage["critics"])
    assert is_zero(regulariser["critics"])
    assert is_zero(critic["actor"])
    assert is_zero(critic["target"])
    head = advantage["actor"][-2]  # weight of the last layer, [1, in, 3 A]: groups A, S, B
    assert head is not None
    assert head[..., :2].abs().min() > 0
    assert head[..., 2:4].abs().min() > 0
    assert not head[..., 4:].any()
    head = regulariser["actor"][-2]
    assert head is not None
    assert not head[..., :2].any()
    assert head[..., 2:].abs().min() > 0
    whole = gradients(config)
    for name in ("actor", "critics"):
        for index, joint in enumerate(whole[name]):
            parts = [term[name][index] for term in (advantage, critic, regulariser)]
            torch.testing.assert_close(joint, sum(part for part in parts if part is not None))


def test_target_critics_move_by_the_polyak_average_alone():
    agent = make_agent()
    live(agent, 8)
    for _ in range(3):
        before = [p.clone() for p in agent.target_parameters]
        agent._update_once()
        for old, new, online in zip(before, agent.target_parameters, agent.critic_optimizer.parameters, strict=True):
            torch.testing.assert_close(new - old, 0.005 * (online - old), rtol=1e-4, atol=1e-7)
    assert not hasattr(agent, "target_actor")


# 8: swaddling


def test_swaddling_values_and_gradients():
    for (scale, temperature), expected in (
        ((0.5, 0.5), 0.8483645),
        ((0.9, 0.1), 0.7383952),
        ((0.999, 0.999), 14.5056587),
        ((0.001, 0.001), -4.9078e-6),
        ((1.0, 1.0), 14.5056587),
    ):
        pair = torch.tensor([scale, temperature], dtype=torch.float64, requires_grad=True)
        value = symphony.swaddling(pair[0], pair[1])
        assert value.item() == pytest.approx(expected, abs=1e-6 if expected > 0 else 1e-9)
        (gradient,) = torch.autograd.grad(value, pair)
        if scale == 0.5:
            assert gradient.tolist() == pytest.approx([2.2867598, 1.7867598], abs=1e-6)
        if scale == 1.0:
            assert gradient.tolist() == [0, 0]


def test_swaddling_comes_to_rest_at_its_stationary_point():
    pair = torch.tensor([0.7, 0.5], dtype=torch.float64, requires_grad=True)
    for _ in range(2_000):
        (gradient,) = torch.autograd.grad(symphony.swaddling(pair[0], pair[1]), pair)
        with torch.no_grad():
            pair -= 0.1 * gradient
    assert pair.tolist() == pytest.approx([0.363881, 0.091958], abs=2e-5)


# 9, 10: the network's own pieces


def test_resine():
    layer = ReSine(1, 1).double()
    points = torch.tensor([-2.0, -0.5, 0.5, 2.0], dtype=torch.float64)
    for s, expected in (
        (0.0, [0.2863732894, -0.0928118486, 0.3279236438, -0.0920279582]),
        (1.0, [-0.1027845684, -0.1290291946, 0.3328913055, 0.1858263519]),
        (-1.0, [-0.0497660733, -0.0494647017, 0.2083737235, 0.1960836994]),
    ):
        layer.scale.data.fill_(s)
        assert layer(points.view(1, 4, 1)).flatten().tolist() == pytest.approx(expected, abs=1e-9)
        zero = torch.zeros(1, 1, 1, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(layer(zero).sum(), zero)
        assert slope.item() == pytest.approx(0.5, abs=1e-12)
        (own,) = torch.autograd.grad(layer(points.view(1, 4, 1)).sum(), layer.scale)
        assert own.item() != 0


def test_resine_scales_start_within_their_bound():
    layer = ReSine(3, 400)
    initialise_(layer, torch.Generator().manual_seed(0))
    assert layer.scale.abs().max().item() == pytest.approx(1 / 20, rel=0.01)
    assert layer.scale.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.05)


def test_gradient_dropout_changes_no_value_and_doubles_no_gradient():
    source = torch.Generator().manual_seed(0)
    x = torch.randn(200, 200, generator=source, requires_grad=True)
    upstream = torch.randn(200, 200, generator=source)
    passes = torch.rand(200, 200, generator=source) < 0.5
    y = gradient_dropout(x, passes)
    assert torch.equal(y, x)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(gradient, torch.where(passes, upstream, 0.0))
    assert (gradient == 0).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_s2_masks_actor_and_both_critics():
    agent = make_agent(gradient_dropout=True)
    passes = agent._passes()
    assert passes.actor is not None
    assert passes.actor.shape == (12, 6)
    assert passes.critics is not None
    assert passes.target_critics is not None
    assert passes.critics.shape == passes.target_critics.shape == (3, 12, 4)
    assert not torch.equal(passes.critics, passes.target_critics)
    live(agent, 20)
    assert agent.updates == 36


# 11: the optimiser


def test_optimiser_without_bias_correction():
    theta = torch.ones(1, dtype=torch.float64)
    optimizer = Adam([theta], 0.1, (GOLDEN, 0.995), weight_decay=0.01, bias_correction=False)
    for gradient, expected in ((1.0, 0.4588185629), (-2.0, 0.7923773092), (0.5, 0.8753054172)):
        optimizer.step([torch.full_like(theta, gradient)])
        assert theta.item() == pytest.approx(expected, abs=1e-9)
    still = torch.ones(3)
    Adam([still], 0.1, (GOLDEN, 0.995), weight_decay=0.01, bias_correction=False).step([torch.zeros(3)])
    assert still.tolist() == pytest.approx(3 * [1 - 0.1 * 0.01])


def test_weights_drawn_anew_bring_no_bias_correction():
    plasticity = Plasticity(lambda: registry.make("redo(every=1,threshold=100)"))
    agent = Agent(ObservationSpec((3,)), BOX, small(), num_envs=1, device=CPU, streams=streams(), plasticity=plasticity)
    live(agent, 12)
    assert agent.updates == 12
    assert isinstance(agent.critic_optimizer, AgentOptimizer)
    assert isinstance(agent.critic_optimizer.inner, Adam)
    clear_step_counts(agent.critic_optimizer.learner, [name for name, _ in agent.critics.named_parameters()])
    assert all(count.isinf() for count in agent.critic_optimizer.inner.step_count)
    live(agent, 1)
    assert all(p.isfinite().all() for p in agent.critics.parameters())


def test_first_steps_are_a_burst():
    theta = torch.zeros(1, dtype=torch.float64)
    optimizer = Adam([theta], 1.0, (GOLDEN, 0.995), bias_correction=False)
    for expected in (5.4018, 6.188, 6.253, 6.062, 5.783):
        before = theta.clone()
        optimizer.step([torch.ones_like(theta)])
        assert (before - theta).item() == pytest.approx(expected, abs=1e-3)


# 12: actions


def test_actions_keep_their_bounds():
    agent = make_agent()
    obs = 50 * torch.randn(2_000, 3, generator=torch.Generator().manual_seed(0))
    assert agent.act(obs, explore=False).abs().max() < math.tanh(1)
    for std, realised in ((1 / math.e, 0.365667), (1 / math.pi, 0.317812)):
        noise = symphony.bounded_noise(torch.randn(1_000_000, generator=torch.Generator().manual_seed(1)), std)
        assert noise.abs().max().item() == pytest.approx(1, abs=1e-6)
        assert noise.std().item() == pytest.approx(realised, abs=1e-3)


def test_actor_rests_in_the_fall_window_of_training_alone():
    agent = make_agent(fall_window=3, episode_limit=10, noise_std=1e-4)
    obs, strong = torch.zeros(1, 3), []
    with torch.no_grad():
        agent.actor.block.net[-1].bias.fill_(4.0)
    for t in range(30):
        strong.append(bool((agent.act(obs, explore=True).abs() > 0.1).all()))
        agent.observe(make_step(obs, 1.0, truncated=t % 10 == 9))
    # Exploration is the first eight steps; the first window in training are the last three of the first episode.
    assert strong == 8 * [True] + 2 * [False] + 2 * (7 * [True] + 3 * [False])


# 13, 14, 15: the agent


def make_agent(seed: int | list[int] = 0, device: torch.device = CPU, **settings) -> Agent:
    made: dict[str, RandomStream] = streams(seed, device)
    return Agent(ObservationSpec((3,)), BOX, small(**settings), num_envs=1, device=device, streams=made)


def live(agent: Agent, steps: int, reward_scale: float = 1.0) -> None:
    world = torch.Generator().manual_seed(1)
    obs = torch.randn(1, 3, generator=world)
    for _ in range(steps):
        agent.act(obs, explore=True)
        obs, reward = torch.randn(1, 3, generator=world), torch.randn(1, generator=world)
        agent.observe(make_step(obs, reward_scale * reward, terminated=bool(reward > 1)))
        agent.update()


def test_scale_of_rewards_changes_nothing():
    one, four = make_agent(), make_agent()
    live(one, 30)
    live(four, 30, reward_scale=4.0)
    assert one.updates == 66
    for a, b in zip(one.actor.parameters(), four.actor.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(one.critics.parameters(), four.critics.parameters(), strict=True):
        assert torch.equal(a, b)


def test_updates_follow_the_fill_alone():
    agent = make_agent(updates_per_step=2)
    live(agent, 8)
    assert agent.updates == 0
    live(agent, 5)
    assert agent.updates == 10
    assert int(agent.replay.head) >= 2 * agent.replay.slots


def test_defaults_are_those_of_s3():
    config = Config()
    assert config.batch_size == 3 * config.nodes == 384
    assert config.hidden[0] == config.replay_capacity // 1_000 == 512
    assert config.replay_capacity // config.warmup_steps == 50
    assert config.advantage_rate == pytest.approx(0.618034, abs=1e-6)


@pytest.mark.parametrize(
    ("observations", "actions", "width", "nodes", "expected"),
    [
        (376, 17, 512, 128, (483_379, 531_584)),
        (376, 17, 384, 96, (313_395, 337_248)),
        (11, 3, 128, 32, (19_593, 22_944)),
    ],
)
def test_parameter_counts(observations, actions, width, nodes, expected):
    actor = Actor(observations, actions, (width, width))
    critics = Critics(observations, actions, (width, width), nodes)
    counts = [sum(p.numel() for p in network.parameters()) for network in (actor, critics)]
    assert counts == [expected[0], 3 * expected[1]]


def test_presets_are_frozen_dataclasses_of_the_published_numbers():
    from runs.catalogue import preset_config

    ed, se, s2 = (preset_config("symphony", name) for name in ("ed", "se", "s2"))
    assert dataclasses.replace(Config(), noise_std=1 / math.pi) == se
    assert (s2.warmup_steps, s2.replay_capacity, s2.learning_rate, s2.gradient_dropout) == (20_480, 512_000, 5e-5, True)
    assert (ed.warmup_steps, ed.replay_capacity, ed.hidden, ed.nodes, ed.batch_size, ed.updates_per_step) == (
        7_680,
        384_000,
        (384, 384),
        96,
        288,
        2,
    )
