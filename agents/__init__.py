"""Agents: what acts in environments and learns from reward.

Here belongs one file for each agent (hyper-parameters, networks, pure losses, `act`, `observe`, `update`), the replay
ring that they share, and the network layers that more than one of them uses. An agent never logs, never touches files
and never asks which environment it is in. This room may import `plasticity` and `envs`.
"""

# The modules that offer `Config` and `Agent`, by the names that users know.
NAMES = ("beer", "crossq", "ddpg", "dqn", "ppo", "qrdqn", "rainbow", "sac", "symphony", "td3", "td7")

# And those that learn from fixed data, modules of `agents.offline`.
OFFLINE_NAMES = ("a2pr", "bc", "cql", "iql", "rebrac", "td3_bc")
