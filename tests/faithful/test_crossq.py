"""CrossQ against hand values, torch's batch normalisation and the settings of the paper's code."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from agents import crossq
from agents.networks import initialise_, new_network
from agents.plastic import Plasticity
from plasticity.registry import make
from tests.agents import test_plastic
from tests.agents.fakes import BOX, CPU, SMALL, VECTOR, stream, streams
from tests.agents.test_agents import live
from tests.agents.test_interventions_in_agents import seen_by
from tests.faithful.test_baseline_losses import BATCH


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(num_envs: int = 1, plasticity: Plasticity | None = None, **settings) -> crossq.Agent:
    config = crossq.Config(**{**SMALL, "critic_hidden": (16, 16), **settings})
    return crossq.Agent(
        VECTOR, BOX, config, num_envs=num_envs, device=CPU, streams=streams(), plasticity=plasticity
    )  # fmt: skip


def statistics(network: torch.nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in network.buffers()]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_published_settings():
    config = crossq.Config()
    assert (config.hidden, config.critic_hidden) == ((256, 256), (2048, 2048))
    assert (config.learning_rate, config.first_moment_rate, config.batch_norm_momentum) == (1e-3, 0.5, 0.99)
    assert (config.policy_delay, config.batch_size, config.warmup_steps, config.update_every) == (3, 256, 5_000, 1)
    assert (config.renormalise_after, config.discount, config.target_entropy_per_action) == (100_000, 0.99, -1.0)
    agent = build(hidden=(256, 256), critic_hidden=(2048, 2048))
    assert agent.actor_optimizer.betas == agent.critic_optimizer.betas == (0.5, 0.999)
    assert agent.temperature_optimizer.betas == (0.9, 0.999)
    assert not any("target" in name for name in agent._parts())
    each = 2 * 5 + (5 + 1) * 2048 + 2 * 2048 + (2048 + 1) * 2048 + 2 * 2048 + 2048 + 1
    assert sum(p.numel() for p in agent.critics.parameters()) == 2 * each


def test_over_a_batch_it_is_torchs_batch_normalisation():
    norm = crossq.BatchRenorm(3, 4)
    with torch.no_grad():
        norm.weight.copy_(numbers(3, 1, 4, seed=1))
        norm.bias.copy_(numbers(3, 1, 4, seed=2))
    x = (numbers(3, 16, 4) * 5 + 2).requires_grad_()
    y, (mean, variance) = norm.over_batch(x, renormalise=False)
    for k in range(3):
        theirs = F.batch_norm(x[k], None, None, norm.weight[k, 0], norm.bias[k, 0], training=True, eps=1e-3)
        torch.testing.assert_close(y[k], theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mean[k, 0], x[k].mean(0))
        torch.testing.assert_close(variance[k, 0], x[k].var(0, correction=0))
    upstream = numbers(3, 16, 4, seed=3)
    ours = torch.autograd.grad(y, x, upstream, retain_graph=True)[0]
    flat = F.batch_norm(x[0], None, None, norm.weight[0, 0], norm.bias[0, 0], training=True, eps=1e-3)
    torch.testing.assert_close(ours[0], torch.autograd.grad(flat, x, upstream[0])[0][0], rtol=1e-4, atol=1e-5)


def test_renormalisation_by_hand():
    """Algorithm 1 of Ioffe 2017: a batch of mean 4, deviation 2; then r and d at their limits."""
    norm = crossq.BatchRenorm(1, 1)
    x = torch.tensor([[[2.0], [6.0]]], requires_grad=True)

    def output(mean: float, deviation: float) -> list[float]:
        norm.mean.fill_(mean)
        norm.variance.fill_(deviation**2 - crossq.EPSILON)
        return norm.over_batch(x, renormalise=True)[0].flatten().tolist()

    sigma = math.sqrt(4 + crossq.EPSILON)
    assert output(3.0, 1.6) == pytest.approx([(2 - 3) / 1.6, (6 - 3) / 1.6])  # within the limits: running statistics
    unit = 2 / sigma
    assert output(3.0, 0.5) == pytest.approx([-3 * unit + 2, 3 * unit + 2])  # r = 4 -> 3, d = 2
    assert output(-20.0, 2.0) == pytest.approx([-unit * sigma / 2 + 5, unit * sigma / 2 + 5])  # d = 12 -> 5
    assert output(100.0, 2.0) == pytest.approx([-unit * sigma / 2 - 5, unit * sigma / 2 - 5])
    assert output(4.0, 12.0) == pytest.approx([-unit / 3, unit / 3])  # r = 1/6 -> 1/3
    # r and d have no gradient: it is that of batch normalisation, times r = σ_B / σ
    norm.mean.fill_(3.0)
    norm.variance.fill_(1.6**2 - crossq.EPSILON)
    ours = torch.autograd.grad(norm.over_batch(x, True)[0][0, 1, 0], x)[0]
    plain = torch.autograd.grad(norm.over_batch(x, False)[0][0, 1, 0], x)[0]
    torch.testing.assert_close(ours, plain * sigma / 1.6)


def test_evaluation_is_by_running_statistics():
    norm = crossq.BatchRenorm(1, 1)
    norm.mean.fill_(3.0)
    norm.variance.fill_(4 - crossq.EPSILON)
    assert norm(torch.tensor([[[5.0], [3.0]]])).flatten().tolist() == pytest.approx([1.0, 0.0])
    critics = new_network(lambda: crossq.Critics(3, 2, (8, 8)), stream(0))
    obs, action = numbers(6, 3), numbers(6, 2, seed=1)
    torch.testing.assert_close(critics(obs, action)[:, :2], critics(obs[:2], action[:2]))
    joint, _ = critics.over_batch(obs, action, False)
    assert not torch.allclose(joint[:, :2], critics.over_batch(obs[:2], action[:2], False)[0])


def test_statistics_move_by_one_minus_the_momentum():
    body = crossq.Body(1, 2, (3,), 1)
    initialise_(body, torch.Generator().manual_seed(0))
    x = numbers(1, 8, 2) + 4
    _, moments = body.over_batch(x, False)
    assert len(moments) == 2  # inputs, and behind the only ReLU
    body.move_statistics_(moments, 0.9)
    torch.testing.assert_close(body.norms[0].mean, 0.1 * x.mean(1, keepdim=True))
    torch.testing.assert_close(body.norms[0].variance, 0.9 + 0.1 * x.var(1, correction=0, keepdim=True))
    hidden = body.layers[0](body.norms[0].over_batch(x, False)[0]).relu()
    torch.testing.assert_close(body.norms[1].mean, 0.1 * hidden.mean(1, keepdim=True))


def test_target_by_hand():
    """10 < 12, log π = -3, α = 0.5, γ = 0.5; the first transition ended."""
    next_value, log_probability = torch.tensor([[10.0, 10.0], [12.0, 12.0]]), torch.tensor([-3.0, -3.0])
    target = crossq.td_target(next_value, log_probability, torch.tensor(0.5).log(), BATCH)
    assert target.tolist() == pytest.approx([1.0, 1 + 0.5 * (10 + 0.5 * 3)])


def test_one_pass_over_both_halves_gives_value_and_target():
    agent = build()
    live(agent, 12)
    batch, noise = agent.replay.sample(16, 0.99), numbers(16, 2)
    networks = agent.actor, agent.critics, agent.log_temperature
    loss, moments, _ = crossq.critic_loss(*networks, batch, noise, False)
    action, log_probability = agent.actor.sample(batch.next_obs, noise)
    pairs = torch.cat([torch.cat([batch.obs, batch.action], -1), torch.cat([batch.next_obs, action], -1)]).detach()
    torch.testing.assert_close(moments[0][0][:, 0], pairs.mean(0).expand(2, -1))
    joint, _ = agent.critics.over_batch(pairs[:, :3], pairs[:, 3:], False)
    value, following = joint[:, :16], joint[:, 16:].detach()
    target = batch.reward + 0.99 * ~batch.terminated * (
        following.amin(0) - agent.log_temperature.detach().exp() * log_probability.detach()
    )
    expected = 0.5 * (value - target).square().mean(1).sum()
    torch.testing.assert_close(loss, expected)
    parameters = list(agent.critics.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_only_training_passes_move_statistics():
    """The critic's in its loss, the actor's in its own, every third step; neither when acting or evaluating."""
    agent = build()
    live(agent, 8)
    for update in range(1, 7):
        before = statistics(agent.actor), statistics(agent.critics)
        for explore in (False, True):
            agent.act(numbers(1, 3), explore)
        assert same(before[0] + before[1], statistics(agent.actor) + statistics(agent.critics))
        agent._update_once()
        assert same(before[0], statistics(agent.actor)) is (update % 3 != 0)
        assert not same(before[1], statistics(agent.critics))


def test_actor_and_temperature_wait_for_every_third_critic_step():
    agent = build()
    live(agent, 8)
    for update in range(1, 7):
        before = [p.clone() for p in (*agent.actor.parameters(), agent.log_temperature.detach())]
        agent._update_once()
        assert same(before, [*agent.actor.parameters(), agent.log_temperature]) is (update % 3 != 0)


def test_renormalisation_begins_after_so_many_steps_of_each_network(monkeypatch):
    agent = build(renormalise_after=2, policy_delay=3)
    live(agent, 8)
    seen: dict[str, list[bool]] = {"critic": [], "actor": []}
    for name, loss in (("critic", crossq.critic_loss), ("actor", crossq.actor_loss)):

        def spy(*arguments, name=name, loss=loss):
            seen[name].append(arguments[-1])
            return loss(*arguments)

        monkeypatch.setattr(agent, f"{name}_loss", spy)
    for _ in range(12):
        agent._update_once()
    assert seen == {"critic": [False] * 2 + [True] * 10, "actor": [False, False, True, True]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nap", r"is a BatchNorm, whose statistics tie samples .*; NaP needs one per sample"),
        ("crelu", "normaliser 'body.norms.0' does not stand before a nonlinearity"),
        ("injection", "injection needs linear heads"),
    ],
)
def test_what_does_not_go_with_batch_normalisation_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        build(plasticity=Plasticity(lambda: make(text)))


@pytest.mark.parametrize("text", ["redo(threshold=0.6,every=7,samples=32)", "hare-tortoise(momentum=0.9,every=8)"])
def test_interventions_act_on_each_seed_as_on_one_alone(text):
    """Also on running statistics, which the tortoise averages too."""
    together, one, two = (
        test_plastic.build("crossq", Plasticity(lambda: make(text)), seeds=seeds, learning_rate=0.01)
        for seeds in ((0, 1), 0, 1)
    )
    for agent in (together, one, two):
        seen_by(agent, 22, {one: (0,), two: (1,), together: (0, 1)}[agent])
    for index, alone in enumerate((one, two)):
        for key in ("actor", "critics"):
            ours, theirs = (agent.state_dict(at)["parts"][key] for agent, at in ((together, index), (alone, 0)))
            for name, value in theirs.items():
                torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)


def test_a_reset_begins_the_statistics_anew():
    agent = build(plasticity=Plasticity(lambda: make("reset")))
    live(agent, 20)
    assert agent.critics.body.norms[0].mean.abs().max() > 0
    agent.plasticity.at_boundary()
    for network in (agent.actor, agent.critics):
        for norm in network.body.norms:
            assert not norm.mean.any()
            assert (norm.variance == 1).all()
