"""Interventions by name: settings, order, what does not go together, and what users mistype."""

from __future__ import annotations

import pytest

from plasticity.intervention import by_stage
from plasticity.interventions.cbp import CBP
from plasticity.interventions.redo import ReDo
from plasticity.interventions.resets import Reset
from plasticity.registry import INTERVENTIONS, REASONS, arms, make, names, summary


@pytest.mark.parametrize("name", names())
def test_every_name_makes_one_with_a_summary(name):
    assert len(make(name)) == (0 if name == "none" else 1)
    assert len(summary(name)) > 10


def test_settings_are_read_by_their_annotations():
    made = make("redo(threshold=0.1, every=100) + weight-clip(clip_last=false,bound=initial) , l2(hidden=none)")
    assert made[0] == ReDo(threshold=0.1, every=100)
    assert made[1].hidden is None
    assert (made[2].clip_last, made[2].bound) == (False, "initial")
    assert make("cbp(rate=1e-05,utility=weight)") == [CBP(rate=1e-5, utility="weight")]
    assert make("fresh") == [Reset()]
    assert make("reset-last(layers=2)") == [Reset(part="last", layers=2)]


def test_they_act_in_the_order_decay_reset_clip_project():
    made = make("weight-clip+shrink-perturb-step+weight-decay+redo")
    assert [type(i).__name__ for i in made] == ["WeightDecay", "ShrinkPerturbStep", "ReDo", "WeightClip"]


def test_projected_weights_do_not_decay_unless_one_says_so():
    """Specification 1.2, item 8."""
    assert make("l2")[0].hidden is None
    assert [i.hidden for i in make("nap+l2+weight-decay+adamw")[:3]] == [False] * 3
    assert make("nap+l2(hidden=true)")[0].hidden is True
    assert make("nap(project=false)+l2")[0].hidden is None


def test_normalisers_are_put_in_last():
    assert [type(i).__name__ for i in make("ln+crelu")] == ["WithCReLU", "Normalise"]


def test_arms_are_separated_by_commas():
    assert arms("none, l2-init,redo(threshold=0.1,every=5)+l2") == ["none", "l2-init", "redo(threshold=0.1,every=5)+l2"]
    with pytest.raises(ValueError, match="'rodo'"):
        arms("none,rodo")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rodo", "no intervention 'rodo'; did you mean 'redo'"),
        ("xyzzy", "there are none, l2"),
        ("redo(treshold=1)", "'redo' has no setting 'treshold'; did you mean 'threshold'"),
        ("reset-head(part=all)", "'reset-head' has no setting 'part'"),
        ("redo(every=often)", "every of redo must be a whole number, got often"),
        ("redo(every=0)", "every of redo must be at least 1"),
        ("redo(reset_steps=maybe)", "must be true or false"),
        ("cbp(rate=2)", "rate of cbp must be between 0 and 1"),
        ("cbp(utility=size)", "utility of cbp must be contribution or"),
        ("activation(kind=step)", "kind of activation"),
        ("redo(every)", "'every' in 'redo.every.' is not a setting"),
        ("redo(every=1", "not a list of interventions"),
        ("", "not a list of interventions"),
        ("l2++redo", "not a list of interventions"),
        ("redo+cbp", REASONS["units"]),
        ("cbp+reset-last", REASONS["whole"]),
        ("injection+redo", REASONS["head"]),
        ("crelu+leaky-relu", REASONS["nonlinearity"]),
        ("l2+l2", "same one twice"),
        ("adamp+muon", REASONS["optimiser"]),
        ("nap+lipschitz", REASONS["scale"]),
        ("nap+ln", REASONS["normaliser"]),
        ("nap(schedule=linear)", "schedule of nap cannot be written as text"),
        ("none+l2", "none means no"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(text, message):
    with pytest.raises(ValueError, match=message.replace("(", "[(]").replace(")", "[)]")) as caught:
        make(text)
    assert "\n" not in str(caught.value)


def test_what_goes_together_is_let_through():
    assert len(make("redo+reset-head+l2-init+hare-tortoise+adamw+crelu")) == 6


def test_interventions_act_in_the_order_of_their_stages():
    made = make("nap+weight-clip+redo+weight-decay")
    assert [i.stage for i in made] == ["decay", "reset", "clip", "project"]
    first, second = make("l2"), make("redo")
    assert by_stage([*make("nap"), *first, *second])[:2] == [*first, *second]


def test_reasons_are_given_for_all_that_is_taken():
    assert {thing for entry in INTERVENTIONS.values() for thing in entry.takes} <= REASONS.keys()
