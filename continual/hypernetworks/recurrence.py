"""The recurrence of an LSTM for K members and B sequences at once, with its gradient written out.

Autograd would keep a node for each of some twenty small operations a step and add up the gradient of the weights in as
many small products; here a step is six operations back, and that gradient is one product at the end.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        hidden = weight.shape[1]
        gates = inputs.permute(2, 0, 1, 3).clone(memory_format=torch.contiguous_format)  # [M, K, B, 4 H]
        steps, *lead = gates.shape[:3]
        states, cells = (inputs.new_zeros(steps + 1, *lead, hidden) for _ in range(2))
        shown = inputs.new_empty(steps, *lead, hidden)
        for step, gate in enumerate(gates.unbind(0)):
            gate.baddbmm_(states[step], weight)
            write, keep, new, show = gate.split(hidden, 2)
            gate[..., : 2 * hidden].sigmoid_()
            new.tanh_()
            show.sigmoid_()
            torch.mul(keep, cells[step], out=cells[step + 1]).addcmul_(write, new)
            torch.mul(show, torch.tanh(cells[step + 1], out=shown[step]), out=states[step + 1])
        ctx.save_for_backward(gates, states, cells, shown, weight)
        return states[1:].permute(1, 2, 0, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gates, states, cells, shown, weight = ctx.saved_tensors
        hidden = weight.shape[1]
        write, keep, new, show = gates.split(hidden, 3)
        # What the gradient of a cell, and that of a state, is multiplied by on its way into the gates.
        of_cell = torch.cat([new * write * (1 - write), cells[:-1] * keep * (1 - keep), write * (1 - new * new)], 3)
        of_cell = of_cell.unflatten(3, (3, hidden))
        of_state, into_cell = shown * show * (1 - show), show * (1 - shown * shown)
        into_gates = torch.empty_like(gates)
        parts = into_gates.unflatten(3, (4, hidden))
        upstream, back = upstream.permute(2, 0, 1, 3), weight.mT
        cell = torch.zeros_like(states[0])
        state = torch.zeros_like(cell)
        for step in reversed(range(len(gates))):
            state = state + upstream[step]
            cell = torch.addcmul(cell, state, into_cell[step])
            torch.mul(cell.unsqueeze(2), of_cell[step], out=parts[step][..., :3, :])
            torch.mul(state, of_state[step], out=parts[step][..., 3, :])
            state = torch.bmm(into_gates[step], back)
            cell = cell * keep[step]
        rows = states[:-1].transpose(0, 1).flatten(1, 2), into_gates.transpose(0, 1).flatten(1, 2)  # [K, M B, ...]
        return into_gates.permute(1, 2, 0, 3), torch.bmm(rows[0].mT, rows[1])


def recurrence(inputs: Tensor, weight: Tensor) -> Tensor:
    """States [K, B, M, H] from inputs [K, B, M, 4 H] to the gates i, f, g, o and weight [K, H, 4 H].

    (a_i, q_i): q_i = f q_{i-1} + i g, a_i = o tanh q_i, gates from inputs_i + a_{i-1} weight, a and q 0 before.
    """
    return cast(Tensor, _Recurrence.apply(inputs, weight))
