"""Mixtures of data by whole episodes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agents.offline.transitions import Transitions
from runs.datasets.dataset import chosen_episodes, joined

UNITS = ("transitions", "episodes", "fraction")


def mix(parts: Sequence[tuple[Transitions, float]], unit: str, seed: int) -> tuple[Transitions, np.ndarray]:
    """Data of all components, and which one each transition is of, int64 [N].

    parts: components with their amounts, in transitions, in episodes, or as fractions of the result, which is then as
    large as the components allow. Whole episodes are drawn without replacement, in an order that the seed decides,
    until the amount is reached. Raises ValueError for an unknown unit, amounts that are not positive, fractions that do
    not add up to 1, or a component that has not enough.
    """
    if unit not in UNITS:
        raise ValueError(f"unknown unit '{unit}', it is one of {', '.join(UNITS)}")
    if not parts or min(amount for _, amount in parts) <= 0:
        raise ValueError("a mixture needs components, each with an amount above 0")
    amounts = [amount for _, amount in parts]
    wholes = [int(data.lengths[data.whole].sum()) for data, _ in parts]
    if unit == "fraction":
        if abs(sum(amounts) - 1) > 1e-6:
            raise ValueError(f"the fractions of a mixture must add up to 1, got {sum(amounts):g}")
        total = min(whole / amount for whole, amount in zip(wholes, amounts, strict=True))
        amounts = [amount * total for amount in amounts]
    chosen = [
        _drawn(number, data, amount, unit, np.random.default_rng((seed, number)))
        for number, ((data, _), amount) in enumerate(zip(parts, amounts, strict=True))
    ]
    labels = [np.full(len(part), number) for number, part in enumerate(chosen)]
    return joined(chosen), np.concatenate(labels)


def _drawn(number: int, data: Transitions, amount: float, unit: str, generator: np.random.Generator) -> Transitions:
    whole = data.whole.nonzero().flatten().numpy()
    order = generator.permutation(whole)
    sizes = np.ones(len(order)) if unit == "episodes" else data.lengths.numpy()[order]
    reached = np.flatnonzero(np.cumsum(sizes) >= amount * (1 - 1e-9))
    if not len(reached):
        what = "episodes" if unit == "episodes" else "transitions"
        raise ValueError(f"component {number} has {int(sizes.sum())} {what} in whole episodes, {amount:g} are wanted")
    return chosen_episodes(data, order[: reached[0] + 1].tolist())
