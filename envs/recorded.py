"""Sequences of device operations that are recorded once and from then on launched as one.

A recorded sequence is a CUDA graph: the host spends microseconds on it, however many kernels are in it. Operations must
use the same memory each time and must not wait for the device. The first call runs them one by one, which loads and
compiles what they need; the second records them. Where that fails they go on one by one, and a warning says so once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

Operations = Callable[[], None]


class RecordedTensors:
    """Operations of torch. On the CPU they are not recorded."""

    def __init__(self, operations: Operations, device: torch.device):
        self._operations, self._device = operations, device
        self._graph: Any = None
        self._calls_to_recording = 2 if device.type == "cuda" else 0  # 0: never

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        self._calls_to_recording -= 1
        if self._calls_to_recording != 0 or not self._record():
            self._operations()

    def _record(self) -> bool:
        """Record the operations and run them; False if that is not possible."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the device meanwhile.
            with torch.cuda.device(self._device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._operations()
        except RuntimeError as error:
            warn_not_recorded("tensor operations", error)
            return False
        self._graph = graph
        graph.replay()
        return True


class RecordedKernels:
    """Operations of Warp, in torch's present CUDA stream; on the CPU, Warp records them too and replays them in C++."""

    def __init__(self, operations: Operations, device: torch.device):
        import warp

        self._operations, self._device, self._warp = operations, device, warp
        self._warp_device = warp.device_from_torch(device)
        self._graph: Any = None
        self._calls_to_recording = 2

    def __call__(self) -> None:
        if self._graph is not None:
            self._launch()
            return
        self._calls_to_recording -= 1
        if self._calls_to_recording == 0 and self._record():
            return
        with self._warp.ScopedDevice(self._warp_device):
            if self._device.type == "cpu":
                self._operations()
                return
            # One by one they run in Warp's own stream, which knows when temporary arrays may be freed.
            own, torchs = self._warp.get_stream(), self._stream()
            own.wait_stream(torchs)
            self._operations()
            torchs.wait_stream(own)

    def _stream(self) -> Any:
        return self._warp.stream_from_torch(torch.cuda.current_stream(self._device))

    def _launch(self) -> None:
        self._warp.capture_launch(self._graph, stream=self._stream() if self._device.type == "cuda" else None)

    def _record(self) -> bool:
        """Record the operations and run them; False if that is not possible."""
        try:
            # On Warp's own stream: torch's default stream cannot be recorded.
            with self._warp.ScopedDevice(self._warp_device), self._warp.ScopedCapture() as capture:
                self._operations()
        except RuntimeError as error:
            warn_not_recorded("simulation", error)
            return False
        self._graph = capture.graph
        self._launch()
        return True


def warn_not_recorded(what: str, error: Exception) -> None:
    """Say that the operations go on one by one."""
    reason = " ".join(str(error).split())
    warnings.warn(
        f"the {what} could not be recorded as a CUDA graph and will be slower: {reason}", RuntimeWarning, stacklevel=4
    )
