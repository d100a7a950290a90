"""Hypernetworks: what generates the weights of another network, and that network as a function of them.

A generator owns no numbers. Its parameters are a dict [K, *shape] by name, handed in with every call, so that weights
can be made from parameters of another time: h(e, θ) is a function of both.
"""
