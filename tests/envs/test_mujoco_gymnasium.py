"""The native Gymnasium v5 tasks are Gymnasium's, bit for bit."""

import pytest
from mujoco_parity import GymnasiumReference, assert_equal_to_reference

from envs.tasks.gymnasium_v5 import TASKS


@pytest.mark.parametrize("env_id", TASKS)
def test_equal_to_gymnasium_over_many_episodes(env_id):
    totals = assert_equal_to_reference(env_id, GymnasiumReference, seeds=(11, 18, 25), steps=1100)
    assert totals.episodes >= 3
    assert totals.rewards > 1000.0


@pytest.mark.parametrize(
    ("env_id", "settings"),
    [
        ("mujoco/HalfCheetah-v5", {"frame_skip": 2, "forward_reward_weight": 3.0, "ctrl_cost_weight": 0.7}),
        ("mujoco/Hopper-v5", {"terminate_when_unhealthy": False, "reset_noise_scale": 0.2}),
        ("mujoco/Hopper-v5", {"healthy_state_range": (-4.0, 3.0), "healthy_reward": 0.25}),
        ("mujoco/Walker2d-v5", {"healthy_z_range": (1.1, 1.3), "healthy_angle_range": (-0.2, 0.05)}),
        ("mujoco/Ant-v5", {"contact_force_range": (-0.2, 3.0), "main_body": 2, "healthy_z_range": (0.4, 0.9)}),
        ("mujoco/Humanoid-v5", {"contact_cost_weight": 1e-3, "contact_cost_range": (1.0, 2.0), "healthy_reward": 2.0}),
    ],
)
def test_settings_mean_what_they_mean_in_gymnasium(env_id, settings):
    assert_equal_to_reference(env_id, GymnasiumReference, seeds=(4,), steps=150, **settings)


@pytest.mark.parametrize("settings", [{"reset_noise_scale": -0.1}, {"frame_skip": 0}, {"max_episode_steps": 0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        TASKS["mujoco/Ant-v5"](**settings)
