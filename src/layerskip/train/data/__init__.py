"""From files to rows of tokens with labels: `examples`, `encode`, `rows`, `split`; each is loaded at first use."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layerskip.train.data.encoding import DataOptions, encode
    from layerskip.train.data.packing import Rows, collate, rows, split
    from layerskip.train.data.sources import Columns, examples

_HOMES = {
    **dict.fromkeys(("Columns", "examples"), "sources"),
    **dict.fromkeys(("DataOptions", "encode"), "encoding"),
    **dict.fromkeys(("Rows", "collate", "rows", "split"), "packing"),
}

__all__ = ["Columns", "DataOptions", "Rows", "collate", "encode", "examples", "rows", "split"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
