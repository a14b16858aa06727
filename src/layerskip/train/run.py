"""A training run from a recipe: check everything, train, evaluate, leave a plain Hugging Face folder.

    run = prepare(read_recipe("finetune", ["data=chats.jsonl", "output=out"]))
    print(run.plan)
    result = finish(run)

`train(recipe)` is both. What can be refused is refused by `prepare`, before a step is made.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.errors import UserError, nearest
from layerskip.model.checkpoint import Facts
from layerskip.train import checkpoints
from layerskip.train.export import export
from layerskip.train.recipe import Recipe, as_yaml, differing_keys, read_recipe
from layerskip.train.schedule import Schedule

if TYPE_CHECKING:
    from layerskip.train.data import Rows
    from layerskip.train.trainer import LayerSkipArguments

RECIPE_FILE = "recipe.yaml"
MAY_DIFFER = (
    "name",
    "description",
    "source",
    "layers",
    "output",
    "keep",
    "workers",
    "report_to",
    "log_every",
)
"""Keys that a resumed run may change: they decide nothing about the weights."""

Watch = Callable[[str, int, int], None]


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
    checkpoint: Path | None
    """Where training goes on."""
    plan: dict[str, Any]

    @property
    def output(self) -> Path:
        return Path(self.arguments.output_dir)


def train(
    recipe: Recipe, resume: bool = False, callbacks: Sequence[Any] = (), watch: Watch | None = None
) -> dict[str, Any]:
    """Train as the recipe says; returns the final figures. Writes into the recipe's output folder.

    Raises: UserError for whatever the recipe, the data or the model cannot do, before any step.
    """
    return finish(prepare(recipe, resume, watch), callbacks)


def prepare(recipe: Recipe, resume: bool = False, watch: Watch | None = None) -> Run:
    """Check a recipe against its output folder, model and data; load all three. Cheap checks come first.

    Raises: UserError.
    """
    _check_installed(recipe)
    output = checked_output(recipe, resume)
    if not recipe.sources:
        raise UserError(
            "the recipe has no data", "data=FILE names .jsonl, .parquet, .txt, a folder or a data set"
        )
    folder, config = _configuration(recipe)
    num_layers = config.get_text_config().num_hidden_layers
    schedule = schedule_for(recipe, num_layers)
    _check_length(recipe, config)
    arguments = _arguments(recipe, output, schedule)
    tokenizer = _tokenizer(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        train_rows = _rows(recipe, recipe.sources, tokenizer, config, watch)
        eval_rows = _rows(recipe, recipe.eval_sources, tokenizer, config, watch, recipe.eval_limit)
    assert train_rows is not None
    model = _model(recipe, folder, config)
    run = Run(
        recipe, schedule, model, tokenizer, folder, arguments, train_rows, eval_rows,
        checkpoints.latest(output) if resume else None, {},
    )  # fmt: skip
    _check_packing(recipe, model)
    if recipe.lora is not None:
        from layerskip.train.lora import with_adapters

        run.model = with_adapters(model, recipe.lora)
    run.plan = (
        _plan(run)
        | {"use_cache": getattr(config, "use_cache", True)}
        | {"warnings": [str(warning.message) for warning in caught]}
    )
    return run


def finish(run: Run, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Train, evaluate, export. An interrupted run leaves its checkpoint and exports nothing.

    Raises: UserError for a loss that is not finite, or a disk that is full; checkpoints stay as they were.
    """
    from transformers import PrinterCallback

    from layerskip.train.trainer import LayerSkipTrainer, predicted

    main = run.arguments.process_index == 0
    if main:
        run.output.mkdir(parents=True, exist_ok=True)
        (run.output / RECIPE_FILE).write_text(as_yaml(run.recipe), encoding="utf-8")
    trainer = LayerSkipTrainer(
        model=run.model,
        args=run.arguments,
        train_dataset=run.train_rows,
        eval_dataset=run.eval_rows,
        data_collator=run.train_rows.collate,
        callbacks=list(callbacks),
    )
    if callbacks or not main:
        trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    if (run.plan["resumes_at"] or 0) < run.plan["steps"]:
        trainer.train(resume_from_checkpoint=None if run.checkpoint is None else str(run.checkpoint))
    else:
        _load_finished(trainer, run)
    result: dict[str, Any] = {
        "recipe": run.recipe.name,
        "steps": trainer.state.global_step,
        "tokens": None,
        "train_s": time.perf_counter() - began,
        "interrupted": trainer.interrupted,
        "output": str(run.output),
    }
    history = trainer.state.log_history
    if not result["interrupted"] and run.eval_rows is not None:
        done = any("eval_loss" in line and line.get("step") == trainer.state.global_step for line in history)
        if not done or trainer.state.best_model_checkpoint:  # the best one's weights are loaded by now
            trainer.evaluate()
    result |= final_figures(history, run.eval_rows is not None)
    if main:
        shutil.rmtree(run.output / checkpoints.STAGING, ignore_errors=True)
    if result["interrupted"]:
        return result
    agreement = {
        int(k): told["agreement"] for k, told in result["exits"].items() if told["agreement"] is not None
    }
    chosen = predicted(trainer.exits, {k: agreement[k] for k in run.schedule.trained if k in agreement})
    exit_layer, draft_length, speedup = chosen or (None, None, None)
    result |= {"exit_layer": exit_layer, "draft_length": draft_length, "predicted_speedup": speedup}
    if trainer.state.best_model_checkpoint and run.recipe.best_by != "none":
        result["best_checkpoint"] = Path(trainer.state.best_model_checkpoint).name
    facts = Facts(run.schedule.trained, exit_layer, draft_length, recipe=run.recipe.name or None)
    run.model.config.use_cache = run.plan["use_cache"]  # the trainer turns it off
    export(trainer, run.folder, run.output, facts, run.recipe, result)
    return result


def _load_finished(trainer: Any, run: Run) -> None:
    """Take up a run that was stopped between its last step and its export; `train` would make a step too many."""
    from transformers import TrainerState

    if trainer.is_fsdp_enabled:
        raise UserError(
            f"the run in {run.output} made its last step, and sharded checkpoints are read in training only",
            "remove its last checkpoint and --resume",
        )
    assert run.checkpoint is not None
    trainer.state = TrainerState.load_from_json(str(run.checkpoint / "trainer_state.json"))
    best = trainer.state.best_model_checkpoint if run.recipe.best_by != "none" else None
    trainer._load_from_checkpoint(best or str(run.checkpoint))


def final_figures(history: Sequence[dict[str, Any]], evaluated: bool) -> dict[str, Any]:
    """Gather each exit's last loss and agreement from the log; exits rotate, so not all stand in one line."""
    prefix = "eval_exit_" if evaluated else "exit_"
    exits: dict[str, dict[str, float | None]] = {}
    told: dict[str, Any] = {"exits": exits}
    for line in history:
        for key, value in line.items():
            if key.startswith(prefix):
                number, _, what = key.removeprefix(prefix).partition("_")
                exits.setdefault(number, {"loss": None, "agreement": None})[what] = value
            elif key in ("tokens", "tokens_per_s", "dropped", "loss", "eval_loss"):
                told[key] = value
    told["exits"] = dict(sorted(exits.items(), key=lambda item: int(item[0])))
    return told


# -- checks and loading, in the order of `prepare` ------------------------------------------------------------


def _check_installed(recipe: Recipe) -> None:
    needed = ["accelerate", *(["peft"] if recipe.lora else [])]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(f"training needs {' and '.join(missing)}", 'pip install "layerskip[train]"')


def checked_output(recipe: Recipe, resume: bool) -> Path:
    """Say where to write. Raises: UserError when something else is there, or another recipe's run."""
    if recipe.output is None:
        raise UserError("the recipe has no output", "output=FOLDER says where checkpoints and the model go")
    output = Path(recipe.output).expanduser()
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file", "name a folder")
    before = output / RECIPE_FILE
    if resume and before.is_file():
        keys = [key for key in differing_keys(read_recipe(str(before)), recipe) if key not in MAY_DIFFER]
        if keys:
            raise UserError(
                f"the run in {output} has another recipe: {', '.join(keys)} differ",
                f"resume with the same settings (`layerskip train {before} --resume`), or choose another output",
            )
    elif output.is_dir() and any(output.iterdir()):
        if resume:
            raise UserError(
                f"{output} holds no run to resume: it has no {RECIPE_FILE}", "choose another output"
            )
        hint = "--resume continues it, " if before.is_file() else ""
        raise UserError(f"output {output} is not empty", f"{hint}another output starts afresh")
    return output


def _configuration(recipe: Recipe) -> tuple[Path, Any]:
    """Find the model's folder and its configuration; with from_config the folder is that of the tokenizer."""
    from transformers import AutoConfig

    from layerskip.model import hub

    if recipe.model is None and recipe.from_config is None:
        raise UserError(
            "the recipe has no model", "model=NAME starts from a checkpoint, from_config=FILE from nothing"
        )
    folder = None if recipe.model is None else hub.resolve(recipe.model)
    path = folder
    if recipe.from_config is not None:
        path = Path(recipe.from_config).expanduser()
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"no configuration {path}", "from_config names a config.json or its folder")
        folder = folder or path.parent
    assert folder is not None
    try:
        return folder, AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the model's configuration {path}: {error}") from error


def schedule_for(recipe: Recipe, num_layers: int) -> Schedule:
    """Fit a recipe to a model's depth. Raises: UserError where it has too few layers."""
    exits = recipe.exits
    if exits == "auto":
        exits = sorted({max(1, num_layers * eighths // 8) for eighths in range(1, 5)} - {num_layers})
    elif exits is not None and max(exits) > num_layers:
        raise UserError(
            f"the recipe trains exit {max(exits)}, the model has {num_layers} layers",
            f"exits=[...] names layers from 1 to {num_layers - 1}",
        )
    if not isinstance(recipe.weighting, str) and (strange := [k for k in recipe.weighting if k > num_layers]):
        raise UserError(f"the recipe weighs exit {strange[0]}, the model has {num_layers} layers")
    return Schedule(
        num_layers,
        recipe.p_max,
        recipe.drop_depth,
        recipe.drop_time,
        recipe.e_scale,
        recipe.weighting,
        recipe.curriculum,
        recipe.rotation,
        None if exits is None else tuple(exits),
    )


def _check_length(recipe: Recipe, config: Any) -> None:
    from layerskip.model.huggingface import context_of

    context = context_of(config.get_text_config())
    if context is not None and recipe.length > context:
        raise UserError(
            f"rows of {recipe.length} tokens are longer than the model's context of {context}",
            f"length={context} or less",
        )


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"{folder} has no tokenizer", "model=NAME gives one beside from_config")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"cannot read the tokenizer of {folder}: {error}", "add its tokenizer.json"
        ) from error


def _rows(
    recipe: Recipe,
    sources: Sequence[str],
    tokenizer: Any,
    config: Any,
    watch: Watch | None,
    limit: int | None = None,
) -> Rows | None:
    if not sources:
        return None
    from layerskip.train import data

    columns = data.Columns(**recipe.columns.model_dump())
    options = data.DataOptions(
        length=recipe.length,
        columns=columns,
        template=recipe.template,
        separator=recipe.separator,
        loss_on=recipe.loss_on,
        pack=recipe.pack,
        long=recipe.long,
    )
    found = itertools.chain.from_iterable(data.examples(source, columns) for source in sources)
    encoded = data.encode(itertools.islice(found, limit), tokenizer, options, watch)
    pad = tokenizer.pad_token_id
    rows = data.rows(encoded, options, 0 if pad is None else pad)
    data.check_labels(rows, config.get_text_config().vocab_size)
    return rows


def _model(recipe: Recipe, folder: Path, config: Any) -> Any:
    """Load or make the model, float32."""
    import torch

    from layerskip.model.huggingface import load_model

    if recipe.from_config is None:
        model = load_model(folder, dtype=torch.float32, device="cpu")
    else:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(recipe.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generation = model.generation_config
    try:
        generation.validate(strict=True)
    except ValueError:  # saving would refuse it; the file itself is copied unchanged at the end
        ends = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = type(generation)(**ends)
    return model


def _check_packing(recipe: Recipe, model: Any) -> None:
    from layerskip.train.data import packs

    if recipe.pack and not packs(model):
        raise UserError(
            f"model type {model.config.model_type!r} does not keep packed examples apart", "pack=false"
        )


# -- Hugging Face's arguments and the plan --------------------------------------------------------------------


def _arguments(recipe: Recipe, output: Path, schedule: Schedule) -> LayerSkipArguments:
    import torch

    from layerskip.train.trainer import LayerSkipArguments

    on_cpu = not torch.cuda.is_available() and not torch.backends.mps.is_available()
    eval_every = recipe.eval_every or recipe.save_every
    if recipe.best_by != "none" and recipe.save_every % eval_every:
        raise UserError(
            f"best_by needs an evaluation at every checkpoint: save_every is {recipe.save_every}, "
            f"eval_every {eval_every}",
            f"eval_every={recipe.save_every}",
        )
    settings: dict[str, Any] = {
        "output_dir": str(output),
        **{
            key: getattr(recipe, key)
            for key in (
                "p_max", "drop_depth", "drop_time", "residual_scale", "e_scale", "weighting", "curriculum",
                "rotation", "exit_loss", "learning_rate", "weight_decay", "max_grad_norm", "seed", "report_to",
            )
        },
        "exits": None if schedule.exits is None else list(schedule.exits),
        "max_steps": recipe.steps or -1,
        "num_train_epochs": recipe.epochs,
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": recipe.batch_size,
        "lr_scheduler_type": recipe.lr_schedule,
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
        if key not in known:
            raise UserError(f"unknown key arguments.{key}", nearest(key, known))
    try:
        arguments = LayerSkipArguments(**settings, **recipe.arguments)
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


def _plan(run: Run) -> dict[str, Any]:
    """Say what the run will do. Units: bytes for memory, layers for the head."""
    recipe, arguments, rows = run.recipe, run.arguments, run.train_rows
    batch = recipe.batch_size * arguments.world_size
    batches = math.ceil(len(rows) / batch)
    per_epoch = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    steps = recipe.steps or math.ceil(recipe.epochs * per_epoch)
    rows_per_step = batch * arguments.gradient_accumulation_steps
    mean = rows.num_tokens / len(rows)
    config = run.model.config.get_text_config()
    parameters = sum(p.numel() for p in run.model.parameters())
    trainable = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    return {
        "steps": steps,
        "epochs": round(steps / per_epoch, 2),
        "rows": len(rows),
        "examples": rows.num_examples,
        "rows_per_step": rows_per_step,
        "tokens": round(steps * rows_per_step * mean),
        "tokens_per_epoch": rows.num_tokens,
        "learnt_share": round(rows.num_targets / rows.num_tokens, 3),
        "eval_rows": 0 if run.eval_rows is None else len(run.eval_rows),
        "layers": config.num_hidden_layers,
        "exits": list(run.schedule.trained),
        "parameters": parameters,
        "trainable": trainable,
        "devices": arguments.world_size,
        "device": arguments.device.type,
        "memory_bytes": _memory(run, parameters, trainable),
        "resumes_at": None if run.checkpoint is None else int(run.checkpoint.name.rsplit("-", 1)[1]),
    }


def _memory(run: Run, parameters: int, trainable: int) -> int:
    """Estimate the peak of one device that holds everything: weights, gradients, Adam, activations, logits."""
    config, recipe = run.model.config.get_text_config(), run.recipe
    tokens, width = recipe.batch_size * recipe.length, config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    size = 2 if recipe.dtype == "bfloat16" else 4
    layer = tokens * (10 * width + 4 * inner) * size  # what a Llama-shaped layer keeps for its backward pass
    layers = config.num_hidden_layers
    activations = layer + layers * tokens * width * size if recipe.checkpointing else layers * layer
    head = config.vocab_size * width
    return int(4 * parameters + 12 * trainable + activations + 4 * head + 3 * (1 << 26))
