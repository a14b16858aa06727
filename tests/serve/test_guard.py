"""Keys, origins, names, headers; what a model prints stays text; the API's own description, fuzzed."""

import logging

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from serving import language_model, serving

ORIGIN = "https://example.org"


@pytest.fixture(scope="module")
def lm():
    return language_model()


def test_without_the_key_nothing_is_done(lm):
    with serving(lm, key="secret") as server:
        for path in ("/v1/models", "/metrics"):
            status, headers, told = server.ask("GET", path)
            assert status == 401
            assert told["error"]["code"] == "invalid_api_key"
            assert headers["www-authenticate"] == "Bearer"
        for key in ("Bearer wrong", "Bearer secre", "secret2", "Bearer sécret"):
            assert server.ask("GET", "/v1/models", headers={"Authorization": key.encode("utf-8")})[0] == 401
        assert server.ask("GET", "/v1/models", headers={"Authorization": "Bearer secret"})[0] == 200
        assert server.ask("GET", "/health")[0] == 200
        assert server.ask("GET", "/")[0] == 200


def test_pages_elsewhere_may_not_call_unless_they_are_named(lm):
    with serving(lm) as server:
        headers = server.ask("GET", "/v1/models", headers={"Origin": ORIGIN})[1]
        assert "access-control-allow-origin" not in headers
        asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
        assert server.ask("OPTIONS", "/v1/completions", headers=asked)[0] == 405
        simple = {"Origin": ORIGIN, "Content-Type": "text/plain"}
        assert server.ask("POST", "/v1/completions", {"prompt": "x"}, simple)[0] == 415
    with serving(lm, cors_origin=[ORIGIN]) as server:
        status, headers, _ = server.ask("OPTIONS", "/v1/completions", headers=asked)
        assert status == 204
        assert headers["access-control-allow-origin"] == ORIGIN
        other = server.ask("GET", "/v1/models", headers={"Origin": "https://else.where"})[1]
        assert "access-control-allow-origin" not in other


def test_a_local_server_answers_to_its_own_names_alone(lm):
    with serving(lm) as server:
        assert server.ask("GET", "/v1/models", headers={"Host": "evil.example:80"})[0] == 403
        assert server.ask("GET", "/v1/models", headers={"Host": "localhost:8000"})[0] == 200
        assert server.ask("GET", "/v1/models", headers={"Host": "[::1]:8000"})[0] == 200
    with serving(lm, host="0.0.0.0") as server:
        assert server.ask("GET", "/v1/models", headers={"Host": "model.example"})[0] == 200


def test_the_page_comes_from_here_and_runs_nothing_else(lm):
    with serving(lm) as server:
        status, headers, page = server.ask("GET", "/")
        assert status == 200
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        for part in (page, server.ask("GET", "/page.js")[2], server.ask("GET", "/page.css")[2]):
            text = part.decode()
            assert "http://" not in text
            assert "https://" not in text
            assert "innerHTML" not in text
            assert "style=" not in text
            assert " onclick" not in text


def test_prompts_and_answers_are_logged_only_when_asked_for(lm, caplog):
    for log_prompts in (False, True):
        caplog.clear()
        with serving(lm, log_prompts=log_prompts) as server:
            logger = logging.getLogger("layerskip.serve")
            with caplog.at_level(logging.INFO, logger="layerskip.serve"):
                logger.setLevel(logging.INFO)
                text = server.chat("my little secret")[2]["choices"][0]["message"]["content"]
        said = caplog.text
        assert ("my little secret" in said) == log_prompts
        assert "prompt tokens" in said
        assert text


def test_the_described_interface_never_fails_by_itself(lm):
    """Requests made up from the server's own OpenAPI description: none ends in a 5xx."""
    with serving(lm, rows=2, context=96, timeout=20) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        tried = []

        def tried_out(operation):
            @settings(max_examples=12, deadline=None, suppress_health_check=[*HealthCheck], database=None)
            @given(case=operation.as_strategy())
            def one(case):
                if isinstance(case.body, dict) and case.method == "POST":
                    case.body = {**case.body, "max_tokens": 2}
                answer = case.call(base_url=server.url)
                tried.append(answer.status_code)
                assert answer.status_code < 500, (operation.label, answer.status_code, answer.text)

            one()

        for found in schema.get_all_operations():
            tried_out(found.ok())
        assert len(tried) > 40
        assert server.chat()[0] == 200
