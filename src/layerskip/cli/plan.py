"""The verb plan: what a training run will take and give, before it is started."""

from __future__ import annotations

from typing import Annotated, Any

from rich.text import Text

from layerskip.cli.app import AsJson, verb
from layerskip.cli.recipes import Name, Settings
from layerskip.cli.results import progress
from layerskip.cli.search import seconds
from layerskip.cli.show.terminal import loudness, out, tell
from layerskip.option import Option


@verb
def plan(
    recipe: Name,
    settings: Settings = None,
    device: Annotated[str, Option("Device to plan for: auto, cpu, cuda.")] = "auto",
    budget: Annotated[str, Option("How long the run may take here, such as 8h or 2d.")] = "24h",
    timed_steps: Annotated[int, Option("Steps to make and time; 0 derives the time.", least=0)] = 4,
    as_json: AsJson = False,
) -> None:
    """Say what a run takes and gives before it is started: tokens, hours, memory, disk, tokens per round.

    layerskip plan exit-adapter model=./your-model data=own.jsonl
    """
    from layerskip.train.job.recipe import read_recipe

    given, hours = read_recipe(recipe, settings or []), seconds(budget) / 3600
    with progress("loading") as watch:
        import torch
        from transformers.utils import logging

        from layerskip.decode.load import resolve_device
        from layerskip.model.threads import chosen_threads
        from layerskip.train.job.forecast import forecast, launch

        logging.disable_progress_bar()
        if not loudness.verbose:
            logging.set_verbosity_error()
        torch.set_num_threads(chosen_threads())
        told = forecast(given, resolve_device(device), hours, timed_steps, watch)
    told["command"] = None if told["gpus"] is None else launch(recipe, settings or [], told["gpus"])
    tell(told, as_json, _show)


def _show(told: dict[str, Any]) -> None:
    from layerskip.cli.show.training import duration, quantity

    low, high = (duration(3600 * end) for end in told["hours"]["ci95"])
    how = (
        f"{len(told['step_s'])} steps timed here"
        if told["step_s"]
        else "derived from shapes and the speed of one product"
    )
    lines = {
        "tokens": f"{quantity(told['tokens'])} in {told['steps']:,} optimizer steps; "
        f"{quantity(told['parameters'])} parameters, {quantity(told['trainable'])} of them trained",
        "time": f"{duration(3600 * told['hours']['middle'])} [{low}, {high}] on {told['device']}, {how}",
        "memory": _beside(told["memory_bytes"], told["memory_free_bytes"]),
        "disk": _beside(told["disk_bytes"], told["disk_free_bytes"]) + "; checkpoints, states and the model",
        "gain": _gain(told),
        "here": "it fits" if told["fits"] else "it does not fit: " + "; ".join(told["reasons"]),
    }
    if told["command"] is not None:
        lines["fleet"] = f"{told['gpus']} GPUs, each of 80 GB and 400 TFLOP/s in training: {told['command']}"
    elif not told["fits"]:
        lines["fleet"] = (
            "no fleet of up to 1,024 GPUs of 80 GB does it in time: fewer rows, or a longer --budget"
        )
    for name, text in lines.items():
        out.print(Text(f"{name:<8}", style="bold") + Text(text), soft_wrap=name == "fleet")
    for note in told["notes"]:
        out.print(Text(f"note: {note}", style="yellow"))


def _beside(needed: int, free: int | None) -> str:
    here = "" if free is None else f", {free / 1e9:,.1f} GB are free here"
    return f"about {needed / 1e9:,.1f} GB{here}"


def _gain(told: dict[str, Any]) -> str:
    if (found := told["prediction"]) is None:
        return f"not predicted: {told['no_prediction']}"
    first, rounds = found["agreement"], found["tokens_per_round"]
    from layerskip.cli.show.training import quantity

    text = (
        f"first draft right for {100 * first['middle']:.0f}% "
        f"[{100 * first['ci95'][0]:.0f}, {100 * first['ci95'][1]:.0f}], {rounds['middle']:.2f} "
        f"[{rounds['ci95'][0]:.2f}, {rounds['ci95'][1]:.2f}] tokens per round of {found['draft_length']} drafts, "
        f"95% intervals, from {quantity(told['answer_tokens'])} tokens of answers"
    )
    if found["extrapolated"]:
        ends = f"{quantity(found['measured_from'])} to {quantity(found['measured_to'])}"
        text += f"; an extrapolation, measured were {ends}"
    return f"{text} ({found['source']})"
