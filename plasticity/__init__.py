"""Plasticity: what measures the ability to learn, and what keeps it.

Here belong Normalize-and-Project and the other interventions, optimisers, diagnostics, the non-stationary supervised
problems, the probe and the harness. Both `agents` and `continual` use this room. It knows networks and tensors, not
environments, and imports neither of them.
"""
