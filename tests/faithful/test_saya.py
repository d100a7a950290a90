"""Symphony's successor of August 2026, number by number (specs/symphony.md, section 15); letters are its items."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from agents import symphony
from agents.agent import ActionScale
from agents.fading import FadingReplay
from agents.networks import initialise_
from agents.plastic import AgentOptimizer, Plasticity
from agents.replay import bell
from agents.symphony import GOLDEN, Agent, Config, Passes
from agents.symphony_networks import Actor, Critics, Encoder, FeedForward, ReSine
from plasticity import registry
from plasticity.adam import Adam
from runs.catalogue import preset_config
from tests.agents.fakes import BOX, CPU, SAYA, SMALL, VECTOR, make_step, stream, streams
from tests.faithful.test_symphony import live, random_batch

DOUBLE = torch.float64


def make_agent(**settings) -> Agent:
    config = Config(**{**SMALL, "nodes": 4, "updates_per_step": 1, **SAYA, **settings})
    return Agent(VECTOR, BOX, config, num_envs=1, device=CPU, streams=streams())


# a: weights of rows and nodes


def replay_of(rows: int) -> FadingReplay:
    return FadingReplay(rows // 2, 2, 1, VECTOR, BOX, CPU, stream(), weight=bell)


def test_weights_of_rows_are_a_bell():
    expected = [0.0018646941, 0.0170501510, 0.0558597212, 0.0992724403, 0.1264732988]
    expected += [0.1374086517, 0.1402313574, 0.1406071271, 0.1406183854, 0.1406141730]
    assert replay_of(10).probability.tolist() == pytest.approx(expected, abs=1e-9)
    probability = replay_of(512_000).probability
    for newest, share in ((0.1, 0.1314), (0.25, 0.3286), (0.5, 0.6557)):
        assert probability[-int(newest * 512_000) :].sum().item() == pytest.approx(share, abs=5e-5)
    assert probability[:51_200].sum().item() == pytest.approx(0.00708, abs=5e-6)
    assert probability[0].item() == pytest.approx(3.4e-8, rel=0.02)
    assert probability.argmax().item() / 512_000 == pytest.approx(0.809, abs=1e-3)


def test_weights_of_nodes_are_the_same_bell_turned_around():
    weights = symphony.node_weights(6, "bell")
    golden = (math.sqrt(5) + 1) / 2
    by_hand = [math.exp(-((abs(1 - golden / 2 - j / 6) * golden) ** (2 * math.e))) for j in range(6)]
    assert weights.tolist() == pytest.approx([w / sum(by_hand) for w in by_hand], rel=1e-5)
    assert weights.argmax() == 1  # nearest to 0.191
    agent = make_agent()
    assert torch.equal(agent.weights, symphony.node_weights(12, "bell"))
    assert agent.replay.probability.argmax() / agent.replay.slots == pytest.approx(0.809, abs=0.01)


# b: the average


def test_one_average_for_the_batch_updated_before_it_is_used():
    advantage, reference = symphony.batch_advantage(torch.tensor([2.0, 0.5]), torch.tensor(1.0), GOLDEN)
    average = GOLDEN * 1.0 + (1 - GOLDEN) * 1.25
    assert reference.tolist() == pytest.approx([average])
    assert advantage.tolist() == pytest.approx([(2 - average) / average, (0.5 - average) / average])
    value = torch.tensor([[3.0, 1.0], [-4.0, -2.0]], requires_grad=True)
    advantage, reference = symphony.batch_advantage(value, torch.zeros(2), GOLDEN)
    assert reference.shape == (2, 1)
    assert not reference.requires_grad
    assert reference.flatten().tolist() == pytest.approx([(1 - GOLDEN) * 2, (1 - GOLDEN) * -3])
    assert advantage[1].tolist() == pytest.approx([(-4 / 3 / (1 - GOLDEN)) + 1, (-2 / 3 / (1 - GOLDEN)) + 1])


def losses(config: Config, encoder: Encoder | None = None, average: float = 0.3):
    """Loss, new average, metrics, and the networks behind them."""
    state, pair = (3, 3) if encoder is None else (encoder.state_size, encoder.pair_size)
    block = config.bottleneck, config.trained_slope
    actor = Actor(state, 2, (16, 16), *block)
    critics, target = (Critics(pair, 2, (16, 16), 4, *block) for _ in range(2))
    for index, network in enumerate((actor, critics, target)):
        initialise_(network, torch.Generator().manual_seed(index))
    noise = symphony.bounded_noise(torch.randn(12, 2, generator=torch.Generator().manual_seed(9)), 1 / math.e)
    weights = symphony.node_weights(12, config.weighting)
    scale = ActionScale(BOX, CPU)
    found = symphony.loss(
        actor, critics, target, random_batch(), torch.tensor(average), noise, Passes(), scale, weights, config, encoder
    )
    return *found, (actor, critics, target, noise, weights, scale)


def test_the_loss_uses_and_returns_that_average():
    config = Config(batch_average=True)
    _, average, metrics, (actor, _, target, noise, weights, scale) = losses(config)
    batch = random_batch()
    direction, sigma, _ = actor(batch.next_obs)
    action = scale.to_environment((sigma * direction + noise).tanh())
    value = symphony.aggregate(target(batch.next_obs, action), weights)
    expected = GOLDEN * 0.3 + (1 - GOLDEN) * value.mean()
    torch.testing.assert_close(average, expected)
    own = symphony.rehae((value - expected) / expected.abs()).mean()
    torch.testing.assert_close(metrics["loss/actor"], -own.detach())


# c: the soft target


def test_target_lacks_what_swaddling_adds():
    """H at (0.5, 0.5) is 0.5108256 - 0.1732868; Ω(β²) is no part of it."""
    half = torch.tensor([0.5], dtype=DOUBLE)
    assert symphony.swaddled_scale(half, half).item() == pytest.approx(0.5108256 - 0.1732868, abs=1e-6)
    plain, soft = (losses(Config(soft_target=soft))[2:] for soft in (False, True))
    assert plain[0]["loss/critic"] != soft[0]["loss/critic"]
    actor, critics, target, noise, weights, scale = soft[1]
    batch = random_batch()
    with torch.no_grad():
        direction, sigma, beta = actor(batch.next_obs)
        action = scale.to_environment((sigma * direction + noise).tanh())
        value = symphony.aggregate(target(batch.next_obs, action), weights)
        y = batch.reward + 0.99 * ~batch.terminated * (value - symphony.swaddled_scale(sigma, beta).mean(-1))
        expected = symphony.rehse(critics(batch.obs, batch.action) - y[:, None]).mean()
    torch.testing.assert_close(soft[0]["loss/critic"], expected)


# d: ReSine


def test_slope_of_resine_is_trained():
    layer = ReSine(1, 1, trained_slope=True).double()
    assert layer.slope is not None
    points = torch.tensor([-2.0, -0.5, 0.5, 2.0], dtype=DOUBLE)
    # 1 / sigmoid(b) = 1.5 at b = ln 2: the values of section 3.2.
    for s, expected in (
        (0.0, [0.2863732894, -0.0928118486, 0.3279236438, -0.0920279582]),
        (1.0, [-0.1027845684, -0.1290291946, 0.3328913055, 0.1858263519]),
    ):
        layer.scale.data.fill_(s)
        layer.slope.data.fill_(math.log(2))
        assert layer(points.view(1, 4, 1)).flatten().tolist() == pytest.approx(expected, abs=1e-9)
    layer.scale.data.fill_(0.0)
    layer.slope.data.fill_(0.0)
    by_hand = [0.5 * math.sin(2 * x) / (1 + math.exp(-2 * math.sin(2 * x))) for x in points.tolist()]
    assert layer(points.view(1, 4, 1)).flatten().tolist() == pytest.approx(by_hand)
    (gradient,) = torch.autograd.grad(layer(points.view(1, 4, 1)).sum(), layer.slope)
    assert gradient.item() != 0
    wide = ReSine(2, 400, trained_slope=True)
    initialise_(wide, torch.Generator().manual_seed(0))
    assert wide.slope is not None
    assert wide.slope.abs().max().item() == pytest.approx(1 / 20, rel=0.01)


# e: the encoder


def made_encoder() -> Encoder:
    encoder = Encoder(3, 2, 16, 4)
    initialise_(encoder, torch.Generator().manual_seed(4))
    return encoder


def test_what_actor_and_critics_read():
    encoder, batch = made_encoder(), random_batch()
    state = encoder.state(batch.obs)
    assert state.shape == (12, 3 + 4)
    torch.testing.assert_close(state.square().mean(-1), torch.ones(12), rtol=1e-3, atol=1e-3)
    raw = torch.cat([batch.obs, encoder.of_state(batch.obs[None])[0]], -1)
    torch.testing.assert_close(state, raw / raw.square().mean(-1, keepdim=True).sqrt())
    rest, action, predicted = encoder.pair(state, batch.action)
    assert (rest.shape, action.shape, predicted.shape) == ((12, 7 + 4), (12, 2), (12,))
    latent = encoder.of_pair(torch.cat([batch.action, state], -1)[None])[0]
    raw = torch.cat([batch.action, state, latent], -1)
    whole = raw / raw.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(torch.cat([action, rest], -1), whole)
    weight, bias = encoder.reward.weight[0], encoder.reward.bias
    assert bias is not None
    torch.testing.assert_close(predicted, (latent @ weight + bias[0]).squeeze(-1))


def reached(encoder: Encoder, loss: Tensor) -> set[str]:
    """Which of the encoder's parts get a gradient."""
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    parts = {name.split(".")[0] for name, g in zip(names, found, strict=True) if g is not None and bool(g.any())}
    return parts


def test_gradients_of_the_encoder():
    """Critics do not reach ρ; the reward trains it; values of s' do not train what they are read from."""
    encoder, batch = made_encoder(), random_batch()
    config = Config(encoder_features=4, batch_average=True)
    total, _, metrics, (actor, critics, target, noise, weights, scale) = losses(config, encoder)
    assert reached(encoder, total) == {"of_state", "of_pair", "reward"}
    torch.testing.assert_close(
        metrics["loss/reward"], symphony.rehse(encoder(batch.obs, batch.action) - batch.reward).mean().detach()
    )
    *pair, predicted = encoder.pair(encoder.state(batch.obs), batch.action)
    assert reached(encoder, critics(*pair).sum()) == {"of_state"}
    assert reached(encoder, predicted.sum()) == {"of_state", "of_pair", "reward"}
    action = torch.zeros(12, 2, requires_grad=True)
    fixed = encoder.state(batch.next_obs).detach()
    value = symphony.aggregate(target(*encoder.pair(fixed, action)[:2]), weights).sum()
    assert reached(encoder, value) == set()
    (gradient,) = torch.autograd.grad(value, action)
    assert gradient.abs().min() > 0
    trained = list(actor.parameters())
    assert all(g is not None for g in torch.autograd.grad(total, trained, allow_unused=True))


# f: the bottleneck


def test_block_with_a_bottleneck():
    block = FeedForward(3, 5, (16, 16), 4, bottleneck=6)
    count = 5 * 16 + 16 + 2 * 16 + 16 * 16 + 16 + 16 + 16 * 6 + 6 + 6 * 4 + 4
    assert sum(p.numel() for p in block.parameters()) == 3 * count
    initialise_(block, torch.Generator().manual_seed(0))
    x = torch.randn(3, 12, 5, generator=torch.Generator().manual_seed(1))
    passes = torch.rand(3, 12, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    assert torch.equal(block(x), block(x, passes))
    first = block.net[0].get_parameter("weight")
    (through,) = torch.autograd.grad(block(x, passes).sum(), first)
    (nothing,) = torch.autograd.grad(block(x, torch.zeros_like(passes)).sum(), first, allow_unused=True)
    (everything,) = torch.autograd.grad(block(x).sum(), first)
    assert not nothing.any()
    assert not torch.equal(through, everything)


def test_gradient_dropout_is_of_the_online_bottlenecks_alone():
    passes = make_agent()._passes()
    assert passes.actor is not None
    assert passes.critics is not None
    assert (passes.actor.shape, passes.critics.shape) == ((16, 6), (3, 16, 6))
    assert passes.target_critics is None


# g: the optimiser


def test_optimiser_with_an_annealed_epsilon():
    theta = torch.ones(1, dtype=DOUBLE)
    optimizer = Adam([theta], 0.1, (GOLDEN, 0.999), weight_decay=0.01, bias_correction=False)
    gradients, expected = (1.0, -2.0, 0.5), (0.9619383298, 1.0103692776, 1.0220064285)
    epsilon = 1 - 1e-8
    for step, (gradient, value) in enumerate(zip(gradients, expected, strict=True), start=1):
        epsilon = 0.999 * epsilon + 0.001 * 1e-8
        assert symphony.annealed_epsilon(step, 0.999) == pytest.approx(epsilon, rel=1e-12)
        optimizer.epsilon = symphony.annealed_epsilon(step, 0.999)
        optimizer.step([torch.full_like(theta, gradient)])
        assert theta.item() == pytest.approx(value, abs=1e-9)
    assert symphony.annealed_epsilon(10**6, 0.999) == pytest.approx(1e-8)


def test_every_optimiser_of_the_agent_anneals():
    agent = make_agent(second_moment_rate=0.9)
    live(agent, 11)
    assert agent.updates == 3
    assert [own.epsilon for own in agent.optimizers] == 3 * [symphony.annealed_epsilon(3, 0.9)]
    plain = make_agent(annealed_epsilon=False)
    live(plain, 11)
    assert [own.epsilon for own in plain.optimizers] == 3 * [1e-8]


def test_optimisers_of_networks_with_interventions_anneal_too():
    plasticity = Plasticity(lambda: registry.make("redo"))
    config = Config(**{**SMALL, "nodes": 4, "updates_per_step": 1, **SAYA, "second_moment_rate": 0.9})
    agent = Agent(VECTOR, BOX, config, num_envs=1, device=CPU, streams=streams(), plasticity=plasticity)
    live(agent, 11)
    assert isinstance(agent.actor_optimizer, AgentOptimizer)
    assert agent.actor_optimizer.inner.epsilon == symphony.annealed_epsilon(3, 0.9)  # type: ignore[union-attr]


# h, j: noise, lives, settings


def test_the_update_repeats_the_noise_of_the_action(monkeypatch):
    agent = make_agent(fall_window=0)
    live(agent, 8)
    seen = []
    monkeypatch.setattr(agent, "loss", lambda *a: seen.append(a[5]) or symphony.loss(*a))
    obs = torch.randn(1, 3, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert agent.encoder is not None
        direction, scale, _ = agent.actor(agent.encoder.state(obs))
    action = agent.act(obs, explore=True)
    agent.observe(make_step(obs, 1.0))
    agent.update()
    (noise,) = seen
    assert noise.shape == (16, 2)
    torch.testing.assert_close(action, agent.scale.to_environment((scale * direction + noise[:1]).tanh()))
    assert noise.abs().max() <= 1
    with pytest.raises(ValueError, match="shared_noise needs a batch_size of at least the 20 environments"):
        Agent(
            VECTOR,
            BOX,
            dataclasses.replace(agent.config, warmup_steps=20),
            num_envs=20,
            device=CPU,
            streams=streams(),
        )


def test_numbers_of_paper_and_code():
    paper, code = preset_config("symphony", "saya"), preset_config("symphony", "saya-code")
    for config in (paper, code):
        assert (config.target_rate, config.second_moment_rate, config.learning_rate) == (0.001, 0.999, 1e-4)
        assert (config.updates_per_step, config.fall_window, config.terminal_lives) == (1, 100, 1)
        assert (config.weight_decay, config.advantage_rate, config.encoder_features) == (0.01, GOLDEN, 24)
        assert config.replay_capacity == 50 * config.warmup_steps
        assert config.batch_size == config.bottleneck == 3 * config.nodes
        switches = {name for name, value in vars(config).items() if name in SAYA and value != vars(Config())[name]}
        assert switches == set(SAYA)
    assert (paper.hidden, paper.bottleneck, paper.nodes, paper.warmup_steps) == ((768, 768), 384, 128, 20_000)
    assert (code.hidden, code.bottleneck, 3 * code.nodes, code.warmup_steps) == ((384, 384), 192, 192, 10_000)


def test_a_terminal_transition_lives_one_cycle_more():
    replay = FadingReplay(3, 1, 1, VECTOR, BOX, CPU, stream(), terminal_lives=1, weight=bell)
    for step in range(3):
        replay.add(torch.full((1, 3), float(step)), torch.zeros(1, 2), make_step(torch.zeros(1, 3), 1.0, step == 0))
    replay.normalise_and_fill()
    kept = []
    for step in range(10, 16):
        replay.add(torch.full((1, 3), float(step)), torch.zeros(1, 2), make_step(torch.zeros(1, 3), 1.0))
        kept.append(bool((replay.obs[:, 0] == 0).any()))
    assert kept == [True, True, False, False, False, False]


def test_saved_in_the_middle_it_goes_on_bit_for_bit():
    whole, first = make_agent(), make_agent()
    live(whole, 20)
    live(first, 20)
    second = make_agent()
    second.load_state_dict(first.state_dict())
    live(whole, 10)
    live(second, 10)
    assert second.updates == 22
    for network in ("actor", "critics", "target_critics", "encoder"):
        for a, b in zip(getattr(whole, network).parameters(), getattr(second, network).parameters(), strict=True):
            assert torch.equal(a, b)


def test_the_loss_compiles_to_one_graph_with_the_same_numbers(monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    agents = make_agent(), make_agent()
    agents[1].loss = torch.compile(symphony.loss)
    for agent in agents:
        live(agent, 12)
        assert agent.updates == 4
    for a, b in zip(agents[0].critics.parameters(), agents[1].critics.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
