"""Choosing a growth, and a learner that grows: the faithfulness checks 8 to 11 of specs/growclip-and-growth.md."""

import gc
import io
import weakref
from dataclasses import replace

import pytest
import torch

from continual.growth import search
from continual.growth.dual_encoder import DualEncoder
from continual.growth.growclip import ENGINES, Config, GrowClip
from continual.growth.operators import grow
from continual.growth.protocol import Move
from continual.growth.search import Proxy, Trial, best, fitted_weight, table, validation_loss
from continual.growth.space import HOLD, Budget, GrowthSpace, same_size
from continual.growth.supernet import part_loss, part_of, sliced, supernet, union
from continual.growth.training import Optimisation, Training, loss_of
from tests.continual.growing import GENOME, arrival, batch, encoder, random

SPACE = GrowthSpace()
QUICK = Config(proxy_steps=2, repeats=1, budget_exponent=2.0)


def learner(config=QUICK, **changes) -> GrowClip:
    return GrowClip(replace(config, **changes), GENOME, seed=3)


def learn(grower, part, steps=2):
    for step in range(steps):
        grower.learn(batch(grower.genome, seed=100 * part + step))


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_space_of_growth_becomes_larger_with_the_data():
    budget = Budget(exponent=0.5)
    caps = [budget.cap(GENOME.capacity, 100, pairs) for pairs in (100, 144, 900)]
    assert caps == pytest.approx([GENOME.capacity * times for times in (1, 1.2, 3)])
    found = [SPACE.candidates(GENOME, cap, budget, force_growth=True) for cap in caps]
    assert [move.name for move in found[0]] == [HOLD]
    assert len(found[0]) < len(found[1]) < len(found[2])
    both = GrowthSpace(pairs_of_moves=True).candidates(GENOME, caps[2], budget, force_growth=False)
    assert len(both) > len(found[2])
    assert both[0].name == HOLD
    for cap, moves in [*zip(caps, found, strict=True), (caps[2], both)]:
        assert all(move.genome.capacity <= 1.05 * cap for move in moves)
        assert len({move.genome for move in moves}) == len(moves)
        assert [m.genome for m in moves] == sorted(m.genome for m in moves)
    assert both == GrowthSpace(pairs_of_moves=True).candidates(GENOME, caps[2], budget, force_growth=False)
    hard = replace(budget, parameters=GENOME.capacity + 100)
    assert [move.name for move in SPACE.candidates(GENOME, caps[2], hard, True)] == [HOLD]
    frozen = Budget(exponent=0)
    cap = frozen.cap(GENOME.capacity, 100, 10**6)
    assert [move.name for move in SPACE.candidates(GENOME, cap, frozen, True)] == [HOLD]
    assert not any("ffn" in m.name for m in GrowthSpace(ffn=None).moves(GENOME))


def test_moves_are_named_and_sized():
    assert SPACE.move(GENOME, "heads+shared_depth").genome == GENOME.grown(heads=3, depth=(1, 1, 2))
    assert SPACE.move(GENOME, "ffn").genome.ffn == (40, 40, 40)
    assert SPACE.move(GENOME, "head_dim").genome.head_dim == 16
    assert SPACE.move(GENOME.grown(width=64, norm="rmsnorm"), "width").genome.width == 128
    assert SPACE.move(GENOME, HOLD).genome == GENOME
    assert [move.name for move in encoder().moves()] == list(SPACE.names)
    with pytest.raises(ValueError, match="unknown move 'eyes'"):
        SPACE.move(GENOME, "eyes")


def test_growths_of_one_dimension_to_the_same_size():
    moves = same_size(GENOME.grown(width=64, ffn=128), blocks=2)
    assert {move.name for move in moves} >= {"image_depth", "text_depth", "shared_depth", "ffn", "heads", "head_dim"}
    sizes = [move.genome.capacity for move in moves]
    assert max(sizes) <= 1.03 * sizes[0]
    assert min(sizes) >= 0.97 * sizes[0]
    ffn = next(move.genome for move in moves if move.name == "ffn")
    less = ffn.grown(ffn=tuple(size - 1 for size in ffn.ffn))
    assert abs(ffn.capacity - sizes[0]) <= abs(less.capacity - sizes[0])
    assert "width" not in {move.name for move in moves}
    assert "width" in {move.name for move in same_size(GENOME.grown(width=64, norm="rmsnorm"), blocks=2)}


def trials(*losses, costs):
    return [Trial(loss, cost) for loss, cost in zip(losses, costs, strict=True)]


def test_scores_weigh_loss_against_cost():
    moves = SPACE.moves(GENOME)[:4]
    costs = [1.0, 2.0, 4.0, 8.0]
    power = [3 * cost**-0.2 for cost in costs]
    assert fitted_weight(power, costs) == pytest.approx(0.2, abs=1e-12)
    rows, weight = table(moves, trials(*((loss,) for loss in power), costs=costs), 1.0, None)
    assert weight == pytest.approx(0.2)
    assert [row.score for row in rows] == pytest.approx([3.0] * 4)
    assert best(rows, 1.0, weight) == 0
    assert best(rows[::-1], 1.0, weight) == 3
    rows, _ = table(moves, trials((2.0, 2.2), (1.0, 1.2), (1.5, 1.6), (1.4, 1.7), costs=costs), 1.0, 0.02)
    assert [row.score for row in rows] == pytest.approx(
        [2.1, 1.1 * 2**0.02, 1.55 * 4**0.02, 1.55 * 8**0.02]
    )  # fmt: skip
    assert best(rows, 1.0, 0.02) == 1
    assert fitted_weight([1.0, 2.0], [1.0, 2.0]) == 0
    assert fitted_weight([1.0, 2.0], [1.0, 1.0]) == 0
    assert rows[1].as_dict()["parameters"] == moves[1].genome.parameters


def test_it_holds_unless_the_difference_is_larger_than_its_error():
    moves = [Move(HOLD, GENOME), *SPACE.moves(GENOME)[:1]]

    def chosen(held, grown):
        rows, weight = table(moves, trials(held, grown, costs=(1.0, 1.0)), 1.0, 0.0)
        return best(rows, 1.0, weight)

    # Repetitions differ by 0.3, candidates by 0.01 in each of them.
    assert chosen((5.0, 5.3), (4.99, 5.29)) == 1
    assert chosen((5.0, 5.3), (4.90, 5.38)) == 0
    assert chosen((5.0, 5.3), (5.01, 5.31)) == 0
    assert chosen((5.0,), (4.99,)) == 1


@pytest.mark.parametrize("name", list(ENGINES))
def test_trying_candidates_leaves_everything_as_it_was(name):
    grower = learner(engine=name, repeats=2)
    grower.arrive(arrival(0, 100))
    learn(grower, 0)
    model, before = grower.model, values(grower.model)
    moments = [m.clone() for optimizer in grower.training.optimizers for m in optimizer.exp_avg]
    state = torch.get_rng_state()
    candidates = grower.config.space.candidates(grower.genome, 1e9, grower.config.budget, True)
    assert ("width" in {move.name for move in candidates}) == (name == "independent")
    candidates = candidates[:3]
    found = [grower._try(arrival(1, 400), candidates) for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    assert grower.model is model
    assert_equal(before, values(model))
    assert all(
        torch.equal(m, old)
        for m, old in zip([m for o in grower.training.optimizers for m in o.exp_avg], moments, strict=True)
    )
    assert [t.losses for t in found[0]] == [t.losses for t in found[1]]
    assert len({t.losses for t in found[0]}) > 1
    flops = sum(t.flops for t in found[0])
    steps = 2 * (2 * len(candidates) if name == "independent" else len(candidates))
    assert GENOME.flops < flops / (steps * 8) < 2 * max(m.genome.flops for m in candidates)
    assert all(len(t.losses) == 2 and t.model.genome == m.genome for t, m in zip(found[0], candidates, strict=True))


def test_the_best_candidate_is_grown():
    def scorer(candidates, grown, arrival, proxy):
        assert proxy.steps == 2
        return [Trial((1.0 if move.name == "heads" else 2.0,), move.genome.flops) for move in candidates]

    grower = GrowClip(QUICK, GENOME, seed=3, engine=scorer)
    grower.arrive(arrival(0, 100))
    record = grower.arrive(arrival(1, 300))
    assert record["chosen"] == "heads"
    assert grower.genome == GENOME.grown(heads=3)
    assert record["cap"] == pytest.approx(9 * GENOME.capacity)
    assert {row["name"] for row in record["candidates"]} == {m.name for m in SPACE.moves(GENOME)}
    assert min(record["candidates"], key=lambda row: row["score"])["name"] == "heads"
    assert grower.arrive(arrival(2, 310))["candidates"] == []  # not enough for the next
    assert grower.genome == GENOME.grown(heads=3)


def test_a_part_of_a_supernet_is_the_candidate():
    """Before it is trained, the function of today; after it, the whole without what the part has not."""
    model = encoder(dtype=torch.float64)
    moves = [SPACE.move(GENOME, name) for name in ("image_depth", "shared_depth", "ffn", "heads", "head_dim")]
    whole = union([move.genome for move in moves])
    assert whole == GENOME.grown(depth=(2, 1, 2), ffn=40, heads=3, head_dim=16)
    large, _ = grow(model, whole, random(2))
    given = batch()
    with torch.no_grad():
        for move in moves:
            part = part_of(dict(large.named_parameters()), whole, move.genome)
            assert part.genome == move.genome
            for a, b in zip(part(*given[:2]), model(*given[:2]), strict=True):
                torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
        for parameter in large.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=random(8), dtype=torch.float64)
        part = part_of(dict(large.named_parameters()), whole, moves[2].genome)
        masked = DualEncoder.of(whole, {n: p.clone() for n, p in large.named_parameters()})
        for tower, block in ((t, b) for t in ("image", "text", "shared") for b in masked.stack(t)):
            block.out.weight.unflatten(1, (3, 16))[:, 2:].zero_()  # the third head
            block.out.weight.unflatten(1, (3, 16))[:, :, 8:].zero_()  # the larger heads
            block.qkv.weight.unflatten(0, (3, 3, 16))[0, :, 8:].zero_()
            block.qkv.bias.unflatten(0, (3, 3, 16))[0, :, 8:].zero_()
            if tower != "text" and block is masked.stack(tower)[1]:
                for name in ("out.weight", "out.bias", "down.weight", "down.bias"):
                    block.get_parameter(name).zero_()
        for a, b in zip(part(*given[:2]), masked(*given[:2]), strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    loss = part_loss(large, DualEncoder(moves[2].genome, None), given)
    assert loss.item() == pytest.approx(loss_of(part, given).item())
    assert set(sliced(values(large), whole, GENOME)) == set(values(model))
    with pytest.raises(ValueError, match="differ in depth"):
        union([GENOME, GENOME.grown(width=32)])


@pytest.mark.parametrize(
    ("engine", "recycle", "kept"),
    [("independent", None, False), ("independent", True, True), ("supernet", None, True), ("supernet", False, False)],
)
def test_what_a_candidate_learned_is_kept_if_it_is_recycled(engine, recycle, kept):
    few = {"image_depth": None, "text_depth": None, "head_dim": None, "width": None}
    grower = learner(engine=engine, recycle=recycle, momentum=1.0, **few)
    grower.arrive(arrival(0, 100))
    learn(grower, 0)
    before = grower.model
    grower.arrive(arrival(1, 400))
    given = batch()
    with torch.no_grad():
        changed = float((before.encode_image(given.images) - grower.model.encode_image(given.images)).abs().max())
    assert grower.genome != GENOME
    assert (changed > 1e-4) == kept


def test_measured_time_is_a_cost():
    grower = learner(cost="time", cost_weight=None, width=None, image_depth=None, text_depth=None)
    grower.arrive(arrival(0, 100))
    record = grower.arrive(arrival(1, 400))
    assert all(0 < row["cost"] < 10 for row in record["candidates"])
    assert record["cost_weight"] >= 0


GROWTHS = [
    {"inheritance": "mix"},
    {"inheritance": "ema", "ema_decays": (0.9,), "neurons": "duplicate"},
    {"inheritance": "mix", "optimizer_state": "carry"},
]


@pytest.mark.parametrize("settings", GROWTHS, ids=["mix", "ema", "carry"])
def test_a_saved_learner_continues_as_if_nothing_had_happened(settings):
    path = ("ffn", "heads+image_depth", "head_dim", "shared_depth")
    grower = learner(choice="path", path=path, **settings)
    for part, pairs in enumerate((100, 200, 300, 400)):
        grower.arrive(arrival(part, pairs, vocabulary=30 + 2 * part))
        learn(grower, part, steps=1)
    assert [record["chosen"] for record in grower.history] == [HOLD, *path[:3]]
    file = io.BytesIO()
    torch.save(grower.state_dict(), file)
    file.seek(0)
    again = learner(choice="path", path=path, **settings)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.genome == grower.genome == GENOME.grown(ffn=40, heads=3, head_dim=16, depth=(2, 1, 1), vocabulary=36)
    given = batch()
    for _ in range(2):
        with torch.no_grad():
            pairs = zip(grower.model(*given[:2]), again.model(*given[:2]), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        for one in (grower, again):
            learn(one, 7)
            one.arrive(arrival(4, 500, vocabulary=40))
            learn(one, 8)
    assert_equal(values(grower.model), values(again.model))
    assert grower.history == again.history
    with pytest.raises(ValueError, match="of seed 3, not of 4"):
        GrowClip(QUICK, GENOME, seed=4).load_state_dict(grower.state_dict())


def test_moments_are_carried_into_inherited_places():
    before = Training(encoder(), Optimisation(), steps=10)
    for seed in range(3):
        before.learn(batch(seed=seed))
    model, slots = before.model.grow(SPACE.move(GENOME, "heads+image_depth"), random(2))
    after = Training(model, Optimisation(), steps=10)
    after.carry(before, slots)
    old, new = before._moments(), after._moments()
    grown = 0
    for name, (mean, square, count) in new.items():
        found = slots[name]
        if found.source is None:
            assert not mean.any()
            assert not square.any()
            assert count == 0
            continue
        kept, source = found.inherited, found.index[found.inherited]
        assert torch.equal(mean[kept], old[found.source][0].flatten()[source])
        assert torch.equal(square[kept], old[found.source][1].flatten()[source])
        assert count == 3
        if not bool(kept.all()):
            assert not mean[~kept].any()
            torch.testing.assert_close(square[~kept], square[kept].mean().expand_as(square[~kept]))
            grown += 1
    assert grown == 11  # the new block too, which has more heads by then
    gone = [weakref.ref(p) for p in before.parameters]
    del before, old
    gc.collect()
    assert all(ref() is None for ref in gone)
    assert after.learn(batch())["loss/contrastive"].isfinite()


def test_the_loss_of_held_out_pairs_does_not_depend_on_the_training_batch():
    losses = []
    for size in (4, 8):
        grower = learner(proxy_steps=1)
        trained = arrival(0, 100, size=size)
        assert {len(b.images) for b in trained.proxy_batches(1, 3)} == {size}
        part = replace(trained, validation=arrival(0, 100).validation)
        losses.append(validation_loss(grower.model, part.validation()))
    assert losses[0] == losses[1]


def test_choices_without_a_search():
    """Baselines: a model that stays, one that grows at random, one that follows a path, one that begins anew."""
    tried = {}
    for name, settings in {
        "fixed": {"choice": "fixed"},
        "random": {"choice": "random"},
        "path": {"choice": "path", "path": ("ffn",)},
        "scratch": {"choice": "path", "path": ("ffn",), "inheritance": "scratch"},
        "frozen": {"budget_exponent": 0.0},
    }.items():
        grower = learner(**settings)
        for part, pairs in enumerate((100, 400)):
            grower.arrive(arrival(part, pairs))
            learn(grower, part)
        tried[name] = grower
    assert tried["fixed"].genome == tried["frozen"].genome == GENOME
    assert tried["random"].genome != GENOME
    assert tried["path"].genome == tried["scratch"].genome == GENOME.grown(ffn=40)
    assert tried["path"].size["flops"] == 16 * (GENOME.flops + GENOME.grown(ffn=40).flops)
    assert all(grower.history[1]["candidates"] == [] for grower in tried.values())
    scratch = values(tried["scratch"].model)["tokens"]
    assert (scratch - values(tried["path"].model)["tokens"]).abs().mean() > 0.01


def test_shrink_and_perturb_is_mixing_without_growth_and_scratch_begins_anew_where_it_holds():
    for settings, changes in (({"mix_on_hold": True}, True), ({"inheritance": "scratch"}, True), ({}, False)):
        grower = learner(choice="path", **settings)
        grower.arrive(arrival(0, 100))
        learn(grower, 0)
        before = values(grower.model)
        grower.arrive(arrival(1, 400))
        assert torch.equal(before["tokens"], values(grower.model)["tokens"]) != changes


def test_proxies_see_the_same_random_numbers():
    grower = learner(momentum=0.5)
    grower.arrive(arrival(0, 100))
    heads, _ = grower._grown(1, SPACE.move(GENOME, "heads"))
    depth, _ = grower._grown(1, SPACE.move(GENOME, "image_depth"))
    assert torch.equal(heads.tokens, depth.tokens)
    assert torch.equal(heads.shared_blocks[0].up.weight, depth.shared_blocks[0].up.weight)
    other, _ = grower._grown(2, SPACE.move(GENOME, "heads"))
    assert not torch.equal(heads.tokens, other.tokens)
    seen = []
    part = replace(arrival(1, 400), proxy_batches=lambda seed, steps: (seen.append(seed), [batch()])[1])
    grower._try(part, SPACE.moves(GENOME)[:2])
    assert seen[0] == seen[1]
    assert search.independent is ENGINES["independent"]
    assert supernet is ENGINES["supernet"]
    assert Proxy(steps=1, seeds=(1,), cost="flops", optimisation=QUICK).seeds == (1,)
