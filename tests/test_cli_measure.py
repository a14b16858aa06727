"""The verbs that measure, in process on a tiny checkpoint: what they print, write, refuse."""

import json
import shutil

import pytest

import layerskip
import tiny
from layerskip.checkpoint.facts import ranked_vocabulary
from layerskip.errors import UserError
from layerskip.measure import prompt_file
from layerskip.measure.lines import read_prompts
from layerskip.measure.speed import bench as benches
from layerskip.measure.speed import card as cards

SPECULATIVE = ("--exit-layer", 2, "--draft-length", 3)
QUICK = (*SPECULATIVE, "--max-new-tokens", 8, "--trials", 1)


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    monkeypatch.setattr(cards, "BUFFER_BYTES", 2**16)


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "my prompts.jsonl"
    file.write_text('{"prompt": "hello", "task": "chat"}\n{"prompt": "a b c"}\n{"prompt": "never used"}\n')
    return ("--prompts", file, "--limit", 2)


@pytest.fixture
def checkpoint(folder, tmp_path):
    """A copy to write into, with an entry of ours and a key that is not ours."""
    copy = shutil.copytree(folder, tmp_path / "own")
    config = json.loads((copy / "config.json").read_text())
    config |= {"layerskip": {"exits": [2], "exit_layer": 2, "draft_length": 3}, "somebody_elses": [1, 2]}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.jsonl"
    lines = ({"text": "the quick brown fox " * 3 + "xyz"[i % 3]} for i in range(40))
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_questions_of_spec_bench_are_asked_by_their_first_turn(run, folder, tmp_path, fails):
    file = tmp_path / "questions.jsonl"
    question = {"question_id": 81, "category": "writing", "turns": ["hello", "and now shorter"]}
    told = {"prompt": "hello", "turns": 2}  # a column of somebody else's
    file.write_text("\n".join(map(json.dumps, (question, told))))
    code, printed, message = run("bench", folder, "--prompts", file, *QUICK, "--json")
    assert code == 0, message
    first, second = json.loads(printed)["per_prompt"]
    assert (first["task"], second["task"]) == ("writing", None)
    assert [line.content for line in read_prompts(file)] == ["hello", "hello"]
    for turns in ([], [{"role": "user"}], "hello"):
        file.write_text(json.dumps({"turns": turns}))
        assert "line 1: " in fails("bench", folder, "--prompts", file)


def test_conversations_of_sharegpt_are_asked_up_to_their_first_answer(tmp_path):
    file = tmp_path / "conversations.jsonl"

    def turns(*said):
        return [{"from": who, "value": text} for who, text in said]

    asked = turns(("system", "be brief"), ("human", "2+2?"))
    lines = [
        {"id": 7, "conversations": [*asked, *turns(("gpt", "4"), ("human", "sure?"), ("gpt", "yes"))]},
        {"messages": asked},
        {"conversations": turns(("gpt", "hello"), ("user", "2+2?"), ("bing", "4"))},
        {"prompt": "2+2?", "conversations": asked},  # a column of somebody else's
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    first, second, third, fourth = read_prompts(file)
    question = {"role": "user", "content": "2+2?"}
    assert first.content == second.content == [{"role": "system", "content": "be brief"}, question]
    assert first.id == 7
    assert third.content == [{"role": "assistant", "content": "hello"}, question]
    assert fourth.content == "2+2?"
    file.write_text(json.dumps({"chat": lines[0]["conversations"]}))
    assert read_prompts(file, column="chat")[0].content == first.content
    for wrong, message in (([{"from": "nobody", "value": "a"}], "nobody"), ([{"from": "human"}], "content")):
        file.write_text(json.dumps({"conversations": wrong}))
        with pytest.raises(UserError, match=f"line 1.*{message}"):
            read_prompts(file)


# -- bench ---------------------------------------------------------------------------------------------------


def test_bench_prints_one_object_and_nothing_else(run, folder, prompts):
    code, printed, message = run("bench", folder, *prompts, *QUICK, "--json")
    assert code == 0, message
    [line] = printed.splitlines()
    result = json.loads(line)
    assert list(result) == [
        "card", "methods", "speedup", "predicted_speedup", "per_prompt", "configuration",
    ]  # fmt: skip
    assert list(result["methods"]) == ["ar", "self-speculative", "early-exit"]
    assert [line["task"] for line in result["per_prompt"]] == ["chat", None]
    told = result["configuration"]
    assert (told["model"], told["prompts"], told["num_prompts"]) == ("tiny", "my prompts.jsonl", 2)
    assert {"commit", "versions", "device_name", "date", "load_s", "trials", "dtype"} <= set(told)
    assert str(folder.parent) not in line, "no path of a machine is kept"
    assert "tokens/s" in message, "the card stands on stderr"


def test_bench_gives_the_card_then_equality_then_speed(run, folder, prompts):
    code, printed, _ = run(
        "bench", folder, *prompts, *QUICK, "--methods", "self-speculative,hf", "--threads", 1
    )
    assert code == 0
    places = [printed.index(text) for text in ("GB/s", "equality: self-speculative: 2 of 2", "over ar")]
    assert places == sorted(places)
    assert "self-speculative/hf:" in printed
    assert "the cost model predicts" in printed


def test_a_simulated_bench_says_so_everywhere(run, folder, prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    simulated = ("--simulate-acceptance", 0.6)
    code, printed, _ = run("bench", folder, *prompts, *QUICK, *simulated, "--json", "--save")
    result = json.loads(printed)
    assert code == 0
    assert result["simulated"] == result["methods"]["self-speculative"]["simulated"] == 0.6
    [file] = tmp_path.glob("bench_*.json")
    assert file.name.startswith("bench_tiny_float32_sim60_cpu_")
    assert json.loads(file.read_text()) == result
    code, printed, _ = run("bench", folder, *prompts, *QUICK, *simulated)
    assert "simulated: drafts are kept at random" in printed
    assert "self-speculative (simulated)" in printed
    assert "early-exit (not verified)" in printed, "its 4.2 x stood first, without a word on its text"
    assert "equality: not asked of self-speculative" in printed


def test_a_result_file_goes_where_results_are_kept_and_its_place_is_told(
    run, folder, prompts, tmp_path, monkeypatch
):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    code, _, message = run("bench", folder, *prompts, *QUICK, "--save")
    [file] = (tmp_path / "benchmarks" / "results").glob("bench_tiny_float32_cpu_*.json")
    assert code == 0
    assert f"written: benchmarks/results/{file.name}" in message
    assert "simulated" not in json.loads(file.read_text())


def test_the_readme_table_gives_equality_first_and_labels_what_is_simulated(
    run, folder, prompts, tmp_path, monkeypatch, benchmark
):
    tables = benchmark("tables")
    monkeypatch.setattr(benchmark("record"), "HERE", tmp_path / "benchmarks")
    assert tables.bench() == "(no result file yet)"
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for more in ((), ("--simulate-acceptance", 0.5)):
        assert run("bench", folder, *prompts, *QUICK, *more, "--save")[0] == 0
    heads, _, *lines, _, note = tables.bench().splitlines()
    assert heads.index("equal") < heads.index("over plain")
    assert sum("| self-speculative 2 of 2 |" in line for line in lines) == 1
    assert sum("| not asked |" in line and "(simulated 50%)" in line for line in lines) == 1
    assert "no output is real" in note


def test_a_loss_in_float32_ends_the_bench_without_a_speed(run, folder, prompts, monkeypatch):
    def lossy(plain, others):
        return [{"prompt": 0, "position": 5}]

    monkeypatch.setattr(benches, "divergences", lossy)
    code, printed, message = run("bench", folder, *prompts, *QUICK, "--json")
    assert (code, printed) == (1, "")
    assert "not lossless: 1 of 2 self-speculative outputs differ" in message
    assert "Traceback" not in message


def test_the_built_in_prompts_are_those_of_the_benchmarks():
    ours = prompt_file().read_text()
    assert len(ours.splitlines()) == 10
    theirs = prompt_file().parents[3] / "benchmarks" / "prompts.jsonl"
    if theirs.exists():  # not beside an installed package
        assert theirs.read_text() == ours


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--methods", "vllm"), "unknown method 'vllm'"),
        (("--methods", "economize"), "economize cannot be measured here"),
        (("--limit", 0), "--limit must be a whole number, at least 1"),
        (("--trials", 0), "--trials must be a whole number, at least 1"),
        (("--threads", 0), "--threads must be a whole number, at least 1"),
        (("--draft-vocab", "most"), "a whole number, auto or off"),
        (("--simulate-acceptance", 2), "from 0 to 1"),
        (("--policy", "dynamic"), "known: adaptive, confidence, fixed"),
        (("--dtype", "floaty32"), "did you mean 'float32'"),
        (("--hf-dtype", "floaty32"), "did you mean 'float32'"),
        (("--stack", "jax"), "unknown stack 'jax'"),
        (("--quantize", "int3"), "unknown quantisation 'int3'"),
        (("--exit-layer", tiny.NUM_LAYERS), "out of range"),
        (("--max-new-tokens", 1), "at least two tokens"),
        (("--max-new-tokens", tiny.CONTEXT), "passes the context"),
        (("--prompts", "none.jsonl"), "cannot read"),
    ],
    ids=str,
)
def test_a_bench_that_cannot_be_fair_is_refused(run, folder, prompts, arguments, expected):
    code, printed, message = run("bench", folder, *prompts, *arguments, "--json")
    assert (code, printed) == (2, "")
    assert expected in message
    assert "Traceback" not in message


# -- draft-vocab ---------------------------------------------------------------------------------------------


def test_a_draft_vocabulary_is_written_beside_the_model_and_every_other_key_stays(run, checkpoint, data):
    before = json.loads((checkpoint / "config.json").read_text())
    code, printed, message = run("draft-vocab", checkpoint, "--data", data, "--size", 40, "--json")
    assert code == 0, message
    record = json.loads(printed)
    after = json.loads((checkpoint / "config.json").read_text())
    assert after.pop("layerskip") == {**before.pop("layerskip"), "draft_vocab": "draft_vocab.json"}
    assert after == before
    ids = json.loads((checkpoint / "draft_vocab.json").read_text())
    tokenizer = tiny.tokenizer()
    assert len(ids) == len(set(ids)) == 40
    assert ids[0] == tokenizer.encode(" ")[0], "the most frequent"
    assert tokenizer.eos_token_id in ids
    assert record["coverage"] == [{"size": 40, "coverage": 1.0}]
    assert {"size", "tokens_counted", "tokens_held_out", "file"} <= set(record)
    assert sorted(path.name for path in checkpoint.iterdir() if "part" in path.name) == []
    lm = layerskip.load(checkpoint, device="cpu")
    assert ranked_vocabulary(lm.path, lm.facts) == ids


def test_a_checkpoint_with_a_draft_vocabulary_drafts_with_it_unless_told_otherwise(run, checkpoint, data):
    """And its output stays that of plain decoding, though the target's tokens are mostly outside."""
    assert run("draft-vocab", checkpoint, "--data", data, "--size", 30)[0] == 0
    lm = layerskip.load(checkpoint, device="cpu")
    plain = lm.generate("hello", mode="ar", max_new_tokens=24).tokens
    kept = set(json.loads((checkpoint / "draft_vocab.json").read_text()))
    assert not set(plain) <= kept, "the test needs target tokens outside"
    for given, size in (("auto", 30), (50, 50), ("off", len(tiny.tokenizer()))):
        lm.stack.counters.reset()
        assert lm.generate("hello", draft_vocab=given, max_new_tokens=24).tokens == plain
        assert size in lm.stack.counters.head_rows, "trained exits: self-speculation is the default"
    for mode in ("ar", "early-exit"):
        lm.stack.counters.reset()
        lm.generate("hello", mode=mode, max_new_tokens=4)
        assert set(lm.stack.counters.head_rows) == {len(tiny.tokenizer())}


def test_output_leaves_the_checkpoint_alone_and_the_table_is_for_people(run, checkpoint, data, tmp_path):
    before = (checkpoint / "config.json").read_bytes()
    arguments = ("--data", data, "--data", data, "--size", 20, "--output", tmp_path / "list.json")
    code, printed, _ = run("draft-vocab", checkpoint, *arguments)
    assert code == 0
    assert (checkpoint / "config.json").read_bytes() == before
    assert not (checkpoint / "draft_vocab.json").exists()
    assert len(json.loads((tmp_path / "list.json").read_text())) == 20
    assert "covers, held out" in printed
    assert "predicted speed-up" in printed
    assert "assuming" in printed


def test_too_little_data_has_no_coverage(run, folder, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("hello")
    code, printed, _ = run(
        "draft-vocab", folder, "--data", file, "--size", 9, "--output", tmp_path / "l.json"
    )
    assert code == 0
    assert "too few documents to hold out a tenth" in printed
    assert "predicted" not in printed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--size", 0), "--size a number from 1 to 259"),
        (("--size", 260), "--size a number from 1 to 259"),
        (("--column", "body"), "line 1 has no body"),
        (("--exit-layer", tiny.NUM_LAYERS), "out of range"),
    ],
    ids=str,
)
def test_a_draft_vocabulary_that_cannot_be_made_leaves_the_checkpoint_alone(
    fails, checkpoint, data, arguments, expected
):
    before = (checkpoint / "config.json").read_bytes()
    assert expected in fails("draft-vocab", checkpoint, "--data", data, "--size", 9, *arguments)
    assert (checkpoint / "config.json").read_bytes() == before
    assert not (checkpoint / "draft_vocab.json").exists()


def test_too_few_tokens_replace_no_draft_vocabulary_and_a_replaced_one_is_told(
    run, checkpoint, data, tmp_path
):
    """Sixteen tokens overwrote the list of a checkpoint without a word."""
    assert run("draft-vocab", checkpoint, "--data", data, "--size", 40)[0] == 0
    before = (checkpoint / "draft_vocab.json").read_bytes()
    file = tmp_path / "short.txt"
    file.write_text("hello")
    code, _, message = run("draft-vocab", checkpoint, "--data", file, "--size", 9)
    assert code == 2
    assert "5 tokens were counted, too few" in message
    assert (checkpoint / "draft_vocab.json").read_bytes() == before
    code, _, message = run("draft-vocab", checkpoint, "--data", data, "--size", 30)
    assert code == 0
    assert "is replaced" in message


def test_data_that_is_not_there_is_an_error_before_the_model_is_loaded(fails, tmp_path):
    assert "no data file" in fails("draft-vocab", "no-such-model", "--data", tmp_path / "none.txt")
