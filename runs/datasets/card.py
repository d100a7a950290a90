"""What data are, in numbers and words: for `neoteny inspect` and for the card that every collected set has."""

from __future__ import annotations

from typing import Any

import torch

from runs.datasets.dataset import Dataset, fingerprint

_BARS, _WIDTH = 12, 40
_JUMP = 20  # times the median distance between two observations of an episode


def describe(data: Dataset) -> dict[str, Any]:
    """Plain values: rows, episodes, flags, lengths, returns, rewards, ranges, fingerprint, reference pairs."""
    found, about = data.transitions, data.about
    whole = found.whole
    returns, lengths = found.returns()[whole], found.lengths[whole].double()
    ends = found.truncated.sum(), found.terminal.sum()
    return {
        "source": about.source,
        "rule": about.rule,
        "environment": about.env,
        "kind": about.kind,
        "transitions": len(found),
        "episodes": len(found.lengths),
        "unfinished_episodes": int((~whole).sum()),
        "terminals": int(ends[1]),
        "time_limits": int(ends[0]),
        "observed_values": found.observations,
        "actions": found.actions,
        "action_range": [float(found.action.min()), float(found.action.max())],
        "reward_range": [float(found.reward.min()), float(found.reward.max())],
        "returns": _quantiles(returns),
        "lengths": _quantiles(lengths),
        "jumps": _jumps(data),
        "references": {name: list(pair) for name, pair in about.references.items()},
        "fingerprint": fingerprint(found),
        "more": dict(about.more),
    }


def _quantiles(values: torch.Tensor) -> dict[str, float] | None:
    if not len(values):
        return None
    names = {"min": 0.0, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "max": 1.0}
    found = {name: float(values.quantile(q)) for name, q in names.items()}
    return {"mean": float(values.mean()), "std": float(values.std(correction=0)), **found}


def _jumps(data: Dataset) -> int:
    """Steps within an episode over more than 20 times the median distance; files with wrong flags have many."""
    found = data.transitions
    distance = torch.linalg.vector_norm(found.next_obs - found.obs, dim=1)
    median = distance[:1_000_000].median()
    return int(((distance > _JUMP * median) & ~found.terminal).sum()) if float(median) > 0 else 0


def page(data: Dataset) -> list[str]:
    """The same as lines for a terminal, with a histogram of returns."""
    told = describe(data)
    source = told["source"] + (f", {told['kind']}" if told["kind"] else "")
    lines = [source, f"  read by        {told['rule']}", f"  environment    {told['environment'] or 'not said'}"]
    unfinished = told["unfinished_episodes"]
    partly = f" ({unfinished} of them unfinished)" if unfinished else ""
    lines += [
        f"  transitions    {told['transitions']:,} in {told['episodes']:,} episodes{partly}",
        f"  ends           {told['terminals']:,} terminal, {told['time_limits']:,} at a time limit",
        f"  observations   {told['observed_values']} values; actions {told['actions']}, "
        f"{told['action_range'][0]:.4g} to {told['action_range'][1]:.4g}",
        f"  rewards        {told['reward_range'][0]:.4g} to {told['reward_range'][1]:.4g}",
    ]
    for name in ("returns", "lengths"):
        if told[name]:
            lines.append(f"  {name:<14} " + ", ".join(f"{key} {value:.4g}" for key, value in told[name].items()))
    if told["jumps"]:
        lines.append(f"  warning        {told['jumps']} steps are over 20 times as long as the median one")
    for name, (low, high) in told["references"].items():
        lines.append(f"  score 0 to 100 {low:.6g} to {high:.6g} ({name})")
    lines.append(f"  fingerprint    {told['fingerprint']}")
    return [*lines, *_histogram(data)]


def _histogram(data: Dataset) -> list[str]:
    returns = data.transitions.returns()[data.transitions.whole]
    if len(returns) < 2 or float(returns.min()) == float(returns.max()):
        return []
    counts, edges = torch.histogram(returns, bins=_BARS)
    largest = float(counts.max())
    return ["  episodes by return"] + [
        f"  {float(low):>12.4g} {'#' * round(_WIDTH * float(count) / largest)} {int(count)}"
        for low, count in zip(edges[:-1], counts, strict=True)
    ]
