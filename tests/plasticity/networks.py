"""Small networks of every kind that people train, for the tests of structure and of NaP."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from agents.networks import DeterministicActor, NatureCNN
from plasticity.networks.nonlinearities import CReLU


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()
        self.first, self.second, self.third, self.head = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        x = F.relu(self.first(x))
        x = self.relu(self.second(x))
        return self.head(self.relu(self.third(x)).mul(0.5).tanh())


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(1, 4), nn.GroupNorm(1, 4)
        self.inner, self.outer = nn.ReLU(), nn.ReLU()

    def forward(self, x):
        return self.outer(x + self.norm2(self.conv2(self.inner(self.norm1(self.conv1(x))))))


class Dueling(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten())
        self.value = nn.Sequential(nn.Linear(8 * 16, 5), nn.ReLU(), nn.Linear(5, 1))
        self.advantage = nn.Sequential(nn.Linear(8 * 16, 7), nn.ReLU(), nn.Linear(7, 3))

    def forward(self, x):
        features = self.encoder(x)
        advantage = self.advantage(features)
        return self.value(features) + advantage - advantage.mean(1, keepdim=True)


class Concatenated(nn.Module):
    """Two hidden layers side by side, and the input behind them."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Sequential(nn.Linear(6, 3), nn.ReLU()), nn.Sequential(nn.Linear(6, 4), nn.ReLU())
        self.both, self.act, self.head = nn.Linear(13, 5), nn.ReLU(), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.act(self.both(torch.cat([self.left(x), self.right(x), x], -1))))


class Noisy(nn.Module):
    """The weights are computed: mean plus scaled noise (Fortunato et al. 2018)."""

    def __init__(self):
        super().__init__()
        self.weight_mean, self.weight_scale = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5, 6))
        self.bias_mean, self.bias_scale = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))
        self.register_buffer("noise", torch.randn(5, 6))
        self.act, self.head = nn.ReLU(), nn.Linear(5, 2)

    def forward(self, x):
        weight = self.weight_mean + self.weight_scale * self.noise
        return self.head(self.act(F.linear(x, weight, self.bias_mean + self.bias_scale * self.noise[:, 0])))


def residual():
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(1, 4), nn.ReLU(), Block(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def mlp():
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)
    )


def cnn():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1), nn.LeakyReLU(0.1),
        nn.Flatten(), nn.Linear(32, 5), nn.GELU(), nn.Linear(5, 2),
    )  # fmt: skip


class Sum(nn.Module):
    """Two weights meet in front of one normaliser."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 4, bias=False), nn.Linear(6, 4), nn.LayerNorm(4)
        self.act, self.head = nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.act(self.norm(self.a(x) + self.b(x))))


class Recurrent(nn.Module):
    """Two steps of a gated cell; input and state weights of a gate are summed and normalised."""

    def __init__(self):
        super().__init__()
        self.input, self.state = nn.Linear(6, 5, bias=False), nn.Linear(5, 5, bias=False)
        self.gate_input, self.gate_state = nn.Linear(6, 5, bias=False), nn.Linear(5, 5, bias=False)
        self.norm, self.gate_norm = nn.LayerNorm(5), nn.LayerNorm(5)
        self.start = nn.Linear(6, 5, bias=False)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        state = torch.tanh(self.norm(self.start(x)))
        for _ in range(2):
            gate = torch.sigmoid(self.gate_norm(self.gate_input(x) + self.gate_state(state)))
            state = gate * state + (1 - gate) * torch.tanh(self.norm(self.input(x) + self.state(state)))
        return self.head(state)


class Transformer(nn.Module):
    """Tokens, positions, pre-norm blocks, a final norm."""

    def __init__(self):
        super().__init__()
        self.emb, self.pos = nn.Embedding(10, 8), nn.Parameter(torch.randn(5, 8))
        block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.enc = nn.TransformerEncoder(block, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.enc(self.emb(x) + self.pos)[:, 0])


class PreActivation(nn.Module):
    """Every convolution writes into a stream that is normalised where it is read."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norms = nn.ModuleList(nn.GroupNorm(1, 4, affine=False) for _ in range(3))
        self.acts = nn.ModuleList(nn.ReLU() for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.one(self.acts[0](self.norms[0](x)))
        x = x + self.two(self.acts[1](self.norms[1](x)))
        return self.head(self.acts[2](self.norms[2](x)).mean((2, 3)))


IMAGES, VECTORS = (2, 4, 6, 6), (2, 6)
CASES = {
    "mlp": (mlp, VECTORS),
    "cnn": (cnn, IMAGES),
    "crelu": (lambda: nn.Sequential(nn.Conv2d(4, 3, 3), CReLU(), nn.Flatten(), nn.Linear(96, 2)), IMAGES),
    "functional": (Functional, VECTORS),
    "residual": (residual, IMAGES),
    "dueling": (Dueling, IMAGES),
    "concatenated": (Concatenated, VECTORS),
    "noisy": (Noisy, VECTORS),
    "sum": (Sum, VECTORS),
    "recurrent": (Recurrent, VECTORS),
    "transformer": (Transformer, None),
    "pre-activation": (PreActivation, IMAGES),
    "actor": (lambda: DeterministicActor(6, 2, (8, 5), layer_norm=True), VECTORS),
    "nature": (lambda: nn.Sequential(NatureCNN((2, 36, 36), True), nn.Linear(512, 3)), (2, 2, 36, 36)),
}


def build(case, seed=0):
    make, shape = CASES[case]
    torch.manual_seed(seed)
    return make(), torch.randint(10, (2, 5)) if shape is None else torch.randn(shape)
