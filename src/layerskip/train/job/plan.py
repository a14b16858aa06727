"""A run that is about to start: a recipe as Hugging Face's arguments, its plan of steps, tokens and memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.errors import UserError, nearest

if TYPE_CHECKING:
    from layerskip.train.arguments import LayerSkipArguments
    from layerskip.train.data.packing import Rows
    from layerskip.train.job.recipe import Recipe
    from layerskip.train.objective.schedule import Schedule


REFUSED = {
    "gradient_accumulation_steps": "accumulation or global_batch decides it",
    "prediction_loss_only": "the logits of all exits are never made at once",
    "ignore_data_skip": "a resumed run would see other rows",
    "save_only_model": "no run could be resumed from its checkpoints",
    "auto_find_batch_size": "a resumed run would see other rows",
    "dataloader_drop_last": "the plan counts all rows",
}
SCHEDULERS = {"constant": "constant_with_warmup"}  # Hugging Face's `constant` has no warm-up


@dataclass
class Run:
    """A run that passed every check."""

    recipe: Recipe
    schedule: Schedule
    model: Any
    tokenizer: Any
    folder: Path
    """Where tokenizer and generation config come from."""
    arguments: LayerSkipArguments
    train_rows: Rows
    eval_rows: Rows | None
    ends: set[int]
    """Tokens that end what the model writes."""
    checkpoint: Path | None
    """Where training goes on."""
    use_cache: bool
    """The configuration's, which the trainer turns off and the export gives back."""
    warnings: list[str]
    """What was noticed while the data were read."""
    plan: dict[str, Any] = field(default_factory=dict)

    @property
    def num_held_out(self) -> int:
        """Examples of the training data that were set aside to evaluate on."""
        return 0 if self.eval_rows is None or self.recipe.eval_sources else self.eval_rows.num_examples

    @property
    def output(self) -> Path:
        return Path(self.arguments.output_dir)


def arguments_for(
    recipe: Recipe, output: Path, schedule: Schedule, device: str | None = None
) -> LayerSkipArguments:
    """Say a recipe as Hugging Face's arguments; `device` cpu leaves an accelerator alone.

    Raises: UserError for settings that exclude one another or do not fit this machine.
    """
    import torch

    from layerskip.train.arguments import LayerSkipArguments

    on_cpu = device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    eval_every = recipe.eval_every or recipe.save_every
    if recipe.best_by != "none" and recipe.save_every % eval_every:
        raise UserError(
            f"best_by needs an evaluation at every checkpoint: save_every is {recipe.save_every}, "
            f"eval_every {eval_every}",
            f"eval_every={recipe.save_every}",
        )
    if recipe.best_by == "speedup" and not schedule.trained:
        raise UserError("best_by speedup needs an exit, and e_scale=0 trains none", "best_by=loss")
    settings: dict[str, Any] = {
        "output_dir": str(output),
        **{
            key: getattr(recipe, key)
            for key in (
                "p_max", "drop_depth", "drop_time", "residual_scale", "e_scale", "weighting", "curriculum",
                "rotation", "last_every", "exit_loss", "last_loss", "exit_vocab", "exit_map", "freeze",
                "exit_adapter", "adapter_blocks", "adapter_hidden", "adapter_steps", "optimizer",
                "learning_rate", "weight_decay", "max_grad_norm", "seed", "report_to",
            )
        },
        "exits": None if schedule.exits is None else list(schedule.exits),
        "max_steps": recipe.steps or -1,
        "num_train_epochs": recipe.epochs,
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": recipe.batch_size,
        "lr_scheduler_type": SCHEDULERS.get(recipe.lr_schedule, recipe.lr_schedule),
        "warmup_steps": recipe.warmup,
        "bf16": recipe.dtype == "bfloat16",
        **({"gradient_checkpointing": True} if recipe.checkpointing else {}),
        "torch_compile": recipe.compile,
        "dataloader_num_workers": recipe.workers,
        "save_strategy": "steps",
        "save_steps": recipe.save_every,
        "save_total_limit": recipe.keep,
        "logging_steps": recipe.log_every,
        "eval_strategy": "steps" if recipe.eval_sources else "no",
        "eval_steps": eval_every if recipe.eval_sources else None,
        "load_best_model_at_end": recipe.best_by != "none",
        "metric_for_best_model": {"loss": "eval_loss", "speedup": "eval_predicted_speedup"}.get(recipe.best_by),
        "greater_is_better": {"loss": False, "speedup": True}.get(recipe.best_by),
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cpu": on_cpu,
    }  # fmt: skip
    known = {field.name for field in fields(LayerSkipArguments)}
    for key in recipe.arguments:
        if key in settings:
            raise UserError(
                f"arguments.{key} is decided by the recipe's own keys", "layerskip recipes show lists them"
            )
        if key in REFUSED:
            raise UserError(f"arguments.{key} cannot be set: {REFUSED[key]}", "leave it out")
        if key not in known:
            raise UserError(f"unknown key arguments.{key}", nearest(key, known))
    defaults: dict[str, Any] = {
        "ddp_find_unused_parameters": False,
        "logging_first_step": True,
        "run_name": f"{recipe.name} {output.resolve().name}".strip(),  # by which trackers take a run up again
    }
    try:
        arguments = LayerSkipArguments(**settings, **defaults | recipe.arguments)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"the recipe's settings do not fit this machine: {error}") from error
    if recipe.global_batch is not None:
        rows = recipe.batch_size * arguments.world_size
        if recipe.global_batch % rows:
            raise UserError(
                f"global_batch {recipe.global_batch} is not a multiple of batch_size {recipe.batch_size} x "
                f"{arguments.world_size} devices",
                f"global_batch={max(1, recipe.global_batch // rows) * rows}, or another batch_size",
            )
        arguments.gradient_accumulation_steps = recipe.global_batch // rows
    else:
        arguments.gradient_accumulation_steps = recipe.accumulation
    return arguments


LEAST_STEPS, LEAST_TOKENS = 50, 100_000
"""Of a run that teaches something: on one task an exit predicted 70% of the tokens after 60 k (notebook)."""


def plan_of(run: Run) -> dict[str, Any]:
    """Say what the run will do. Units: bytes for memory and disk."""
    recipe, arguments, rows = run.recipe, run.arguments, run.train_rows
    batch = recipe.batch_size * arguments.world_size
    batches = math.ceil(len(rows) / batch)
    per_epoch = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    steps = recipe.steps or math.ceil(recipe.epochs * per_epoch)
    rows_per_step = batch * arguments.gradient_accumulation_steps
    config = run.model.config.get_text_config()
    parameters = sum(p.numel() for p in run.model.parameters())
    trainable = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    states = min(states_bytes(run), int(recipe.states_gb * 1e9)) if steps > per_epoch else 0
    return {
        "steps": steps,
        "epochs": round(steps / per_epoch, 2),
        "rows": len(rows),
        "examples": rows.num_examples,
        "rows_per_step": rows_per_step,
        "rows_per_pass": batch,
        "passes": arguments.gradient_accumulation_steps,
        "tokens": round(steps / per_epoch * rows.num_tokens),
        "tokens_per_epoch": rows.num_tokens,
        "learnt_share": round(rows.num_targets / rows.num_tokens, 3),
        "eval_rows": 0 if run.eval_rows is None else len(run.eval_rows),
        "held_out": run.num_held_out,
        "layers": config.num_hidden_layers,
        "exits": list(run.schedule.trained),
        "parameters": parameters,
        "trainable": trainable,
        "devices": arguments.world_size,
        "device": arguments.device.type,
        "memory_bytes": sum(memory_of(run, parameters, trainable)),
        "disk_bytes": _disk(recipe, steps, parameters, trainable, states),
        "resumes_at": None if run.checkpoint is None else int(run.checkpoint.name.rsplit("-", 1)[1]),
    }


def short(plan: dict[str, Any], recipe: Recipe) -> list[str]:
    """Warn of a plan too short to teach its exits, and say how long it should be."""
    if not plan["exits"] or (plan["steps"] >= LEAST_STEPS and plan["tokens"] >= LEAST_TOKENS):
        return []
    longer = max(LEAST_STEPS / plan["steps"], LEAST_TOKENS / plan["tokens"])
    name, now = ("epochs", plan["epochs"]) if recipe.steps is None else ("steps", plan["steps"])
    return [
        f"{plan['steps']:,} steps with {plan['tokens']:,} tokens teach an exit little. One task needs some "
        f"{LEAST_TOKENS:,}, general text millions: give more data, or {name}={math.ceil(longer * now)}"
    ]


def states_bytes(run: Run) -> int:
    """Size of the states that an adapter reads again in the next epoch; 0 for other recipes."""
    if not run.recipe.exit_adapter:
        return 0
    planes, width = 2 if max(run.schedule.trained) else 1, run.model.config.get_text_config().hidden_size
    size = planes * width * next(run.model.parameters()).element_size()
    return int(len(run.train_rows) * run.train_rows.longest * size)


def _disk(recipe: Recipe, steps: int, parameters: int, trainable: int, states: int) -> int:
    """Add up the finished model, kept states and the checkpoints that stand at once: kept, best, being written."""
    weights = 4 * (trainable if recipe.lora is not None or recipe.exit_adapter else parameters)
    kept = recipe.keep + (recipe.best_by != "none")
    return (
        4 * parameters
        + states
        + min(kept + 1, math.ceil(steps / recipe.save_every)) * (weights + 8 * trainable)
    )


def memory_of(run: Run, parameters: int, trainable: int) -> tuple[int, int]:
    """Estimate the peak of one device: weights, gradients and Adam, which FSDP shards; activations and logits."""
    config, recipe = run.model.config.get_text_config(), run.recipe
    tokens, width = recipe.batch_size * recipe.length, config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    short = recipe.dtype == "bfloat16"  # autocast: norms and the residual stay float32, products are 16 bit
    size = 2 if short else 4
    # What a Llama-shaped layer keeps for its backward pass; 4 x 512 tokens of SmolLM2 took 5.2 GB in all.
    layer = tokens * ((32 if short else 56) * width + 4 * inner * size)
    layers = config.num_hidden_layers
    activations = layer + layers * tokens * width * 4 if recipe.checkpointing else layers * layer
    head = config.vocab_size * width
    weights = (6 if short else 4) * parameters + 12 * trainable
    if (
        recipe.last_loss != "ce" and recipe.lora is None and recipe.freeze != "model"
    ):  # what it was before training stands beside it
        weights += (2 if short else 4) * parameters
    return weights, int(activations + 4 * head + 3 * (1 << 26))
