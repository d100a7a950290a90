"""Interventions by name, and which of them go together.

    make("redo")                              one, with its source's settings
    make("nap+redo(threshold=0.1,every=100)")  several, with settings of one's own

Modules load when a name in them is asked for. Interventions come back in the order in which they act after a step.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from plasticity.intervention import Intervention, by_stage


@dataclass(frozen=True)
class Entry:
    """Where an intervention is: "module:class", settings that its name stands for, and what it takes for itself."""

    path: str
    preset: dict[str, Any] = field(default_factory=dict)
    takes: tuple[str, ...] = ()


# Two interventions that take the same thing for themselves do not go together.
REASONS = {
    "optimiser": "each brings its own optimiser",
    "units": "both replace units of the same layers, and each keeps account only of its own replacements",
    "whole": "one draws anew, as a whole, layers whose units the other keeps account of",
    "nonlinearity": "each brings its own nonlinearity",
    "normaliser": "each puts its own normaliser in front of the nonlinearities",
    "scale": "each sets the scale of the weights",
    "head": "the branch of the head that injection freezes would go on reading what the other draws anew",
    "batch": "each sets the size of the batch",
}

_HERE, _SHELF = "plasticity.interventions", "plasticity.optimisers"
INTERVENTIONS: dict[str, Entry] = {
    "none": Entry("plasticity.intervention:Intervention"),
    "l2": Entry(f"{_HERE}.regularisers:L2"),
    "l2-init": Entry(f"{_HERE}.regularisers:L2Init"),
    "w2-init": Entry(f"{_HERE}.regularisers:W2Init"),
    "spectral": Entry(f"{_HERE}.regularisers:Spectral"),
    "parseval": Entry(f"{_HERE}.regularisers:Parseval"),
    "churn": Entry(f"{_HERE}.churn:Churn"),
    "weight-decay": Entry(f"{_HERE}.shifts:WeightDecay"),
    "adamw": Entry(f"{_HERE}.shifts:AdamW", takes=("optimiser",)),
    "noise": Entry(f"{_HERE}.shifts:Noise"),
    "weight-clip": Entry(f"{_HERE}.shifts:WeightClip"),
    "shrink-perturb": Entry(f"{_HERE}.perturb:ShrinkPerturb"),
    "shrink-perturb-step": Entry(f"{_HERE}.perturb:ShrinkPerturbStep"),
    "redo": Entry(f"{_HERE}.redo:ReDo", takes=("units", "head")),
    "cbp": Entry(f"{_HERE}.cbp:CBP", takes=("units", "head", "whole")),
    "snr": Entry(f"{_HERE}.snr:SNR", takes=("units", "head", "whole")),
    "reset": Entry(f"{_HERE}.resets:Reset", takes=("head", "whole")),
    "reset-head": Entry(f"{_HERE}.resets:Reset", {"part": "head"}, takes=("head",)),
    "reset-last": Entry(f"{_HERE}.resets:Reset", {"part": "last"}, takes=("head", "whole")),
    "reset-optimizer": Entry(f"{_HERE}.resets:ResetOptimizer"),
    "adam-rel": Entry(f"{_HERE}.resets:ResetOptimizer", {"only_steps": True}),
    "injection": Entry(f"{_HERE}.injection:Injection", takes=("head",)),
    "hare-tortoise": Entry(f"{_HERE}.hare_tortoise:HareTortoise"),
    "nap": Entry("plasticity.nap:NaP", takes=("normaliser", "scale")),
    "layernorm": Entry("plasticity.networks.normalisation:Normalise", {"kind": "layer"}, takes=("normaliser",)),
    "rmsnorm": Entry("plasticity.networks.normalisation:Normalise", {"kind": "rms"}, takes=("normaliser",)),
    "crelu": Entry(f"{_HERE}.activations:WithCReLU", takes=("nonlinearity",)),
    "fourier": Entry(f"{_HERE}.activations:WithFourier", takes=("nonlinearity",)),
    "activation": Entry(f"{_HERE}.activations:WithActivation", takes=("nonlinearity",)),
    "leaky-relu": Entry(f"{_HERE}.activations:WithLeakyReLU", takes=("nonlinearity",)),
    "smooth-leaky": Entry(f"{_HERE}.activations:WithSmoothLeakyReLU", takes=("nonlinearity",)),
    "adamp": Entry(f"{_SHELF}.adamp:WithAdamP", takes=("optimiser",)),
    "sgdp": Entry(f"{_SHELF}.sgdp:WithSGDP", takes=("optimiser",)),
    "muon": Entry(f"{_SHELF}.muon:WithMuon", takes=("optimiser",)),
    "normuon": Entry(f"{_SHELF}.normuon:WithNorMuon", takes=("optimiser",)),
    "upgd": Entry(f"{_SHELF}.upgd:WithUPGD", takes=("optimiser",)),
    "trac": Entry(f"{_SHELF}.trac:WithTRAC", takes=("optimiser",)),
    "lipschitz": Entry(f"{_SHELF}.lipschitz:WithLipschitz", takes=("optimiser", "scale")),
    "seednorm": Entry("plasticity.interventions.seednorm:WithSeeDNorm", takes=("normaliser",)),
    "safe-step": Entry("plasticity.interventions.safe_step:SafeStep"),
    "adaptive-batch": Entry("plasticity.interventions.adaptive_batch:AdaptiveBatch", takes=("optimiser", "batch")),
}
ALIASES = {"ln": "layernorm", "fresh": "reset"}


def make(text: str) -> list[Intervention]:
    """The interventions that `text` names, joined by + or commas, each with settings in parentheses if it has any.

    Raises ValueError, in one sentence, for a name or setting that does not exist, a value that is not possible, and
    interventions that do not go together.
    """
    parts = [_parse(part) for part in _split(text, "+,")]
    names = [name for name, _ in parts]
    check_together(names)
    # Normalisers are put in front of the nonlinearities that are there in the end.
    parts.sort(key=lambda part: "normaliser" in INTERVENTIONS[part[0]].takes)
    made = [_construct(name, settings) for name, settings in parts if name != "none"]
    made = by_stage(made)
    if any(intervention.stage == "project" and getattr(intervention, "project", True) for intervention in made):
        for intervention in made:  # decay of projected weights changes only the rate, or the moments (spec 1.2, item 8)
            if getattr(intervention, "hidden", True) is None:
                intervention.hidden = False  # pyright: ignore[reportAttributeAccessIssue]
    return made


def arms(text: str) -> list[str]:
    """Comma-separated compositions side by side, as the harness compares them: "none,l2-init,nap+redo". Checked."""
    found = _split(text, ",")
    for arm in found:
        make(arm)
    return found


def names() -> list[str]:
    """All names, without aliases."""
    return list(INTERVENTIONS)


def summary(name: str) -> str:
    """What an intervention does: the first sentence of its description."""
    return inspect.getdoc(_load(_known(name))).partition("\n\n")[0].replace("\n", " ")  # pyright: ignore


def uses_boundaries(name: str) -> bool:
    """Whether the intervention, as published, must be told when the task changes."""
    return _construct(_known(name), {}).uses_boundaries


def check_together(chosen: Sequence[str]) -> None:
    """Raises ValueError if two of these names do not go together."""
    for i, first in enumerate(chosen):
        for second in chosen[i + 1 :]:
            reason = _conflict(first, second)
            if reason:
                raise ValueError(f"'{first}' and '{second}' do not go together: {reason}")


def _conflict(first: str, second: str) -> str | None:
    if first == second:
        return "it is the same one twice"
    if "none" in (first, second):
        return "none means no intervention"
    shared = [thing for thing in INTERVENTIONS[first].takes if thing in INTERVENTIONS[second].takes]
    if "injection" not in (first, second):
        shared = [thing for thing in shared if thing != "head"]
    return REASONS[shared[0]] if shared else None


def _split(text: str, separators: str) -> list[str]:
    """Parts between separators outside parentheses. Raises ValueError for an empty part or an open parenthesis."""
    parts = re.split(rf"[{re.escape(separators)}](?![^(]*\))", text)
    if text.count("(") != text.count(")") or not all(part.strip() for part in parts):
        raise ValueError(f"'{text}' is not a list of interventions such as l2-init or nap+redo(threshold=0.1)")
    return [part.strip() for part in parts]


def _parse(part: str) -> tuple[str, dict[str, Any]]:
    match = re.fullmatch(r"([^()=]+?)\s*(?:\((.*)\))?", part)
    if match is None:
        raise ValueError(f"'{part}' is not an intervention with settings such as redo(threshold=0.1,every=100)")
    name = _known(match[1])
    settings: dict[str, Any] = {}
    for pair in filter(None, (piece.strip() for piece in (match[2] or "").split(","))):
        key, equals, value = (piece.strip() for piece in pair.partition("="))
        if not equals:
            raise ValueError(f"'{pair}' in '{part}' is not a setting such as every=100")
        settings[key] = value
    return name, settings


def _known(name: str) -> str:
    name = ALIASES.get(name, name)
    if name not in INTERVENTIONS:
        nearest = _nearest(name, [*INTERVENTIONS, *ALIASES])
        raise ValueError(f"there is no intervention '{name}'; {nearest}")
    return name


def _nearest(name: str, possible: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, possible, n=1, cutoff=0.4)
    return f"did you mean '{close[0]}'?" if close else f"there are {', '.join(possible)}"


def _load(name: str) -> type[Intervention]:
    module, _, cls = INTERVENTIONS[name].path.partition(":")
    return getattr(importlib.import_module(module), cls)


def _construct(name: str, texts: dict[str, str]) -> Intervention:
    cls, preset = _load(name), INTERVENTIONS[name].preset
    hints = typing.get_type_hints(cls.__init__)
    possible = [key for key in inspect.signature(cls).parameters if key not in preset]
    values = {}
    for key, text in texts.items():
        if key not in possible:
            nearest = _nearest(key, possible) if possible else "it has none"
            raise ValueError(f"'{name}' has no setting '{key}'; {nearest}")
        values[key] = _value(name, key, text, hints[key])
    return cls(**preset, **values)


def _value(name: str, key: str, text: str, hint: Any) -> Any:
    """A setting's value out of its text, by its annotation."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if type(None) in options and text.lower() == "none":
            return None
        hint = next(option for option in options if option is not type(None))
    if typing.get_origin(hint) is Literal:
        options = typing.get_args(hint)
        if text in options:
            return text
        raise ValueError(f"{key} of {name} must be {' or '.join(map(str, options))}, got {text}")
    if hint is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ValueError(f"{key} of {name} must be true or false, got {text}")
    if hint not in (int, float, str):
        raise ValueError(f"{key} of {name} cannot be written as text; give it in Python")
    try:
        return hint(text)
    except ValueError:
        kind = "a whole number" if hint is int else "a number"
        raise ValueError(f"{key} of {name} must be {kind}, got {text}") from None
