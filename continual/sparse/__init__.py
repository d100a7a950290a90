"""Sparse sub-networks of one dense network: how many weights each layer gets, which they are, how they move, who owns
them. `continual.strategies.dst` puts these together.
"""
