"""From examples to tokens and labels: chat templates, loss on completions, windows of running text.

encoded = encode(examples("train.jsonl", columns), tokenizer, options)
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from layerskip.checkpoint.control_tokens import ControlTokens
from layerskip.errors import UserError, nearest
from layerskip.reading import check_unicode, reason
from layerskip.train.data.states import Kept

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from layerskip.train.data.sources import Example
    from layerskip.watch import Watch

    Tokens = NDArray[np.int32]
    Pieces = list[tuple[Sequence[int] | Tokens, bool]]  # tokens, and whether they are learnt

IGNORED = -100  # Hugging Face's label for "no loss here"
_TOGETHER, _TOGETHER_CHARACTERS = 1000, 1_000_000  # tokenised in one call
_PIECE = 100_000  # characters: longer running text is tokenised in pieces,
_PIECES = 16  # so many in one call
_CHOICES = {
    "template": ("auto", "on", "off"),
    "loss_on": ("completions", "all"),
    "long": ("error", "drop", "cut"),
}


@dataclass(frozen=True)
class DataOptions:
    """How examples become rows of at most `length` tokens.

    Raises: UserError for an unknown choice or rows of one token.
    """

    length: int
    template: str = (
        "auto"  # auto: wrap prompt/completion as a chat where the tokenizer can, as `generate` does
    )
    separator: str = "\n"  # between prompt and completion, without a template
    loss_on: str = "completions"  # running text is trained on everywhere
    pack: bool = True
    long: str = "error"  # an example over `length`; running text is cut into windows anyway
    control_tokens: bool = False  # read those that the data spell, such as <|im_end|>, as such; else as text

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name} is {getattr(self, name)!r}", nearest(str(getattr(self, name)), known)
                )
        if self.length < 2:
            raise UserError(f"length is {self.length}", "a row needs at least 2 tokens")


@dataclass(frozen=True, slots=True)
class Encoded:
    """An example in tokens. Labels stand beside their own token (the model shifts); -100 is no loss."""

    input_ids: Tokens
    labels: Tokens
    states: Kept | None = None  # of its tokens, in this order, where the data tell them


# -- encoding ------------------------------------------------------------------------------------------------


def encode(
    examples: Iterable[Example],
    tokenizer: Any,
    options: DataOptions,
    watch: Watch | None = None,
    ends: Iterable[int] = (),
) -> list[Encoded]:
    """Tokenise examples in order; running text comes back in windows of at most `length` tokens.

    `ends` are the tokens that end a model's turn, besides the tokenizer's own: templates use others (<|eot_id|>).
    Prompt and completion are tokenised apart, so that the boundary is the one at inference.

    Raises: UserError for an example without a token to learn, for a chat template that is missing or rewrites
    earlier turns, and for examples over `length` unless `options.long` drops or cuts them.
    """
    coder = _Coder(tokenizer, options, ends)
    found: list[Encoded] = []
    over: list[int] = []
    num_examples = num_dropped = 0
    for chunk in _chunks(examples):
        for where, running, pieces, states in coder.encoded(chunk):
            num_examples += 1
            if running:
                found += _windows(pieces, options.length)
                continue
            one = replace(_joined(pieces), states=states)
            if not (one.labels != IGNORED).any():
                raise UserError(
                    f"{where} has no token to learn: its completion is empty, or no assistant speaks in it",
                    "leave it out, or set loss_on=all",
                )
            if len(one.input_ids) > options.length:
                over.append(len(one.input_ids))
                short = slice(options.length)
                one = Encoded(one.input_ids[short].copy(), one.labels[short].copy(), states)
                if options.long != "cut" or not (one.labels != IGNORED).any():
                    num_dropped += 1
                    continue
            found.append(one)
        if watch is not None:
            watch("encoding examples", num_examples, 0)
    if coder.spelled:
        warnings.warn(
            f"control tokens such as {coder.spelled[0]} are spelled in {len(coder.spelled)} of {num_examples} "
            "examples: they are read as text, or, with control_tokens=true, as tokens",
            stacklevel=2,
        )
    _report_long(over, num_dropped, num_examples, options)
    if not found:
        raise UserError("no example is left to train on", "give more data, or a greater length")
    return found


def _report_long(over: Sequence[int], num_dropped: int, num_examples: int, options: DataOptions) -> None:
    if not over:
        return
    told = f"{len(over)} of {num_examples} examples are over length={options.length}, the longest has {max(over)}"
    if options.long == "error":
        raise UserError(f"{told} tokens", f"set length={max(over)}, or long=drop, or long=cut")
    num_cut = len(over) - num_dropped
    why = (
        f": nothing to learn within the first {options.length} tokens"
        if options.long == "cut" and num_dropped
        else ""
    )
    warnings.warn(f"{told}: {num_cut} cut at their end, {num_dropped} left out{why}", stacklevel=3)


def _chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Gather examples for one call of the tokenizer: many short ones, or few long ones."""
    chunk: list[Example] = []
    characters = 0
    for example in examples:
        chunk.append(example)
        characters += len(example.get("text", ""))
        if len(chunk) == _TOGETHER or characters > _TOGETHER_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


class _Coder:
    """Turn examples into pieces of tokens, each with or without loss."""

    def __init__(self, tokenizer: Any, options: DataOptions, ends: Iterable[int]) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.control = ControlTokens(tokenizer)
        self.spelled: list[str] = []  # one control token per example that spells any
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        if options.template == "on" and not self.has_template:
            raise UserError(
                "this tokenizer has no chat template", "set template=off, or add chat_template.jinja"
            )
        self.wraps = self.has_template and options.template != "off"
        self.end = tokenizer.eos_token_id
        self.ends = {*ends} | ({self.end} - {None})
        plain, full = self.ids(["a"])[0], self.ids(["a"], special=True)[0]
        self.start = full[: len(full) - len(plain)] if full[len(full) - len(plain) :] == plain else full[:1]

    def ids(self, texts: list[str], special: bool = False) -> list[list[int]]:
        """Tokenise texts; `special` adds what the tokenizer puts around a text, such as a start token."""
        return self.control.encoded(texts, around=special, as_text=not self.options.control_tokens)

    def chat_ids(self, texts: list[str]) -> list[list[int]]:
        """Tokenise rendered chats, whose template writes control tokens; those of messages are marked."""
        return self.control.encoded(texts)

    def encoded(self, chunk: list[Example]) -> Iterator[tuple[str, bool, Pieces, Kept | None]]:
        """Yield (where, whether it is running text, pieces, kept states) in the order of the chunk."""
        made: list[Pieces] = [[] for _ in chunk]
        states: dict[int, Kept | None] = {}  # of those whose own tokens are taken
        kinds: dict[str, list[int]] = {"text": [], "pair": [], "chat": []}
        for index, example in enumerate(chunk):
            self._check_text(example, index)
            if (known := self._known(example)) is not None:
                made[index] = known
                told = example.get("states")
                states[index] = told if isinstance(told, Kept) else None
            elif "messages" in example:
                kinds["chat"].append(index)
            elif "text" in example:
                kinds["text"].append(index)
            else:
                kinds["chat" if self.wraps else "pair"].append(index)
        for kind, encoded in (("text", self._texts), ("pair", self._pairs), ("chat", self._chats)):
            results = encoded([chunk[index] for index in kinds[kind]])
            for index, pieces in zip(kinds[kind], results, strict=True):
                made[index] = pieces
        running = set(kinds["text"])
        for index, (example, pieces) in enumerate(zip(chunk, made, strict=True)):
            if (
                index not in running and "finish_reason" not in example
            ):  # a model may end at once, a writer not
                learnt = {int(token) for tokens, loss in pieces if loss for token in tokens}
                pieces = pieces if learnt - self.ends else []
            where = example.get("where", f"example {index + 1}")
            yield where, index in running, pieces, states.get(index)

    def _check_text(self, example: Example, index: int) -> None:
        """Refuse half characters, and note an example that spells a control token."""
        where = example.get("where", f"example {index + 1}")
        messages = example.get("messages") or ()
        texts = [example[key] for key in ("text", "prompt", "completion") if key in example]
        for text in [*texts, *(value for message in messages for value in message.values())]:
            if isinstance(text, str):
                check_unicode(text, where)
        if not self.options.control_tokens and "input_ids" not in example:
            self.spelled += filter(None, [self.control.spelled([*texts, *messages])])

    def _known(self, example: Example) -> Pieces | None:
        """Take the token ids that come with an example, if they are this tokenizer's own for its text."""
        tokens, where = example.get("input_ids"), example.get("where")
        if tokens is None:
            return None
        mask = example.get("completion_mask")
        tokens, mask = (
            ids_of(tokens, where, "input_ids", 2**31 - 1),
            ([1] * len(tokens) if mask is None else ids_of(mask, where, "completion_mask", 1)),
        )
        if len(mask) != len(tokens):
            raise UserError(f"{where}: input_ids and completion_mask do not fit", "give as many of both")
        written = [token for token, learnt in zip(tokens, mask, strict=True) if learnt]
        messages = example.get("messages")
        text = messages[-1]["content"] if messages else example.get("completion", example.get("text"))
        if text is not None and self._text(written) != text:
            return None  # another tokenizer's
        if (worst := max(tokens, default=0)) >= len(self.tokenizer):
            raise UserError(
                f"{where}: input_ids has {worst}, the tokenizer's last is {len(self.tokenizer) - 1}",
                "use the tokenizer that they were made with",
            )
        every = self.options.loss_on == "all"
        runs = itertools.groupby(zip(tokens, mask, strict=True), lambda pair: bool(pair[1]))
        return [([token for token, _ in run], every or learnt) for learnt, run in runs]

    def _text(self, tokens: list[int]) -> str | None:
        if max(tokens, default=0) >= len(self.tokenizer):
            return None
        plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(tokens, **plain))

    def _texts(self, chunk: list[Example]) -> Iterator[Pieces]:
        end = [] if self.end is None else [self.end]
        cut = [_text_pieces(example["text"]) for example in chunk]
        texts = [piece for pieces in cut for piece in pieces]
        encoded: list[Tokens] = []
        for at in range(0, len(texts), _PIECES):
            encoded += [np.array(tokens, np.int32) for tokens in self.ids(texts[at : at + _PIECES])]
        waiting = iter(encoded)
        for pieces in cut:
            parts = [(next(waiting), True) for _ in pieces]
            yield [(self.start, True), *parts, (end, True)] if parts else []

    def _pairs(self, chunk: list[Example]) -> Iterator[Pieces]:
        prompts = self.ids([example["prompt"] + self.options.separator for example in chunk], special=True)
        completions = self.ids([example["completion"] for example in chunk])
        every = self.options.loss_on == "all"
        for example, prompt, completion in zip(chunk, prompts, completions, strict=True):
            ended = self.end is not None and _ended(example)
            yield [(prompt, every), ([*completion, self.end] if ended else completion, True)]

    def _chats(self, chunk: list[Example]) -> Iterator[Pieces]:
        """Encode chats turn by turn: what precedes an answer as at inference, then the answer up to its end."""
        if chunk and not self.has_template:
            raise UserError(
                f"{chunk[0].get('where')} is a chat, but this tokenizer has no chat template",
                "add chat_template.jinja to the model, or use prompt and completion",
            )
        turns = [self._turns(example) for example in chunk]
        encoded = iter(self.chat_ids([text for parts in turns for text, _ in parts]))
        for example, parts in zip(chunk, turns, strict=True):
            so_far: list[int] = []
            shown, pieces = "", []
            for number, (text, learnt) in enumerate(parts, 1):
                tokens = next(encoded)
                new = tokens[len(so_far) :]
                if tokens[: len(so_far)] != so_far:  # merged across the boundary, where a model writes anew
                    new = self.chat_ids([text[len(shown) :]])[0]
                so_far, shown = so_far + new, text
                pieces += self._turn(new, learnt, ended=number < len(parts) or _ended(example))
            yield pieces

    def _turn(self, tokens: list[int], learnt: bool, ended: bool) -> Pieces:
        """Tell an answer with its end token from what the template puts after it, which no model writes."""
        every = self.options.loss_on == "all"
        after = next((place for place, token in enumerate(tokens, 1) if token in self.ends), None)
        if not learnt or after is None:
            return [(tokens, learnt or every)]
        return [(tokens[:after], True), (tokens[after:], every)] if ended else [(tokens[: after - 1], True)]

    def _turns(self, example: Example) -> list[tuple[str, bool]]:
        """Render a chat up to the start and the end of every answer; each text begins with the one before it.

        Raises: UserError when the template refuses the chat, or shows earlier turns differently later.
        """
        messages = example.get("messages") or [
            {"role": "user", "content": example["prompt"]},
            {"role": "assistant", "content": example["completion"]},
        ]
        if not self.options.control_tokens:
            messages = self.control.marked(messages)
        given = example.get("num_given", 0)
        stops = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant" and number >= given:
                stops += [(self._rendered(messages[:number], True, example), False)] if number else []
                stops.append((self._rendered(messages[: number + 1], False, example), True))
        if messages[-1]["role"] != "assistant":
            stops.append((self._rendered(messages, False, example), False))
        for (shorter, _), (text, _) in itertools.pairwise(stops):
            if not text.startswith(shorter):
                raise UserError(
                    f"{example.get('where')}: the chat template shows earlier turns differently in a longer chat",
                    "give one example per answer, as prompt (a list of messages) and completion",
                )
        return stops

    def _rendered(self, messages: list[dict[str, Any]], answering: bool, example: Example) -> str:
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answering
            )
        except (TemplateError, ValueError, TypeError, LookupError, ArithmeticError) as error:
            # Templates refuse by raising; what a bad one does is its own.
            raise UserError(f"{example.get('where')}: the chat template failed: {reason(error)}") from error
        return str(text)


def ids_of(value: Any, where: Any, name: str, most: int) -> list[int]:
    """Read whole numbers from 0 to `most`; booleans only where they mean 0 and 1. Raises: UserError."""
    found = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(found, Sequence) or isinstance(found, (str, bytes)):
        raise UserError(f"{where}: {name} is not a list", f"{name} is a list of whole numbers")
    if all(type(one) is int for one in found) and 0 <= min(found, default=0) <= max(found, default=0) <= most:
        return list(found)
    for one in found:
        fits = isinstance(one, Integral) and (most == 1 or not isinstance(one, bool))
        if not (fits and 0 <= one <= most):
            allowed = "0 (given) or 1 (learnt)" if most == 1 else "a token id: a whole number, 0 or more"
            raise UserError(f"{where}: {name} has {str(one)[:40]!r}", f"each is {allowed}")
    return [int(one) for one in found]


def _ended(example: Example) -> bool:
    """Whether the completion is whole, rather than what a model had written when its budget ended."""
    return bool(example.get("finish_reason") != "length")


def _text_pieces(text: str) -> list[str]:
    """Cut running text where a line begins, for a tokenizer needs many times a text's size."""
    pieces = []
    start = 0
    while len(text) - start > _PIECE:
        line = text.rfind("\n", start, start + _PIECE)
        end = start + _PIECE if line < start else line + 1
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]] if text[start:].strip() or pieces else []


def _joined(pieces: Pieces) -> Encoded:
    if not pieces:
        return Encoded(np.empty(0, np.int32), np.empty(0, np.int32))
    tokens = np.concatenate([np.asarray(part, np.int32) for part, _ in pieces])
    learnt = np.repeat([loss for _, loss in pieces], [len(part) for part, _ in pieces])
    labels = np.where(learnt, tokens, np.int32(IGNORED))
    labels[:1] = IGNORED  # nothing predicts the first token
    return Encoded(tokens, labels)


def _windows(pieces: Pieces, length: int) -> Iterator[Encoded]:
    """Cut running text into windows that share nothing; a last single token has nothing to learn."""
    tokens = _joined(pieces).input_ids
    for start in range(0, len(tokens) - 1, length):
        window = tokens[start : start + length].copy()
        labels = window.copy()
        labels[0] = IGNORED
        yield Encoded(window, labels)
