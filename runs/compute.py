"""The one place that decides device, threads, arithmetic and allocator of a process."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

import torch

from envs.cores import available_cores

DEVICES = ("auto", "cpu", "cuda")
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
# Relative to the largest entry; an fp32 product of this size is off by about 1e-6, one in bf16 by about 1e-3.
_MAX_PRODUCT_ERROR = 1e-5
_FEW_ROWS = 64  # measured with a policy of two layers of 256: 20 instead of 50 µs at one row, equal at 64


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises ValueError for an unknown name, or for `cuda` without a GPU."""
    if name not in DEVICES:
        raise ValueError(f"unknown device '{name}', it is one of {', '.join(DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but PyTorch sees no CUDA device; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def resolve_threads(threads: int, processes: int, images: bool) -> int:
    """Threads for tensor arithmetic in each of the processes that train; 0 lets us choose.

    Small multilayer perceptrons lose by a second thread whenever something else wants the core, so they get one.
    Raises ValueError for a negative number.
    """
    if threads < 0:
        raise ValueError(f"threads must be 0 (choose) or more, got {threads}")
    if threads:
        return threads
    return max(1, available_cores() // processes) if images else 1


def set_up(device: torch.device, threads: int) -> str:
    """Prepare this process for training. Returns the name of the matrix product chosen, for the run's record."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    return choose_matmul_precision() if device.type == "cpu" else torch.get_float32_matmul_precision()


def choose_matmul_precision() -> str:
    """Let oneDNN take fp32 products ("medium"), if on this processor they stay fp32; else keep "highest".

    oneDNN is 1.4 to 1.6 times faster on products of 256 x 256 (specs/training-speed.md, section 2), but processors with
    bf16 matrix units may round there, so one product is checked against float64.
    """
    torch.set_float32_matmul_precision("medium")
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 256, 256, generator=generator)
    exact = left.double() @ right.double()
    error = ((left @ right).double() - exact).abs().max() / exact.abs().max()
    if error > _MAX_PRODUCT_ERROR:
        torch.set_float32_matmul_precision("highest")
    return torch.get_float32_matmul_precision()


@contextlib.contextmanager
def small_products(rows: int) -> Iterator[None]:
    """Inside, products of a few rows take the direct route: oneDNN's call alone costs a policy of one row 30 µs."""
    precision = torch.get_float32_matmul_precision()
    if precision == "highest" or rows >= _FEW_ROWS:
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def bfloat16_products(device: torch.device, enabled: bool) -> torch.autocast:
    """Inside, layers multiply in bfloat16 if `enabled`; parameters and optimisers stay float32."""
    # Autocast's cache of rounded weights would outlive the optimiser's step, which changes the weights in place.
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def require_bfloat16(device: torch.device) -> None:
    """Raises ValueError where products in bfloat16 are not built in: emulated, they are slower than float32."""
    if device.type == "cuda":
        built_in = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        built_in = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not built_in:
        raise ValueError(
            f"--bf16 needs a {device.type} device that multiplies in bfloat16; leave it out to use float32"
        )


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next allocation. Returns whether this system could.

    An update allocates and frees the same half-megabyte activations over and over; by default glibc gives them back to
    the kernel, which hands them out again page by page: 12 % of a TD3 update on the machine in docs/results/speed.md.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    settings = ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, 1 << 30), (_M_TOP_PAD, 64 << 20))
    return all(mallopt(option, value) == 1 for option, value in settings)
