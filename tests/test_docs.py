"""What the documents say is true: commands exist, code runs, tables come from result files, links resolve."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import tiny
from layerskip.cli.main import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
README = (ROOT / "README.md").read_text()


def test_tables_and_transcripts_of_the_readme_come_from_result_files():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.filled(README) == README, "run `python benchmarks/tables.py --write`"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_exist(path):
    text = path.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (path.parent / target).exists(), target
    for name in re.findall(r"`((?:src|tests|docs|benchmarks)/[\w./-]+)`", text):
        assert "*" in name or (ROOT / name).exists(), name


def test_every_verb_and_option_in_the_readme_exists():
    from typer.main import get_command

    verbs = get_command(app).commands
    for line in re.findall(r"^layerskip (.*)$", README, re.M):
        verb, *rest = line.split()
        known = {
            option for parameter in verbs[verb].params for option in parameter.opts + parameter.secondary_opts
        }
        assert {word for word in rest if word.startswith("--")} <= known, line
    assert {line.split()[0] for line in re.findall(r"^layerskip (.*)$", README, re.M)} == set(verbs)


def test_the_trainer_of_the_documents_runs(folder, tmp_path, monkeypatch):
    """On a tiny model: what it saves opens with its tokenizer, and names its exits."""
    import layerskip

    text = (ROOT / "docs" / "training.md").read_text()
    [block] = [b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "trainer.save_model" in b]
    for name, ours in (("smollm2-135m-base", str(folder)), ("[4, 8]", "[2, 3]"), ("512", "48")):
        assert name in block
        block = block.replace(name, ours)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text('{"prompt": "say 1", "completion": "abc"}\n' * 4)
    exec(compile(block, "training.md", "exec"), {})
    lm = layerskip.load("./my-model")
    assert lm.facts.exits == (2, 3)
    assert lm.generate("say 1", max_new_tokens=2).stats["mode"] == "ar"


def test_the_trl_trainer_of_the_documents_runs_on_a_cpu(tmp_path, monkeypatch):
    """As it stands, exits apart: TRL's default, bf16, was refused on a machine without a GPU."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("trl")
    text = (ROOT / "docs" / "training.md").read_text()
    [block] = [b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "LayerSkipSFTTrainer(" in b]
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny.tokenizer()
    talk = [{"role": "user", "content": "say 1"}, {"role": "assistant", "content": "abc"}]
    names = {
        "model": tiny.random_model("llama", vocab_size=len(tokenizer)),
        "tokenizer": tokenizer,
        "chats": datasets.Dataset.from_list([{"messages": talk}] * 8),
    }
    exec(compile(block.replace("[4, 8]", "[2, 4]"), "training.md", "exec"), names)
    assert names["args"].bf16 is False or torch.accelerator.is_available()


def test_the_python_blocks_of_the_readme_run(monkeypatch, tmp_path):
    """On a tiny model in place of the built-in one."""
    import layerskip
    from layerskip.decode.language_model import LanguageModel
    from layerskip.model.huggingface import HuggingFaceStack

    model = tiny.random_model("llama", num_hidden_layers=8, vocab_size=260)
    tokenizer = tiny.tokenizer()
    lm = LanguageModel(HuggingFaceStack(model), tokenizer, hf=model)
    monkeypatch.setattr(layerskip, "load", lambda name: lm, raising=False)
    inputs = {"input_ids": torch.tensor([[3, 4, 5]]), "max_new_tokens": 8}
    names = {"hf_model": model, "tokenizer": tokenizer, "inputs": inputs}
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(compile(block, "README.md", "exec"), names)
