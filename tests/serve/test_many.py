"""Many at once: none lost, none mixed up, prefixes kept, nothing left behind, and metrics that add up."""

import gc
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from serving import DRAFTS, language_model, serving

from layerskip.decode.request import Request
from layerskip.serve.prefixes import Held, Placed, chosen, common
from layerskip.serve.queue import FairQueue
from layerskip.serve.worker import Worker

WAYS = [{}, DRAFTS, {"mode": "ar"}, {"drafter": "lookup"}]


def asked(server, place, streams):
    dice = random.Random(place)
    text = f"{place} " + "".join(dice.choice("abcdefgh ") for _ in range(dice.randrange(5, 90)))
    body = {
        "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": dice.randrange(1, 50),
        "ignore_eos": True, "layerskip": WAYS[place % len(WAYS)],
    }  # fmt: skip
    if not streams:
        return (
            text,
            body,
            server.ask("POST", "/v1/chat/completions", body)[2]["choices"][0]["message"]["content"],
        )
    *events, last = server.stream("/v1/chat/completions", body)
    assert last == "[DONE]", events
    return text, body, "".join(event["choices"][0]["delta"]["content"] for event in events)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_concurrent_streams_are_each_what_they_are_alone(dtype):
    lm = language_model(dtype, "native")
    if dtype == torch.bfloat16 and not lm.stack.row_exact:
        pytest.skip("bfloat16 is not exact row by row here")
    with serving(lm, rows=5, queue=200, context=200) as server:
        with ThreadPoolExecutor(200) as pool:
            answers = [*pool.map(lambda place: asked(server, place, place % 5 > 0), range(200))]
        assert server.worker.running == server.worker.waiting == 0
    for text, body, answer in answers:
        alone = lm.generate(
            [{"role": "user", "content": text}], mode="ar", max_new_tokens=body["max_tokens"], eos_token_id=()
        )
        assert answer == alone.text


def test_nothing_is_left_behind_by_many_requests():
    lm = language_model()
    with serving(lm, rows=2, context=128) as server:

        def objects():
            gc.collect()
            return len(gc.get_objects())

        for _ in range(20):
            server.chat(max_tokens=3)
        before = objects()
        for place in range(100):
            server.chat(f"{place}", max_tokens=3, n=1 + place % 2)
        assert objects() < before + 2000, "some hundred requests"
        assert len(server.worker._kept) <= 2
        assert not server.worker._running


def test_a_shared_beginning_is_computed_once_and_changes_no_bit():
    lm = language_model(torch.bfloat16, "native")
    if not lm.stack.row_exact:
        pytest.skip("bfloat16 is not exact row by row here")
    system = {"role": "system", "content": "Answer in few words, and kindly. " * 4}
    with serving(lm, rows=3, context=256) as server:
        for place, text in enumerate(["One?", "Two?", "Three?", "Four?", "Five?"]):
            messages = [system, {"role": "user", "content": text}]
            body = {"messages": messages, "temperature": 0, "max_tokens": 20}
            told = server.ask("POST", "/v1/chat/completions", body)[2]
            cached = told["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert (cached > 120) == (place > 0)
            wanted = lm.generate(messages, mode="ar", max_new_tokens=20).text
            assert told["choices"][0]["message"]["content"] == wanted
        messages += [{"role": "assistant", "content": wanted}, {"role": "user", "content": "Why?"}]
        told = server.ask(
            "POST", "/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 9}
        )[2]
        assert told["usage"]["prompt_tokens_details"]["cached_tokens"] > 140, "the next turn goes on"
        assert (
            told["choices"][0]["message"]["content"]
            == lm.generate(messages, mode="ar", max_new_tokens=9).text
        )


def test_what_several_begin_with_at_once_is_computed_once():
    """Answers of one request each computed its prompt, as they were all given rows in one turn."""
    lm = language_model(torch.bfloat16, "native")
    if not lm.stack.row_exact:
        pytest.skip("bfloat16 is not exact row by row here")
    prompt = "Answer in few words, and kindly: what is a house? " * 3
    wanted = lm.generate(prompt, mode="ar", max_new_tokens=8, eos_token_id=()).text
    with serving(lm, rows=4, context=256) as server:
        told = server.complete(prompt, n=4, max_tokens=8, ignore_eos=True)[2]
        assert [choice["text"] for choice in told["choices"]] == [wanted] * 4
        text = server.ask("GET", "/metrics")[2].decode()
        [hits] = re.findall(r"^layerskip:prefix_cache_hits_total\{.*\} (\S+)$", text, re.M)
        assert float(hits) >= 3 * (len(lm.encode(prompt)) - 1)
        with ThreadPoolExecutor(8) as pool:
            texts = [f"{prompt}{place}" for place in range(8)]
            answers = [*pool.map(lambda text: server.complete(text, max_tokens=8, ignore_eos=True)[2], texts)]
    for text, answer in zip(texts, answers, strict=True):
        alone = lm.generate(text, mode="ar", max_new_tokens=8, eos_token_id=()).text
        assert answer["choices"][0]["text"] == alone


def test_who_waits_for_another_ones_prompt_goes_on_when_that_one_leaves():
    lm = language_model()
    with serving(lm, rows=2, context=256) as server:
        worker = server.worker
        step, held = worker.scheduler.step, threading.Event()
        worker.scheduler.step = lambda: step() if held.wait(20) else []
        prompt = "Tell me of the sea and of the wind. " * 4
        one, two = (
            threading.Thread(target=server.complete, args=(prompt,), kwargs={"max_tokens": 4}) for _ in "ab"
        )
        one.start()
        server.until(lambda: worker.running == 1)
        two.start()
        server.until(lambda: worker.waiting == 1)
        [leader] = worker._running.values()
        worker.cancel(leader)
        held.set()
        two.join(20)
        assert not two.is_alive()
        server.until(lambda: worker.running == worker.waiting == 0)
        one.join(20)


def test_metrics_are_the_sums_of_the_responses():
    with serving(language_model(), rows=3) as server:
        usages = []
        for place in range(12):
            usages.append(
                server.chat(f"{place} again and again", max_tokens=30, layerskip=DRAFTS)[2]["usage"]
            )
        usages.append(server.complete("abc", n=3, temperature=1.0, seed=1)[2]["usage"])
        server.chat("x" * 999)
        text = server.ask("GET", "/metrics")[2].decode()

    def value(name, **labels):
        pattern = rf"^layerskip:{name}\{{(.*)\}} (\S+)$"
        found = [(told, float(number)) for told, number in re.findall(pattern, text, re.M)]
        return sum(n for told, n in found if all(f'{k}="{v}"' in told for k, v in labels.items()))

    details = [usage["completion_tokens_details"] for usage in usages]
    accepted = sum(one["accepted_prediction_tokens"] for one in details)
    assert value("generation_tokens_total") == sum(usage["completion_tokens"] for usage in usages)
    assert value("spec_decode_num_accepted_tokens_total") == accepted
    assert value("spec_decode_num_accepted_tokens_per_pos_total") == accepted
    assert value("spec_decode_num_draft_tokens_total") == accepted + sum(
        one["rejected_prediction_tokens"] for one in details
    )
    assert value("request_success_total") == 15
    assert value("time_to_first_token_seconds_count") == value("e2e_request_latency_seconds_count") == 15
    prompts = sum(usage["prompt_tokens"] for usage in usages) + 2 * usages[-1]["prompt_tokens"]
    assert value("prompt_tokens_total") == prompts
    assert value("num_requests_running") == value("num_requests_waiting") == 0


def test_the_worker_decodes_on_the_threads_that_were_asked_for():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with serving(language_model()) as server:
            seen, step = [], server.worker.engine.step
            server.worker.engine.step = lambda: (seen.append(torch.get_num_threads()), step())[1]
            server.chat(max_tokens=2)
    finally:
        torch.set_num_threads(before)
    assert {*seen} == {3}, "OpenMP tells each thread anew"


# -- the parts -----------------------------------------------------------------------------------------------


def test_clients_are_served_in_turn():
    queue = FairQueue(9)
    for client, item in (("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("b", 6)):
        queue.put(client, item)
    assert queue.drop("c", 5)
    assert not queue.drop("c", 5)
    assert [queue.take() for _ in range(6)] == [1, 4, 2, 6, 3, None]
    assert len(queue) == 0


def test_the_common_beginning_is_found():
    dice = random.Random(0)
    for _ in range(300):
        one = [dice.randrange(2) for _ in range(dice.randrange(12))]
        other = one[: dice.randrange(len(one) + 1)] + [dice.randrange(2) for _ in range(dice.randrange(6))]
        wanted = next(
            (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
        )
        assert common(one, other) == wanted


def test_where_a_prompt_goes():
    long, other = [*range(40)], [99] * 40
    kept = Held("kept", [*range(30)], True, 1.0)
    older = Held("older", other, True, 0.0)
    running = Held("running", [*range(20), 77], False, 0.0)
    assert chosen(long, [], True) == Placed()
    assert chosen(long, [running], False) is None
    assert chosen(long, [kept, older], True) == Placed(after="kept")
    assert chosen([*range(25), 50], [kept], True) == Placed(like="kept")
    assert chosen([*range(25), 50], [kept, older], False) == Placed(like="kept", evicted="older")
    assert chosen([*range(25), 50], [kept], False) == Placed(after="kept")
    assert chosen([*range(20), 50], [running], True) == Placed(like="running")
    assert chosen([5] * 30, [kept, older], False) == Placed(evicted="older")


def test_a_row_copied_from_another_decodes_as_if_computed():
    lm = language_model()
    with serving(lm, rows=1) as server:
        assert isinstance(server.worker, Worker)
    from layerskip.decode.engine import Engine

    engine, prompt = Engine(lm.stack, rows=2, capacity=64), [5, 9, 20, 33, 7, 8]
    first = engine.add(Request(prompt, 8, keep=True))
    done = {}
    while engine.busy:
        for event in engine.step():
            done.setdefault(event.row, []).extend(event.tokens)
    second = engine.add(Request([*prompt, 3], 8), like=first)
    assert engine.cache.lengths[second] == len(prompt)
    third = []
    while engine.busy:
        for event in engine.step():
            third += event.tokens
    alone = Engine(lm.stack, rows=1, capacity=64)
    alone.add(Request([*prompt, 3], 8))
    wanted = []
    while alone.busy:
        for event in alone.step():
            wanted += event.tokens
    assert third == wanted
