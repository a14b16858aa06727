"""What stands before every route: the key, the size of a body, who may call from a page, how a page may behave."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, Any

from layerskip.serve import errors

if TYPE_CHECKING:
    from collections.abc import Sequence

OPEN = {"/", "/page.js", "/page.css", "/health", "/ready"}  # no key is asked for
READ_ON = 64 << 20  # bytes of a body that is too large, before the connection is cut
NAMES = {"localhost", "127.0.0.1", "[::1]"}  # what a server on loopback may be called
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class Guard:
    """ASGI middleware. On loopback a foreign Host header is refused: a web page may name this address its own."""

    def __init__(self, app: Any, key: str | None, body: int, local: bool, origins: Sequence[str]) -> None:
        self._app, self._key, self._most, self._local, self._origins = app, key, body, local, origins

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get("origin")
        allowed = origin if origin in self._origins or "*" in self._origins else None

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [*message.get("headers", ()), *HEADERS]
                if allowed is not None:
                    added += [(b"access-control-allow-origin", allowed.encode()), (b"vary", b"Origin")]
                message = {**message, "headers": added}
            await send(message)

        if scope["method"] == "OPTIONS" and allowed is not None:
            await self._preflight(scope, receive, sending)
            return
        refused = self._refused(scope, headers)
        if refused is not None:
            await refused(scope, receive, sending)
            return
        if scope["method"] != "POST":
            await self._app(scope, receive, sending)
            return
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client has gone
            body += message.get("body", b"")
            if len(body) > self._most:
                await self._too_large(scope, receive, sending)
                return
            if not message.get("more_body"):
                break
        whole: list[Any] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def receiving() -> Any:
            return whole.pop() if whole else await receive()

        await self._app(scope, receiving, sending)

    def _refused(self, scope: Any, headers: dict[str, str]) -> Any:
        host = headers.get("host", "").rsplit(":", 1)[0] if "]" not in headers.get("host", "") else "[::1]"
        if self._local and host not in NAMES:
            return errors.answer(403, f"this server is for this machine alone, not for {host[:100]!r}")
        if self._key is not None and scope["path"] not in OPEN:
            given = headers.get("authorization", "").removeprefix("Bearer ").strip()
            if not hmac.compare_digest(given.encode(), self._key.encode()):
                return errors.answer(
                    401, "a wrong key or none: send Authorization: Bearer KEY", code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        if scope["method"] == "POST":
            length = headers.get("content-length", "")
            if length.isdecimal() and int(length) > self._most:
                return self._too_large
            kind = headers.get("content-type", "").split(";")[0].strip().lower()
            if kind != "application/json":  # a page elsewhere cannot post this without asking for leave
                return errors.answer(415, "the body must be application/json")
        return None

    async def _too_large(self, scope: Any, receive: Any, send: Any) -> None:
        """Read on for a while, unkept: a client that is still sending would not see the answer."""
        left = READ_ON
        while left > 0:
            message = await receive()
            left -= len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body"):
                break
        text = f"the body is larger than {self._most} bytes"
        await errors.answer(413, text, headers={"Connection": "close"})(scope, receive, send)

    async def _preflight(self, scope: Any, receive: Any, send: Any) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": 204,
                "headers": [
                    (b"access-control-allow-methods", b"GET, POST"),
                    (b"access-control-allow-headers", b"authorization, content-type, x-request-id"),
                ],
            }
        )
        await send({"type": "http.response.body", "body": b""})
