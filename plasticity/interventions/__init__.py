"""Interventions that keep networks plastic, one file a family: what their paper calls it, with its source's defaults.

Each is a dataclass of settings with the hooks of `plasticity.intervention.Intervention`; statistics are made in
`begin`. All of it is per member of a population. `plasticity.registry` knows them by name and how they combine.
"""
