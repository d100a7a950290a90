"""Targets and losses of the agents against numbers worked out by hand (specs/beer-and-online-rl.md, section 12.11)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from agents import ddpg, dqn, sac, td3
from agents.networks import Critics, initialise_, mlp
from agents.replay import Batch


class ConstantCritics(nn.Module):
    """Q_k = values[k], plus the first action component times `slope`."""

    def __init__(self, *values: float, slope: float = 0.0):
        super().__init__()
        self.count, self.slope = len(values), slope
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.values[:, None] + self.slope * action[:, 0]

    def first(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.forward(obs, action)[0]


class ConstantActor(nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, obs: Tensor) -> Tensor:
        return self.value.expand(len(obs), 1)


def make_batch(reward: list[float], terminated: list[bool], discount: float = 0.5) -> Batch:
    rows = len(reward)
    obs = torch.zeros(rows, 3)
    return Batch(
        obs=obs,
        action=torch.zeros(rows, 1),
        reward=torch.tensor(reward),
        next_obs=obs,
        terminated=torch.tensor(terminated),
        discount=torch.full((rows,), discount),
    )


BATCH = make_batch(reward=[1.0, 1.0], terminated=[True, False])


def test_td3_target_takes_the_smaller_critic_and_bootstraps_unless_terminated():
    target = td3.td_target(ConstantActor(0.0), ConstantCritics(10.0, 12.0), BATCH, torch.zeros(2, 1), 0.5)
    assert target.tolist() == [1.0, 6.0]  # 1, and 1 + 0.5 * 10


def test_td3_target_clips_the_noise_and_then_the_action():
    critics = ConstantCritics(0.0, 0.0, slope=1.0)
    going = make_batch([0.0] * 3, [False] * 3, discount=1.0)
    noise = torch.tensor([[0.3], [2.0], [-2.0]])
    target = td3.td_target(ConstantActor(0.2), critics, going, noise, 0.5)
    assert target.tolist() == pytest.approx([0.5, 0.7, -0.3])
    assert td3.td_target(ConstantActor(0.8), critics, going, noise, 0.5).tolist() == pytest.approx([1.0, 1.0, 0.3])


def test_ddpg_target_uses_its_only_critic():
    assert ddpg.td_target(ConstantActor(0.0), ConstantCritics(10.0), BATCH).tolist() == [1.0, 6.0]


@pytest.mark.parametrize(("module", "critics", "expected"), [(td3, (1.0, 3.0), 4.0 + 16.0), (ddpg, (1.0,), 4.0)])
def test_critic_loss_is_the_squared_error_summed_over_critics(module, critics, expected):
    loss, metrics = module.critic_loss(ConstantCritics(*critics), BATCH, torch.tensor([-1.0, -1.0]))
    assert loss.item() == pytest.approx(expected)
    assert not metrics["loss/critic"].requires_grad


@pytest.mark.parametrize("module", [td3, ddpg])
def test_deterministic_actor_climbs_the_first_critic(module):
    actor = ConstantActor(0.25)
    loss, _ = module.actor_loss(actor, ConstantCritics(2.0, -50.0, slope=3.0), BATCH)
    assert loss.item() == pytest.approx(-2.75)
    loss.backward()
    assert actor.value.grad is not None
    assert actor.value.grad.item() == pytest.approx(-3.0)


def test_sac_target_subtracts_the_weighted_log_probability():
    class Actor:
        def sample(self, obs, noise):
            return torch.zeros(2, 1), torch.tensor([-3.0, -3.0])

    log_temperature = torch.tensor(0.5).log()
    target = sac.td_target(Actor(), ConstantCritics(10.0, 12.0), log_temperature, BATCH, torch.zeros(2, 1))  # type: ignore[arg-type]
    assert target.tolist() == pytest.approx([1.0, 1 + 0.5 * (10 + 0.5 * 3)])


def test_sac_actor_loss_and_temperature_loss():
    class Actor:
        def sample(self, obs, noise):
            return torch.full((2, 1), 0.5), torch.tensor([-1.0, -3.0])

    log_temperature = torch.tensor(0.1).log().requires_grad_()
    loss, metrics = sac.actor_loss(
        Actor(), ConstantCritics(1.0, 4.0, slope=2.0), log_temperature, BATCH, torch.zeros(2, 1)  # type: ignore[arg-type]
    )  # fmt: skip
    assert loss.item() == pytest.approx(0.1 * -2 - (1 + 2 * 0.5))
    assert metrics["policy/entropy"].item() == pytest.approx(2.0)
    # entropy 2 above its target 1: the temperature must fall, d/d(log α) = α (H - H̄) > 0
    sac.temperature_loss(log_temperature, metrics["policy/entropy"], 1.0).backward()
    assert log_temperature.grad is not None
    assert log_temperature.grad.item() == pytest.approx(0.1)


@pytest.mark.parametrize("seed", range(3))
def test_sac_density_integrates_to_one(seed):
    """exp(log π(a)) over a in (-1, 1) by the trapezoidal rule, for one action dimension."""
    actor = sac.StochasticActor(mlp(2, (8,), 2, layer_norm=False)).double()
    initialise_(actor, torch.Generator().manual_seed(seed))
    obs = torch.randn(1, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise = torch.linspace(-9, 9, 20_001, dtype=torch.float64)[:, None]
    action, log_probability = actor.sample(obs.expand(len(noise), -1), noise)
    assert torch.trapezoid(log_probability.exp(), action[:, 0]).item() == pytest.approx(1.0, abs=1e-4)


def test_sac_log_probability_is_finite_for_saturated_actions():
    actor = sac.StochasticActor(mlp(1, (4,), 2, layer_norm=False))
    with torch.no_grad():
        actor.net[-1].bias.copy_(torch.tensor([40.0, 5.0]))  # mean 40, log std at its upper end
        actor.net[-1].weight.zero_()
    action, log_probability = actor.sample(torch.zeros(1, 1), torch.zeros(1, 1))
    assert action.item() == 1.0
    # log N(0; 0, e²) - log(1 - tanh(40)²) = -2 - ½ log 2π - 2 (log 2 - 40)
    assert log_probability.item() == pytest.approx(-2 - 0.5 * math.log(2 * math.pi) - 2 * (math.log(2) - 40), rel=1e-4)


def test_dqn_target_takes_the_best_action_of_the_target_network():
    class Net(nn.Module):
        def forward(self, obs: Tensor) -> Tensor:
            return torch.tensor([[1.0, 8.0, 3.0]]).expand(len(obs), 3)

    assert dqn.td_target(Net(), BATCH).tolist() == [1.0, 5.0]  # type: ignore[arg-type]


@pytest.mark.parametrize(("huber", "expected"), [(False, 9.0), (True, 2.5)])
def test_dqn_loss_looks_at_the_action_taken(huber, expected):
    class Net(nn.Module):
        def forward(self, obs: Tensor) -> Tensor:
            return torch.tensor([[0.0, 7.0, 4.0]]).expand(len(obs), 3)

    batch = Batch(**{**{n: getattr(BATCH, n) for n in BATCH.__slots__}, "action": torch.tensor([1, 2])})
    loss, _, error = dqn.td_loss(Net(), batch, torch.tensor([4.0, 7.0]), huber)  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(expected)
    assert error.tolist() == [3.0, -3.0]


@pytest.mark.parametrize("layer_norm", [False, True])
def test_stacked_critics_are_independent_networks(layer_norm):
    """Each of three stacked critics equals a plain torch network with the same weights."""
    critics = Critics(3, 4, 2, (5, 6), layer_norm)
    initialise_(critics, torch.Generator().manual_seed(0))
    obs, action = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(1))[0], torch.rand(7, 2)
    values = critics(obs, action)
    for k in range(3):
        x = torch.cat([obs, action], 1)
        for depth, layer in enumerate([*critics.layers, critics.head]):
            x = x @ layer.weight[k] + layer.bias[k]  # type: ignore[index]
            if depth < 2:
                x = torch.relu(nn.functional.layer_norm(x, x.shape[1:]) if layer_norm else x)
        torch.testing.assert_close(values[k], x[:, 0])
    torch.testing.assert_close(critics.first(obs, action), values[0])


def test_initial_weights_come_from_the_generator_alone():
    nets = [Critics(2, 3, 1, (4,), False) for _ in range(2)]
    for net in nets:
        initialise_(net, torch.Generator().manual_seed(5))
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)
    first = nets[0].layers[0].weight  # type: ignore[union-attr]
    assert first.abs().max() <= 1 / math.sqrt(4)  # type: ignore[operator]
    assert not torch.equal(first[0], first[1])  # type: ignore[index]
