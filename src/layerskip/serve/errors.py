"""Errors as OpenAI words them: a status, a type, a message that says what to do, an id to find it in the log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse

from layerskip.errors import UserError
from layerskip.serve.worker import BrokenError, BusyError, DrainingError, GoneError, LateError

if TYPE_CHECKING:
    from collections.abc import Mapping

TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error",
    415: "invalid_request_error", 429: "rate_limit_error", 503: "server_error", 504: "timeout_error",
}  # fmt: skip


def body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {
        "error": {"message": message, "type": TYPES.get(status, "server_error"), "param": param, "code": code}
    }


def answer(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(body(status, message, param, code), status, headers=dict(headers or {}))


def status_of(error: Exception) -> int:
    """Which status an error of a request has; what is nobody's fault but ours is 500."""
    if isinstance(error, BusyError):
        return 429
    if isinstance(error, (DrainingError, BrokenError)):
        return 503
    if isinstance(error, LateError):
        return 504
    if isinstance(error, GoneError):
        return 499
    return 400 if isinstance(error, UserError) else 500


def told(
    error: Exception, request_id: str, started: bool = False
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of a request's error; `started`: it had a row, so it was no bad request."""
    status = 500 if started and isinstance(error, UserError) else status_of(error)
    headers: dict[str, str] = {}
    code: str | None = None
    if isinstance(error, BusyError):
        headers["Retry-After"] = str(error.retry_s)
        message = f"too many requests wait; try again in {error.retry_s} s"
    elif isinstance(error, DrainingError):
        message = "the server is shutting down; ask another one"
    elif isinstance(error, BrokenError):
        message = "the server has failed and decodes no more: see its log and /health, and start it again"
    elif isinstance(error, LateError):
        message = "the request took longer than it may; ask for fewer tokens, or raise --timeout"
    elif isinstance(error, GoneError):
        message = "the request was cancelled: nothing of it was read for longer than --stalled"
    elif isinstance(error, UserError):
        message = str(error).replace("\n  ", "; ")
        if "context is" in error.message:
            code = "context_length_exceeded"
    else:
        name = type(error).__name__
        message = f"the server failed at this request ({name}); its log tells more under {request_id}"
    return status, body(status, message, code=code), headers
