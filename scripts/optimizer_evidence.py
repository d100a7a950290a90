"""What the shelf of optimisers does on 8 x 8 digits: the tables of docs/results/optimizers.md, medians over seeds.

python scripts/optimizer_evidence.py --seeds 3 [adamp muon seednorm lipschitz safe-step adaptive-batch]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plasticity.intervention import Batch, Learner
from plasticity.interventions.adaptive_batch import BatchSize, norm_test, per_sample_gradients
from plasticity.interventions.safe_step import SafeStep
from plasticity.interventions.seednorm import SeeDNorm
from plasticity.measures.lipschitz import lipschitz_bound
from plasticity.networks.architectures import draw_
from plasticity.networks.stacked import stack
from plasticity.networks.structure import find_structure
from plasticity.optimisers.adagrad import AdAdaGrad, AdaGrad
from plasticity.optimisers.adamp import AdamP
from plasticity.optimisers.lipschitz import ConstrainedMuon, parameter_groups
from plasticity.optimisers.muon import Muon, hidden_matrices
from plasticity.optimisers.normuon import NorMuon
from plasticity.optimisers.proposing import ProposingOptimizer, scaled_step
from plasticity.optimisers.sgdp import SGDP
from plasticity.problems.datasets import digits

Make = Callable[[nn.Module], ProposingOptimizer]
AfterStep = Callable[[int, nn.Module, ProposingOptimizer, Tensor], None]


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train inputs [1397, 64] of mean 0, labels, and the same for the 400 test digits."""
    images = digits()
    train, test = (x.float().flatten(1) / 16 for x in (images.train_images, images.test_images))
    mean = train.mean(0)
    return train - mean, images.train_labels, test - mean, images.test_labels


def population(make: Callable[[], nn.Module], seeds: Sequence[int]) -> nn.Module:
    return stack([draw_(make(), "torch", torch.Generator().manual_seed(seed)) for seed in seeds])


def mlp(width: int = 128, norm: Callable[[int], nn.Module] | None = None, bias: bool = True) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs in (64, width):
        layers += [nn.Linear(inputs, width, bias), *([norm(width)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10, bias))


def losses(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """[K] from x [K, B, 64] and y [K, B]."""
    return F.cross_entropy(network(x).transpose(1, 2), y, reduction="none").mean(1)


def accuracy(network: nn.Module, x: Tensor, y: Tensor, members: int) -> list[float]:
    with torch.no_grad():
        return (network(x.expand(members, *x.shape)).argmax(2) == y).float().mean(1).tolist()


def train(
    network: nn.Module,
    optimizer: ProposingOptimizer,
    seeds: Sequence[int],
    steps: int,
    batch_size: int = 64,
    after: AfterStep | None = None,
    safe: SafeStep | None = None,
    spike: tuple[int, float] = (-1, 1.0),
) -> list[Tensor]:
    """The members' losses [K] before each step. spike: the learning rate is that much larger at that step."""
    x, y, _, _ = data()
    sources = [torch.Generator().manual_seed(1000 + seed) for seed in seeds]
    learner = Learner(network, find_structure(network), optimizer, len(seeds), sources, lambda source: network)
    history = []
    if safe is not None:
        safe.begin(learner)
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        rows = torch.stack([torch.randint(len(x), (batch_size,), generator=source) for source in sources])
        loss = losses(network, x[rows], y[rows])
        history.append(loss.detach())
        optimizer.zero_grad()
        loss.sum().backward()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (spike[1] if step == spike[0] else 1.0)
        if safe is None:
            optimizer.step()
        else:
            scaled_step(learner, Batch(x[rows], y[rows], {}), [safe])
        if after is not None:
            after(step, network, optimizer, loss)
    return history


def median(values: Sequence[float]) -> str:
    """Median (smallest to largest)."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.3g} ({low:.3g} to {high:.3g})"


def row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def heading(*cells: str) -> None:
    row(*cells)
    row(*["---"] * len(cells))


def adamp(seeds: Sequence[int]) -> None:
    """Norm growth behind LayerNorm."""
    _, _, x, y = data()
    heading(
        "optimiser",
        "growth of |w|^2 of normalised layers",
        "projected, normalised layers",
        "projected, head",
        "test accuracy",
    )
    makers: dict[str, Make] = {
        "SGD 0.03": lambda n: SGDP(n.parameters(), 0.03, 0.9, delta=0.0, stacked=True),
        "SGDP 0.03": lambda n: SGDP(n.parameters(), 0.03, 0.9, stacked=True),
        "SGD 0.3": lambda n: SGDP(n.parameters(), 0.3, 0.9, delta=0.0, stacked=True),
        "SGDP 0.3": lambda n: SGDP(n.parameters(), 0.3, 0.9, stacked=True),
        "Adam 3e-3": lambda n: AdamP(n.parameters(), 3e-3, delta=0.0, stacked=True),
        "AdamP 3e-3": lambda n: AdamP(n.parameters(), 3e-3, stacked=True),
    }
    for name, make in makers.items():
        network = population(lambda: mlp(norm=lambda w: nn.LayerNorm(w, elementwise_affine=False), bias=False), seeds)
        optimizer = make(network)
        weights = [p for p in network.parameters() if p.dim() == 3]
        before = [p.detach().flatten(1).square().sum(1) for p in weights[:2]]
        shares: list[list[Tensor]] = [[], [], []]

        def after(
            step: int,
            network: nn.Module,
            optimizer: ProposingOptimizer,
            loss: Tensor,
            shares: list[list[Tensor]] = shares,
        ) -> None:
            for share, view in zip(shares, optimizer.views, strict=True):  # pyright: ignore
                share.append((view > 0).float())

        train(network, optimizer, seeds, 600, after=after)
        growth = [p.detach().flatten(1).square().sum(1) / b - 1 for p, b in zip(weights, before, strict=False)]
        projected = [torch.stack(share).mean(0) for share in shares]
        shown = [torch.stack(growth).mean(0), (projected[0] + projected[1]) / 2, projected[2]]
        row(name, *(median(t.tolist()) for t in shown), median(accuracy(network, x, y, len(seeds))))


def muon(seeds: Sequence[int]) -> None:
    """Steps to a loss, and how even the rows of the update are."""
    _, _, x, y = data()
    heading("optimiser", "steps to train loss 0.1", "row variation, step 1", "row variation, step 300", "test accuracy")

    def groups(network: nn.Module) -> list[dict[str, object]]:
        matrices, others = hidden_matrices(network, dict(network.named_parameters()), True)
        return [{"params": matrices}, {"params": others, "adam": True, "lr": 3e-3}]

    makers: dict[str, Make] = {
        "AdamW 1e-3": lambda n: AdamP(n.parameters(), 1e-3, delta=0.0, stacked=True),
        "AdamW 3e-3": lambda n: AdamP(n.parameters(), 3e-3, delta=0.0, stacked=True),
        "AdamW 1e-2": lambda n: AdamP(n.parameters(), 1e-2, delta=0.0, stacked=True),
        "Muon 0.02": lambda n: Muon(groups(n), 0.02, stacked=True),
        "Muon 0.1": lambda n: Muon(groups(n), 0.1, stacked=True),
        "NorMuon 0.02": lambda n: NorMuon(groups(n), 0.02, stacked=True),
        "NorMuon 0.1": lambda n: NorMuon(groups(n), 0.1, stacked=True),
    }
    for name, make in makers.items():
        network = population(mlp, seeds)
        variation: dict[int, list[float]] = {}

        def after(
            step: int,
            network: nn.Module,
            optimizer: ProposingOptimizer,
            loss: Tensor,
            variation: dict[int, list[float]] = variation,
        ) -> None:
            if step in (0, 299):
                weight = next(p for p in optimizer.proposed if p.dim() == 3)
                rows = optimizer.taken[[id(p) for p in optimizer.proposed].index(id(weight))].norm(dim=2)
                variation[step] = (rows.std(1) / rows.mean(1)).tolist()

        history = torch.stack(train(network, make(network), seeds, 400, after=after))
        smooth = history.unfold(0, 10, 1).mean(-1)  # over 10 batches
        reached = [float((s <= 0.1).nonzero()[0]) if bool((s <= 0.1).any()) else float("inf") for s in smooth.unbind(1)]
        row(
            name,
            median(reached),
            median(variation[0]),
            median(variation[299]),
            median(accuracy(network, x, y, len(seeds))),
        )


def seednorm(seeds: Sequence[int]) -> None:
    """Against RMSNorm."""
    _, _, x, y = data()
    heading("normaliser", "train loss, steps 1-100", "train loss, steps 500-600", "test accuracy", "|beta|", "mean |s|")
    kept = {}
    for name in ("RMSNorm", "SeeDNorm, beta frozen", "SeeDNorm", "SeeDNorm, 8 heads"):
        heads = 8 if "heads" in name else 1
        make = (lambda w: nn.RMSNorm(w, 1e-6)) if name == "RMSNorm" else (lambda w, heads=heads: SeeDNorm(w, heads))
        network = population(lambda make=make: mlp(norm=make), seeds)
        parameters = [p for n, p in network.named_parameters() if "frozen" not in name or "beta" not in n]
        history = torch.stack(train(network, AdamP(parameters, 3e-3, delta=0.0, stacked=True), seeds, 600))
        kept[name] = history
        cells = [median(history[:100].mean(0).tolist()), median(history[500:].mean(0).tolist())]
        cells.append(median(accuracy(network, x, y, len(seeds))))
        norm = network.get_submodule("1")
        if isinstance(norm, nn.RMSNorm) or not hasattr(norm, "beta"):
            row(name, *cells, "", "")
            continue
        with torch.no_grad():
            inside = network.get_submodule("0")(x.expand(len(seeds), *x.shape))
            score = (inside * norm.beta.unsqueeze(1)).unflatten(-1, (heads, -1)).sum(-1).tanh()  # pyright: ignore
            row(name, *cells, median(norm.beta.norm(dim=1).tolist()), median(score.abs().mean((1, 2)).tolist()))  # pyright: ignore
    same = torch.equal(kept["RMSNorm"], kept["SeeDNorm, beta frozen"])
    print(f"\nwith beta frozen the losses equal those of RMSNorm bit for bit: {same}")


def lipschitz(seeds: Sequence[int]) -> None:
    """Accuracy against the certified bound."""
    _, _, x, y = data()
    heading("w_max", "method", "certified bound (rms)", "test accuracy")
    for maximum in (1.0, 2.0, 4.0, 8.0, None):
        makers: dict[str, Make] = {
            "Muon, soft cap": lambda n, m=maximum: ConstrainedMuon(
                parameter_groups(n, dict(n.named_parameters()), 3e-3, True),
                0.1,
                m or 1.0,
                "spectral_soft_cap",
                stacked=True,
            ),
            "Adam, spectral normalise": lambda n, m=maximum: ConstrainedMuon(
                parameter_groups(n, dict(n.named_parameters()), 3e-3, True),
                3e-3,
                m or 1.0,
                "spectral_normalize",
                "adam",
                stacked=True,
            ),
        }
        if maximum is None:
            makers = {
                f"Adam, weight decay {decay}": lambda n, decay=decay: AdamP(
                    n.parameters(), 3e-3, weight_decay=decay, delta=0.0, stacked=True
                )
                for decay in (3.0, 1.0, 0.3, 0.0)
            }
        for name, make in makers.items():
            network = population(mlp, seeds)
            optimizer = make(network)
            if isinstance(optimizer, ConstrainedMuon):
                optimizer.constrain_now()
            train(network, optimizer, seeds, 600)
            found = accuracy(network, x, y, len(seeds))
            row(maximum or "-", name, median(lipschitz_bound(network).tolist()), median(found))


def safe_step(seeds: Sequence[int]) -> None:
    """A spike of the learning rate at step 50 of 200 (MLP 64-128-10, Adam, as in the paper)."""
    _, _, x, y = data()
    heading("learning rate", "spike", "plain, test accuracy", "controller 0.5, test accuracy", "largest r taken")

    def small() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    for rate in (1e-4, 1e-3, 1e-2):
        for spike in (1e3, 1e4):
            found, taken = [], []
            for safe in (None, SafeStep()):
                network = population(small, seeds)

                def after(
                    step: int,
                    network: nn.Module,
                    optimizer: ProposingOptimizer,
                    loss: Tensor,
                    safe: SafeStep | None = safe,
                ) -> None:
                    if safe is not None:
                        taken.append(float(safe.last["r_after"].max()))  # noqa: B023

                optimizer = AdamP(network.parameters(), rate, delta=0.0, stacked=True)
                train(network, optimizer, seeds, 200, after=after, safe=safe, spike=(50, spike))
                found.append(median(accuracy(network, x, y, len(seeds))))
            row(rate, f"x {spike:g}", *found, f"{max(taken):.4f}")
    print()
    heading("r of one step", "loss after / before, median of seeds and 20 starts", "worst")
    for target in (0.25, 0.5, 1.0, 2.0, 4.0, 16.0):
        ratios: list[float] = []
        for start in range(20):
            network = population(small, seeds)
            train(network, AdamP(network.parameters(), 1e-3, delta=0.0, stacked=True), seeds, 5 * start)
            inputs, labels = data()[0][:256].expand(len(seeds), -1, -1), data()[1][:256].expand(len(seeds), -1)
            before = losses(network, inputs, labels)
            network.zero_grad()
            before.sum().backward()
            optimizer = SGDP(network.parameters(), 1.0, delta=0.0, stacked=True)
            learner = Learner(network, find_structure(network), optimizer, len(seeds), [], lambda source: small())
            scaled_step(learner, Batch(inputs, labels, {}), [SafeStep(target, "set")])
            ratios += (losses(network, inputs, labels) / before).tolist()
        row(target, f"{statistics.median(ratios):.3g}", f"{max(ratios):.3g}")


def adaptive_batch(seeds: Sequence[int]) -> None:
    """Batches that grow, at 30 000 samples; whole batches first, then micro-batches of 8 that a population adds up."""
    inputs, labels, x, y = data()
    heading("optimiser", "first batch", "batch after 10 %", "last batch", "updates", "test accuracy")
    samples = 30_000
    for eta in (0.5, 1.0, 2.0, None):
        results = []
        for seed in seeds:
            network = draw_(mlp(64), "torch", torch.Generator().manual_seed(seed))
            optimizer = AdaGrad(network.parameters(), 1.0)
            size = BatchSize(lambda g, eta=eta: norm_test(g, eta or 1.0), size=8, largest=512, every=5)
            source, seen, updates, early = torch.Generator().manual_seed(1000 + seed), 0, 0, 0
            while seen < samples:
                rows = torch.randint(len(inputs), (size.size,), generator=source)
                optimizer.zero_grad()
                F.cross_entropy(network(inputs[rows]), labels[rows]).backward()
                optimizer.step()
                seen, updates = seen + size.size, updates + 1
                early = size.size if seen < samples / 10 else early
                if eta is not None and updates % size.every == 0:
                    size.steps = updates - 1
                    size.observe(per_sample_gradients(network, F.cross_entropy, inputs[rows], labels[rows]))
            with torch.no_grad():
                results.append((early, size.size, updates, float((network(x).argmax(1) == y).float().mean())))
        name = "AdaGradNorm, batch 8" if eta is None else f"AdAdaGradNorm, eta {eta}"
        row(name, 8, *(median(column) for column in zip(*results, strict=True)))
    for eta in (1.0, 2.0):
        network = population(lambda: mlp(64), seeds)
        optimizer, early = AdAdaGrad(network.parameters(), 1.0, eta, 2, 64, stacked=True), []

        def after(
            step: int, network: nn.Module, optimizer: ProposingOptimizer, loss: Tensor, early: list[Tensor] = early
        ) -> None:
            if step == samples // 80:
                early.append(8 * optimizer.shared["size"])

        train(network, optimizer, seeds, samples // 8, 8, after)
        last, updates = 8 * optimizer.shared["size"], optimizer.shared["updates"]
        cells = [median(t.tolist()) for t in (early[0], last, updates)]
        row(f"population, micro-batches of 8, eta {eta}", 16, *cells, median(accuracy(network, x, y, len(seeds))))


EXPERIMENTS = {
    "adamp": adamp, "muon": muon, "seednorm": seednorm, "lipschitz": lipschitz, "safe-step": safe_step,
    "adaptive-batch": adaptive_batch,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(EXPERIMENTS), help=", ".join(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.names:
        begin = time.process_time()
        print(f"\n## {name}\n")
        EXPERIMENTS[name](range(arguments.seeds))
        print(f"\n{time.process_time() - begin:.0f} s of one core")


if __name__ == "__main__":
    main()
