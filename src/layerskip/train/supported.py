"""What the trainer refuses, because it would silently train something else than the recipe says, or hang."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import transformers
from transformers import integrations

from layerskip.errors import UserError, nearest

TESTED = "5.23"
"""The version of transformers that the tests run with; 5.17 and later ones have the methods below too, as read."""
PRIVATE_METHODS = {
    "_get_grad_norm": ("model", "grad_norm"),
    "_save_checkpoint": ("model", "trial"),
    "_get_output_dir": ("trial",),
    "_save": ("output_dir", "state_dict"),
    "_finalize_training": ("trial", "num_train_samples", "start_time"),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_get_collator_with_removed_columns": ("data_collator", "description"),  # called, as is the next
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
}
"""Methods of `Trainer` that no document promises: the mixin overrides or calls them, with these parameters."""


def refuse_other_trainers() -> None:
    """Compare `Trainer` with `PRIVATE_METHODS`. Raises: UserError where this version of transformers differs."""
    for name, parameters in PRIVATE_METHODS.items():
        method = getattr(transformers.Trainer, name, None)
        found = None if method is None else tuple(inspect.signature(method).parameters)[1:]
        if found != parameters:
            what = "is missing" if found is None else f"takes ({', '.join(found)})"
            raise UserError(
                f"transformers {transformers.__version__} has another Trainer: {name} {what}, "
                f"needed is ({', '.join(parameters)})",
                f"layerskip is made for 5.17 on, tested with {TESTED}: pip install 'transformers>=5.17,<5.24'",
            )


def refuse_missing_trackers(report_to: str | Sequence[str] | None) -> None:
    """Look for what `report_to` names. Raises: UserError for one that is not known or not installed."""
    known = integrations.integration_utils.INTEGRATION_TO_CALLBACK
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name in ("none", "all"):
            continue
        if name not in known:
            raise UserError(f"report_to names no tracker: {name!r}", nearest(name, [*known, "none", "all"]))
        present = getattr(integrations, f"is_{name}_available", None)
        if present is not None and not present():
            raise UserError(f"report_to {name} needs {name}, which is not installed", f"pip install {name}")


def set_up_liger(options: Any) -> None:
    """Leave the model's forward, which gives the loss of the exits, out of what Liger replaces.

    Raises: UserError where it is asked for, or where Liger is not installed.
    """
    if not options.use_liger_kernel:
        return
    if not integrations.liger.is_liger_kernel_available():
        raise UserError(
            "use_liger_kernel needs liger-kernel, which is not installed",
            "pip install liger-kernel (it runs on GPUs), or leave use_liger_kernel out",
        )
    kernels = options.liger_kernel_config or {}
    if kernels.get("fused_linear_cross_entropy"):
        raise UserError(
            "Liger's fused_linear_cross_entropy replaces the model's forward, and so the loss of the exits",
            "leave it out: the other kernels stay, and the logits of whole batches are not made here either",
        )
    options.liger_kernel_config = {**kernels, "fused_linear_cross_entropy": False}


def refuse_unsupported(trainer: Any) -> None:
    """Look at a trainer's arguments once it is made. Raises: UserError."""
    options = trainer.args
    if options.n_gpu > 1:
        raise UserError(
            "one process drives several GPUs (DataParallel): exits need a process per GPU",
            "start with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES to one GPU",
        )
    if (options.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise UserError(
            "reentrant activation checkpointing hides the exits' states from the loss",
            'gradient_checkpointing_kwargs={"use_reentrant": False}, the default',
        )
    if trainer.is_deepspeed_enabled:
        raise UserError(
            "DeepSpeed is not supported: the loss of the exits needs whole weights, and a loss that is not finite "
            "is found after DeepSpeed has used it",
            "FSDP2 shards the same: accelerate launch --config_file examples/accelerate/fsdp2.yaml",
        )
    if trainer.is_model_parallel:
        raise UserError(
            "the model is spread over several devices, its exits cannot be read there",
            "load it without device_map, and use FSDP for what does not fit",
        )
    if trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size() > 1:
        raise UserError(
            "tensor, context and sequence parallel training are not supported", "use DDP or FSDP instead"
        )
    other_loss = options.label_smoothing_factor > 0.0 or trainer.compute_loss_func is not None
    if other_loss or getattr(options, "loss_type", "nll") not in ("nll", "chunked_nll"):
        raise UserError(
            "label smoothing, compute_loss_func and other loss types would replace the loss of the exits",
            "leave them out; exit_loss chooses between ce, kl and ce+kl",
        )
    if trainer.compute_metrics is not None:
        raise UserError(
            "compute_metrics needs the logits of whole batches, which are never made",
            "evaluation gives loss and agreement of every exit; the rest can look at checkpoints",
        )
    if trainer.model_init is not None:
        raise UserError("model_init would make a second model without exits", "give the model itself")
