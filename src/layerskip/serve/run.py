"""Run a server until it is told to stop: it takes no more requests then, finishes those it has, leaves with 0."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import uvicorn

if TYPE_CHECKING:
    from types import FrameType

    from fastapi import FastAPI

    from layerskip.serve.service import Service

DRAIN_S = 120.0  # how long running requests may take once the server is told to stop
BACKLOG = 512


class Server(uvicorn.Server):
    """uvicorn, but for signals: the first one drains (new requests get 503), a second one ends at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._told = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, without waiting in a signal handler."""
        if self._told:
            self.should_exit = self.force_exit = True
            return
        self._told = True
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        self._service.worker.drain(DRAIN_S)
        time.sleep(0.2)  # the last bytes of answers are on their way
        self.should_exit = True


class AsJson(logging.Formatter):
    """A line of JSON per record."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            told["error"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False)


def log_to(stream: Any = sys.stderr) -> None:
    """Send what the server logs to a stream, a line of JSON per record; of uvicorn what is amiss."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(AsJson())
    for name, level in (("layerskip", logging.INFO), ("uvicorn", logging.WARNING)):
        own = logging.getLogger(name)
        own.handlers, own.propagate = [handler], False
        own.setLevel(level)


def run(app: FastAPI, service: Service) -> None:
    """Serve until SIGTERM or SIGINT. Raises: OSError where the address cannot be had."""
    settings = service.settings
    config = uvicorn.Config(
        app, host=settings.host, port=settings.port, log_config=None, access_log=False, backlog=BACKLOG,
        timeout_graceful_shutdown=5, server_header=False, timeout_keep_alive=30,
    )  # fmt: skip
    server = Server(config, service)
    asyncio.run(_served(server))


async def _served(server: Server) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.handle_exit, number, None)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    await server.serve()
