"""Signals as a wish to stop, and as an order."""

from __future__ import annotations

import os
import signal

import pytest

from runs import stopping
from runs.stopping import stop_on_signals


def test_the_first_signal_asks_and_a_later_one_interrupts(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as wish:
        assert not wish.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert wish.is_set()
        os.kill(os.getpid(), signal.SIGTERM)  # as `timeout` does, to the process and then to its group
        monkeypatch.setattr(stopping, "SAME", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before
