"""What must be visible on a small CPU run (specs/nap-and-plasticity.md, section 8): minutes, so `pytest -m slow`."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from plasticity import registry
from plasticity.harness import Trial
from plasticity.nap import NaP
from plasticity.problems.published import PROBLEMS, Problem

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


def run(problem: Problem, interventions: list, seeds: range) -> tuple[Trial, dict[str, Tensor]]:
    """The trial at its end, and its metrics by name: [tasks, seeds]."""
    trial = Trial(problem, interventions, seeds)
    rows = []
    while not trial.done:
        result = trial.advance(10**9)
        assert result is not None
        rows.append(result.metrics)
    return trial, {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def test_random_labels():
    """8.1 (a): plain Adam ends at the level of guessing, normalisation keeps much, projection more."""
    problem, seeds = dataclasses.replace(PROBLEMS["random-label-digits"], tasks=24, steps=400), range(5)
    arms = {
        "fresh": registry.make("fresh"),
        "plain": [],
        "norm": [NaP(project=False)],
        "nap": [NaP()],
    }
    trials, last = {}, {}
    for name, interventions in arms.items():
        trials[name], found = run(problem, interventions, seeds)
        last[name] = found["online_accuracy"][-4:].mean(0)
        assert found["online_accuracy"][:4].mean() > 0.7
    assert last["plain"].mean() <= 0.25
    assert last["norm"].mean() - last["plain"].mean() >= 0.3
    assert last["nap"].mean() - last["norm"].mean() >= 0.05
    assert (last["nap"] > last["norm"]).all()
    assert last["nap"].mean() >= 0.88 * last["fresh"].mean()
    start = Trial(problem, [NaP()], seeds).network
    norms = {name: parameter.flatten(1).norm(dim=1) for name, parameter in start.named_parameters()}
    for name in trials["nap"].learner.structure.hidden[0].weights + trials["nap"].learner.structure.hidden[1].weights:
        ratio = trials["nap"].learner.parameter(name).flatten(1).norm(dim=1) / norms[name]
        assert (ratio - 1).abs().max() <= 1e-5
    head = trials["nap"].learner.structure.heads[0]
    assert (trials["nap"].learner.parameter(head).flatten(1).norm(dim=1) > 2 * norms[head]).all()


def test_an_under_trained_network_shows_no_loss():
    """8.1, SGD 0.01: the negative control; a harness that reports a loss here is wrong."""
    problem = dataclasses.replace(
        PROBLEMS["random-label-digits"], tasks=24, steps=400, optimizer="sgd", learning_rate=0.01
    )
    _, found = run(problem, [], range(3))
    accuracy = found["online_accuracy"]
    assert accuracy[-4:].mean() >= accuracy[:4].mean() - 0.02


def test_the_stationary_control_is_not_hurt():
    """8.2: digits with true labels; test accuracy after 2 000 steps, mean of 4 seeds."""
    arms = {"plain": [], "norm": [NaP(project=False)], "nap": [NaP()]}
    ends = {
        name: run(PROBLEMS["stationary-digits"], interventions, range(4))[1]["test_accuracy"][-1].mean()
        for name, interventions in arms.items()
    }
    assert ends["plain"] > 0.96
    assert ends["nap"] >= ends["plain"] - 0.01
    assert ends["nap"] >= ends["norm"] - 0.01


def test_permuted_digits():
    """8.3: 100 tasks of 100 steps, last 16 tasks."""
    arms = {
        "fresh": registry.make("fresh"),
        "plain": [],
        "norm": [NaP(project=False)],
        "nap": [NaP()],
    }
    last = {
        name: run(PROBLEMS["permuted-digits"], interventions, range(4))[1]["online_accuracy"][-16:].mean()
        for name, interventions in arms.items()
    }
    assert last["fresh"] - last["plain"] >= 0.12
    assert last["nap"] - last["norm"] >= 0.06
    assert last["nap"] - last["plain"] >= 0.5 * (last["fresh"] - last["plain"])
