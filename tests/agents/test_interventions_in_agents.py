"""Every intervention by name inside agents: it acts on the right axes of every network, or is refused in a sentence."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from agents.plastic import AgentOptimizer, Plasticity
from envs import Step
from plasticity.intervention import Batch
from plasticity.networks import projection
from plasticity.networks.stacked import stack
from plasticity.registry import make, names
from plasticity.schedules import Linear
from tests.agents.fakes import FRAMES, fake_gradients, make_step
from tests.agents.test_plastic import build, live, networks, optimizers
from tests.plasticity.test_interventions import SETTINGS
from tests.plasticity.toy import learner_of

# Settings with which each acts within some twenty updates.
TEXTS = {name: on for name, (on, _) in SETTINGS.items()} | {
    "redo": "redo(threshold=0.6,every=7,samples=32)",
    "nap": "nap",
    "seednorm": "seednorm",
}
OPTIMISERS = ("adamw", "adamp", "sgdp", "muon", "normuon", "upgd", "trac", "lipschitz")
REFUSED = {
    "td3": {"adaptive-batch", "churn", "safe-step", "crelu", "fourier", "injection"},
    "dqn": {"adaptive-batch", "churn", "safe-step"},
}
ACCEPTED = [(agent, name) for agent in REFUSED for name in TEXTS if name not in REFUSED[agent]]
STATEFUL = [  # what keeps account of something
    "redo(threshold=0.6,every=7,samples=32)+noise(std=0.01)+weight-clip(factor=0.9)",
    "cbp(rate=0.02,maturity=3)+spectral(strength=0.1)+l2-init",
    "snr(longest=2,every=2)+hare-tortoise(momentum=0.9,every=8)+w2-init",
    "nap+redo(threshold=0.6,every=7,samples=32)+shrink-perturb-step",
    "reset-last(every=6)+weight-decay(strength=1)+adam-rel(every=5)",
    "muon+redo(threshold=0.6,every=7,samples=32)",
    "trac+reset-last(every=6)",
    "lipschitz",
    "adamw+nap",
]


def agent_with(name, text, **settings):
    return build(name, Plasticity(lambda: make(text)), **{"learning_rate": 0.01, **settings})


def values(agent):
    return {f"{key}.{n}": p.detach() for key, net in networks(agent).items() for n, p in net.named_parameters()}


PLAIN = {}


def test_every_name_is_tested():
    assert TEXTS.keys() == set(names()) - {"none"}


@pytest.mark.parametrize(("name", "intervention"), ACCEPTED)
def test_an_accepted_intervention_acts_on_every_network(name, intervention):
    if name not in PLAIN:
        plain = build(name, learning_rate=0.01)
        live(plain, 30)
        PLAIN[name] = values(plain)
    agent = agent_with(name, TEXTS[intervention])
    live(agent, 20)
    agent.plasticity.at_boundary()
    live(agent, 10, start=20)
    found = values(agent)
    assert all(value.isfinite().all() for value in found.values())
    for network in ("net",) if name == "dqn" else ("actor", "critics"):
        own = {n: v for n, v in found.items() if n.startswith(f"{network}.")}
        before = PLAIN[name]
        assert any(
            n not in before or v.shape != before[n].shape or not torch.equal(v, before[n]) for n, v in own.items()
        )


@pytest.mark.parametrize("text", ["nap", "redo(threshold=0.6,every=7,samples=32)", "crelu", "injection(at=10)"])
def test_noisy_streams_take_interventions(text):
    """Also those that give their layers other sizes, and with them other noise."""
    agent = agent_with("rainbow", text)
    before = {name: value.clone() for name, value in values(agent).items()}
    live(agent, 20)
    found = values(agent)
    moved = [n for n, v in found.items() if n not in before or not torch.equal(v, before[n])]
    assert all(value.isfinite().all() for value in found.values())
    assert {n for n in found if "deviation.weight" in n and n.startswith("net.")} <= {*moved}


@pytest.mark.parametrize(("name", "intervention"), [(a, n) for a in REFUSED for n in sorted(REFUSED[a])])
def test_what_agents_do_not_offer_is_refused_in_one_sentence(name, intervention):
    with pytest.raises(ValueError, match="sets the size|runs the network|only ordinary|linear heads") as caught:
        agent_with(name, TEXTS[intervention])
    assert "\n" not in str(caught.value)


def test_what_is_shared_by_twins_cannot_be_seen_as_one_of_each():
    with pytest.raises(
        ValueError, match="L2Init acts on each of the networks that .* but they share 'acts.0.norm.weight'"
    ):
        agent_with("td3", "layernorm+l2-init")


# The axes: twin critics [K, in, out] against two ordinary networks [out, in].


def twins_and_copies(text, seeds=0):
    """The learner of td3's critics with one intervention, and a population of ordinary networks of the same values."""
    agent = agent_with("td3", text, seeds=seeds, hidden=(5, 4))
    optimizer = agent.critic_optimizer
    learner = optimizer.learner
    singles = []
    for k in range(learner.members):
        single = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1))
        for index, layer in enumerate(("layers.0", "layers.1", "head")):
            for part in ("weight", "bias"):
                value = dict(agent.critics.named_parameters())[f"{layer}.{part}"].detach()
                value = value.flatten(0, value.dim() - 3)[k]
                single[2 * index].get_parameter(part).data.copy_(value.T if part == "weight" else value[0])
        singles.append(single)
    copies = learner_of(stack(singles), members=len(singles))
    return optimizer, optimizer.interventions[0], copies, make(text)[0]


NAMES = {"layers.0": "0", "layers.1": "2", "head": "4"}


def assert_same(ours, theirs):
    """Tensors of critics, as the learner shows them, by the names of the copies."""
    for name, value in theirs.items():
        layer, _, part = name.rpartition(".")
        mine = next(n for n, other in NAMES.items() if other == layer)
        torch.testing.assert_close(ours[f"{mine}.{part}"], value)


def shown(learner, tensors):
    return {name: learner.by_member(name, tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("seeds", [0, (0, 1, 2)])
@pytest.mark.parametrize("text", ["l2(strength=0.3)", "l2-init(strength=0.3)", "w2-init(strength=0.3)",
                                  "spectral(strength=0.3)", "parseval(strength=0.3)"])  # fmt: skip
def test_a_penalty_of_twin_critics_is_that_of_two_ordinary_networks(text, seeds):
    optimizer, _, copies, reference = twins_and_copies(text, seeds)
    learner, ours = optimizer.learner, optimizer.interventions[0]
    reference.begin(copies)
    with torch.no_grad():
        for other in (learner, copies):  # away from where they started
            for index, name in enumerate(NAMES if other is learner else NAMES.values()):
                other.parameter(f"{name}.weight").mul_(1.3 + index).add_(0.1)
    if text.startswith("spectral"):
        for name, other in NAMES.items():
            reference.left[f"{other}.weight"].copy_(ours.left[f"{name}.weight"])
            reference.right[f"{other}.weight"].copy_(ours.right[f"{name}.weight"])
    found = optimizer.penalty(optimizer.learner.network.layers[0].weight.shape[:-3])
    expected = reference.penalty(copies, dict(copies.network.named_parameters()))
    torch.testing.assert_close(found, expected.unflatten(0, (-1, 2)).sum(1) if seeds else expected.sum())
    parameters, theirs = dict(learner.network.named_parameters()), dict(copies.network.named_parameters())
    gradients = torch.autograd.grad(found.sum(), list(parameters.values()), materialize_grads=True)
    others = torch.autograd.grad(expected.sum(), list(theirs.values()), materialize_grads=True)
    assert any(gradient.any() for gradient in gradients)
    assert_same(shown(learner, dict(zip(parameters, gradients, strict=True))), dict(zip(theirs, others, strict=True)))


@pytest.mark.parametrize("seeds", [0, (0, 1, 2)])
@pytest.mark.parametrize("text", ["weight-clip(factor=0.5)", "weight-decay(strength=5)", "hare-tortoise(every=1)"])
def test_a_change_of_twin_critics_is_that_of_two_ordinary_networks(text, seeds):
    optimizer, ours, copies, reference = twins_and_copies(text, seeds)
    learner = optimizer.learner
    copies.optimizer.param_groups[0]["lr"] = optimizer.learning_rate
    reference.begin(copies)
    with torch.no_grad():
        for name, other in NAMES.items():
            noise = torch.randn(learner.parameter(f"{name}.weight").shape, generator=torch.Generator().manual_seed(3))
            learner.parameter(f"{name}.weight").add_(noise)
            copies.parameter(f"{other}.weight").add_(noise)
    before = {name: p.detach().clone() for name, p in learner.network.named_parameters()}
    for other, intervention in ((learner, ours), (copies, reference)):
        other.steps += 1
        intervention.after_step(other, Batch(torch.empty(0), torch.empty(0), {}))
    after = dict(learner.network.named_parameters())
    assert any(not torch.equal(before[name], p) for name, p in after.items())
    assert_same(shown(learner, after), dict(copies.network.named_parameters()))


@pytest.mark.parametrize("seeds", [0, (0, 1, 2)])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimiser_moves_twin_critics_as_two_ordinary_networks(name, seeds):
    optimizer, _, copies, reference = twins_and_copies(name, seeds)
    learner, named = optimizer.learner, dict(copies.network.named_parameters())
    copies.optimizer = reference.optimizer(copies.network, named, optimizer.learning_rate, stacked=True)
    copies.generators = copy.deepcopy(learner.generators)  # the critics of one seed share one
    reference.begin(copies)
    source = torch.Generator().manual_seed(7)
    for _ in range(3):
        for p in named.values():
            p.grad = torch.randn(p.shape, generator=source)
        gradients = []
        for key, p in learner.network.named_parameters():
            layer, _, part = key.rpartition(".")
            gradient = named[f"{NAMES[layer]}.{part}"].grad
            gradients.append((gradient.mT if part == "weight" else gradient).reshape(p.shape))
        optimizer.step(gradients)
        copies.optimizer.step()
    assert_same(shown(learner, dict(learner.network.named_parameters())), named)


def test_a_schedule_scales_all_rates_of_an_optimiser():
    agent = build("td3", Plasticity(lambda: make("muon"), Linear(100, end=0.5)), learning_rate=0.01)
    live(agent, 20)
    critics = agent.critic_optimizer
    first = [0.02, 0.01]
    factor = critics.learning_rate / 0.01
    assert 0.5 <= factor < 1
    assert [group["lr"] for group in critics.inner.optimizer.param_groups] == pytest.approx([r * factor for r in first])


# Units: of the agent's own batch, in its own layers.


def kill(optimizer, member, layer, unit):
    """The unit is never positive again: nothing comes in, and the offset is negative. What reads it stays."""
    learner = optimizer.learner
    hidden = learner.structure.hidden[layer]
    learner.parameter(hidden.weights[0])[member, unit] = 0.0
    learner.parameter(hidden.biases[0])[member, unit] = -1.0
    return hidden


def outgoing(learner, hidden, unit):
    reader = hidden.readers[0]
    return learner.parameter(reader.weight)[:, :, unit * reader.inputs_per_unit : (unit + 1) * reader.inputs_per_unit]


def assert_redrawn(optimizer, member, hidden, unit):
    """New incoming weights of the layer's own law, offset 0, nothing goes out, no moments, and all else alive."""
    learner, (weight,), (bias,) = optimizer.learner, hidden.weights, hidden.biases
    incoming = learner.parameter(weight)[member, unit]
    assert incoming.any()
    assert incoming.abs().max() <= incoming.numel() ** -0.5
    assert learner.parameter(bias)[member, unit] == 0
    assert not outgoing(learner, hidden, unit)[member].any()
    for n, place in ((weight, (member, unit)), (bias, (member, unit))):
        index = [name for name, _ in learner.network.named_parameters()].index(n)
        assert not learner.by_member(n, optimizer.inner.exp_avg[index])[place].any()
        assert learner.by_member(n, optimizer.inner.exp_avg[index]).any()
    for target in learner.copies:
        assert torch.equal(target[weight][member, unit], incoming)


REDO, SNR = "redo(every=5,threshold=0.001,samples=16)", "snr(longest=4,every=1,rejection=1e-6)"


@pytest.mark.parametrize("seeds", [0, (0, 1)])
@pytest.mark.parametrize("text", [REDO, SNR])
@pytest.mark.parametrize("name", ["dqn", "td3", "sac", "ddpg"])
def test_a_dormant_unit_is_recycled_in_every_network_of_an_agent(name, text, seeds):
    agent = agent_with(name, text, seeds=seeds, learning_rate=1e-4)
    for optimizer in optimizers(agent):  # all units are alive
        for layer in optimizer.learner.structure.hidden:
            optimizer.learner.parameter(layer.biases[0]).fill_(2.0)
            optimizer.learner.parameter(layer.weights[0]).abs_()
    step = 12
    live(agent, step)
    dead = {}
    for optimizer in optimizers(agent):
        learner = optimizer.learner
        member = (learner.members or 1) - 1  # the second critic of the last seed
        hidden = kill(optimizer, member, layer=1, unit=3)
        dead[optimizer] = (member, hidden, learner.parameter(hidden.weights[0]).clone(), learner.steps)
    while dead:
        live(agent, 1, start=step)
        step += 1
        assert step < 40
        for optimizer, (member, hidden, before, last) in list(dead.items()):
            steps = optimizer.learner.steps
            if steps > last and (steps % 5 == 0 if text == REDO else steps == last + 5):
                assert_redrawn(optimizer, member, hidden, 3)
                now = optimizer.learner.parameter(hidden.weights[0])
                others = torch.ones(now.shape[:2], dtype=torch.bool)
                others[member, 3] = False
                assert (now - before)[others].abs().max() < 0.01  # and in the other networks the same unit
                del dead[optimizer]


def test_a_dormant_channel_in_front_of_a_flattened_image_is_recycled():
    text = "redo(every=4,threshold=0.001,samples=16)"
    agent = agent_with("dqn", text, observation_spec=FRAMES, replay_capacity=60, learning_rate=1e-4)
    world = torch.Generator().manual_seed(0)

    def lives(rounds):
        for _ in range(rounds):
            obs = torch.randint(0, 255, (1, 4, 36, 36), dtype=torch.uint8, generator=world)
            agent.act(obs, explore=True)
            agent.observe(make_step(obs, 1.0))
            agent.update()

    lives(10)
    learner = agent.optimizer.learner
    learner.parameter(learner.structure.hidden[3].biases[0]).fill_(1.0)  # those behind the image are not silent
    hidden = kill(agent.optimizer, 0, layer=2, unit=7)
    assert learner.parameter(hidden.weights[0]).dim() == 5
    lives(4 - agent.updates % 4)
    assert_redrawn(agent.optimizer, 0, hidden, 7)


@pytest.mark.parametrize("settings", [{}, {"representation": "beer"}, {"representation": "peer"}], ids=str)
def test_activations_are_those_of_the_agents_own_batch(settings):
    agent = agent_with("td3", "redo(every=1000)", **settings)
    seen = {}
    critics, redo = agent.critic_optimizer, agent.critic_optimizer.interventions[0]
    redo.after_step = lambda learner, batch: seen.update(batch.activations)
    live(agent, 8)
    before = copy.deepcopy(agent.critics)
    sample = agent.replay.sample
    agent.replay.sample = lambda *a: seen.setdefault("batch", sample(*a))
    live(agent, 1, start=8)
    x = torch.cat([seen["batch"].obs, seen["batch"].action], -1).expand(2, -1, -1)
    first = before.layers[0](x).relu()
    torch.testing.assert_close(seen["acts.0"], first)
    torch.testing.assert_close(seen["acts.1"], before.layers[1](first).relu())
    assert critics.learner.members == 2


@pytest.mark.parametrize(("name", "losses"), [("dqn", ["dqn_loss"]), ("td3", ["critic_loss", "actor_loss"])])
def test_compiled_losses_show_their_activations(name, losses):
    """By the compiler's front end alone, whole graphs."""
    torch._dynamo.reset()  # it takes graphs of networks without hooks, such as other tests compile, for these
    found = []
    for compiled in (False, True):
        agent = agent_with(name, "redo(every=5,threshold=0.6,samples=16)")
        for loss in losses if compiled else ():
            setattr(agent, loss, torch.compile(getattr(agent, loss), backend="aot_eager", fullgraph=True))
        live(agent, 22)
        found.append(values(agent))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-5)


# Seeds, resuming, devices, tasks.


def seen_by(agent, steps, seeds, start=0):
    """As `live`, where each seed sees what it would see alone."""
    for t in range(start, start + steps):
        world = [torch.Generator().manual_seed(1000 * seed + t) for seed in seeds]
        obs, following = (torch.stack([torch.randn(1, 3, generator=w) for w in world]) for _ in range(2))
        rows = [make_step(f, 0.5, truncated=t % 7 == 6) for f in following]
        fields = {n: torch.stack([getattr(row, n) for row in rows]) for n in Step.__slots__}
        if not agent.lead:
            obs, fields = obs[0], {n: value[0] for n, value in fields.items()}
        agent.act(obs, explore=True)
        agent.observe(Step(**fields))
        agent.update()


@pytest.mark.parametrize("text", STATEFUL)
@pytest.mark.parametrize("name", ["dqn", "td3"])
def test_a_population_does_what_its_seeds_do_alone_and_resumes_exactly(name, text):
    seeds = (3, 5)
    together = agent_with(name, text, seeds=seeds)
    seen_by(together, 22, seeds)
    alone = [agent_with(name, text, seeds=seed) for seed in seeds]
    for seed, agent in zip(seeds, alone, strict=True):
        seen_by(agent, 22, (seed,))
    saved = [copy.deepcopy(together.state_dict(index)) for index in range(2)]
    for index, agent in enumerate(alone):
        for key, net in networks(agent).items():
            for n, p in net.named_parameters():
                ours = dict(networks(together)[key].named_parameters())[n][index]
                torch.testing.assert_close(ours, p, rtol=1e-3, atol=1e-4)
        again = agent_with(name, text, seeds=9)  # what is saved of one seed knows of no population
        again.load_state_dict(saved[index])
        seen_by(again, 9, (seeds[index],), start=22)
    resumed = agent_with(name, text, seeds=(7, 8))
    for index, state in enumerate(saved):
        resumed.load_state_dict(state, index)
    for agent in (together, resumed):
        seen_by(agent, 12, seeds, start=22)
    for key, value in values(together).items():
        assert torch.equal(values(resumed)[key], value), key


@pytest.mark.parametrize(("name", "intervention"), ACCEPTED)
def test_an_update_does_not_wait_for_a_gpu(name, intervention, monkeypatch):
    """See test_every_agent: gradients are stood in for; planning NaP reads the radii once, which is left out here.

    What has a period acts at every second step of an optimiser: td3's actor takes two.
    """
    device, text = torch.device("cuda"), re.sub(r"(every|at)=\d+", r"\1=2", TEXTS[intervention])
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, raising=False)
    monkeypatch.setattr(torch.autograd, "grad", fake_gradients)
    monkeypatch.setattr(projection, "_check_radii", lambda groups: None)
    with FakeTensorMode():
        agent = agent_with(name, text, device=device, warmup_steps=0, seeds=(0, 1))
        obs = torch.zeros(2, 1, 3, device=device)
        flags, scalars = torch.zeros(2, 1, dtype=torch.bool, device=device), torch.zeros(2, 1, device=device)
        for step in range(5):
            agent.act(obs, explore=True)
            agent.observe(Step(obs, scalars, flags, flags, obs, scalars, scalars.long(), flags))
            agent.update()
            if step == 2:
                agent.plasticity.at_boundary()
        assert agent.updates >= 4
        assert {value.device.type for value in values(agent).values()} == {"cuda"}


@pytest.mark.parametrize("name", ["dqn", "td3"])
def test_a_change_of_task_resets_networks_targets_and_optimisers(name):
    agent = agent_with(name, "reset")
    assert agent.plasticity.uses_boundaries
    assert not build(name, Plasticity(lambda: make("reset(every=9)"))).plasticity.uses_boundaries
    live(agent, 20)
    before = copy.deepcopy(values(agent))
    agent.plasticity.at_boundary()
    now = values(agent)
    for key in networks(agent):
        if not key.startswith("target_"):
            own = [n for n in now if n.startswith(f"{key}.")]
            assert all(not torch.equal(now[n], before[n]) for n in own)
            if f"target_{key}" in networks(agent):
                assert all(torch.equal(now[f"target_{n}"], now[n]) for n in own)
    for optimizer in optimizers(agent):
        assert isinstance(optimizer, AgentOptimizer)
        assert not any(moment.any() for moment in optimizer.inner.exp_avg)
        assert not any(optimizer.inner.step_count)


@pytest.mark.parametrize("text", ["redo(threshold=0.6,every=3,samples=16)+noise", "cbp(rate=0.02,maturity=3)+parseval"])
def test_symphonys_three_critics_are_members_of_their_own(text):
    agent = agent_with("symphony", text, seeds=(0, 1))
    live(agent, 20)
    assert [(o.learner.members, o.learner.twins) for o in optimizers(agent)] == [(2, 1), (6, 3)]
    assert all(value.isfinite().all() for value in values(agent).values())
