"""What the vector unit can do at most, so that formats.py can tell what several rows must cost at least.

    peak = Peak()
    peak("int8", threads=2)      # multiplications of weights a second, all threads together

`arithmetic.cpp` is compiled by the machine's own compiler; its threads are those of the kernels.
"""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path

from layerskip.model.native.kernels import compile_to, compiler

SOURCE = Path(__file__).with_suffix(".cpp")


class Peak:
    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / "arithmetic.so"
            compile_to(built, SOURCE, compiler())
            self._library = ctypes.CDLL(str(built))

    def __call__(self, weights: str, threads: int) -> float:
        """Measured anew at every call, a few milliseconds."""
        call = getattr(self._library, weights)
        call.argtypes, call.restype = [ctypes.c_int], ctypes.c_double
        return float(call(threads))
