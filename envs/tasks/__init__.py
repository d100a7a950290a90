"""Native tasks for `mujoco.batch`: one small class each, pure array functions over rows of simulations.

A task says which simulator fields it reads and how they become observation, reward and termination, and how an episode
starts. The functions take the array namespace as an argument, so the same code runs in NumPy and in torch.
"""
