"""The LSTM hypernetwork of Chandra et al. 2023 (arXiv:2209.07712): one that walks over the chunks of weights.

    (a_i, q_i) = LSTM([e; c_i], (a_{i-1}, q_{i-1}))      from a_{-1} = q_{-1} = 0
    y_i = A a_i + b                                      one head for all steps
    h = y_0, y_1, ...  cut off where the target network ends

So a chunk depends on all chunks before it. The authors' code builds its cell for chunk embeddings only and thereby
feeds it the two embeddings as two sequences; here they are one input, as intended (specs/rnn-hypernetworks.md, 3.3).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from continual.hypernetworks.generators import Theta, normal, uniform
from continual.hypernetworks.recurrence import recurrence

Growth = Literal["none", "inputs", "full"]
GROWTHS: tuple[Growth, ...] = ("none", "inputs", "full")
_HIDDEN = ("hidden_weight", "hidden_bias")
_INPUT = ("input_weight", "input_bias")
_HEAD = ("head_weight", "head_bias")


class LSTMGenerator:
    """One layer of `hidden` units. weights: N. growth: of each task a copy of the input maps is kept ("inputs"), or of
    all but the hidden maps ("full"); hidden maps then learn in the first task only.

    Maps of four gates lie side by side in the order i, f, g, o: input_weight [d_e + d_c, 4 H], hidden_weight [H, 4 H];
    head_weight [H, chunk].
    """

    head: tuple[str, ...] = _HEAD

    def __init__(
        self,
        weights: int,
        chunk: int,
        hidden: int,
        task_embedding: int,
        chunk_embedding: int,
        head_scale: float,
        growth: Growth = "none",
    ):
        self.weights, self.hidden, self.head_scale = weights, hidden, head_scale
        self.chunks = math.ceil(weights / chunk)
        self.shapes: dict[str, tuple[int, ...]] = {
            "chunk_embeddings": (self.chunks, chunk_embedding),
            "input_weight": (task_embedding + chunk_embedding, 4 * hidden),
            "input_bias": (4 * hidden,),
            "hidden_weight": (hidden, 4 * hidden),
            "hidden_bias": (4 * hidden,),
            "head_weight": (hidden, chunk),
            "head_bias": (chunk,),
        }
        self.frozen: tuple[str, ...] = () if growth == "none" else _HIDDEN
        copied = {"none": (), "inputs": _INPUT, "full": (*_INPUT, *_HEAD, "chunk_embeddings")}
        self.grown: tuple[str, ...] = copied[growth]

    def draw(self, source: torch.Generator) -> dict[str, Tensor]:
        """Embeddings standard normal, all else uniform in ± 1 / √H, the head's times `head_scale`."""
        bound = 1 / math.sqrt(self.hidden)
        theta = {"chunk_embeddings": normal(source, *self.shapes["chunk_embeddings"])}
        for name in (*_INPUT, *_HIDDEN):
            theta[name] = uniform(source, bound, *self.shapes[name])
        for name in _HEAD:
            theta[name] = uniform(source, self.head_scale * bound, *self.shapes[name])
        return theta

    def __call__(self, theta: Theta, embeddings: Tensor) -> Tensor:
        members, tasks = embeddings.shape[:2]
        states = recurrence(self._inputs(theta, embeddings), theta["hidden_weight"])
        made = torch.baddbmm(theta["head_bias"].unsqueeze(1), states.flatten(1, 2), theta["head_weight"])
        return made.view(members, tasks, -1)[..., : self.weights]

    def _inputs(self, theta: Theta, embeddings: Tensor) -> Tensor:
        """What enters the gates at each step beside the state, [K, B, M, 4 H]. Input maps may be each task's own."""
        weight, bias = theta["input_weight"], theta["input_bias"]
        if weight.dim() == 3:
            weight, bias = weight.unsqueeze(1), bias.unsqueeze(1)
        width = embeddings.shape[2]
        of_task = embeddings.unsqueeze(2) @ weight[:, :, :width]
        of_chunk = theta["chunk_embeddings"].unsqueeze(1) @ weight[:, :, width:]
        return of_task + of_chunk + (bias + theta["hidden_bias"].unsqueeze(1)).unsqueeze(2)
