"""What the trainer refuses, because it would silently train something else than the recipe says, or hang."""

from __future__ import annotations

from typing import Any

from layerskip.errors import UserError


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
        raise UserError("DeepSpeed is not supported: the loss of the exits needs whole weights", "use FSDP")
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
