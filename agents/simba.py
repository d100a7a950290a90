"""SimBa: networks whose size may grow without overfitting (Lee et al. 2025, arXiv:2410.09754).

    x = W o + b,   x <- x + W₂ ReLU(W₁ LayerNorm(x) + b₁) + b₂  for each block,   z = LayerNorm(x)

A linear way leads from the inputs to z; each block adds to it what is not linear, through four times as many units.
The outputs are linear in z. Inputs are observations, brought to one scale by their running moments (`agents.moments`).

First weights: W and those of the outputs orthogonal, W₁ and W₂ normal with variance 2 / inputs, biases 0. SAC may have
these networks, `neoteny train sac --preset simba`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from agents.networks import Liftable, StackedLayerNorm, StackedLinear

EXPANSION = 4


def discount(decisions: int) -> float:
    """γ for episodes of so many decisions, as SimBa's authors set it: 1 - 5 / decisions, within [0.95, 0.995]."""
    return min(max(1 - 5 / decisions, 0.95), 0.995)


class Block(Liftable):
    """K residual blocks side by side: [*S, K, B, D] keeps its shape."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.norm = StackedLayerNorm(count, width)
        self.widen = StackedLinear(count, width, EXPANSION * width, "he")
        self.act = nn.ReLU(inplace=True)
        self.narrow = StackedLinear(count, EXPANSION * width, width, "he")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(self.act(self.widen(self.norm(x))))


class Encoder(Liftable):
    """K stacks of blocks side by side: inputs [*S, K, B, in] -> z [*S, K, B, D].

    widths: D, once for each block. Raises ValueError if they differ.
    """

    def __init__(self, count: int, inputs: int, widths: tuple[int, ...]):
        super().__init__()
        if len(set(widths)) != 1:
            raise ValueError(f"SimBa's blocks must be of one width, got {widths}")
        self.embed = StackedLinear(count, inputs, widths[0], "orthogonal")
        self.blocks = nn.ModuleList(Block(count, width) for width in widths)
        self.norm = StackedLayerNorm(count, widths[0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Network(Liftable):
    """One function of one input, such as a policy's: [*S, B, in] -> [*S, B, out]."""

    def __init__(self, inputs: int, widths: tuple[int, ...], outputs: int):
        super().__init__()
        self.encoder = Encoder(1, inputs, widths)
        self.head = StackedLinear(1, widths[0], outputs, "orthogonal")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x.unsqueeze(-3))).squeeze(-3)


class ResidualCritics(Liftable):
    """K action-value networks Q_k(s, a), in the shapes of `agents.networks.Critics`."""

    def __init__(self, count: int, observations: int, actions: int, widths: tuple[int, ...]):
        super().__init__()
        self.count = count
        self.encoder = Encoder(count, observations + actions, widths)
        self.head = StackedLinear(count, widths[0], 1, "orthogonal")

    def straight_forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """`forward` without a look at shapes, for tracing."""
        return self.head_values(self.encoder(torch.cat([obs, action], -1).expand(self.count, -1, -1)))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """obs [*S, B, O], action [*S, B, A] -> values [*S, K, B]."""
        return self.head_values(self.features(obs, action))

    def features(self, obs: Tensor, action: Tensor) -> Tensor:
        """z of the pairs: [*S, K, B, D]."""
        x = torch.cat([obs, action], -1).unsqueeze(-3)
        return self.encoder(x.expand(*x.shape[:-3], self.count, -1, -1))

    def head_values(self, features: Tensor) -> Tensor:
        """Values [*S, K, B] of features [*S, K, B, D]."""
        return self.head(features).squeeze(-1)
