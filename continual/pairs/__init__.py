"""Pairs of images and captions: where they come from, their words, how they arrive, how batches are drawn.

What learns from them is in `continual.growth`; what is measured on them is `evaluation.py`.
"""
