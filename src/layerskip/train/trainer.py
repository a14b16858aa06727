"""The recipe on Hugging Face's `Trainer`: a mixin for any subclass of it, and `LayerSkipTrainer`.

    args = LayerSkipArguments("out", p_max=0.1, exits=[4, 8], curriculum="rotational", ...)
    LayerSkipTrainer(model=model, args=args, train_dataset=rows, data_collator=collate).train()

Everything else is the `Trainer` one knows. Added: figures of every exit in logs and evaluation, checkpoints that
are whole or absent, a stop at a loss that is not finite, and an interrupt that saves.
"""

from __future__ import annotations

import shutil
import signal
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from layerskip.checkpoint.facts import Facts, entry
from layerskip.errors import UserError, hint_of
from layerskip.train import checkpoints
from layerskip.train.arguments import LayerSkipArguments, LayerSkipFields
from layerskip.train.data.encoding import IGNORED
from layerskip.train.figures import by_exit, of_runs, per_token, predicted, reduced
from layerskip.train.objective.binding import base_model_of, bound
from layerskip.train.objective.exit_adapter import NAME, adapter_of
from layerskip.train.objective.exit_map import as_checkpoint, map_of
from layerskip.train.objective.exits import ExitTraining
from layerskip.train.objective.least_squares import calm, solved
from layerskip.train.objective.objective import Objective
from layerskip.train.supported import (
    refuse_missing_trackers,
    refuse_other_trainers,
    refuse_unsupported,
    set_up_liger,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from layerskip.train.objective.exits import Totals


__all__ = ["LayerSkipArguments", "LayerSkipFields", "LayerSkipMixin", "LayerSkipTrainer"]


class LayerSkipMixin:
    """Give a subclass of `Trainer` the recipe; put it first: `class Mine(LayerSkipMixin, SFTTrainer)`.

    `args` must have the fields of `LayerSkipFields`; an `objective` that is given counts in place of theirs.
    `model` is the one before training, of a resumed run too. `interrupted` tells whether a signal stopped it.
    Raises: UserError when a loss or gradient is not finite, before the step that would use it.
    """

    exits: ExitTraining
    args: Any
    state: Any
    model: Any
    optimizer: Any
    accelerator: Any
    train_dataset: Any
    data_collator: Any

    def __init__(self, *args: Any, objective: Objective | None = None, **kwargs: Any) -> None:
        refuse_other_trainers()
        if (given := kwargs.get("args", args[1] if len(args) > 1 else None)) is not None:
            refuse_missing_trackers(given.report_to)
        super().__init__(*args, **kwargs)
        refuse_unsupported(self)
        options = self.args
        set_up_liger(options)
        if options.device.type == "cpu":
            options.dataloader_pin_memory = False  # there is nothing to pin for, torch would warn
        options.prediction_loss_only = True  # the logits of all exits are never made at once
        objective = Objective.of(options) if objective is None else objective
        if self.optimizer is not None and objective.exit_map and map_of(base_model_of(self.model)) is None:
            raise UserError("the optimizer that was given knows no exit_map", "leave optimizers out")
        schedule = options.schedule(base_model_of(self.model).config.get_text_config().num_hidden_layers)
        place: Any = {"device": options.device, "dtype": torch.bfloat16 if options.bf16 else None}
        given = bound(objective, self.model, schedule, self._rows(), seed=options.seed, **place)
        # Outside of `evaluate` the model gives its logits as ever: no measuring.
        self.exits = ExitTraining(
            self.model, schedule, given, options.seed, options.world_size > 1, measuring=False
        )
        self.exits.attach()
        self.interrupted = False
        self.wants_to_stop = False  # this rank was told to; `interrupted` is what all ranks agreed on
        self._micro = (-1, 0)  # optimiser step, parts of its batch already seen
        self._tokens = 0  # up to the last log
        self._saving: Path | None = None
        self._logged_s = time.perf_counter()
        self._interrupts = _Interrupts(self)
        self.add_callback(self._interrupts)  # type: ignore[attr-defined]

    def begin_run(self) -> None:
        """Take up what the state of a resumed run tells."""
        self.state.best_model_checkpoint = checkpoints.best(self.state, Path(self.args.output_dir))
        self._tokens = next((e["tokens"] for e in reversed(self.state.log_history) if "tokens" in e), 0)

    def _rows(self) -> _Rows | None:
        """Training data by number, each row as a batch of its own; None where they have no length."""
        if not hasattr(self.train_dataset, "__len__"):
            return None
        collate = self._get_collator_with_removed_columns(self.data_collator, "training")  # type: ignore[attr-defined]
        return _Rows(self.train_dataset, collate)

    def _claim(self) -> None:
        """Take the model back from a later trainer of it."""
        if not self.exits.attached:
            self.exits.attach()

    # -- a step ------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        step, options = self.state.global_step, self.args
        micro = self._micro[1] + 1 if self._micro[0] == step else 0
        self._micro = (step, micro)
        part = micro * options.world_size + options.process_index
        self.exits.begin(step, self.state.max_steps, part * options.per_device_train_batch_size)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # Trainer's own, whatever subclass this is mixed into: others look at logits, which are never whole here.
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Refuse what is not finite, on all ranks alike; note a wish to stop; then go on as Trainer does."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        ce = self.exits.totals.ce
        losses = torch.stack([ce[k] for k in sorted(ce)]).isfinite().logical_not().float()
        scaled = getattr(self.accelerator, "scaler", None) is not None  # its first steps overflow by design
        value = torch.as_tensor(0.0 if norm is None or scaled else float(norm), device=losses.device)
        stop = torch.full_like(value, float(self.wants_to_stop))
        flags = torch.cat([losses, torch.stack([value.isfinite().logical_not().float(), stop])])
        if self.args.world_size > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        *bad_losses, bad_gradient, stopping = flags.tolist()
        self.interrupted = bool(stopping)
        if any(bad_losses) or bad_gradient:
            self._refuse([k for k, bad in zip(sorted(ce), bad_losses, strict=True) if bad])
        if self.exits.dropout.kept is not None:
            # A layer that all rows skipped: as if its gradient were zero.
            for parameter in self.model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return norm

    def _refuse(self, exits: list[int]) -> None:
        last = self.exits.schedule.num_layers
        names = ["the final layer" if k == last else f"exit {k}" for k in exits]
        what = f"the loss of {', '.join(names)}" if names else "the gradient"
        kept = checkpoints.latest(Path(self.args.output_dir))
        raise UserError(
            f"{what} is not finite at step {self.state.global_step}; training stopped before using it",
            (f"the last good checkpoint is {kept}; " if kept else "no checkpoint had been saved yet; ")
            + "lower learning_rate or e_scale, or train in float32 or bfloat16, and look at the data",
        )

    # -- figures -----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.exits.totals.tokens:
            logs.update(self._figures(self.exits.drain()))
        super().log(logs, start_time)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._claim()
        began = time.perf_counter()
        with self.exits.measurement() as totals:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
        self._logged_s += time.perf_counter() - began  # not a part of training's tokens per second
        summed = reduced(totals, self.args.world_size) if totals.ce else totals
        if not any(summed.tokens.values()):  # nothing had labels, or all were ignored
            return output
        figures = by_exit(summed)
        last = self.exits.schedule.num_layers
        figures["loss"] = figures[f"exit_{last}_loss"]  # Trainer's own averages batches, not tokens
        agreement = {k: figures[f"exit_{k}_agreement"] for k in self.exits.eval_exits}
        if len(agreement) == 1 and (drafts := of_runs(summed, *agreement)):
            figures |= drafts
            agreement = dict.fromkeys(agreement, per_token(drafts["tokens_per_round"]))
        best = predicted(self.exits, agreement)
        if best is not None:
            figures["predicted_speedup"] = best.speedup
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Take the labels from rows that only fill up the last batch of all ranks: they were measured already."""
        loader, options = self.accelerator.gradient_state, self.args
        if (
            options.world_size > 1
            and loader.end_of_dataloader
            and loader.remainder > 0
            and "labels" in inputs
        ):
            labels = inputs["labels"].clone()
            labels[max(0, loader.remainder - options.process_index * len(labels)) :] = IGNORED
            inputs = {**inputs, "labels": labels}
        return super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def _figures(self, totals: Totals) -> dict[str, float]:
        totals = reduced(totals, self.args.world_size)
        now = time.perf_counter()
        seconds, self._logged_s = now - self._logged_s, now
        figures = by_exit(totals)
        figures["dropped"] = totals.dropped / max(1, totals.layer_rows)
        figures["tokens_per_s"] = totals.seen / seconds
        self._tokens += totals.seen
        figures["tokens"] = self._tokens
        return figures

    # -- checkpoints -------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as Trainer does. Raises: UserError with nothing to resume from, or where a loss is not finite."""
        if resume_from_checkpoint is True:
            found = checkpoints.latest(Path(self.args.output_dir))
            if found is None:
                raise UserError(
                    f"no checkpoint to resume from in {self.args.output_dir}", "start without resume"
                )
            resume_from_checkpoint = str(found)
        self._claim()
        if trained := self.exits.schedule.trained:  # every folder saved from here on tells them
            self.exits.hf.config.layerskip = entry(Facts(trained))
        self._logged_s, self._micro = time.perf_counter(), (-1, 0)
        self.exits.drain()  # sums of a run that was refused would be refused again
        self._begin_adapter(bool(resume_from_checkpoint))
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._interrupts.restore()

    def _begin_adapter(self, resumed: bool) -> None:
        """Let a new adapter start as the best linear one on some rows of the data."""
        adapter = adapter_of(self.exits.hf)
        if adapter is None or adapter.begun:
            return
        adapter.begun = True
        rows = None if resumed else self._rows()
        if rows is None:
            return
        with self.compute_loss_context_manager():  # type: ignore[attr-defined]
            weight = solved(self.exits, rows, self.args.seed)
        if weight is not None:
            adapter.join.weight.data.copy_(weight)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, or Muon; calmer for an adapter before a strong head, see `least_squares.calm`.

        Raises: UserError where Muon has more to step than matrices.
        """
        made = self.optimizer is None
        learnt = [p for p in self.exits.hf.parameters() if p.requires_grad]
        if made and self.args.optimizer == "muon":
            if self.exits.bound.objective.freeze != "model" or any(p.ndim != 2 for p in learnt):
                raise UserError(
                    "Muon steps matrices between layers alone, and more is learnt here", "optimizer=adamw"
                )
            rate, decay = self.args.learning_rate, self.args.weight_decay
            self.optimizer = torch.optim.Muon(
                learnt, lr=rate, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            )
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if made:
            calm(self.exits, self.optimizer)
        return optimizer

    def _get_output_dir(self, trial: Any) -> str:
        if self._saving is not None:
            return str(self._saving)
        folder: str = super()._get_output_dir(trial)  # type: ignore[misc]
        return folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write aside and rename: a kill or a full disk leaves the previous checkpoint as it was."""
        run, options = Path(self._get_output_dir(trial)), self.args
        staging, name = run / checkpoints.STAGING, f"checkpoint-{self.state.global_step}"
        if self.exits.totals.seen:  # of steps since the last log, which a resumed run does not make again
            seen = torch.tensor(self.exits.totals.seen, device=options.device)
            if options.world_size > 1:
                dist.all_reduce(seen)
            told = {"tokens": self._tokens + int(seen), "step": self.state.global_step}
            self.state.log_history.append(told)
        try:
            if options.should_save:
                checkpoints.clear_staging(run)
            self.accelerator.wait_for_everyone()
            self._saving = staging
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            self._saving = None
            if (best := self.state.best_global_step) and (best == self.state.global_step):
                self.state.best_model_checkpoint = str(run / name)
            self.accelerator.wait_for_everyone()
            if options.should_save:
                self.state.save_to_json(str(staging / name / "trainer_state.json"))
                checkpoints.publish(staging / name, run / name)
                staging.rmdir()
                rotate_checkpoints(
                    output_dir=str(run),
                    save_total_limit=options.save_total_limit,
                    best_model_checkpoint=self.state.best_model_checkpoint,
                    use_mtime=True,
                )
        except Exception as error:
            if not checkpoints.disk_error(error):
                raise
            shutil.rmtree(staging, ignore_errors=True)  # half a checkpoint need not fill the disk
            raise UserError(
                f"cannot save a checkpoint into {run}: {error}",
                hint_of(error, "copy the folder to a larger or writable place")
                + "; then resume: earlier checkpoints are untouched",
            ) from error
        finally:
            self._saving = None
        self.accelerator.wait_for_everyone()
        if options.push_to_hub:
            self._push_from_checkpoint(str(run / name))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As Trainer's; a checkpoint of a run that trains an adapter holds the adapter alone."""
        if self._saving is not None and (adapter := adapter_of(self.exits.hf)) is not None:
            state_dict = {f"{NAME}.{key}": value for key, value in adapter.state_dict().items()}
        super()._save(output_dir, state_dict)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's; with exit_vocab the folder gets a draft head, into which the map of the exit goes."""
        exits, folder = self.exits, Path(output_dir or self.args.output_dir)
        ready: AbstractContextManager[None] = nullcontext()
        extended = exits.bound.vocabulary is not None or adapter_of(exits.hf) is not None
        if extended and self._saving is None and self.args.should_save:
            if exits.hf is self.model and not self.is_fsdp_enabled:  # type: ignore[attr-defined]
                ready = as_checkpoint(exits.hf, folder, Facts(exits.schedule.trained), exits.bound.vocabulary)
            else:
                warnings.warn(
                    f"{folder} gets no draft head, adapters and sharded models are saved as they are: "
                    "docs/training.md says how to save them whole",
                    stacklevel=2,
                )
        with ready:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        limit = self.args.save_total_limit
        if self.interrupted and limit == 1:  # Trainer keeps the best alone then, there is still more to train
            self.args.save_total_limit = 2
        try:
            return super()._finalize_training(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.args.save_total_limit = limit

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._saving is None:  # not while it is written aside
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]


class LayerSkipTrainer(LayerSkipMixin, Trainer):
    """Hugging Face's `Trainer` with layer dropout and early-exit loss."""


class _Rows(Sequence[Any]):
    def __init__(self, dataset: Any, collate: Callable[[list[Any]], dict[str, Tensor]]) -> None:
        self.dataset, self.collate = dataset, collate

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: Any) -> Any:
        if not row < len(self):
            raise IndexError(row)
        return self.collate([self.dataset[row]])


class _Interrupts(TrainerCallback):
    """Turn the first SIGINT or SIGTERM into: finish the step, save, stop. The second one acts as usual."""

    def __init__(self, trainer: LayerSkipMixin) -> None:
        self.trainer = trainer
        self.handlers: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.interrupted = self.trainer.wants_to_stop = False
        self.trainer.begin_run()
        self.restore()  # a run that starts over with smaller batches begins twice
        if threading.current_thread() is threading.main_thread():
            self.handlers = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: Any) -> None:
        self.trainer.wants_to_stop = True
        self.restore()

    def restore(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.trainer.interrupted:
            control.should_save = control.should_training_stop = True
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True  # what came after the last report, all of it in a short run
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()
