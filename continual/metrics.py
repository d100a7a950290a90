"""The metrics of continual learning, computed from an accuracy matrix; formulas and their sources.

R[..., i, j] is the accuracy, in [0, 1], on test task j after learning task i; T tasks, counted from 0 in code and from
1 in the formulas. Every function takes any axes in front (members, runs) and keeps them. A cell that was not measured
is nan, and so is what depends on it; what is not defined for the number of tasks is nan too, never 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def average_accuracy(matrix: Tensor, after: int = -1) -> Tensor:
    """A_k = 1/k Σ_{j ≤ k} R[k, j] (Lopez-Paz & Ranzato 2017; Chaudhry et al. 2018). after: task k, from 0."""
    k = after % matrix.shape[-1]
    return matrix[..., k, : k + 1].mean(-1)


def average_incremental_accuracy(matrix: Tensor) -> Tensor:
    """1/T Σ_k A_k: the mean of the average accuracies at the ends of tasks (Rebuffi et al. 2017; "Avg_Acc" in PCR)."""
    return torch.stack([average_accuracy(matrix, k) for k in range(matrix.shape[-1])]).mean(0)


def average_anytime_accuracy(evaluations: Tensor) -> Tensor:
    """Mean over evaluations at equal distances of the average accuracy on the tasks seen so far (Caccia et al. 2022).

    evaluations [..., n, T]: accuracies on each task, nan for those not seen yet.
    """
    return evaluations.nanmean(-1).mean(-1)


def forgetting(matrix: Tensor, after: int = -1) -> Tensor:
    """F_k = 1/(k-1) Σ_{j < k} (max_{j ≤ l < k} R[l, j] - R[k, j]), in [-1, 1] (Chaudhry et al. 2018). nan for one task.

    The paper's maximum is over l = 1 .. k - 1: the same wherever a task that was not learned yet has less accuracy.
    """
    k = after % matrix.shape[-1]
    return _mean([matrix[..., j:k, j].amax(-1) - matrix[..., k, j] for j in range(k)], matrix)


def forgetting_with_last_row(matrix: Tensor, over_all_tasks: bool) -> Tensor:
    """Never negative: Σ_j (max_{j ≤ l ≤ T} R[l, j] - R[T, j]) over T tasks, as in the code of RaptorMai and PCR
    (`over_all_tasks`), or over T - 1, as in Mammoth. For comparison with numbers that were made so.
    """
    tasks = matrix.shape[-1]
    lost = [matrix[..., j:, j].amax(-1) - matrix[..., -1, j] for j in range(tasks if over_all_tasks else tasks - 1)]
    return _mean(lost, matrix)


def forgetting_since_learned(matrix: Tensor) -> Tensor:
    """1/(T-1) Σ_{j < T} (R[j, j] - R[T, j]): stream forgetting as in Avalanche, the negative of `backward_transfer`."""
    return -backward_transfer(matrix)


def backward_transfer(matrix: Tensor, after: int = -1) -> Tensor:
    """BWT = 1/(k-1) Σ_{j < k} (R[k, j] - R[j, j]) (Lopez-Paz & Ranzato 2017). nan for one task."""
    k = after % matrix.shape[-1]
    return _mean([matrix[..., k, j] - matrix[..., j, j] for j in range(k)], matrix)


def forward_transfer(matrix: Tensor, untrained: Tensor) -> Tensor:
    """FWT = 1/(T-1) Σ_{j ≥ 2} (R[j-1, j] - b_j) (Lopez-Paz & Ranzato 2017). nan for one task.

    untrained [..., T]: b, accuracies of the network before any training. Raises ValueError for another shape.
    """
    if untrained.shape != matrix.shape[:-1]:
        raise ValueError(f"forward transfer needs b of shape {list(matrix.shape[:-1])}, got {list(untrained.shape)}")
    tasks = matrix.shape[-1]
    return _mean([matrix[..., j - 1, j] - untrained[..., j] for j in range(1, tasks)], matrix)


def learning_accuracy(matrix: Tensor) -> Tensor:
    """LA = 1/T Σ_k R[k, k]: how well each task is learned when it comes (Riemer et al. 2019)."""
    return matrix.diagonal(dim1=-2, dim2=-1).mean(-1)


def intransigence(matrix: Tensor, reference: Tensor) -> Tensor:
    """I_k = a*_k - R[k, k], its mean over tasks (Chaudhry et al. 2018).

    reference [..., T]: a*_k, accuracy on task k of a model trained jointly on tasks 1 .. k; the diagonal of the matrix
    of a `cumulative` run.
    """
    return (reference - matrix.diagonal(dim1=-2, dim2=-1)).mean(-1)


def minimum_accuracy(evaluations: Tensor, learned: Sequence[int]) -> Tensor:
    """min-ACC = 1/(T-1) Σ_{j < T} min_{n after task j} A(j, n), the worst of every old task (De Lange et al. 2023).

    evaluations [..., n, T], accuracies during learning. learned: for each evaluation, how many tasks were finished.
    """
    finished = torch.tensor(learned, device=evaluations.device)
    tasks = evaluations.shape[-1]
    worst = [evaluations[..., finished > j, j] for j in range(tasks - 1)]
    found = [values.amin(-1) if values.shape[-1] else evaluations.new_tensor(torch.nan) for values in worst]
    return _mean(found, evaluations)


def worst_case_accuracy(matrix: Tensor, evaluations: Tensor, learned: Sequence[int]) -> Tensor:
    """WC-ACC = 1/T R[T, T] + (1 - 1/T) min-ACC (De Lange et al. 2023)."""
    tasks = matrix.shape[-1]
    return matrix[..., -1, -1] / tasks + (1 - 1 / tasks) * minimum_accuracy(evaluations, learned)


def stability_gap(matrix: Tensor, evaluations: Tensor, learned: Sequence[int]) -> Tensor:
    """How deep old tasks fall while a new one is learned, and come back from: the mean over k > 1 and j < k of

        min(R[k-1, j], R[k, j]) - min_{n during task k} A(j, n),  at least 0

    De Lange et al. 2023 show the effect and name it; this number for it is ours: a loss that stays is forgetting, what
    is regained by the end of the task is the gap. evaluations, learned: as in `minimum_accuracy`.
    """
    finished = torch.tensor(learned, device=evaluations.device)
    gaps = []
    for k in range(1, matrix.shape[-1]):
        during = evaluations[..., finished == k, :]
        if during.shape[-2]:
            level = torch.minimum(matrix[..., k - 1, :k], matrix[..., k, :k])
            gaps.append((level - during[..., :k].amin(-2)).clamp(min=0).mean(-1))
    return _mean(gaps, matrix)


def diaz_rodriguez(matrix: Tensor) -> dict[str, Tensor]:
    """The averages over all cells of Díaz-Rodríguez et al. 2018 (arXiv:1810.13166), all tasks of weight one:

    A = mean of R[i, j] over i ≥ j; BWT = mean of R[i, j] - R[j, j] over i > j; BWT+ = max(BWT, 0); REM = 1 - |min(BWT,
    0)|; FWT = mean of R[i, j] over i < j.
    """
    tasks = matrix.shape[-1]
    pairs = [(i, j) for i in range(tasks) for j in range(tasks)]
    backward = _mean([matrix[..., i, j] - matrix[..., j, j] for i, j in pairs if i > j], matrix)
    return {
        "accuracy": _mean([matrix[..., i, j] for i, j in pairs if i >= j], matrix),
        "backward_transfer": backward,
        "positive_backward_transfer": backward.clamp(min=0),
        "remembering": 1 - backward.clamp(max=0).abs(),
        "forward_transfer": _mean([matrix[..., i, j] for i, j in pairs if i < j], matrix),
    }


def model_size_efficiency(parameters: Sequence[float]) -> float:
    """MS = min(1, 1/T Σ_i mem(θ_1) / mem(θ_i)) (Díaz-Rodríguez et al. 2018). parameters: memory after each task."""
    return min(1.0, sum(parameters[0] / size for size in parameters) / len(parameters))


def sample_storage_efficiency(kept: Sequence[float], all_data: float) -> float:
    """SSS = 1 - min(1, 1/T Σ_i mem(M_i) / mem(D)) (Díaz-Rodríguez et al. 2018). kept: bytes of samples in each task."""
    return 1.0 - min(1.0, sum(size / all_data for size in kept) / len(kept))


def _mean(values: Sequence[Tensor], like: Tensor) -> Tensor:
    """Mean of tensors [...]; nan where there is none, of the leading shape of `like` [..., T, T] or [..., n, T]."""
    return torch.stack(list(values)).mean(0) if values else like.new_full(like.shape[:-2], torch.nan)
