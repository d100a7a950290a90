"""Every intervention by name: a population is its members alone, off is none, it resumes exactly, it never waits."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from plasticity.adam import Adam
from plasticity.harness import Trial
from plasticity.networks import projection
from plasticity.problems.changes import Redrawn
from plasticity.problems.published import Problem
from plasticity.registry import INTERVENTIONS, make, uses_boundaries
from tests.plasticity.toy import MEMBERS, Training, cnn, mlp

# Settings with which each acts within 30 steps, and with which it changes nothing (None: it cannot be off).
SETTINGS = {
    "l2": ("l2(strength=0.1)", "l2(strength=0)"),
    "l2-init": ("l2-init(strength=0.1,distance=huber,resample=true)", "l2-init(strength=0)"),
    "w2-init": ("w2-init(strength=0.1)", "w2-init(strength=0)"),
    "spectral": ("spectral(strength=0.1)", "spectral(strength=0)"),
    "parseval": ("parseval(strength=0.1)", "parseval(strength=0)"),
    "churn": ("churn(strength=1,lag=2)", "churn(strength=0)"),
    "weight-decay": ("weight-decay(strength=1)", "weight-decay(strength=0)"),
    "adamw": ("adamw(strength=1)", "adamw(strength=0)"),
    "noise": ("noise(std=0.01)", "noise(std=0)"),
    "weight-clip": ("weight-clip(factor=0.5)", "weight-clip(factor=100)"),
    "shrink-perturb": ("shrink-perturb", "shrink-perturb(keep=1)"),
    "shrink-perturb-step": ("shrink-perturb-step", "shrink-perturb-step(shrink=0,perturb=0)"),
    "redo": ("redo(threshold=0.4,every=7,samples=32,reset_steps=true)", "redo(every=1000)"),
    "cbp": ("cbp(rate=0.02,maturity=3)", "cbp(rate=0)"),
    "snr": ("snr(longest=2,every=2)", "snr(every=1000)"),
    "reset": ("reset", "reset(every=1000)"),
    "reset-head": ("reset-head(every=4)", "reset-head(every=1000)"),
    "reset-last": ("reset-last(layers=2)", "reset-last(every=1000)"),
    "reset-optimizer": ("reset-optimizer", "reset-optimizer(every=1000)"),
    "adam-rel": ("adam-rel", "adam-rel(every=1000)"),
    "injection": ("injection(at=8)", "injection(at=1000)"),
    "hare-tortoise": ("hare-tortoise(momentum=0.9,every=8)", "hare-tortoise(every=1000)"),
    "nap": ("nap(gains=pull)", "nap(normalise=false,project=false)"),
    "layernorm": ("layernorm", None),
    "rmsnorm": ("rmsnorm", None),
    "crelu": ("crelu", None),
    "fourier": ("fourier", None),
    "activation": ("activation(kind=gelu)", "activation(kind=relu)"),
    "leaky-relu": ("leaky-relu(slope=0.1)", "leaky-relu(slope=0)"),
    "smooth-leaky": ("smooth-leaky", None),
    "adamp": ("adamp(weight_decay=0.1,delta=0.5)", "adamp(delta=0)"),
    "sgdp": ("sgdp(weight_decay=0.1,delta=0.5)", None),
    "muon": ("muon", None),
    "normuon": ("normuon", None),
    "upgd": ("upgd(sigma=0.01)", None),
    "trac": ("trac(first_scale=0.01)", None),
    "lipschitz": ("lipschitz(max_norm=0.8,learning_rate=0.02)", None),
    "seednorm": ("seednorm(heads=3)", None),
    "safe-step": ("safe-step(r_target=0.01)", "safe-step(r_target=1e9)"),
    "adaptive-batch": ("adaptive-batch", None),
}
COMBINED = [
    "l2-init+redo(threshold=0.4,every=7)+hare-tortoise(momentum=0.9,every=8)",
    "crelu+cbp(rate=0.02,maturity=3)+weight-decay+weight-clip(factor=1.5)",
    "churn(strength=1)+adamw+injection+l2",
    "nap+redo(threshold=0.4,every=7)+shrink-perturb+crelu+l2",
    "muon+safe-step(r_target=0.01)+redo(threshold=0.4,every=7)",
]
ON = [*(on for on, _ in SETTINGS.values()), *COMBINED]
OF_UNITS = ["redo", "cbp", "snr", "reset-last", "crelu", "fourier"]
PLAIN = {network: Training(network=network).run().values() for network in (mlp, cnn)}


def test_every_name_is_tested():
    assert SETTINGS.keys() == INTERVENTIONS.keys() - {"none"}


@pytest.mark.parametrize(
    ("text", "network"),
    [*((text, mlp) for text in ON), *((SETTINGS[name][0], cnn) for name in OF_UNITS), *((t, cnn) for t in COMBINED)],
)
def test_a_population_is_its_members_alone(text, network):
    together = Training(text, network=network).run().values()
    acts = together.keys() != PLAIN[network].keys() or any(
        t.shape != PLAIN[network][n].shape or not torch.equal(t, PLAIN[network][n]) for n, t in together.items()
    )
    assert acts, "it has changed nothing"
    for member in range(MEMBERS):
        alone = Training(text, seeds=[member], single=True, network=network).run().values()
        for name, value in alone.items():
            torch.testing.assert_close(together[name][member : member + 1], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("off", [off for _, off in SETTINGS.values() if off is not None])
def test_off_is_none_bit_for_bit(off):
    values = Training(off).run().values()
    for name, plain in PLAIN[mlp].items():
        assert torch.equal(values[name], plain), name


@pytest.mark.parametrize("text", ON)
def test_resuming_continues_exactly(text):
    whole, file = Training(text).run(13), io.BytesIO()
    torch.save(whole.state(), file)
    file.seek(0)
    resumed = Training(text).load(torch.load(file, weights_only=True)).run(17).values()
    for name, value in whole.run(17).values().items():
        assert torch.equal(resumed[name], value), name


class OnFakeGPU(Training):
    """Gradients are stood in for: autograd's engine has no fake without a driver, see tests/agents/test_every_agent."""

    def backward(self, loss):
        assert loss.device.type == "cuda"
        for parameter in self.learner.network.parameters():
            parameter.grad = torch.empty_like(parameter)


@pytest.mark.parametrize("text", ON)
def test_runs_on_a_fake_gpu_without_mixing_devices_or_waiting_for_it(text, monkeypatch):
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, raising=False)
    monkeypatch.setattr(projection, "_check_radii", lambda groups: None)  # reads them once, before the first step
    with FakeTensorMode():
        network = cnn if text in COMBINED else mlp
        run = OnFakeGPU(text, range(2), network=network, optimizer=lambda p: Adam(p, 1e-2), device="cuda").run(11)
        assert {t.device.type for t in run.values().values()} == {"cuda"}


def test_boundaries_are_declared():
    assert {name for name in INTERVENTIONS if uses_boundaries(name)} == {
        "shrink-perturb", "reset", "reset-head", "reset-last", "reset-optimizer", "adam-rel", "injection",
        "adaptive-batch",
    }  # fmt: skip
    assert not make("shrink-perturb(every=10)")[0].uses_boundaries


TOY = Problem(data="blobs", change=Redrawn(), tasks=2, steps=12, batch_size=8, examples=30, hidden=(12, 9))


@pytest.mark.parametrize("text", ON)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_acts_in_a_trial_of_the_harness(text, optimizer):
    """Where gradients of ordinary networks are made by hand."""
    problem = dataclasses.replace(TOY, optimizer=optimizer)
    if optimizer == "sgd" and text in ("reset-optimizer", "adam-rel"):
        return
    plain, trial = Trial(problem, [], [0, 1]), Trial(problem, make(text), [0, 1])
    while not trial.done:
        plain.advance(12), trial.advance(12)
    before, after = plain.network.state_dict(), trial.network.state_dict()
    assert all(t.isfinite().all() for t in after.values())
    assert any(n not in before or t.shape != before[n].shape or not torch.equal(t, before[n]) for n, t in after.items())
