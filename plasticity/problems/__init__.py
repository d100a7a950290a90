"""Streams of tasks on which plasticity is lost: data sets, what changes, the published settings by name."""
