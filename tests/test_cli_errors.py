"""The command line refuses what it cannot do: exit code 2, a hint, no traceback."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from layerskip.model import cache

L = tiny.NUM_LAYERS


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--exit-layer", 0), f"choose one from 1 to {L - 1}"),
        (("--exit-layer", L), f"choose one from 1 to {L - 1}"),
        (("--exit-layer", L + 1), f"the model has {L} layers"),
        (("--exit-layer", L, "--mode", "early-exit"), "out of range"),
        (("--draft-length", -1), "--draft-length must be a whole number, from 0 to 31"),
        (("--mode", "speculative"), "did you mean 'self-speculative'?"),
        (("--dtype", "floaty32"), "did you mean 'float32'"),
        (("--device", "cuda:17"), "try --device cpu"),
        (("--device", "toaster"), "try --device cpu"),
        (("--draft-vocab", "most"), "--draft-vocab must be a whole number, auto or off"),
        (("--draft-vocab", 0), "--draft-vocab a number from 1 to 259"),
        (("--draft-vocab", 260), "--draft-vocab a number from 1 to 259"),
        (("--policy", "dynamic"), "known: adaptive, confidence, fixed"),
        (("--max-new-tokens", 0), "--max-new-tokens must be a whole number, at least 1"),
        (("--batch-size", 0), "at least 1"),
        (("--temperature", -1), "--temperature must be a number, from 0 to 1e+06: 0 is greedy"),
        (("--top-p", 0), "--top-p must be a number, above 0 and at most 1"),
        (
            ("--top-k", -1),
            "--top-k must be a whole number, at least 0: Keep the k most probable tokens; 0 is off",
        ),
        (("--min-p", 1), "--min-p must be a number, at least 0 and below 1"),
        (("--repetition-penalty", 0), "--repetition-penalty must be a number, above 0"),
        (("--stop", ""), "stop string is empty"),
        (("--prompt-file", "x.txt"), "give one source of prompts"),
        (("--batch-file", "x.txt"), "give one source of prompts"),
    ],
    ids=str,
)
def test_a_bad_option_says_what_would_be_right(fails, folder, arguments, expected):
    assert expected in fails("generate", folder, "hello", *arguments)


@pytest.mark.parametrize("command", [("generate", "x"), ("chat",), ("demo",)], ids=lambda c: c[0])
def test_an_unknown_model_is_an_error_with_a_suggestion(fails, command):
    verb, *rest = command
    message = fails(verb, "smollm2-135", *rest)
    assert "no model 'smollm2-135'" in message
    assert "did you mean 'smollm2-135m' or" in message


@pytest.mark.parametrize("arguments", [("",), ("  \n",), ()])
def test_an_empty_prompt_is_an_error(fails, folder, arguments):
    assert "the prompt is empty" in fails("generate", folder, *arguments, stdin=" \n")


def test_a_prompt_longer_than_the_context_is_an_error(fails, folder):
    assert f"the context is {tiny.CONTEXT}" in fails("generate", folder, "x" * 300)


def test_a_prompt_file_that_cannot_be_read_is_an_error(fails, folder, tmp_path):
    assert "cannot read" in fails("generate", folder, "--prompt-file", tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "cannot read" in fails("generate", folder, "--prompt-file", tmp_path / "binary")
    assert "cannot read" in fails("generate", folder, "--batch-file", tmp_path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("hello", "line 3 is not JSON"),
        ("{}", 'line 3: give either prompt or messages\n  a line is {"prompt": "..."} or'),
        (
            '{"promt": "a"}',
            "line 3: give either prompt or messages\n  it has 'promt': did you mean 'prompt'?",
        ),
        ('"hello"', "line 3: "),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "give either prompt or messages"),
        ('{"messages": [{"role": "user"}]}', "line 3: messages.0.content"),
        ('{"messages": []}', "the prompt is empty"),
        ('{"prompt": " "}', "the prompt is empty"),
    ],
)
def test_a_bad_batch_line_is_named(fails, folder, tmp_path, line, expected):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n\n' + line + "\n")
    message = fails("generate", folder, "--batch-file", file)
    assert expected in message
    assert "line 3" in message


def test_a_batch_file_without_prompts_is_an_error(fails, folder, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n")
    assert "has no prompts" in fails("generate", folder, "--batch-file", file)


@pytest.fixture
def damaged(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "damaged")


def test_a_folder_without_a_tokenizer_cannot_take_text(fails, damaged):
    for file in damaged.glob("*token*"):
        file.unlink()
    (damaged / "chat_template.jinja").unlink()
    for arguments in ((), ("--json",), ("--chat",), ("--stop", "x")):
        assert "tokenizer" in fails("generate", damaged, "hello", *arguments)
    assert "tokenizer" in fails("chat", damaged, stdin="hello\n")
    assert "tokenizer" in fails("demo", damaged)


def test_without_a_chat_template_text_is_continued_and_a_chat_refused(run, fails, damaged):
    (damaged / "chat_template.jinja").unlink()
    code, printed, _ = run("generate", damaged, "hello", "--max-new-tokens", 3, "--json")
    assert code == 0
    assert json.loads(printed)["stats"]["prompt_tokens"] == len("hello")
    assert "no chat template" in fails("generate", damaged, "hello", "--chat")
    assert "layerskip generate" in fails("chat", damaged, stdin="hello\n")


def test_damaged_weights_are_an_error(fails, damaged):
    weights = load_file(damaged / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    assert "nan" in fails("generate", damaged, "hello").lower()
    (damaged / "model.safetensors").write_bytes(b"not weights")
    assert "cannot load" in fails("generate", damaged, "hello")
    (damaged / "config.json").write_text("{")
    assert "not valid JSON" in fails("generate", damaged, "hello")


def test_a_pickled_checkpoint_is_refused_with_the_way_out(fails, damaged):
    weights = load_file(damaged / "model.safetensors")
    (damaged / "model.safetensors").unlink()
    torch.save(weights, damaged / "pytorch_model.bin")
    message = fails("generate", damaged, "hello")
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


def test_a_cache_that_does_not_fit_is_an_error_before_any_work(fails, folder, monkeypatch):
    monkeypatch.setattr(cache, "available_bytes", lambda device: 20_000)
    message = fails("generate", folder, "hello")
    assert "not enough memory for the key/value cache" in message
    assert "lower --max-new-tokens" in message


@pytest.mark.parametrize("arguments", [("--frobnicate",), ("--exit-layer", "two"), ("--json", "a", "b")])
def test_what_the_parser_refuses_is_exit_code_2_too(run, folder, arguments):
    code, printed, message = run("generate", folder, "hello", *arguments)
    assert (code, printed) == (2, "")
    assert message.startswith("Usage: layerskip generate")
    assert "Traceback" not in message


def test_every_verb_explains_itself(run):
    code, printed, _ = run("--help")
    assert code == 0
    for verb in ("generate", "chat", "models", "env", "demo", "bench", "draft-vocab"):
        assert verb in printed
        code, page, _ = run(verb, "--help")
        assert code == 0
        assert f"layerskip {verb}" in page.split("Usage:")[1].split("\n", 1)[1], "an example to copy"
    code, printed, message = run()
    assert code == 2
    assert "Usage" in printed + message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "tiny", "modl=1"], "unknown key 'modl' in the recipe"),
        pytest.param(["generate", ".", "hello"], ". is not a checkpoint", marks=pytest.mark.slow),
    ],
    ids=["without torch", "with torch"],
)
def test_a_real_process_leaves_with_code_2_and_no_traceback(tmp_path, arguments, message):
    command = [sys.executable, "-c", "from layerskip.cli.main import main; main()", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (process.returncode, process.stdout) == (2, "")
    *_, error, hint = process.stderr.splitlines()  # a line of progress may precede them
    assert "Traceback" not in process.stderr
    assert error.startswith(f"error: {message}")
    assert hint.startswith("  ")


def test_a_prompt_that_ends_by_an_error_is_told_beside_the_answers_of_the_others(
    folder, run, tmp_path, monkeypatch
):
    import layerskip

    each = layerskip.LanguageModel.each

    def failing(self, *given, **options):
        for number, one in enumerate(each(self, *given, **options)):
            if number == 1:
                one.error, one.finish_reason = ValueError("no way on"), "error"
            yield one

    monkeypatch.setattr(layerskip.LanguageModel, "each", failing)
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join('{"prompt": "abc"}' for _ in range(3)))
    code, printed, _ = run("generate", folder, "--batch-file", file, "--max-new-tokens", "3", "--json")
    lines = [json.loads(line) for line in printed.splitlines()]
    assert (code, [line.get("error") for line in lines]) == (1, [None, "no way on", None])
    code, _, message = run("generate", folder, "--batch-file", file, "--max-new-tokens", "3")
    assert (code, message.count("no way on")) == (1, 1)
