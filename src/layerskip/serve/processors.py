"""Processors of logits that requests ask for: biases, penalties, grammars. Each is a function of the prefix alone.

A processor that follows a grammar remembers where it is, and goes back where a prefix says so, so that rejected
drafts leave no trace: it need not be copied from position to position.
"""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any, Self

import torch

from layerskip.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


CONTROL = {*range(32)} - {10, 13}  # bytes


class OfPrefix:
    """A processor whose answer depends on what it is given alone, so a copy may be itself."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class Bias(OfPrefix):
    """Add to the logits of some tokens. Raises: UserError for a token that the model does not have."""

    def __init__(self, biases: Mapping[str, float], vocab_size: int) -> None:
        for token in biases:
            if not token.isdecimal() or int(token) >= vocab_size:
                raise UserError(
                    f"logit_bias has {token!r}", f"its keys are token ids from 0 to {vocab_size - 1}"
                )
            if not -100 <= biases[token] <= 100:
                raise UserError(
                    f"logit_bias of token {token} is {biases[token]}", "it must be from -100 to 100"
                )
        self._ids = torch.tensor([int(token) for token in biases])
        self._values = torch.tensor(list(biases.values()))

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Shapes: ids [1, n], scores [1, V] -> [1, V]."""
        values = self._values.to(scores.device, scores.dtype)
        return scores.index_add(1, self._ids.to(scores.device), values[None])


class Penalties(OfPrefix):
    """OpenAI's penalties of tokens that were written already, behind a prompt of so many tokens."""

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        self._prompt, self._presence, self._frequency = prompt, presence, frequency

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Shapes: ids [1, n], scores [1, V] -> [1, V]."""
        seen, counts = torch.unique(ids[0, self._prompt :], return_counts=True)
        lost = self._presence + self._frequency * counts.to(scores.dtype)
        return scores.index_add(1, seen, -lost[None])


class Grammar(OfPrefix):
    """Allow the tokens that a compiled grammar allows behind a prompt of so many tokens."""

    def __init__(self, compiled: Any, prompt: int, never: Tensor) -> None:
        import xgrammar

        self._xgrammar, self._prompt, self._never = xgrammar, prompt, never
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._taken: list[int] = []  # tokens the matcher has accepted
        self._mask = xgrammar.allocate_token_bitmask(1, compiled.tokenizer_info.vocab_size)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Shapes: ids [1, n], scores [1, V] -> [1, V]; behind what the grammar forbids nothing is changed."""
        wanted = ids[0, self._prompt :].tolist()
        same = next((i for i, (a, b) in enumerate(zip(self._taken, wanted, strict=False)) if a != b), None)
        same = min(len(self._taken), len(wanted)) if same is None else same
        if (back := len(self._taken) - same) > 0:
            self._matcher.rollback(back)
            del self._taken[same:]
        for token in wanted[same:]:
            if self._matcher.is_terminated() or not self._matcher.accept_token(token):
                return scores
            self._taken.append(token)
        if self._matcher.is_terminated():
            return scores
        self._matcher.fill_next_token_bitmask(self._mask, 0)
        allowed = scores.detach().cpu().index_fill(1, self._never, -torch.inf)
        self._xgrammar.apply_token_bitmask_inplace(allowed, self._mask, backend="cpu")
        return allowed.to(scores.device)


class Grammars:
    """Compile grammars for one tokenizer, and keep the latest."""

    def __init__(self, tokenizer: Any, vocab_size: int, ends: frozenset[int]) -> None:
        self._tokenizer, self._vocab_size, self._ends = tokenizer, vocab_size, ends

    @functools.cached_property
    def _compiler(self) -> Any:
        try:
            import xgrammar
        except ImportError as error:
            raise UserError(
                "response_format needs xgrammar", "start the server with pip install 'layerskip[serve]'"
            ) from error
        told = xgrammar.TokenizerInfo.from_huggingface(
            self._tokenizer, vocab_size=self._vocab_size, stop_token_ids=sorted(self._ends)
        )
        return xgrammar.GrammarCompiler(told, max_threads=1)

    @functools.lru_cache(maxsize=64)  # noqa: B019 - one of these lives as long as the server
    def _of_schema(self, schema: str) -> Any:
        try:
            return self._compiler.compile_json_schema(schema)
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"the JSON schema cannot be used: {error}", "simplify it") from error

    @functools.cached_property
    def _any_json(self) -> Any:
        return self._compiler.compile_builtin_json_grammar()

    @functools.cached_property
    def _never(self) -> Tensor:
        """Tokens with a character that JSON has nowhere: xgrammar lets it into strings of limited length."""
        words = self._any_json.tokenizer_info.decoded_vocab
        return torch.tensor([i for i, word in enumerate(words) if CONTROL & {*word}], dtype=torch.long)

    def following(self, format_: Any, prompt: int) -> Grammar | None:
        """Make the processor of a `response_format`; None for text. Raises: UserError."""
        if format_ is None or format_.type == "text":
            return None
        if format_.type == "json_object":
            return Grammar(self._any_json, prompt, self._never)
        if format_.json_schema is None:
            raise UserError("response_format json_schema has no json_schema", "give the schema")
        schema = json.dumps(format_.json_schema.schema_, sort_keys=True)
        return Grammar(self._of_schema(schema), prompt, self._never)
