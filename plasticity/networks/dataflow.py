"""Where the outputs of weights go: the traced forward pass read node by node, keeping for each value what is in it.

A value carries the weight layers summed in it since the last nonlinearity, the hidden units that arrive in it as they
are, and the last normaliser. A nonlinearity makes hidden units out of the layers; a layer reads the units that arrive.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F

from plasticity.networks import stacked, tracing


@dataclass
class Layer:
    """One product with weights: names of its parameters (several, if the weight is computed from them), and outputs.

    pixel_axes: of a convolution. table: the rows are looked up or added, not multiplied (embeddings, positions).
    """

    weights: tuple[str, ...]
    biases: tuple[str, ...]
    width: int
    pixel_axes: int = 0
    table: bool = False


@dataclass
class Norm:
    """One call of a normaliser and the layers whose scale it removes. pure: nothing else is in what it normalises."""

    name: str
    gain: str | None
    offset: str | None
    layers: tuple[int, ...]
    pure: bool
    batch: bool


@dataclass
class Site:
    """One nonlinearity; readers are (weight, bias, inputs per unit, copies, offset). weight, pixel_axes: of the first
    of its layers."""

    name: str
    node: fx.Node
    nonlinearity: str
    units: int
    copies: int
    layers: tuple[int, ...]
    bare: tuple[int, ...]
    norm: Norm | None
    weight: str
    pixel_axes: int
    readers: list[tuple[str, str | None, int, int, int]] = field(default_factory=list)
    residual: bool = False


@dataclass(frozen=True)
class Units:
    """Hidden units of a site inside a value, beginning at feature `offset`; None: the layers do not tell where."""

    site: int
    offset: int | None = 0


@dataclass(frozen=True)
class Flow:
    """What is in a value; nothing: a constant.

    bare: those of `layers` that no normaliser has seen. norms: the last ones seen. width: of the features, if known.
    other: something that no layer here scales, such as an input. product: values were multiplied with each other.
    sliced: a part of the features. reshaped: one feature may have become several.
    parameters: the value is a function of these only; transposed: as a weight, it is [in, out] of the parameter.
    """

    layers: tuple[int, ...] = ()
    bare: tuple[int, ...] = ()
    units: tuple[Units, ...] = ()
    norms: tuple[int, ...] = ()
    width: int | None = None
    other: bool = False
    product: bool = False
    sliced: bool = False
    reshaped: bool = False
    parameters: tuple[str, ...] = ()
    transposed: bool = False

    @property
    def data(self) -> bool:
        """It depends on the inputs."""
        return bool(self.layers or self.units or self.other)


@dataclass(frozen=True)
class Group:
    """Layers that share normalisers, see `structure.Normalised`."""

    layers: tuple[int, ...]
    normalisers: tuple[str, ...]
    exact: bool
    batch: bool


def _union(*parts: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(item for part in parts for item in part))


class Dataflow:
    """The reading of one traced network; results in `layers`, `hidden`, `heads` and `groups()`.

    leaks: layers of which something else than a normaliser reads the bare output. read_by: which layers do. attention:
    layers that make queries and keys.
    """

    def __init__(self, traced: fx.GraphModule):
        self.traced = traced
        self.modules = dict(traced.named_modules())
        self.names = {id(parameter): name for name, parameter in traced.named_parameters()}
        self.layers: list[Layer] = []
        self.norms: list[Norm] = []
        self.sites: list[Site] = []
        self.heads: tuple[int, ...] = ()
        self.leaks: set[int] = set()
        self.attention: set[int] = set()
        self.transposed: set[str] = set()
        self.read_by: dict[int, set[int]] = {}
        self.flows: dict[fx.Node, Flow] = {}
        for node in traced.graph.nodes:
            self.flows[node] = getattr(self, f"_{node.op}")(node)
        self._finish()

    @property
    def hidden(self) -> list[Site]:
        """The nonlinearities between weights, in the order of computation."""
        return [site for site in self.sites if site.layers]

    def weights(self, layers: Iterable[int]) -> tuple[str, ...]:
        """Names of the weights of some layers."""
        return _union(*(self.layers[index].weights for index in layers))

    def biases(self, layers: Iterable[int]) -> tuple[str, ...]:
        """Names of the biases of some layers."""
        return _union(*(self.layers[index].biases for index in layers))

    # The six kinds of nodes of a torch.fx graph.

    def _placeholder(self, node: fx.Node) -> Flow:
        return Flow(other=True)

    def _output(self, node: fx.Node) -> Flow:
        whole = self._sum(self._inputs(node))
        self.leaks.update(whole.bare)
        self.heads = whole.layers
        return whole

    def _get_attr(self, node: fx.Node) -> Flow:
        name = self._name(_attribute(self.traced, str(node.target)))
        return Flow(parameters=(name,)) if name else Flow()

    def _call_module(self, node: fx.Node) -> Flow:
        name, inputs = str(node.target), self._inputs(node)
        module: Any = self.modules[name]
        if tracing.is_linear(module):
            return self._linear_module(name, module, inputs[0])
        if tracing.is_normaliser(module):
            gain, offset = self._name(getattr(module, "weight", None)), self._name(getattr(module, "bias", None))
            flow = replace(inputs[0], other=inputs[0].other or getattr(module, "keeps_scale", False))
            return self._normalise(name, gain, offset, flow, tracing.is_batch_normaliser(module))
        if isinstance(module, tracing.PASSING):
            return replace(inputs[0], reshaped=inputs[0].reshaped or "Flatten" in type(module).__name__)
        if isinstance(module, nn.MultiheadAttention):
            return self._attention(name, module, node)
        if isinstance(module, nn.Embedding):
            return self._layer(Layer((f"{name}.weight",), (), module.embedding_dim, table=True), Flow())
        nonlinearity = tracing.nonlinearity_of(module)
        if nonlinearity is not None:
            return self._activate(node, nonlinearity, getattr(module, "copies", 1), self._sum(inputs))
        if next(module.parameters(), None) is not None:
            raise ValueError(f"layer '{name}' is of a type that is not known here: {type(module).__name__}")
        return self._unknown(node, type(module).__name__, inputs)

    def _call_function(self, node: fx.Node) -> Flow:
        function, inputs = node.target, self._inputs(node)
        if function in tracing.PRODUCTS:
            return self._matrix_product(node, tracing.PRODUCTS[function], inputs)
        if function in tracing.FUNCTIONS:
            return self._activate(node, tracing.FUNCTIONS[function], 1, self._sum(inputs))
        if function in tracing.FUNCTIONAL_NORMALISERS:
            gain, offset = (self._parameter_argument(node, name) for name in ("weight", "bias"))
            return self._normalise(node.name, gain, offset, inputs[0], function is F.batch_norm)
        if function is F.scaled_dot_product_attention:
            for flow in inputs[:2]:
                self.leaks.update(flow.bare)
                self.attention.update(flow.layers)
            return inputs[2]
        return self._operation(node, getattr(function, "__name__", str(function)), inputs)

    def _call_method(self, node: fx.Node) -> Flow:
        method, inputs = str(node.target), self._inputs(node)
        if method in tracing.PRODUCTS:
            result = self._matrix_product(node, tracing.PRODUCTS[method], inputs)
        elif method in tracing.METHODS:
            result = self._activate(node, tracing.METHODS[method], 1, self._sum(inputs))
        else:
            result = self._operation(node, method, inputs)
        if method.endswith("_") and isinstance(node.args[0], fx.Node):
            self.flows[node.args[0]] = result
        return result

    # What they do to the values.

    def _inputs(self, node: fx.Node) -> list[Flow]:
        return [self.flows[parent] for parent in node.all_input_nodes]

    def _name(self, parameter: Any) -> str | None:
        return None if parameter is None else self.names.get(id(parameter))

    def _parameter_argument(self, node: fx.Node, name: str) -> str | None:
        argument = node.kwargs.get(name)
        return next(iter(self.flows[argument].parameters), None) if isinstance(argument, fx.Node) else None

    def _sum(self, flows: list[Flow]) -> Flow:
        """What is in a sum of values, number by number. A parameter that is added is a bias, or a table of them."""
        data = [flow for flow in flows if flow.data]
        parameters = _union(*(flow.parameters for flow in flows))
        if not data:
            return Flow(parameters=parameters, transposed=any(flow.transposed for flow in flows))
        whole = Flow(
            layers=_union(*(flow.layers for flow in data)),
            bare=_union(*(flow.bare for flow in data)),
            units=_union(*(flow.units for flow in data)),
            norms=_union(*(flow.norms for flow in data)),
            width=next((flow.width for flow in data if flow.width is not None), None),
            other=any(flow.other for flow in data),
            product=any(flow.product for flow in data),
            sliced=any(flow.sliced for flow in data),
            reshaped=any(flow.reshaped for flow in data),
        )
        for name in parameters:
            shape = _attribute(self.traced, name).shape
            if sum(size > 1 for size in shape) > 1:
                table = self._layer(Layer((name,), (), shape[-1], table=True), Flow())
                whole = replace(whole, layers=whole.layers + table.layers, bare=whole.bare + table.bare)
            elif whole.bare:
                layer = self.layers[whole.bare[-1]]
                layer.biases = _union(layer.biases, (name,))
        return whole

    def _product(self, flows: list[Flow]) -> Flow:
        """Values multiplied with each other: with constants or gains only, or one value gating another."""
        data = [flow for flow in flows if flow.data]
        if len(data) <= 1:
            return data[0] if data else self._sum(flows)
        whole = self._sum(data)
        self.leaks.update(whole.bare)
        if whole.units:
            return Flow(units=whole.units, width=whole.width)
        return replace(whole, product=True)

    def _linear_module(self, name: str, module: Any, read: Flow) -> Flow:
        weight = self._name(module.weight)
        if weight is None:
            raise ValueError(
                f"the weight of layer '{name}' is computed from other parameters; remove the parametrisation"
            )
        bias = self._name(module.bias)
        biases = (bias,) if bias else ()
        inputs_axis = getattr(module, "inputs_axis", None)
        if inputs_axis is not None:
            shape = module.weight.shape
            self.transposed |= {weight} if inputs_axis == -2 else set()
            return self._layer(Layer((weight,), biases, shape[-3 - inputs_axis]), read, shape[inputs_axis])
        members = int(isinstance(module, stacked.StackedLinear | stacked.StackedConv2d))
        shape = tuple(module.weight.shape)[members:]
        layer = Layer((weight,), biases, shape[0], pixel_axes=len(shape) - 2)
        return self._layer(layer, read, shape[1] * getattr(module, "groups", 1))

    def _attention(self, name: str, module: nn.MultiheadAttention, node: fx.Node) -> Flow:
        """Query, key and value weights in one tensor or three, then the output weights."""
        query, key, value = (self._argument(node, place, name) for place, name in enumerate(("query", "key", "value")))
        read = self._sum([query, key, value])
        inputs = [
            n
            for n in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
            if getattr(module, n) is not None
        ]
        weights = tuple(f"{name}.{weight}" for weight in inputs)
        biases = () if module.in_proj_bias is None else (f"{name}.in_proj_bias",)
        width = module.embed_dim
        inner = self._layer(Layer(weights, biases, width), read, width)
        self.attention.update(inner.layers)
        bias = () if module.out_proj.bias is None else (f"{name}.out_proj.bias",)
        return self._layer(Layer((f"{name}.out_proj.weight",), bias, width), inner, width)

    def _matrix_product(self, node: fx.Node, places: tuple[int, int, int | None, bool], inputs: list[Flow]) -> Flow:
        at_data, at_weight, at_bias, swapped = places
        data, weight = (self._argument(node, at, name) for at, name in ((at_data, "input"), (at_weight, "weight")))
        bias = Flow() if at_bias is None else self._argument(node, at_bias, "bias")
        if not weight.parameters:
            return self._product(inputs)
        shape = _attribute(self.traced, weight.parameters[0]).shape
        convolution = "conv" in str(node.target)
        out, inner = (0, 1) if convolution else (-2, -1)
        if weight.transposed != swapped:
            self.transposed.update(weight.parameters)
            out, inner = inner, out
        layer = Layer(weight.parameters, bias.parameters, shape[out], len(shape) - 2 if convolution else 0)
        return self._layer(layer, data, shape[inner])

    def _argument(self, node: fx.Node, position: int, name: str) -> Flow:
        argument = tracing.argument(node, position, name)
        return self.flows[argument] if isinstance(argument, fx.Node) else Flow()

    def _layer(self, layer: Layer, read: Flow, inputs: int = 0) -> Flow:
        """The output of a layer that reads a value with `inputs` features."""
        self.leaks.update(read.bare)
        for units in read.units:
            site = self.sites[units.site]
            if read.sliced:
                raise ValueError(
                    f"'{layer.weights[0]}' reads a part of hidden layer '{site.name}', which is not known here"
                )
            width = inputs if read.width is None and not read.reshaped else read.width
            if units.offset is None or width is None or inputs % width:
                raise ValueError(
                    f"where '{layer.weights[0]}' reads hidden layer '{site.name}' cannot be told from the layers; "
                    "give find_structure an example input"
                )
            per_unit = inputs // width
            bias = layer.biases[0] if layer.biases else None
            new = [(weight, bias, per_unit, site.copies, units.offset * per_unit) for weight in layer.weights]
            site.readers = list(_union(site.readers, new))
        index = next((i for i, known in enumerate(self.layers) if known.weights == layer.weights), len(self.layers))
        if index == len(self.layers):
            self.layers.append(layer)
        for before in read.bare:
            self.read_by.setdefault(before, set()).add(index)
        return Flow(layers=(index,), bare=(index,), width=layer.width)

    def _normalise(self, name: str, gain: str | None, offset: str | None, flow: Flow, batch: bool) -> Flow:
        pure = not (flow.units or flow.other or len(flow.bare) < len(flow.layers))
        self.norms.append(Norm(name, gain, offset, flow.bare, pure, batch))
        return replace(flow, bare=(), norms=(len(self.norms) - 1,), other=False)

    def _activate(self, node: fx.Node, nonlinearity: str, copies: int, flow: Flow) -> Flow:
        if flow.product and nonlinearity == "softmax":  # a weighting of other values
            self.attention.update(flow.layers)
            return Flow()
        layers = tuple(index for index in flow.layers if not self.layers[index].table)
        if not layers:
            return replace(flow, width=None if flow.width is None else flow.width * copies)
        self.leaks.update(flow.bare)
        for units in flow.units:
            self.sites[units.site].residual = True
        norm = self.norms[flow.norms[0]] if len(flow.norms) == 1 and not flow.bare else None
        width = self.layers[layers[0]].width if flow.width is None else flow.width
        name = str(node.target)
        if node.op != "call_module" or any(site.name == name for site in self.sites):
            name = node.name
            while hasattr(self.traced, name):
                name += "_call"
        first = self.layers[layers[0]]
        site = Site(
            name, node, nonlinearity, width, copies, layers, flow.bare, norm, first.weights[0], first.pixel_axes
        )
        self.sites.append(site)
        return Flow(units=(Units(len(self.sites) - 1),), width=width * copies)

    def _operation(self, node: fx.Node, name: str, inputs: list[Flow]) -> Flow:
        """Everything between layers that is neither a product with weights nor a nonlinearity."""
        attribute = node.args[1] if name == "getattr" else name
        plain = name.rstrip("_")
        if attribute in ("shape", "dtype", "device", "size", "dim", "ndim") or not inputs:
            return Flow()
        if attribute in ("mT", "T", "t", "transpose", "permute"):
            return replace(inputs[0], transposed=not inputs[0].transposed)
        if name in ("cat", "concat", "concatenate"):
            return self._concatenate(node)
        if name in ("chunk", "split", "narrow", "unbind"):
            return replace(inputs[0], sliced=True, width=None)
        if plain in _SUMS:
            return self._sum(inputs)
        if plain in _PRODUCTS:
            return self._product(inputs)
        if plain in _PASSING:
            return replace(inputs[0], reshaped=inputs[0].reshaped or plain in ("view", "reshape", "flatten"))
        return self._unknown(node, name, inputs)

    def _concatenate(self, node: fx.Node) -> Flow:
        parts: Any = tracing.argument(node, 0, "tensors")
        axis: Any = tracing.argument(node, 1, "dim") or 0
        offset: int | None = 0
        units: list[Units] = []
        for part in parts:
            flow, shape = self.flows[part], part.meta.get("tensor_meta")
            width = shape.shape[axis] if shape is not None and flow.width is None else flow.width
            places = [None if offset is None or u.offset is None else offset + u.offset for u in flow.units]
            units += [Units(u.site, place) for u, place in zip(flow.units, places, strict=True)]
            offset = None if offset is None or width is None else offset + width
        return replace(self._sum([self.flows[part] for part in parts]), units=tuple(units), width=offset)

    def _unknown(self, node: fx.Node, name: str, inputs: list[Flow]) -> Flow:
        """An operation that may stand before the first weights or after the last, but not between."""
        flow = self._sum([replace(flow, parameters=()) for flow in inputs if flow.data] or inputs)
        if not flow.layers and not flow.units:
            return replace(flow, width=None)
        return self._activate(node, f"?{name}", 1, flow) if flow.layers else replace(flow, sliced=True)

    def _finish(self) -> None:
        """Output functions are no hidden layers: the layers in front of them are heads."""
        for site in self.sites:
            unknown = site.nonlinearity.startswith("?")
            if (unknown or site.nonlinearity in _OUTPUT_FUNCTIONS) and not site.readers and not site.residual:
                self.heads = _union(self.heads, site.layers)
                site.layers = ()
            elif unknown:
                raise ValueError(f"the operation '{site.nonlinearity[1:]}' between weights is not known here")
        if not self.hidden:
            raise ValueError("there is no nonlinearity between the weights of this network, so it has no hidden units")
        for layer in reversed(range(len(self.layers))):  # factors of a head are heads
            readers = self.read_by.get(layer)
            if readers and readers <= set(self.heads) and layer not in self.attention:
                self.heads = (layer, *self.heads)

    def groups(self) -> list[Group]:
        """Layers that meet in front of a normaliser, directly or through others, belong together."""
        together: list[set[int]] = []
        for norm in self.norms:
            meeting = [group for group in together if group & set(norm.layers)]
            together = [group for group in together if group not in meeting] + [set(norm.layers).union(*meeting)]
        groups = []
        for members in filter(None, together):
            norms = [norm for norm in self.norms if members & set(norm.layers)]
            exact = all(norm.pure for norm in norms) and not members & self.leaks
            batch = any(norm.batch for norm in norms)
            groups.append(Group(tuple(sorted(members)), _union(norm.name for norm in norms), exact, batch))
        return sorted(groups, key=lambda group: group.layers)


_OUTPUT_FUNCTIONS = {"tanh", "sigmoid", "softplus", "softmax", "log_softmax", "logsigmoid", "hardtanh", "sin", "cos"}
_SUMS = {"add", "iadd", "sub", "isub", "sum", "mean", "stack"}
_PRODUCTS = {"mul", "imul", "truediv", "div", "neg"}
# Operations behind which feature i is still feature i.
_PASSING = {
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as", "repeat", "contiguous",
    "clone", "float", "double", "half", "to", "type", "type_as", "detach", "getitem", "dropout", "max_pool2d",
    "avg_pool2d", "adaptive_avg_pool2d", "max_pool1d", "avg_pool1d", "amax", "movedim", "interpolate", "_assert",
}  # fmt: skip


def _attribute(module: nn.Module, path: str) -> Any:
    return operator.attrgetter(path)(module)


def analyse(network: nn.Module, example: Tensor | tuple[Tensor, ...] | None = None) -> Dataflow:
    """Trace and read. Raises ValueError as `structure.find_structure` says."""
    return Dataflow(tracing.trace(network, example))
