"""`neoteny probe`: what can the networks of this checkpoint still learn, compared with fresh ones.

Writes `probe.json` (everything measured), `probe.png` (learning curves) and, layer by layer, `probe_layers.png`. The
training itself is `plasticity.probe`. Intervals are 95 %, bootstrap over the draws of targets within each network, for
the networks at hand: they say nothing of seeds that were not trained.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plasticity.probe import CHECKPOINT, FRESH, Probed, Settings, probe, random_labels, random_network, random_values
from runs import compute, statistics
from runs.continual_run import CONTINUAL
from runs.errors import UsageError, nearest
from runs.files import write_json
from runs.groups import ARM, GROUP, expand
from runs.growth_options import GROWCLIP
from runs.options import FAMILIES, ProbeOptions
from runs.probe_section import RESULT
from runs.probe_subjects import (
    Subject,
    Wanted,
    agent_subjects,
    arm_subjects,
    growth_subjects,
    module_subject,
    strategy_subjects,
)
from runs.probe_verdict import verdict
from runs.settings import read_config

CURVES, LAYERS = "probe.png", "probe_layers.png"


def probe_command(options: ProbeOptions) -> int:
    """Run `neoteny probe`. Returns the exit code; raises UsageError before anything is written."""
    try:
        settings = _check(options)
        device = compute.resolve_device(options.device)
        compute.set_up(device, options.threads)
        started = time.monotonic()
        found = [_ask(subject, options, settings) for subject in _subjects(options, device)]
    except UsageError:
        raise
    except ValueError as error:  # of the rooms below, whose messages are written for users
        raise UsageError(str(error)) from error
    rows = [row for probed in _grouped(found) for row in probed]
    result = {
        "run": str(options.run),
        "step": found[0].subject.step,
        "settings": {**vars(settings), "samples": options.samples},
        "seconds": time.monotonic() - started,
        "networks": rows,
    }
    written = _write(options, result)
    if options.json:
        print(json.dumps(result))
    if not options.quiet:
        _print_table(result)
        print("\n".join(f"{path}" for path in written), file=sys.stderr)
    return 0


@dataclass(frozen=True)
class _Asked:
    subject: Subject
    probed: list[Probed]


def _check(options: ProbeOptions) -> Settings:
    for name in ("seeds", "threads"):
        if vars(options)[name] < 1:
            raise UsageError(f"--{name} must be at least 1, got {vars(options)[name]}")
    if options.samples < 4:
        raise UsageError(f"--samples must be at least 4, got {options.samples}")
    for family in options.families:
        if family not in FAMILIES:
            raise UsageError(f"unknown family of targets '{family}'.{nearest(family, FAMILIES)}")
    rate = 1e-3 if options.learning_rate is None else options.learning_rate
    return Settings(
        steps=options.steps,
        batch_size=options.batch_size,
        draws=options.draws,
        learning_rate=rate,
        layers=options.layers,
    )


def _subjects(options: ProbeOptions, device: torch.device) -> Iterable[Subject]:
    run = options.run
    wanted = Wanted(
        seeds=options.seeds, step=options.step, network=options.network, samples=options.samples, draws=options.draws
    )
    if run.is_file():
        classifies = options.outputs == "classes"
        shape, rate = options.input_shape, options.learning_rate
        return [module_subject(run, options.builder, options.inputs, shape, rate, classifies, wanted, device)]
    try:
        command = read_config(run)["command"]
        arms = expand([run]) if command in (GROUP, ARM) else []
    except ValueError as error:
        raise UsageError(str(error)) from error
    if command in ("train", "offline"):
        return agent_subjects(run, wanted, device)
    if command == CONTINUAL:
        pairs = read_config(run).get("strategy") == GROWCLIP
        return growth_subjects(run, wanted, device) if pairs else strategy_subjects(run, wanted, device)
    chosen = [arm for arm in arms if options.network in (None, arm.name)]
    if not chosen:
        raise UsageError(f"there is nothing to probe in '{run}', a run of `neoteny {command}`")
    if len(chosen) > 1:  # twins do not change, and anchors are fresh at each task
        chosen = [arm for arm in chosen if not arm.name.endswith("-stationary") and arm.name != "fresh"]
    wanted = Wanted(**{**vars(wanted), "network": None})
    return (subject for arm in chosen for subject in arm_subjects(arm, wanted, device))


def _ask(subject: Subject, options: ProbeOptions, settings: Settings) -> _Asked:
    """Probe one network with every family that applies to it."""
    rate = subject.learning_rate if options.learning_rate is None else options.learning_rate
    own = Settings(**{**vars(settings), "learning_rate": rate, "optimizer": subject.optimizer})
    samples = min(options.samples, len(subject.inputs) * 2 // 3)
    inputs, held = subject.inputs[:samples], subject.inputs[samples:]
    draws, count, seed = [], settings.draws, subject.seed
    if "labels" in options.families:
        labels = random_labels if subject.classifies else random_values
        draws.append(labels(inputs, subject.outputs, count, seed))
    if "network" in options.families:
        draws.append(random_network(inputs, held, subject.fresh, count, seed))
    if "next" in options.families and subject.next_tasks is not None:
        draws.append(subject.next_tasks)
    if not draws:
        raise UsageError(f"'{subject.name}' has no next tasks; ask for labels or network")
    if not options.quiet:
        print(f"{subject.name}, seed {subject.seed}: {len(inputs)} inputs", file=sys.stderr)
    return _Asked(subject, [probe(subject.network, subject.fresh, draw, own, seed) for draw in draws])


def _grouped(found: Sequence[_Asked]) -> Iterable[list[dict[str, Any]]]:
    """Rows of the result: one for each network and family, over seeds."""
    for name in dict.fromkeys(asked.subject.name for asked in found):
        same = [asked for asked in found if asked.subject.name == name]
        seeds = [asked.subject.seed for asked in same]
        yield [_row(name, seeds, [asked.probed[index] for asked in same]) for index in range(len(same[0].probed))]


def _row(name: str, seeds: list[int], probed: list[Probed]) -> dict[str, Any]:
    first = probed[0]
    row: dict[str, Any] = {
        "network": name,
        "seeds": seeds,
        "family": first.family,
        "learning_rate": first.rate,
        "chance": _interval([p.chance for p in probed]),
        "fresh": _interval([p.online(FRESH) for p in probed]),
        "checkpoint": _interval([p.online(CHECKPOINT) for p in probed]),
        "gap": _interval([p.gap() for p in probed]),
        "gap_at_best_rates": _interval([p.gap_at_best_rates() for p in probed]),
        "best_rate": {
            "fresh": [p.best_rate(FRESH) for p in probed],
            "checkpoint": [p.best_rate(CHECKPOINT) for p in probed],
        },
        "fitted": {arm.kind: _interval([p.results[p.rate][arm].fitted for p in probed]) for arm in (FRESH, CHECKPOINT)},
        # Seeds may have grown to different ones.
        "layers": {layer: _layer(layer, probed) for layer in first.layers if all(layer in p.layers for p in probed)},
        "curves": {
            arm.kind: torch.cat([p.results[p.rate][arm].curve for p in probed]).tolist() for arm in (FRESH, CHECKPOINT)
        },
    }
    held = [p.held_out_gap() for p in probed]
    row["held_out_gap"] = _interval([gap for gap in held if gap is not None]) if None not in held else None
    return row | {"verdict": verdict(row)}


def _layer(layer: str, probed: list[Probed]) -> dict[str, Any]:
    recovered = [p.recovered(layer) for p in probed]
    found: dict[str, Any] = {"recovered": _interval(recovered), "recovered_values": torch.cat(recovered).tolist()}
    if layer != probed[0].layers[-1]:
        found["features_gap"] = _interval([p.features_gap(layer) for p in probed])
    return found


def _interval(columns: list[Tensor]) -> dict[str, float | None]:
    """Mean and 95 % interval of values [D] of each network, draws resampled within networks."""
    scores = np.stack([column.double().cpu().numpy() for column in columns], 1)
    low, high = None, None
    if len(scores) > 1:
        low, high = statistics.stratified_bootstrap_interval(scores, statistics.mean, statistics.report_generator())
    return {"mean": float(scores.mean()), "low": low, "high": high}


def _write(options: ProbeOptions, result: dict[str, Any]) -> list[Path]:
    from runs.probe_picture import draw_curves, draw_layers

    out = options.out or (options.run.parent if options.run.is_file() else options.run)
    stem = f"{options.run.stem}." if options.run.is_file() else ""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / (stem + RESULT), result)
        written = [out / (stem + RESULT), draw_curves(result, out / (stem + CURVES))]
        layered = draw_layers(result, out / (stem + LAYERS))
    except OSError as error:
        raise UsageError(f"cannot write to '{out}': {error.strerror}; choose another folder with --out") from error
    return written if layered is None else [*written, layered]


def _print_table(result: dict[str, Any]) -> None:
    """One line for each network and family, then a verdict each."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['run']}: score while learning, mean [95 %]", box=None, pad_edge=False)
    heads = ("network", "targets", "fresh", "checkpoint", "gap", "gap at best rates", "held-out gap")
    for head in heads:
        table.add_column(head)
    for row in result["networks"]:
        cells = [_cell(row[name]) for name in ("fresh", "checkpoint", "gap", "gap_at_best_rates", "held_out_gap")]
        table.add_row(row["network"], row["family"], *cells)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 160)
    console.print(table)
    for row in result["networks"]:
        console.print(f"[bold]{row['network']}, {row['family']}[/bold]: {row['verdict']}", highlight=False)


def _cell(summary: dict[str, float | None] | None) -> str:
    if summary is None:
        return "–"
    bounds = "" if summary["low"] is None else f" \\[{summary['low']:.3f}, {summary['high']:.3f}]"
    return f"{summary['mean']:.3f}{bounds}"
