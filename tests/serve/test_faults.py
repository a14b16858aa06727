"""Whatever goes wrong with one request, the others get their answers and the server stays."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from serving import free_port, language_model, serving

import tiny


@pytest.fixture(scope="module")
def lm():
    return language_model()


@pytest.fixture
def server(lm):
    with serving(lm, rows=2, queue=2, context=256) as running:
        yield running


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
ENDLESS = {"max_tokens": 240, "ignore_eos": True, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "Go on."}]}


def slowed(server, seconds=0.02):
    """Let every step of the engine take a while."""
    step = server.worker.engine.step

    def slow():
        time.sleep(seconds)
        return step()

    server.worker.engine.step = slow


def test_a_client_that_leaves_frees_its_row_within_a_round(server):
    slowed(server)
    held = []
    events = server.stream("/v1/chat/completions", CHAT | ENDLESS, held)
    next(events)
    assert server.worker.running == 1
    connection, _ = held[0]
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    server.until(lambda: server.worker.running == 0, 5)
    assert server.chat()[0] == 200


def test_a_client_that_waits_for_a_whole_answer_and_leaves_frees_its_row(server):
    slowed(server)
    sock = socket.create_connection(("127.0.0.1", server.port))
    body = json.dumps(CHAT | ENDLESS).encode()
    sock.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    server.until(lambda: server.worker.running == 1, 5)
    sock.close()
    server.until(lambda: server.worker.running == 0, 5)


def test_a_full_queue_says_when_to_come_again(server):
    slowed(server, 0.05)
    streams = [server.stream("/v1/chat/completions", CHAT | ENDLESS) for _ in range(2)]
    for stream in streams:
        next(stream)
    waiting = [threading.Thread(target=server.chat, kwargs={"max_tokens": 1}) for _ in range(2)]
    for thread in waiting:
        thread.start()
    server.until(lambda: server.worker.waiting == 2)
    status, headers, told = server.chat(max_tokens=1)
    assert status == 429
    assert int(headers["retry-after"]) >= 1
    assert told["error"]["type"] == "rate_limit_error"
    for stream in streams:
        stream.close()
    server.until(lambda: server.worker.running + server.worker.waiting == 0, 30)
    for thread in waiting:
        thread.join(10)
    assert server.chat()[0] == 200


class Broken:
    """A processor that fails, or hangs back, at its third call."""

    calls = 0

    def __call__(self, ids, scores):
        Broken.calls += 1
        if Broken.calls > 2:
            raise ZeroDivisionError("broken on purpose")
        return scores


@pytest.mark.parametrize("stream", [False, True])
def test_an_exception_in_a_processor_fails_its_request_with_500_and_an_id(server, monkeypatch, stream):
    Broken.calls = 0
    own = server.service._processors
    monkeypatch.setattr(
        server.service, "_processors", lambda asked, n: (Broken(),) if asked.seed == 13 else own(asked, n)
    )
    good = server.stream("/v1/chat/completions", CHAT | {"max_tokens": 60, "temperature": 0})
    next(good)
    if stream:
        *_, last = server.stream("/v1/chat/completions", CHAT | {"seed": 13, "temperature": 0})
        told = last
    else:
        status, headers, told = server.ask(
            "POST", "/v1/chat/completions", CHAT | {"seed": 13, "temperature": 0}, {"X-Request-Id": "my-id"}
        )
        assert status == 500
        assert headers["x-request-id"] == "my-id"
        assert "my-id" in told["error"]["message"]
    assert told["error"]["type"] == "server_error"
    assert "ZeroDivisionError" in told["error"]["message"]
    assert "on purpose" not in json.dumps(told), "what was raised may tell secrets"
    assert [*good][-1] == "[DONE]"
    assert server.ask("GET", "/health")[0] == 200


def test_an_exception_in_the_model_fails_the_rows_it_belongs_to(server, lm, monkeypatch):
    wanted = lm.generate(CHAT["messages"], mode="ar", max_new_tokens=24).text
    embed, bad = lm.stack.embed, lm.encode("#")[0]

    def poisoned(tokens, step):
        if (tokens == bad).any():
            raise RuntimeError("out of luck")
        return embed(tokens, step)

    monkeypatch.setattr(lm.stack, "embed", poisoned)
    status, _, told = server.chat("poison #")
    assert status == 500
    assert "RuntimeError" in told["error"]["message"]
    assert server.chat("Go on.")[2]["choices"][0]["message"]["content"] == wanted


def test_a_request_that_takes_too_long_is_ended(lm):
    with serving(lm, rows=2, timeout=0.3) as server:
        slowed(server, 0.05)
        status, _, told = server.ask("POST", "/v1/chat/completions", CHAT | ENDLESS)
        assert status == 504
        assert told["error"]["type"] == "timeout_error"
        server.until(lambda: server.worker.running == 0)


def test_bodies_are_bounded(lm):
    with serving(lm, body=4096) as server:
        assert server.ask("POST", "/v1/completions", {"prompt": "x" * 10_000_000})[0] == 413
        sock = socket.create_connection(("127.0.0.1", server.port))  # of a length it does not say
        sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(64):
                sock.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
            sock.sendall(b"0\r\n\r\n")
        assert b" 413 " in sock.recv(4096)[:20]
        sock.close()
        assert server.chat()[0] == 200


def test_text_of_any_kind_goes_in_and_out(server):
    for text in (
        "\0\x1b[31m",
        "\u202eabc\u202c",
        "👩\u200d👩\u200d👧",
        "é" * 40,
        "<script>alert(1)</script>",
        " ",
    ):
        status, _, told = server.chat(text)
        assert status == 200, text
        json.dumps(told)


def test_a_worker_that_died_is_told_by_health_and_to_all_who_wait(lm, monkeypatch):
    with serving(lm, rows=1) as server:

        def dies():
            raise SystemError("the worker itself is broken")

        monkeypatch.setattr(server.worker.scheduler, "step", dies)
        status, _, told = server.chat()
        assert status == 500
        assert told["error"]["type"] == "server_error"
        status, _, told = server.ask("GET", "/health")
        assert status == 503
        assert "broken" in told["error"]["message"]
        assert server.chat()[0] == 503
        assert server.ask("GET", "/ready")[0] == 503


# -- the process ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process(folder, *options):
    """`layerskip serve` itself, on a free port."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "layerskip",
        "serve",
        str(folder),
        "--port",
        str(port),
        "--threads",
        "1",
        *options,
    ]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 90
        while time.monotonic() < end and running.poll() is None:
            with contextlib.suppress(OSError):
                if asked(port, "GET", "/ready")[0] == 200:
                    break
            time.sleep(0.1)
        assert running.poll() is None, running.stderr.read()
        yield running, port
    finally:
        running.kill()
        running.wait()


def asked(port, method, path, body=None):
    from serving import Server

    return Server.ask(type("There", (), {"port": port})(), method, path, body)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("served")
    model, words = tiny.speaking()
    model.save_pretrained(made)
    words.save_pretrained(made)
    return made


@pytest.mark.slow
def test_sigterm_lets_running_requests_finish_refuses_new_ones_and_leaves_with_0(folder):
    with process(folder, "--rows", "2", "--context", "256") as (running, port):
        got = []
        body = CHAT | ENDLESS | {"max_tokens": 200}
        thread = threading.Thread(
            target=lambda: got.append(asked(port, "POST", "/v1/chat/completions", body))
        )
        thread.start()
        while b"num_requests_running{model_name=" not in (text := asked(port, "GET", "/metrics")[2]) or (
            b'num_requests_running{model_name="' + str(folder).encode() + b'"} 1.0' not in text
        ):
            time.sleep(0.01)
        running.send_signal(signal.SIGTERM)
        statuses = set()
        while running.poll() is None and not statuses:
            with contextlib.suppress(OSError):
                status = asked(port, "POST", "/v1/chat/completions", CHAT | {"max_tokens": 1})[0]
                if status != 200:
                    statuses.add(status)
        thread.join(60)
        assert got[0][0] == 200
        assert got[0][2]["usage"]["completion_tokens"] == 200
        assert statuses <= {503}
        assert running.wait(30) == 0
        assert "Traceback" not in running.stderr.read()


@pytest.mark.slow
def test_sigterm_ends_though_a_client_reads_nothing(folder):
    """What sockets hold is some megabytes: the answer is larger."""
    with process(folder, "--rows", "1", "--context", "256", "--choices", "32", "--stalled", "1") as (
        running,
        port,
    ):
        body = CHAT | ENDLESS | {"n": 32, "logprobs": True, "top_logprobs": 20}
        raw = json.dumps(body | {"stream": True}).encode()
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(HEAD + f"Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
            end = time.monotonic() + 60
            while b"num_requests_suspended{" not in (text := asked(port, "GET", "/metrics")[2]) or (
                b'num_requests_suspended{model_name="' + str(folder).encode() + b'"} 1.0' not in text
            ):
                assert time.monotonic() < end, text
                time.sleep(0.05)
            running.send_signal(signal.SIGTERM)
            assert running.wait(30) == 0


@pytest.mark.slow
def test_a_server_that_was_killed_starts_again(folder):
    for _ in range(2):
        with process(folder) as (running, port):
            assert asked(port, "POST", "/v1/chat/completions", CHAT | {"max_tokens": 4})[0] == 200
            os.kill(running.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_port_that_is_taken_is_said(folder):
    with process(folder) as (_, port):
        command = [sys.executable, "-m", "layerskip", "serve", str(folder), "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90)
        assert done.returncode == 2
        assert "choose another --port" in done.stderr


def test_rows_that_do_not_fit_are_refused_before_they_are_made(lm):
    from layerskip.errors import UserError
    from layerskip.serve.settings import ServeOptions, row_bytes

    each = row_bytes(lm.stack, 64)
    fitted = ServeOptions(context=64, memory=5.5 * each / 2**30).fitted(lm.stack)
    assert fitted.rows == 5
    with pytest.raises(UserError, match="9 rows of 64 tokens need"):
        ServeOptions(context=64, rows=9, memory=5.5 * each / 2**30).fitted(lm.stack)
    with pytest.raises(UserError, match="a row of 64 tokens needs"):
        ServeOptions(context=64, memory=0.5 * each / 2**30).fitted(lm.stack)
