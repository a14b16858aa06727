"""The verb eval, in process on a tiny checkpoint: what it prints, keeps, goes on with, refuses."""

import json
import math
import shutil

import pytest
import torch
import transformers

import layerskip
import tiny
from layerskip.cli.show import terminal as display
from layerskip.measure.exits import evaluation
from layerskip.measure.tasks import likelihood

L = tiny.NUM_LAYERS
TEXT = "the quick brown fox jumps over the lazy dog. " * 6


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Keep results away from the real cache folder."""
    monkeypatch.setenv("LAYERSKIP_CACHE", str(made := tmp_path_factory.mktemp("cache")))
    return made


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "wiki.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "hello"}, {"messages": [{"role": "user", "content": "a"}]}, {"prompt": "b c d"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


@pytest.fixture
def items(tmp_path):
    file = tmp_path / "items.jsonl"
    lines = [
        {"prompt": "hello ", "response": "world", "domain": "other columns are fine"},
        {"context": "one two", "choices": [" three", " four"], "answer": 0},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def answer(run, *arguments):
    code, printed, message = run("eval", *arguments, "--json")
    assert code == 0, message
    return json.loads(printed)


# -- exits ---------------------------------------------------------------------------------------------------


def test_text_is_judged_at_every_exit_and_the_last_is_the_model(run, folder, text):
    result = answer(run, folder, "--text", text, "--window", 100)
    assert list(result) == ["exits", "sources", "tasks", "configuration"]
    assert result["exits"] == result["sources"]["text"]
    assert [row["exit_layer"] for row in result["exits"]] == [1, 2, 3, 4, 5]
    assert set(result["exits"][0]) == {"exit_layer", "agreement", "kl", "tv", "perplexity", "tokens"}
    last = result["exits"][-1]
    assert (last["agreement"], last["kl"], last["tv"], last["tokens"]) == (1.0, 0.0, 0.0, len(TEXT) - 3)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = layerskip.load(str(folder), dtype="float32").encode(TEXT)
    cut = [torch.tensor([ids[i : i + 100]]) for i in range(0, len(ids), 100)]
    with torch.no_grad():
        sums = [model(input_ids=one, labels=one).loss.item() * (one.shape[1] - 1) for one in cut]
    assert math.log(last["perplexity"]) == pytest.approx(sum(sums) / last["tokens"], abs=1e-5)
    told = result["configuration"]
    assert (told["model"], told["text"], told["layers"], told["trained_exits"]) == ("tiny", "wiki.txt", L, [])
    assert str(folder.parent) not in json.dumps(result)


def test_chosen_exits_and_the_last_and_the_first_windows_only(run, folder, text):
    result = answer(run, folder, "--text", text, "--window", 50, "--exits", "3,1", "--limit", 2)
    assert [row["exit_layer"] for row in result["exits"]] == [1, 3, L]
    assert result["exits"][0]["tokens"] == 98


def test_the_window_is_the_context_where_that_is_shorter(run, folder, text):
    assert answer(run, folder, "--text", text, "--exits", "2")["exits"][0]["tokens"] == len(TEXT) - 2
    assert len(TEXT) > tiny.CONTEXT


def test_prompts_and_the_models_own_continuations_are_judged_apart(run, folder, prompts, cache):
    result = answer(run, folder, "--prompts", prompts, "--max-new-tokens", 7, "--no-chat")
    assert list(result["sources"]) == ["prompts", "continuations"]
    assert result["exits"] == result["sources"]["continuations"]
    [work] = (cache / "eval").iterdir()
    written = [json.loads(line) for line in (work / "continuations.jsonl").read_text().splitlines()]
    lm = layerskip.load(str(folder), dtype="float32")
    messages = [{"role": "user", "content": "a"}]
    expected = lm.generate(["hello", messages, "b c d"], max_new_tokens=7, mode="ar", seed=0)
    assert [one["tokens"] for one in written] == [one.tokens for one in expected]
    assert result["exits"][0]["tokens"] == sum(len(one.tokens) for one in expected)
    asked = sum(len(lm.encode(prompt)) - 1 for prompt in ("hello", messages, "b c d"))
    assert result["sources"]["prompts"][0]["tokens"] == asked
    assert result["exits"][-1]["perplexity"] < result["exits"][0]["perplexity"], (
        "its own text suits all layers best"
    )


def test_a_separator_follows_a_plain_prompt_and_a_template_wraps_it_where_there_is_one(run, folder, prompts):
    one = ("--prompts", prompts, "--limit", 1, "--max-new-tokens", 2, "--exits", 2)
    lm = layerskip.load(str(folder), dtype="float32")
    for more, length in (
        (("--no-chat",), 5), (("--no-chat", "--separator", "\\n"), 6), ((), len(lm.encode("hello", chat=True)))
    ):  # fmt: skip
        assert answer(run, folder, *one, *more)["sources"]["prompts"][0]["tokens"] == length - 1


def test_a_continuation_may_fill_the_context(run, folder, tmp_path):
    """Its last token is never read, so the sequence is one longer than the context."""
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "x" * (tiny.CONTEXT - 5)}))
    more = ("--no-chat", "--max-new-tokens", 6, "--exits", 2)
    result = answer(run, folder, "--prompts", tmp_path / "p.jsonl", *more)
    assert result["sources"]["continuations"][0]["tokens"] == 6


def test_text_and_prompts_go_together(run, folder, text, prompts):
    more = ("--limit", 1, "--window", 30, "--max-new-tokens", 3)
    result = answer(run, folder, "--text", text, "--prompts", prompts, *more)
    assert list(result["sources"]) == ["text", "prompts", "continuations"]
    assert result["exits"] == result["sources"]["text"]


# -- going on after a stop -----------------------------------------------------------------------------------


def stopped_after(count, original):
    def stream(*given):
        for number, record in enumerate(original(*given)):
            if number == count:
                raise KeyboardInterrupt
            yield record

    return stream


def test_a_stopped_run_goes_on_where_it_was_and_says_so(run, folder, text, monkeypatch):
    command = ("--text", text, "--window", 50, "--exits", "2,3")
    expected = answer(run, folder, *command, "--work", text.parent / "straight")
    judged = evaluation.judged
    monkeypatch.setattr(evaluation, "judged", stopped_after(2, judged))
    code, printed, message = run("eval", folder, *command, "--json")
    assert (code, printed) == (130, "")
    assert "run the same command again" in message
    asked = []
    monkeypatch.setattr(
        evaluation,
        "judged",
        lambda stack, texts, *rest: (asked.append(len(texts)), judged(stack, texts, *rest))[1],
    )
    code, printed, message = run("eval", folder, *command, "--json")
    assert asked == [4]
    assert "2 results of an earlier run found" in message
    for a, b in zip(json.loads(printed)["exits"], expected["exits"], strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_continuations_and_scores_are_not_made_twice(run, folder, prompts, items, monkeypatch):
    commands = (
        ("--prompts", prompts, "--max-new-tokens", 3, "--exits", 2),
        ("--task", "loglikelihood", "--data", items, "--exit-layer", 2),
    )
    first = [answer(run, folder, *command) for command in commands]
    nothing = lambda self, prompts, **_: iter(() if not prompts else 1 / 0)  # noqa: E731
    monkeypatch.setattr(layerskip.decode.language_model.LanguageModel, "each", nothing)
    for name, module in (("judged", evaluation), ("scored", likelihood)):
        monkeypatch.setattr(module, name, lambda stack, texts, *rest: iter(() if not texts else 1 / 0))
    for command, before in zip(commands, first, strict=True):
        again = answer(run, folder, *command)
        assert (again["sources"], again["tasks"]) == (before["sources"], before["tasks"])


def test_a_greater_limit_goes_on_and_another_model_or_file_begins_anew(run, folder, text, tmp_path, cache):
    command = ("--text", text, "--window", 50, "--exits", 2)
    answer(run, folder, *command, "--limit", 1)
    answer(run, folder, *command, "--limit", 3)
    [file] = cache.glob("eval/*/records.jsonl")
    assert len(file.read_text().splitlines()) == 3
    other = shutil.copytree(folder, tmp_path / "other")
    tiny.random_model("llama", seed=1, vocab_size=259).save_pretrained(other)
    answer(run, other, *command, "--limit", 1)
    answer(run, folder, *command, "--limit", 1, "--dtype", "float64")
    text.write_text(TEXT + "!")
    answer(run, folder, *command, "--limit", 1)
    assert len(list(cache.glob("eval/*"))) == 4


def test_a_work_folder_of_something_else_is_refused(run, fails, folder, text, tmp_path):
    command = ("eval", folder, "--text", text, "--window", 50, "--limit", 1, "--work", tmp_path / "work")
    assert run(*command, "--exits", 2)[0] == 0
    assert (tmp_path / "work" / "text" / "records.jsonl").is_file()
    assert "exits differ" in fails(*command, "--exits", 3)


# -- log-likelihood ------------------------------------------------------------------------------------------


def test_an_exit_and_the_full_model_stand_side_by_side_and_differ(run, folder, items, cache):
    result = answer(run, folder, "--task", "loglikelihood", "--data", items, "--exit-layer", 2)
    assert (result["exits"], result["sources"]) == ([], {})
    task = result["tasks"]["loglikelihood"]
    full, early = task["modes"]["ar"], task["modes"]["early-exit"]
    assert (task["items"], full["exit_layer"], early["exit_layer"]) == (2, L, 2)
    assert full["loglikelihood"] != pytest.approx(early["loglikelihood"], abs=1e-2)
    assert (full["responses"], full["choices"], full["tokens"]) == (1, 1, 5)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([layerskip.load(str(folder), dtype="float32").encode("hello world")])
    with torch.no_grad():
        expected = model(ids).logits[0, -6:-1].log_softmax(-1).gather(-1, ids[0, -5:, None]).sum()
    assert full["loglikelihood"] == pytest.approx(expected.item(), abs=1e-4)
    [file] = cache.glob("eval/loglikelihood-*/records.jsonl")
    assert [json.loads(line)["index"] for line in file.read_text().splitlines()] == [0, 1]
    same = answer(run, folder, "--task", "loglikelihood", "--data", items, "--exit-layer", L)["tasks"]
    assert same["loglikelihood"]["modes"]["early-exit"] == same["loglikelihood"]["modes"]["ar"] == full


# -- generation tasks ----------------------------------------------------------------------------------------


@pytest.fixture
def parses(tmp_path):
    file = tmp_path / "parses.jsonl"
    lines = ({"prompt": f"say {i}", "response": "abc", "domain": "alarm"} for i in range(3))
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_a_task_is_done_in_every_mode_and_goes_on_item_by_item(run, folder, parses, cache, monkeypatch):
    drafting = ("--exit-layer", 2, "--draft-length", 3, "--max-new-tokens", 6)
    command = ("--task", "topv2", "--data", parses, *drafting, "--batch-size", 2)
    first = answer(run, folder, *command, "--limit", 2)
    assert list(first["tasks"]["topv2"]["modes"]) == ["ar", "early-exit", "self-speculative"]
    result = answer(run, folder, *command)["tasks"]["topv2"]
    assert result["items"] == result["modes"]["self-speculative"]["equal"] == 3
    [file] = cache.glob("eval/topv2-*/records.jsonl")
    assert [json.loads(line)["index"] for line in file.read_text().splitlines()] == [0, 1, 2]
    monkeypatch.setattr(layerskip.decode.language_model.LanguageModel, "generate", None)
    code, printed, _ = run("eval", folder, *command)
    assert code == 0, "all was found"
    assert "exact match" in printed
    assert "3 of 3" in printed
    assert "3 items; E 2, K 3" in printed


def test_the_modes_of_a_task_can_be_chosen(run, folder, parses):
    result = answer(run, folder, "--task", "topv2", "--data", parses, "--max-new-tokens", 2, "--modes", "ar")
    assert list(result["tasks"]["topv2"]["modes"]) == ["ar"]


# -- what is printed and written -----------------------------------------------------------------------------


def test_the_table_has_a_bar_per_exit_and_marks_the_trained_ones(run, folder, text, items, tmp_path):
    trained = shutil.copytree(folder, tmp_path / "trained")
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps(config | {"layerskip": {"exits": [2]}}))
    task = ("--task", "loglikelihood", "--data", items)
    code, printed, message = run("eval", trained, "--text", text, "--exits", "2,3", *task)
    assert code == 0, message
    lines = printed.splitlines()
    [second] = [line for line in lines if line.split()[:1] == ["2"]]
    [third] = [line for line in lines if line.split()[:1] == ["3"]]
    [last] = [line for line in lines if line.split()[:1] == ["5"]]
    assert second.split()[-1] == "trained"
    assert "trained" not in third
    assert "█" * display.BAR in last
    assert "100.0%" in last
    assert "all layers" in last
    assert f"running text  {len(TEXT) - 2} tokens predicted" in printed
    assert "exits trained: 2" in printed
    assert "accuracy per character" in printed
    assert "results per item:" in message


def test_a_result_can_be_written(run, folder, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = answer(run, folder, "--text", text, "--exits", 2, "--save")
    [file] = tmp_path.glob("eval_tiny_float32_text_cpu_*.json")
    assert json.loads(file.read_text()) == result


@pytest.mark.parametrize(
    ("share", "drawn"), [(0.0, ""), (None, ""), (1.0, "█" * 20), (0.5, "█" * 10), (0.01, "▎")]
)
def test_a_share_is_drawn_as_a_bar(share, drawn):
    assert display.bar(share) == drawn.ljust(20)


def test_a_source_without_tokens_is_told_without_figures(run, folder, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    code, printed, _ = run(
        "eval", folder, "--prompts", tmp_path / "p.jsonl", "--no-chat", "--max-new-tokens", 2
    )
    assert code == 0
    assert "prompts  0 tokens predicted" in printed


# -- mistakes ------------------------------------------------------------------------------------------------

PARSES, SCORES = (("--task", name, "--data", file) for name, file in (
    ("topv2", "parses.jsonl"), ("loglikelihood", "items.jsonl")
))  # fmt: skip
MISTAKES = {
    "no source": ((), "nothing to judge on"),
    "data alone": (("--data", "items.jsonl"), "--data comes without a task"),
    "data without task": (("--text", "wiki.txt", "--data", "items.jsonl"), "--task is missing"),
    "task without data": (("--task", "loglikelihood"), "--data is missing"),
    "unknown task": (("--task", "loglikelyhood", "--data", "items.jsonl"), "did you mean 'loglikelihood'"),
    "unlike task": (("--task", "topv", "--data", "items.jsonl"), "did you mean 'topv2'"),
    "no such field": (("--task", "topv2", "--data", "bad.jsonl"), "bad.jsonl, line 1"),
    "unknown mode": ((*PARSES, "--modes", "ar,early"), "unknown mode 'early'"),
    "no mode": ((*PARSES, "--modes", ""), "unknown mode ''"),
    "draft vocabulary": ((*PARSES, "--draft-vocab", "many"), "--draft-vocab is 'many'"),
    "window of no text": (("--prompts", "prompts.jsonl", "--window", "9"), "--window has nothing to do here"),
    "exits of a task": ((*PARSES, "--exits", "2"), "--exits has nothing to do here"),
    "exit of a text": (("--text", "wiki.txt", "--exit-layer", "2"), "--exit-layer has nothing to do here"),
    "modes of a score": ((*SCORES, "--modes", "ar"), "--modes has nothing to do here"),
    "K of a text": (
        ("--text", "wiki.txt", "--draft-length", "2"),
        "it goes with --task topv2, humaneval or gsm8k",
    ),
    "budget of a score": ((*SCORES, "--max-new-tokens", "2"), "--max-new-tokens has nothing to do here"),
    "separator of a text": (("--text", "wiki.txt", "--separator", "x"), "--separator has nothing to do here"),
    "separator and chat": ((*SCORES, "--separator", "x", "--chat"), "--separator does nothing under --chat"),
    "separator and template": (("--prompts", "prompts.jsonl", "--separator", "x"), "add --no-chat"),
    "missing text": (("--text", "none.txt"), "cannot read none.txt"),
    "empty text": (("--text", "empty.txt"), "empty.txt is empty"),
    "no text": (("--text", "image.png"), "cannot read image.png"),
    "missing prompts": (("--prompts", "none.jsonl"), "cannot read none.jsonl"),
    "empty prompts": (("--prompts", "empty.txt"), "has no prompts"),
    "bad item": (("--task", "loglikelihood", "--data", "bad.jsonl"), "bad.jsonl, line 1"),
    "exit 0": (("--text", "wiki.txt", "--exits", "0,2"), "exits '0,2'"),
    "exit beyond": (("--text", "wiki.txt", "--exits", "2,6"), "exit layer 6 is out of range"),
    "no number": (("--text", "wiki.txt", "--exits", "1,two"), "exits '1,two'"),
    "nothing chosen": (("--text", "wiki.txt", "--exits", ""), "exits ''"),
    "limit 0": (("--text", "wiki.txt", "--limit", "0"), "limit is 0"),
    "window 1": (("--text", "wiki.txt", "--window", "1"), "window is 1"),
    "window beyond": (("--text", "wiki.txt", "--window", "1000"), "window is 1000"),
    "task exit": (("--task", "loglikelihood", "--data", "items.jsonl", "--exit-layer", "9"), "exit layer 9"),
    "one token": (("--text", "one.txt"), "is a single token"),
    "long prompt": (("--prompts", "long.jsonl", "--no-chat"), "prompt 2 of 2"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_two_lines(
    fails, folder, text, prompts, items, parses, tmp_path, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "image.png").write_bytes(b"\x89PNG\x00\xff")
    (tmp_path / "long.jsonl").write_text(
        "\n".join(json.dumps({"prompt": "x" * n}) for n in (3, tiny.CONTEXT + 5))
    )
    arguments, message = MISTAKES[name]
    assert message in fails("eval", folder, *arguments)
