"""Turn prompts into tokens and tokens into text: chat templates, incremental detokenising, stop strings.

`encode_prompt` runs once before generation. While tokens arrive, `TextStream` yields the text that is final
and `StopStrings` says at which token to end; both read tokens through `_Detokeniser`, which decodes a short
window of recent tokens instead of the whole list. `final_text` is the text of a finished list.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from layerskip.checkpoint.control_tokens import ControlTokens
from layerskip.errors import UserError
from layerskip.reading import check_unicode, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# An unfinished UTF-8 character is at most 3 bytes. Decoders show it as one replacement character
# (byte-level BPE) or as one per byte (byte fallback).
_MAX_UNFINISHED = 3
# Tokens kept as context. Three would do to resynchronise UTF-8; the rest keeps the window's text non-empty,
# because decoders treat the first piece of a text specially (they strip its leading space).
_CONTEXT = 8
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class _Detokeniser:
    """Decode a token stream piece by piece: `push` returns the text no later token can change.

    `_text` is the decoded `_window`, of which the first `_released` characters have been returned. A window
    that grows past twice `_CONTEXT` is shortened at the front when that leaves its unreleased end as it was.

    Byte fallback has a rule of its own: its decoder turns *every* byte of an uninterrupted run of byte pieces
    into U+FFFD when any part of the run is invalid. So a run that is valid so far stays unreleased until it
    ends, and an invalid one is final at once.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._decoded = partial(_decoded, tokenizer, skip_special_tokens=skip_special_tokens)
        self._special: set[int] = set()
        if skip_special_tokens:
            # Fast tokenizers skip every added token marked special, slow ones the named special tokens.
            added = tokenizer.added_tokens_decoder.items()
            self._special = {*tokenizer.all_special_ids, *(i for i, entry in added if entry.special)}
        self._window: list[int] = []
        self._text = ""
        self._released = 0
        self._byte_of: dict[int, int | None] = {}
        self._run: codecs.IncrementalDecoder | None = None
        # Stays in front of a shortened window, for without it the rest of an invalid run would look valid.
        self._invalid_place: list[int] = []

    @property
    def pending(self) -> str:
        """Text decoded but not returned yet; later tokens may change it."""
        return self._text[self._released :]

    def push(self, token: int) -> str:
        """Append `token` and return the text that became final."""
        # Skipped tokens leave no trace in the text, not even between two bytes of one character.
        if token in self._special and not self._decoded([token]):
            return ""
        self._window.append(token)
        if self._extends_valid_run(token):
            return ""
        self._text = self._decoded(self._window)
        num_unfinished = len(self._text) - len(self._text.rstrip("\ufffd"))
        return self._release(len(self._text) - min(num_unfinished, _MAX_UNFINISHED))

    def finish(self) -> str:
        """Return what is left, an unfinished character included."""
        self._text = self._decoded(self._window)
        return self._release(len(self._text))

    def _release(self, end: int) -> str:
        start, self._released = self._released, max(self._released, end)
        released = self._text[start : self._released]
        if len(self._window) > 2 * _CONTEXT:
            shorter = self._invalid_place + self._window[-_CONTEXT:]
            text, pending = self._decoded(shorter), self.pending
            if len(text) > len(pending) and text.endswith(pending):
                self._window, self._text, self._released = shorter, text, len(text) - len(pending)
        return released

    def _extends_valid_run(self, token: int) -> bool:
        """Follow runs of byte pieces; within a valid one, extend `_text` without decoding the run anew."""
        byte = self._fallback_byte(token)
        if byte is None:
            self._run, self._invalid_place = None, []
            return False
        if self._invalid_place:
            return False
        self._run = self._run or codecs.getincrementaldecoder("utf-8")()
        try:
            characters = self._run.decode(bytes([byte]))
        except UnicodeDecodeError:
            self._invalid_place = self._window[-1 - _MAX_UNFINISHED :]
            return False
        short = bool(characters) and len(self._window) <= 2 * _CONTEXT
        self._text = self._decoded(self._window) if short else self._text + characters
        return True

    def _fallback_byte(self, token: int) -> int | None:
        if token not in self._byte_of:
            piece = str(self._tokenizer.convert_ids_to_tokens(token))
            match = _BYTE_PIECE.fullmatch(piece)
            # A tokenizer without byte fallback may own such a piece as ordinary text.
            self._byte_of[token] = int(match[1], 16) if match and self._decoded([token]) != piece else None
        return self._byte_of[token]


class TextStream:
    """Yield the text of a growing token list in whole characters, up to the first stop string.

    Text that may be the start of a stop string, or the start of a character, is held back until that is
    decided. Byte-fallback tokenizers (Llama 2, Gemma) hold back each uninterrupted run of valid byte pieces.

    Exact: all `push` results and `finish` joined equal `final_text` of all tokens, however they are split
    (`test_stream_joins_to_the_decoded_text`).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), skip_special_tokens: bool = True
    ) -> None:
        self._detokeniser = _Detokeniser(tokenizer, skip_special_tokens)
        self._stop = _checked_stop(stop)
        self._held = ""
        self._stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        """Append `tokens` and return the newly final text; always "" once a stop string was met."""
        if self._stopped:
            return ""
        self._held += "".join([self._detokeniser.push(token) for token in tokens])
        found = _earliest_stop(self._held, self._stop)
        undecided = _stop_prefix_start(self._held, self._stop)
        # A stop string that is complete still loses to a longer one that began before it.
        self._stopped = found is not None and found <= undecided
        end = found if found is not None and self._stopped else undecided
        released, self._held = self._held[:end], self._held[end:]
        return released

    def finish(self) -> str:
        """Return the text still held back; call once, after the last `push`."""
        if self._stopped:
            return ""
        held = self._held + self._detokeniser.finish()
        return held[: _earliest_stop(held, self._stop)]


def pieces(
    tokenizer: PreTrainedTokenizerBase, growing: Iterable[Sequence[int]], stop: Sequence[str] = ()
) -> Iterator[str]:
    """Turn tokens that come bit by bit into pieces of text, none of them empty; see `TextStream`."""
    stream = TextStream(tokenizer, stop)
    for tokens in growing:
        if text := stream.push(tokens):
            yield text
    if text := stream.finish():
        yield text


class StopStrings:
    """Tell at which token the decoded text, special tokens skipped, first contains a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._stop = _checked_stop(stop)
        self._detokeniser = _Detokeniser(tokenizer) if self._stop else None
        self._num_kept = max((len(string) for string in self._stop), default=1) - 1
        self._tail = ""
        self._found = False

    def push(self, token: int) -> bool:
        """Append `token`; True when the text contains a stop string, and from then on.

        Exact: True first for the smallest `n` with a stop string in the decoded first `n` tokens
        (`test_stop_is_found_at_the_earliest_token`).
        """
        if self._found or self._detokeniser is None:
            return self._found
        settled = self._tail + self._detokeniser.push(token)
        self._found = _earliest_stop(settled + self._detokeniser.pending, self._stop) is not None
        self._tail = settled[max(0, len(settled) - self._num_kept) :]
        return self._found


def final_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], stop: Sequence[str] = ()) -> str:
    """Decode `tokens`, special tokens skipped, and cut before the stop string that begins first."""
    text = _decoded(tokenizer, list(tokens), skip_special_tokens=True)
    return text[: _earliest_stop(text, _checked_stop(stop))]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: str | Sequence[Mapping[str, str]],
    chat: bool | None,
    control_tokens: bool = False,
) -> list[int]:
    """Encode a prompt: messages through the chat template, a string plainly unless `chat` is True.

    A string with `chat=True` becomes one user message; a prompt without tokens becomes the start token. A message
    that spells a control token says its text, unless `control_tokens`; a string encoded plainly, which may bring a
    template of its own, is read as the tokenizer reads it.

    Raises: `UserError` for malformed messages, half characters, and whatever the tokenizer lacks.
    """
    if tokenizer is None:
        raise UserError(
            "there is no tokenizer to read text with",
            "a model in memory takes tokenizer=..., a folder needs tokenizer.json; or pass token ids",
        )
    if not isinstance(prompt, str):
        tokens = _templated(tokenizer, _checked_messages(prompt), control_tokens)
    elif chat:
        check_unicode(prompt, "the prompt")
        tokens = _templated(tokenizer, [{"role": "user", "content": prompt}], control_tokens)
    else:
        tokens = list(tokenizer.encode(check_unicode(prompt, "the prompt")))
    if not tokens and tokenizer.bos_token_id is None:
        raise UserError("the prompt is empty, and this tokenizer has no start token", "give some text")
    return tokens or [tokenizer.bos_token_id]


def _templated(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], control_tokens: bool
) -> list[int]:
    from jinja2 import TemplateError  # here, for `import layerskip` should not pay for it

    if not tokenizer.chat_template:
        raise UserError("this tokenizer has no chat template", "use --no-chat or plain text")
    control = None if control_tokens else ControlTokens(tokenizer)
    marked = messages if control is None else control.marked(messages)
    try:
        if control is None or marked is messages:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            return list(ids)
        text = tokenizer.apply_chat_template(marked, add_generation_prompt=True, tokenize=False)
    except (TemplateError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        # Templates refuse by raising, e.g. two user turns in a row; what a bad one does is its own.
        raise UserError(
            f"the chat template failed: {reason(error)}", "use --no-chat or plain text"
        ) from error
    return control.encoded([str(text)])[0]


def _checked_messages(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    shape = 'a chat is a list such as [{"role": "user", "content": "Hello"}]'
    if not messages:
        raise UserError("the chat has no messages", shape)
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                raise UserError(f"message {index} has no text under {key!r}", shape)
            check_unicode(message[key], f"message {index}")
    return [dict(message) for message in messages]


def _checked_stop(stop: Sequence[str]) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop)  # a lone string is one stop, not its letters
    if not all(isinstance(string, str) for string in strings):
        raise UserError(f"stop is {stop!r}", "a stop is text, or a list of texts; ids go to eos_token_id")
    if "" in strings:
        raise UserError("a stop string is empty: it would stop before the first token", "leave it out")
    return strings


def split_stops(
    tokenizer: PreTrainedTokenizerBase | None, stop: Sequence[str]
) -> tuple[tuple[str, ...], frozenset[int]]:
    """Separate stops that are text from special tokens, which text never shows: those end a row by their id.

    Raises: UserError for an empty stop string, or without a tokenizer.
    """
    strings = _checked_stop(stop)
    if not strings:
        return (), frozenset()
    if tokenizer is None:
        raise UserError("stop strings need a tokenizer", "pass tokenizer=, or end on eos_token_id")
    special = set(tokenizer.all_special_tokens)
    ids = tokenizer.convert_tokens_to_ids([string for string in strings if string in special])
    return tuple(string for string in strings if string not in special), frozenset(ids)


def _earliest_stop(text: str, stop: Sequence[str]) -> int | None:
    return min((at for string in stop if (at := text.find(string)) >= 0), default=None)


def _stop_prefix_start(text: str, stop: Sequence[str]) -> int:
    """Where the longest end of `text` that may grow into a stop string begins, or `len(text)`."""
    longest = max((len(string) for string in stop), default=1) - 1
    starts = range(max(0, len(text) - longest), len(text))
    return next((at for at in starts if any(string.startswith(text[at:]) for string in stop)), len(text))


def _decoded(tokenizer: PreTrainedTokenizerBase, tokens: list[int], skip_special_tokens: bool) -> str:
    options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode(tokens, **options))
