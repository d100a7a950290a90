"""DER++ (Buzzega et al. 2020, arXiv:2004.07211, eq. 6): dark experience replay that also replays labels.

Everything is in `der`; here β is 0.5 as in the paper. Works with: task, class, domain.
"""

from __future__ import annotations

from dataclasses import dataclass

from continual.strategies import der
from continual.strategies.der import DER as DERPP

__all__ = ["DERPP", "Config"]


@dataclass(frozen=True, kw_only=True)
class Config(der.Config):
    """α and β as most often chosen in table 6 of the paper."""

    alpha: float = 0.1
    """weight of the remembered outputs"""
    beta: float = 0.5
    """weight of the labels of the second draw"""
