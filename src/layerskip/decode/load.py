"""Load a model and its tokenizer for decoding; wrap one that is in memory."""

from __future__ import annotations

import warnings
from contextlib import contextmanager, nullcontext
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from layerskip.checkpoint import facts as checkpoint
from layerskip.checkpoint import resolve as hub
from layerskip.checkpoint.tokenizer import tokenizer_in
from layerskip.decode.language_model import LanguageModel
from layerskip.decode.options import LoadOptions
from layerskip.decode.weight_formats import compared, fastest
from layerskip.errors import UserError
from layerskip.model import load as models
from layerskip.model import threads as cores
from layerskip.model.huggingface import HuggingFaceStack
from layerskip.model.native.bfloat16 import fast_bfloat16
from layerskip.model.native.formats import FORMATS
from layerskip.model.native.load import native_family

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Unpack

    from layerskip.decode.options import Keywords
    from layerskip.model.head import Head


def resolve_dtype(dtype: str | torch.dtype, device: torch.device, native: bool = False) -> torch.dtype:
    """Turn a name into a dtype. Raises: UserError for an unknown one.

    `auto` is bfloat16 (else float16) on accelerators. On the CPU it is bfloat16 where the stack is native and that
    is faster, being as exact there; else float32.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    LoadOptions(dtype=dtype)
    if dtype == "auto":
        if device.type == "cpu":
            return torch.bfloat16 if native and fast_bfloat16() else torch.float32
        half = device.type == "cuda" and not torch.cuda.is_bf16_supported()
        return torch.float16 if half else torch.bfloat16
    return getattr(torch, dtype)  # type: ignore[no-any-return]


def resolve_device(device: str | torch.device) -> torch.device:
    """Turn a name into a device; `auto` is the accelerator when there is one.

    Raises: UserError for one that is not here.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device!r} is not usable here: {reason}", "try --device cpu") from error
    return chosen


def load(
    name: str | Path,
    *,
    dtype: str | torch.dtype = LoadOptions.dtype,
    device: str | torch.device = LoadOptions.device,
    device_map: Any = LoadOptions.device_map,
    stack: str = LoadOptions.stack,
    quantize: str | None = LoadOptions.quantize,
    threads: int | None = LoadOptions.threads,
    progress: bool = LoadOptions.progress,
) -> LanguageModel:
    """Load a built-in model, a Hugging Face folder, or a hub id.

    `stack` is native (fast, Llama-shaped families), hf (the model's own modules) or auto. `quantize` int8 or int4
    rounds the weights of a native stack on the CPU; auto measures and chooses, see `weight_formats`. `threads` sets
    how many CPU threads torch uses, in the whole process; one per free physical core is fastest, and a warning says
    where others keep cores busy.

    Raises: UserError when it cannot be found or loaded, or fails the parity check.
    """
    if not isinstance(name, (str, PathLike)):
        raise UserError(
            f"load takes a name or folder, got {type(name).__name__}",
            "for a model in memory: layerskip.generate(hf_model, ...)",
        )
    LoadOptions(dtype, device, device_map, stack, quantize, threads, progress)  # a slip costs no download
    if threads is not None:
        torch.set_num_threads(cores.chosen_threads(threads))
    chosen = resolve_device(device)
    busy = cores.busy_cores() if chosen.type == "cpu" else None  # now: loading takes cores itself
    if (warning := cores.busy_warning(busy, torch.get_num_threads())) is not None:
        warnings.warn(warning, stacklevel=1)
    with nullcontext() if progress else _no_bars():
        return _loaded(str(name), dtype, chosen, device_map, stack, quantize, progress)


def _loaded(
    name: str,
    dtype: str | torch.dtype,
    chosen: torch.device,
    device_map: Any,
    stack: str,
    quantize: str | None,
    progress: bool,
) -> LanguageModel:
    path = hub.resolve(name, progress=progress)
    if quantize == "auto":
        fits = dtype in ("auto", "bfloat16", torch.bfloat16)  # formats take no other activations
        quantize = _fastest_format(path, chosen, stack, device_map) if fits else None
    kind = resolve_dtype(dtype, chosen, native=stack != "hf" and device_map is None and native_family(path))
    if quantize in FORMATS and dtype == "auto":
        kind = FORMATS[quantize].dtypes[0]
    given: dict[str, Any] = {"device": chosen, "device_map": device_map, "kind": stack, "quantize": quantize}
    model, hf = models.load(path, dtype=kind, **given)
    half = kind == torch.bfloat16 and chosen.type == "cpu"
    if dtype == "auto" and quantize is None and half and not model.row_exact:
        del model, hf  # the two must not stand in memory together
        model, hf = models.load(path, dtype=torch.float32, **given)
    tokenizer = tokenizer_in(path)  # where there is none token ids still work, text says what is missing
    lm = LanguageModel(model, tokenizer, path, hf)
    lm.facts = checkpoint.facts_of(hf.config, name)
    return lm


def _fastest_format(path: Path, device: torch.device, stack: str, device_map: Any) -> str | None:
    """The fastest weight format that costs next to nothing; None where there are none."""
    if device.type != "cpu" or stack == "hf" or device_map is not None or not native_family(path):
        return None

    def loaded(name: str | None) -> LanguageModel:
        return _loaded(str(path), "auto", device, None, stack, name, progress=False)

    return fastest(compared(path, loaded))


@contextmanager
def _no_bars() -> Iterator[None]:
    """Silence the bars of transformers while it loads."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


_stacks: WeakKeyDictionary[Any, HuggingFaceStack] = WeakKeyDictionary()


def stack_of(hf_model: Any) -> HuggingFaceStack:
    """Wrap a model already in memory; its modules are used in place.

    The parity check runs once per model, and again when it was moved, cast or changed.

    Raises: UserError for what is no model, or one that fails the check or is not supported.
    """
    if not isinstance(hf_model, torch.nn.Module):
        raise UserError(
            f"expected a Hugging Face model in memory, got {type(hf_model).__name__}",
            "for a name or folder: layerskip.load(name).generate(...)",
        )
    known = _stacks.get(hf_model)
    if known is None or not known.fits(hf_model):
        known = _stacks[hf_model] = HuggingFaceStack(hf_model)
    return known


_heads: WeakKeyDictionary[HuggingFaceStack, dict[Any, Head]] = WeakKeyDictionary()


def wrapped(hf_model: Any, tokenizer: Any = None) -> LanguageModel:
    """Wrap a model already in memory, see `stack_of`.

    The draft head and vocabulary are not in it: they come from the folder or hub it was loaded from.
    """
    stack = stack_of(hf_model)
    return LanguageModel(stack, tokenizer, hub.folder_of(hf_model), hf_model, _heads.setdefault(stack, {}))


def generate(hf_model: Any, prompt: Any, *, tokenizer: Any = None, **keywords: Unpack[Keywords]) -> Any:
    """Generate with a Hugging Face model already in memory; see `LanguageModel.generate`.

    Raises: UserError for a model that is not supported or fails the parity check, and as `LanguageModel.generate`.
    """
    return wrapped(hf_model, tokenizer).generate(prompt, **keywords)
