"""Gymnasium's classic control tasks (gymnasium.farama.org), one small class each.

Equal to the reference given the same seeds and actions, observations and rewards bit for bit
(tests/envs/test_classic_control.py): expressions keep the reference's order of operations, and functions are those it
calls. A task is written once for a number and for an array: one row is computed in Python's own numbers, which take a
tenth of the time of arrays of one, and N rows in NumPy.
"""

from envs.tasks.classic_control.acrobot import Acrobot
from envs.tasks.classic_control.cart_pole import CartPole
from envs.tasks.classic_control.mountain_car import MountainCar, MountainCarContinuous
from envs.tasks.classic_control.pendulum import Pendulum
from envs.tasks.classic_control.task import ClassicTask

TASKS: dict[str, type[ClassicTask]] = {
    "gym/Acrobot-v1": Acrobot,
    "gym/CartPole-v1": CartPole,
    "gym/MountainCar-v0": MountainCar,
    "gym/MountainCarContinuous-v0": MountainCarContinuous,
    "gym/Pendulum-v1": Pendulum,
}
