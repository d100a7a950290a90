"""Gradient steps as CUDA graphs: recorded once, then replayed by one call, without the host's part of the work.

The host needs longer to launch the hundred small kernels of an update than a GPU to run them. A graph has fixed
addresses and fixed host numbers. So only agents with `update_variant` are recorded, which promise that two updates of
one variant launch the same kernels on the same memory with the same numbers, and keep no host state but `updates`.
Agents without it, with interventions, diagnostics, or a schedule of learning rates, update eagerly; and so does
everything after a recording that failed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

from agents.agent import Metrics
from plasticity.population import RandomStream

Update = Callable[[], Metrics]
# What records an update that draws from these generators: the replay, and the metrics that each replay writes anew.
Record = Callable[[Update, Sequence[torch.Generator]], tuple[Callable[[], None], Metrics]]
WARM_UPS = 3  # eager updates of each variant before its recording, in which libraries choose kernels and take memory


def record_cuda_graph(update: Update, generators: Sequence[torch.Generator]) -> tuple[Callable[[], None], Metrics]:
    """The update as a CUDA graph. Nothing is executed on the device. Raises RuntimeError if it cannot be recorded."""
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        metrics = update()
    return graph.replay, metrics


class GraphedUpdates:
    """Stands in for `_update_once` of an agent: eager at first, then a graph of each variant.

    Metrics of a replay lie in the graph's own memory: the next replay of the variant writes over them.
    tell: is told once, in one line, if a recording failed; all updates are eager from then on.
    """

    def __init__(
        self,
        agent: Any,
        generators: Sequence[torch.Generator],
        tell: Callable[[str], None],
        record: Record = record_cuda_graph,
    ):
        self._agent, self._update, self._generators = agent, agent._update_once, list(generators)
        self._tell, self._record = tell, record
        self._seen: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, tuple[Callable[[], None], Metrics]] = {}
        self._failed = False

    def __call__(self) -> Metrics:
        variant = self._agent.update_variant
        if self._failed:
            return self._update()
        if variant not in self._recorded:
            self._seen[variant] += 1
            if self._seen[variant] <= WARM_UPS or not self._is_recorded(variant):
                return self._update()
        replay, metrics = self._recorded[variant]
        replay()
        self._agent.updates += 1
        return dict(metrics)

    def _is_recorded(self, variant: Hashable) -> bool:
        """Record the variant; whether that was possible."""
        updates = self._agent.updates
        try:
            self._recorded[variant] = self._record(self._update, self._generators)
        except RuntimeError as error:
            self._failed = True
            self._recorded.clear()
            self._tell(f"updates stay eager, because recording a CUDA graph failed: {str(error).splitlines()[0]}")
        finally:
            self._agent.updates = updates  # which the recording counted on
        return not self._failed


def graph_updates(
    agent: Any, streams: Mapping[str, RandomStream], device: torch.device, tell: Callable[[str], None]
) -> bool:
    """Let the agent's updates be replayed as CUDA graphs, if they can be; else `tell` why not, in one line."""
    if device.type != "cuda":
        why = f"the device is {device.type}"
    elif getattr(agent, "update_variant", None) is None:
        why = "this agent's updates need numbers from the host"
    elif not agent.plasticity.is_constant:
        why = "interventions or a schedule change them"
    elif any(getattr(part, "on_gradients", None) is not None for part in vars(agent).values()):
        why = "diagnostics watch their gradients"
    else:
        generators = [*streams["sampling"].generators, *streams["update"].generators]
        agent._update_once = GraphedUpdates(agent, generators, tell)
        return True
    tell(f"updates stay eager, not replayed as CUDA graphs: {why}")
    return False
