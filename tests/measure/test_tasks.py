"""Generation tasks: what is read, what counts as right, and that every mode is decoded, compared and kept."""

import gzip
import json
from decimal import Decimal

import numpy as np
import pytest

import layerskip
from layerskip.errors import UserError
from layerskip.measure.intervals import resampled
from layerskip.measure.tasks import generation as tasks
from layerskip.measure.tasks import sandbox
from layerskip.measure.tasks.generation import (
    GSM8K,
    HUMANEVAL,
    NAMES,
    TOPV2,
    Item,
    decoded,
    job,
    judge,
    last_number,
    read,
    run,
)
from layerskip.train.data.encoding import DataOptions, encode

CODE = [  # of the shape of HumanEval's lines
    {
        "task_id": "Own/0",
        "prompt": "from typing import List\n\n\ndef evens(numbers: List[int]) -> List[int]:\n"
        '    """Keep the even ones."""\n',
        "entry_point": "evens",
        "canonical_solution": "    return [n for n in numbers if n % 2 == 0]\n",
        "test": "def check(candidate):\n    assert candidate([1, 2]) == [2]\n    assert candidate([]) == []\n",
    },
    {
        "task_id": "Own/1",
        "prompt": 'def half(n):\n    return n / 2\n\n\ndef quarter(n: float):\n    """Divide by four."""\n',
        "entry_point": "quarter",
        "canonical_solution": "    return half(half(n))\n",
        "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert abs(candidate(8) - 2) < 1e-6\n",
    },
]
WISHES = [{"domain": "alarm", "prompt": f"wake me at {n}", "response": f"[IN:WAKE {n} ]"} for n in range(5)]
PROBLEMS = [{"prompt": f"{n} eggs and one more?", "response": f"{n} + 1\n#### {n + 1}"} for n in range(3)]
LINES = {HUMANEVAL: CODE, TOPV2: WISHES, GSM8K: PROBLEMS}


@pytest.fixture
def items(tmp_path):
    """The items of a task, by its name."""

    def made(name):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, LINES[name])) + "\n")
        return read(name, file)

    return made


@pytest.fixture(scope="module")
def lm(tmp_path_factory, request):
    folder = request.getfixturevalue("folder")
    return layerskip.load(folder, dtype="float32", stack="hf")


# -- reading -------------------------------------------------------------------------------------------------


def test_items_are_read_up_to_the_limit_from_plain_and_compressed_files(tmp_path):
    file = tmp_path / "wishes.jsonl.gz"
    file.write_bytes(gzip.compress("\n\n".join(map(json.dumps, WISHES)).encode()))
    assert [(item.index, item.prompt) for item in read(TOPV2, file, 2)] == [
        (0, "wake me at 0"),
        (1, "wake me at 1"),
    ]
    assert len(read(TOPV2, file)) == 5


@pytest.mark.parametrize("name", NAMES)
def test_a_line_without_what_its_task_needs_is_named(name, tmp_path):
    file = tmp_path / "lines.jsonl"
    for key in tasks.KEYS[name]:
        for lacking in ({k: v for k, v in LINES[name][1].items() if k != key}, {**LINES[name][1], key: 3}):
            file.write_text(json.dumps(LINES[name][0]) + "\n\n" + json.dumps(lacking))
            with pytest.raises(UserError, match=f"line 3 has no text '{key}'"):
                read(name, file)
            assert len(read(name, file, limit=1)) == 1
    file.write_text("[1]")
    with pytest.raises(UserError, match="line 1 has no text"):
        read(name, file)
    file.write_text("\n")
    with pytest.raises(UserError, match="has no items"):
        read(name, file)


def test_an_unknown_task_is_named_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"unknown task 'human-eval'\n.*'humaneval'"):
        read("human-eval", tmp_path / "any")


# -- scoring -------------------------------------------------------------------------------------------------


def scored(name, items, texts, **more):
    answers = [(item, {"text": text}) for item, text in zip(items, texts, strict=True)]
    judge(name, answers, **more)
    return [record for _, record in answers]


def test_the_published_solutions_pass_and_wrong_ones_do_not(items):
    found = scored(HUMANEVAL, items(HUMANEVAL), [line["canonical_solution"] for line in CODE])
    assert [record["score"] for record in found] == [1.0, 1.0]
    wrong = ["    return numbers\n", "    return half(n\n"]
    found = scored(HUMANEVAL, items(HUMANEVAL), wrong)
    assert [(record["score"], record["outcome"]) for record in found] == [(0.0, "failed")] * 2
    assert [record["detail"].split(":")[0] for record in found] == ["AssertionError", "SyntaxError"]


def test_leaving_before_the_test_is_not_passing(items):
    (found,) = scored(HUMANEVAL, items(HUMANEVAL)[:1], ["    pass\n\nimport os\nos._exit(0)\n"])
    assert (found["score"], found["outcome"]) == (0.0, "exited")


def test_a_test_calls_the_helpers_of_the_prompt_whatever_an_answer_makes_of_them(items):
    """As HumanEval's tests of decode_cyclic and decode_shift do."""
    test = "def check(candidate):\n    assert candidate(half(32)) == 4\n"
    item = Item(0, {**items(HUMANEVAL)[1].fields, "test": test})
    right = "    return half(half(n))\n"
    texts = [
        right,
        right + "\nquarter_of, half = quarter, lambda n: 16\n",
        "    return 4\n\ndef half(n): raise OSError\n",
    ]
    assert [record["score"] for record in scored(HUMANEVAL, [item] * 3, texts)] == [1.0, 0.0, 1.0]


def test_an_answer_that_equals_everything_or_knows_the_way_out_is_not_right(items):
    texts = [
        "    class Any:\n        def __eq__(self, other): return True\n    return Any()\n",
        "    import sys\n    sys.exit(0)\n",
        "    return []\n\nimport builtins\nbuiltins.AssertionError = SystemExit\n",
    ]
    found = scored(HUMANEVAL, items(HUMANEVAL)[:1] * 3, texts)
    assert [record["outcome"] for record in found] == ["failed", "exited", "failed"]


def test_answers_that_agree_are_run_once(items, monkeypatch):
    ran = []
    monkeypatch.setattr(
        sandbox, "run", lambda *a, **k: ran.append(a) or sandbox.Outcome("passed", "", 0.0, ())
    )
    found = scored(HUMANEVAL, items(HUMANEVAL)[:1] * 3, ["    return 1\n"] * 2 + ["    return 2\n"])
    assert len(ran) == 2
    assert [record["score"] for record in found] == [1.0] * 3


@pytest.mark.parametrize(
    "answer",
    [
        "Sure:\n```python\ndef quarter(n):\n    return half(half(n))\n```\nDone.",
        "First\n```\npip install x\n```\nthen\n```py\ndef quarter(n: int) -> float:\n    return n / 4\n```",
        "```python\ndef quarter(n):\n    return n / 4",
        "def quarter(n):\n    return n / 4",
    ],
)
def test_the_code_of_a_chat_answer_is_found_and_has_the_helpers_of_the_prompt(answer, items):
    assert sandbox.run(**job(items(HUMANEVAL)[1], answer, chat=True)._asdict()).passed


def test_a_response_is_right_when_it_is_equal_but_for_its_ends(items):
    texts = [" [IN:WAKE 0 ]\n", "[IN:WAKE  1 ]", "[IN:WAKE 1 ]", "", "[IN:WAKE 4 ] ]"]
    found = scored(TOPV2, items(TOPV2), texts)
    assert [record["score"] for record in found] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert [record["loose"] for record in found] == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("16 - 3 = 13, times $2 is $26.00.", "26"),
        ("She makes $1,234,500", "1234500"),
        ("that is 12.50 dollars", "12.5"),
        ("about .5", "0.5"),
        ("x = -7", "-7"),
        ("10-7", "7"),
        ("so (3)-4", "4"),
        ("a loss of -$5", "-5"),
        ("#### 1, 2, 3,", "3"),
        ("none", None),
    ],
)
def test_the_last_number_of_an_answer_counts(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_a_problem_is_solved_by_the_number_behind_the_marks(items, tmp_path):
    found = scored(GSM8K, items(GSM8K), ["0 + 1 = 1.0", "1 + 1 = 2 eggs, of 3", "no idea"])
    assert [(record["score"], record["answer"]) for record in found] == [
        (1.0, "1.0"),
        (0.0, "3"),
        (0.0, None),
    ]
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"prompt": "1 + 1?", "response": "2"}))
    with pytest.raises(UserError, match="line 1 has no number behind ####"):
        read(GSM8K, file)


def test_a_score_has_an_interval_over_items():
    low, high = resampled(lambda x: x.mean(-1), np.array([1.0] * 30 + [0.0] * 10))
    assert 0.55 < low < 0.75 < high < 0.92
    assert resampled(lambda x: x.mean(-1), np.ones(5)) == [1.0, 1.0]


# -- running -------------------------------------------------------------------------------------------------

SHORT = {"exit_layer": 2, "draft_length": 3, "max_new_tokens": 12}


@pytest.mark.parametrize("name", NAMES)
def test_every_mode_is_decoded_and_self_speculation_equals_plain_decoding(name, lm, items):
    records = []
    result = run(lm, name, items(name), **SHORT, batch_size=2, keep=records.append)
    assert result["items"] == len(LINES[name]) == len(records)
    assert [*result["modes"]] == ["ar", "early-exit", "self-speculative"]
    for mode, told in result["modes"].items():
        assert told["metric"] == tasks.METRICS[name]
        assert told["score"] == np.mean([record["modes"][mode]["score"] for record in records])
        assert told["score_ci95"][0] <= told["score"] <= told["score_ci95"][1]
        assert told["new_tokens"] == sum(len(record["modes"][mode]["tokens"]) for record in records)
        assert ("equal" in told, told["acceptance"] is not None) == (mode == "self-speculative",) * 2
        assert sum(told.get("outcomes", {}).values()) == (len(records) if name == HUMANEVAL else 0)
    assert result["modes"]["self-speculative"]["equal"] == len(records)
    assert result["modes"]["self-speculative"]["tokens_per_round"] > 1
    assert result["modes"]["ar"]["tokens_per_round"] == 1
    assert json.loads(json.dumps(records)) == records


def test_a_right_answer_scores_in_every_mode(lm, items):
    """The tiny model's own outputs are made the responses."""
    item = items(TOPV2)[0]
    (answer,) = decoded(lm, [tasks.as_trained(lm, item.prompt)], mode="ar", max_new_tokens=12)
    taught = Item(0, {"prompt": item.prompt, "response": answer["text"]})
    result = run(lm, TOPV2, [taught], ("ar", "self-speculative"), **SHORT)
    assert {mode: told["score"] for mode, told in result["modes"].items()} == {
        "ar": 1.0,
        "self-speculative": 1.0,
    }


def test_a_run_goes_on_from_the_records_it_kept(lm, items, monkeypatch):
    whole, first = [], []
    expected = run(lm, TOPV2, items(TOPV2), **SHORT, keep=whole.append)

    def killed(record):
        first.append(json.loads(json.dumps(record)))
        if len(first) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(lm, TOPV2, items(TOPV2), **SHORT, batch_size=2, keep=killed)
    decoded_again, rest, watched = [], [], []
    generate = lm.generate
    monkeypatch.setattr(lm, "generate", lambda p, **k: decoded_again.extend(p) or generate(p, **k))
    before = {record["index"]: record for record in first}
    before[3] = {"index": 3, "modes": {"ar": {}}}  # of a run with fewer modes: of no use
    result = run(
        lm, TOPV2, items(TOPV2), **SHORT, done=before, keep=rest.append, watch=lambda *a: watched.append(a)
    )
    assert result == expected
    assert [record["index"] for record in rest] == [2, 3, 4]
    assert len(decoded_again) == 3 * 3  # modes
    assert watched[0][1:] == (2, 5)
    assert watched[-1][1:] == (5, 5)
    alike = [{**record, "modes": dict(record["modes"])} for record in [*first, *rest]]
    assert alike == whole


def test_items_one_by_one_are_timed_and_give_the_tokens_of_the_batch(lm, items):
    alone, together = [], []
    run(lm, TOPV2, items(TOPV2)[:2], **SHORT, batch_size=1, keep=alone.append)
    run(lm, TOPV2, items(TOPV2)[:2], **SHORT, batch_size=2, keep=together.append)
    for one, other in zip(alone, together, strict=True):
        for mode, told in one["modes"].items():
            assert told["seconds"] > 0
            assert "seconds" not in other["modes"][mode]
            assert told["tokens"] == other["modes"][mode]["tokens"]


def test_what_each_mode_is_asked_for(lm, items, monkeypatch):
    """Code stops where the next thing begins; an unverified exit uses the whole head."""
    prompts, asked = [], []
    generate = lm.generate
    monkeypatch.setattr(
        lm, "generate", lambda p, **k: (prompts.append(p), asked.append(k)) and generate(p, **k)
    )
    run(lm, HUMANEVAL, items(HUMANEVAL)[:1], **SHORT, draft_vocab=64)
    assert [one["draft_vocab"] for one in asked] == [64, "off", 64]
    (prompt,) = prompts[0]
    assert lm.tokenizer.decode(prompt).endswith('Keep the even ones."""')  # no line break: see tasks.py
    assert all(one["stop"] == tasks.STOPS for one in asked)
    assert all(one["eos_token_id"] == [lm.tokenizer.eos_token_id] for one in asked)
    run(lm, HUMANEVAL, items(HUMANEVAL)[:1], ("ar",), max_new_tokens=12, chat=True)
    assert asked[-1]["stop"] == ()
    run(lm, TOPV2, items(TOPV2)[:1], ("ar",))
    assert (asked[-1]["stop"], asked[-1]["max_new_tokens"]) == ((), 160)
    question = items(GSM8K)[:1]
    run(lm, GSM8K, question, ("ar",))
    assert (asked[-1]["stop"], asked[-1]["max_new_tokens"]) == ((), 320)
    assert prompts[-1] == [lm.encode(question[0].prompt, chat=True)]
    run(lm, GSM8K, question, ("ar",), max_new_tokens=2, chat=False)
    assert prompts[-1] == [lm.encode(question[0].prompt)]


def test_a_prompt_is_encoded_as_training_encodes_it(lm, items):
    example = {"prompt": WISHES[0]["prompt"], "completion": WISHES[0]["response"]}
    (trained,) = encode([example], lm.tokenizer, DataOptions(length=100, template="off"))
    prompt = tasks.as_trained(lm, example["prompt"])
    assert trained.input_ids[: len(prompt)].tolist() == prompt
    assert (trained.labels[: len(prompt)] == -100).all()
    assert trained.labels[len(prompt)] >= 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exit_layer": 5}, "exit layer 5 is out of range"),
        ({"draft_length": -1}, "draft_length is -1"),
        ({"draft_vocab": 10**6}, "vocabulary"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"chat": True}, "topv2 has no chat form"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_any_work(changes, message, lm, items, monkeypatch):
    monkeypatch.setattr(lm, "generate", None)
    with pytest.raises(UserError, match=message):
        run(lm, TOPV2, items(TOPV2), **{**SHORT, **changes})


def test_an_item_longer_than_the_context_is_named_before_any_work(lm, items, monkeypatch):
    monkeypatch.setattr(lm, "generate", None)
    long = Item(5, {"prompt": "x" * 300, "response": ""})
    with pytest.raises(UserError, match="item 6 has 301 tokens, the context is 256"):
        run(lm, TOPV2, [*items(TOPV2), long], **SHORT)
