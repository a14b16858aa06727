"""`kernels.cpp` and what it includes, compiled once with the machine's own C++ compiler and called through ctypes.

    found = kernels()                      # None without a compiler, or with LAYERSKIP_KERNELS=off
    kernels_reason()                       # why not, or None
    out = found.norm(h, gain, eps)         # CPU tensors, float32 or bfloat16

Between two matrix products a decoding step needs some forty small operations of torch a layer, each of which
costs more than its arithmetic; here they are three calls, and with products of ours all layers are one. Everything
works without them, only slower.

A library that is loaded runs as whoever loads it, so one from the cache is loaded only if nobody else can have
written it: the file and its folder belong to this user (or root) and no other may write to them, and the name holds
the hash of the bytes, which tells a damaged file too. Checked is the opened file and what is loaded is that very
file, so none can be put in its place in between. Where the cache does not serve, the library is compiled into a
private folder that goes once it is loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from layerskip.checkpoint.files import cache_folder
from layerskip.errors import UserError
from layerskip.reading import reason

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.model.cache import Cache
    from layerskip.model.step import Step

SOURCE = Path(__file__).with_suffix(".cpp")
SOURCES = [SOURCE, *sorted(SOURCE.parent.glob("*.h"))]  # it includes the others
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math"]
GATES = ("silu", "gelu_tanh", "gelu")
PRODUCTS = ("int8", "int4", "bfloat16")  # the last one where the processor has it
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Shape(ctypes.Structure):
    """The `Shape` of kernels.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width", "heads", "kv_heads", "size", "rotary")),
        *((name, ctypes.c_int64) for name in ("qkv_row", "qkv_position", "cache_row", "cache_head")),
        *((name, ctypes.c_int64) for name in ("window", "padded")),
        ("scale", ctypes.c_float),
    ]


class Product(ctypes.Structure):
    """The `Product` of products.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "in_features", "out_features")),
        *((name, ctypes.c_void_p) for name in ("weights", "scales", "bias", "onto")),
    ]


class LaidLayer(ctypes.Structure):
    """The `Layer` of layers.h."""

    _fields_ = [
        *((name, Product) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("before_attention", "q_norm", "k_norm", "before_mlp")),
        ("eps", ctypes.c_float * 4),
        *((name, ctypes.c_int64) for name in ("window", "turns")),
    ]


class Block(ctypes.Structure):
    """The `Block` of drafts.h."""

    _fields_ = [("gate_up", Product), ("down", Product)]


class Drafts(ctypes.Structure):
    """The `Drafts` of drafts.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "steps", "width", "num_blocks")),
        ("join", Product),
        ("head", Product),
        ("blocks", ctypes.POINTER(Block)),
        ("table", ctypes.c_void_p),
        ("gain", ctypes.c_void_p),
        *((name, ctypes.c_float) for name in ("embed_scale", "eps", "adapter_eps")),
        ("ids", ctypes.c_void_p),
    ]


class Slice(ctypes.Structure):
    """The `Slice` of layers.h."""

    _fields_ = [
        ("shape", Shape),
        ("count", ctypes.c_int64),
        ("layers", ctypes.POINTER(LaidLayer)),
        ("caches", ctypes.POINTER(ctypes.c_void_p)),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "cache_rows", "positions", "slots")),
    ]


@dataclass
class Kernels:
    """The compiled regions. All take contiguous CPU tensors of one dtype in `SUFFIXES`.

    Few rows may be padded (see `linear.Packed`): those that are live are computed, the others repeat the first.
    """

    library: Any
    compile_s: float  # seconds this process spent compiling; 0 when found ready

    def __post_init__(self) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        arguments = {
            "norm": [pointer, pointer, pointer, number, number, number, ctypes.c_float],
            **{name: [pointer, pointer, number, number, number] for name in GATES},
            "attention": [ctypes.POINTER(Shape), *[pointer] * 8],
        }
        self._calls: dict[tuple[str, torch.dtype], Any] = {}
        for name, types in arguments.items():
            for dtype, suffix in SUFFIXES.items():
                call = getattr(self.library, f"{name}_{suffix}")
                call.argtypes, call.restype = types, None
                self._calls[name, dtype] = call
        for name in PRODUCTS:
            if not self.has(name):
                continue
            call = getattr(self.library, f"{name}_bf16")
            call.argtypes, call.restype = [ctypes.POINTER(Product), pointer, pointer], None
            self._calls[name, torch.bfloat16] = call
            call = getattr(self.library, f"layers_{name}_bf16")
            call.argtypes, call.restype = [ctypes.POINTER(Slice), pointer], None
            self._calls[f"layers {name}", torch.bfloat16] = call
            call = getattr(self.library, f"drafts_{name}_bf16")
            call.argtypes, call.restype = [ctypes.POINTER(Drafts), *[pointer] * 3], None
            self._calls[f"drafts {name}", torch.bfloat16] = call
        self.library.best_f32.argtypes = [pointer, pointer, pointer, number, number]
        self.library.best_f32.restype = None

    def has(self, name: str) -> bool:
        """Whether there is a product of this name."""
        return hasattr(self.library, f"{name}_bf16")

    def norm(self, h: Tensor, gain: Tensor, eps: float, live: int | None = None) -> Tensor:
        """RMS norm in float32, rounded once. Shapes: h [..., D], gain [D] -> [..., D].

        Rows behind the first `live` are padding: they repeat the first one's result.
        """
        h, width = h.contiguous(), h.shape[-1]
        out, rows = torch.empty_like(h), h.numel() // width
        call = self._calls["norm", h.dtype]
        call(h.data_ptr(), gain.data_ptr(), out.data_ptr(), live or rows, width, rows, eps)
        return out

    def glu(self, activation: str, x: Tensor, live: int | None = None) -> Tensor:
        """Multiply activation(gate) by up, one of `GATES`. Shapes: [..., 2 F] -> [..., F]; `live` as in `norm`."""
        width = x.shape[-1] // 2
        out, rows = x.new_empty((*x.shape[:-1], width)), x.numel() // (2 * width)
        self._calls[activation, x.dtype](x.data_ptr(), out.data_ptr(), live or rows, width, rows)
        return out

    def product(self, kernel: str, weights: Product, x: Tensor, onto: Tensor | None) -> Tensor:
        """Multiply by weights in tiles, add the bias and `onto`, round once.

        Shapes: [..., in] -> [..., out]. `weights` says where all but the rows and `onto` are.
        """
        x, shape = x.contiguous(), Product.from_buffer_copy(weights)
        out = x.new_empty((*x.shape[:-1], shape.out_features))
        shape.rows = x.numel() // shape.in_features
        if onto is not None:
            onto = onto.contiguous()
            shape.onto = onto.data_ptr()
        self._calls[kernel, x.dtype](shape, x.data_ptr(), out.data_ptr())
        return out

    def best(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Find the first of the largest of each row, and its value: NaN where there is one.

        Shapes: float32 [N, V] -> [N] each.
        """
        x = x.contiguous()
        ids, values = torch.empty(len(x), dtype=torch.long), torch.empty(len(x), dtype=torch.float32)
        self.library.best_f32(x.data_ptr(), ids.data_ptr(), values.data_ptr(), *x.shape)
        return ids, values

    def drafts(self, kernel: str, laid: Drafts, known: Tensor, tokens: Tensor, chances: Tensor) -> None:
        """Write drafts behind `tokens[0]`, and how likely the head finds each.

        Shapes: known [N, D], changed in place; tokens int64 [steps + 1, N]; chances float32 [steps, N].
        """
        call = self._calls[f"drafts {kernel}", known.dtype]
        call(laid, known.data_ptr(), tokens.data_ptr(), chances.data_ptr())

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
        padded: int = 0,
    ) -> Tensor:
        """Turn queries and keys, write keys and values at the step's slots, attend.

        Shapes: qkv [B, T, heads + 2 H, d] (changed in place), rotary two of [B, T, r] -> [B, T, heads d], heads in
        the order (place in their group, key head); one row's T positions may be `padded` by repeating the first.
        """
        rows, width, total, size = qkv.shape
        store = cache.both[layer]
        assert store is not None, "keys and values of one size"
        cos, sin = rotary if rotary is not None else (qkv, qkv)
        shape = Shape(
            rows, width, heads, (total - heads) // 2, size, 0 if rotary is None else cos.shape[-1],
            qkv.stride(0), qkv.stride(1), store.stride(0), store.stride(1), window or 0,
            padded, scale,
        )  # fmt: skip
        index, positions, slots = _places(step)
        out = qkv.new_empty((rows, padded or width, heads * size))
        self._calls["attention", qkv.dtype](
            shape, qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), store.data_ptr(), index.data_ptr(),
            positions.data_ptr(), slots.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out

    def layers(
        self,
        kernel: str,
        laid: ctypes.Array[LaidLayer],
        h: Tensor,
        heads: int,
        scale: float,
        rotary: tuple[Tensor, Tensor] | None,
        cache: Cache,
        layers: range,
        step: Step,
    ) -> Tensor:
        """Run layers whose products are all `kernel`'s, as `Stack.run` does. Shapes: h [B, T, D] -> [B, T, D]."""
        h = h.clone(memory_format=torch.contiguous_format)
        rows, width, _ = h.shape
        stores = [cache.both[layer] for layer in layers]
        first = stores[0]
        assert first is not None, "keys and values of one size"
        size, qkv = first.shape[-1], laid[0].qkv.out_features
        cos, sin = rotary if rotary is not None else (h, h)
        shape = Shape(
            rows, width, heads, first.shape[1] // 2, size, 0 if rotary is None else cos.shape[-1],
            width * qkv, qkv, first.stride(0), first.stride(1), 0, 0, scale,
        )  # fmt: skip
        index, positions, slots = _places(step)
        pointers = (ctypes.c_void_p * len(stores))(*[None if s is None else s.data_ptr() for s in stores])
        call = Slice(
            shape, len(stores), laid, pointers, cos.data_ptr(), sin.data_ptr(), index.data_ptr(),
            positions.data_ptr(), slots.data_ptr(),
        )  # fmt: skip
        self._calls[f"layers {kernel}", h.dtype](call, h.data_ptr())
        return h


def _places(step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """Cache rows, positions and slots as the compiled code reads them, once per step."""
    if "kernels" not in step.shared:
        index = torch.tensor(step.rows) if step.index is None else step.index.contiguous()
        step.shared["kernels"] = (index, step.positions.contiguous(), step.slots.contiguous())
    found: tuple[Tensor, Tensor, Tensor] = step.shared["kernels"]
    return found


_absent: list[str] = []  # why there are none, once `kernels` has looked


@functools.cache
def kernels() -> Kernels | None:
    """Find the compiled regions in the cache folder, or compile them; None where that cannot be.

    Warns, once a process, where there is no compiler, where it fails, or the cache is not to be trusted.
    """
    _absent.clear()
    if os.environ.get("LAYERSKIP_KERNELS", "on") == "off":
        _absent.append("LAYERSKIP_KERNELS is off")
        return None
    began = time.perf_counter()
    try:
        command = compiler()
        library, ready = _library(command, _fingerprint(command))
    except (OSError, ValueError, UserError, AttributeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or b""
        lines = said.decode(errors="replace").splitlines() or [reason(error)]
        _absent.append(f"the compiled regions cannot be had ({lines[0][:200]})")
        warnings.warn(f"{_absent[0]}: decoding on the CPU is slower without", stacklevel=2)
        return None
    return Kernels(library, 0.0 if ready else time.perf_counter() - began)


def kernels_reason() -> str | None:
    """Why there are no compiled regions; None where there are."""
    return None if kernels() is not None else _absent[0]


def compiler() -> list[str]:
    """What `CXX` names, or the machine's own. Raises: UserError when there is none, ValueError for odd quotes."""
    given = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if given is None:
        raise UserError("no C++ compiler was found")
    return shlex.split(given)  # it may be "ccache g++"


def compile_to(built: Path, source: Path, command: list[str]) -> None:
    """Make a library of one file. Raises: CalledProcessError with what the compiler said."""
    for openmp in ("-fopenmp", "-fopenmp-simd"):  # Apple's clang has no OpenMP threads
        line = [*command, *FLAGS, openmp, str(source), "-o", str(built)]
        done = subprocess.run(line, capture_output=True, timeout=120, check=False)
        if done.returncode == 0:
            return
    done.check_returncode()


def _library(command: list[str], fingerprint: str) -> tuple[Any, bool]:
    """Load the library from the cache, else compile it; say whether it was ready."""
    folder = None
    try:
        folder = cache_folder() / "kernels"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if hasattr(os, "geteuid") and folder.stat().st_uid == os.geteuid() and not folder.is_symlink():
            folder.chmod(0o700)  # an older version made it as the umask said
        if (distrust := _shared(folder.lstat(), folder)) is not None:
            raise UserError(distrust)
        for path in sorted(folder.glob(f"{fingerprint}-*.so")):
            if (library := _loaded(path)) is not None:
                return library, True
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = _compiled(command, Path(scratch))
            path = folder / f"{fingerprint}-{_digest(built.read_bytes())}.so"
            built.replace(path)
        if (library := _loaded(path)) is not None:
            return library, False
        why = f"{path} was changed at once"
    except (OSError, UserError) as error:
        why = reason(error)
    warnings.warn(
        f"the compiled regions cannot be kept in the cache ({why}): each process compiles them anew; "
        f"set LAYERSKIP_CACHE to a folder of your own",
        stacklevel=4,
    )
    with tempfile.TemporaryDirectory() as scratch:  # of mode 700
        return ctypes.CDLL(str(_compiled(command, Path(scratch)))), False


def _loaded(path: Path) -> Any:
    """Load a whole library that only this user can have written; None for any other."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb", closefd=False) as file:
        distrust = _shared(os.fstat(handle), path)
        if distrust is None and _digest(file.read()) != path.stem.rpartition("-")[2]:
            distrust = f"{path} is damaged"
    if distrust is not None:
        os.close(handle)
        warnings.warn(f"{distrust}: the compiled regions are compiled anew", stacklevel=5)
        path.unlink()
        return None
    # It stays open: a second library under the same number would be taken for the first, by its name.
    same = Path(f"/proc/self/fd/{handle}")
    return ctypes.CDLL(str(same if same.exists() else path))


def _shared(found: os.stat_result, path: Path) -> str | None:
    """Say how others could have written a file or folder; None where they could not."""
    if stat.S_ISLNK(found.st_mode) or not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        return f"{path} is neither a file nor a folder"
    if not hasattr(os, "geteuid"):
        return None
    if found.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to another user"
    return f"{path} can be written by other users" if found.st_mode & 0o022 else None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _compiled(command: list[str], folder: Path) -> Path:
    built = folder / "kernels.so"
    compile_to(built, SOURCE, command)
    built.chmod(0o700)  # whatever the umask
    return built


def _fingerprint(command: list[str]) -> str:
    """Name a build by all it depends on: source, flags, compiler, processor (the folder may be shared)."""
    version = subprocess.run([*command, "--version"], capture_output=True, timeout=20, check=True).stdout
    processor = platform.processor().encode() + platform.machine().encode()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += "".join(
            sorted({x for x in lines if x.startswith(("flags", "model name", "Features", "CPU "))})
        ).encode()
    how = str([*command, *FLAGS]).encode()
    everything = [*(source.read_bytes() for source in SOURCES), how, version, processor]
    return hashlib.sha256(b"\0".join(everything)).hexdigest()[:16]
