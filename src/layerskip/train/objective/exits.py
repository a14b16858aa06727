"""Teach a Hugging Face model's exits: attach the recipe to the model, so that its own `forward` gives the loss.

    exits = ExitTraining(model, Schedule(30, exits=(4, 8)))
    with exits:
        exits.begin(step, total)
        model(input_ids=..., labels=...).loss.backward()

What is taught beside the schedule, and what stays as it is, says an `Objective`; see `binding.bound`.
The loss is computed inside the model's forward, so that whatever wraps it (DDP, FSDP, PEFT, autocast, activation
checkpointing) sees one forward and one backward. When the last layer alone has a weight, the model's own loss is
used unchanged.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from layerskip.errors import UserError
from layerskip.model.families import parts_of, refuse_architecture
from layerskip.train.data.encoding import IGNORED
from layerskip.train.objective.anchor import live_tokens
from layerskip.train.objective.binding import base_model_of, bound, check_logits
from layerskip.train.objective.dropout import LayerDropout, keep_masks, sliced
from layerskip.train.objective.exit_adapter import adapter_loss, adapter_of, frozen_states
from layerskip.train.objective.exit_map import map_of
from layerskip.train.objective.loss import Sums, multi_exit_loss
from layerskip.train.objective.objective import Objective

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from torch import Tensor

    from layerskip.train.objective.binding import Bound
    from layerskip.train.objective.schedule import Schedule
    from layerskip.train.objective.store import AnswerStates, StateStore


@dataclass
class Totals:
    """Sums since the last look, on the model's device: reading them waits for it."""

    ce: dict[int, Tensor] = field(default_factory=dict)
    kl: dict[int, Tensor] = field(default_factory=dict)
    agreement: dict[int, Tensor] = field(default_factory=dict)
    runs: Tensor | int = 0  # rounds whose first i drafts are right, [drafts]: of an adapter, in evaluation
    tokens: dict[int, int] = field(default_factory=dict)  # with a loss, by exit: exits rotate
    layer_rows: int = 0  # rows times layers that a plain pass would have run
    dropped: int = 0  # of these, not run
    seen: int = 0  # tokens read, with and without a loss, padding among them

    def add(self, sums: Sums) -> None:
        """Add the sums of one call; they stay on the device."""
        for place, k in enumerate(sums.exits):
            for total, part in ((self.ce, sums.ce), (self.kl, sums.kl), (self.agreement, sums.agreement)):
                total[k] = total[k] + part[place] if k in total else part[place]
            self.tokens[k] = self.tokens.get(k, 0) + sums.tokens


class ExitTraining:
    """A model with its recipe attached. `begin` tells it where in the run it stands; `totals` what came out.

    Give the model with its adapters, if any. An objective that needs rows of the data comes bound, see `bound`.
    `eval_exits` (default: the trained ones) are measured in evaluation mode with labels; not `measuring`, that is
    the model's own. `distributed` keeps ranks alike, see `LayerDropout`. `seed` addresses the dropout masks.
    Raises: UserError where the model's logits are not head(final norm(x)) by our table of families.
    """

    def __init__(
        self,
        hf: Any,
        schedule: Schedule,
        objective: Objective | Bound | None = None,
        seed: int = 0,
        distributed: bool = False,
        eval_exits: tuple[int, ...] | None = None,
        measuring: bool = True,
    ) -> None:
        # A router's loss, an encoder: what is not seen here would be left out silently.
        model, hf = hf, base_model_of(hf)
        refuse_architecture(hf)
        config = hf.config.get_text_config()
        self.hf, self.schedule, self.seed = hf, schedule, seed
        _, layers, _, self.finish = parts_of(hf)
        if len(layers) != schedule.num_layers:
            raise UserError(f"the schedule is for {schedule.num_layers} layers, the model has {len(layers)}")
        self.layers, self.head = layers, hf.get_output_embeddings()
        if type(self.head) is not torch.nn.Linear:
            raise UserError(
                f"the head is a {type(self.head).__name__}, exits need a plain linear one",
                "leave the head out of what LoRA or quantisation replace",
            )
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.eval_exits = schedule.trained if eval_exits is None else eval_exits
        if objective is None or isinstance(objective, Objective):
            objective = bound(objective or Objective(), model, schedule)
        self.bound: Bound = objective
        ids = objective.vocabulary
        self._ids = None if ids is None else torch.tensor(sorted(ids))
        self._place_of: Tensor | None = None  # token id -> its place among them, [V]; -1 where it has none
        if self._ids is not None:
            self._place_of = torch.full((self.head.weight.shape[0],), -1)
            self._place_of[self._ids] = torch.arange(len(self._ids))
        self.dropout = LayerDropout(layers, objective.objective.residual_scale, distributed)
        self.totals = Totals()
        self.measuring = measuring
        self.store: StateStore | None = None  # of the states that an adapter learns from
        self.answers: AnswerStates | None = None  # those that came with the data
        self.step, self.total, self.first_row = 0, 1, 0
        self._whole: list[bool] | None = None  # rows of this pass that go through all layers; None: every one
        self._wanted: set[int] = set()
        self._caught: dict[int, Tensor] = {}
        self._hooks: list[Any] = []
        self._replaced: Any = None
        self._eager: dict[Any, Any] = {}

    @property
    def attached(self) -> bool:
        return bool(self._hooks)

    def attach(self) -> None:
        """Put the recipe into the model's forward, in place of another one there; no parameter is renamed.

        Raises: UserError where the model's logits are not head(final norm(x)).
        """
        if (other := getattr(self.hf.forward, "exit_training", None)) is not None:
            other.detach()  # a second trainer of the same model must not train through the first
        check_logits(self.hf, self.finish, self.softcap)
        self.dropout.attach()
        # What changes from step to step (exits, rows, tokens with a label) is kept from a compiler, layers are not.
        disable: Any = torch.compiler.disable
        self._eager = {
            f: disable(f)
            for f in (
                self._catch,
                self._catch_embedded,
                self._prepare,
                self._note,
                self._loss,
                self._referred,
                self._drafted,
            )
        }
        for k, layer in enumerate(self.layers, 1):
            hook = functools.partial(self._eager[self._catch], k)
            self._hooks.append(layer.register_forward_hook(hook))
        embedded = self._eager[self._catch_embedded]
        self._hooks.append(self.layers[0].register_forward_pre_hook(embedded, with_kwargs=True))
        self._replaced = self.hf.__dict__.get("forward")
        original, inner = self.hf.forward, disable(self._forward, recursive=False)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return inner(original, *args, **kwargs)

        self.hf.forward = disable(forward, recursive=False)
        self.hf.forward.exit_training = self

    def detach(self) -> None:
        """Leave the model as it was; again does nothing."""
        if not self.attached:
            return
        self.dropout.detach()
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._eager = [], {}
        if self._replaced is None:
            del self.hf.forward
        else:
            self.hf.forward = self._replaced

    def __enter__(self) -> ExitTraining:
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def begin(self, step: int, total: int, first_row: int = 0) -> None:
        """Say which optimiser step comes, and which row of its global batch is the first of the next call."""
        self.step, self.total, self.first_row = step, total, first_row

    def keep(self, store: StateStore | None, answers: AnswerStates | None = None) -> None:
        """Keep the states that an adapter learns from, or read those that came with the data."""
        self.store, self.answers = store, answers

    def drain(self) -> Totals:
        """Hand over the totals and start new ones."""
        done, self.totals = self.totals, Totals()
        return done

    @contextmanager
    def measurement(self) -> Iterator[Totals]:
        """Measure the exits in evaluation mode, into totals of their own; those of training go on afterwards."""
        of_training = self.measuring, self.totals
        self.measuring, self.totals = True, Totals()
        try:
            yield self.totals
        finally:
            self.measuring, self.totals = of_training

    # -- inside the model's forward ----------------------------------------------------------------------------

    def _catch(self, k: int, layer: Any, args: Any, out: Any) -> None:
        if k in self._wanted:
            self._caught[k] = out[0] if isinstance(out, tuple) else out

    def _catch_embedded(self, layer: Any, args: Any, kwargs: Any) -> None:
        if 0 in self._wanted:
            self._caught[0] = args[0] if args else kwargs["hidden_states"]

    def _forward(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        hf = self.hf
        labels = kwargs.get("labels")
        if args:  # by position: input ids first, in every causal model
            if len(args) > 1:
                raise TypeError(
                    "a model whose exits are trained takes input_ids alone by position, the rest by name"
                )
            kwargs = {**kwargs, "input_ids": args[0]}
        if labels is None or not (hf.training or self.measuring):
            self.dropout.set([], None, hf.device)
            return original(**kwargs)
        given = kwargs.get("input_ids")
        tokens: Tensor = kwargs["inputs_embeds"] if given is None else given
        last = self.schedule.num_layers
        weights = self._eager[self._prepare](tokens)
        exits = {*weights} if hf.training else {*self.eval_exits, last}
        if exits == {last} and hf.training and self.bound.reference is None:
            # The model's own loss; a cache would hide from transformers that rows are packed.
            out = original(**{"use_cache": False, **kwargs})
            self._eager[self._note](out.loss.detach(), labels, kwargs.get("num_items_in_batch"))
            return out
        divisor = kwargs.pop("num_items_in_batch", None)
        without = ("labels", "use_cache", "logits_to_keep", "skip_logits")  # the last one is Liger's
        rest = {k: v for k, v in kwargs.items() if k not in without}
        reference = (
            self._eager[self._referred](rest, tokens)
            if hf.training and self.bound.reference is not None
            else None
        )
        unmoved = self.bound.anchor.unmoved(**rest) if hf.training and self.bound.anchor is not None else None
        positions, rows = rest.get("position_ids"), rest.pop("rows", None)
        if adapter_of(hf) is not None:
            return self._eager[self._drafted](rest, rows, labels, divisor)
        final, caught = self.states_of(rest, exits - {last})
        return self._eager[self._loss](final, caught, labels, weights, divisor, reference, unmoved, positions)

    @torch.no_grad()
    def _referred(self, inputs: dict[str, Any], tokens: Tensor) -> Tensor:
        """What the model said before training of the rows that go through all layers; other rows hold anything."""
        assert self.bound.reference is not None
        kept, self.dropout.kept = self.dropout.kept, None
        try:
            if self._whole is None:
                return self.bound.reference(**inputs)
            chosen = [row for row, whole in enumerate(self._whole) if whole]
            if not chosen and not self.dropout.distributed:
                return tokens.new_empty(0)
            rows = torch.tensor(chosen or [0], device=tokens.device)  # every rank calls sharded layers
            part = self.bound.reference(**sliced(inputs, rows, len(self._whole)))
            return part.new_zeros(len(self._whole), *part.shape[1:]).index_copy(0, rows, part)
        finally:
            self.dropout.kept = kept

    def _prepare(self, tokens: Tensor) -> dict[int, float]:
        """Draw who is dropped in this pass; return the weights of the exits."""
        rows, last = tokens.shape[0], self.schedule.num_layers
        self._whole = None
        if not self.hf.training:
            return {last: 1.0}
        rates = self.schedule.drop_rates(self.step, self.total)
        kept = keep_masks(rates, self.seed, self.step, self.first_row, rows) if any(rates) else None
        weights = self.schedule.weights(self.step, self.total)
        deepest = max((k for k in weights if k < last), default=last)
        if self.schedule.last_every > 1 and deepest < last:
            self._whole = self.schedule.whole(self.step, self.first_row, rows)
            kept = np.ones((last, rows), dtype=np.bool_) if kept is None else kept
            kept[deepest:] &= self._whole
        self.dropout.set(rates, kept, tokens.device)
        self.totals.layer_rows += last * rows
        self.totals.dropped += 0 if kept is None else last * rows - int(kept.sum())
        self.totals.seen += rows * tokens.shape[1]
        return weights

    def _note(self, loss: Tensor, labels: Tensor, divisor: Tensor | int | None) -> None:
        """Add a loss that the model worked out itself to the totals."""
        tokens = int((labels[:, 1:] != IGNORED).sum())
        ce = loss.float() * (tokens if divisor is None else divisor)
        zero, agreed = torch.zeros_like(ce)[None], torch.full_like(ce, tokens)[None]
        self.totals.add(Sums((self.schedule.num_layers,), ce[None], zero, agreed, tokens))

    def _loss(
        self,
        final: Tensor,
        caught: dict[int, Tensor],
        labels: Tensor,
        weights: dict[int, float],
        divisor: Tensor | int | None,
        reference: Tensor | None,
        unmoved: Tensor | None,
        positions: Tensor | None,
    ) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        wanted, last = labels[:, 1:].reshape(-1), self.schedule.num_layers
        learnt, short, price = wanted != IGNORED, None, None
        count = learnt.sum().clamp_min(1) if divisor is None else divisor
        if unmoved is not None or self._whole is not None:  # the loss has parts: one divisor for all
            divisor = count
        if unmoved is not None and self.bound.anchor is not None:  # in place of the last layer's loss
            now, live = caught[max(caught)], live_tokens(labels, positions)
            price = weights[last] * self.bound.anchor.price(unmoved, now, live) / count
            weights, final = {**weights, last: 0.0}, final.detach()
        if self._whole is not None:
            whole = torch.tensor(self._whole, device=labels.device).repeat_interleave(labels.shape[1] - 1)
            # As often as the last layer is left out it counts for more: the expected loss is the whole one.
            weights = {k: w * (self.schedule.last_every if k == last else 1) for k, w in weights.items()}
            short, learnt = learnt & ~whole, learnt & whole
        places = learnt.nonzero()[:, 0]  # the one wait for the device of a call
        states = {last: _picked(final, places)}
        for k in sorted(caught, reverse=True):
            states[k] = self.read(_picked(caught[k], places))
        given: dict[str, Any] = {
            "softcap": self.softcap,
            "exit_loss": self.bound.objective.exit_loss,
            "divisor": divisor,
        }
        known = None if reference is None or not len(places) else _picked(reference, places)
        loss, sums = multi_exit_loss(
            states, wanted[places], weights, self.head.weight, self.head.bias, **given, reference=known
        )
        self.totals.add(sums)  # figures are those of whole rows: there is a last layer to agree with
        if short is not None:
            loss = loss + self._short(short, caught, wanted, weights, given)
        return CausalLMOutputWithPast(loss=loss if price is None else loss + price)

    def _short(
        self, learnt: Tensor, caught: dict[int, Tensor], wanted: Tensor, weights: dict[int, float], given: Any
    ) -> Tensor:
        """Loss of the early exits over rows that end at the deepest of them: [B * (T - 1)] of them are learnt."""
        head, bias, wanted = self.draft_head(wanted)
        places = (learnt & (wanted >= 0)).nonzero()[:, 0]
        states = {k: self.read(_picked(state, places)) for k, state in caught.items()}
        return multi_exit_loss(states, wanted[places], weights, head, bias, **given)[0]

    def _drafted(
        self, inputs: dict[str, Any], rows: Tensor | None, labels: Tensor, divisor: Tensor | int | None
    ) -> Any:
        """Loss of the drafts that an adapter makes of a model that is not trained."""
        from transformers.modeling_outputs import CausalLMOutputWithPast

        states = frozen_states(self, inputs, rows)
        loss, sums, runs = adapter_loss(self, *states, labels, divisor, inputs.get("position_ids"))
        self.totals.add(sums)
        self.totals.runs = self.totals.runs + runs
        return CausalLMOutputWithPast(loss=loss)

    def states_of(self, inputs: dict[str, Any], wanted: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the model: its state behind the final norm, and those after the wanted exits, [B, T, D] each."""
        self._wanted, self._caught = wanted, {}
        try:
            return self.hf.base_model(**inputs, use_cache=False).last_hidden_state, self._caught
        finally:
            self._wanted, self._caught = set(), {}

    def draft_head(self, wanted: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Rows and bias of the head that exit_vocab leaves, and labels by their place in it, -1 for none."""
        head, bias = self.head.weight, self.head.bias
        if self._place_of is None or self._ids is None:
            return head, bias, wanted
        self._ids, self._place_of = self._ids.to(wanted.device), self._place_of.to(wanted.device)
        placed = self._place_of[wanted.clamp_min(0)].masked_fill(wanted < 0, -1)
        return head[self._ids], None if bias is None else bias[self._ids], placed

    def token_of(self, places: Tensor) -> Tensor:
        """Say which tokens stand at places of the draft head."""
        return places if self._ids is None else self._ids.to(places.device)[places]

    def read(self, x: Tensor) -> Tensor:
        """What the head reads at an early exit."""
        for module in self.finish:
            x = module(x)
        learnt = map_of(self.hf)
        return x if learnt is None else learnt(x)


def _picked(hidden: Tensor, places: Tensor) -> Tensor:
    """States that predict a token with a label: [N, D] from [B, T, D]; the last of a row predicts nothing."""
    return hidden[:, :-1].reshape(-1, hidden.shape[-1]).index_select(0, places)
