"""A client that reads slowly pauses its own request and nothing else; one that is stuck loses it."""

import contextlib
import http.client
import json
import re
import socket
import threading
import time
from dataclasses import replace

import pytest
import torch
from serving import DRAFTS, language_model, serving

import layerskip.serve.worker
from layerskip.decode.engine import Engine
from layerskip.decode.request import Request
from layerskip.decode.sampling import Processing, Sampling
from layerskip.serve.worker import Job

UNREAD = 4
CHAT = {"messages": [{"role": "user", "content": "Go on."}], "max_tokens": 240, "ignore_eos": True}
LOUD = {"logprobs": True, "top_logprobs": 20}  # some kilobytes an event, so that sockets hold few of them
GREEDY, SAMPLED = {"temperature": 0}, {"temperature": 0.9, "top_p": 0.95, "seed": 5}


@pytest.fixture(scope="module")
def lm():
    return language_model(torch.float32, "native")


@pytest.fixture(autouse=True)
def short_buffers(monkeypatch):
    monkeypatch.setattr(layerskip.serve.worker, "UNREAD", UNREAD)


@contextlib.contextmanager
def unread(server, **more):
    """A stream of which nothing has been read yet, on sockets that hold little."""
    server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of those it accepts
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.sock = sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.connect(("127.0.0.1", server.port))
    body = CHAT | GREEDY | LOUD | {"stream": True} | more
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    try:
        yield connection
    finally:
        connection.close()


def events(connection):
    """Read a stream to its end."""
    for line in connection.getresponse():
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            yield json.loads(line[6:])


def said(events):
    """The text of a stream, and the log-probabilities of its tokens."""
    choices = [event["choices"][0] for event in events]
    told = [entry for choice in choices for entry in choice["logprobs"]["content"]]
    return "".join(choice["delta"]["content"] for choice in choices), told


def progress(server):
    """How many tokens each running request has written."""
    return [job.made for job in [*server.worker._running.values()]]


def paused(server, rows=1):
    """Wait until so many rows are paused for good: the sockets are full, not only the event loop behind."""
    since, before = time.monotonic(), None

    def lasts():
        nonlocal since, before
        if server.worker.suspended != rows or progress(server) != before:
            since, before = time.monotonic(), progress(server)
        return time.monotonic() - since > 0.3

    server.until(lasts)


@pytest.mark.parametrize("law", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_paused_and_resumed_request_gets_what_it_gets_unpaused(lm, law):
    asked = law | {"layerskip": DRAFTS | {"policy": "fixed"}}
    with serving(lm, rows=2) as server:
        *unpaused, _ = server.stream("/v1/chat/completions", CHAT | LOUD | asked)
        wanted = said(unpaused)
        [drafted] = re.findall(rb'num_drafts_total{.*source="exit"} (.*)', server.ask("GET", "/metrics")[2])
        assert float(drafted) > 20
        with unread(server, **asked) as connection:
            paused(server)
            [paused_at] = progress(server)
            assert server.chat(max_tokens=100)[0] == 200, "the other row goes on"
            assert progress(server) == [paused_at]
            got, pauses = [], 0
            for event in events(connection):
                got.append(event)
                if len(got) % 8 == 0:  # it is paused again on the way
                    server.until(lambda: server.worker.suspended or not server.worker.running)
                    pauses += server.worker.suspended
            assert said(got) == wanted
            assert pauses > 2
        assert 0 < paused_at < 200, "it was paused well before its end"


def test_a_stuck_reader_is_cancelled_and_others_finish_meanwhile(lm):
    with serving(lm, rows=2, stalled=1.0) as server:
        most, watch = [0], server.worker._watch

        def watched(job, event):
            most[0] = max(most[0], job.reader.unread)
            watch(job, event)

        server.worker._watch = watched
        with unread(server) as connection:
            paused(server)
            assert server.chat(max_tokens=30)[0] == 200
            assert server.worker.suspended == 1, "it is still there"
            server.until(lambda: server.worker.running == 0, 10)
            assert all(server.chat(max_tokens=3, n=2)[0] == 200 for _ in range(2)), "both rows are free"
            *_, last = events(connection)
            assert "--stalled" in last["error"]["message"]
        assert most[0] <= UNREAD
        text = server.ask("GET", "/metrics")[2].decode()
        assert 'request_failure_total{model_name="tiny",reason="cancelled"} 1.0' in text
        assert 'num_requests_suspended{model_name="tiny"} 0.0' in text


def test_choices_of_one_stream_are_paused_and_cancelled_together(lm):
    with serving(lm, rows=1, stalled=1.0) as server, unread(server, n=8) as connection:
        paused(server)
        left = server.worker.waiting
        assert left > 3
        server.until(lambda: server.worker.running + server.worker.waiting < left)
        server.until(lambda: server.worker.running + server.worker.waiting == 0, 0.9)  # no second wait
        assert server.chat(max_tokens=3, n=2)[0] == 200
        *_, last = events(connection)
        assert "--stalled" in last["error"]["message"]


def test_a_reader_that_is_slow_but_not_stuck_is_not_cancelled(lm):
    """At the worker, since sockets come free in pieces of some twenty events, whatever is read of them."""
    with serving(lm, rows=1, stalled=1.0) as server:
        worker, got = server.worker, []
        job = Job(Request((5, 9, 20), 100), "somebody", got.append)
        worker.submit(job)
        began = time.monotonic()
        while time.monotonic() - began < 2.5:
            server.until(lambda: job.is_full)
            assert job.reader.unread == UNREAD
            worker.took(job.reader)
            time.sleep(0.1)
        while not job.over:
            server.until(lambda: job.reader.unread)
            worker.took(job.reader)
        assert sum(len(event.tokens) for event in got) == 100


def test_paused_rows_leave_the_limits_of_the_queue_and_of_time_as_they_are(lm):
    with serving(lm, rows=1, queue=1, timeout=1.5) as server, unread(server) as connection:
        paused(server)
        answers = []
        waiting = threading.Thread(target=lambda: answers.append(server.chat(max_tokens=1)))
        waiting.start()
        server.until(lambda: server.worker.waiting == 1)
        assert server.chat(max_tokens=1)[0] == 429
        server.until(lambda: server.worker.running == 0, 10)
        *_, last = events(connection)
        assert last["error"]["type"] == "timeout_error"
        waiting.join(10)
        assert answers[0][0] in (200, 504), "it came later, so it may have got the row"
        assert server.chat(max_tokens=1)[0] == 200


def test_one_who_waits_behind_paused_rows_is_told_that_it_is_late(lm):
    with serving(lm, rows=1) as server, unread(server):
        paused(server)
        server.service.settings = replace(server.service.settings, timeout=0.3)
        assert server.chat(max_tokens=1)[0] == 504


def test_the_worker_sleeps_while_all_rows_are_paused(lm):
    with serving(lm, rows=1) as server, unread(server):
        paused(server)
        waiting = threading.Thread(target=server.chat, kwargs={"max_tokens": 1}, daemon=True)
        waiting.start()
        server.until(lambda: server.worker.waiting == 1)
        steps, step = [], server.worker.scheduler.step
        server.worker.scheduler.step = lambda: (steps.append(1), step())[1]
        time.sleep(1.2)
        assert len(steps) < 6, "it looks twice a second"
        server.until(lambda: server.worker.healthy)


def test_a_paused_request_whose_client_leaves_frees_its_row(lm):
    with serving(lm, rows=1) as server:
        with unread(server):
            paused(server)
        server.until(lambda: server.worker.running == 0, 5)
        assert server.chat(max_tokens=3)[0] == 200


def test_draining_waits_for_a_paused_request_no_longer_than_it_may_be_stuck(lm):
    with serving(lm, rows=1, stalled=0.5) as server, unread(server):
        paused(server)
        assert not server.worker.drain(0.1)
        assert server.worker.drain(20)


# -- the engine ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [Sampling(), Sampling(temperature=0.9)], ids=["greedy", "sampled"])
def test_a_suspended_row_sits_out_and_goes_on_as_if_nothing_had_been(lm, law):
    def request(prompt):
        return Request(prompt, 40, 2, 3, processing=Processing(law), seed=3)

    def decoded(engine, suspended=None):
        made = {}
        while engine.busy:
            step = engine.step()
            for event in step:
                made.setdefault(event.row, []).extend(event.tokens)
            if not step:
                return made
        return made

    alone = Engine(lm.stack, rows=1, capacity=64)
    alone.add(request([5, 9, 20]))
    [wanted] = decoded(alone).values()
    engine = Engine(lm.stack, rows=2, capacity=64)
    row, other = engine.add(request([5, 9, 20])), engine.add(request([7, 8, 33]))
    before = []
    while len(before) < 10:
        before += [token for event in engine.step() if event.row == row for token in event.tokens]
    engine.suspend(row, True)
    meanwhile = decoded(engine)
    assert {*meanwhile} == {other}
    assert engine.busy, "its end is to come"
    assert engine.step() == []
    engine.suspend(row, False)
    assert before + decoded(engine)[row] == wanted
