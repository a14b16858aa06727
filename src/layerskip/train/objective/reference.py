"""The model as it was before training, for a last layer that is to stay so.

reference = reference_of(model)        # before a trainer touches it
reference(**inputs)                     # [B, T, D]
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode (some families have dropout of their own), and each module back after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def reference_of(model: Any, dtype: torch.dtype | None = None) -> Callable[..., Tensor]:
    """Give a function from a model's inputs to what its head reads now, [B, T, D], whatever training changes.

    With adapters it is the model without them; else a frozen copy on its device, in `dtype` if one is given.
    """
    if hasattr(model, "disable_adapter"):
        inner = model.get_base_model()

        def without_adapters(**inputs: Any) -> Tensor:
            with evaluating(inner), model.disable_adapter():
                hidden: Tensor = inner.base_model(**inputs, use_cache=False).last_hidden_state
            return hidden

        return without_adapters
    # Copied in its dtype at once: a whole copy first would be the most memory that a run takes.
    cast = {id(p): torch.nn.Parameter(p.detach().to(dtype, copy=True)) for p in model.parameters() if dtype}
    frozen = copy.deepcopy(model, cast).to(dtype=dtype).eval().requires_grad_(False)

    def of_copy(**inputs: Any) -> Tensor:
        frozen.to(next(model.parameters()).device)
        hidden: Tensor = frozen.base_model(**inputs, use_cache=False).last_hidden_state
        return hidden

    return of_copy
