"""A model's own continuations as training data: the tokens it saw and wrote, whole lines, going on after a stop."""

import gzip
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import layerskip
from layerskip.checkpoint.facts import fingerprint
from layerskip.decode.language_model import LanguageModel
from layerskip.train.data.packing import DataOptions, encode, examples
from layerskip.train.data.states import made_by

PROMPTS = [{"prompt": f"question {n}", "response": "not the model's"} for n in range(6)]
CHATS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "not the model's"}]},
    {"messages": [{"role": "user", "content": content} for content in ("a", "b")]},
]


def written(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
    return path


@pytest.fixture
def distill(run, folder, prompts, tmp_path):
    def call(*arguments, output=tmp_path / "own.jsonl", max_new_tokens=24, model=folder):
        code, printed, message = run(
            *("distill-data", model, "--prompts", prompts, "--output", output, "--json"),
            *("--max-new-tokens", max_new_tokens, *arguments),
        )
        return code, json.loads(printed.splitlines()[-1]) if printed else None, message

    return call


@pytest.mark.parametrize("chat", [True, False])
def test_training_reads_the_very_tokens_the_model_saw_and_wrote(distill, folder, prompts, tmp_path, chat):
    if chat:
        prompts.write_text(prompts.read_text() + "".join(json.dumps(line) + "\n" for line in CHATS))
    options = ["--chat" if chat else "--no-chat", "--temperature", 1.5]
    code, summary, _ = distill(*options, max_new_tokens=150)
    lines = written(tmp_path / "own.jsonl")
    assert (code, summary["written"], summary["interrupted"]) == (0, len(lines), False)
    assert summary["ended"] == sum(line["finish_reason"] == "eos" for line in lines)
    assert 0 < summary["ended"] < len(lines)  # both kinds of end are among them
    lm = layerskip.load(folder, dtype="float32")
    made = encode(examples(tmp_path / "own.jsonl"), lm.tokenizer, DataOptions(512))
    for line, example in zip(lines, made, strict=True):
        content = line["messages"][:-1] if chat else line["prompt"] + "\n"
        seen = lm.encode(content)
        tokens, labels = example.input_ids.tolist(), example.labels.tolist()
        assert tokens[: len(seen)] == seen
        assert labels == [-100] * len(seen) + tokens[len(seen) :]
        assert (tokens[-1] == lm.tokenizer.eos_token_id) == (line["finish_reason"] == "eos")
        assert line["finish_reason"] == "eos" or len(tokens) == len(seen) + 150
        text = lm.tokenizer.decode(tokens[len(seen) :], skip_special_tokens=True)
        assert text == (line["messages"][-1]["content"] if chat else line["completion"])
    assert "not the model's" not in (tmp_path / "own.jsonl").read_text()


def test_greedy_continuations_are_those_of_generate(distill, folder, tmp_path):
    distill("--no-chat", "--separator", " =>", "--limit", 2)
    lm = layerskip.load(folder, dtype="float32")
    for line, prompt in zip(written(tmp_path / "own.jsonl"), PROMPTS, strict=False):
        assert line["completion"] == lm.generate(prompt["prompt"] + " =>", max_new_tokens=24).text


@pytest.mark.parametrize("left", [0, 1, 3])
def test_a_killed_run_is_continued_as_if_it_had_not_been(distill, tmp_path, left):
    options = ["--temperature", 1.0, "--batch", 3]
    distill(*options)
    whole = (tmp_path / "own.jsonl").read_bytes()
    kept = whole.splitlines(keepends=True)
    part = tmp_path / "part.jsonl"
    part.write_bytes(b"".join(kept[:left]) + kept[left][:30])
    code, summary, _ = distill(*options, output=part)
    assert (code, summary["found"], summary["written"]) == (0, left, 6 - left)
    assert part.read_bytes() == whole
    code, summary, _ = distill(*options, output=part)
    assert (code, summary["found"], summary["written"]) == (0, 6, 0)
    assert part.read_bytes() == whole


@pytest.mark.parametrize("chat", [True, False])
def test_kept_states_are_what_the_head_reads_of_every_token(distill, folder, prompts, tmp_path, chat):
    """Through drafts, several rows at once and a kill: as if the model had read prompt and answer in one pass."""
    prompts.write_text(prompts.read_text() + "".join(json.dumps(line) + "\n" for line in CHATS if chat))
    options = ["--chat" if chat else "--no-chat", "--states", "--batch", 3, "--dtype", "float32"]
    assert distill(*options, "--limit", 3, max_new_tokens=60)[0] == 0
    own, states = tmp_path / "own.jsonl", tmp_path / "own.states"
    half = states.stat().st_size
    own.write_bytes(own.read_bytes() + b'{"index": 3')
    states.write_bytes(states.read_bytes() + b"half of a state")
    assert distill(*options, max_new_tokens=60)[0] == 0
    assert states.stat().st_size > half
    hf = layerskip.load(folder, dtype="float32", stack="hf").hf
    for line in examples(own):
        kept = line["states"].read(hf.config.hidden_size, torch.float32)
        assert line["states"].of == made_by(fingerprint(folder), torch.float32)
        with torch.no_grad():
            wanted = hf.base_model(torch.tensor([line["input_ids"]])).last_hidden_state[0, :-1]
        torch.testing.assert_close(kept, wanted, rtol=1e-3, atol=1e-3)


def test_states_are_asked_for_from_the_start(distill):
    assert distill("--limit", 2)[0] == 0
    code, _, message = distill("--states")
    assert code == 2
    assert "states differ" in message


def test_a_run_under_other_settings_is_not_continued(distill, folder, tmp_path):
    """The file ended up half from one model or temperature and half from another."""
    assert distill("--limit", 2)[0] == 0
    before = (tmp_path / "own.jsonl").read_bytes()
    code, _, message = distill("--temperature", 1.0, "--separator", " ", max_new_tokens=8)
    assert code == 2
    assert "other settings: max_new_tokens, temperature, separator differ" in message
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    save_file({name: value * 1.5 for name, value in weights.items()}, copy / "model.safetensors")
    code, _, message = distill(model=copy)
    assert "other settings: weights differ" in message
    assert (tmp_path / "own.jsonl").read_bytes() == before
    assert distill("--batch", 1)[1]["found"] == 2


def test_control_c_leaves_whole_lines_and_says_how_to_go_on(distill, monkeypatch, tmp_path):
    each = LanguageModel.each

    def interrupted(self, *arguments, **keywords):
        results = each(self, *arguments, **keywords)
        yield next(results)
        yield next(results)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "each", interrupted)
        code, summary, message = distill()
    assert (code, summary["written"], summary["interrupted"]) == (130, 2, True)
    assert "Traceback" not in message
    assert [line["index"] for line in written(tmp_path / "own.jsonl")] == [0, 1]
    assert distill()[1]["written"] == 4


def test_prompts_come_from_several_files_compressed_and_from_a_named_column(run, folder, tmp_path):
    first, second, output = tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl", tmp_path / "new" / "own.jsonl"
    first.write_bytes(gzip.compress(b'{"question": "one", "prompt": "no"}\n'))
    second.write_text(json.dumps({"question": [{"role": "user", "content": "two"}]}) + "\n")
    code, _, message = run(
        *("distill-data", folder, "--prompts", first, "--prompts", second, "--column", "question"),
        *("--output", output, "--max-new-tokens", 4),
    )
    assert code == 0, message
    assert [line["messages"][0]["content"] for line in written(output)] == ["one", "two"]


def test_mistakes_cost_no_decoding(fails, folder, prompts, tmp_path):
    def given(*arguments, output="own.jsonl", prompts=prompts):
        return fails("distill-data", folder, "--prompts", prompts, "--output", tmp_path / output, *arguments)

    assert "is not named .jsonl" in given(output="own.txt")
    assert "limit is 0" in given("--limit", 0)
    assert "--max-new-tokens is 0" in given("--max-new-tokens", 0)
    assert "no column 'respons'" in given("--column", "respons")
    assert "'response'" in given("--column", "respons")
    assert "cannot read" in given(prompts=tmp_path / "none.jsonl")
    (tmp_path / "answers.jsonl").write_text(
        '{"messages": [{"role": "assistant", "content": "only an answer"}]}\n'
    )
    assert "nothing to answer" in given(prompts=tmp_path / "answers.jsonl")
    (tmp_path / "foreign.jsonl").write_text('{"text": "mine"}\n')
    assert "was not written by distill-data" in given(output="foreign.jsonl")
    (tmp_path / "other.jsonl").write_text('{"index": 0, "prompt": "another", "completion": ""}\n')
    assert "was made from other prompts: number 1" in given(output="other.jsonl")
    assert (tmp_path / "foreign.jsonl").read_text() == '{"text": "mine"}\n'


def test_another_models_tokenizer_reads_the_text(distill, folder, tmp_path):
    """Its ids mean other text there, so the text is encoded anew and the end is as it was."""
    distill("--no-chat", "--limit", 1, max_new_tokens=3)
    (line,) = written(tmp_path / "own.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    line["completion"] = "abc"
    (tmp_path / "own.jsonl").write_text(json.dumps(line) + "\n")
    (example,) = encode(examples(tmp_path / "own.jsonl"), tokenizer, DataOptions(64, template="off"))
    ended = "<|im_end|>" if line["finish_reason"] == "eos" else ""
    assert tokenizer.decode(example.input_ids) == "question 0\nabc" + ended
