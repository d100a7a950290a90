"""The networks of Symphony (Ishuov et al. 2025, arXiv:2512.10477, figs. 3, 6 and 8; specs/symphony.md, sections 3, 15).

    block     Linear, LayerNorm, Linear, ReSine, Linear, one for the actor and three side by side for the critics
    ReSine    f sigmoid(f w / σ_s), f = σ_s sin(x / σ_s), σ_s = sigmoid(s); w = 1.5, or 1 / sigmoid(b) with trained b
    dropout   values stay, and half of them pass no gradient

Later variants, of August 2026, squeeze a block before its last layer and let actor and critics read an `Encoder`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agents.networks import Liftable, StackedLayerNorm, StackedLinear


class ReSine(Liftable):
    """f sigmoid(w f / σ_s), f = σ_s sin(x / σ_s), with a trained scale σ_s = sigmoid(s) for each unit (table III).

    [*S, K, B, H] keeps its shape. w = 1.5, or with `trained_slope` 1 / sigmoid(b), b trained for each unit.
    """

    nonlinearity, own_axes = "resine", 2  # for plasticity.networks.tracing

    def __init__(self, count: int, features: int, trained_slope: bool = False):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(count, 1, features))
        self.slope = nn.Parameter(torch.empty(count, 1, features)) if trained_slope else None

    @torch.no_grad()
    def draw_(self, generator: torch.Generator) -> None:
        """Uniform in ± 1 / √H."""
        bound = 1 / math.sqrt(self.scale.shape[-1])
        self.scale.uniform_(-bound, bound, generator=generator)
        if self.slope is not None:
            self.slope.uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale.sigmoid()
        sine = torch.sin(x / scale)
        steep = 1.5 * sine if self.slope is None else sine / self.slope.sigmoid()
        return scale * sine * torch.sigmoid(steep)


def gradient_dropout(x: Tensor, passes: Tensor | None) -> Tensor:
    """x itself, whose gradient passes only where `passes` is true, unscaled (eq. 7); everywhere if it is None."""
    return x if passes is None else torch.where(passes, x, x.detach())


class FeedForward(Liftable):
    """K blocks Linear, LayerNorm, Linear, ReSine, Linear side by side (fig. 8): [*S, K, B, in] -> [*S, K, B, out].

    bottleneck: if not 0, one more linear layer of so many outputs before the last; then it is those that `passes` is
    of, [*S, K, B, bottleneck], instead of the block's own outputs.
    """

    def __init__(
        self,
        count: int,
        inputs: int,
        hidden: tuple[int, ...],
        outputs: int,
        bottleneck: int = 0,
        trained_slope: bool = False,
    ):
        super().__init__()
        self.count, self.bottleneck = count, bottleneck
        self.net = nn.Sequential(
            StackedLinear(count, inputs, hidden[0]),
            StackedLayerNorm(count, hidden[0]),
            StackedLinear(count, hidden[0], hidden[1]),
            ReSine(count, hidden[1], trained_slope),
            *([StackedLinear(count, hidden[1], bottleneck)] if bottleneck else []),
            StackedLinear(count, bottleneck or hidden[1], outputs),
        )

    def forward(self, x: Tensor, passes: Tensor | None = None) -> Tensor:
        if passes is None:
            return self.net(x)
        *body, head = self.net
        for layer in body:
            x = layer(x)
        return head(gradient_dropout(x, passes)) if self.bottleneck else gradient_dropout(head(x), passes)


class Actor(Liftable):
    """One block with three groups of outputs, each through tanh(z/2): direction A, scale S, temperature B (fig. 3)."""

    def __init__(
        self,
        observations: int,
        actions: int,
        hidden: tuple[int, ...],
        bottleneck: int = 0,
        trained_slope: bool = False,
    ):
        super().__init__()
        self.block = FeedForward(1, observations, hidden, 3 * actions, bottleneck, trained_slope)

    def straight_forward(self, obs: Tensor) -> Tensor:
        """The outputs of the block, for tracing."""
        return self.block(obs.unsqueeze(-3)).squeeze(-3)

    def forward(self, obs: Tensor, passes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """obs [*S, B, O] -> A in (-1, 1), σ = |S| and β = |B| in [0, 1), each [*S, B, A].

        passes: [*S, B, 3 A], or of the bottleneck.
        """
        outputs = self.block(obs.unsqueeze(-3), None if passes is None else passes.unsqueeze(-3)).squeeze(-3)
        direction, scale, temperature = (outputs / 2).tanh().chunk(3, -1)
        return direction, scale.abs(), temperature.abs()


class Critics(Liftable):
    """Three blocks on the observation and the action: values at n nodes each, all of them plain regressions."""

    count = 3

    def __init__(
        self,
        observations: int,
        actions: int,
        hidden: tuple[int, ...],
        nodes: int,
        bottleneck: int = 0,
        trained_slope: bool = False,
    ):
        super().__init__()
        self.block = FeedForward(self.count, observations + actions, hidden, nodes, bottleneck, trained_slope)

    def straight_forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """The same without a look at shapes, for tracing."""
        return self.block(torch.cat([obs, action], -1).expand(self.count, -1, -1))

    def forward(self, obs: Tensor, action: Tensor, passes: Tensor | None = None) -> Tensor:
        """obs [*S, B, O], action [*S, B, A] -> nodes [*S, 3, B, n]. passes: [*S, 3, B, n], or of the bottleneck."""
        x = torch.cat([obs, action], -1).unsqueeze(-3)
        return self.block(x.expand(*x.shape[:-3], self.count, -1, -1), passes)


class Encoder(Liftable):
    """What actor and critics read in the place of observations (specs/symphony.md, section 15 e).

    z(s)     = RMSNorm [s, f(s)],            f: Linear, ReSine, Linear, the actor's input
    ρ(s, a)  of a network on [a, z(s)] like f, from which a linear layer predicts the reward
    z(s, a)  = RMSNorm [a, z(s), ρ(s, a)],   the critics' input; no gradient of theirs reaches ρ
    """

    def __init__(self, observations: int, actions: int, width: int, features: int):
        super().__init__()
        self.actions = actions
        self.state_size = observations + features
        self.pair_size = self.state_size + features  # without the action
        self.of_state = _encoding(observations, width, features)
        self.of_pair = _encoding(self.state_size + actions, width, features)
        self.reward = StackedLinear(1, features, 1)

    def state(self, obs: Tensor) -> Tensor:
        """z(s): obs [*S, B, O] -> [*S, B, O + F]."""
        return _rms_norm(torch.cat([obs, self.of_state(obs.unsqueeze(-3)).squeeze(-3)], -1))

    def pair(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z(s) [*S, B, O + F] and actions [*S, B, A] -> z(s, a) in two parts, of all but the action [*S, B, O + 2 F]
        and of the action [*S, B, A], and the reward that is predicted [*S, B]."""
        latent = self.of_pair(torch.cat([action, state], -1).unsqueeze(-3))
        predicted = self.reward(latent).squeeze(-1).squeeze(-2)
        whole = _rms_norm(torch.cat([action, state, latent.squeeze(-3).detach()], -1))
        return whole[..., self.actions :], whole[..., : self.actions], predicted

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """The reward predicted, [*S, B]."""
        return self.pair(self.state(obs), action)[2]


def _encoding(inputs: int, width: int, features: int) -> nn.Sequential:
    """[*S, 1, B, in] -> [*S, 1, B, F]."""
    return nn.Sequential(
        StackedLinear(1, inputs, width), ReSine(1, width, trained_slope=True), StackedLinear(1, width, features)
    )


def _rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])
