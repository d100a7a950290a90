"""A2PR against the golden values of specs/a2pr-and-offline-rl.md, section 14."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from agents.offline import a2pr, bc, td3_bc
from agents.offline.a2pr import ConditionalVAE, Config
from agents.offline.transitions import FixedReplay, Transitions
from agents.replay import Batch
from tests.agents.offline_data import CPU, box, make_transitions, new_agent, streams_and_scale

TINY = {"hidden": (16, 16), "critic_hidden": (16, 16), "batch_size": 8}
A2PR = {**TINY, "vae_hidden": (16, 16)}


def batch_of(obs: Tensor, action: Tensor, reward: Tensor | None = None, terminal: Tensor | None = None) -> Batch:
    rows = len(obs)
    return Batch(
        obs=obs,
        action=action,
        reward=torch.zeros(rows) if reward is None else reward,
        next_obs=obs,
        terminated=torch.zeros(rows, dtype=torch.bool) if terminal is None else terminal,
        discount=torch.full((rows,), 0.99),
    )


class Table(nn.Module):
    """Critics that answer from a table, by the first number of the action: [B] each of K critics."""

    def __init__(self, *columns: list[float]):
        super().__init__()
        self.columns = torch.tensor(columns)
        self.count = len(columns)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.columns


class ByAction(nn.Module):
    """Q_1 of known actions: pairs of an action [B, A] and its values [B]; gradients see a constant."""

    def __init__(self, *pairs: tuple[Tensor, list[float]]):
        super().__init__()
        self.pairs = pairs

    def first(self, obs: Tensor, action: Tensor) -> Tensor:
        for known, values in self.pairs:
            if torch.equal(known, action.detach()):
                return torch.tensor(values) + 0 * action.sum(-1)
        raise AssertionError("an action that the test does not know")


class Fixed(nn.Module):
    """An actor, or a VAE, with the same answer always."""

    def __init__(self, answer: Tensor):
        super().__init__()
        self.answer = nn.Parameter(answer)

    def forward(self, *inputs: Tensor):
        return self.answer if len(inputs) == 1 else (self.answer.detach(), None, None)


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        ((11, 3), (135_427, 402_946, 200_705, 1_162_515)),
        ((17, 6), (137_734, 407_554, 202_241, 1_189_530)),
        ((29, 8), (141_320, 414_722, 205_313, 1_219_540)),
        ((45, 24), (149_528, 431_106, 209_409, 1_339_620)),
    ],
)
def test_sizes_of_the_networks(sizes, counts):
    agent = new_agent("a2pr", *sizes, Config())
    nets = agent.actor, agent.critics, agent.value_net, agent.vae
    assert tuple(sum(p.numel() for p in net.parameters()) for net in nets) == counts
    mean, _ = agent.vae.encode(torch.zeros(2, sizes[0]), torch.zeros(2, sizes[1]))
    assert mean.shape == (2, 2 * sizes[1])


@pytest.mark.parametrize("high", [1.0, 2.0])
def test_outputs_are_bounded(high):
    agent = new_agent("a2pr", 3, 2, Config(**A2PR), high=high)
    obs = 1e4 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    assert agent.act(obs, explore=False).abs().max() <= high
    assert agent.vae.decode(obs, torch.ones(64, 4)).abs().max() <= 1
    _, log_std = agent.vae.encode(1e6 * obs, torch.ones(64, 2))
    assert log_std.min() == -4
    assert log_std.max() == 15


def test_backups():
    batch = batch_of(torch.zeros(3, 1), torch.zeros(3, 1), torch.ones(3), torch.tensor([False, True, False]))
    target = a2pr.backup(Table([10.0, 10, 5], [8.0, 12, 7]), batch, batch.action)
    online = a2pr.backup(Table([9.0, 1, 3], [11.0, 1, 4]), batch, batch.action)
    torch.testing.assert_close(target, torch.tensor([8.92, 1, 5.95]))
    torch.testing.assert_close(online, torch.tensor([9.91, 1, 3.97]))
    torch.testing.assert_close(torch.minimum(online, target), torch.tensor([8.92, 1, 3.97]))


def test_loss_of_the_vae():
    vae = ConditionalVAE(1, 2, (4,))
    mean, log_std = torch.tensor([[0.5, -1.0]] * 2), torch.tensor([[0.0, math.log(2)]] * 2)
    reconstruction = torch.tensor([[0.2, 0.4], [0.0, 0.0]])
    vae.forward = lambda *_: (reconstruction, mean, log_std)  # type: ignore[method-assign]
    batch = batch_of(torch.zeros(2, 1), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    loss, metrics = a2pr.vae_loss(vae, batch, torch.tensor([True, False]), torch.zeros(2, 4), 1.5)
    assert float(metrics["loss/reconstruction"]) == pytest.approx(0.075, rel=1e-6)
    assert float(metrics["loss/kl"]) == pytest.approx(0.7159264, rel=1e-6)
    assert float(loss) == pytest.approx(0.4329632, rel=1e-6)


P = torch.tensor([[0.1, -0.2], [0.5, 0.5], [-0.4, 0.3], [0.0, 0.0]])
DATA = torch.tensor([[0.3, 0.0], [0.2, 0.9], [-1.0, 0.8], [-0.3, 0.3]])
OF_VAE = torch.tensor([[0.0, -0.1], [0.9, 0.1], [-0.5, 0.5], [0.5, 0.0]])
STATE_VALUE, DATA_VALUE = torch.tensor([0.9, 0.5, 0.5, 0.0]), torch.tensor([1.0, 0.5, 0.2, 1.0])


def loss_of_the_actor(mask: float = 0.4, **settings):
    config = Config(alpha=settings.pop("alpha", 2.5), **settings)
    actor, vae = Fixed(P.clone()), Fixed(OF_VAE.clone())
    critics = ByAction((P, [1.0, 2, -1.5, 1.5]), (OF_VAE, [0.8, 0.5, 0.1, 2.0]))
    noise = torch.zeros(4, 4)
    batch = batch_of(torch.zeros(4, 1), DATA)
    return a2pr.actor_loss(actor, critics, vae, batch, STATE_VALUE, DATA_VALUE, noise, mask, config)  # type: ignore[arg-type]


def test_loss_of_the_actor():
    loss, metrics = loss_of_the_actor()
    assert float(metrics["a2pr/lambda"]) == pytest.approx(5 / 3, rel=1e-6)
    assert float(metrics["loss/actor"]) == pytest.approx(-1.25, rel=1e-6)
    assert float(metrics["loss/bc"]) == pytest.approx(0.0325, rel=1e-6)
    assert float(loss) == pytest.approx(-1.2175, rel=1e-6)
    assert float(metrics["a2pr/frac_vae_target"]) == 0.5
    assert float(metrics["a2pr/frac_bc_on"]) == 0.75


def test_switches_of_the_actors_loss():
    """By hand from the same numbers: squared distances to the data and to the VAE's action, row by row."""
    to_data, to_vae = ((P - other).square().sum(-1) for other in (DATA, OF_VAE))
    for settings, rows in {
        ("data", "always"): to_data,
        ("vae", "always"): to_vae,
        ("data", "data_only"): to_data * torch.tensor([1, 0, 0, 1]),
        ("best", "always"): torch.where(torch.tensor([False, True, False, True]), to_vae, to_data),
    }.items():
        _, metrics = loss_of_the_actor(target_choice=settings[0], bc_gate=settings[1])
        assert float(metrics["loss/bc"]) == pytest.approx(0.4 * float(rows.sum()) / 8, rel=1e-5), settings
    _, metrics = loss_of_the_actor(bc_gate="data_only", adv_threshold=0.2)
    assert float(metrics["a2pr/frac_bc_on"]) == 0.25


class HalfOfIt(nn.Module):
    def forward(self, obs: Tensor, action: Tensor, noise: Tensor):
        return 0.5 * action, None, None


@pytest.mark.parametrize(("detached", "part"), [(False, 0.25), (True, 0.5)])
def test_gradient_flows_through_the_candidate(detached, part):
    actor = Fixed(P.clone())
    critics = ByAction((P, [1.0] * 4), (0.5 * P, [2.0] * 4))
    config = Config(alpha=0.0, detach_candidate=detached)
    batch, nothing = batch_of(torch.zeros(4, 1), DATA), torch.zeros(4)
    loss, _ = a2pr.actor_loss(
        actor,
        critics,
        HalfOfIt(),
        batch,
        nothing,
        nothing,
        torch.zeros(4, 4),
        0.7,
        config,  # type: ignore[arg-type]
    )
    (gradient,) = torch.autograd.grad(loss, [actor.answer])
    torch.testing.assert_close(gradient, 2 * 0.7 * part * P / 8)


def test_all_q_zero_divides_by_nothing():
    agent = new_agent("a2pr", 3, 2, Config(**A2PR))
    for parameter in agent.critics.parameters():
        parameter.detach().zero_()
    agent.read(make_transitions(40, 3, 2), 10)
    batch, zeros = agent.sample(), torch.zeros(8)
    loss, _ = a2pr.actor_loss(
        agent.actor, agent.critics, agent.vae, batch, zeros, zeros, torch.zeros(8, 4), 1.0, agent.config
    )
    assert torch.isfinite(loss)


def test_order_and_which_networks_step():
    agent = new_agent("a2pr", 3, 2, Config(**A2PR))
    agent.read(make_transitions(40, 3, 2), 10)
    stepped: list[str] = []
    for name in ("critic", "value", "vae", "actor"):
        optimizer = getattr(agent, f"{name}_optimizer")
        step = optimizer.step
        optimizer.step = lambda gradients, step=step, name=name: (stepped.append(name), step(gradients))
    agent.update()
    assert stepped == ["critic", "value", "vae"]
    agent.update()
    assert stepped[3:] == ["critic", "value", "vae", "actor"]


def test_gates_see_the_critics_after_and_the_value_before_their_steps():
    """A huge rate of V changes no gate of the same call; a huge rate of the critics does."""
    found = {}
    for which in ("none", "value", "critic"):
        agent = new_agent("a2pr", 3, 2, Config(**A2PR, policy_delay=1))
        agent.read(make_transitions(200, 3, 2), 10)
        if which != "none":
            getattr(agent, f"{which}_optimizer").learning_rate = 1e3
        metrics = agent.update()
        found[which] = [float(metrics[f"a2pr/{name}"]) for name in ("frac_adv_positive", "frac_vae_target", "lambda")]
    assert found["value"] == found["none"]
    assert found["critic"] != found["none"]


def test_advantage_of_the_vae_is_strict():
    agent = new_agent("a2pr", 3, 2, Config(**A2PR))
    agent.read(make_transitions(40, 3, 2), 10)
    for net in (agent.critics, agent.value_net):
        for parameter in net.parameters():
            parameter.detach().zero_()
    agent.critic_optimizer.learning_rate = 0.0
    assert float(agent.update()["a2pr/frac_adv_positive"]) == 0


def test_targets_move_with_the_actor_only():
    agent = new_agent("a2pr", 3, 2, Config(**A2PR))
    agent.read(make_transitions(40, 3, 2), 10)
    first = [p.clone() for p in agent.target_parameters]
    agent.update()
    assert all(torch.equal(a, b) for a, b in zip(first, agent.target_parameters, strict=True))
    agent.update()
    for start, now, online in zip(first, agent.target_parameters, agent.online_parameters, strict=True):
        torch.testing.assert_close(now, 0.995 * start + 0.005 * online, rtol=1e-6, atol=1e-8)


def same_noise(agent, seed: int = 5) -> None:
    """Noise of actions' size from a generator of its own, so that what else is drawn does not shift it."""
    generator, normal = torch.Generator().manual_seed(seed), agent.noise.normal

    def draw(*shape: int) -> Tensor:
        own = shape[-1] == agent.action_size
        return torch.randn(shape, generator=generator) if own else normal(*shape)

    agent.noise.normal = draw


def trained_from(one, other, steps: int) -> None:
    """Start `other` with the weights of `one`, and train both on the same batches with the same noise."""
    for name in ("actor", "critics", "target_actor", "target_critics"):
        if hasattr(other, name):
            getattr(other, name).load_state_dict(copy.deepcopy(getattr(one, name).state_dict()))
    for agent in (one, other):
        same_noise(agent)
        agent.read(make_transitions(60, 3, 2), steps)
    for _ in range(steps):
        one.update()
        other.update()


def test_reduces_to_td3_bc():
    reduced = Config(**A2PR, target_choice="data", bc_gate="always", mask=1.0)
    one, other = new_agent("a2pr", 3, 2, reduced), new_agent("td3_bc", 3, 2, td3_bc.Config(**TINY))
    trained_from(one, other, 50)
    for name in ("actor", "critics", "target_critics"):
        pairs = zip(getattr(one, name).parameters(), getattr(other, name).parameters(), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)


def test_reduces_to_bc_without_q():
    reduced = Config(**A2PR, target_choice="data", bc_gate="always", mask=1.0, alpha=0.0, policy_delay=1)
    one = new_agent("a2pr", 3, 2, reduced)
    other = new_agent("bc", 3, 2, bc.Config(batch_size=8, hidden=(16, 16)))
    trained_from(one, other, 20)
    for a, b in zip(one.actor.parameters(), other.actor.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_without_mask_the_actor_follows_q_alone():
    agent = new_agent("a2pr", 3, 2, Config(**A2PR))
    agent.read(make_transitions(60, 3, 2), 10)
    batch = agent.sample()
    zeros, noise = torch.zeros(8), torch.zeros(8, 4)
    loss, metrics = a2pr.actor_loss(
        agent.actor, agent.critics, agent.vae, batch, zeros, zeros, noise, 0.0, agent.config
    )
    ascent = -metrics["a2pr/lambda"] * agent.critics.first(batch.obs, agent.actor(batch.obs)).mean()
    parameters = list(agent.actor.parameters())
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(ascent, parameters), strict=True):
        torch.testing.assert_close(a, b)


def hand_made(obs: list[float], next_obs: list[float], reward: list[float]) -> Transitions:
    rows = torch.tensor([[o, 0.0, r, n, 0.0] for o, r, n in zip(obs, reward, next_obs, strict=True)])
    count = len(obs)
    no = torch.zeros(count, dtype=torch.bool)
    return Transitions(rows, 1, 1, no, torch.tensor([0, count]), torch.ones(1, dtype=torch.bool))


def test_normaliser():
    agent = new_agent("a2pr", 1, 1, Config(**A2PR))
    agent.read(hand_made([0.0, 2.0, 4.0], [100.0, 200.0, 300.0], [0.0, 1.0, 0.0]), 10)
    assert float(agent.mean) == 2
    assert float(agent.std) == pytest.approx(1.63399316, rel=1e-7)
    agent.read(hand_made([5.0, 5.0], [5.0, 6.0], [0.0, 1.0]), 10)
    assert float(agent.std) == pytest.approx(0.001)
    assert torch.isfinite(agent.sample().next_obs).all()
    plain = new_agent("a2pr", 1, 1, Config(**A2PR, normalise=False))
    plain.read(hand_made([0.0, 2.0, 4.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]), 10)
    assert (float(plain.mean), float(plain.std)) == (0, 1)


def test_rewards_are_mapped_in_batches_and_raw_in_storage():
    data = hand_made([0.0, 1.0], [1.0, 2.0], [0.0, 1.0])
    sampling, scale = streams_and_scale(1)
    found = FixedReplay(data, CPU, sampling, scale, 0.99, (10_000.0, -1.0)).sample(64).reward
    assert set(found.tolist()) == {-1.0, 9999.0}
    assert data.reward.tolist() == [0.0, 1.0]


def test_what_is_read_is_not_changed_and_actions_come_in_their_own_range():
    data = make_transitions(30, 3, 2, high=2.0)
    before = data.rows.clone()
    agent = new_agent("a2pr", 3, 2, Config(**A2PR), high=2.0)
    agent.read(data, 10)
    for _ in range(3):
        agent.update()
    assert torch.equal(data.rows, before)
    assert agent.sample().action.abs().max() <= 1


def test_evaluation_uses_frozen_statistics():
    agent = new_agent("a2pr", 3, 2, Config(**A2PR))
    data = make_transitions(30, 3, 2)
    agent.read(data, 10)
    obs = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    before = agent.act(obs, explore=False)
    data.rows.mul_(7)
    assert torch.equal(agent.act(obs, explore=False), before)
    assert box(1).size == 1
    assert dataclasses.is_dataclass(agent.config)
