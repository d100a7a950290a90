"""Network layers that several agents use, and their initialisation from an explicit generator."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plasticity.networks.stacked import stack
from plasticity.population import RandomStream

Network = TypeVar("Network", bound=nn.Module)


class Liftable(nn.Module):
    """A module that counts its axes from the end: a population of it is itself, with stacked parameters and children.

    Shapes are written [*S, ...], see `agents.population`. `plasticity.networks.stacked.stack` makes populations.
    """

    def draw_(self, generator: torch.Generator) -> None:
        """Draw the parameters that are the module's own, not its children's; none unless said."""

    @staticmethod
    def stacked(modules: Sequence[nn.Module]) -> nn.Module:
        """One module out of those of S seeds, whose values it copies."""
        whole = copy.deepcopy(modules[0])
        for name, _ in modules[0].named_parameters(recurse=False):
            values = [module.get_parameter(name).detach() for module in modules]
            whole.register_parameter(name, nn.Parameter(torch.stack(values)))
        for name, _ in modules[0].named_buffers(recurse=False):
            whole.register_buffer(name, torch.stack([module.get_buffer(name) for module in modules]))
        for name, _ in modules[0].named_children():
            whole.register_module(name, stack([module.get_submodule(name) for module in modules]))
        return whole


class StackedLinear(Liftable):
    """K linear layers side by side: [*S, K, B, in] -> [*S, K, B, out].

    One batched product instead of K small ones, for twin critics; instead of S K in a population.

    law: of the first weights; uniform in ± 1 / √in, as are the biases, or with biases of 0 orthogonal (Saxe et al.
    2014) or normal with variance 2 / in (He et al. 2015).
    """

    own_axes, inputs_axis = 2, -2  # for plasticity.networks.tracing

    def __init__(self, count: int, inputs: int, outputs: int, law: Literal["uniform", "orthogonal", "he"] = "uniform"):
        super().__init__()
        self.law = law
        self.weight = nn.Parameter(torch.empty(count, inputs, outputs))
        self.bias: nn.Parameter | None = nn.Parameter(torch.empty(count, 1, outputs))

    @torch.no_grad()
    def draw_(self, generator: torch.Generator) -> None:
        """By the law."""
        inputs = self.weight.shape[1]
        if self.law == "orthogonal":
            for weight in self.weight:
                nn.init.orthogonal_(weight, generator=generator)
        elif self.law == "he":
            self.weight.normal_(0, math.sqrt(2 / inputs), generator=generator)
        if self.law != "uniform":
            if self.bias is not None:
                self.bias.zero_()
            return
        bound = 1 / math.sqrt(inputs)
        self.weight.uniform_(-bound, bound, generator=generator)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return _product(x, self.weight, self.bias)

    def select(self, index: int, x: Tensor) -> Tensor:
        """Only layer `index`: [*S, B, in] -> [*S, B, out]."""
        bias = None if self.bias is None else self.bias.select(-3, index)
        return _product(x, self.weight.select(-3, index), bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight + bias over the last two axes: x [..., B, in], weight [..., in, out], bias [..., 1, out]."""
    if bias is None:
        return torch.matmul(x, weight)
    if x.ndim == 2:
        return torch.addmm(bias, x, weight)
    if x.ndim == 3:
        return torch.baddbmm(bias, x, weight)
    product = torch.baddbmm(*(tensor.flatten(0, -3) for tensor in (bias, x, weight)))
    return product.unflatten(0, x.shape[:-2])


class StackedLayerNorm(Liftable):
    """K layer normalisations side by side, over the last axis of [*S, K, B, D] (Ba et al. 2016)."""

    normaliser, own_axes = True, 1  # for plasticity.networks.tracing

    def __init__(self, count: int, features: int):
        super().__init__()
        self.weight: nn.Parameter | None = nn.Parameter(torch.ones(count, 1, features))
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(count, 1, features))

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, x.shape[-1:])
        return y if self.weight is None or self.bias is None else y * self.weight + self.bias

    def select(self, index: int, x: Tensor) -> Tensor:
        """Only normalisation `index`: [*S, B, D] -> [*S, B, D]."""
        y = F.layer_norm(x, x.shape[-1:])
        if self.weight is None or self.bias is None:
            return y
        return y * self.weight.select(-3, index) + self.bias.select(-3, index)


class Critics(Liftable):
    """K independent action-value networks Q_k(s, a): multilayer perceptrons with ReLU, evaluated together."""

    def __init__(self, count: int, observations: int, actions: int, hidden: Sequence[int], layer_norm: bool):
        super().__init__()
        self.count = count
        sizes = [observations + actions, *hidden]
        self.layers = nn.ModuleList(StackedLinear(count, i, o) for i, o in zip(sizes[:-1], hidden, strict=True))
        # One output each: a dot product takes half the time of a matrix product here.
        self.head = StackedLinear(count, hidden[-1], 1)
        self.norms = nn.ModuleList(StackedLayerNorm(count, size) if layer_norm else nn.Identity() for size in hidden)
        self.acts = nn.ModuleList(nn.ReLU(inplace=True) for _ in hidden)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """obs [*S, B, O], action [*S, B, A] -> values [*S, K, B]."""
        return self.head_values(self.features(obs, action))

    def features(self, obs: Tensor, action: Tensor) -> Tensor:
        """φ_k(s, a), what the head reads: [*S, K, B, D]."""
        x = torch.cat([obs, action], -1).unsqueeze(-3)
        return self._features(x.expand(*x.shape[:-3], self.count, -1, -1))

    def straight_forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """The same without a look at shapes, for tracing."""
        return self.head_values(self._features(torch.cat([obs, action], -1).expand(self.count, -1, -1)))

    def _features(self, x: Tensor) -> Tensor:
        for layer, norm, act in zip(self.layers, self.norms, self.acts, strict=True):
            x = act(norm(layer(x)))
        return x

    def head_values(self, features: Tensor) -> Tensor:
        """Values [*S, K, B] of features [*S, K, B, D]."""
        return torch.linalg.vecdot(features, self.head.weight.mT) + cast(Tensor, self.head.bias).squeeze(-1)

    def first(self, obs: Tensor, action: Tensor) -> Tensor:
        """Only Q_1: obs [*S, B, O], action [*S, B, A] -> values [*S, B]."""
        x = torch.cat([obs, action], -1)
        for layer, norm, act in zip(self.layers, self.norms, self.acts, strict=True):
            x = layer.select(0, x)  # type: ignore[operator]
            x = act(norm.select(0, x) if isinstance(norm, StackedLayerNorm) else x)
        weight, bias = (cast(Tensor, t).select(-3, 0) for t in (self.head.weight, self.head.bias))
        return torch.linalg.vecdot(x, weight.mT) + bias.squeeze(-1)


class NoisyLinear(Liftable):
    """A linear layer with learned noise on its weights, factorised (Fortunato et al. 2018, arXiv:1706.10295).

        y = (μ + σ ∘ ε_out ε_inᵀ) x + μ_b + σ_b ∘ ε_out  =  (μ x + μ_b) + ε_out ∘ (σ (ε_in ∘ x) + σ_b)      eqs. 9 to 11

    The right side is what is computed: two ordinary layers, no noise as large as the weights. At first μ is uniform in
    ± 1 / √in, σ = scale / √in everywhere.
    """

    def __init__(self, inputs: int, outputs: int, scale: float):
        super().__init__()
        self.mean = nn.Linear(inputs, outputs)
        self.deviation = nn.Linear(inputs, outputs)
        self.deviation.constant = scale / math.sqrt(inputs)  # type: ignore[assignment]

    @property
    def noise_sizes(self) -> tuple[int, int]:
        """How many numbers ε_in and ε_out have."""
        outputs, inputs = cast(Tensor, self.deviation.weight).shape[-2:]
        return inputs, outputs

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """x [*S, B, in], noise ε_in and ε_out [*S, in + out], the same for the whole batch; None: none."""
        if noise is None:
            return self.mean(x)
        incoming, outgoing = noise.unsqueeze(-2).split(self.noise_sizes, -1)
        return self.mean(x) + outgoing * self.deviation(incoming * x)

    def straight_forward(self, x: Tensor) -> Tensor:
        """What its weights are summed in, for tracing."""
        return self.mean(x) + self.deviation(x)


class ActionValues(Protocol):
    """K action-value networks, linear in their features."""

    count: int
    head: StackedLinear

    def __call__(self, obs: Tensor, action: Tensor) -> Tensor:
        """obs [*S, B, O], action [*S, B, A] -> values [*S, K, B]."""
        ...

    def features(self, obs: Tensor, action: Tensor) -> Tensor:
        """What the head reads: [*S, K, B, D]."""
        ...


def mlp(inputs: int, hidden: Sequence[int], outputs: int, layer_norm: bool) -> nn.Sequential:
    """Linear, [LayerNorm,] ReLU for each hidden size, and a linear head: [B, inputs] -> [B, outputs]."""
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(inputs, size), *([nn.LayerNorm(size)] if layer_norm else []), nn.ReLU(inplace=True)]
        inputs = size
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class DeterministicActor(Liftable):
    """Policy a = tanh(f(s)): obs [*S, B, O] -> action [*S, B, A] in [-1, 1]."""

    def __init__(self, observations: int, actions: int, hidden: Sequence[int], layer_norm: bool):
        super().__init__()
        self.net = mlp(observations, hidden, actions, layer_norm)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).tanh()


def squashed_sample(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """a = tanh(μ + σ ε) and log π(a), with the correction of the tanh (Haarnoja et al. 2018, appendix C, eq. 26).

    mean, log_std and standard normal noise [*S, B, A] -> action [*S, B, A] and its log-probability [*S, B].
    """
    before_tanh = mean + log_std.exp() * noise
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    # log(1 - tanh(u)²) written so that it neither overflows nor loses digits for large |u|
    log_slope = 2 * (math.log(2) - before_tanh - F.softplus(-2 * before_tanh))
    return before_tanh.tanh(), (log_normal - log_slope).sum(-1)


class NatureCNN(Liftable):
    """The convolutional encoder of Mnih et al. 2015: uint8 [*S, B, C, 84, 84] -> features [*S, B, 512].

    Bytes are scaled to [0, 1] here, on the device, so that they travel and rest as bytes. dense: with the layer of 512
    units behind the convolutions; without it, the features are their outputs.
    """

    features = 512

    def __init__(self, shape: tuple[int, ...], layer_norm: bool, dense: bool = True):
        super().__init__()
        if len(shape) != 3 or min(shape[1:]) < 36:
            raise ValueError(f"the Nature CNN needs images [channels, >= 36, >= 36], got {list(shape)}")
        channels, height, width = shape
        layers: list[nn.Module] = []
        for out, kernel, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
            height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
            norm = [nn.LayerNorm([out, height, width])] if layer_norm else []
            layers += [nn.Conv2d(channels, out, kernel, stride), *norm, nn.ReLU(inplace=True)]
            channels = out
        flat = channels * height * width
        layers.append(nn.Flatten())
        if dense:
            norm = [nn.LayerNorm(self.features)] if layer_norm else []
            layers += [nn.Linear(flat, self.features), *norm, nn.ReLU(inplace=True)]
        else:
            self.features = flat
        self.net = nn.Sequential(*layers)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def straight_forward(self, image: Tensor) -> Tensor:
        """The same without a look at shapes, for tracing."""
        return self.net(image.float() / 255)

    def forward(self, image: Tensor) -> Tensor:
        if image.ndim > 4:  # a population, as one grouped convolution
            return self.net(image.float() / 255)
        # channels_last convolutions take 1.2 x less time on CPU (specs/training-speed.md, section 2), and one pass over
        # the bytes, then in place, 2.5 x less than scaling and reordering apart.
        scaled = image.to(torch.float32, memory_format=torch.channels_last, copy=True).div_(255)
        return self.net(scaled)


@torch.no_grad()
def initialise_(net: nn.Module, generator: torch.Generator) -> None:
    """Draw all weights anew from `generator`: uniform in ± 1 / √fan_in, weights and biases (PyTorch's default law).

    The draw happens on the generator's device in the order of `net.modules()`. Normalisations keep scale 1, offset 0;
    modules of our own draw as they say in `draw_`, layers with an attribute `orthogonal_gain` get an orthogonal weight
    of this gain and no bias (Saxe et al. 2014), those with an attribute `constant` this number everywhere.
    """
    for module in net.modules():
        if isinstance(module, Liftable):
            module.draw_(generator)
        if (gain := getattr(module, "orthogonal_gain", None)) is not None:
            _draw_orthogonal_(module, gain, generator)
        elif (constant := getattr(module, "constant", None)) is not None:
            for parameter in module.parameters():
                parameter.fill_(constant)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())
            for parameter in (module.weight, module.bias):
                if parameter is not None:
                    parameter.uniform_(-bound, bound, generator=generator)


def _draw_orthogonal_(layer: nn.Module, gain: float, generator: torch.Generator) -> None:
    weight = layer.get_parameter("weight")
    weight.copy_(nn.init.orthogonal_(torch.empty(weight.shape, device=weight.device), gain, generator=generator))
    for name, parameter in layer.named_parameters():
        if name == "bias":
            parameter.zero_()


def new_network(make: Callable[[], Network], stream: RandomStream) -> Network:
    """What `make` builds, on the stream's device and with weights drawn from it; for a population, one of each seed."""
    networks = []
    for generator in stream.generators:
        with stream.device:
            networks.append(make())
        initialise_(networks[-1], generator)
    return cast(Network, stack(networks)) if stream.lead else networks[0]
