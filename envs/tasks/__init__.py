"""Native tasks: one small class each, pure array functions over rows.

A task of `mujoco.batch` says which simulator fields it reads and how they become observation, reward and termination,
and how an episode starts. The functions take the array namespace as an argument, so the same code runs in NumPy and in
torch. Those of `classic_control` contain their simulation.
"""
