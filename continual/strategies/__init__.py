"""Strategies: one file each, and each is its `observe`: what it stores, what it adds to the loss, when it changes."""
