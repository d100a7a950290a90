"""When operations run, are recorded, and are replayed; with stand-ins for CUDA, which no test machine has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from envs.recorded import RecordedTensors

CUDA = torch.device("cuda", 0)


class Device:
    """What happened on it; while it records, operations do not run."""

    def __init__(self, refuses: bool = False):
        self.log: list[str] = []
        self.recording, self.refuses = False, refuses

    def operate(self) -> None:
        self.log.append("recorded" if self.recording else "ran")

    def replay(self) -> None:
        self.log.append("replayed")

    @contextlib.contextmanager
    def graph(self, graph: Any, capture_error_mode: str) -> Iterator[None]:
        assert (graph, capture_error_mode) == (self, "thread_local")
        self.recording = True
        yield
        self.recording = False
        if self.refuses:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device(*getattr(request, "param", ()))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made)
    monkeypatch.setattr(torch.cuda, "graph", made.graph)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return made


def test_operations_run_once_are_recorded_once_and_then_replayed(device: Device):
    operations = RecordedTensors(device.operate, CUDA)
    for _ in range(4):
        operations()
    assert device.log == ["ran", "recorded", "replayed", "replayed", "replayed"]


@pytest.mark.parametrize("device", [(True,)], indirect=True)
def test_what_cannot_be_recorded_goes_on_one_by_one_and_says_so_once(device: Device, recwarn: Any):
    operations = RecordedTensors(device.operate, CUDA)
    for _ in range(4):
        operations()
    assert device.log == ["ran", "recorded", "ran", "ran", "ran"]
    (warning,) = recwarn
    assert "tensor operations could not be recorded as a CUDA graph" in str(warning.message)
    assert str(warning.message).endswith("operation not permitted when stream is capturing")


def test_on_the_cpu_nothing_is_recorded(device: Device):
    operations = RecordedTensors(device.operate, torch.device("cpu"))
    for _ in range(3):
        operations()
    assert device.log == ["ran"] * 3
