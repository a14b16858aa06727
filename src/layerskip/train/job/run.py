"""A training run from a recipe: check everything, train, evaluate, leave a plain Hugging Face folder.

    run = prepare(read_recipe("exit-adapter", ["model=./your-model", "data=own.jsonl", "output=out"]))
    print(run.plan)
    result = finish(run)

`train(recipe)` is both. What can be refused is refused by `prepare`, before a step is made.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.checkpoint.facts import Facts, fingerprint
from layerskip.checkpoint.files import write_text
from layerskip.errors import UserError, hint_of
from layerskip.reading import named_path, read_json
from layerskip.train import checkpoints
from layerskip.train.data.states import made_by
from layerskip.train.job.export import export
from layerskip.train.job.loading import (
    check_length,
    check_packing,
    configuration_of,
    ends_of,
    model_for,
    rows_of,
    tokenizer_of,
)
from layerskip.train.job.plan import Run, arguments_for, plan_of, short
from layerskip.train.job.recipe import Recipe, as_yaml, differing_keys, read_recipe
from layerskip.train.objective.binding import shape
from layerskip.train.objective.objective import Objective
from layerskip.train.objective.schedule import Schedule
from layerskip.train.objective.store import AnswerStates, StateStore

if TYPE_CHECKING:
    from layerskip.train.arguments import LayerSkipArguments
    from layerskip.train.figures import Setting
    from layerskip.watch import Watch

RECIPE_FILE = "recipe.yaml"
FACTS_FILE = "run.json"
"""Beside the recipe: what data and devices make of it, which a resumed run must not change either."""
STATES = ".states"
MAY_DIFFER = (
    "states_gb",
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


def train(
    recipe: Recipe, resume: bool = False, callbacks: Sequence[Any] = (), watch: Watch | None = None
) -> dict[str, Any]:
    """Train as the recipe says; returns the final figures. Writes into the recipe's output folder.

    Raises: UserError for whatever the recipe, the data or the model cannot do, before any step.
    """
    return finish(prepare(recipe, resume, watch), callbacks)


def prepare(
    recipe: Recipe,
    resume: bool = False,
    watch: Watch | None = None,
    planning: bool = False,
    device: str | None = None,
) -> Run:
    """Check a recipe against its output folder, model and data; load all three. Cheap checks come first.

    With `planning` it needs no output folder; such a run is to be looked at, not to be finished.
    `device` cpu leaves an accelerator alone.

    Raises: UserError.
    """
    _check_installed(recipe)
    output = Path() if planning and recipe.output is None else checked_output(recipe, resume)
    if not recipe.sources:
        raise UserError(
            "the recipe has no data", "data=FILE names .jsonl, .parquet, .txt, a folder or a data set"
        )
    folder, config, schedule, arguments = settled(recipe, output, device)
    tokenizer, ends = tokenizer_of(folder), ends_of(folder, config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        train_rows, eval_rows = rows_of(recipe, tokenizer, config, watch, ends)
    model = model_for(recipe, folder, config)
    run = Run(
        recipe, schedule, model, tokenizer, folder, arguments, train_rows, eval_rows, ends,
        checkpoints.latest(output) if resume else None,
        getattr(config, "use_cache", True), [str(warning.message) for warning in caught],
    )  # fmt: skip
    check_packing(recipe, model)
    shape(Objective.of(recipe), model, schedule)  # here, for adapters and the plan to know it
    if recipe.lora is not None:
        from layerskip.train.job.lora import with_adapters

        run.model = with_adapters(model, recipe.lora)
        lowest = min(recipe.lora.layers or [1])
        if above := [k for k in schedule.trained if k < lowest]:
            raise UserError(
                f"exit {above[0]} would learn nothing: no layer up to it has adapters, the lowest is {lowest}",
                f"lora.layers=[...] from {above[0]} down, or exits=[...] from {lowest} up",
            )
    run.plan = plan_of(run)
    run.warnings += short(run.plan, recipe)
    if run.checkpoint is not None:
        _check_unchanged(run)
    return run


def settled(
    recipe: Recipe, output: Path, device: str | None = None
) -> tuple[Path, Any, Schedule, LayerSkipArguments]:
    """Check a recipe against its model's configuration: folder, configuration, schedule, arguments.

    Raises: UserError.
    """
    folder, config = configuration_of(recipe)
    num_layers = config.get_text_config().num_hidden_layers
    check_depth(recipe, num_layers)
    schedule = schedule_for(recipe, num_layers)
    check_length(recipe, config)
    return folder, config, schedule, arguments_for(recipe, output, schedule, device)


def finish(run: Run, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Train, evaluate, export. An interrupted run leaves its checkpoint and exports nothing.

    Raises: UserError for a loss that is not finite, or a disk that is full; checkpoints stay as they were.
    """
    from transformers import PrinterCallback

    from layerskip.train.trainer import LayerSkipTrainer

    main = run.arguments.process_index == 0
    if main:
        _write_down(run)
    objective = Objective.of(run.recipe)
    if run.recipe.exit_vocab is not None:
        frequent = run.train_rows.frequent(run.recipe.exit_vocab, run.ends)
        objective = replace(objective, exit_vocab=frequent)
    trainer = LayerSkipTrainer(
        model=run.model,
        args=run.arguments,
        train_dataset=run.train_rows,
        eval_dataset=run.eval_rows,
        data_collator=run.train_rows.collate,
        callbacks=list(callbacks),
        objective=objective,
    )
    if callbacks or not main:
        trainer.remove_callback(PrinterCallback)
    store = _keep_states(run, trainer)
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
        **dict.fromkeys(("exit_layer", "draft_length", "draft_vocab", "predicted_speedup")),
        "measured_on": "training",
    }
    history = trainer.state.log_history
    if not result["interrupted"] and run.eval_rows is not None:
        done = any("eval_loss" in line and line.get("step") == trainer.state.global_step for line in history)
        if not done or trainer.state.best_model_checkpoint:  # the best one's weights are loaded by now
            trainer.evaluate()
            # Trackers were closed when training ended, and opened again by these figures.
            trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
    evaluated = run.eval_rows is not None and any("eval_loss" in line for line in history)
    result |= final_figures(history, evaluated)
    if evaluated:
        result |= {
            "measured_on": "held_out" if run.num_held_out else "eval_data",
            "held_out": run.num_held_out,
        }
    if main:
        shutil.rmtree(run.output / checkpoints.STAGING, ignore_errors=True)
    if result["interrupted"]:
        return result
    if store is not None and main:
        store.remove()
    chosen = None
    if result["measured_on"] != "training":
        chosen = _choice(trainer, run, result["exits"], result.get("tokens_per_round"))
    vocabulary: Sequence[int] | None = trainer.exits.bound.vocabulary
    if chosen is not None:
        result["predicted_speedup"] = chosen.speedup
        if chosen.speedup >= 1.0:  # else decoding stays plain until it is asked for more
            result |= {"exit_layer": chosen.exit_layer, "draft_length": chosen.draft_length}
        if vocabulary is None and chosen.draft_vocab < trainer.exits.head.weight.shape[0]:
            vocabulary = run.train_rows.frequent(chosen.draft_vocab, run.ends)
    result["draft_vocab"] = None if vocabulary is None else len(vocabulary)
    if trainer.state.best_model_checkpoint and run.recipe.best_by != "none":
        result["best_checkpoint"] = Path(trainer.state.best_model_checkpoint).name
    chosen_by = (result["exit_layer"], result["draft_length"])
    facts = Facts(run.schedule.trained, *chosen_by, recipe=run.recipe.name or None)
    run.model.config.use_cache = run.use_cache
    export(trainer, run, facts, vocabulary, result)
    return result


def _keep_states(run: Run, trainer: Any) -> StateStore | None:
    """Read states that came with the data; keep others for the next epoch, as far as states_gb reaches."""
    recipe, rows = run.recipe, run.train_rows
    if not recipe.exit_adapter:
        return None
    width = run.model.config.get_text_config().hidden_size
    dtype, weights = next(run.model.parameters()).dtype, fingerprint(run.folder)
    answers = AnswerStates(rows, made_by(weights, dtype), width, dtype)
    early = bool(max(run.schedule.trained))  # whose states no answers tell; an embedding is read anew
    if early:
        answers.held.clear()
    store = None
    passes = run.plan["steps"] * run.plan["rows_per_step"] / len(rows)
    if recipe.states_gb and passes > 1:
        told = [
            _facts(run)["data"],
            weights,
            run.schedule.trained,
            recipe.length,
            recipe.dtype,
            len(answers.held),
        ]
        with run.arguments.main_process_first():
            store = StateStore(
                run.output / STATES,
                rows={*range(len(rows))} - answers.held,
                planes=1 + early,
                length=rows.longest,
                width=width,
                dtype=dtype,
                budget=recipe.states_gb * 1e9,
                key=json.dumps(told),
            )
    rows.numbered = store is not None or bool(answers.held)
    trainer.exits.keep(store, answers)
    return store


def _choice(
    trainer: Any, run: Run, exits: dict[str, Any], tokens_per_round: float | None = None
) -> Setting | None:
    """Choose E, K and the size of the draft vocabulary from what rows said that were not trained on."""
    from layerskip.train import figures

    assert run.eval_rows is not None
    agreement = {int(k): told["agreement"] for k, told in exits.items() if told["agreement"] is not None}
    measured = {k: agreement[k] for k in run.schedule.trained if k in agreement}
    if tokens_per_round is not None:  # of an adapter: later drafts are right less often than the first
        measured = dict.fromkeys(measured, figures.per_token(tokens_per_round))
    if (own := trainer.exits.bound.vocabulary) is not None:  # exit_vocab has chosen
        shares = {len(own): figures.covered(run.eval_rows, own)}
    else:
        size = trainer.exits.head.weight.shape[0]
        shares = figures.coverage(run.train_rows, run.eval_rows, run.ends, size)
    return figures.predicted(trainer.exits, measured, shares)


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
    trainer.state.best_model_checkpoint = checkpoints.best(trainer.state, run.output)
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
            elif key.startswith(("eval_draft_", "eval_tokens_per_round")):
                told[key.removeprefix("eval_")] = value
    told["exits"] = dict(sorted(exits.items(), key=lambda item: int(item[0])))
    return told


# -- checks and loading, in the order of `prepare` ------------------------------------------------------------


def _check_installed(recipe: Recipe) -> None:
    needed = ["accelerate", *(["peft"] if recipe.lora else [])]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(f"training needs {' and '.join(missing)}", 'pip install "layerskip[train]"')
    from layerskip.train.supported import refuse_missing_trackers

    refuse_missing_trackers(recipe.report_to)


def checked_output(recipe: Recipe, resume: bool) -> Path:
    """Say where to write. Raises: UserError when something else is there, or another recipe's run."""
    if recipe.output is None:
        raise UserError("the recipe has no output", "output=FOLDER says where checkpoints and the model go")
    output = named_path(recipe.output)
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file", "name a folder")
    recorded = output / RECIPE_FILE
    if resume and recorded.is_file():
        keys = [key for key in differing_keys(read_recipe(str(recorded)), recipe) if key not in MAY_DIFFER]
        if keys:
            raise UserError(
                f"the run in {output} has another recipe, it differs in {', '.join(keys)}",
                f"resume with the same settings (`layerskip train {recorded} --resume`), or choose another output",
            )
    elif output.is_dir() and any(output.iterdir()):
        if resume:
            raise UserError(
                f"{output} holds no run to resume: it has no {RECIPE_FILE}", "choose another output"
            )
        hint = "--resume continues it, " if recorded.is_file() else ""
        raise UserError(f"output {output} is not empty", f"{hint}another output starts afresh")
    return output


def _facts(run: Run) -> dict[str, Any]:
    digest, rows = hashlib.sha256(), run.train_rows
    for array in (rows.tokens, rows.labels, rows.starts, rows.bounds):
        digest.update(array.data)
    counted = {key: run.plan[key] for key in ("rows_per_step", "steps", "held_out")}
    return counted | {"data": digest.hexdigest()}


def _check_unchanged(run: Run) -> None:
    """Raises: UserError when a resumed run would train on other rows than the one it goes on with."""
    file, now = run.output / FACTS_FILE, _facts(run)
    recorded = read_json(file, dict, "choose another output") if file.is_file() else now
    changed = ["the data" if key == "data" else f"{key} ({recorded.get(key)} before, now {value})"
               for key, value in now.items() if recorded.get(key, value) != value]  # fmt: skip
    if changed:
        raise UserError(
            f"the run in {run.output} cannot go on exactly, these changed: {', '.join(changed)}",
            "resume with the data, the tokenizer and the number of devices of its start, or choose another output",
        )


def _write_down(run: Run) -> None:
    """Put recipe and facts into the output folder, each as a whole, and only where they are new."""
    try:
        run.output.mkdir(parents=True, exist_ok=True)
        for name, text in (
            (FACTS_FILE, json.dumps(_facts(run)) + "\n"),
            (RECIPE_FILE, as_yaml(run.recipe)),
        ):
            file = run.output / name
            if not file.is_file() or file.read_text(encoding="utf-8") != text:
                write_text(file, text)
    except OSError as error:
        raise UserError(
            f"cannot write into {run.output}: {error}", hint_of(error, "choose another output")
        ) from error


def check_depth(recipe: Recipe, num_layers: int) -> None:
    """Refuse a recipe that was written for a deeper model. Raises: UserError."""
    if recipe.layers is not None and recipe.layers > num_layers:
        raise UserError(
            f"the recipe is for {recipe.layers} layers, the model has {num_layers}",
            "layers=null takes its settings as they are; shipped for any depth are exit-adapter, finetune and lora",
        )


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
    return Schedule.of(num_layers, recipe, exits)
