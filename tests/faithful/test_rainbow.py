"""Rainbow, C51 and QR-DQN against numbers worked out by hand (specs/beer-and-online-rl.md, section 12.11)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from agents import qrdqn, rainbow
from agents.networks import NoisyLinear, initialise_
from agents.replay import Batch
from tests.agents.fakes import FRAMES, VECTOR


def batch_of(reward, action, terminated, discount=0.5) -> Batch:
    rows = len(reward)
    return Batch(
        obs=torch.zeros(rows, 3),
        action=torch.tensor(action),
        reward=torch.tensor(reward),
        next_obs=torch.ones(rows, 3),
        terminated=torch.tensor(terminated),
        discount=torch.full((rows,), discount),
    )


class Outputs(nn.Module):
    """The same outputs for every row; noise does nothing."""

    def __init__(self, *outputs: float):
        super().__init__()
        self.outputs = nn.Parameter(torch.tensor(outputs))

    def forward(self, obs, noise=None):
        return self.outputs.expand(len(obs), -1)


SUPPORT = torch.tensor([-1.0, 0.0, 1.0])


@pytest.mark.parametrize(
    ("reward", "factor", "expected"),
    [
        (0.0, 1.0, [0.2, 0.3, 0.5]),  # nothing moves
        (0.25, 0.5, [0.05, 0.5, 0.45]),  # atoms to -0.25, 0.25, 0.75
        (0.5, 0.0, [0.0, 0.5, 0.5]),  # terminal: all mass at the reward
        (7.0, 1.0, [0.0, 0.0, 1.0]),  # beyond the ends
        (-0.5, 1.0, [0.35, 0.4, 0.25]),  # to -1.5 (on the end), -0.5 and 0.5
        (-1.0, 0.0, [1.0, 0.0, 0.0]),  # on an atom
    ],
)
def test_projection_by_hand(reward, factor, expected):
    moved = rainbow.project(torch.tensor([[0.2, 0.3, 0.5]]), torch.tensor([reward]), torch.tensor([factor]), SUPPORT)
    torch.testing.assert_close(moved, torch.tensor([expected]))


@settings(max_examples=60, deadline=None)
@given(
    atoms=st.integers(2, 60),
    low=st.floats(-20, 0),
    width=st.floats(0.5, 40),
    seed=st.integers(0, 1000),
    reward=st.floats(-0.2, 0.2),
    factor=st.floats(0, 0.6),
)
def test_projection_keeps_mass_always_and_the_mean_inside_the_support(atoms, low, width, seed, reward, factor):
    support = torch.linspace(low, low + width, atoms, dtype=torch.float64)
    probability = torch.rand(4, atoms, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    probability /= probability.sum(-1, keepdim=True)
    middle = support.mean()
    # Rewards such that every atom stays inside.
    inside = torch.full((4,), reward * width, dtype=torch.float64) + (1 - factor) * middle
    moved = rainbow.project(probability, inside, torch.full_like(inside, factor), support)
    torch.testing.assert_close(moved.sum(-1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close((moved * support).sum(-1), inside + factor * (probability * support).sum(-1))
    outside = rainbow.project(probability, inside + 3 * width, torch.full_like(inside, factor), support)
    torch.testing.assert_close(outside.sum(-1), torch.ones(4, dtype=torch.float64))


def test_projection_equals_the_loop_of_the_paper():
    """C51, algorithm 1: lower and upper neighbour of each moved atom."""
    generator = torch.Generator().manual_seed(0)
    support, probability = torch.linspace(-10, 10, 51), torch.rand(5, 51, generator=generator)
    probability /= probability.sum(-1, keepdim=True)
    reward = torch.randn(5, generator=generator) * 4
    factor = torch.tensor([0.99, 0.97, 0.0, 0.5, 1.0])
    expected = torch.zeros(5, 51)
    for row in range(5):
        for j in range(51):
            moved = min(max(float(reward[row] + factor[row] * support[j]), -10.0), 10.0)
            b = (moved + 10) / 0.4
            lower = min(math.floor(b), 49)
            expected[row, lower] += probability[row, j] * (lower + 1 - b)
            expected[row, lower + 1] += probability[row, j] * (b - lower)
    torch.testing.assert_close(rainbow.project(probability, reward, factor, support), expected, rtol=1e-4, atol=1e-5)


def log(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


# Two actions, three atoms: means 0.3 and 0.6 of the online network, 0.8 and -0.5 of the target network.
ONLINE = Outputs(*log(0.2, 0.3, 0.5), *log(0.1, 0.2, 0.7))
TARGET = Outputs(*log(0.05, 0.1, 0.85), *log(0.6, 0.3, 0.1))
ROWS = batch_of([0.0, 0.5], [0, 1], [False, True], discount=1.0)


def test_double_learning_selects_online_and_judges_by_the_target():
    values = rainbow.action_values(ONLINE(torch.zeros(1, 3)), SUPPORT)
    torch.testing.assert_close(values, torch.tensor([[0.3, 0.6]]))
    double = rainbow.target(ONLINE, TARGET, ROWS, None, None, SUPPORT, True)  # type: ignore[arg-type]
    plain = rainbow.target(ONLINE, TARGET, ROWS, None, None, SUPPORT, False)  # type: ignore[arg-type]
    torch.testing.assert_close(double, torch.tensor([[0.6, 0.3, 0.1], [0.0, 0.5, 0.5]]))
    torch.testing.assert_close(plain, torch.tensor([[0.05, 0.1, 0.85], [0.0, 0.5, 0.5]]))


def test_distributional_loss_and_divergence():
    wanted = torch.tensor([[0.6, 0.3, 0.1], [0.0, 0.5, 0.5]])
    weight = torch.tensor([1.0, 0.5])
    loss, metrics, errors = rainbow.loss(ONLINE, ROWS, wanted, None, SUPPORT, weight)  # type: ignore[arg-type]
    cross = [-(0.6 * math.log(0.2) + 0.3 * math.log(0.3) + 0.1 * math.log(0.5)), -0.5 * math.log(0.2 * 0.7)]
    entropy = [-(0.6 * math.log(0.6) + 0.3 * math.log(0.3) + 0.1 * math.log(0.1)), math.log(2)]
    assert loss.item() == pytest.approx((cross[0] + 0.5 * cross[1]) / 2, rel=1e-5)
    assert errors.tolist() == pytest.approx([cross[0] - entropy[0], cross[1] - entropy[1]], rel=1e-4)
    assert metrics["value/mean"].item() == pytest.approx(0.45)
    assert not errors.requires_grad
    own = ONLINE(torch.zeros(2, 3)).unflatten(-1, (2, 3)).softmax(-1)[[0, 1], [0, 1]].detach()
    _, _, none = rainbow.loss(ONLINE, ROWS, own, None, SUPPORT)  # type: ignore[arg-type]
    assert none.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_without_distributions_it_is_double_dqn():
    net, target_net = Outputs(1.0, 8.0, 3.0), Outputs(5.0, 2.0, 9.0)
    rows = batch_of([1.0, 1.0], [1, 2], [True, False])
    for double, value in ((True, 2.0), (False, 9.0)):
        found = rainbow.target(net, target_net, rows, None, None, None, double)  # type: ignore[arg-type]
        assert found.tolist() == [1.0, 1 + 0.5 * value]
    loss, _, errors = rainbow.loss(net, rows, torch.tensor([4.0, 2.0]), None, None)  # type: ignore[arg-type]
    assert loss.item() == pytest.approx((16 + 1) / 2)
    assert errors.tolist() == [4.0, 1.0]


@pytest.mark.parametrize("observation_spec", [VECTOR, FRAMES], ids=["vector", "frames"])
def test_dueling_streams_are_put_together_for_every_atom(observation_spec):
    """q_i = v_i + a_i - mean over actions of a_i (Rainbow, section 3)."""
    net = rainbow.RainbowNetwork(observation_spec, 4, rainbow.Config(noisy=False, atoms=5, hidden=(8, 6)))
    initialise_(net, torch.Generator().manual_seed(0))
    obs = torch.randint(0, 255, (7, *observation_spec.shape), generator=torch.Generator().manual_seed(1))
    obs = obs.to(observation_spec.dtype)
    x = net.torso(obs)
    assert net.value is not None
    value, advantage = net.value(x, None, None), net.advantage(x, None, None).view(7, 4, 5)
    expected = value[:, None] + advantage - advantage.mean(1, keepdim=True)
    torch.testing.assert_close(net(obs).view(7, 4, 5), expected)
    assert [m.weight.shape[0] for m in net.modules() if isinstance(m, nn.Linear)][-1] == 5


def test_noisy_layer_is_the_one_with_noise_on_its_weights():
    """Fortunato et al. 2018, eqs. 9 to 11, and its initial values (section 3.2)."""
    layer = NoisyLinear(4, 3, 0.5)
    initialise_(layer, torch.Generator().manual_seed(0))
    assert layer.mean.weight.abs().max() <= 0.5
    assert (layer.deviation.weight == 0.25).all()
    assert (layer.deviation.bias == 0.25).all()
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(6, 4, generator=generator), torch.randn(7, generator=generator)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    weight = layer.mean.weight + layer.deviation.weight * torch.outer(noise[4:], noise[:4])
    bias = layer.mean.bias + layer.deviation.bias * noise[4:]
    torch.testing.assert_close(layer(x, noise), x @ weight.T + bias)
    torch.testing.assert_close(layer(x), layer.mean(x))


# QR-DQN


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        # τ = 1/4, 3/4; θ = 0, 1; y = -2, 0.5. u of θ_1: -2, 0.5; of θ_2: -3, -0.5
        (1.0, (0.75 * 1.5 + 0.25 * 0.125) / 2 + (0.25 * 2.5 + 0.25 * 0.125) / 2),
        (2.0, (0.75 * 2.0 + 0.25 * 0.125) / 4 + (0.25 * 4.0 + 0.25 * 0.125) / 4),
        (0.0, (0.75 * 2 + 0.25 * 0.5) / 2 + (0.25 * 3 + 0.25 * 0.5) / 2),
    ],
)
def test_quantile_huber_loss_by_hand(threshold, expected):
    found = qrdqn.quantile_huber(torch.tensor([[0.0, 1.0]]), torch.tensor([[-2.0, 0.5]]), threshold)
    assert found.tolist() == pytest.approx([expected])


def test_quantile_regression_finds_the_quantiles_of_a_known_distribution():
    """With κ = 0 the minimum lies at the quantiles at τ_i (lemma 2): of 0, 1, ... 99 at 0.1, 0.3, 0.5, 0.7, 0.9."""
    quantile = torch.zeros(1, 5, requires_grad=True)
    outcomes = torch.arange(100.0)[None]
    for step in range(600):
        (gradient,) = torch.autograd.grad(qrdqn.quantile_huber(quantile, outcomes, 0.0).sum(), quantile)
        with torch.no_grad():
            quantile -= 200 * 0.99**step * gradient
    torch.testing.assert_close(quantile.detach(), torch.tensor([[9.5, 29.5, 49.5, 69.5, 89.5]]), rtol=0, atol=1.5)


@pytest.mark.parametrize("double", [False, True])
def test_quantile_target_takes_the_action_of_the_best_mean(double):
    online, target_net = Outputs(0.0, 1.0, 9.0, 9.0), Outputs(2.0, 6.0, 1.0, 3.0)  # means 0.5, 9 and 4, 2
    rows = batch_of([1.0, 1.0], [0, 1], [True, False])
    found = qrdqn.target(online, target_net, rows, 2, double)  # type: ignore[arg-type]
    assert found.tolist() == [[1.0, 1.0], [1.5, 2.5] if double else [2.0, 4.0]]
    loss, metrics, errors = qrdqn.loss(online, rows, found, 1.0, torch.tensor([1.0, 0.0]))  # type: ignore[arg-type]
    # row 0: θ = 0, 1 and y = 1, 1: u = 1 and 0
    assert loss.item() == pytest.approx(0.25 * 0.5 / 2)
    assert errors.tolist() == pytest.approx([-0.5, 9 - sum(found[1].tolist()) / 2])
    assert metrics["value/mean"].item() == pytest.approx((0.5 + 9) / 2)
