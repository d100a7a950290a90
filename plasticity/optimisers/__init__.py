"""Optimisers that keep networks plastic, one file a method: each can `propose` a step, then `apply` a part of it.

Each works on ordinary parameters and, with `stacked=True`, on a population (`networks.stacked`), whose members it
treats as if each were alone: norms, maxima, projections and statistics are per member.
"""
