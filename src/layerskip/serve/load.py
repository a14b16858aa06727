"""Load a server that speaks OpenAI's interface, with a fixed set of prompts and so many requests at a time.

    told = measured(Target("http://127.0.0.1:8000"), prompts, requests=64, at_once=8, max_tokens=128)

Every request is a stream. Time to first token is from sending to the first piece of text; time per token is what
followed over the tokens that followed, as the server's own usage counts them.
"""

from __future__ import annotations

import http.client
import json
import math
import threading
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from layerskip.errors import UserError
from layerskip.watch import Watch, silent

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Target:
    """A server: its address, the key it wants, the model asked for (None: the first it tells of)."""

    url: str
    key: str | None = None
    model: str | None = None
    timeout: float = 600.0

    def connection(self) -> tuple[http.client.HTTPConnection, str]:
        """Open a connection; the second is the path that stands before all routes. Raises: UserError."""
        parts = urllib.parse.urlsplit(self.url if "://" in self.url else f"http://{self.url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{self.url} is no address of a server", "give one such as http://127.0.0.1:8000")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname, parts.port, timeout=self.timeout), parts.path.rstrip("/").removesuffix(
            "/v1"
        )

    @property
    def headers(self) -> dict[str, str]:
        return {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {self.key}"} if self.key else {}
        )

    def first_model(self) -> str:
        """Ask what the server has. Raises: UserError where it does not answer as OpenAI's do."""
        try:
            connection, path = self.connection()
            connection.request("GET", f"{path}/v1/models", headers=self.headers)
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != 200:
                raise UserError(
                    f"{self.url} answers with status {answer.status}", "is a key wanted? --api-key-file"
                )
            return str(json.loads(body)["data"][0]["id"])
        except (OSError, ValueError, LookupError, http.client.HTTPException) as error:
            raise UserError(
                f"{self.url} does not answer as a server should: {error}", "is it running?"
            ) from error


@dataclass
class Answer:
    """What became of one request; seconds, and tokens as the server counts them."""

    text: str = ""
    first_s: float | None = None
    whole_s: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    accepted: int = 0
    rejected: int = 0
    retried: int = 0
    error: str | None = None

    @property
    def each_s(self) -> float | None:
        """Seconds a token behind the first one."""
        if self.first_s is None or self.tokens < 2:
            return None
        return (self.whole_s - self.first_s) / (self.tokens - 1)


@dataclass
class _Run:
    target: Target
    retries: int
    bodies: list[dict[str, Any]]
    answers: list[Answer]
    watch: Watch
    next: int = 0
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self) -> None:
        while True:
            with self.lock:
                place, self.next = self.next, self.next + 1
            if place >= len(self.bodies):
                return
            for attempt in range(self.retries + 1):
                answer = self.answers[place] = asked(self.target, self.bodies[place])
                answer.retried = attempt
                if answer.error is None or attempt == self.retries:
                    break
                time.sleep(min(2.0, 0.1 * 2**attempt))
            with self.lock:
                self.done += 1
                self.watch("requests", self.done, len(self.bodies))


def asked(target: Target, body: dict[str, Any]) -> Answer:
    """Send one request and read its stream; what goes wrong is its error."""
    answer, began = Answer(), time.perf_counter()
    try:
        connection, path = target.connection()
        connection.request("POST", f"{path}/v1/chat/completions", json.dumps(body), target.headers)
        response = connection.getresponse()
        if response.status != 200:
            answer.error = f"status {response.status}"
            response.read()
            return answer
        for line in response:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                told = chunk["error"]
                answer.error = str(told.get("message") if isinstance(told, dict) else told)
                break
            for choice in chunk["choices"]:
                piece = (choice.get("delta") or {}).get("content") or ""
                if piece and answer.first_s is None:
                    answer.first_s = time.perf_counter() - began
                answer.text += piece
            _count(answer, chunk.get("usage"))
        connection.close()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, http.client.HTTPException) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.whole_s = time.perf_counter() - began
    return answer


def _count(answer: Answer, usage: dict[str, Any] | None) -> None:
    if not usage:
        return
    answer.prompt_tokens, answer.tokens = usage["prompt_tokens"], usage["completion_tokens"]
    details = usage.get("completion_tokens_details") or {}
    answer.accepted = details.get("accepted_prediction_tokens") or 0
    answer.rejected = details.get("rejected_prediction_tokens") or 0


def measured(
    target: Target,
    prompts: Sequence[Any],
    requests: int,
    at_once: int,
    max_tokens: int,
    watch: Watch = silent,
    retries: int = 0,
    **more: Any,
) -> tuple[dict[str, Any], list[Answer]]:
    """Send requests, so many at a time, and sum up; `more` goes into every body.

    Prompts are texts or lists of messages, taken in turn. What fails is sent again `retries` times.
    Raises: UserError where the server does not answer.
    """
    model = target.model or target.first_model()
    bodies = []
    for place in range(requests):
        prompt = prompts[place % len(prompts)]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        common = {
            "model": model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": max_tokens,
        }
        bodies.append(common | {"messages": messages} | more)
    run = _Run(target, retries, bodies, [Answer() for _ in bodies], watch)
    began = time.perf_counter()
    threads = [threading.Thread(target=run.work, daemon=True) for _ in range(min(at_once, requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return summary(run.answers, time.perf_counter() - began) | {
        "model": model,
        "at_once": at_once,
    }, run.answers


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Percentiles in seconds, tokens per second over all requests, errors by what they say."""
    good = [answer for answer in answers if answer.error is None]
    errors: dict[str, int] = {}
    for answer in answers:
        if answer.error is not None:
            errors[answer.error] = errors.get(answer.error, 0) + 1
    tokens, drafted = sum(a.tokens for a in good), sum(a.accepted + a.rejected for a in good)
    return {
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "errors": errors,
        "seconds": seconds,
        "prompt_tokens": sum(a.prompt_tokens for a in good),
        "tokens": tokens,
        "tokens_per_s": tokens / seconds if seconds else None,
        "requests_per_s": len(good) / seconds if seconds else None,
        "acceptance": sum(a.accepted for a in good) / drafted if drafted else None,
        "first_s": percentiles([a.first_s for a in good]),
        "each_s": percentiles([a.each_s for a in good]),
        "whole_s": percentiles([a.whole_s for a in good]),
    }


def percentiles(values: Sequence[float | None]) -> dict[str, float] | None:
    """The smallest value that so many percent do not pass; None where there is none."""
    found = sorted(value for value in values if value is not None)
    if not found:
        return None
    return {f"p{p}": found[max(0, math.ceil(p / 100 * len(found)) - 1)] for p in PERCENTILES}
