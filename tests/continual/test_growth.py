"""The parts of growth that are not a paper's: genomes as files, settings, devices, the loss."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from continual.growth.contrastive import contrastive_loss, logits_of
from continual.growth.dual_encoder import DualEncoder
from continual.growth.genome import PAPER, PAPER_CAP, SMALL, Genome
from continual.growth.growclip import Config, GrowClip
from continual.growth.training import Optimisation, Training, clip_
from continual.pairs.batch import PairBatch
from tests.continual.growing import GENOME, arrival, batch, encoder, random


@pytest.mark.parametrize("genome", [GENOME, SMALL, PAPER, PAPER_CAP, GENOME.grown(ffn=(8, 16, 24), norm="rmsnorm")])
def test_a_genome_survives_json(genome):
    again = Genome.from_json(genome.to_json())
    assert again == genome
    assert hash(again) == hash(genome)
    assert Genome.from_dict({"heads": 3, "ffn": [8, 16, 24]}).heads == (3, 3, 3)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"depth": (0, 1, 1)}, "a block each"), ({"patch": 7}, "do not divide"), ({"norm": "batch"}, "norm is"),
        ({"heads": 0}, "at least 1 head"), ({"width": 0}, "width must be"), ({"vocabulary": 1}, "vocabulary has"),
        ({"ffn": (1, 2)}, "one for each of"), ({"init": "zero"}, "init is"), ({"legs": 4}, "a genome has the fields"),
    ],
)  # fmt: skip
def test_what_is_no_genome_is_refused(values, said):
    with pytest.raises(ValueError, match=said):
        Genome.from_dict(values)
    with pytest.raises(ValueError, match="JSON"):
        Genome.from_json("{")


def test_the_loss_is_cross_entropy_both_ways():
    images, texts = (F.normalize(torch.randn(6, 5, generator=random(s), dtype=torch.float64), dim=1) for s in (0, 1))
    scale = torch.tensor(2.0, dtype=torch.float64)
    logits, rows = math.exp(2) * images @ texts.T, torch.arange(6)
    wanted = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
    torch.testing.assert_close(contrastive_loss(images, texts, scale, torch.arange(6) * 7), wanted)
    torch.testing.assert_close(logits_of(images, texts, torch.tensor(9.0).double()), 100 * images @ texts.T)
    shared = torch.tensor([0, 1, 2, 0, 3, 4])  # the first and the fourth pair are of one concept
    soft = torch.eye(6, dtype=torch.float64)
    soft[0, 3] = soft[3, 0] = soft[0, 0] = soft[3, 3] = 0.5
    wanted = (F.cross_entropy(logits, soft) + F.cross_entropy(logits.T, soft)) / 2
    torch.testing.assert_close(contrastive_loss(images, texts, scale, shared), wanted)


def test_a_model_is_what_its_docstring_says():
    model, given = encoder(dtype=torch.float64), batch()
    images, texts = model(given.images, given.tokens)
    assert images.shape == texts.shape == (8, 12)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(model.encode_image(given.images / 255), images, atol=1e-6, rtol=0)
    alone = torch.cat([model.encode_text(tokens[tokens != 0].unsqueeze(0)) for tokens in given.tokens])
    torch.testing.assert_close(alone, texts)
    assert (given.tokens == 0).any()
    # A plain writing of the same network, by the modules of torch.
    x = torch.cat([model.text_class.expand(1, 1, -1), model.tokens[given.tokens[:1, :2]]], 1) + model.text_positions[:3]
    for block in (*model.text_blocks, *model.shared_blocks):
        y = block.norm1(x)
        q, k, v = (part.view(3, 2, 8).transpose(0, 1) for part in block.qkv(y)[0].chunk(3, -1))
        mixed = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(8), -1) @ v
        x = x + block.out(mixed.transpose(0, 1).reshape(1, 3, 16))
        x = x + block.down(F.gelu(block.up(block.norm2(x))))
    plain = F.normalize(model.text_norm(x[:, 0]) @ model.text_projection.T, dim=-1)
    torch.testing.assert_close(model.encode_text(given.tokens[:1, :2]), plain)


def test_the_same_seed_draws_the_same_model_and_no_global_number():
    state = torch.get_rng_state()
    one, other, smaller = (
        DualEncoder(genome, random(4)).requires_grad_(False) for genome in (GENOME, GENOME, GENOME.grown(init="clip"))
    )
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert 0.01 < one.tokens.std() < 0.03
    assert one.shared_blocks[0].up.weight.abs().max() == pytest.approx(1 / 4, rel=0.05)
    assert one.logit_scale.exp() == pytest.approx(1 / 0.07)
    torch.testing.assert_close(
        smaller.image_blocks[0].out.weight * 2, one.image_blocks[0].out.weight, atol=1e-6, rtol=0
    )  # fmt: skip


def test_a_step_is_adamw_with_clipped_gradients():
    ours, theirs = encoder(), encoder()
    settings = Optimisation(learning_rate=0.01, weight_decay=0.1, clip=0.5)
    training = Training(ours, settings, steps=30)
    means = [torch.zeros_like(p) for p in theirs.parameters()]
    squares = [torch.zeros_like(p) for p in theirs.parameters()]
    for step in range(12):
        given = batch(seed=step)
        loss = contrastive_loss(*theirs(*given[:2]), theirs.logit_scale, given.concepts)
        gradients = torch.autograd.grad(loss, list(theirs.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        rate = 0.01 * (step + 1) / 10 if step < 10 else 0.005 * (1 + math.cos(math.pi * (step - 10) / 20))
        with torch.no_grad():
            for p, gradient, mean, square in zip(theirs.parameters(), gradients, means, squares, strict=True):
                gradient = gradient * min(1.0, 0.5 / norm)
                mean.lerp_(gradient, 0.1)
                square.lerp_(gradient**2, 0.02)
                corrected = (square / (1 - 0.98 ** (step + 1))).sqrt() + 1e-6
                p *= 1 - (rate * 0.1 if p.dim() >= 2 else 0.0)
                p -= rate * mean / (1 - 0.9 ** (step + 1)) / corrected
        torch.testing.assert_close(training.learn(given)["loss/contrastive"], loss.detach(), rtol=1e-4, atol=1e-4)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert settings.rate(29, 30) < 1e-3 * settings.rate(9, 30) + 1e-4
    small = [torch.full((3,), 0.1)]
    clip_(small, 1.0)
    torch.testing.assert_close(small[0], torch.full((3,), 0.1))


def test_it_learns():
    grower = GrowClip(Config(choice="fixed", learning_rate=5e-3), GENOME, seed=0)
    grower.arrive(arrival(0, 100, steps=40))
    losses = [float(grower.learn(batch(seed=step))["loss/contrastive"]) for step in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(ValueError, match="the next one has to arrive"):
        grower.learn(batch())


def test_a_step_on_a_gpu_neither_waits_for_numbers_nor_mixes_devices(monkeypatch):
    """Under fake tensors of CUDA; without a driver autograd's engine has no fake, so gradients are stood in for."""
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, parameters, **_: [torch.empty_like(p) for p in parameters])
    with FakeTensorMode():
        shapes = {name: p.shape for name, p in DualEncoder(GENOME, None).named_parameters()}
        model = DualEncoder.of(GENOME, {name: torch.ones(shape, device="cuda") for name, shape in shapes.items()})
        training = Training(model, Optimisation(), steps=5)
        given = PairBatch(
            torch.zeros(4, 3, 16, 16, dtype=torch.uint8, device="cuda"),
            torch.ones(4, 6, dtype=torch.int64, device="cuda"),
            torch.arange(4, device="cuda"),
        )
        loss = training.learn(given)["loss/contrastive"]
        assert loss.device.type == "cuda"
        assert {p.device.type for p in training.parameters} == {"cuda"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"choice": "best"}, "choice is one of"), ({"momentum": 2.0}, "momentum must be"),
        ({"path": ("wings",)}, "unknown move 'wings'"), ({"proxy_steps": 0}, "at least 1"),
        ({"engine": "supernet", "neurons": "duplicate"}, "begin at zero"), ({"min_ratio": 0.5}, "min_ratio"),
        ({"ema_decays": (1.0,)}, "ema_decay"), ({"learning_rate": 0.0}, "positive"), ({"ffn": 0.5}, "factor above 1"),
        ({"weight_decay": -1.0}, "not be negative"), ({"heads": 0}, "at least 1"),
        ({"budget_exponent": -1.0}, "not be"), ({"depth_source": "void"}, "depth is one of"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Config(**settings)
