"""The published protocols, number by number, and what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

import envs
from envs.atari_settings import PROTOCOLS, Settings, choose

PICTURE = {"frame_skip": 4, "clip_rewards": True, "grayscale": True, "image_size": 84, "frame_stack": 4}


@pytest.mark.parametrize(
    ("protocol", "published"),
    [
        # ale_py's own registration of the v5 ids
        ("v5", {"sticky_actions": 0.25, "full_action_set": False, "noop_max": 0, "life_loss_terminates": False}),
        # Machado et al. 2018
        ("machado", {"sticky_actions": 0.25, "full_action_set": True, "noop_max": 0, "life_loss_terminates": False}),
        # Mnih et al. 2015: five minutes at 60 frames a second
        ("classic", {"sticky_actions": 0.0, "full_action_set": False, "noop_max": 30, "life_loss_terminates": True}),
        # SPR: a horizon of 27 000 actions
        ("atari-100k", {"sticky_actions": 0.0, "full_action_set": False, "noop_max": 30, "life_loss_terminates": True}),
    ],
)
def test_protocols_are_the_published_ones(protocol, published):
    settings = choose(protocol)
    frames = 5 * 60 * 60 if protocol == "classic" else 30 * 60 * 60
    expected = {"protocol": protocol, "max_frames": frames, "fire_on_reset": False, **PICTURE, **published}
    assert asdict(settings) == {**expected, "reseed_after": settings.reseed_after}
    assert settings.horizon == {"classic": 4_500}.get(protocol, 27_000)


def test_v5_is_what_ale_registers():
    import ale_py
    import gymnasium

    gymnasium.register_envs(ale_py)
    registered = gymnasium.spec("ALE/Pong-v5").kwargs
    assert registered["repeat_action_probability"] == Settings().sticky_actions
    assert registered["full_action_space"] == Settings().full_action_set
    assert registered["frameskip"] == Settings().frame_skip
    assert registered["max_num_frames_per_episode"] == Settings().max_frames


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_protocol_is_played_and_recorded(protocol):
    runner = envs.make("atari/Pong", 1, protocol=protocol, max_frames=40)
    assert runner.action_spec.count == (18 if protocol == "machado" else 6)
    assert runner.spec.settings == asdict(choose(protocol, max_frames=40))
    assert runner.spec.settings["protocol"] == protocol
    assert runner.spec.horizon == 10
    assert json.loads(json.dumps(runner.spec.settings)) == runner.spec.settings  # as a run records it
    runner.reset()
    for step in range(1, 21):
        assert bool(runner.step(torch.zeros(1, dtype=torch.int64)).truncated) == (step % 10 == 0)
    runner.close()


def test_single_settings_override_the_protocol():
    settings = choose("classic", max_frames=108_000, life_loss_terminates=False)
    assert (settings.max_frames, settings.life_loss_terminates) == (108_000, False)
    assert (settings.noop_max, settings.sticky_actions) == (30, 0.0)


@pytest.mark.parametrize(
    ("given", "near"),
    [("machada", "machado"), ("Machado", "machado"), ("atari100k", "atari-100k"), ("v4", "v5"), ("klassik", "classic")],
)
def test_an_unknown_protocol_names_the_nearest(given, near):
    with pytest.raises(ValueError, match=f"^unknown Atari protocol '{given}'; did you mean '{near}'\\?$"):
        envs.make("atari/Pong", 1, protocol=given)


@pytest.mark.parametrize("given", [None, 3, "", "?"])
def test_anything_else_is_no_protocol_either(given):
    with pytest.raises(ValueError, match="unknown Atari protocol"):
        choose(given)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sticky_actions": 1.0},
        {"sticky_actions": -0.1},
        {"sticky_actions": float("nan")},
        {"sticky_actions": "0.25"},
        {"sticky_actions": True},
        {"frame_skip": 0},
        {"frame_skip": 4.0},
        {"frame_skip": True},
        {"max_frames": 0},
        {"noop_max": -1},
        {"reseed_after": -1},
        {"frame_stack": 0},
        {"image_size": 0},
        {"image_size": (84, 84)},
        {"grayscale": 1},
        {"life_loss_terminates": "yes"},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"^{name} must be .*, got ") as error:
        choose("classic", **wrong)
    assert repr(value) in str(error.value)
