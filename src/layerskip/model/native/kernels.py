"""`kernels.cpp`, compiled once with the machine's own C++ compiler and called through ctypes.

    found = kernels()                      # None without a compiler, or with LAYERSKIP_KERNELS=off
    out = found.norm(h, gain, eps)         # CPU tensors, float32 or bfloat16

Between two matrix products a decoding step needs some forty small operations of torch a layer, each of which
costs more than its arithmetic; here they are three calls. Everything works without them, only slower.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.model.cache import Cache
    from layerskip.model.step import Step

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math"]
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Shape(ctypes.Structure):
    """The `Shape` of kernels.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width", "heads", "kv_heads", "size", "rotary")),
        *((name, ctypes.c_int64) for name in ("qkv_row", "qkv_position", "cache_row", "cache_head")),
        *((name, ctypes.c_int64) for name in ("window", "copies")),
        ("scale", ctypes.c_float),
    ]


@dataclass
class Kernels:
    """The compiled regions. All take contiguous CPU tensors of one dtype in `SUFFIXES`.

    With `copies` above 1 the input is a single row (or that many equal ones): it is computed once and the result
    is written `copies` times, [1, copies, ...].
    """

    library: Any
    compile_s: float  # seconds this process spent compiling; 0 when found ready

    def __post_init__(self) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        arguments = {
            "norm": [pointer, pointer, pointer, number, number, number, ctypes.c_float],
            "swiglu": [pointer, pointer, number, number, number],
            "attention": [ctypes.POINTER(Shape), *[pointer] * 8],
        }
        self._calls: dict[tuple[str, torch.dtype], Any] = {}
        for name, types in arguments.items():
            for dtype, suffix in SUFFIXES.items():
                call = getattr(self.library, f"{name}_{suffix}")
                call.argtypes, call.restype = types, None
                self._calls[name, dtype] = call

    def norm(self, h: Tensor, gain: Tensor, eps: float, copies: int = 1) -> Tensor:
        """RMS norm in float32, rounded once. Shapes: h [..., D], gain [D] -> [..., D]."""
        h, width = h.contiguous(), h.shape[-1]
        out = torch.empty_like(h) if copies == 1 else h.new_empty((1, copies, width))
        rows = h.numel() // width if copies == 1 else 1
        call = self._calls["norm", h.dtype]
        call(h.data_ptr(), gain.data_ptr(), out.data_ptr(), rows, width, copies, eps)
        return out

    def swiglu(self, x: Tensor, copies: int = 1) -> Tensor:
        """Multiply silu(gate) by up. Shapes: [..., 2 F] -> [..., F]."""
        width = x.shape[-1] // 2
        out = x.new_empty((*x.shape[:-1], width))
        rows = out.numel() // width if copies == 1 else 1
        self._calls["swiglu", x.dtype](x.data_ptr(), out.data_ptr(), rows, width, copies)
        return out

    def attention(
        self,
        qkv: Tensor,
        heads: int,
        scale: float,
        rotary: tuple[Tensor, Tensor] | None,
        cache: Cache,
        layer: int,
        step: Step,
        window: int | None,
        copies: int = 1,
    ) -> Tensor:
        """Turn queries and keys, write keys and values at the step's slots, attend.

        Shapes: qkv [B, T, heads + 2 H, d] (changed in place), rotary two of [B, T, r] -> [B, T, heads d], heads in
        the order (place in their group, key head).
        """
        rows, width, total, size = qkv.shape
        store = cache.both[layer]
        assert store is not None, "keys and values of one size"
        cos, sin = rotary if rotary is not None else (qkv, qkv)
        shape = Shape(
            rows, width, heads, (total - heads) // 2, size, 0 if rotary is None else cos.shape[-1],
            qkv.stride(0), qkv.stride(1), store.stride(0), store.stride(1), window or 0,
            copies, scale,
        )  # fmt: skip
        if "kernels" not in step.shared:
            index = torch.tensor(step.rows) if step.index is None else step.index.contiguous()
            step.shared["kernels"] = (index, step.positions.contiguous(), step.slots.contiguous())
        index, positions, slots = step.shared["kernels"]
        out = qkv.new_empty((rows, width if copies == 1 else copies, heads * size))
        self._calls["attention", qkv.dtype](
            shape, qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), store.data_ptr(), index.data_ptr(),
            positions.data_ptr(), slots.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out


@functools.cache
def kernels() -> Kernels | None:
    """Find the compiled regions in the cache folder, or compile them there; None where that cannot be."""
    if os.environ.get("LAYERSKIP_KERNELS", "on") == "off":
        return None
    given = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if given is None:
        return None
    compiler = shlex.split(given)  # it may be "ccache g++"
    from layerskip.checkpoint.files import cache_folder

    began = time.perf_counter()
    try:
        path = cache_folder() / "kernels" / f"{_fingerprint(compiler)}.so"
        ready = path.exists()
        if not ready:
            _compile(compiler, path)
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):  # a broken compiler or a full disk must not stop decoding
        return None
    return Kernels(library, 0.0 if ready else time.perf_counter() - began)


def _compile(compiler: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        for openmp in ("-fopenmp", "-fopenmp-simd"):  # Apple's clang has no OpenMP threads
            command = [*compiler, *FLAGS, openmp, str(SOURCE), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, timeout=120, check=False)
            if done.returncode == 0:
                break
        done.check_returncode()
        built.replace(path)


def _fingerprint(compiler: list[str]) -> str:
    """Name a build by all it depends on: source, flags, compiler, processor (the folder may be shared)."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=20, check=True).stdout
    processor = platform.processor().encode() + platform.machine().encode()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += "".join(
            sorted({x for x in lines if x.startswith(("flags", "model name", "Features", "CPU "))})
        ).encode()
    everything = [SOURCE.read_bytes(), str(FLAGS).encode(), version, processor]
    return hashlib.sha256(b"\0".join(everything)).hexdigest()[:16]
