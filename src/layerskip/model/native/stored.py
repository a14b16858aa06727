"""A stack of few bits straight from files: rounded once, matrix by matrix, and kept in the cache folder.

    stack, shell = stored_stack(folder, INT4, torch.bfloat16)        # None where the files do not allow it

The model of transformers is made without weights, for its shape alone. The first time each layer's tensors are read
from the checkpoint as they are stored there, rounded and let go, so that no float copy of the model is ever in
memory, and what was rounded before (the built-in model) is found again exactly. From then on what was made is read.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from layerskip.checkpoint.facts import fingerprint
from layerskip.checkpoint.kept import kept_file
from layerskip.checkpoint.weights import check_weights, shards_of
from layerskip.errors import UserError
from layerskip.model.families import parts_of, refuse_unsupported
from layerskip.model.native.kernels import kernels
from layerskip.model.native.load import native_reason
from layerskip.model.native.stack import HEAD, NativeStack, Source
from layerskip.reading import reason

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.model.native.linear import Format, Linear

LAYOUT = 2
"""Of what is kept; another number makes it anew."""


def stored_stack(folder: Path, kind: Format, dtype: torch.dtype) -> tuple[NativeStack, Any] | None:
    """Read a model of few bits, making its file first where there is none.

    None where there is no compiler, or tensors have other names than parameters: it is to be loaded whole then.
    Raises: UserError for files that are damaged, or weights that cannot be rounded.
    """
    if kind.restore is None or kernels() is None:
        return None
    shell = _shell(folder, dtype)
    if native_reason(shell) is not None:
        return None
    kept = _kept(folder, kind, dtype)
    if kept is not None and kept.is_file():
        try:
            found = torch.load(kept, weights_only=True, mmap=True)  # of the table, few pages are ever read
            return NativeStack(shell, source=_Kept(shell, kind, found)), shell
        except Exception as error:  # noqa: BLE001 - whatever a damaged file gives: it is made again
            warnings.warn(f"{kept} is damaged ({reason(error)}) and is made again", stacklevel=2)
            shell = _shell(folder, dtype)
    source = _Files(folder, shell, kind, dtype)
    if not source.complete:
        return None
    stack = NativeStack(shell, source=source)
    if kept is not None:
        _keep(source.made, kept)
    return stack, shell


def _shell(folder: Path, dtype: torch.dtype) -> Any:
    """The model without weights; angles of positions are computed, as they are no weights. Raises: UserError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    refuse_unsupported(hf)
    decoder, _, rotary, _ = parts_of(hf)
    if rotary is not None:
        name = next(name for name, module in decoder.named_children() if module is rotary)
        setattr(decoder, name, type(rotary)(config=config.get_text_config()))
    generation = folder / "generation_config.json"
    if generation.is_file():
        from transformers import GenerationConfig

        hf.generation_config = GenerationConfig.from_pretrained(folder)
    return hf


class _Files(Source):
    """Weights from the checkpoint's own files, and a record of what was made of them."""

    def __init__(self, folder: Path, shell: Any, kind: Format, dtype: torch.dtype) -> None:
        from safetensors import safe_open

        self.quantize, self.dtype, self._kind = kind.name, dtype, kind
        self._names = {id(module): f"{name}." for name, module in shell.named_modules()}
        self._open: dict[str, Any] = {}  # parameter -> its opened file
        index = folder / "model.safetensors.index.json"
        files = shards_of(index) if index.is_file() else ["model.safetensors"]
        for name in files:
            if not (folder / name).is_file():
                continue
            check_weights(folder / name)
            opened = safe_open(folder / name, framework="pt")
            keys: list[str] = opened.keys()  # type: ignore[no-untyped-call]
            self._open |= dict.fromkeys(keys, opened)
        tied = set(shell.all_tied_weights_keys) if hasattr(shell, "all_tied_weights_keys") else set()
        self.complete = all(name in self._open or name in tied for name, _ in shell.named_parameters())
        self.made: dict[str, Any] = {"linears": {}, "others": {}}

    def fill(self, module: Any) -> None:
        """Give a module its tensors: matrices as they are stored, all else in the dtype."""
        prefix = self._names[id(module)]
        for name, parameter in list(module.named_parameters()):
            if prefix + name not in self._open:
                continue  # tied
            tensor = self._open[prefix + name].get_tensor(prefix + name)
            if tensor.shape != parameter.shape:
                raise UserError(
                    f"{prefix}{name} is {list(tensor.shape)}, config.json says {list(parameter.shape)}",
                    "copy or download the folder again",
                )
            if tensor.ndim < 2:
                tensor = self.made["others"][prefix + name] = tensor.to(self.dtype)
            _put(module, name, tensor)

    def table(self, module: Any) -> Tensor:
        """The embedding table in the dtype; the module keeps it as it is stored, for a head tied to it."""
        self.fill(module)
        made: Tensor = module.weight.detach().to(self.dtype)
        self.made["others"]["table"] = made
        return made

    def pack(self, name: str, weight: Tensor, bias: Tensor | None) -> Linear:
        kind = self._kind.of_head if name == HEAD else self._kind
        linear: Any = kind.make(weight.detach(), None if bias is None else bias.detach())
        size = [linear.out_features, linear.in_features]
        self.made["linears"][name] = {"size": size, **linear.state}
        return linear  # type: ignore[no-any-return]


class _Kept(Source):
    """Weights as they were made before."""

    def __init__(self, shell: Any, kind: Format, found: dict[str, Any]) -> None:
        self.quantize, self._kind, self._found = kind.name, kind, found
        self._names = {id(module): f"{name}." for name, module in shell.named_modules()}

    def fill(self, module: Any) -> None:
        prefix = self._names[id(module)]
        for name, parameter in list(module.named_parameters()):
            if parameter.ndim < 2:
                _put(module, name, self._found["others"][prefix + name])

    def table(self, module: Any) -> Tensor:
        made: Tensor = self._found["others"]["table"]
        return made

    def pack(self, name: str, weight: Tensor, bias: Tensor | None) -> Linear:
        told = self._found["linears"][name]
        if tuple(told["size"]) != tuple(weight.shape):
            raise UserError(f"{name} is {told['size']}, not {list(weight.shape)}")
        kind = self._kind.of_head if name == HEAD else self._kind
        assert kind.restore is not None
        return kind.restore((weight.shape[0], weight.shape[1]), told)


def _put(module: Any, name: str, tensor: Tensor) -> None:
    owner, _, own = name.rpartition(".")
    parameter = torch.nn.Parameter(tensor, requires_grad=False)
    module.get_submodule(owner)._parameters[own] = parameter


# -- what is kept --------------------------------------------------------------------------------------------


def _kept(folder: Path, kind: Format, dtype: torch.dtype) -> Path | None:
    """Name the file of these very weights; None without a cache folder."""
    told = [fingerprint(folder), fingerprint(folder, "config.json"), kind.name, str(dtype), LAYOUT]
    return kept_file("formats", told, f"{kind.name}-", ".pt")


def _keep(made: dict[str, Any], path: Path) -> None:
    """Write it beside its name and rename it; a cache that cannot be written costs time, nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as part:
                torch.save(made, part)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink()
            raise
    except OSError as error:
        warnings.warn(f"{path} cannot be kept ({reason(error)}): it is made at every load", stacklevel=2)
