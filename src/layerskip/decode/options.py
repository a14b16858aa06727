"""What a caller may set for a generation, checked and resolved against the model."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from layerskip.checkpoint.facts import POLICIES
from layerskip.decode.sampling import Processing, Sampling
from layerskip.errors import UserError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from layerskip.checkpoint.facts import Facts

MODES = ("ar", "early-exit", "self-speculative")
_UNSET = ("exit_layer", "draft_length", "seed", "simulate_acceptance", "confidence")  # may be None
DEFAULT_CONFIDENCE = (
    0.4  # as in Hugging Face's assisted generation; `layerskip tune` finds a checkpoint's own
)
DEFAULT_DRAFT_LENGTH = 4  # short drafts lose little on untrained exits and fit most trained ones


@dataclass(frozen=True)
class Options:
    """Options of `generate`, `stream` and `chat`; names are those of Hugging Face where it has one."""

    # None: self-speculative when the checkpoint has a default exit, or an exit or policy is given; else ar.
    mode: str | None = None
    exit_layer: int | None = None  # E; None: the checkpoint's default, else a quarter of the layers
    draft_length: int | None = None  # K; None: the checkpoint's default, else 4
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logits_processor: Sequence[Any] = ()
    seed: int | None = None  # None: drawn from torch's global generator
    stop: str | Sequence[str] = ()
    chat: bool | None = None  # wrap a text prompt as a user message; None: only lists of messages
    draft_vocab: int | str = "auto"  # size of the reduced draft head; auto: the checkpoint's list, else off
    policy: str | None = None  # fixed, confidence or adaptive; None: the checkpoint's, else fixed
    confidence: float | None = None  # stop drafting where the exit's largest probability is below
    guard: bool | None = None  # plain steps while they are faster; None: unless the policy is fixed
    eos_token_id: int | Sequence[int] | None = None  # None: all ids of the generation config
    logprobs: bool = False
    simulate_acceptance: float | None = None  # accepted/drafted to pretend: for timing only, not the output
    batch_size: int = 8  # rows decoded together when several prompts are given

    @classmethod
    def parse(cls, keywords: dict[str, Any]) -> Options:
        """Check names and values. Raises: UserError with the nearest name for an unknown one."""
        known = [field.name for field in fields(cls)]
        for name in keywords:
            if name not in known:
                raise UserError(f"unknown option {name!r}", nearest(name, known))
        options = cls(**keywords)
        if options.mode is not None and options.mode not in MODES:
            raise UserError(f"unknown mode {options.mode!r}", nearest(options.mode, MODES))
        if options.policy is not None and options.policy not in POLICIES:
            raise UserError(f"unknown policy {options.policy!r}", nearest(options.policy, POLICIES))
        options._check_types()
        options._check_policy()
        if options.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {options.max_new_tokens}", "ask for at least one new token")
        if options.batch_size < 1:
            raise UserError(f"batch_size is {options.batch_size}", "it must be at least 1")
        if not (options.draft_vocab in ("auto", "off") or type(options.draft_vocab) is int):
            raise UserError(f"draft_vocab is {options.draft_vocab!r}", "give a number of tokens, auto or off")
        if options.simulate_acceptance is not None and not 0 <= options.simulate_acceptance <= 1:
            raise UserError(
                f"simulate_acceptance is {options.simulate_acceptance}", "accepted/drafted is from 0 to 1"
            )
        return options

    def _check_types(self) -> None:
        whole = ("exit_layer", "draft_length", "max_new_tokens", "top_k", "seed", "batch_size")
        real = (
            "temperature", "top_p", "min_p", "repetition_penalty", "simulate_acceptance", "confidence",
        )  # fmt: skip
        for names, kinds, wanted in ((whole, (int,), "a whole number"), (real, (int, float), "a number")):
            for name in names:
                value = getattr(self, name)
                unset = value is None and name in _UNSET
                if not unset and (isinstance(value, bool) or not isinstance(value, kinds)):
                    raise UserError(f"{name} is {value!r}", f"give {wanted}")
        for name in ("stop", "logits_processor"):
            if getattr(self, name) is None:
                raise UserError(f"{name} is None", "leave it out, or give a list")

    def _check_policy(self) -> None:
        if self.confidence is not None and not 0 < self.confidence <= 1:
            raise UserError(
                f"confidence is {self.confidence}", "a probability above 0; leave it out to draft all"
            )
        if self.confidence is not None and self.policy == "fixed":
            raise UserError(
                "a fixed policy drafts K tokens, however confident", "use the policy confidence or adaptive"
            )
        varying = self.guard or self.confidence is not None or self.policy in ("confidence", "adaptive")
        if varying and self.simulate_acceptance is not None:
            raise UserError("an acceptance can be simulated for fixed E and K only", "use the policy fixed")

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def processing(self) -> Processing:
        shape = Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        return Processing(shape, tuple(self.logits_processor))

    def plan(self, facts: Facts, num_layers: int) -> Plan:
        """Choose mode, E and K. Raises: UserError for an exit layer or draft length out of range."""
        varied = self.policy in ("confidence", "adaptive") or self.confidence is not None or bool(self.guard)
        chosen = self.exit_layer is not None or self.draft_length is not None or varied
        mode = self.mode or ("self-speculative" if facts.pays or chosen else "ar")
        if self.simulate_acceptance is not None and not (
            mode == "self-speculative" and self.processing.plain_greedy
        ):
            raise UserError(
                "an acceptance can be simulated for greedy self-speculation only",
                "use --mode self-speculative, no temperature, penalty or processors",
            )
        if varied and (mode != "self-speculative" or self.draft_length == 0):
            raise UserError(
                "nothing is drafted, so there is no policy to follow",
                "leave out --policy, --confidence and --guard, or use --mode self-speculative with a draft length",
            )
        if mode == "ar":
            return Plan(mode, num_layers, 0)
        given = self.exit_layer is not None or self.draft_length is not None
        # Only greedy decoding follows the checkpoint's policy unasked: sampled outputs should repeat by seed.
        unasked = given or self.simulate_acceptance is not None or self.temperature > 0
        by_checkpoint = None if unasked else facts.policy
        if self.confidence is not None and by_checkpoint != "adaptive":
            by_checkpoint = "confidence"
        policy = self.policy or by_checkpoint or "fixed"
        exit_layer = self.exit_layer if self.exit_layer is not None else facts.exit_layer
        exit_layer = max(1, num_layers // 4) if exit_layer is None else exit_layer
        if not 1 <= exit_layer < num_layers:
            raise UserError(
                f"exit layer {exit_layer} is out of range",
                f"choose one from 1 to {num_layers - 1} (the model has {num_layers} layers; "
                f"all of them is --mode ar)",
            )
        draft_length = self.draft_length if self.draft_length is not None else facts.draft_length
        draft_length = DEFAULT_DRAFT_LENGTH if draft_length is None else draft_length
        if draft_length < 0:
            raise UserError(f"draft length {draft_length} is negative", "it must be 0 or more")
        if self.simulate_acceptance is not None and draft_length == 0:
            raise UserError("nothing is drafted, so no acceptance can be simulated", "give a draft length")
        if mode != "self-speculative" or draft_length == 0:
            return Plan(mode, exit_layer, 0)
        confidence = self.confidence
        if confidence is None and policy != "fixed":
            confidence = DEFAULT_CONFIDENCE if facts.confidence is None else facts.confidence
        guard = policy != "fixed" if self.guard is None else self.guard
        return Plan(mode, exit_layer, draft_length, policy, confidence or 0.0, guard)


def seeded(options: Options) -> Options:
    """Fix the seed of a call: the given one, or, when sampling, a draw from torch's global generator."""
    if options.seed is not None:
        return options
    return replace(options, seed=int(torch.randint(2**62, ())) if options.temperature else 0)


@dataclass(frozen=True)
class Plan:
    """A resolved choice: how many layers draft, how many tokens, and whether they are verified."""

    mode: str
    exit_layer: int
    draft_length: int
    policy: str = "fixed"
    confidence: float = 0.0
    guard: bool = False

    @property
    def controlled(self) -> bool:
        """Whether E or K may change from round to round."""
        return self.policy == "adaptive" or self.guard

    @property
    def believe(self) -> bool:
        return self.mode == "early-exit"
