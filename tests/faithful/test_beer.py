"""BEER and what it is compared with, number by number (specs/beer-and-online-rl.md, section 12, checks 1 to 9)."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from agents import beer, dqn, representation
from agents.beer import Agent, Config
from agents.networks import Critics, initialise_
from agents.replay import Batch
from plasticity.measures import ranks
from runs.catalogue import AGENTS, preset_config
from tests.agents.fakes import BOX, BUTTONS, CPU, SMALL, VECTOR, make_step, streams

DOUBLE = torch.float64


def one_critic(*rows: list[list[float]]) -> list[Tensor]:
    """[B, D] lists as features [1, B, D]."""
    return [torch.tensor(values, dtype=DOUBLE)[None] for values in rows]


def norm_of(weight: Tensor) -> Tensor:
    return weight.norm().view(1, 1)


HAND = (
    [[1.0, 0], [3, 4], [1, 1], [2, 0]],
    [[1.0, 0], [3, 4], [1, -1], [1, 1]],
)
REWARD = torch.tensor([1.0, 0, 1, 2], dtype=DOUBLE)


def test_hand_batch():
    """Check 1; the trap of broadcasting to (B, B) would give 8.394e-5."""
    f, following = one_critic(*HAND)
    f.requires_grad_()
    hinge, metrics = representation.beer(f, following, following, norm_of(torch.ones(2, dtype=DOUBLE)), REWARD, 0.99)
    assert 1e-3 * hinge.item() == pytest.approx(6.3118687e-5, abs=1e-11)
    assert metrics["representation/similarity"].item() == pytest.approx((1 + 1 + 0 + 0.70710678) / 4, abs=1e-7)
    bounds = (0.74752525, 1.00005051, 0.87378788, 0.70714249)
    assert metrics["representation/bound"].item() == pytest.approx(sum(bounds) / 4, abs=1e-7)
    assert metrics["representation/active_fraction"].item() == 0.25
    (gradient,) = torch.autograd.grad(hinge, f)
    assert gradient.abs().max() < 1e-9


def random_pairs(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    f, following = torch.rand(2, 1, rows, 8, dtype=DOUBLE, generator=source)
    reward = 4 * torch.rand(rows, dtype=DOUBLE, generator=source)
    return f, following, reward, torch.randn(8, dtype=DOUBLE, generator=source)


def test_active_exactly_where_no_head_of_this_norm_could_be_right():
    """Check 2, in both forms of the inequality."""
    f, following, reward, w = random_pairs(20_000)
    impossible = (reward.abs() > w.norm() * (f - 0.99 * following).norm(dim=-1)[0]).double()
    for form in ("cosine", "inner"):
        for row in range(0, 20_000, 4_000):
            part = slice(row, row + 4_000)
            _, metrics = representation.beer(
                f[:, part], following[:, part], following[:, part], norm_of(w), reward[part], 0.99, form=form
            )
            assert round(4_000 * float(metrics["representation/active_fraction"])) == int(impossible[part].sum())
    assert 0.05 < impossible.mean() < 0.95


def test_never_active_without_reward_or_where_bellman_holds():
    """Check 3."""
    f, following, _, w = random_pairs(20_000)
    hinge, metrics = representation.beer(f, following, following, norm_of(w), torch.zeros(20_000, dtype=DOUBLE), 0.99)
    assert hinge == 0
    assert metrics["representation/bound"] >= 1
    reward = ((f - 0.99 * following) @ w)[0]
    assert representation.beer(f, following, following, norm_of(w), reward, 0.99)[0] == 0
    aligned = (f - 0.99 * following)[0, 0]
    reward = ((f - 0.99 * following) @ aligned)[0]
    first = slice(0, 1)
    _, metrics = representation.beer(
        f[:, first], following[:, first], following[:, first], norm_of(aligned), reward[first], 0.99
    )
    difference = metrics["representation/similarity"] - metrics["representation/bound"]
    assert difference.item() == pytest.approx(0, abs=1e-14)


def test_loss_is_what_a_loop_over_rows_says():
    """Check 6, with the mixed bound of the code: online features above, target features below."""
    f, target_next, reward, w = random_pairs(256)
    online_next = random_pairs(256, seed=1)[0]
    hinge, _ = representation.beer(f, target_next, online_next, norm_of(w), reward, 0.99)
    total = 0.0
    for i in range(256):
        a, b, c, r = f[0, i], target_next[0, i], online_next[0, i], reward[i]
        upper = (0.5 / 0.99) * (a.norm() ** 2 + 0.99**2 * c.norm() ** 2 - r**2 / w.norm() ** 2) / (a.norm() * b.norm())
        total += max(0.0, float(F.cosine_similarity(a, b, dim=0, eps=1e-6) - upper))
    assert total > 0
    assert hinge.item() == pytest.approx(total / 256, rel=1e-12)
    matched, _ = representation.beer(f, target_next, online_next, norm_of(w), reward, 0.99, matched=True)
    assert matched != hinge


def test_discount_of_the_bound_and_mask():
    """Check 7, and rows without a successor."""
    f, following, reward, w = random_pairs(100)
    near, far = (representation.beer(f, following, following, norm_of(w), reward, g)[0] for g in (0.99, 0.5))
    assert near != far
    each = torch.full((100,), 0.5, dtype=DOUBLE)
    assert representation.beer(f, following, following, norm_of(w), reward, each)[0] == far
    everything = torch.ones(100, dtype=torch.bool)
    assert representation.beer(f, following, following, norm_of(w), reward, 0.99, mask=everything)[0] == 0


def test_dead_features_are_finite():
    """Check 8."""
    f, following, reward, w = random_pairs(4)
    f[0, 0] = following[0, 1] = 0
    f.requires_grad_()
    hinge, metrics = representation.beer(f, following, following, norm_of(w), reward, 0.99)
    (gradient,) = torch.autograd.grad(hinge, f)
    assert hinge.isfinite()
    assert gradient.isfinite().all()
    assert all(value.isfinite() for value in metrics.values())


def test_ranks():
    """Check 9."""
    phi = torch.zeros(100, 5, dtype=DOUBLE)
    phi[:5] = torch.diag(torch.tensor([10, 5, 1, 0.05, 0.001], dtype=DOUBLE))
    for scale, expected in ((1, (3, 3)), (10, (3, 4))):
        sigma = ranks.singular_values(scale * phi[None])
        assert (int(ranks.srank(sigma, 0.01)), int(ranks.feature_rank(sigma, 100, 0.01))) == expected
    for matrix, expected in ((torch.ones(256, 64), 1), (torch.eye(64), 64)):
        sigma = ranks.singular_values(matrix.to(DOUBLE)[None])
        found = int(ranks.srank(sigma, 0.01)), int(ranks.feature_rank(sigma, len(matrix), 0.01))
        assert found == (expected, expected)


# The agent


def make_agent(seeds: int | list[int] = 0, **settings) -> Agent:
    config = Config(**{**SMALL, **settings})
    return Agent(VECTOR, BOX, config, num_envs=1, device=CPU, streams=streams(seeds))


def live(agent, steps: int) -> dict[str, Tensor]:
    world = torch.Generator().manual_seed(1)
    obs, metrics = torch.randn(1, 3, generator=world), {}
    for t in range(steps):
        agent.act(obs, explore=True)
        obs, reward = torch.randn(1, 3, generator=world), torch.rand(1, generator=world)
        agent.observe(make_step(obs, reward, truncated=t % 7 == 6))
        metrics = agent.update()
    return metrics


def batch_of(agent: Agent) -> Batch:
    return agent.replay.sample(16, 0.99)


def test_penalty_moves_only_the_layers_before_the_head():
    """Check 4."""
    agent = make_agent(representation_weight=1e9)
    live(agent, 40)
    batch = batch_of(agent)
    features = agent.critic.features(batch.obs, batch.action)
    value, _ = beer.penalty(agent.critic, agent.others, batch, features, agent.config)
    assert value > 0
    value.backward()
    named = {name: p.grad for name, p in agent.critic.named_parameters()}
    assert named.pop("head.weight") is None
    assert named.pop("head.bias") is None
    assert all(gradient is not None for gradient in named.values())
    for network in (agent.actor, agent.target_actor, agent.target_critic):
        assert all(p.grad is None for p in network.parameters())


def test_gradient_equals_finite_differences_with_the_bound_frozen():
    """Check 4: only the cosine has a gradient."""
    f, following, reward, w = random_pairs(30)
    reward = reward + 6  # most rows active
    _, metrics = representation.beer(f, following, following, norm_of(w), reward, 0.99)
    assert metrics["representation/active_fraction"] > 0.5
    own, other = f.norm(dim=-1), following.norm(dim=-1)
    bound = (own.square() + 0.99**2 * other.square() - (reward / w.norm()).square()) / (2 * 0.99 * own * other)

    def frozen_bound(x: Tensor) -> Tensor:
        return F.relu(F.cosine_similarity(x, following, dim=-1, eps=1e-6) - bound).mean()

    x = f.clone().requires_grad_()
    (ours,) = torch.autograd.grad(representation.beer(x, following, following, norm_of(w), reward, 0.99)[0], x)
    numeric = torch.zeros_like(f)
    for index in range(f.numel()):
        step = torch.zeros(f.numel(), dtype=DOUBLE)
        step[index] = 1e-6
        step = step.view_as(f)
        numeric.view(-1)[index] = (frozen_bound(f + step) - frozen_bound(f - step)) / 2e-6
    torch.testing.assert_close(ours, numeric, atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("kind", ["beer", "peer", "dr3", "infer"])
def test_without_weight_it_is_the_base_agent_to_the_bit(kind):
    """Check 5."""
    base, weightless, real = (
        make_agent(representation="none"),
        make_agent(representation=kind, representation_weight=0.0),
        make_agent(representation=kind, representation_weight=10.0),
    )
    for agent in (base, weightless, real):
        live(agent, 58)
        assert agent.updates == 50
    for a, b in zip(base.online_parameters, weightless.online_parameters, strict=True):
        assert torch.equal(a, b)
    assert not all(torch.equal(a, b) for a, b in zip(base.online_parameters, real.online_parameters, strict=True))


def test_released_settings():
    config = Config()
    assert (config.representation, config.representation_weight, config.discount) == ("beer", 1e-3, 0.99)
    assert (config.learning_rate, config.target_rate, config.batch_size) == (3e-4, 0.005, 256)
    assert (config.warmup_steps, config.exploration_noise, config.hidden) == (25_000, 0.1, (256, 256))
    infer = preset_config("beer", "infer")
    assert (infer.representation_weight, infer.feature_heads, infer.feature_scale) == (0.1, 10, 100.0)


def test_actor_and_targets_move_at_every_update():
    agent = make_agent()
    live(agent, 9)
    before = [p.clone() for p in (*agent.actor.parameters(), *agent.target_parameters)]
    agent._update_once()
    after = (*agent.actor.parameters(), *agent.target_parameters)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# What it is compared with


def critics(count: int = 2) -> Critics:
    made = Critics(count, 3, 2, (16, 16), False)
    initialise_(made, torch.Generator().manual_seed(3))
    return made


def test_peer_is_the_inner_product_with_target_features_and_dr3_with_the_own_next_ones():
    source = torch.Generator().manual_seed(0)
    f = torch.randn(2, 5, 4, generator=source, requires_grad=True)
    target_next = torch.randn(2, 5, 4, generator=source)
    online_next = torch.randn(2, 5, 4, generator=source, requires_grad=True)
    arguments = (f, target_next, online_next, torch.ones(2, 1), torch.zeros(5), torch.ones(5))
    for kind, other in (("peer", target_next), ("dr3", online_next)):
        value, _ = representation.penalty(kind, *arguments)
        by_hand = sum(float(f[k, i] @ other[k, i]) for k in range(2) for i in range(5)) / 5
        assert value.item() == pytest.approx(by_hand, rel=1e-5)
        gradients = torch.autograd.grad(value, (f, online_next), allow_unused=True)
        torch.testing.assert_close(gradients[0], other.detach() / 5)
        assert (gradients[1] is None) == (kind == "peer")
    with pytest.raises(ValueError, match="must be beer, peer or dr3"):
        representation.penalty("none", *arguments)


def test_infer_pulls_heads_to_their_first_outputs_scaled():
    agent = make_agent(representation="infer", feature_heads=3, feature_scale=10.0)
    live(agent, 9)
    batch = batch_of(agent)
    features = agent.critic.features(batch.obs, batch.action)
    value, _ = beer.penalty(agent.critic, agent.others, batch, features, agent.config)
    first = agent.others.first
    assert first is not None
    wanted = 10 * first.first_heads(first.first_network.features(batch.obs, batch.action))
    assert value.item() == pytest.approx(float((first.heads(features) - wanted).square().mean()), rel=1e-5)
    kept = copy.deepcopy(first.first_network.state_dict())
    moving = copy.deepcopy(first.heads.state_dict())
    agent._update_once()
    assert all(torch.equal(a, b) for a, b in zip(kept.values(), first.first_network.state_dict().values(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(moving.values(), first.heads.state_dict().values(), strict=True))


def test_infer_is_dqns_too():
    """There it comes from: heads on the features of states, trained with the network and clipped with it."""
    config = dqn.Config(**SMALL, update_every=1, representation="infer", feature_scale=10.0, max_gradient_norm=0.1)
    agent = dqn.Agent(VECTOR, BUTTONS, config, num_envs=1, device=CPU, streams=streams())
    live(agent, 40)
    batch, first = batch_of(agent), agent.first
    features = agent.net.features(batch.obs)
    wanted = 10 * first.first_heads(first.first_network.features(batch.obs)[None])
    by_hand = float((first.heads(features[None]) - wanted).square().mean())
    value, _ = dqn.infer_penalty(agent.net, first, batch, 10.0)
    assert value.item() == pytest.approx(by_hand, rel=1e-5)
    moved = zip(first.first_network.parameters(), agent.net.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in moved)
    assert not any(
        torch.equal(a, b) for a, b in zip(first.heads.parameters(), first.first_heads.parameters(), strict=True)
    )
    parts = agent.state_dict()["parts"]
    assert all(parts[name] for name in ("heads", "heads_optimizer", "first_heads", "first_network"))


@pytest.mark.parametrize(
    ("name", "kind"), [*((n, k) for n in ("td3", "sac", "dqn") for k in ("beer", "peer", "dr3")), ("dqn", "infer")]
)
def test_other_agents_offer_the_penalties(name, kind):
    def make(**settings):
        module = AGENTS[name]
        more = {"update_every": 1} if name == "dqn" else {}
        config = module.Config(**{**SMALL, **more, **settings})
        spec = BUTTONS if name == "dqn" else BOX
        return module.Agent(VECTOR, spec, config, num_envs=1, device=CPU, streams=streams())

    plain, weightless, penalised = (
        make(),
        make(representation=kind, representation_weight=0.0),
        make(representation=kind, representation_weight=10.0),
    )
    for agent in (plain, weightless, penalised):
        metrics = live(agent, 40)
    prefix = "loss/representation" if kind == "infer" else "representation/"
    assert any(name.startswith(prefix) for name in metrics)
    nets = [agent.net if name == "dqn" else agent.critics for agent in (plain, weightless, penalised)]
    first, second, third = ([p.detach() for p in net.parameters()] for net in nets)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, third, strict=True))


def test_sac_bounds_with_the_soft_reward():
    """r - γ α log π(a'|s') stands for r, section 4; at a terminal transition there is no next entropy."""
    module = AGENTS["sac"]
    config = module.Config(**{**SMALL, "representation": "beer", "initial_temperature": 0.5})
    agent = module.Agent(VECTOR, BOX, config, num_envs=1, device=CPU, streams=streams())
    live(agent, 12)
    batch = agent.replay.sample(16, 0.99)
    noise = torch.zeros(16, 2)
    soft, action, features = agent._next(batch, noise)
    expected_action, log_probability = agent.actor.sample(batch.next_obs, noise)
    temperature = math.exp(float(agent.log_temperature))
    by_hand = batch.reward - 0.99 * temperature * log_probability * ~batch.terminated
    torch.testing.assert_close(soft.reward, by_hand)
    assert torch.equal(action, expected_action)
    assert features.shape == (2, 16, 16)


def test_dqn_takes_the_head_of_the_action():
    net = dqn.QNetwork(VECTOR, 3, (8,), False)
    initialise_(net, torch.Generator().manual_seed(0))
    action = torch.tensor([0, 2, 1, 1])
    head = net.net[-1].weight.detach()
    torch.testing.assert_close(net.head_norm(action), head[action].norm(dim=-1))
    obs = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(net.features(obs) @ head.T + net.net[-1].bias, net(obs))
