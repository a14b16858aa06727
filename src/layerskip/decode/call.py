"""One call of `generate`, `stream` or `chat`: options planned once against the model, for all its requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

from layerskip.decode import text as texts
from layerskip.decode.generation import Generation, statistics
from layerskip.decode.request import Request
from layerskip.errors import UserError
from layerskip.model import cost

if TYPE_CHECKING:
    from layerskip.decode.control import Controller
    from layerskip.decode.options import Options, Plan
    from layerskip.decode.request import Round
    from layerskip.model.head import Head


@dataclass(frozen=True)
class Call:
    """What all requests of a call share. `options` have a seed."""

    options: Options
    plan: Plan
    tokenizer: Any
    head: Head | None  # to draft with; None: the full one
    controller: Callable[[], Controller] | None  # of a request
    eos: frozenset[int]  # special tokens among the stop strings included
    stops: tuple[str, ...]  # the other stop strings

    def request(self, prompt: Any, index: int = 0, keep: bool = False) -> Request:
        """Build the engine's request for one prompt. Raises: UserError for one that cannot be read."""
        options, plan, simulated = self.options, self.plan, self.options.simulate_acceptance
        assert options.seed is not None, "the seed is drawn once per call"
        return Request(
            prompt=encoded(self.tokenizer, prompt, options.chat, options.control_tokens),
            max_new_tokens=options.max_new_tokens,
            exit_layer=plan.exit_layer,
            draft_length=plan.draft_length,
            confidence=plan.confidence,
            controller=None if self.controller is None else self.controller(),
            unverified=plan.unverified,
            eos=self.eos,
            processing=options.processing,
            seed=options.seed,
            index=index,
            stop=texts.StopStrings(self.tokenizer, self.stops).push if self.stops else None,
            logprobs=options.logprobs,
            top_logprobs=options.top_logprobs,
            simulated=None if simulated is None else cost.per_token_from(simulated, plan.draft_length),
            keep=keep,
            states=options.states,
        )

    def generation(
        self, rounds: list[Round], prompt_tokens: int, error: Exception | None = None
    ) -> Generation:
        """Sum up the rounds of one sequence."""
        tokens = [token for round in rounds for token in round.tokens]
        text = "" if self.tokenizer is None else texts.final_text(self.tokenizer, tokens, self.options.stops)
        reason = "error" if error is not None else rounds[-1].finish_reason if rounds else None
        stats = statistics(rounds, self.plan, prompt_tokens)
        stats["seed"] = self.options.seed if self.options.temperature else None
        return Generation(text, tokens, reason, rounds, stats, error)


def encoded(tokenizer: Any, prompt: Any, chat: bool | None = None, control_tokens: bool = False) -> list[int]:
    """Turn text, messages or token ids into token ids, see `encode_prompt`. Raises: UserError."""
    if isinstance(prompt, (bytes, bytearray)):
        raise UserError("the prompt is bytes", "give text: prompt.decode()")
    if hasattr(prompt, "tolist"):  # of torch or numpy
        prompt = prompt.tolist()
    if isinstance(prompt, str):
        return texts.encode_prompt(tokenizer, prompt, chat, control_tokens)
    if not isinstance(prompt, Sequence):
        raise UserError(
            f"cannot read a prompt of type {type(prompt).__name__}", "give text, messages or token ids"
        )
    if any(isinstance(one, Mapping) for one in prompt):
        return texts.encode_prompt(tokenizer, prompt, chat, control_tokens)
    strange = [one for one in prompt if type(one) is bool or not isinstance(one, Integral)]
    if strange:
        raise UserError(
            f"the prompt has {strange[0]!r} among its token ids", "token ids are whole numbers, 0 or more"
        )
    return [int(token) for token in prompt]
