"""How training looks: the resolved recipe, the plan, a live table of exits or a line per report, the result."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rich.columns import Columns
from rich.console import Group
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from layerskip.cli.show.terminal import Lines
from layerskip.train.job.export import measured_on
from layerskip.train.job.recipe import changed
from layerskip.watch import silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from layerskip.train.job.recipe import Recipe
    from layerskip.watch import Watch

PREDICT_AFTER = 20  # steps


def print_recipe(console: Console, recipe: Recipe) -> None:
    """Print what differs from the keys' defaults, as a recipe file would have it."""
    told = {key: value for key, value in changed(recipe).items() if key not in ("description", "source")}
    texts = [Text(f"{key}: ", style="dim") + Text(value, style="not dim") for key, value in told.items()]
    console.print(
        Text("recipe", style="bold") + Text("  all other keys are as `layerskip recipes show` prints them")
    )
    console.print(Padding(Columns(texts, column_first=True, padding=(0, 3)), (0, 0, 0, 6)))


def print_plan(console: Console, plan: dict[str, Any], warnings: Sequence[str]) -> None:
    """Print what the run will do, before it does it."""
    n = f"{plan['parameters'] / 1e6:,.1f} M parameters"
    if plan["trainable"] != plan["parameters"]:
        n += f", {plan['trainable'] / 1e6:,.2f} M of them trained"
    epochs = "epoch" if plan["epochs"] == 1 else "epochs"
    resumes = "" if plan["resumes_at"] is None else f", from step {plan['resumes_at']} on"
    devices = f"{plan['devices']} x {plan['device']}" if plan["devices"] > 1 else plan["device"]
    passes = f" ({plan['rows_per_pass']} x {plan['passes']} passes)" if plan["passes"] > 1 else ""
    held_out = f", {plan['held_out']} examples set aside" if plan["held_out"] else ""
    lines = [
        f"{plan['steps']:,} steps of {plan['rows_per_step']} rows{passes}, {plan['epochs']:g} {epochs}, "
        f"{quantity(plan['tokens'])} tokens{resumes}",
        f"{plan['examples']:,} examples in {plan['rows']:,} rows, {100 * plan['learnt_share']:.0f}% of the tokens "
        f"are learned; {plan['eval_rows']:,} rows to evaluate on{held_out}",
        f"{n}, {plan['layers']} layers; exits {', '.join(map(str, plan['exits'])) or 'none'}",
        f"about {plan['memory_bytes'] / 1e9:.1f} GB of memory per device; {devices}",
        f"up to {plan['disk_bytes'] / 1e9:.1f} GB of disk: the model and the checkpoints that stand at once",
    ]
    console.print(Text("plan", style="bold") + Text("  " + "\n      ".join(lines)))
    for warning in warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))


def print_result(console: Console, result: dict[str, Any]) -> None:
    """Print where the model is, or how to go on."""
    if result["interrupted"]:
        go_on = f"layerskip train {result['output']}/recipe.yaml --resume"
        console.print(Text(f"stopped at step {result['steps']}, saved; to go on: {go_on}", style="yellow"))
        return
    console.print(_table(result["exits"], {}))
    if drafts := drafts_told(result):
        console.print(Text(drafts))
    told, speedup = f"measured on {measured_on(result)}", result["predicted_speedup"]
    if speedup is None and len(result["exits"]) == 1:
        pass  # the last layer alone: no exit was trained
    elif speedup is None:
        told += (
            ", so no default exit was chosen. "
            f"layerskip tune {result['output']} --prompts FILE --save measures one; with eval_data=FILE or "
            "hold_out=N the run chooses"
        )
    elif result["exit_layer"] is None:
        told += (
            f": drafting with the exit does not pay yet, {speedup:.2f} x at best by the cost model, so it is no "
            f"default. Train longer{_seen(result)}"
        )
    else:
        head = "" if result["draft_vocab"] is None else f", draft vocabulary {result['draft_vocab']}"
        told += (
            f": default exit layer E = {result['exit_layer']}, draft length K = {result['draft_length']}{head}; "
            f"the cost model predicts {speedup:.2f} x, layerskip bench {result['output']} measures"
        )
    if speedup is not None:
        told += (
            ". It counts the tokens that the draft vocabulary lacks; predictions during the run assume 8,192 that "
            "lack none"
        )
    console.print(Text(told, style="yellow" if result["exit_layer"] is None else "dim"))
    console.print(Text(f"written: {result['output']}", style="bold"))
    console.print(Text("its checkpoints are needed for --resume only and may be deleted", style="dim"))


def _seen(result: dict[str, Any]) -> str:
    tokens = result.get("tokens")
    return (
        ""
        if tokens is None
        else f": this run saw {quantity(tokens)} tokens, that of the built-in model 7.3 M"
    )


def quantity(count: float) -> str:
    """Shorten a count: 1.2 k, 3.4 M, 5.6 B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f} {letter}"
    return f"{count:.0f}"


def duration(seconds: float) -> str:
    """Word a time in its two largest units."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


class Report(TrainerCallback):  # type: ignore[misc]
    """Follow a run on a console: a table that is redrawn on a terminal, else a line per report."""

    def __init__(self, console: Console, live: bool | None = None) -> None:
        self.console = console
        self.live = Live(console=console, auto_refresh=False) if _redraws(console, live) else None
        self.trained: dict[str, dict[str, float]] = {}  # by exit: exits rotate, the last known figure stands
        self.evaluated: dict[str, dict[str, float]] = {}
        self.logs: dict[str, float] = {}
        self.begun: tuple[int, float] | None = None  # step and time from which speed is counted
        self.predicted = self.evaluating = False
        self.batches = 0  # of the evaluation that goes on
        self.lines: Watch = silent if self.live is not None else Lines()  # between reports
        self.lines("preparing to train", 0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.live is not None:
            self.live.start()
        self.lines("training, steps", state.global_step, state.max_steps)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.lines("training, steps", state.global_step, state.max_steps)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loader: Any = kwargs.get("eval_dataloader")
        self.batches = self.batches + 1 if self.evaluating else 1
        self.evaluating = True
        self.lines("evaluating, batches", self.batches, len(loader) if hasattr(loader, "__len__") else 0)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluating = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.begun is None:  # the first step pays for what is set up once
            self.begun = (state.global_step, time.perf_counter())
        steps = state.global_step - self.begun[0]
        if not self.predicted and steps >= PREDICT_AFTER:
            self.predicted = True
            left = duration(self._left(state) or 0.0)
            self.console.print(Text(f"{steps} steps measured: about {left} to go", style="dim"))
        if self.live is not None:
            self._redraw(state)
        self.lines("training, steps", state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = logs or {}
        for key, value in logs.items():
            evaluated, name = key.startswith("eval_"), key.removeprefix("eval_")
            if name.startswith("exit_"):
                number, _, what = name.removeprefix("exit_").partition("_")
                (self.evaluated if evaluated else self.trained).setdefault(number, {})[what] = float(value)
            elif isinstance(value, (int, float)):
                self.logs[key] = value
        if self.live is not None:
            self._redraw(state)
        elif any("exit_" in key for key in logs):
            self.console.print(Text(self._line(state, logs)))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the last table standing; errors come below it."""
        if self.live is not None:
            self.live.stop()

    def _redraw(self, state: Any) -> None:
        assert self.live is not None
        status = Text(self._status(state), style="bold")
        held_out = {
            key.removeprefix("eval_"): value for key, value in self.logs.items() if key.startswith("eval_")
        }
        drafts = drafts_told(held_out)
        if drafts and "predicted_speedup" in held_out:
            drafts += f", {held_out['predicted_speedup']:.2f} x predicted"
        lines = [Text(f"held out: {drafts}")] if drafts else []
        self.live.update(Group(status, _table(self.trained, self.evaluated), *lines), refresh=True)

    def _status(self, state: Any) -> str:
        parts = [f"step {state.global_step}/{state.max_steps}"]
        if "loss" in self.logs:
            parts.append(f"loss {self.logs['loss']:.3f}")
        if "tokens_per_s" in self.logs:
            parts.append(f"{self.logs['tokens_per_s']:,.0f} tokens/s")
        if "dropped" in self.logs:
            parts.append(f"{100 * self.logs['dropped']:.1f}% of the layers' work dropped")
        if (left := self._left(state)) is not None:
            parts.append(f"{duration(left)} left")
        return " · ".join(parts)

    def _line(self, state: Any, logs: dict[str, float]) -> str:
        """Word one report; an exit is told as loss and agreement."""
        evaluated = any(key.startswith("eval_") for key in logs)
        prefix = "eval_exit_" if evaluated else "exit_"
        numbers = [int(key.removeprefix(prefix).removesuffix("_loss")) for key in logs
                   if key.startswith(prefix) and key.endswith("_loss")]  # fmt: skip
        exits = "  ".join(
            f"{k}: {logs[f'{prefix}{k}_loss']:.3f} {100 * logs[f'{prefix}{k}_agreement']:.0f}%"
            for k in sorted(numbers)
        )
        if evaluated:
            speedup = logs.get("eval_predicted_speedup")
            told = "" if speedup is None else f" · {speedup:.2f} x predicted"
            rounds = drafts_told({key.removeprefix("eval_"): value for key, value in logs.items()})
            rounds = f" | {rounds}" if rounds else ""
            return f"step {state.global_step}/{state.max_steps} evaluated{told} | {exits}{rounds}"
        return f"{self._status(state)} | {exits}"

    def _left(self, state: Any) -> float | None:
        if self.begun is None or state.global_step <= self.begun[0]:
            return None
        each = (time.perf_counter() - self.begun[1]) / (state.global_step - self.begun[0])
        return float(each * (state.max_steps - state.global_step))


def drafts_told(figures: dict[str, Any]) -> str:
    """Word what an adapter's drafts are worth; nothing where there is none."""
    if (tokens := figures.get("tokens_per_round")) is None:
        return ""
    shares = (figures.get(f"draft_{i}_agreement") for i in range(1, 9))
    right = " ".join(f"{100 * share:.0f}%" for share in shares if share is not None)
    return f"drafts right {right}, {tokens:.2f} tokens per round"


def _redraws(console: Console, live: bool | None) -> bool:
    return console.is_terminal and not console.quiet if live is None else live


def _table(trained: dict[str, Any], evaluated: dict[str, Any]) -> Table:
    """Lay out the exits' figures, the last layer at the end."""
    table = Table(
        "exit", "loss", "agreement", *(["held out: loss", "agreement"] if evaluated else []), box=None
    )
    for k in sorted({*trained, *evaluated}, key=int):
        sides = [trained.get(k, {}), *([evaluated.get(k, {})] if evaluated else [])]
        cells = [
            "" if value is None else style.format(value)
            for side in sides
            for value, style in ((side.get("loss"), "{:.3f}"), (side.get("agreement"), "{:.1%}"))
        ]
        table.add_row(k, *cells)
    return table
