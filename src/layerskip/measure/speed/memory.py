"""How much memory grows while something runs: the peak, not the end.

    with growth(device) as grown:
        ...
    grown.num_bytes

The peak is the process's resident set on Linux, PyTorch's allocator on CUDA, unknown elsewhere.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch


@dataclass
class Growth:
    """Peak minus start, in bytes; None until it is known, and where it cannot be."""

    num_bytes: int | None = None


@contextmanager
def growth(device: torch.device) -> Iterator[Growth]:
    """Measure the growth of memory inside the block. It costs time: keep it out of timed work."""
    grown = Growth()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start: int | None = torch.cuda.memory_allocated(device)
    else:
        start = _reset_resident_peak() if device.type == "cpu" else None
    yield grown
    if start is not None:
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")
        grown.num_bytes = None if peak is None else max(0, peak - start)


def _reset_resident_peak() -> int | None:
    """Give free memory back, set the kernel's high-water mark to what is left, and return that."""
    gc.collect()
    with suppress(
        OSError, AttributeError, TypeError
    ):  # without glibc freed pages count as in use: a lower bound
        ctypes.CDLL(None).malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as mark:
            mark.write("5")  # man 5 proc: reset the peak resident set
    except OSError:
        return None  # not Linux, or not allowed here
    return _resident("VmRSS")


def _resident(field: str) -> int | None:
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
    except (OSError, StopIteration):
        return None


def module_bytes(module: torch.nn.Module) -> int:
    """Sum the bytes of a module's tensors, shared storage once."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers())}
    return sum(tensors.values())
