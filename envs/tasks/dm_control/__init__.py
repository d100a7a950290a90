"""DeepMind Control Suite tasks (Tassa et al. 2018, arXiv:1801.00690; Tunyasuvunakool et al. 2020, arXiv:2006.12983).

All tasks of the suite but quadruped-escape, one module a domain. That one draws a terrain for each episode; the engine
can give every simulation its own values of many model fields, but height fields are not among them, so that it stays
with the fallback. Equal to dm_control, observations bit for bit, given the same seeds and actions
(tests/envs/test_mujoco_dm_control.py). Observations are the reference's entries, flattened in their order. Only the
linear-quadratic regulator terminates; every other episode is truncated. The models are the reference's files, edited
here as it edits them: its own functions are in a package that starts OpenGL when it is imported.
Quirks kept: derived fields are up to date in position and velocity after a step, but forces and touch lag by one
simulator step; an episode begins with two forward passes without actuation, which leave the solver's warm start.
"""

from __future__ import annotations

from typing import Any

from envs.tasks.dm_control.acrobot import Acrobot
from envs.tasks.dm_control.ball_in_cup import BallInCup
from envs.tasks.dm_control.base import ControlTask
from envs.tasks.dm_control.cartpole import Cartpole
from envs.tasks.dm_control.cheetah import Cheetah
from envs.tasks.dm_control.dog import Dog, DogFetch
from envs.tasks.dm_control.finger import FingerSpin, FingerTurn
from envs.tasks.dm_control.fish import FishSwim, FishUpright
from envs.tasks.dm_control.hopper import Hopper
from envs.tasks.dm_control.humanoid import Humanoid, HumanoidCMU
from envs.tasks.dm_control.lqr import LinearQuadraticRegulator
from envs.tasks.dm_control.manipulator import Manipulator
from envs.tasks.dm_control.pendulum import Pendulum
from envs.tasks.dm_control.point_mass import PointMass, PointMassRandomGains
from envs.tasks.dm_control.quadruped import QuadrupedFetch, QuadrupedMove
from envs.tasks.dm_control.reacher import Reacher
from envs.tasks.dm_control.stacker import Stacker
from envs.tasks.dm_control.swimmer import Swimmer
from envs.tasks.dm_control.walker import Walker

TASKS: dict[str, tuple[type[ControlTask], dict[str, Any]]] = {
    "dmc/acrobot-swingup": (Acrobot, {}),
    "dmc/acrobot-swingup_sparse": (Acrobot, {"sparse": True}),
    "dmc/ball_in_cup-catch": (BallInCup, {}),
    "dmc/cartpole-balance": (Cartpole, {"swing_up": False}),
    "dmc/cartpole-balance_sparse": (Cartpole, {"swing_up": False, "sparse": True}),
    "dmc/cartpole-swingup": (Cartpole, {}),
    "dmc/cartpole-swingup_sparse": (Cartpole, {"sparse": True}),
    "dmc/cartpole-two_poles": (Cartpole, {"num_poles": 2}),
    "dmc/cartpole-three_poles": (Cartpole, {"num_poles": 3}),
    "dmc/cheetah-run": (Cheetah, {}),
    "dmc/dog-stand": (Dog, {}),
    "dmc/dog-walk": (Dog, {"move_speed": 1.0}),
    "dmc/dog-trot": (Dog, {"move_speed": 3.0}),
    "dmc/dog-run": (Dog, {"move_speed": 9.0}),
    "dmc/dog-fetch": (DogFetch, {}),
    "dmc/finger-spin": (FingerSpin, {}),
    "dmc/finger-turn_easy": (FingerTurn, {"target_radius": 0.07}),
    "dmc/finger-turn_hard": (FingerTurn, {"target_radius": 0.03}),
    "dmc/fish-upright": (FishUpright, {}),
    "dmc/fish-swim": (FishSwim, {}),
    "dmc/hopper-stand": (Hopper, {"hopping": False}),
    "dmc/hopper-hop": (Hopper, {}),
    "dmc/humanoid-stand": (Humanoid, {"move_speed": 0.0}),
    "dmc/humanoid-walk": (Humanoid, {"move_speed": 1.0}),
    "dmc/humanoid-run": (Humanoid, {"move_speed": 10.0}),
    "dmc/humanoid-run_pure_state": (Humanoid, {"move_speed": 10.0, "pure_state": True}),
    "dmc/humanoid_CMU-stand": (HumanoidCMU, {"move_speed": 0.0}),
    "dmc/humanoid_CMU-walk": (HumanoidCMU, {"move_speed": 1.0}),
    "dmc/humanoid_CMU-run": (HumanoidCMU, {"move_speed": 10.0}),
    "dmc/lqr-lqr_2_1": (LinearQuadraticRegulator, {"n_bodies": 2, "n_actuators": 1}),
    "dmc/lqr-lqr_6_2": (LinearQuadraticRegulator, {"n_bodies": 6, "n_actuators": 2}),
    "dmc/manipulator-bring_ball": (Manipulator, {}),
    "dmc/manipulator-bring_peg": (Manipulator, {"use_peg": True}),
    "dmc/manipulator-insert_ball": (Manipulator, {"insert": True}),
    "dmc/manipulator-insert_peg": (Manipulator, {"use_peg": True, "insert": True}),
    "dmc/pendulum-swingup": (Pendulum, {}),
    "dmc/point_mass-easy": (PointMass, {}),
    "dmc/point_mass-hard": (PointMassRandomGains, {}),
    "dmc/quadruped-walk": (QuadrupedMove, {"desired_speed": 0.5}),
    "dmc/quadruped-run": (QuadrupedMove, {"desired_speed": 5.0}),
    "dmc/quadruped-fetch": (QuadrupedFetch, {}),
    "dmc/reacher-easy": (Reacher, {"target_size": 0.05}),
    "dmc/reacher-hard": (Reacher, {"target_size": 0.015}),
    "dmc/stacker-stack_2": (Stacker, {"n_boxes": 2}),
    "dmc/stacker-stack_4": (Stacker, {"n_boxes": 4}),
    "dmc/swimmer-swimmer6": (Swimmer, {"n_links": 6}),
    "dmc/swimmer-swimmer15": (Swimmer, {"n_links": 15}),
    "dmc/walker-stand": (Walker, {"move_speed": 0.0}),
    "dmc/walker-walk": (Walker, {"move_speed": 1.0}),
    "dmc/walker-run": (Walker, {"move_speed": 8.0}),
}
