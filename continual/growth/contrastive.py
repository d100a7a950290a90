"""The symmetric contrastive loss of CLIP (Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FIRST_LOGIT_SCALE = math.log(1 / 0.07)
_LARGEST_LOGIT_SCALE = math.log(100)


def logits_of(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """Scaled cosines [B, C] of embeddings [B, E] and [C, E] of length 1. logit_scale: [], the logarithm."""
    return logit_scale.clamp(max=_LARGEST_LOGIT_SCALE).exp() * images @ texts.T


def contrastive_loss(images: Tensor, texts: Tensor, logit_scale: Tensor, concepts: Tensor) -> Tensor:
    """Mean over both directions of the cross-entropy of matching, [].

    images, texts: [B, E] of length 1, row by row a pair. concepts: int64 [B]; pairs of the same concept match each
    other, with equal shares.
    """
    logits = logits_of(images, texts, logit_scale)
    same = (concepts.unsqueeze(1) == concepts).to(logits.dtype)
    matching = same / same.sum(1, keepdim=True)
    both = torch.log_softmax(logits, 1) + torch.log_softmax(logits, 0)
    return -(matching * both).sum() / (2 * len(logits))
