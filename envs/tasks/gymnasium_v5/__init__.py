"""Gymnasium's MuJoCo tasks, version 5 (Towers et al. 2024, arXiv:2407.17032; gymnasium.farama.org).

Equal to the reference given the same seeds and actions, observations bit for bit (tests/envs/test_mujoco_gymnasium.py).
The fields are the settings of the reference's constructors, under the same names and with the same defaults. Left out
are those of drawing, and `uph_cost_weight` of HumanoidStandup, which the reference takes and does not use.
Quirks kept: derived fields lag the state by one simulator step or Runge-Kutta stage, so the rewards of Ant and Humanoid
compare body positions that lag, and the arms of Reacher and Pusher are rewarded where they just were; contact forces
are 0 in the first observation of an episode.
"""

from envs.tasks.gymnasium_v5.arm import Pusher, Reacher
from envs.tasks.gymnasium_v5.locomotion import Ant, HalfCheetah, Hopper, Humanoid, HumanoidStandup, Swimmer, Walker2d
from envs.tasks.gymnasium_v5.pendulum import InvertedDoublePendulum, InvertedPendulum
from envs.tasks.gymnasium_v5.task import GymnasiumTask

TASKS: dict[str, type[GymnasiumTask]] = {
    "mujoco/HalfCheetah-v5": HalfCheetah,
    "mujoco/Hopper-v5": Hopper,
    "mujoco/Walker2d-v5": Walker2d,
    "mujoco/Ant-v5": Ant,
    "mujoco/Humanoid-v5": Humanoid,
    "mujoco/HumanoidStandup-v5": HumanoidStandup,
    "mujoco/InvertedPendulum-v5": InvertedPendulum,
    "mujoco/InvertedDoublePendulum-v5": InvertedDoublePendulum,
    "mujoco/Reacher-v5": Reacher,
    "mujoco/Pusher-v5": Pusher,
    "mujoco/Swimmer-v5": Swimmer,
}
