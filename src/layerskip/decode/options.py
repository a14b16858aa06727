"""What a caller may set for loading and decoding, in three groups; `Options.plan` resolves them against a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypedDict

from layerskip.checkpoint.facts import Facts
from layerskip.decode.control import Copying
from layerskip.errors import UserError, nearest
from layerskip.option import check, option, same

if TYPE_CHECKING:
    from layerskip.decode.sampling import Processing

MODES = ("ar", "early-exit", "self-speculative")
DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")  # names torch has, and auto
DEFAULT_CONFIDENCE = (
    0.4  # as in Hugging Face's assisted generation; `layerskip tune` finds a checkpoint's own
)
DEFAULT_DRAFT_LENGTH = 4  # short drafts lose little on untrained exits and fit most trained ones


def vocabulary_size(typed: str) -> int | str:
    """Read a draft vocabulary as typed: a number of tokens, auto or off."""
    return int(typed) if typed.isdecimal() else typed


class _Checked:
    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Iterator):  # is read once, and here by several
                object.__setattr__(self, name, tuple(value))
        check(type(self), vars(self))
        for name, value in vars(self).items():
            if hasattr(value, "item") and isinstance(value, Integral):  # numpy's, which JSON does not take
                object.__setattr__(self, name, int(value))


@dataclass(frozen=True)
class LoadOptions(_Checked):
    """How a model is loaded, and on what."""

    # A torch.dtype or torch.device too; auto: bfloat16 where it is fast and exact, on the accelerator if any.
    dtype: str | Any = option(
        "auto", "float32, bfloat16, float16, float64 or auto.", choices=DTYPES, typed=str
    )
    device: str | Any = option("auto", "cpu, cuda, mps or auto.", typed=str)
    device_map: Any = option(None, "Placement of parts on devices, as in transformers.", offered=False)
    stack: str = option("auto", "native, hf or auto.", choices=("auto", "native", "hf"))
    quantize: str | None = option(
        None, "int8 or int4: weights in so many bits; auto: the fastest for 1% of perplexity.", shown="off"
    )
    threads: int | None = option(None, "CPU threads.", least=1, shown="one per physical core")
    progress: bool = option(True, "Show the progress of downloads and of loading.", offered=False)


@dataclass(frozen=True)
class SamplingOptions(_Checked):
    """How tokens are drawn and where they end; names are those of Hugging Face where it has one."""

    max_new_tokens: int = option(256, "Budget of new tokens.", least=1)
    temperature: float = option(0.0, "0 is greedy.", least=0, most=1e6)
    top_k: int = option(0, "Keep the k most probable tokens; 0 is off.", least=0)
    top_p: float = option(1.0, "Keep the smallest set with this probability; 1 is off.", above=0, most=1)
    min_p: float = option(
        0.0, "Drop tokens below this share of the most probable; 0 is off.", least=0, below=1
    )
    repetition_penalty: float = option(1.0, "Divide logits of tokens already present; 1 is off.", above=0)
    logits_processor: Sequence[Any] = option((), "Processors of transformers, in order.", offered=False)
    seed: int | None = option(None, "Sampling is repeatable per seed.", shown="from torch's generator")
    stop: str | Sequence[str] = option((), "Stop before this text; may be repeated.", typed=list[str] | None)
    chat: bool | None = option(  # None: from Python, only lists of messages are wrapped
        None, "Wrap the prompt as a message.", shown="if it can"
    )
    control_tokens: bool = option(
        False, "Read control tokens spelled in messages, such as <|im_end|>, as such."
    )
    eos_token_id: int | Sequence[int] | None = option(
        None, "Tokens that end an output; all of the generation config by default.", offered=False
    )
    logprobs: bool = option(False, "Keep every token's log-probability.", offered=False)
    top_logprobs: int = option(0, "Keep those of so many likeliest tokens too.", least=0, offered=False)
    states: bool = option(False, "Keep what the last layer says of every token.", offered=False)
    batch_size: int = option(8, "Prompts continued together.", least=1)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def processing(self) -> Processing:
        from layerskip.decode.sampling import Processing, Sampling

        shape = Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        return Processing(shape, tuple(self.logits_processor))


@dataclass(frozen=True)
class DraftOptions(_Checked):
    """Who drafts, how much, and when to stop; None leaves it to the checkpoint."""

    # None: self-speculative, unless the drafter is off.
    mode: str | None = same(
        Facts, "mode", help="ar, early-exit or self-speculative.", choices=MODES, shown="by checkpoint"
    )
    # None: the checkpoint's default, else the trained exit nearest to a quarter of the layers, and 4 tokens.
    exit_layer: int | None = same(Facts, "exit_layer", least=None, shown="by checkpoint")  # see `plan`
    draft_length: int | None = same(Facts, "draft_length", shown="by checkpoint")
    # None: exit where an exit layer or draft length is given, else auto: see `plan`.
    drafter: str | None = same(Facts, "drafter", shown="auto")
    match_min: int | None = same(Facts, "match_min", shown="1")
    copy_length: int | None = same(Facts, "copy_length", shown="16")
    draft_vocab: int | str = option(  # auto: the checkpoint's list, else off
        "auto", "Tokens the draft head knows: a number, auto or off.", choices=("auto", "off"), typed=str,
        read=vocabulary_size,
    )  # fmt: skip
    policy: str | None = same(Facts, "policy", shown="by checkpoint")
    confidence: float | None = same(Facts, "confidence", least=None, above=0, shown="by policy")
    guard: bool | None = option(
        None, "Take plain steps while they are faster.", shown="unless the policy is fixed"
    )
    simulate_acceptance: float | None = option(  # for timing only
        None,
        "Pretend this accepted/drafted: all work is real, the output is not.",
        least=0,
        most=1,
        shown="off",
    )

    @property
    def varied(self) -> bool:
        """Whether E or K was asked to vary from round to round."""
        return self.policy in ("confidence", "adaptive") or self.confidence is not None or bool(self.guard)


@dataclass(frozen=True)
class Options(SamplingOptions, DraftOptions):
    """Options of `generate`, `stream` and `chat`. Raises: UserError for values out of range or at odds."""

    @classmethod
    def parse(cls, keywords: Mapping[str, Any]) -> Options:
        """Check names and values. Raises: UserError with the nearest name for an unknown one."""
        known = [one.name for one in fields(cls)]
        for name in keywords:
            if name not in known:
                raise UserError(f"unknown option {name!r}", nearest(name, known))
        return cls(**keywords)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.confidence is not None and self.policy == "fixed":
            raise UserError(
                "a fixed policy drafts K tokens, however confident", "use the policy confidence or adaptive"
            )
        if self.varied and self.simulate_acceptance is not None:
            raise UserError("an acceptance can be simulated for fixed E and K only", "use the policy fixed")

    def plan(self, facts: Facts, num_layers: int) -> Plan:
        """Choose mode, drafters, E and K. Raises: UserError for an exit layer or draft length out of range.

        Copies from the text so far (`lookup`) need no training, so they are the default of every checkpoint, with
        the exit beside them where it is trained and pays.
        """
        off = self.drafter == "off" or (self.drafter is None and facts.drafter == "off" and not self._asks)
        mode = self.mode or ("ar" if off else "self-speculative")
        self._check_mode(mode)
        if mode == "ar":
            return Plan(mode, num_layers, 0)
        exits, copies = self._drafters(facts, mode)
        unasked = not self._asks_exit and self.temperature == 0 and self.policy is None
        # Only greedy decoding follows the checkpoint's policy unasked: sampled outputs should repeat by seed.
        by_checkpoint = facts.policy if unasked and exits else None
        if self.confidence is not None and by_checkpoint != "adaptive":
            by_checkpoint = "confidence"
        policy = self.policy or by_checkpoint or ("adaptive" if copies and not exits and unasked else "fixed")
        timed = (
            policy != "fixed" or (copies and unasked)
            if self.guard is None
            else self.guard or policy != "fixed"
        )
        guard = timed or copies if self.guard is None else self.guard
        copying = None
        if copies:
            shortest = self.match_min or facts.match_min or Copying.shortest
            copying = Copying(shortest, self.copy_length or facts.copy_length or Copying.longest)
        if not exits:
            return Plan(mode, num_layers, 0, policy, 0.0, guard, timed, copying)
        exit_layer = self.exit_layer if self.exit_layer is not None else facts.exit_layer
        if exit_layer is None:
            quarter = max(1, num_layers // 4)
            exit_layer = min(facts.exits or (quarter,), key=lambda trained: abs(trained - quarter))
        if not facts.first_exit <= exit_layer < num_layers:
            raise UserError(
                f"exit layer {exit_layer} is out of range",
                f"choose one from {facts.first_exit} to {num_layers - 1} (the model has {num_layers} layers; "
                f"all of them is --mode ar)",
            )
        draft_length = self.draft_length if self.draft_length is not None else facts.draft_length
        draft_length = DEFAULT_DRAFT_LENGTH if draft_length is None else draft_length
        if self.simulate_acceptance is not None and draft_length == 0:
            raise UserError("nothing is drafted, so no acceptance can be simulated", "give a draft length")
        if mode != "self-speculative" or draft_length == 0:
            return Plan(mode, exit_layer, 0, timed=timed, copying=copying)
        confidence = self.confidence
        if confidence is None and policy != "fixed":
            confidence = DEFAULT_CONFIDENCE if facts.confidence is None else facts.confidence
        return Plan(mode, exit_layer, draft_length, policy, confidence or 0.0, guard, timed, copying)

    @property
    def _asks_exit(self) -> bool:
        given = self.exit_layer, self.draft_length, self.simulate_acceptance, self.confidence
        return any(one is not None for one in given)

    @property
    def _asks(self) -> bool:
        return self._asks_exit or self.varied or self.match_min is not None or self.copy_length is not None

    def _drafters(self, facts: Facts, mode: str) -> tuple[bool, bool]:
        """Say whether an exit is used and whether rows copy."""
        if mode == "early-exit":
            return True, False
        default = "auto" if facts.drafter in (None, "off") else facts.drafter  # off, but drafts are asked for
        drafter = self.drafter or ("exit" if self._asks_exit else default)
        exits = drafter == "exit" or (drafter == "auto" and (self._asks_exit or facts.pays))
        copies = drafter in ("auto", "lookup")
        if copies and self.simulate_acceptance is not None:
            raise UserError("an acceptance can be simulated for exits only", "use --drafter exit")
        if not copies and (self.match_min is not None or self.copy_length is not None):
            raise UserError(
                "nothing is copied here", "leave out --match-min and --copy-length, or use --drafter auto"
            )
        if not exits and self._asks_exit:
            raise UserError(
                "no exit drafts here",
                "leave out exit layer, draft length and confidence, or use --drafter auto",
            )
        return exits, copies

    def _check_mode(self, mode: str) -> None:
        if self.drafter == "off" and mode == "self-speculative":
            raise UserError(
                "drafter off and mode self-speculative exclude each other", "leave out one of them"
            )
        if self.drafter not in (None, "off") and mode != "self-speculative":
            raise UserError(
                f"mode {mode} drafts nothing", "leave out --drafter, or use --mode self-speculative"
            )
        if self.simulate_acceptance is not None and not (
            mode == "self-speculative" and self.processing.plain_greedy
        ):
            raise UserError(
                "an acceptance can be simulated for greedy self-speculation only",
                "use --mode self-speculative, no temperature, penalty or processors",
            )
        if self.varied and (mode != "self-speculative" or self.draft_length == 0):
            raise UserError(
                "nothing is drafted, so there is no policy to follow",
                "leave out --policy, --confidence and --guard, or use --mode self-speculative with a draft length",
            )


class Keywords(TypedDict, total=False):
    """The fields of `Options` as keywords, so that editors complete them: `generate(prompt, temperature=0.7)`."""

    mode: str | None
    exit_layer: int | None
    draft_length: int | None
    drafter: str | None
    match_min: int | None
    copy_length: int | None
    draft_vocab: int | str
    policy: str | None
    confidence: float | None
    guard: bool | None
    simulate_acceptance: float | None
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    logits_processor: Sequence[Any]
    seed: int | None
    stop: str | Sequence[str]
    chat: bool | None
    control_tokens: bool
    eos_token_id: int | Sequence[int] | None
    logprobs: bool
    top_logprobs: int
    states: bool
    batch_size: int


def seeded(options: Options) -> Options:
    """Fix the seed of a call: the given one, or, when sampling, a draw from torch's global generator."""
    if options.seed is not None:
        return options
    import torch

    return replace(options, seed=int(torch.randint(2**62, ())) if options.temperature else 0)


@dataclass(frozen=True)
class Plan:
    """A resolved choice: who drafts, how many layers and tokens, and whether drafts are verified.

    An exit drafts where `draft_length` is not 0, rows copy where `copying` is there.
    """

    mode: str
    exit_layer: int
    draft_length: int
    policy: str = "fixed"
    confidence: float = 0.0
    guard: bool = False  # plain steps are taken where they are faster
    timed: bool = False  # choices go by the clock; else by committed tokens alone, so that a seed repeats
    copying: Copying | None = None

    @property
    def controlled(self) -> bool:
        """Whether source, E or K may change from round to round."""
        return self.policy == "adaptive" or self.guard or self.copying is not None

    @property
    def drafter(self) -> str:
        """Who drafts: exit, lookup, auto (both) or off."""
        if not self.draft_length:
            return "off" if self.copying is None else "lookup"
        return "exit" if self.copying is None else "auto"

    @property
    def unverified(self) -> bool:
        return self.mode == "early-exit"

    @property
    def keywords(self) -> dict[str, Any]:
        """The options that say all this, whatever a checkpoint says."""
        if self.mode != "self-speculative":
            return (
                {"mode": self.mode}
                if self.mode == "ar"
                else {"mode": self.mode, "exit_layer": self.exit_layer}
            )
        exits, copying = self.draft_length > 0 or self.copying is None, self.copying
        told: dict[str, Any] = {"mode": self.mode, "policy": self.policy}
        told["guard"] = None if self.guard and not self.timed else self.guard
        told["drafter"] = "exit" if copying is None else self.drafter
        if exits:
            told |= {"exit_layer": self.exit_layer, "draft_length": self.draft_length}
            told["confidence"] = self.confidence or None
        return (
            told
            if copying is None
            else {**told, "match_min": copying.shortest, "copy_length": copying.longest}
        )
