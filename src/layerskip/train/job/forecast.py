"""What a run would take and give, before anything is started: tokens, hours, memory, disk, gain, and where it fits.

    told = forecast(read_recipe("exit-adapter", ["model=./your-model", "data=own.jsonl"]), device, hours=24)

With model and data at hand some steps are made and timed, as training itself would make them; the model in memory
is thrown away afterwards. Else the shape of the model is enough, and time is known to a factor of three.
"""

from __future__ import annotations

import copy
import itertools
import shlex
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PrinterCallback, TrainerCallback

from layerskip.checkpoint.resolve import at_hand
from layerskip.errors import UserError
from layerskip.model.cache import available_bytes
from layerskip.reading import named_path
from layerskip.train.job.curve import curve_of
from layerskip.train.job.loading import rows_of, tokenizer_of
from layerskip.train.job.plan import Run, memory_of, plan_of
from layerskip.train.job.recipe import FSDP_SETTINGS, Recipe
from layerskip.train.job.run import prepare, settled
from layerskip.train.job.work import GPUS_EACH, Work, fleet, hours_derived, hours_measured
from layerskip.train.objective.binding import shape
from layerskip.train.objective.exit_adapter import adapter_of
from layerskip.train.objective.objective import Objective
from layerskip.watch import Watch, silent

if TYPE_CHECKING:
    from layerskip.train.data.packing import Rows

WARM_UP = 1
"""Steps that are not timed: the first one pays for what is set up once."""
PRODUCT_ROWS, PRODUCT_S = 1024, 0.1


@dataclass(frozen=True)
class FullRows:
    """Rows of data that are not there yet: as many as the steps need, each of them full."""

    num_rows: int
    longest: int

    def __len__(self) -> int:
        return self.num_rows

    @property
    def num_tokens(self) -> int:
        return self.num_rows * self.longest

    num_targets = num_tokens

    @property
    def num_examples(self) -> int:
        return self.num_rows


def forecast(
    recipe: Recipe, device: torch.device, hours: float, steps: int = 4, watch: Watch = silent
) -> dict[str, Any]:
    """Say what a run takes on `device`, what it gives, and what to do where it does not fit.

    `hours` is how long it may take; `steps` are timed, 0 derives the time from shapes.
    Raises: UserError as `prepare`, and where neither the data nor `steps` of the recipe say how long the run is.
    """
    run, notes = _outlined(recipe, device), []
    recipe = run.recipe
    parameters = sum(p.numel() for p in run.model.parameters())
    trainable = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    sharded, other = memory_of(run, parameters, trainable)
    free = available_bytes(device)
    at_work = bool(recipe.sources) and steps > 0 and (free is None or sharded + other <= free)
    seconds: list[float] = []
    if at_work:
        run = prepare(recipe, False, watch, planning=True, device=device.type)
        seconds, peak = _timed(run, min(steps, run.plan["steps"] - WARM_UP), watch)
        notes += run.warnings
    else:
        if recipe.sources and not steps:
            notes.append("no step was timed, as asked")
        elif recipe.sources:
            notes.append("no step was timed: the run does not fit this device's memory")
        run, peak = _with_rows(run, watch), None
    work = Work.of(run)
    if seconds:
        taken = hours_measured(seconds, work, WARM_UP)
    else:
        taken = hours_derived(work, product_flops(device, recipe), run.plan["devices"])
    memory = peak or run.plan["memory_bytes"]
    disk_free = shutil.disk_usage(_standing(recipe)).free
    reasons = []
    if taken.middle > hours:
        reasons.append(f"it takes {_span(taken.middle)}, and {_span(hours)} are allowed")
    if free is not None and memory > free:
        reasons.append(f"it needs {memory / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} are free")
    gpus = fleet(work, sharded, other, hours) if reasons else None  # which cure no full disk
    if run.plan["disk_bytes"] > disk_free:
        reasons.append(
            f"it needs {run.plan['disk_bytes'] / 1e9:,.1f} GB of disk, and {disk_free / 1e9:,.1f} are free"
        )
    if reasons and (recipe.exit_adapter or recipe.exit_vocab or recipe.lora):
        notes.append(
            "adapters and draft heads of sharded models are saved as they are: "
            "docs/training.md says how to save them whole"
        )
    prediction, answers, why = _gain(recipe, run, watch)
    return {
        "recipe": recipe.name,
        "tokens": run.plan["tokens"],
        "answer_tokens": answers,
        "steps": run.plan["steps"],
        "parameters": parameters,
        "trainable": trainable,
        "operations": work.total,
        "hours": taken.record(),
        "hours_from": "steps" if seconds else "shapes",
        "step_s": seconds,
        "memory_bytes": memory,
        "memory_free_bytes": free,
        "disk_bytes": run.plan["disk_bytes"],
        "disk_free_bytes": disk_free,
        "device": device.type,
        "prediction": prediction,
        "no_prediction": why,
        "fits": not reasons,
        "reasons": reasons,
        "gpus": gpus,
        "notes": notes,
    }


def _span(hours: float) -> str:
    """Word a time of any size."""
    if hours >= 1:
        return f"{hours:,.1f} hours" if hours < 72 else f"{hours / 24:,.0f} days"
    return f"{60 * hours:.2g} minutes"


def launch(name: str, settings: Sequence[str], gpus: int) -> str:
    """Word the command of a run that is sharded over `gpus` GPUs; words in upper case are to be filled in."""
    words = ["accelerate", "launch", "--config_file", str(FSDP_SETTINGS), "--num_processes", str(gpus)]
    if (machines := -(-gpus // GPUS_EACH)) > 1:
        words += ["--num_machines", str(machines), "--machine_rank", "RANK", "--main_process_ip", "HOST"]
        words += ["--main_process_port", "29500"]
    return shlex.join([*words, "-m", "layerskip", "train", name, *settings])


def product_flops(device: torch.device, recipe: Recipe) -> float:
    """Time a square product on a device: the operations per second that training cannot exceed."""
    kind = torch.bfloat16 if recipe.dtype == "bfloat16" else torch.float32
    a = torch.randn(PRODUCT_ROWS, PRODUCT_ROWS, device=device, dtype=kind)
    _ = a @ a
    _wait(device)
    began, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < PRODUCT_S or not count:
        _ = a @ a
        _wait(device)
        count += 1
    return 2 * PRODUCT_ROWS**3 * count / (passed or PRODUCT_S)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _outlined(recipe: Recipe, device: torch.device) -> Run:
    """Make the model as a shape without weights; rows come later. Nothing is downloaded. Raises: UserError."""
    from transformers import AutoModelForCausalLM

    if recipe.model is not None and at_hand(recipe.model) is None:
        if recipe.from_config is None:
            raise UserError(
                f"{recipe.model} is not on this machine, so its shape is not known",
                "from_config=FILE names a config.json of its shape; or fetch the model first",
            )
        recipe = recipe.model_copy(update={"model": None})
    folder, config, schedule, arguments = settled(recipe, Path(), device.type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    shape(Objective.of(recipe), model, schedule)
    if recipe.lora is not None:
        from layerskip.train.job.lora import with_adapters

        model = with_adapters(model, recipe.lora)
    rows = cast("Rows", FullRows(0, recipe.length))
    return Run(recipe, schedule, model, None, folder, arguments, rows, None, set(), None, True, [])


def _with_rows(run: Run, watch: Watch) -> Run:
    """Give an outline the rows of its data, or as many full rows as its steps need. Raises: UserError."""
    recipe, arguments = run.recipe, run.arguments
    if recipe.sources:
        config = run.model.config
        run.train_rows, run.eval_rows = rows_of(recipe, tokenizer_of(run.folder), config, watch, ())
    elif recipe.steps is None:
        raise UserError(
            "neither data nor steps say how long the run is", "data=FILE, or steps=N for rows that are full"
        )
    else:
        batch = recipe.batch_size * arguments.world_size * arguments.gradient_accumulation_steps
        run.train_rows = cast("Rows", FullRows(recipe.steps * batch, recipe.length))
    run.plan = plan_of(run)
    return run


def _timed(run: Run, steps: int, watch: Watch) -> tuple[list[float], int | None]:
    """Make some steps and time them, all but the first; on a GPU read the peak of memory, too."""
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy

    from layerskip.train.trainer import LayerSkipTrainer

    if steps < 1:
        return [], None
    clock = _Clock(steps + WARM_UP, run.arguments.device, watch)
    with tempfile.TemporaryDirectory() as folder:
        given = copy.copy(run.arguments)
        given.output_dir, given.report_to = folder, []
        given.save_strategy, given.load_best_model_at_end = SaveStrategy.NO, False
        given.eval_strategy = given.logging_strategy = IntervalStrategy.NO
        if (adapter := adapter_of(run.model)) is not None:
            adapter.begun = True  # where it starts from decides no time
        objective, rows = Objective.of(run.recipe), run.train_rows
        trainer = LayerSkipTrainer(
            model=run.model,
            args=given,
            train_dataset=rows,
            data_collator=rows.collate,
            callbacks=[clock],
            objective=objective,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    on_gpu = run.arguments.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(run.arguments.device) if on_gpu else None
    return [after - before for before, after in itertools.pairwise(clock.ends)], peak


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Note when each step ends, and stop after `steps`."""

    def __init__(self, steps: int, device: torch.device, watch: Watch) -> None:
        self.steps, self.device, self.watch = steps, device, watch
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        _wait(self.device)
        self.ends.append(time.perf_counter())
        self.watch("timing steps", len(self.ends), self.steps)
        control.should_training_stop = len(self.ends) >= self.steps
        return control


def _gain(recipe: Recipe, run: Run, watch: Watch) -> tuple[dict[str, Any] | None, int | None, str | None]:
    """Predict what drafts will be worth: (prediction, tokens of answers, why there is no prediction)."""
    curve = curve_of(recipe)
    if curve is None:
        return None, None, f"no curve of tokens against agreement was measured for recipes like {recipe.name}"
    if not recipe.sources:
        return None, None, "the curve counts tokens of answers, and there is no data to count them in"
    update = {"loss_on": "completions", "eval_data": None, "hold_out": 0, "best_by": "none"}
    tokenizer = run.tokenizer or tokenizer_of(run.folder)
    rows, _ = rows_of(recipe.model_copy(update=update), tokenizer, run.model.config, watch, run.ends)
    answers = round(rows.num_targets * min(1.0, run.plan["epochs"]))  # tokens read again teach little more
    if not answers:
        return None, 0, "the data have no token of an answer"
    return curve.predicted(answers), answers, None


def _standing(recipe: Recipe) -> Path:
    """Find the folder that is there and will hold the output."""
    folder = (Path() if recipe.output is None else named_path(recipe.output)).absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())
