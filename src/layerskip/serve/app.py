"""The routes: OpenAI's, and what a server needs around them. Starlette and FastAPI are used here and in `errors`.

app = create_app(Service(lm, ServeOptions(), name="mine"))
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from layerskip.errors import UserError, nearest
from layerskip.serve import errors
from layerskip.serve.guard import Guard
from layerskip.serve.protocol import Asked, ChatRequest, CompletionRequest, TokenizeRequest
from layerskip.serve.replies import chat_logprobs, text_logprobs
from layerskip.serve.worker import BrokenError, BusyError, DrainingError, GoneError

if TYPE_CHECKING:
    from layerskip.serve.metrics import Metrics
    from layerskip.serve.service import Exchange, Service

log = logging.getLogger("layerskip.serve")
PAGE = Path(__file__).with_name("page")
PAGE_FILES = {"": "index.html", "page.js": "page.js", "page.css": "page.css"}
LOOK_S = 0.2  # how often a client that waits is looked for


def create_app(service: Service, metrics: Metrics | None = None, key: str | None = None) -> FastAPI:
    """Make the application. The worker is started and stopped with it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if not service.ready:
            await asyncio.to_thread(service.start)
        yield
        service.worker.stop()

    app = FastAPI(title="layerskip", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    settings = service.settings
    app.add_middleware(
        Guard, key=key, body=settings.body, local=settings.is_local, origins=tuple(settings.cors_origin or ())
    )
    answering = Answers(service)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        return errors.answer(400, *_worded(error, request))

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        return errors.answer(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> JSONResponse:
        status, body, _ = errors.told(error, request.headers.get("x-request-id", "its path"))
        return JSONResponse(body, status)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, asked: ChatRequest) -> Response:
        return await answering.answer(request, asked)

    @app.post("/v1/completions")
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        return await answering.answer(request, asked)

    @app.post("/tokenize")
    async def tokenize(asked: TokenizeRequest) -> Response:
        if (asked.prompt is None) == (asked.messages is None):
            return errors.answer(400, "give a prompt or messages", "prompt")
        told = asked.prompt if asked.messages is None else [message.told for message in asked.messages]
        try:
            ids = await asyncio.to_thread(service.lm.encode, told)
        except UserError as error:
            return errors.answer(400, str(error))
        return JSONResponse({"count": len(ids), "max_model_len": settings.context, "tokens": ids})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.about()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != service.name:
            return _no_such(name, service)
        return JSONResponse(service.about())

    @app.get("/health")
    async def health() -> Response:
        """Say whether the process can serve at all."""
        if service.ready and not service.worker.healthy:
            return errors.answer(503, f"the worker has ended: {service.worker.fault!r}; restart the server")
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        """Say whether new requests are taken."""
        if not service.ready or service.worker.draining or not service.worker.healthy:
            return errors.answer(503, "not ready: loading, shutting down, or broken; see /health")
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def told_metrics() -> Response:
        if metrics is None:
            return errors.answer(404, "this server keeps no metrics")
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    for name, file in PAGE_FILES.items():
        app.add_api_route(f"/{name}", _sent(PAGE / file), include_in_schema=False)
    return app


def _sent(file: Path) -> Any:
    async def send() -> FileResponse:
        return FileResponse(file)

    return send


def _no_such(name: str | None, service: Service) -> JSONResponse:
    return errors.answer(
        404, f"no model {name!r} here; this server has {service.name!r}", "model", "model_not_found"
    )


def _worded(error: RequestValidationError, request: Request) -> tuple[str, str | None]:
    """Say what is wrong with a body, and where; the nearest key for one that is not known."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    name = ".".join(place)
    if first["type"] == "json_invalid":
        return "the body is not JSON", None
    if first["type"] == "extra_forbidden" and len(place) == 1:
        kind = ChatRequest if "chat" in request.url.path else CompletionRequest
        return f"unknown key {name!r}; {nearest(name, kind.model_fields)}", name
    return f"{name or 'the body'}: {first['msg']}", name or None


class Answers:
    """Answer requests of both kinds, whole or streamed."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def answer(self, request: Request, asked: Asked) -> Response:
        service, began = self._service, time.monotonic()
        request_id = request.headers.get("x-request-id", "")[:64] or secrets.token_hex(8)
        host = request.client.host if request.client else ""
        client = f"{request.headers.get('authorization', '')} {host}"
        headers = {"X-Request-Id": request_id}
        try:
            loop = asyncio.get_running_loop()
            exchange = await asyncio.to_thread(service.exchange, asked, client, loop)
            service.worker.submit(*exchange.jobs)
        except LookupError as error:
            return _no_such(str(error.args[0]), service)
        except (UserError, BusyError, BrokenError, DrainingError) as error:
            status, body, more = errors.told(error, request_id)
            log.info("%s refused with %d: %s", request_id, status, body["error"]["message"])
            return JSONResponse(body, status, headers=headers | more)
        self._note(request_id, exchange, "taken", asked)
        if asked.stream:
            lines = self._streamed(exchange, asked, request_id, began)
            return StreamingResponse(
                lines, media_type="text/event-stream", headers=headers | {"Cache-Control": "no-cache"}
            )
        try:
            gathered = await self._gathered(request, exchange)
        except Exception as error:  # noqa: BLE001 - whatever it is, this request has failed and no other
            return self._failed(error, exchange, request_id, headers)
        finally:
            self._leave(exchange)
        self._note(request_id, exchange, f"done in {time.monotonic() - began:.2f} s", asked)
        return JSONResponse(self._whole(exchange, asked, gathered), headers=headers)

    async def _gathered(self, request: Request, exchange: Exchange) -> list[list[dict[str, Any]]]:
        """Collect what rounds add, choice by choice, unless the client goes away. Raises: what ended a job."""
        gathered: list[list[dict[str, Any]]] = [[] for _ in exchange.jobs]

        async def collect() -> None:
            async for place, added in exchange.rounds():
                gathered[place].append(added)

        work = asyncio.create_task(collect())
        try:
            while not (await asyncio.wait([work], timeout=LOOK_S))[0]:
                if await request.is_disconnected():
                    raise GoneError
            work.result()
        finally:
            work.cancel()
        return gathered

    def _whole(
        self, exchange: Exchange, asked: Asked, gathered: list[list[dict[str, Any]]]
    ) -> dict[str, Any]:
        chat = isinstance(asked, ChatRequest)
        choices = []
        for place, (reply, parts) in enumerate(zip(exchange.replies, gathered, strict=True)):
            entries = None
            if reply.top is not None:
                entries = [entry for part in parts for entry in part.get("logprobs", ())]
            choice: dict[str, Any] = {"index": place, "finish_reason": reply.finish}
            if chat:
                choice["message"] = {"role": "assistant", "content": reply.text, "refusal": None}
                choice["logprobs"] = chat_logprobs(entries)
            else:
                echoed = self._echoed(exchange, asked, place)
                choice["text"] = echoed + reply.text
                choice["logprobs"] = text_logprobs(entries, len(echoed))
            if asked.layerskip.rounds:
                choice["layerskip"] = {"rounds": [part["round"] for part in parts]}
            choices.append(choice)
        kind = "chat.completion" if chat else "text_completion"
        return self._head(exchange, kind) | {"choices": choices, "usage": exchange.usage()}

    def _echoed(self, exchange: Exchange, asked: Asked, place: int) -> str:
        if not getattr(asked, "echo", False):
            return ""
        prompt = exchange.prompts[place // (asked.n or 1)]
        return str(self._service.lm.tokenizer.decode(prompt, skip_special_tokens=True))

    def _head(self, exchange: Exchange, kind: str) -> dict[str, Any]:
        return {"id": exchange.id, "object": kind, "created": exchange.created, "model": self._service.name}

    async def _streamed(
        self, exchange: Exchange, asked: Asked, request_id: str, began: float
    ) -> AsyncIterator[bytes]:
        """Yield server-sent events; the client's leaving ends the generator, and with it the jobs."""
        chat = isinstance(asked, ChatRequest)
        head = self._head(exchange, "chat.completion.chunk" if chat else "text_completion")
        wanted = asked.stream_options is not None and asked.stream_options.include_usage
        if wanted:
            head["usage"] = None
        begun = set[int]()
        try:
            async for place, added in exchange.rounds():
                choice = self._piece(exchange, asked, place, added, place not in begun)
                if choice is None:
                    continue
                begun.add(place)
                yield _event(head | {"choices": [choice]})  # goes on once the client's buffers take it
            if wanted:
                yield _event(head | {"choices": [], "usage": exchange.usage()})
            yield b"data: [DONE]\n\n"
            self._note(request_id, exchange, f"done in {time.monotonic() - began:.2f} s", asked)
        except Exception as error:  # noqa: BLE001 - the stream has begun: the error is its last event
            answered = self._failed(error, exchange, request_id, {})
            yield b"data: " + bytes(answered.body) + b"\n\n"
        finally:
            self._leave(exchange)

    def _piece(
        self, exchange: Exchange, asked: Asked, place: int, added: dict[str, Any], first: bool
    ) -> dict[str, Any] | None:
        """A choice of a chunk; None for a round that says nothing (part of a prompt, part of a character)."""
        reply = exchange.replies[place]
        entries = added.get("logprobs")
        if not (added["text"] or entries or reply.finish or "round" in added):
            return None
        choice: dict[str, Any] = {"index": place, "finish_reason": reply.finish}
        if isinstance(asked, ChatRequest):
            choice["delta"] = ({"role": "assistant"} if first else {}) | {"content": added["text"]}
            choice["logprobs"] = chat_logprobs(entries)
        else:
            echoed = self._echoed(exchange, asked, place) if first or entries else ""
            choice["text"] = (echoed if first else "") + added["text"]
            choice["logprobs"] = text_logprobs(entries, len(echoed) + added.get("offset", 0))
        if "round" in added:
            choice["layerskip"] = {"rounds": [added["round"]]}
        return choice

    def _failed(
        self, error: Exception, exchange: Exchange, request_id: str, headers: dict[str, str]
    ) -> JSONResponse:
        started = any(job.started is not None for job in exchange.jobs)
        status, body, more = errors.told(error, request_id, started)
        level = logging.ERROR if status == 500 else logging.INFO
        log.log(level, "%s failed with %d", request_id, status, exc_info=error if status == 500 else None)
        return JSONResponse(body, status, headers=headers | more)

    def _leave(self, exchange: Exchange) -> None:
        for job in exchange.jobs:
            if not job.over:
                self._service.worker.cancel(job)

    def _note(self, request_id: str, exchange: Exchange, what: str, asked: Asked) -> None:
        tokens, made = sum(map(len, exchange.prompts)), sum(reply.tokens for reply in exchange.replies)
        log.info("%s %s: %d prompt tokens, %d written", request_id, what, tokens, made)
        if self._service.settings.log_prompts:
            log.info("%s %s", request_id, asked.model_dump_json(exclude_none=True))
            log.info("%s %s", request_id, json.dumps([reply.text for reply in exchange.replies]))


def _event(told: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(told, ensure_ascii=False).encode() + b"\n\n"
