"""Penalties on what a critic's head reads, φ(s, a) [*S, K, B, D]: BEER and those it is compared with.

    BEER   max(0, cos(φ, φ⁻) - U),  U = (‖φ‖² + γ² ‖φ⁺‖² - r² / ‖w‖²) / (2 γ ‖φ‖ ‖φ⁻‖)     He et al. 2024, eq. 12
    PEER   ⟨φ, φ⁻⟩                                                                         He et al. 2023
    DR3    ⟨φ, φ⁺⟩, with gradient through both                                             Kumar et al. 2022
    InFeR  mean_i (g_i(φ) - β₀ g⁰_i(φ⁰))² of extra heads g_i and frozen first copies       Lyle et al. 2022

φ⁻: target networks at s' and the target policy's action, no gradient. φ⁺: online networks at s', the policy's action.
w: weight of the head, without gradient. In the bound U nothing has a gradient. BEER's bound follows from the Bellman
equation and Cauchy-Schwarz: it is passed exactly where |r| > ‖w‖ ‖φ - γ φ'‖, where no head of this norm could be right.
The published code mixes φ⁺ (in the numerator) and φ⁻ (in the denominator); `matched` uses φ⁻ in both.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agents.networks import ActionValues, Liftable, StackedLinear, new_network
from agents.replay import Batch
from plasticity.population import RandomStream

Network = TypeVar("Network", bound=nn.Module)
Metrics = dict[str, Tensor]
Kind = Literal["none", "beer", "peer", "dr3"]
Form = Literal["cosine", "inner"]

_SMALL = 1e-8  # below it a norm counts as this; the published code divides by zero where all features are dead


def beer(
    features: Tensor,
    target_next: Tensor,
    online_next: Tensor,
    head_norm: Tensor,
    reward: Tensor,
    discount: Tensor | float,
    *,
    form: Form = "cosine",
    matched: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """The hinge of BEER, [*S]: mean over the batch, summed over critics; and metrics [*S].

    features φ, target_next φ⁻, online_next φ⁺ [*S, K, B, D]; head_norm ‖w‖ [*S, K, B or 1]; reward [*S, B]; discount γ,
    a number or [*S, B] (of n steps, with their summed reward). form: of the inequality. mask [*S, B] bool: rows without
    a Bellman equation of their own, such as terminal ones, which count as zero; the published code has none.
    """
    target_next = target_next.detach()
    others = target_next if matched else online_next.detach()
    own, bound, reference = (
        torch.linalg.vector_norm(x, dim=-1).clamp(min=_SMALL) for x in (features.detach(), others, target_next)
    )
    gamma = discount.unsqueeze(-2) if isinstance(discount, Tensor) else discount
    weight = head_norm.detach().clamp(min=_SMALL)
    upper = (own.square() + gamma**2 * bound.square() - (reward.unsqueeze(-2) / weight).square()) / (2 * gamma)
    if form == "cosine":
        similarity = F.cosine_similarity(features, target_next, dim=-1, eps=1e-6)
        upper = upper / (own * reference)
    else:
        similarity = (features * target_next).sum(-1)
    hinge = F.relu(similarity - upper)
    if mask is not None:
        hinge = hinge * ~mask.unsqueeze(-2)
    active = (hinge.detach() > 0).float()
    return hinge.mean(-1).sum(-1), {
        "representation/active_fraction": active.mean((-2, -1)),
        "representation/similarity": similarity.detach().mean((-2, -1)),
        "representation/bound": upper.mean((-2, -1)),
        "representation/head_norm": weight.mean((-2, -1)),
        "representation/feature_norm": own.mean((-2, -1)),
    }


def inner_product(features: Tensor, next_features: Tensor) -> Tensor:
    """mean ⟨φ, φ'⟩, summed over critics, [*S]: DR3 with φ⁺, PEER with φ⁻ without gradient."""
    return (features * next_features).sum(-1).mean(-1).sum(-1)


def penalty(
    kind: Kind,
    features: Tensor,
    target_next: Tensor,
    online_next: Tensor,
    head_norm: Tensor,
    reward: Tensor,
    discount: Tensor,
    **bound: Any,
) -> tuple[Tensor, Metrics]:
    """Any of the penalties between consecutive features, [*S], and metrics. Arguments and `bound` as for `beer`.

    Raises ValueError for an unknown kind.
    """
    if kind == "beer":
        return beer(features, target_next, online_next, head_norm, reward, discount, **bound)
    if kind not in ("peer", "dr3"):
        raise ValueError(f"representation must be beer, peer or dr3 to have a penalty, got {kind}")
    value = inner_product(features, target_next.detach() if kind == "peer" else online_next)
    return value, {"representation/inner_product": value.detach()}


def critic_penalty(
    kind: Kind,
    critics: ActionValues,
    batch: Batch,
    next_action: Tensor,
    target_next: Tensor,
    features: Tensor | None = None,
    **bound: Any,
) -> tuple[Tensor, Metrics]:
    """`penalty` of action-value critics. next_action: the policy's at next_obs; target_next: φ⁻ [*S, K, B, D].

    features: φ, if it is known already.
    """
    if features is None:
        features = critics.features(batch.obs, batch.action)
    with needed_gradients(kind):
        online_next = critics.features(batch.next_obs, next_action)
    norm = head_norm(critics)
    return penalty(kind, features, target_next, online_next, norm, batch.reward, batch.discount, **bound)


def needed_gradients(kind: Kind) -> torch.set_grad_enabled:
    """For the pass that gives φ⁺: only DR3 has a gradient there."""
    return torch.set_grad_enabled(kind == "dr3" and torch.is_grad_enabled())


def head_norm(critics: ActionValues) -> Tensor:
    """‖w‖ of each critic's head, without its bias, [*S, K, 1]."""
    return torch.linalg.vector_norm(critics.head.weight.detach(), dim=-2)


class FeatureHeads(Liftable):
    """InFeR: m extra linear heads on the features of each of K critics."""

    def __init__(self, critics: int, features: int, heads: int):
        super().__init__()
        self.heads = StackedLinear(critics, features, heads)

    def forward(self, features: Tensor) -> Tensor:
        """[*S, K, B, D] -> [*S, K, B, m]."""
        return self.heads(features)


def frozen(network: Network) -> Network:
    """A copy that is never trained."""
    return copy.deepcopy(network).requires_grad_(False)


@dataclass(frozen=True)
class FirstFeatures:
    """What InFeR keeps features by: heads, to be trained with the network, and both as they were at first."""

    heads: FeatureHeads
    first_heads: FeatureHeads
    first_network: Any

    @classmethod
    def of(cls, network: nn.Module, features: int, heads: int, stream: RandomStream) -> FirstFeatures:
        """As the network, of one critic with `features` features, is now; new heads are drawn from the stream."""
        drawn = new_network(lambda: FeatureHeads(1, features, heads), stream)
        return cls(drawn, frozen(drawn), frozen(network))

    def parts(self) -> dict[str, nn.Module]:
        """What a checkpoint holds."""
        return {"heads": self.heads, "first_heads": self.first_heads, "first_network": self.first_network}


def infer(first: FirstFeatures, features: Tensor, features_then: Tensor, scale: float) -> Tensor:
    """mean_i (g_i(φ) - β₀ g⁰_i(φ⁰))², over heads and batch, summed over critics, [*S]. Lyle et al. 2022.

    features φ, and of the first network φ⁰, [*S, K, B, D]; scale β₀.
    """
    target = scale * first.first_heads(features_then)
    return (first.heads(features) - target.detach()).square().mean((-2, -1)).sum(-1)
