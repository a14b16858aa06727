"""A real server on loopback with a tiny model, in this process, for the tests of this folder."""

import asyncio
import contextlib
import http.client
import json
import logging
import socket
import threading
import time

import uvicorn

import tiny
from layerskip.decode.language_model import LanguageModel
from layerskip.serve.app import create_app
from layerskip.serve.metrics import Metrics
from layerskip.serve.service import Service
from layerskip.serve.settings import ServeOptions

DRAFTS = {"exit_layer": 2, "draft_length": 3}


def language_model(dtype=None, kind="hf"):
    """A model that writes bytes; its second exit agrees about half of the time."""
    from layerskip.decode.load import resolve_device
    from layerskip.model.huggingface import HuggingFaceStack
    from layerskip.model.native.stack import NativeStack

    model, words = tiny.speaking()
    if dtype is not None:
        model = model.to(dtype)
    assert resolve_device("cpu").type == "cpu"
    stack = NativeStack(model) if kind == "native" else HuggingFaceStack(model)
    return LanguageModel(stack, words, hf=model)


class Server:
    """What tests ask of a server that runs in a thread of this process."""

    def __init__(self, service, metrics, listener):
        self.service, self.metrics, self.listener = service, metrics, listener
        self.port = listener.getsockname()[1]
        self.lm, self.worker = service.lm, service.worker

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method, path, body=None, headers=None, raw=None):
        """One request: (status, headers, parsed body)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        told = {"Content-Type": "application/json"} | (headers or {})
        connection.request(method, path, raw if raw is not None else body and json.dumps(body), told)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        with contextlib.suppress(ValueError):
            content = json.loads(content)
        return answer.status, dict(answer.getheaders()), content

    def chat(self, text="Tell me more.", **more):
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 24} | more
        return self.ask("POST", "/v1/chat/completions", body)

    def complete(self, prompt="abc", **more):
        return self.ask(
            "POST", "/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": 24} | more
        )

    def stream(self, path, body, reading=None):
        """Open a stream; yields parsed events, "[DONE]" included."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(
            "POST", path, json.dumps(body | {"stream": True}), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        if reading is not None:
            reading.append((connection, answer))
        for line in answer:
            if line.startswith(b"data: "):
                told = line[6:].strip()
                yield told.decode() if told == b"[DONE]" else json.loads(told)
        connection.close()

    def until(self, condition, seconds=20):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it does not come true"
            time.sleep(0.01)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(lm, key=None, **settings):
    """Run a server with a model until the block ends."""
    metrics = Metrics("tiny")
    service = Service(lm, ServeOptions(port=0, **{"rows": 4, "context": 256, **settings}), "tiny", metrics)
    app = create_app(service, metrics, key)
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="on")
    server = uvicorn.Server(config)
    logging.getLogger("layerskip.serve").setLevel(logging.CRITICAL)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield Server(service, metrics, server.servers[0].sockets[0])
    finally:
        server.should_exit = True
        thread.join(20)


__all__ = ["DRAFTS", "Server", "free_port", "language_model", "serving"]
