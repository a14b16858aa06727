"""From rounds to what clients read: text in whole characters, log-probabilities, usage, the fate of every token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from layerskip.decode.text import TextStream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from layerskip.decode.request import Round

REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass
class Reply:
    """One choice on its way: `push` takes a round and returns what it adds to the answer."""

    tokenizer: Any
    stops: Sequence[str]
    top: int | None = None  # alternatives told with each token; None: no log-probabilities
    rounds_told: bool = False
    text: str = ""
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    finish: str | None = None
    spelled: int = 0  # characters of the tokens whose log-probabilities were told
    _stream: TextStream = field(init=False)

    def __post_init__(self) -> None:
        self._stream = TextStream(self.tokenizer, self.stops)

    def push(self, round: Round) -> dict[str, Any]:
        """Take a round; return {text, logprobs and their offset, round}, all but the first where asked for."""
        pieces = [self._stream.push([token]) for token in round.tokens]
        if round.finish_reason:
            self.finish = REASONS[round.finish_reason]
            pieces.append(self._stream.finish())
        added: dict[str, Any] = {"text": "".join(pieces)}
        self.text += added["text"]
        self.tokens += len(round.tokens)
        self.drafted += round.drafted
        self.accepted += round.accepted
        if self.top is not None and round.logprobs is not None:
            tops = round.top_logprobs or [[] for _ in round.tokens]
            added["logprobs"] = [
                {**self._token(token, value), "top_logprobs": [self._token(*one) for one in top]}
                for token, value, top in zip(round.tokens, round.logprobs, tops, strict=True)
            ]
            added["offset"] = self.spelled
            self.spelled += sum(len(entry["token"]) for entry in added["logprobs"])
        if self.rounds_told:
            added["round"] = self._told(round, pieces)
        return added

    def _token(self, token: int, value: float) -> dict[str, Any]:
        spelled = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return {"token": spelled, "logprob": max(value, -9999.0), "bytes": [*spelled.encode()]}

    def _told(self, round: Round, pieces: Sequence[str]) -> dict[str, Any]:
        """What a round was: its tokens by fate, the drafts that were rejected, what it cost."""
        fates = [round.source] * round.accepted + ["plain"] * (len(round.tokens) - round.accepted)
        rejected = [
            self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
            for token in round.draft[round.accepted : round.drafted]
        ]
        tokens = [{"text": text, "fate": fate} for text, fate in zip(pieces, fates, strict=False)]
        if len(pieces) > len(fates) and pieces[-1]:
            tokens.append({"text": pieces[-1], "fate": "plain"})
        return {
            "source": round.source, "exit_layer": round.exit_layer, "draft_length": len(round.draft),
            "tokens": tokens, "rejected": rejected, "seconds": round.step_s, "prompt_tokens": round.prompt_tokens,
        }  # fmt: skip


def usage(prompt: int, cached: int, replies: Sequence[Reply]) -> dict[str, Any]:
    """Count tokens as OpenAI does; rejected drafts are told, not charged."""
    made = sum(reply.tokens for reply in replies)
    accepted = sum(reply.accepted for reply in replies)
    rejected = sum(reply.drafted for reply in replies) - accepted
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": rejected,
        },
    }


def chat_logprobs(entries: Sequence[dict[str, Any]] | None) -> dict[str, Any] | None:
    return None if entries is None else {"content": list(entries), "refusal": None}


def text_logprobs(entries: Sequence[dict[str, Any]] | None, start: int = 0) -> dict[str, Any] | None:
    """The older shape, of completions: lists side by side."""
    if entries is None:
        return None
    offsets, at = [], start
    for entry in entries:
        offsets.append(at)
        at += len(entry["token"])
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [
            {one["token"]: one["logprob"] for one in entry["top_logprobs"]} for entry in entries
        ],
        "text_offset": offsets,
    }
