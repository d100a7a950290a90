"""Does stacking make a language model learn faster than one that is deep from the start?

    python -m scripts.stacking_study --out results/stacking.json

Characters of Python's own documentation; a small GPT of 2 layers learns for --base steps and is then grown to 8 in each
of several ways, which go on for --more steps on the same batches; 8 layers from scratch take all of the steps. All
seeds are one population. Operations are those of products, forward and backward, counted on one step of each depth.
--arms runs some of them, and what --out holds of others stays.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from continual.growth.characters import docstrings, encoded
from continual.growth.stack import random_depth, set_gates, stack_depth, zero_depth
from continual.growth.transformers import GPT
from plasticity.adam import Adam
from plasticity.networks.stacked import member, stack
from plasticity.schedules import Cosine
from runs.statistics import summarise

LENGTH, BATCH, WIDTH, HEADS, FFN = 48, 8, 64, 4, 256
SMALL, FACTOR, WARMUP = 2, 4, 20
CHARACTERS, HELD_OUT, LOOK = 400_000, 40_000, 25
SCRATCH, BASE, ON = "8 layers from scratch", "2 layers", "2 layers, on"
ARMS = (SCRATCH, "stack", "interpolate", "zero", "random", ON)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base", type=int, default=300, help="steps of the small model")
    parser.add_argument("--more", type=int, default=500, help="steps after growth")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(options.out.read_text()) if options.out.is_file() else {}
    found |= Study(options.seeds, options.base, options.more).run(options.arms)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found))
    report(found)


class Study:
    """seeds: members of the population. base, more: steps before and after growth."""

    def __init__(self, seeds: int, base: int, more: int):
        self.seeds, self.base, self.more = seeds, base, more
        self.alphabet, codes = encoded(docstrings(CHARACTERS))
        self.train, self.test = codes[:-HELD_OUT], codes[-HELD_OUT:]

    def drawn(self, depth: int) -> list[GPT]:
        sizes = len(self.alphabet), LENGTH, WIDTH, HEADS, FFN, depth
        return [GPT.drawn(*sizes, torch.Generator().manual_seed(1000 + seed)) for seed in range(self.seeds)]

    def run(self, arms: Sequence[str]) -> dict[str, dict]:
        """Curves of these arms by name, and of the small model before it grows."""
        started, whole = time.process_time(), self.base + self.more
        found, small = {}, stack(self.drawn(SMALL))
        if SCRATCH in arms:
            found[SCRATCH] = self.curve(stack(self.drawn(SMALL * FACTOR)), 0, whole)
        found[BASE] = self.curve(small, 0, self.base, whole)
        singles = [member(small, template, k) for k, template in enumerate(self.drawn(SMALL))]
        for name, grow in self.growths().items():
            if name in arms:
                network = stack([grow(model, k) for k, model in enumerate(singles) if isinstance(model, GPT)])
                found[name] = self.curve(network, self.base, whole, gated=name == "random")
        if ON in arms:
            found[ON] = self.curve(small, self.base, whole)
        print(f"{time.process_time() - started:.0f} s of processor time", flush=True)
        return found

    def growths(self) -> dict[str, Callable[[GPT, int], GPT]]:
        def fresh(seed: int) -> Callable[[], nn.Module]:
            source = torch.Generator().manual_seed(2000 + seed)
            sizes = len(self.alphabet), LENGTH, WIDTH, HEADS, FFN, 1
            return lambda: GPT.drawn(*sizes, source).blocks[0]

        def with_blocks(make: Callable[[nn.ModuleList, int], nn.ModuleList]) -> Callable[[GPT, int], GPT]:
            return lambda m, k: GPT(m.embedding, make(m.blocks, k), m.norm, m.head)

        depth = SMALL * FACTOR
        return {
            "stack": with_blocks(lambda blocks, _: stack_depth(blocks, FACTOR)),
            "interpolate": with_blocks(lambda blocks, _: stack_depth(blocks, FACTOR, "interpolate")),
            "zero": with_blocks(lambda blocks, _: zero_depth(blocks, depth)),
            "random": with_blocks(lambda blocks, k: random_depth(blocks, depth, fresh(k))),
        }

    def curve(self, network: nn.Module, start: int, stop: int, of: int | None = None, gated: bool = False) -> dict:
        """Train from step `start` on, a rise and half a cosine to a tenth at `stop` (or `of`); held-out losses."""
        parameters = list(network.parameters())
        decayed = [p for p in parameters if p.dim() > 2]
        optimizers = [
            Adam(decayed, 1e-3, (0.9, 0.95), weight_decay=0.1),
            Adam([p for p in parameters if p.dim() <= 2], 1e-3, (0.9, 0.95)),
        ]
        schedule = Cosine((of or stop) - start, WARMUP, end=0.1)
        steps, losses, flops = [start], [self.held_out(network)], 0
        for step in range(start, stop):
            if gated:
                set_gates(network, min(1.0, (step - start) / (0.4 * (stop - start))))
            tokens = self.batch(step)
            if step == start:
                with FlopCounterMode(display=False) as counter:
                    torch.autograd.grad(self.loss(network, tokens).sum(), parameters)
                flops = counter.get_total_flops() / self.seeds
            loss = self.loss(network, tokens)
            gradients = dict(zip(map(id, parameters), torch.autograd.grad(loss.sum(), parameters), strict=True))
            clip_(list(gradients.values()))
            for optimizer in optimizers:
                optimizer.learning_rate = 1e-3 * schedule.factor(step - start + 1, 0)
                optimizer.step([gradients[id(p)] for p in optimizer.parameters])
            if (step + 1 - start) % LOOK == 0 or step + 1 == stop or step - start in (0, 4, 9):
                steps.append(step + 1)
                losses.append(self.held_out(network))
        print(f"after {stop} steps: {torch.tensor(losses[-1]).mean():.3f}", flush=True)
        return {"steps": steps, "losses": losses, "flops_per_step": flops}

    def batch(self, step: int) -> Tensor:
        """[K, B, T + 1] of every seed, the same for all arms."""
        found = []
        for seed in range(self.seeds):
            source = torch.Generator().manual_seed(seed * 1_000_003 + step)
            places = torch.randint(len(self.train) - LENGTH - 1, (BATCH, 1), generator=source)
            found.append(self.train[places + torch.arange(LENGTH + 1)])
        return torch.stack(found)

    @staticmethod
    def loss(network: nn.Module, tokens: Tensor) -> Tensor:
        """Mean cross-entropy of the next character, [K]."""
        outputs = network(tokens[..., :-1])
        return (
            F.cross_entropy(outputs.flatten(0, 2), tokens[..., 1:].flatten(), reduction="none")
            .view(len(tokens), -1)
            .mean(1)
        )

    @torch.no_grad()
    def held_out(self, network: nn.Module) -> list[float]:
        """The same of 64 windows of the end of the text."""
        places = torch.linspace(0, HELD_OUT - LENGTH - 2, 64).long().unsqueeze(1) + torch.arange(LENGTH + 1)
        return self.loss(network, self.test[places].expand(self.seeds, -1, -1)).tolist()


def clip_(gradients: list[Tensor], most: float = 1.0) -> None:
    """Of each member, to length 1."""
    norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    for g in gradients:
        g.mul_(factor.view(-1, *[1] * (g.dim() - 1)))


def report(found: dict[str, dict]) -> None:
    """Held-out losses at a few steps, mean and interval over seeds, and steps and operations to the same loss."""
    if SCRATCH not in found:
        return
    scratch, base = found[SCRATCH], found[BASE]
    goal = sum(scratch["losses"][-1]) / len(scratch["losses"][-1])
    spent = base["flops_per_step"] * base["steps"][-1]
    print("arm | at growth | +5 steps | +25 | +100 | last | steps to scratch's last loss | operations to it")
    for name, curve in found.items():
        start = curve["steps"][0]
        cells = []
        for step in (start, start + 5, start + 25, start + 100, curve["steps"][-1]):
            cells.append(shown(curve["losses"][curve["steps"].index(step)]) if step in curve["steps"] else "")
        means = [sum(values) / len(values) for values in curve["losses"]]
        reached = next((s for s, m in zip(curve["steps"], means, strict=True) if m <= goal), None)
        part = ""
        if reached is not None:
            flops = (spent if start else 0) + curve["flops_per_step"] * (reached - start)
            part = f"{flops / (scratch['flops_per_step'] * scratch['steps'][-1]):.2f}"
        print(" | ".join([name, *cells, str(reached), part]))


def shown(values: list[float]) -> str:
    """Mean and 95 % interval."""
    told = summarise(values)
    return f"{told['mean']:.3f}" + ("" if told["low"] is None else f" [{told['low']:.3f}, {told['high']:.3f}]")


if __name__ == "__main__":
    main()
