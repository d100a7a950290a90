"""How much what a network says changes, on states or samples that stay the same.

Outputs [K, B, ...] of K members on a batch of B, before and after; results [K].
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def policy_churn(after: Tensor, before: Tensor) -> Tensor:
    """Share of states whose greedy action differs. Action values or logits [K, B, A] (Schaul et al. 2022,
    arXiv:2206.00730)."""
    return (after.argmax(2) != before.argmax(2)).float().mean(1)


def action_churn(after: Tensor, before: Tensor) -> Tensor:
    """Mean ||μ - μ'||² of actions [K, B, A] (Tang & Berseth 2024, arXiv:2409.04792)."""
    return (after - before).square().sum(2).mean(1)


def categorical_churn(after: Tensor, before: Tensor) -> Tensor:
    """Mean KL divergence of the new policy from the old one, from logits [K, B, A]."""
    new, old = after.log_softmax(2), before.log_softmax(2)
    return (new.exp() * (new - old)).sum(2).mean(1)


def gaussian_churn(mean: Tensor, log_std: Tensor, mean_before: Tensor, log_std_before: Tensor) -> Tensor:
    """The same of Gaussian policies with independent actions, [K, B, A] each; a squashing tanh changes nothing."""
    spread = (2 * (log_std - log_std_before)).exp()
    shift = ((mean - mean_before) / log_std_before.exp()).square()
    return (0.5 * (spread + shift - 1) - (log_std - log_std_before)).sum(2).mean(1)


def value_churn(after: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """E |Q - Q'| over states and actions, and of max_a Q. Action values [K, B, A] (Tang & Berseth 2024)."""
    return (after - before).abs().mean((1, 2)), (after.amax(2) - before.amax(2)).abs().mean(1)


def step_plasticity(loss_before: Tensor, loss_after: Tensor) -> Tensor:
    """How much of the loss one step removes on the samples it was made for: clamp(1 - L' / max(L, 1e-8), 0, 1).

    Losses [...] -> [...] (Elsayed & Mahmood 2024, arXiv:2404.00781, section 4).
    """
    return (1 - loss_after / loss_before.clamp(min=1e-8)).clamp(0, 1)


class ChurnWindows:
    """Outputs on a fixed batch at step t against those at t - w, for several windows w, and against the first ones.

    Every `period` steps one comparison for each window: `due(step)` says at which steps the outputs are wanted.
    """

    def __init__(self, windows: tuple[int, ...] = (1, 10, 100, 1000), period: int = 1000):
        if min(windows) < 1 or max(windows) > period:
            raise ValueError(f"windows of churn must lie between 1 and the period {period}, got {windows}")
        self.windows, self.period = windows, period
        self.first: Tensor | None = None
        self.kept: dict[int, Tensor] = {}

    def due(self, step: int) -> bool:
        """Whether `observe` wants the outputs after `step` steps."""
        left = -step % self.period
        return self.first is None or left == 0 or left in self.windows

    def observe(self, step: int, outputs: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Take the outputs [K, B, ...] at a step that is due.

        Returns the pairs (after, before) that are complete: by window, "1", "10", ..., and "initial".
        """
        outputs = outputs.detach()
        if self.first is None:
            self.first = outputs.clone()
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        if step % self.period == 0 and step > 0:
            pairs = {str(w): (outputs, self.kept[w]) for w in self.windows if w in self.kept}
            pairs["initial"] = outputs, self.first
            self.kept = {}
        left = -step % self.period
        for window in self.windows:
            if window == (left or self.period):
                self.kept[window] = outputs.clone()
        return pairs

    def state_dict(self) -> dict[str, Any]:
        """The outputs that wait for a comparison."""
        return {"first": self.first, "kept": dict(self.kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self.first, self.kept = state["first"], dict(state["kept"])
