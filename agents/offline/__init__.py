"""Offline agents: those that learn from a fixed dataset (A2PR, BC, TD3+BC, IQL, CQL, ReBRAC).

Here belongs one file for each, with the same contract as the online agents; their data arrive in the same replay ring.
"""
