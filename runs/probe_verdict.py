"""What a probe says in words: is plasticity lost, is it only the step size, and where in the network."""

from __future__ import annotations

from typing import Any

_PART, _MOST = 0.1, 0.5  # of what a fresh network learns above chance
_SHARE = 0.3  # of the gap, that a layer must bring back to be named


def verdict(row: dict[str, Any]) -> str:
    """One to three sentences on one network and family, from its row of `probe.json`."""
    room = row["fresh"]["mean"] - row["chance"]["mean"]
    if room <= 0.02:
        return "Nothing can be said: a fresh network learns no more than chance in so many steps; use more --steps."
    sentences = [_loss(row["gap"], room)]
    if _is_lost(row["gap"], room):
        sentences += [_step_size(row), _where(row)]
    held = row["held_out_gap"]
    if held is not None and held["low"] is not None and held["low"] > 0 and not _is_lost(row["gap"], room):
        sentences.append(f"But what it learns generalises less (held out: {held['mean']:.2f} lower).")
    return " ".join(filter(None, sentences))


def _is_lost(gap: dict[str, float | None], room: float) -> bool:
    return gap["low"] is not None and gap["low"] > 0 and (gap["mean"] or 0) >= _PART * room


def _loss(gap: dict[str, float | None], room: float) -> str:
    mean, low, high = gap["mean"], gap["low"], gap["high"]
    assert mean is not None
    share = f"{min(100, abs(round(100 * mean / room)))} % of what a fresh network learns beyond chance"
    if low is None or high is None:
        return f"It is {'behind' if mean > 0 else 'ahead'} by {share}; one draw of targets says no more."
    if low > 0 and mean >= _MOST * room:
        return f"It has lost most of its plasticity: {share}."
    if low > 0 and mean >= _PART * room:
        return f"It has lost part of its plasticity: {share}."
    if low > 0:
        return f"It is slightly behind, by {share}."
    if high < 0:
        return f"No plasticity is lost: it is ahead by {share}."
    if high >= _PART * room:
        return "Undecided: the difference to a fresh network is smaller than its uncertainty; use more --draws."
    return "It learns as well as a fresh network."


def _step_size(row: dict[str, Any]) -> str:
    best, gap = row["gap_at_best_rates"], row["gap"]
    if best["mean"] > gap["mean"] / 2:
        return ""
    rates = sorted(set(row["best_rate"]["checkpoint"]))
    told = ", ".join(f"{rate:.2g}" for rate in rates)
    return f"Mostly the step size is wrong for it: at its best rate ({told}) the gap is {best['mean']:.2f}."


def _where(row: dict[str, Any]) -> str:
    gain = {layer: found["recovered"] for layer, found in row["layers"].items()}
    if not gain:
        return ""
    layer = max(gain, key=lambda name: gain[name]["mean"])
    low = gain[layer]["low"]
    share = gain[layer]["mean"] / row["gap"]["mean"]
    if share < _SHARE or low is None or low <= 0:
        return "No single layer brings it back when it is re-initialised."
    return f"Re-initialising `{layer}` alone brings back {min(100, round(100 * share))} % of the gap."
