"""What a learner of several tasks, one after the other, keeps of the old ones and brings to the new ones.

Notation: R[i][j], return on task j after visit i = 1 ... V to a task; R[0][j], of the untrained networks; t(i), the
task of visit i; l(j), the last visit to task j so far. With tasks visited once, in order, t(i) = i and these are the
published definitions, with returns (or normalised scores) in place of accuracies. Only tasks that were visited count.

    average return    mean_j R[V][j]                                              Chaudhry et al. 2018, eq. 2
    forgetting        mean_{j: l(j) < V} (max_{first visit <= i < V} R[i][j] - R[V][j])                     eq. 3
    bwt               mean_{j: l(j) < V} (R[V][j] - R[l(j)][j])          Lopez-Paz & Ranzato 2017, section 2
    fwt               mean_{i > 1, first visit to j = t(i)} (R[i-1][j] - R[0][j])               ibid., section 2
    transfer          mean over visits of (AUC - AUC_scratch)                 Wołczyk et al. 2021, section 3, unscaled
    transfer, scores  mean over visits of (AUC - AUC_scratch) / (1 - AUC_scratch)                           ibid.

AUC: mean over the steps of a visit of the return on its task, by the trapezoid rule; AUC_scratch the same of a run that
learns the task from scratch in as many steps. Chaudhry: arXiv:1801.10112; Lopez-Paz: arXiv:1706.08840; Wołczyk:
arXiv:2105.10919.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Matrix = Sequence[Sequence[float]]  # [V + 1, T], returns or scores


def average_return(matrix: Matrix, visits: Sequence[int]) -> float:
    """Over the tasks that were visited, after the last visit. visits [V]: the task of each."""
    return float(np.mean([matrix[-1][task] for task in sorted(set(visits))]))


def forgetting(matrix: Matrix, visits: Sequence[int]) -> float | None:
    """How much lower the returns on earlier tasks are now than at their best, since they were learnt; None without one.

    Negative where a task was never done better than now.
    """
    lost = [
        max(row[task] for row in matrix[visits.index(task) + 1 : -1]) - matrix[-1][task] for task in _earlier(visits)
    ]
    return float(np.mean(lost)) if lost else None


def backward_transfer(matrix: Matrix, visits: Sequence[int]) -> float | None:
    """How much the returns on earlier tasks have changed since their last visit; None without an earlier task."""
    changes = [matrix[-1][task] - matrix[_last_visit(visits, task)][task] for task in _earlier(visits)]
    return float(np.mean(changes)) if changes else None


def forward_transfer(matrix: Matrix, visits: Sequence[int]) -> float | None:
    """How much better a task is done before its first visit than by the untrained networks; None for a single task."""
    gains = [
        matrix[before][task] - matrix[0][task]
        for before, task in enumerate(visits)
        if before > 0 and task not in visits[:before]
    ]
    return float(np.mean(gains)) if gains else None


def mean_over_steps(curve: Sequence[tuple[int, float]]) -> float | None:
    """The area under (step, return) pairs, steps increasing, by the trapezoid rule, over its width; None of a point."""
    if len(curve) < 2:
        return None
    steps, returns = (np.array(column, dtype=np.float64) for column in zip(*curve, strict=True))
    return float(np.trapezoid(returns, steps) / (steps[-1] - steps[0]))


def transfer(areas: Sequence[float], scratch: Sequence[float]) -> float:
    """Mean difference of the areas under the curves of visits and of learning from scratch, [V] each."""
    return float(np.mean(np.subtract(areas, scratch)))


def scaled_transfer(areas: Sequence[float], scratch: Sequence[float]) -> float | None:
    """The same of scores, as a share of what was left to gain; None where from scratch all is gained at once."""
    room = 1 - np.asarray(scratch, dtype=np.float64)
    return float(np.mean(np.subtract(areas, scratch) / room)) if (room > 0).all() else None


def measures(matrix: Matrix, visits: Sequence[int]) -> Mapping[str, float]:
    """The first four by their names, those that are defined."""
    found = {
        "average_return": average_return(matrix, visits),
        "forgetting": forgetting(matrix, visits),
        "bwt": backward_transfer(matrix, visits),
        "fwt": forward_transfer(matrix, visits),
    }
    return {name: value for name, value in found.items() if value is not None}


def _earlier(visits: Sequence[int]) -> list[int]:
    """The tasks visited, but for the one of the last visit."""
    return sorted(set(visits) - {visits[-1]})


def _last_visit(visits: Sequence[int], task: int) -> int:
    return len(visits) - 1 - list(reversed(visits)).index(task) + 1
