"""What the load generator says is what happened, and both verbs tell what is wrong."""

import json

import pytest
from serving import free_port, language_model, serving
from typer.testing import CliRunner

from layerskip.cli.main import app
from layerskip.errors import UserError
from layerskip.serve.load import Answer, Target, measured, percentiles, summary


def ran(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.fixture(scope="module")
def server():
    with serving(language_model(), rows=2, queue=2, context=200) as running:
        yield running


def test_what_is_told_is_what_the_server_counted(server):
    told, answers = measured(
        Target(server.url), ["Hello.", "Go on."], 6, 2, 12, temperature=0, ignore_eos=True
    )
    assert told["failed"] == 0
    assert told["tokens"] == 6 * 12 == sum(answer.tokens for answer in answers)
    assert answers[0].text == answers[2].text != answers[1].text
    for answer in answers:
        assert 0 < answer.first_s < answer.whole_s
        assert answer.each_s > 0
    assert told["first_s"]["p50"] <= told["first_s"]["p95"] <= told["first_s"]["p99"]


def test_errors_are_counted_by_what_they_say_and_tried_again_if_asked(server):
    step = server.worker.engine.step
    server.worker.engine.step = lambda: (__import__("time").sleep(0.01), step())[1]
    try:
        told, _ = measured(Target(server.url), ["Hello."], 12, 12, 40, temperature=0, ignore_eos=True)
        assert told["failed"] > 0
        assert told["errors"] == {"status 429": told["failed"]}
        told, answers = measured(
            Target(server.url), ["Hello."], 12, 12, 10, retries=12, temperature=0, ignore_eos=True
        )
        assert told["failed"] == 0
        assert any(answer.retried for answer in answers)
    finally:
        server.worker.engine.step = step


def test_percentiles_are_the_smallest_values_that_so_many_do_not_pass():
    assert percentiles([None]) is None
    assert percentiles([float(i) for i in range(1, 101)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert percentiles([3.0]) == {"p50": 3.0, "p95": 3.0, "p99": 3.0}
    told = summary([Answer(error="x"), Answer(tokens=3, first_s=0.1, whole_s=0.3)], 2.0)
    assert (told["failed"], told["tokens_per_s"], told["each_s"]["p50"]) == (1, 1.5, pytest.approx(0.1))


def test_the_verb_prints_it_and_ends_with_1_where_requests_failed(server):
    done = ran("bench-serve", server.url, "--requests", 4, "--at-once", 2, "--max-tokens", 5, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["requests"] == 4
    shown = ran("bench-serve", server.url, "--requests", 2, "--max-tokens", 5)
    assert "time to first token" in shown.output
    assert ran("bench-serve", server.url, "--requests", 1, "--model", "other").exit_code == 1


def test_no_server_is_said():
    port = free_port()
    with pytest.raises(UserError, match="does not answer"):
        measured(Target(f"127.0.0.1:{port}"), ["x"], 1, 1, 1)
    with pytest.raises(UserError, match="no address"):
        Target("ftp://x").connection()


def test_serve_tells_what_is_wrong_before_it_loads_anything(tmp_path, monkeypatch):
    empty = tmp_path / "key"
    empty.write_text("\n")
    done = ran("serve", tmp_path, "--api-key-file", empty)
    assert isinstance(done.exception, UserError)
    assert "is empty" in done.exception.message
    done = ran("serve", tmp_path, "--port", 99999)
    assert "--port must be" in str(done.exception)
