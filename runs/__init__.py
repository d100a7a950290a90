"""Runs: how an experiment runs, from the command line to the report.

Here belongs what surrounds learning: the command line and its presets, the loops that join an environment or a data
set to an agent or a strategy, checkpoint and exact resume, the record (one table of numbers, TensorBoard beside it),
the statistics and the report computed from that table, videos, progress, sweeps, and the doctor that tests an
installation. Nothing here knows how an agent learns; nothing below this room knows where a number is written.
"""
