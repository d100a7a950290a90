"""The bridge to Avalanche (avalanche-lib 0.6.0), both ways. It is imported when used: that takes seconds.

streams     any of its benchmarks as our stream
baselines   its strategies on our streams, in our table
strategy    our strategies in its templates, for its plugins, metrics and loggers
"""

from __future__ import annotations

from importlib.util import find_spec


def require_avalanche() -> None:
    """Raises ValueError, one sentence, if Avalanche is not installed."""
    if find_spec("avalanche") is None:
        raise ValueError("Avalanche is not installed; it comes with: pip install 'neoteny[avalanche]'")
