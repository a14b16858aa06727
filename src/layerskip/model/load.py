"""Load a plain Hugging Face folder and choose its stack: native where the family has one, else the model's own."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from layerskip.errors import UserError, nearest
from layerskip.model.families import refuse_unsupported
from layerskip.model.huggingface import HuggingFaceStack
from layerskip.model.native.formats import FORMATS, require_format
from layerskip.model.native.load import FAMILIES as NATIVE_FAMILIES
from layerskip.model.native.load import native_reason, native_stack
from layerskip.model.native.stored import stored_stack
from layerskip.reading import reason

if TYPE_CHECKING:
    from pathlib import Path

    from layerskip.model.stack import Stack

KINDS = ("auto", "native", "hf")


def load(
    path: Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    device_map: Any = None,
    kind: str = "auto",
    quantize: str | None = None,
) -> tuple[Stack, Any]:
    """Load a plain Hugging Face folder; return its stack and the Hugging Face model it came from.

    `kind` auto takes the native stack where the family has one, native insists on it, hf refuses it. The native
    stack takes the model's weights with it: what is returned then is a shell with its configuration.

    Raises: UserError for a model that does not load, or whose slices do not reproduce it.
    """
    if kind not in KINDS:
        raise UserError(f"unknown stack {kind!r}", nearest(kind, KINDS))
    require_format(quantize, dtype, torch.device(device))
    if quantize is not None and kind != "hf" and device_map is None:
        made = stored_stack(path, FORMATS[quantize], dtype)
        if made is not None:
            return made
    hf = load_model(path, dtype=dtype, device=device, device_map=device_map)
    refuse_unsupported(hf)
    why = "--stack hf was asked for" if kind == "hf" else native_reason(hf, placed=device_map is not None)
    if why is None:
        return native_stack(hf, quantize=quantize), hf
    if kind == "auto" and device_map is None and hf.config.get_text_config().model_type in NATIVE_FAMILIES:
        warnings.warn(
            f"decoding by transformers' modules, two to three times slower than the native stack: {why}",
            RuntimeWarning,
            stacklevel=2,
        )
    if kind == "native" or quantize is not None:
        wanted = "the native stack" if quantize is None else f"{quantize}, which needs the native stack,"
        raise UserError(f"{wanted} cannot be had: {why}", "leave out --quantize and --stack")
    return HuggingFaceStack(hf), hf


def load_model(path: Path, *, dtype: torch.dtype, device: str | torch.device, device_map: Any = None) -> Any:
    """Load a checked folder with `AutoModelForCausalLM` (safetensors only, no remote code).

    Raises: UserError for missing weights and for whatever transformers, torch or safetensors cannot read or hold.
    """
    from transformers import AutoModelForCausalLM

    placement = {"device_map": device_map} if device_map is not None else {}
    try:
        hf, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **placement,
        )
        hf = hf.eval() if device_map is not None else hf.to(device).eval()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(
            f"not enough memory on {device} for the weights of {path}", "use a 16-bit --dtype"
        ) from error
    except Exception as error:  # whatever transformers, torch and safetensors say of a file that cannot be
        raise UserError(f"cannot load {path} as a causal language model: {reason(error)}") from error
    if missing := sorted(report["missing_keys"]):  # transformers would fill them with random numbers
        raise UserError(
            f"{path} lacks {len(missing)} weights of {type(hf).__name__}, the first is {missing[0]}",
            "is the download complete, and config.json that of these weights?",
        )
    return hf
