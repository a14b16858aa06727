"""The ways of decoding that are compared, each behind the same call: (index, prompt, budget) -> `Run`.

All are timed by one clock and counted by one rule: tokens are noted when the caller has them. Prefill ends when
the first of them arrive; the decode rate is the tokens after those over the seconds after those. End of sequence
is disabled, so every method makes exactly the budget, unless our modes are given an `eos_token_id` of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from layerskip.errors import UserError, nearest
from layerskip.measure.speed.memory import module_bytes

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel
    from layerskip.decode.request import Round

AR, SELF_SPECULATIVE, EARLY_EXIT = "ar", "self-speculative", "early-exit"
HF, HF_EARLY_EXIT, ECONOMIZE = "hf", "hf-early-exit", "economize"
NAMES = (AR, SELF_SPECULATIVE, EARLY_EXIT, HF, HF_EARLY_EXIT, ECONOMIZE)
Decode = Callable[[int, list[int], int], "Run"]


@dataclass
class Run:
    """One continuation: its new tokens, and when how many of them arrived."""

    tokens: list[int] = field(default_factory=list)
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # (seconds since the call, tokens)
    rounds: list[Round] = field(default_factory=list)  # ours only

    @property
    def prefill_s(self) -> float:
        """Seconds to the first arrival. Hugging Face's assisted decoding drafts before it; the others do not."""
        return self.arrivals[0][0]

    @property
    def decode_tokens(self) -> int:
        """Tokens behind the first arrival, which prefill made."""
        return sum(count for _, count in self.arrivals[1:])

    @property
    def decode_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return self.arrivals[-1][0] - self.arrivals[0][0]

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_s

    @property
    def tokens_per_round(self) -> float:
        """Tokens per arrival, the first one left out."""
        return self.decode_tokens / (len(self.arrivals) - 1)


@dataclass(frozen=True)
class Method:
    """A way of decoding. `tensor_bytes`: the weights it keeps, a reduced draft head included."""

    name: str
    decode: Decode
    tensor_bytes: int


def parsed(names: str) -> list[str]:
    """Read a comma-separated list of methods; `ar` is always first. Raises: UserError for an unknown one."""
    given = [name.strip() for name in names.split(",") if name.strip()]
    for name in given:
        if name not in NAMES:
            raise UserError(f"unknown method {name!r}", nearest(name, NAMES))
    if ECONOMIZE in given:
        raise UserError(
            f"{ECONOMIZE} cannot be measured here: how to call it is not known to this version",
            "compare with " + ", ".join(NAMES[:-1]),
        )
    return list(dict.fromkeys([AR, *given]))


def ours(
    lm: LanguageModel,
    name: str,
    tensor_bytes: int,
    clock: Callable[[], float] = time.perf_counter,
    **options: Any,
) -> Method:
    """Wrap one of our modes, through the public face."""
    given = {"eos_token_id": [], **options}

    def decode(index: int, prompt: list[int], budget: int) -> Run:
        run, began = Run(), clock()
        for round in lm.stream(prompt, mode=name, max_new_tokens=budget, seed=index, **given):
            run.rounds.append(round)
            if round.tokens:
                run.tokens += round.tokens
                run.arrivals.append((clock() - began, len(round.tokens)))
        return run

    return Method(name, decode, tensor_bytes)


class _Streamer:
    """What `generate` hands its tokens to: the prompt first, then what each step or round committed."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.run, self.clock, self.began = Run(), clock, clock()
        self.prompt_seen = False

    def put(self, value: Any) -> None:
        tokens = value.reshape(-1).tolist()
        if self.prompt_seen:
            self.run.tokens += tokens
            self.run.arrivals.append((self.clock() - self.began, len(tokens)))
        self.prompt_seen = True

    def end(self) -> None:
        pass


def hugging_face(
    hf: Any,
    exit_layer: int | None = None,
    draft_length: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Method:
    """Wrap greedy `generate`, with `assistant_early_exit` when an exit layer is given."""
    assistant = {} if exit_layer is None else {"assistant_early_exit": exit_layer}

    def decode(index: int, prompt: list[int], budget: int) -> Run:
        ids = torch.tensor([prompt], device=hf.device)  # [1, T]
        streamer = _Streamer(clock)
        with assisting(hf, draft_length):
            hf.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=budget,
                min_new_tokens=budget,
                eos_token_id=None,
                pad_token_id=0,
                streamer=streamer,
                **assistant,
            )
        return streamer.run

    return Method(HF if exit_layer is None else HF_EARLY_EXIT, decode, module_bytes(hf))


@contextmanager
def assisting(hf: Any, draft_length: int) -> Iterator[None]:
    """Set a constant draft length for the block.

    As keyword arguments these do not reach the assistant, which reads the model's generation config. The depth
    is put back too: an exception inside assisted decoding would leave the model cut after the exit.
    """
    config, text = hf.generation_config, hf.config.get_text_config()
    wanted = {
        "num_assistant_tokens": draft_length,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    before = {name: getattr(config, name, None) for name in wanted}
    depth = getattr(text, "num_hidden_layers", None)
    try:
        for name, value in wanted.items() if draft_length else ():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
        if depth is not None:
            text.num_hidden_layers = depth


def hugging_face_model(lm: LanguageModel, dtype: torch.dtype) -> Any:
    """Find the model for Hugging Face's methods: the one behind our stack where it is that, else a second one.

    Raises: UserError where there is no folder to load it from.
    """
    if lm.hf is not None and lm.stack.name == "hf" and lm.stack.dtype == dtype:
        return lm.hf
    if lm.path is None:
        raise UserError("no folder to load the Hugging Face model from", "leave out the hf methods")
    from layerskip.model.load import load_model

    return load_model(lm.path, dtype=dtype, device=lm.stack.device)
