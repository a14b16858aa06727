"""What clients send, as OpenAI has it, and what it asks of the model.

A key that is not known is an error that names the nearest one, as everywhere here. Keys of OpenAI that change
nothing about the text (`user`, `store`, `metadata`, ...) are taken; those that would (tools, audio) are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from layerskip.checkpoint.facts import MOST_DRAFTS
from layerskip.errors import UserError

Whole = Annotated[int, Field(strict=True)]
Real = Annotated[float, Field(allow_inf_nan=False)]
MODES = Literal["ar", "early-exit", "self-speculative"]
DRAFTERS = Literal["auto", "exit", "lookup", "off"]
POLICIES = Literal["fixed", "confidence", "adaptive"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Part(Strict):
    """A part of a message: text alone, for the model reads nothing else."""

    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None

    @property
    def told(self) -> dict[str, str]:
        """As chat templates read it."""
        text = (
            self.content
            if isinstance(self.content, str)
            else "".join(part.text for part in self.content or ())
        )
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class JsonSchema(Strict):
    name: str = "schema"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Own(Strict):
    """Our own settings of a request: who drafts, and whether rounds are told beside the text."""

    mode: MODES | None = None
    drafter: DRAFTERS | None = None
    exit_layer: Whole | None = Field(default=None, ge=0)
    draft_length: Whole | None = Field(default=None, ge=0, le=MOST_DRAFTS)
    policy: POLICIES | None = None
    rounds: bool = False


class Shared(Strict):
    """What both ways of asking have."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Real | None = Field(None, ge=0, le=2)
    top_p: Real | None = Field(None, gt=0, le=1)
    top_k: Whole | None = Field(None, ge=-1)
    min_p: Real | None = Field(None, ge=0, lt=1)
    repetition_penalty: Real | None = Field(None, gt=0, le=10)
    presence_penalty: Real | None = Field(None, ge=-2, le=2)
    frequency_penalty: Real | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Real] | None = None
    seed: Whole | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    n: Whole | None = Field(None, ge=1)
    ignore_eos: bool = False
    user: str | None = None
    layerskip: Own = Own()

    def keywords(self) -> dict[str, Any]:
        """The keywords of `generate` for what is said here."""
        own = self.layerskip.model_dump(exclude={"rounds"}, exclude_none=True)
        told = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": max(0, self.top_k) if self.top_k is not None else None,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "stop": ((self.stop,) if isinstance(self.stop, str) else tuple(self.stop)) if self.stop else None,
            "eos_token_id": () if self.ignore_eos else None,
        }
        return own | {name: value for name, value in told.items() if value is not None}


class ChatRequest(Shared):
    """The body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: Whole | None = Field(None, ge=1)
    max_completion_tokens: Whole | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    def prompts(self) -> list[Any]:
        return [[message.told for message in self.messages]]

    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def top(self) -> int | None:
        """Say how many alternatives are told with each token's log-probability; None: no log-probabilities.

        Raises: UserError for alternatives without them.
        """
        if self.top_logprobs and not self.logprobs:
            raise UserError("top_logprobs needs logprobs", "set logprobs to true")
        return (self.top_logprobs or 0) if self.logprobs else None

    def refuse(self) -> None:
        """Refuse what this server does not do. Raises: UserError."""
        if self.tools or self.tool_choice not in (None, "none"):
            raise UserError("tools are not supported", "ask for JSON with response_format")


class CompletionRequest(Shared):
    """The body of `POST /v1/completions`."""

    prompt: str | list[str] | list[Whole] | list[list[Whole]]
    max_tokens: Whole | None = Field(16, ge=1)
    logprobs: Whole | None = Field(None, ge=0, le=20)
    echo: bool = False
    suffix: str | None = None
    best_of: Whole | None = Field(None, ge=1)
    response_format: ResponseFormat | None = None

    def prompts(self) -> list[Any]:
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def limit(self) -> int | None:
        return self.max_tokens

    def top(self) -> int | None:
        return self.logprobs

    def refuse(self) -> None:
        """Refuse what this server does not do. Raises: UserError."""
        if self.suffix is not None:
            raise UserError("suffix is not supported", "put what comes before into the prompt")
        if self.best_of not in (None, self.n or 1):
            raise UserError("best_of is not supported", "ask for n choices and choose")


Asked = ChatRequest | CompletionRequest


class TokenizeRequest(Strict):
    """The body of `POST /tokenize`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
