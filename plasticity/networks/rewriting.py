"""Networks rewritten so that others can act on their parts."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from plasticity.networks import dataflow


class Nonlinearity(nn.Module):
    """A function call as a module: x -> function(x, *arguments)."""

    def __init__(self, function: Any, name: str, arguments: tuple[Any, ...], options: dict[str, Any]):
        super().__init__()
        self.function, self.nonlinearity, self.arguments, self.options = function, name, arguments, options

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.arguments, **self.options)


def explicit_nonlinearities(network: nn.Module) -> nn.Module:
    """See `structure.explicit_nonlinearities`."""
    flow = dataflow.analyse(network)
    hidden = [site for site in flow.hidden if site.name != site.node.target]
    if not hidden:
        return network
    for site in hidden:
        node, traced = site.node, flow.traced
        if node.op == "call_module":
            module: nn.Module = flow.modules[str(node.target)]
            if next(module.parameters(), None) is not None:
                raise ValueError(f"the nonlinearity '{node.target}' has parameters and is called more than once")
            again = copy.deepcopy(module)
        else:
            function = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
            again = Nonlinearity(function, site.nonlinearity, tuple(node.args[1:]), dict(node.kwargs))
        traced.add_module(site.name, again)
        with traced.graph.inserting_after(node):
            call = traced.graph.call_module(site.name, (node.args[0],))
        node.replace_all_uses_with(call)
        traced.graph.erase_node(node)
    flow.traced.recompile()
    return flow.traced
