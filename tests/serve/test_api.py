"""What clients of OpenAI's interface are told: answers, streams, log-probabilities, errors; as decoded alone."""

import asyncio
import json

import openai
import pytest
from serving import DRAFTS, language_model, serving


@pytest.fixture(scope="module")
def lm():
    return language_model()


@pytest.fixture(scope="module")
def server(lm):
    with serving(lm) as running:
        yield running


def alone(lm, text, chat=True, **options):
    options = {"max_new_tokens": 24, "mode": "ar", **options}
    return lm.generate([{"role": "user", "content": text}] if chat else text, **options)


def test_a_chat_is_answered_as_the_model_would_alone(server, lm):
    for own in ({}, DRAFTS, {"mode": "ar"}, {"drafter": "lookup"}):
        status, headers, told = server.chat("What is it?", layerskip=own)
        assert status == 200
        assert told["object"] == "chat.completion"
        assert headers["x-request-id"]
        [choice] = told["choices"]
        wanted = alone(lm, "What is it?")
        assert choice["message"]["content"] == wanted.text
        assert choice["finish_reason"] == {"eos": "stop", "length": "length"}[wanted.finish_reason]
        assert told["usage"]["completion_tokens"] == len(wanted.tokens)


def test_usage_tells_what_became_of_drafts(server):
    _, _, told = server.chat("Say it again, again, again.", max_tokens=60, layerskip=DRAFTS)
    details = told["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] > 0
    assert details["rejected_prediction_tokens"] > 0
    assert (
        told["usage"]["total_tokens"] == told["usage"]["prompt_tokens"] + told["usage"]["completion_tokens"]
    )
    _, _, plain = server.chat("Say it again, again, again.", max_tokens=60, layerskip={"mode": "ar"})
    assert plain["choices"][0]["message"]["content"] == told["choices"][0]["message"]["content"]
    assert plain["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == 0


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_joins_to_the_whole_answer(server, path):
    body = {
        "temperature": 0,
        "max_tokens": 40,
        "stream_options": {"include_usage": True},
        "layerskip": {"rounds": True},
    }
    body |= {"messages": [{"role": "user", "content": "Hä?"}]} if "chat" in path else {"prompt": "Hä?"}
    whole = server.ask("POST", path, {key: value for key, value in body.items() if key != "stream_options"})[
        2
    ]
    *events, last = server.stream(path, body)
    assert last == "[DONE]"
    usage = events.pop()
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    choices = [event["choices"][0] for event in events]
    if "chat" in path:
        assert choices[0]["delta"]["role"] == "assistant"
        text, wanted = (
            "".join(c["delta"]["content"] for c in choices),
            whole["choices"][0]["message"]["content"],
        )
    else:
        text, wanted = "".join(c["text"] for c in choices), whole["choices"][0]["text"]
    assert text == wanted
    assert [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"]
    fates = [token for c in choices for round in c["layerskip"]["rounds"] for token in round["tokens"]]
    assert "".join(token["text"] for token in fates) == text
    assert {token["fate"] for token in fates} <= {"plain", "exit", "lookup", "prefill"}


def test_several_choices_are_each_what_their_index_alone_gives(server, lm):
    _, _, told = server.complete("abc", n=3, temperature=0.9, seed=7, layerskip={"mode": "ar"})
    texts = [choice["text"] for choice in told["choices"]]
    assert len({*texts}) > 1
    wanted = list(lm.each(["abc"] * 3, temperature=0.9, seed=7, mode="ar", max_new_tokens=24))
    assert texts == [one.text for one in wanted]
    assert (
        server.complete("abc", n=3, temperature=0.9, seed=7, layerskip={"mode": "ar"})[2]["choices"]
        == told["choices"]
    )


def test_prompts_may_be_ids_or_many(server, lm):
    ids = lm.encode("xyz")
    one = server.complete("xyz")[2]["choices"][0]["text"]
    assert server.complete(ids)[2]["choices"][0]["text"] == one
    both = server.complete(["xyz", "abc"])[2]
    assert [choice["index"] for choice in both["choices"]] == [0, 1]
    assert both["choices"][0]["text"] == one
    assert server.complete([ids, ids])[2]["choices"][1]["text"] == one
    assert server.complete("xyz", echo=True)[2]["choices"][0]["text"] == "xyz" + one


def test_offsets_of_an_echoed_stream_are_those_of_the_whole_answer(server):
    """They were too small by the prompt in a stream."""
    asked = {"echo": True, "logprobs": 1, "max_tokens": 6}
    whole = server.complete("xyz", **asked)[2]["choices"][0]["logprobs"]["text_offset"]
    events = server.stream("/v1/completions", {"prompt": "xyz", "temperature": 0, **asked})
    pieces = [event["choices"][0] for event in events if event != "[DONE]"]
    told = [
        offset for piece in pieces for offset in (piece["logprobs"] or {"text_offset": []})["text_offset"]
    ]
    assert told == whole
    assert whole[0] == 3


def test_a_server_that_has_failed_says_so_and_not_that_it_shuts_down(server, monkeypatch):
    monkeypatch.setattr(type(server.worker), "healthy", False)
    status, _, told = server.chat(max_tokens=1)
    assert status == 503
    assert "has failed" in told["error"]["message"]
    assert "/health" in told["error"]["message"]


def test_a_round_is_of_at_most_32_positions(server):
    """A draft length of thousands made one round of as many passes, and nothing else ran meanwhile."""
    assert server.chat(max_tokens=1, layerskip={"draft_length": 31})[0] == 200
    status, _, told = server.chat(max_tokens=1, layerskip={"draft_length": 32})
    assert status == 400
    assert "31" in told["error"]["message"]


def test_stop_strings_end_before_themselves(server, lm):
    text = alone(lm, "What is it?").text
    stop = text[5:8]
    told = server.chat("What is it?", stop=stop)[2]["choices"][0]
    assert told["message"]["content"] == text[: text.index(stop)]
    assert told["finish_reason"] == "stop"


def test_log_probabilities_are_those_of_the_model(server, lm):
    wanted = alone(lm, "What is it?", logprobs=True, top_logprobs=3)
    for own in ({"mode": "ar"}, DRAFTS):
        told = server.chat("What is it?", logprobs=True, top_logprobs=3, layerskip=own)[2]["choices"][0]
        entries = told["logprobs"]["content"]
        given = [value for round in wanted.rounds for value in round.logprobs]
        assert [entry["logprob"] for entry in entries] == pytest.approx(given, abs=1e-4)
        for entry in entries:
            tops = [one["logprob"] for one in entry["top_logprobs"]]
            assert tops == sorted(tops, reverse=True)
            assert len(tops) == 3
            assert entry["logprob"] <= tops[0] + 1e-6
            assert bytes(entry["bytes"]).decode() == entry["token"]
    old = server.complete("abc", logprobs=2, ignore_eos=True)[2]["choices"][0]
    assert len(old["logprobs"]["tokens"]) == len(old["logprobs"]["text_offset"]) == 24
    assert all(len(one) <= 2 for one in old["logprobs"]["top_logprobs"])


def test_biases_and_penalties_change_the_law_and_drafts_do_not(server, lm):
    banned = server.complete(
        "abc", logit_bias={str(t): -100 for t in lm.generate("abc", max_new_tokens=8).tokens}
    )[2]
    assert banned["choices"][0]["text"] != server.complete("abc")[2]["choices"][0]["text"]
    for settings in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 1.5}):
        texts = {
            server.complete("abc", max_tokens=60, layerskip=own, **settings)[2]["choices"][0]["text"]
            for own in ({"mode": "ar"}, DRAFTS, {"drafter": "lookup"})
        }
        assert len(texts) == 1, settings
    status, _, told = server.complete("abc", logit_bias={"99999": 1})
    assert status == 400
    assert "token ids" in told["error"]["message"]


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer"},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "ok"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("own", [{"mode": "ar"}, DRAFTS, {"drafter": "lookup"}], ids=str)
def test_json_follows_its_schema_with_drafts_and_without(server, own):
    format_ = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    plain = server.chat("Who?", max_tokens=120, response_format=format_, layerskip={"mode": "ar"})[2]
    told = server.chat("Who?", max_tokens=120, response_format=format_, layerskip=own)[2]
    assert told["choices"] == plain["choices"]
    finished = 0
    for seed in range(8):
        choice = server.chat(
            "Who?", max_tokens=120, response_format=format_, layerskip=own, temperature=1.0, seed=seed
        )[2]["choices"][0]
        if choice["finish_reason"] == "stop":
            finished += 1
            person = json.loads(choice["message"]["content"])
            assert {*person} == {"name", "age", "ok"}
            assert type(person["ok"]) is bool
    assert finished


def test_any_json_is_an_object_or_another_value(server):
    told = server.chat(
        "Who?", max_tokens=200, response_format={"type": "json_object"}, temperature=1, seed=1
    )[2]
    if told["choices"][0]["finish_reason"] == "stop":
        json.loads(told["choices"][0]["message"]["content"])


def test_a_schema_that_cannot_be_used_is_refused(server):
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    status, _, told = server.chat("Who?", response_format=format_)
    assert status == 400
    assert "schema" in told["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": "hello"}, 400, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": "x"}], "temprature": 0.1}, 400, "did you mean 'temperature'"),
        ({"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}, 400, "temperature"),
        ({"messages": [{"role": "user", "content": "x"}], "temperature": 9}, 400, "temperature"),
        ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}, 400, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x"}], "max_tokens": True}, 400, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x"}], "n": 99}, 400, "at most 8"),
        ({"messages": [{"role": "user", "content": "x"}], "model": "gpt-5"}, 404, "gpt-5"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, 400, "tools"),
        ({"messages": [{"role": "user", "content": "x"}], "stop": [""]}, 400, "stop"),
        ({"messages": [{"role": "user", "content": "x" * 400}]}, 400, "context is 256"),
        ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, 400, "logprobs"),
        ({"messages": [{"role": "user", "content": "x"}], "layerskip": {"exit_layer": 99}}, 400, "exit layer"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, ""),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, 400, "content"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_in_openais_shape(server, body, status, says):
    got, _, told = server.ask("POST", "/v1/chat/completions", body)
    assert got == status
    assert {*told["error"]} == {"message", "type", "param", "code"}
    assert says in told["error"]["message"] or says in str(told["error"]["param"])


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"messages": NaN}', b"{}" * 2]
)
def test_a_body_that_is_no_request_is_a_bad_request(server, raw):
    status, _, told = server.ask("POST", "/v1/chat/completions", raw=raw)
    assert status == 400
    assert told["error"]["type"] == "invalid_request_error"


def test_models_tokenize_and_health(server, lm):
    [model] = server.ask("GET", "/v1/models")[2]["data"]
    assert model["id"] == "tiny"
    assert model["max_model_len"] == 256
    assert server.ask("GET", "/v1/models/tiny")[2] == model
    assert server.ask("GET", "/v1/models/other")[0] == 404
    assert server.ask("POST", "/tokenize", {"prompt": "abc"})[2]["tokens"] == lm.encode("abc")
    messages = [{"role": "user", "content": "abc"}]
    assert server.ask("POST", "/tokenize", {"messages": messages})[2]["count"] == len(lm.encode(messages))
    assert server.ask("POST", "/tokenize", {})[0] == 400
    assert server.ask("GET", "/health")[0] == 200
    assert server.ask("GET", "/ready")[0] == 200
    assert server.ask("GET", "/nothing")[0] == 404
    assert server.ask("GET", "/v1/chat/completions")[0] == 405


def test_openais_own_client_works_unchanged(server, lm):
    wanted = alone(lm, "What is it?").text
    messages = [{"role": "user", "content": "What is it?"}]
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert client.models.list().data[0].id == "tiny"
    told = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=24)
    assert told.choices[0].message.content == wanted
    stream = client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_tokens=24, stream=True,
        extra_body={"layerskip": DRAFTS},
    )  # fmt: skip
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == wanted
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.chat.completions.create(model="other", messages=messages)
    with pytest.raises(openai.BadRequestError, match="unknown key"):
        client.chat.completions.create(model="tiny", messages=messages, extra_body={"wrong": 1})

    async def asked():
        own = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none")
        many = [
            own.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=24)
            for _ in range(6)
        ]
        return [told.choices[0].message.content for told in await asyncio.gather(*many)]

    assert asyncio.run(asked()) == [wanted] * 6
    client.close()
