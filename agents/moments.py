"""Running mean and variance, by which observations and rewards are brought to one scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plasticity.population import Axes


class Moments:
    """Running mean and variance over all that was shown (Chan et al. 1979), of each seed: [*S, *shape] each.

    limit: normalised numbers are cut off at ± this.
    """

    def __init__(self, lead: Axes, shape: tuple[int, ...], device: torch.device, limit: float = math.inf):
        self.rows_axis, self.limit = len(lead), limit
        self.mean = torch.zeros((*lead, *shape), dtype=torch.float64, device=device)
        self.variance = torch.ones_like(self.mean)
        self.count = torch.full((), 1e-4, dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> None:
        """x [*S, N, *shape]. Writes over what was there, which recorded updates (`agents.graphs`) read."""
        x, rows = x.double(), x.shape[self.rows_axis]
        mean, variance = x.mean(self.rows_axis), x.var(self.rows_axis, correction=0)
        difference, total = mean - self.mean, self.count + rows
        squares = self.variance * self.count + variance * rows + difference.square() * self.count * rows / total
        self.mean.add_(difference * rows / total)
        self.variance.copy_(squares / total)
        self.count.copy_(total)

    def deviation(self) -> Tensor:
        """[*S, 1, *shape] float32."""
        return (self.variance + 1e-8).sqrt().float().unsqueeze(self.rows_axis)

    def normalise(self, x: Tensor) -> Tensor:
        """x [*S, N, *shape] without mean and scale, float32."""
        normalised = (x - self.mean.float().unsqueeze(self.rows_axis)) / self.deviation()
        return normalised if self.limit == math.inf else normalised.clamp(-self.limit, self.limit)

    def state_dict(self) -> dict[str, Tensor]:
        """The moments and how many rows they are of."""
        return {"mean": self.mean, "variance": self.variance, "count": self.count}


def as_seen(agent: object, obs: Tensor) -> Tensor:
    """Observations [*S, N, *obs_shape] as the agent's networks see them."""
    if hasattr(agent, "normalised"):  # an offline agent, by the moments of its data
        return agent.normalised(obs)  # type: ignore[attr-defined]
    moments: Moments | None = getattr(agent, "observation_moments", None)
    return obs if moments is None else moments.normalise(obs)
