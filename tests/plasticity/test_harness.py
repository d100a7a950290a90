"""The harness: gradients by hand, members as separate runs, exact continuation, and the loss of plasticity itself."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch import nn

from plasticity.harness import Autograd, Trial
from plasticity.intervention import Intervention
from plasticity.measures.diagnostics import Diagnostics
from plasticity.networks.mlp_gradients import MLPGradients, mlp_gradients
from plasticity.networks.stacked import stack
from plasticity.networks.structure import find_structure
from plasticity.problems.changes import ClassPairs, Redrawn, Shuffled
from plasticity.problems.losses import majority_share, member_losses, member_scores, output_gradient
from plasticity.problems.published import PROBLEMS, Problem
from plasticity.registry import make

TOY = Problem(data="blobs", change=Redrawn(), tasks=3, steps=10, batch_size=8, examples=30, hidden=(12, 9))


class L2(Intervention):
    def penalty(self, learner, parameters):
        return sum(p.square().flatten(1).sum(1) for p in parameters.values()) * 0.05


class Watching(Intervention):
    needs_activations = True

    def begin(self, learner):
        self.seen = []

    def after_step(self, learner, batch):
        self.seen.append({name: h.clone() for name, h in batch.activations.items()})


class Normalised(Intervention):
    def build(self, network):
        layers = list(network)
        for index in (4, 2):
            layers.insert(index, nn.LayerNorm(layers[index - 1].out_features, elementwise_affine=False))
        return nn.Sequential(*layers)


def run(trial: Trial, stride: int = 1000) -> list[dict[str, torch.Tensor]]:
    found = []
    while not trial.done:
        result = trial.advance(stride)
        if result is not None:
            found.append(dict(result.metrics))
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("regression", [True, False])
def test_gradients_by_hand_are_those_of_autograd(bias, normalise, regression):
    torch.manual_seed(0)

    def network():
        norm = [nn.LayerNorm(7, elementwise_affine=False)] if normalise else []
        return nn.Sequential(nn.Flatten(), nn.Linear(6, 7, bias=bias), *norm, nn.ReLU(), nn.Linear(7, 4)).double()

    population = stack([network() for _ in range(3)])
    x = torch.randn(3, 5, 2, 3, dtype=torch.float64)
    y = torch.randn(3, 5, 4, dtype=torch.float64) if regression else torch.randint(4, (3, 5))
    by_hand = mlp_gradients(population)
    assert isinstance(by_hand, MLPGradients)
    autograd = Autograd(population, find_structure(population), watches=True)
    passed, reference = by_hand.forward(x), autograd.forward(x)
    torch.testing.assert_close(passed.outputs, reference.outputs)
    assert passed.activations.keys() == reference.activations.keys()
    for name, h in passed.activations.items():
        torch.testing.assert_close(h, reference.activations[name])
    expected = autograd.gradients(reference, y)
    for own, other in zip(by_hand.gradients(passed, y), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)
    outputs = by_hand(x)
    weights = torch.randn_like(outputs)
    theirs = torch.autograd.grad((population(x) * weights).sum(), list(population.parameters()))
    for own, other in zip(torch.autograd.grad(outputs, list(population.parameters()), weights), theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)
    before = [p.detach().clone() for p in population.parameters()]
    by_hand.descend(by_hand.forward(x), y, 0.1)
    for parameter, old, gradient in zip(population.parameters(), before, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), old - 0.1 * gradient, rtol=1e-10, atol=1e-12)


def test_networks_that_need_autograd():
    assert mlp_gradients(stack([nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))])) is None
    assert mlp_gradients(stack([nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.ReLU(), nn.Linear(2, 2))])) is None
    assert mlp_gradients(stack([nn.Sequential(nn.Linear(2, 2), nn.ReLU())])) is None
    assert mlp_gradients(nn.Linear(2, 2)) is None


def test_losses_and_scores_of_members():
    outputs = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[0.0, 3.0], [1.0, 0.0]]], requires_grad=True)
    targets = torch.tensor([[0, 0], [1, -1]])
    assert member_scores(outputs, targets).tolist() == [0.5, 1.0]
    labels = torch.tensor([[0, 0], [1, 1]])
    losses = member_losses(outputs, labels)
    assert losses.tolist() == pytest.approx([(0.126928 + 1.313262) / 2, (0.048587 + 1.313262) / 2], rel=1e-5)
    (gradient,) = torch.autograd.grad(losses.sum(), outputs)
    torch.testing.assert_close(output_gradient(outputs.detach(), labels), gradient)
    assert member_losses(torch.zeros(1, 2, 1), torch.tensor([[[1.0], [3.0]]])).item() == 5.0


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("interventions", [[], [L2, Watching], [Normalised]])
def test_members_are_separate_runs(optimizer, interventions):
    problem = dataclasses.replace(TOY, optimizer=optimizer, momentum=0.9 if interventions else 0.0)
    together = Trial(problem, [make() for make in interventions], [5, 1, 8])
    alone = [Trial(problem, [make() for make in interventions], [seed]) for seed in (5, 1, 8)]
    results, separate = run(together), [run(trial) for trial in alone]
    for task in range(problem.tasks):
        for name, values in results[task].items():
            expected = torch.cat([found[task][name] for found in separate])
            torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-3)
    for name, parameter in together.network.named_parameters():
        expected = torch.cat([trial.network.get_parameter(name) for trial in alone])
        torch.testing.assert_close(parameter, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("interventions", [[], [L2, Normalised]])
def test_a_trial_continues_exactly_from_any_step(optimizer, interventions, tmp_path):
    problem = dataclasses.replace(TOY, optimizer=optimizer)
    whole = Trial(problem, [make() for make in interventions], [0, 3])
    expected = run(whole)
    cut = Trial(problem, [make() for make in interventions], [0, 3])
    found = [dict(cut.advance(10).metrics)]
    assert cut.advance(3) is None
    torch.save(cut.state_dict(), tmp_path / "state.pt")
    cut.advance(100)
    going_on = Trial(problem, [make() for make in interventions], [0, 3])
    going_on.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    found += run(going_on, stride=4)
    for task in range(3):
        for name, values in expected[task].items():
            if name.startswith(("online", "final")):
                torch.testing.assert_close(found[task][name], values, rtol=1e-5, atol=1e-6)
    for parameter, other in zip(whole.network.parameters(), going_on.network.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_activations_reach_interventions():
    watching = Watching()
    trial = Trial(TOY, [watching], [0, 1])
    x, _ = trial.task.batches(0, 1)
    expected = trial.network[:3](x[:, 0])
    trial.advance(1)
    torch.testing.assert_close(watching.seen[0]["2"], expected)
    assert watching.seen[0]["4"].shape == (2, 8, 9)


def test_a_head_is_set_to_zero_at_each_task_and_held_out_images_are_scored():
    problem = dataclasses.replace(
        TOY, change=ClassPairs(), outputs=2, held_out=True, zero_head=True, examples=None, steps=40, optimizer="adam",
        learning_rate=3e-3, tasks=2,
    )  # fmt: skip
    trial = Trial(problem, [], [0])
    result = trial.advance(1000)
    assert result.metrics["test_accuracy"] > 0.8
    assert not trial.network[-1].weight.any()
    assert trial.network[1].weight.any()


def test_two_optimisers_are_refused():
    class Own(Intervention):
        def optimizer(self, network, parameters, learning_rate, stacked):
            return torch.optim.SGD(parameters.values(), learning_rate)

    with pytest.raises(ValueError, match="a network has one"):
        Trial(TOY, [Own(), Own()], [0])


def test_a_saved_trial_of_other_seeds_is_refused():
    with pytest.raises(ValueError, match="another number of seeds"):
        Trial(TOY, [], [0, 1]).load_state_dict(Trial(TOY, [], [0]).state_dict())


def test_a_compiled_trial_computes_the_same(monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: real(network, backend="aot_eager", fullgraph=True))
    problem = dataclasses.replace(TOY, change=Shuffled(), steps=5, tasks=1)
    eager, compiled = (Trial(problem, [Normalised()], [0, 1], compiled=flag) for flag in (False, True))
    run(eager), run(compiled)
    for own, other in zip(eager.network.parameters(), compiled.network.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_plain_adam_loses_plasticity_on_random_labels():
    """Specification 8.1 (a), two seeds and half the steps: the last tasks are learned no better than by guessing."""
    problem = dataclasses.replace(PROBLEMS["random-label-digits"], tasks=20, steps=300)
    accuracy = torch.stack([result["online_accuracy"] for result in run(Trial(problem, [], [0, 1]))])
    assert (accuracy[:3].mean(0) > 0.65).all()
    assert (accuracy[-3:].mean(0) < 0.3).all()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_diagnostics_change_nothing(optimizer):
    """Check 23: the same trajectory, bit for bit, and the same generators with diagnostics on or off."""
    problem = dataclasses.replace(TOY, optimizer=optimizer)
    plain = Trial(problem, [L2()] if optimizer == "adam" else [], [0, 1])
    measured = Trial(
        problem, [L2()] if optimizer == "adam" else [], [0, 1], diagnostics=Diagnostics(every=3), costly_every=2
    )
    run(plain)
    results = run(measured)
    for own, other in zip(plain.network.parameters(), measured.network.parameters(), strict=True):
        assert torch.equal(own, other)
    for own, other in zip(plain.learner.generators, measured.learner.generators, strict=True):
        assert torch.equal(own.get_state(), other.get_state())
    assert [steps for steps, _ in measured.measurements] == [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]
    assert ["plasticity/dormant_fraction" in result for result in results] == [False, True, True]
    for _, found in measured.measurements:
        assert all(value.shape == (2,) for value in found.values())
        assert (found["plasticity/update_ratio"] > 0).all()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("adamp", "optimizer/projected/1.weight"),
        ("sgdp", "optimizer/angle/1.weight"),
        ("safe-step", "safe_step/scale"),
        ("adaptive-batch", "adaptive_batch/size"),
        ("lipschitz", "lipschitz/1.weight"),
    ],
)
def test_what_interventions_measure_is_recorded_with_the_diagnostics(text, name):
    trial = Trial(TOY, make(text), [0, 1], diagnostics=Diagnostics(every=5))
    run(trial)
    assert [steps for steps, _ in trial.measurements] == [5, 10, 15, 20, 25, 30]
    for _, found in trial.measurements:
        assert found[name].shape == (2,)
    plain = Trial(TOY, make(text), [0, 1])
    run(plain)
    for own, other in zip(plain.network.parameters(), trial.network.parameters(), strict=True):
        assert torch.equal(own, other)


def test_a_refused_step_is_told_once_through_the_harness_and_a_resumed_trial():
    problem = dataclasses.replace(TOY, steps=20)
    trial = Trial(problem, make("safe-step"), [0, 1], diagnostics=Diagnostics(every=2))
    trial.network.get_parameter("1.weight").data[1].fill_(torch.inf)
    with pytest.warns(UserWarning, match="safe-step refused steps"):
        trial.advance(5)
    refused = [found["safe_step/refused"].tolist() for _, found in trial.measurements]
    assert refused == [[0, 2], [0, 4]]
    again = Trial(problem, make("safe-step"), [0, 1], diagnostics=Diagnostics(every=2))
    again.load_state_dict(trial.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.advance(5)
    assert [found["safe_step/refused"].tolist() for _, found in again.measurements] == [[0, 6], [0, 8], [0, 10]]


def test_chance_is_the_commonest_label():
    assert majority_share(torch.tensor([[0, 1, 1, 1], [2, 0, 2, 1]]), 5).tolist() == [0.75, 0.5]


def test_a_member_that_diverges_leaves_the_others_what_they_measure():
    """With all diagnostics on, curvature included."""
    calm, torn = (Trial(TOY, [], [0, 1], diagnostics=Diagnostics(every=3, curvature=True)) for _ in range(2))
    with torch.no_grad():
        next(torn.network.parameters())[1] = torch.inf
    for ours, theirs in zip(run(torn), run(calm), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name][0], value[0], equal_nan=True)
    assert ours["online_loss"][1].isnan()
