"""Growing a dual encoder: the faithfulness checks 1 to 7 of specs/growclip-and-growth.md."""

import math
from dataclasses import replace

import pytest
import torch

from continual.growth import inheriting, operators
from continual.growth.blocks import RESIDUAL, fresh
from continual.growth.contrastive import contrastive_loss, logits_of
from continual.growth.dual_encoder import DualEncoder
from continual.growth.genome import SMALL, Genome, Towers
from continual.growth.operators import Operators, grow, grow_depth, grow_vocabulary
from continual.growth.slots import Slots
from continual.growth.space import GrowthSpace
from continual.growth.training import loss_of
from tests.continual.growing import GENOME, batch, encoder, random

SPACE = GrowthSpace()
MOVES = ("image_depth", "text_depth", "shared_depth", "ffn", "heads", "head_dim", "width")


def largest_difference(a, b, given):
    return max(float((x - y).abs().max()) for x, y in zip(a(*given[:2]), b(*given[:2]), strict=True))


@pytest.fixture(params=[(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"])
def exact(request):
    return request.param


def assert_same(before, after, tolerance, given=None):
    given = given or batch()
    with torch.no_grad():
        assert largest_difference(before, after, given) < tolerance
        logits = [logits_of(*model(*given[:2]), model.logit_scale) for model in (before, after)]
        assert (logits[0] - logits[1]).abs().max() < 20 * tolerance
        assert abs(float(loss_of(before, given) - loss_of(after, given))) < 20 * tolerance


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("name", MOVES)
def test_a_move_changes_nothing(name, norm, exact):
    dtype, tolerance = exact
    before = encoder(GENOME.grown(norm=norm), dtype)
    move = SPACE.move(before.genome, name)
    frozen = {name: p.clone() for name, p in before.named_parameters()}
    after, slots = before.grow(move, random(3))
    assert_same(before, after, tolerance)
    assert after.genome == move.genome
    assert sum(p.numel() for p in after.parameters()) == move.genome.parameters > before.genome.parameters
    assert all(torch.equal(p, frozen[name]) for name, p in before.named_parameters())
    assert not {p.data_ptr() for p in before.parameters()} & {p.data_ptr() for p in after.parameters()}
    assert list(slots) != []
    assert {n: s.inherited.shape for n, s in slots.items()} == {n: p.shape for n, p in after.named_parameters()}


@pytest.mark.parametrize(
    "how",
    [
        *(Operators(neurons=neurons) for neurons in ("duplicate", "duplicate-random")),
        *(Operators(depth=depth, position=position) for depth in ("copy", "fresh") for position in (0, 1)),
        Operators(shares="equal"),
        Operators(width="tile"),
    ],
    ids=lambda how: f"{how.depth}-{how.position}-{how.neurons}-{how.shares}",
)
def test_other_constructions_change_nothing(how, exact):
    dtype, tolerance = exact
    norm = "rmsnorm" if how.width == "tile" else "layernorm"
    before = encoder(GENOME.grown(norm=norm), dtype)
    target = before.genome.grown(depth=(2, 3, 1), ffn=(40, 24, 33), width=32)
    after, _ = grow(before, target, random(3), how)
    assert_same(before, after, tolerance)


def test_a_random_chain_of_six_changes_nothing_at_any_point(exact):
    dtype, tolerance = exact
    drawn = random(11)
    first = current = encoder(GENOME.grown(depth=(1, 1, 0), heads=(2, 3, 1)), dtype)
    every = None
    for _ in range(6):
        name = MOVES[int(torch.randint(len(MOVES) - 1, (), generator=drawn))]
        current, slots = current.grow(SPACE.move(current.genome, name), drawn)
        every = slots if every is None else every.then(slots)
        assert_same(first, current, tolerance)
    current, slots = current.grow(SPACE.move(current.genome, "width"), drawn)
    assert_same(first, current, tolerance)
    for found in every.then(slots).values():
        assert found.source is None or found.index.max() < dict(first.named_parameters())[found.source].numel()


def test_slots_point_at_the_numbers_that_were_inherited():
    """Wherever an operator does not scale, an inherited number is the old one."""
    before = encoder()
    target = GENOME.grown(depth=(2, 1, 2), heads=3, ffn=(32, 24, 40), vocabulary=33, length=8)
    after, slots = grow(before, target, random(1), Operators(position=0))
    old = {name: p.detach().flatten() for name, p in before.named_parameters()}
    for name, p in after.named_parameters():
        found = slots[name]
        if found.source is not None:
            assert torch.equal(p.detach()[found.inherited], old[found.source][found.index[found.inherited]]), name
    new_blocks = [n for n, found in slots.items() if found.source is None]
    assert new_blocks == [f"{t}_blocks.0.{n}" for t in ("image", "shared") for n in _order(RESIDUAL)]
    assert slots["image_blocks.1.up.weight"].source == "image_blocks.0.up.weight"


def _order(names):
    return [n for n in dict(encoder().image_blocks[0].named_parameters()) if n in names]


def test_new_words_are_embedded_as_the_unknown_one_was():
    before = encoder()
    after, slots = grow_vocabulary(before, 40)
    given = batch()
    unknown = torch.where(given.tokens == 5, 1, given.tokens)
    new = torch.where(given.tokens == 5, 37, given.tokens)
    with torch.no_grad():
        assert torch.equal(before.encode_text(unknown), after.encode_text(new))
        assert torch.equal(before.encode_image(given.images), after.encode_image(given.images))
    assert slots["tokens"].places[0].tolist() == [*range(30), *[1] * 10]


def test_longer_texts_change_nothing_for_the_others():
    before = encoder()
    after, _ = grow(before, GENOME.grown(length=9), random(0))
    given = batch()
    with torch.no_grad():
        longer = torch.nn.functional.pad(given.tokens, (0, 3))
        torch.testing.assert_close(before.encode_text(given.tokens), after.encode_text(longer))


@pytest.mark.parametrize("depth", ["stack", "random"])
def test_what_does_not_preserve_the_function_does_not(depth):
    before = encoder()
    for tower in ("image", "text", "shared"):
        after, _ = grow_depth(before, tower, random(2), Operators(depth=depth))
        with torch.no_grad():
            changed = [(a - b).abs().max() for a, b in zip(before(*batch()[:2]), after(*batch()[:2]), strict=True)]
        assert max(changed) > 1e-2
    after, _ = grow_depth(before, "image", random(2), Operators(depth="stack"))
    copied = zip(after.image_blocks[0].parameters(), after.image_blocks[1].parameters(), strict=True)
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in copied)


def test_padding_makes_up_for_the_epsilon_of_norms():
    before = encoder(GENOME.grown(norm="rmsnorm"))
    with torch.no_grad():
        for name, parameter in before.named_parameters():
            if any(part in name for part in ("patch", "_class", "_positions", "tokens")) or name.endswith(
                ("out.weight", "out.bias", "down.weight", "down.bias")
            ):
                parameter *= 1e-3
    after, _ = before.grow(SPACE.move(before.genome, "width"), random(0))
    assert after.genome.width == 32
    assert after.genome.epsilon == pytest.approx(before.genome.epsilon / 2)
    forgotten = DualEncoder.of(after.genome.grown(epsilon=before.genome.epsilon), dict(after.named_parameters()))
    with torch.no_grad():
        assert largest_difference(before, after, batch()) <= 1e-5
        assert largest_difference(before, forgotten, batch()) > 0.01


@pytest.mark.parametrize("name", ["image_depth", "text_depth", "shared_depth", "ffn", "heads", "head_dim"])
def test_everything_new_learns_within_two_steps(name):
    model, slots = encoder().grow(SPACE.move(GENOME, name), random(4))
    begun = {n: p.detach().clone() for n, p in model.named_parameters()}
    grown_blocks = [n for n in begun if name.endswith("depth") and n.startswith(f"{name[:-6]}_blocks.1.")]
    for _ in range(2):
        gradients = torch.autograd.grad(loss_of(model, batch()), list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    checked = 0
    for n, parameter in model.named_parameters():
        new = torch.ones_like(slots[n].inherited) if n in grown_blocks else ~slots[n].inherited
        if bool(new.any()):
            assert bool((parameter != begun[n])[new].any()), n
            checked += 1
    assert checked >= {"ffn": 9, "heads": 9, "head_dim": 9}.get(name, 12)


@pytest.mark.parametrize("shares", ["equal", "random"])
def test_gradients_of_a_repeated_stream(shares):
    model, _ = grow(encoder(dtype=torch.float64), GENOME.grown(width=32), random(5), Operators(shares=shares))
    names = [n for n, _ in model.named_parameters()]
    gradients = dict(zip(names, torch.autograd.grad(loss_of(model, batch()), list(model.parameters())), strict=True))
    for name in ("tokens", "image_class", "image_blocks.0.out.weight", "shared_blocks.0.down.weight"):
        along = operators.axes_of(name).index("stream")
        one, two = gradients[name].chunk(2, along)
        assert torch.allclose(one, two, rtol=1e-9, atol=1e-15) == (shares == "equal"), name
    for name in ("image_blocks.0.qkv.weight", "shared_blocks.0.up.weight", "text_projection"):
        one, two = gradients[name].chunk(2, 1)
        torch.testing.assert_close(one, two)


def test_both_modalities_share_blocks():
    model, given = encoder(dtype=torch.float64), batch()
    images, texts = model(*given[:2])
    shared = list(model.shared_blocks.parameters())

    def gradient(a, b):
        loss = contrastive_loss(a, b, model.logit_scale, given.concepts)
        return torch.autograd.grad(loss, shared, retain_graph=True)

    of_images, of_texts = gradient(images, texts.detach()), gradient(images.detach(), texts)
    for both, one, other in zip(gradient(images, texts), of_images, of_texts, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(both, one + other)
    assert len({id(p) for p in model.parameters()}) == len(list(model.named_parameters(remove_duplicate=False)))
    changed = DualEncoder.of(model.genome, {n: p.detach().clone() for n, p in model.named_parameters()})
    with torch.no_grad():
        changed.shared_blocks[0].get_parameter("up.weight").mul_(2)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(changed(*given[:2]), (images, texts), strict=True))


def test_parameters_and_flops_follow_the_genome():
    drawn = random(21)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=drawn))

    for _ in range(20):
        genome = Genome(
            depth=Towers(number(1, 4), number(1, 4), number(0, 3)), width=number(3, 20),
            heads=Towers(*(number(1, 4) for _ in range(3))), head_dim=number(2, 9),
            ffn=Towers(*(number(3, 30) for _ in range(3))), embedding=number(2, 9), image_size=8 * number(1, 4),
            patch=8, vocabulary=number(2, 50), length=number(1, 9), norm=("layernorm", "rmsnorm")[number(0, 2)],
        )  # fmt: skip
        assert genome.parameters == sum(p.numel() for p in DualEncoder(genome, None).parameters())
        larger = [
            genome.grown(**{name: getattr(genome, name)._replace(**{tower: getattr(getattr(genome, name), tower) + 1})})
            for name in ("depth", "heads", "ffn") for tower in Towers._fields
            if genome.depth.shared or tower != "shared" or name == "depth"
        ]  # fmt: skip
        larger += [genome.grown(**{n: getattr(genome, n) + 1}) for n in ("width", "head_dim", "embedding", "length")]
        assert all(more.flops > genome.flops and more.parameters > genome.parameters for more in larger)
    assert SMALL.block_parameters(0) == 33_472
    assert SMALL.grown(vocabulary=4150).parameters == pytest.approx(0.389e6, rel=0.01)
    assert SMALL.grown(image_size=64).flops > SMALL.flops


def test_inheriting_with_momentum():
    before = encoder()
    target = GENOME.grown(heads=3, ffn=40, depth=(2, 1, 1))

    def drawn(name, shape):
        return fresh(target, name, shape, random(inheriting.seed_of(name)))

    def mixed(momentum, **settings):
        model, slots = grow(before, target, random(7))
        inheriting.mix_(model, slots, momentum, drawn, **settings)
        return {n: p.detach() for n, p in model.named_parameters()}

    grown, slots = grow(before, target, random(7))
    plain = {n: p.detach() for n, p in grown.named_parameters()}
    assert all(torch.equal(plain[n], p) for n, p in mixed(1.0).items())
    for momentum, divisor in ((0.0, 1.0), (0.3, 1.0), (0.3, math.hypot(0.3, 0.7))):
        for name, p in mixed(momentum, rescale=divisor != 1).items():
            inherited = slots[name].inherited
            assert torch.equal(p[~inherited], plain[name][~inherited]), name
            if p.dim() < 2 or "positions" in name:
                assert torch.equal(p, plain[name]), name
                continue
            wanted = (momentum * plain[name] + (1 - momentum) * drawn(name, p.shape)) / divisor
            torch.testing.assert_close(p[inherited], wanted[inherited], atol=1e-7, rtol=0)
    assert torch.equal(mixed(0.5, excluded=("tokens",))["tokens"], plain["tokens"])
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        mixed(1.5)


def test_inheriting_averages():
    model = encoder()
    averages = inheriting.Averages(model, [0.9, 0.5])
    begun = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for _ in range(2):
            for p in model.parameters():
                p += 1
            averages.update()
    for name, start in begun.items():
        torch.testing.assert_close(averages.values(0)[name], start + 0.9 * 0.1 + 0.1 * 2)
        torch.testing.assert_close(averages.values(1)[name], start + 0.5 * 0.5 + 0.5 * 2)
    others = [DualEncoder.of(GENOME, averages.values(index)) for index in range(2)]
    how = Operators(neurons="duplicate")
    (grown, slots), (other, _) = (grow(m, GENOME.grown(ffn=40), random(3), how) for m in others)
    copies = {n: p.detach() for n, p in other.named_parameters()}
    before = {n: p.detach().clone() for n, p in grown.named_parameters()}
    inheriting.fill_copies_(grown, slots, [copies])
    after = {n: p.detach() for n, p in grown.named_parameters()}
    up = "image_blocks.0.up.weight"
    assert torch.equal(after[up][:24], before[up][:24])
    assert torch.equal(after[up][24:], copies[up][24:])
    assert not torch.equal(after[up][24:], before[up][24:])
    with pytest.raises(ValueError, match="decays"):
        inheriting.Averages(model, [1.0])


def test_what_cannot_be_grown_is_refused():
    model = encoder()
    with pytest.raises(ValueError, match="text_ffn would shrink"):
        grow(model, GENOME.grown(ffn=(24, 8, 24)), random())
    with pytest.raises(ValueError, match="depth, width, heads"):
        grow(model, GENOME.grown(embedding=16), random())
    with pytest.raises(ValueError, match="multiple"):
        grow(model, GENOME.grown(width=24), random())
    with pytest.raises(ValueError, match="cannot be padded"):
        grow(model, GENOME.grown(width=32), random(), Operators(width="pad"))
    with pytest.raises(ValueError, match="another genome|not of the genome"):
        DualEncoder(GENOME.grown(ffn=8), None).take(dict(model.named_parameters()))
    with pytest.raises(ValueError, match="epsilon of norms would be 5e-06"):
        grow(encoder(GENOME.grown(norm="rmsnorm")), GENOME.grown(norm="rmsnorm", width=32), random())
    same, slots = grow(model, GENOME, random())
    assert all(found.whole for found in slots.values())
    assert_same(model, same, 1e-12)
    assert replace(Slots.same("x", torch.ones(2)), source=None).whole is False
