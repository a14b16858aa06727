"""What the documents say is true: they render, commands exist, code runs, tables come from result files."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt

import tiny
from layerskip.cli.main import app

ROOT = Path(__file__).parent.parent
PLACES = ("*.md", "docs/*.md", "docs/*.ipynb", "benchmarks/*.md", "src/**/*.md")
DOCUMENTS = sorted(path for place in PLACES for path in ROOT.glob(place))
README = (ROOT / "README.md").read_text()


def written(path):
    """The text of a document: of a notebook its cells in words."""
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown") + "\n"


def parsed(path):
    """The lines of a document and its tokens; front matter counts as empty lines."""
    text = written(path)
    if text.startswith("---\n"):
        head, text = text[4:].split("\n---\n", 1)
        text = "\n" * (head.count("\n") + 3) + text
    return text.splitlines(), MarkdownIt("commonmark").enable("table").parse(text)


def headings(tokens):
    """(level, words, anchor) of each heading, anchors as GitHub makes them."""
    found = []
    for token, inline in pairwise(tokens):
        if token.type == "heading_open":
            words = "".join(child.content for child in inline.children)
            anchor = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            found.append((int(token.tag[1]), words, anchor))
    return found


documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


@documents
def test_headings_are_one_title_and_levels_below_it_without_a_jump(path):
    levels = [level for level, _, _ in headings(parsed(path)[1])]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


@documents
def test_every_fence_is_closed_names_its_language_and_swallows_no_section(path):
    """The README's transcript had a fence in a fence: three sections were printed as code."""
    lines, tokens = parsed(path)
    for token in tokens:
        if token.type == "fence":
            first, behind = token.map
            assert token.info, f"line {first + 1}: a fence without a language"
            assert lines[behind - 1].strip() == token.markup, f"line {first + 1}: a fence that nothing closes"
            assert not re.search(r"^(##+ |<!-- )", token.content, re.M), (
                f"line {first + 1}: a section in a fence"
            )


@documents
def test_tables_are_read_as_tables_and_their_rows_have_the_cells_of_the_head(path):
    lines, tokens = parsed(path)
    read = set()
    for token in tokens:
        if token.type in ("table_open", "fence"):
            read |= set(range(*token.map))
        if token.type == "table_open":
            cells = [len(re.findall(r"(?<!\\)\|", lines[number])) for number in range(*token.map)]
            assert len(set(cells)) == 1, f"lines {token.map[0] + 1} to {token.map[1]}: cells {cells}"
    stray = [number + 1 for number, line in enumerate(lines) if line.startswith("|") and number not in read]
    assert not stray, f"lines {stray} are no part of a table"


@documents
def test_no_html_but_comments(path):
    for token in parsed(path)[1]:
        for part in [token, *(token.children or [])]:
            if part.type.startswith("html"):
                assert re.fullmatch(r"(<!--.*?-->\s*)+", part.content, re.S), part.content


@documents
def test_links_and_named_files_exist(path):
    for token in parsed(path)[1]:
        for part in token.children or []:
            target = part.attrGet("href") or part.attrGet("src")
            if target and not target.startswith("http"):
                name, _, anchor = target.partition("#")
                file = (path.parent / name).resolve() if name else path
                assert file.exists(), target
                assert not anchor or anchor in [found for _, _, found in headings(parsed(file)[1])], target
    for name in re.findall(r"`((?:\w+/)+[\w-]+\.\w+|(?:src|tests|docs|benchmarks)/[\w./-]+)`", written(path)):
        assert (ROOT / name).exists() or (ROOT / "src" / "layerskip" / name).exists(), name


def test_the_readme_is_a_first_page():
    assert len(README.splitlines()) <= 150


def test_tables_and_transcripts_come_from_result_files(benchmark):
    tables = benchmark("tables")
    for page in tables.PAGES:
        assert tables.filled(page) == (ROOT / page).read_text(), "run `python benchmarks/tables.py --write`"


def commands(text):
    """The layerskip commands of a page, in fences and in backticks; <places to fill in> are none."""
    return re.findall(r"^layerskip (\w.*)$", text, re.M) + re.findall(r"`layerskip (\w[^`]*)`", text)


@documents
def test_every_verb_and_option_in_the_documents_exists(path):
    from typer.main import get_command

    verbs = get_command(app).commands
    for line in commands(written(path).replace("\\\n", " ")):
        verb, *rest = line.split("  #")[0].split()
        assert verb in verbs, line
        known = {
            option for parameter in verbs[verb].params for option in parameter.opts + parameter.secondary_opts
        }
        assert {word for word in rest if word.startswith("--")} <= known, line


def test_the_readme_names_every_verb():
    from typer.main import get_command

    assert {line.split()[0] for line in commands(README)} == set(get_command(app).commands)


def test_the_trainer_of_the_documents_runs(folder, tmp_path, monkeypatch):
    """On a tiny model: what it saves opens with its tokenizer, and names its exits."""
    import layerskip

    text = (ROOT / "docs" / "training.md").read_text()
    [block] = [
        b
        for b in re.findall(r"```python\n(.*?)```", text, re.S)
        if "trainer.save_model(" in b and "LayerSkipTrainer" in b
    ]
    for name, ours in (("smollm2-135m-base", str(folder)), ("[4, 8]", "[2, 3]"), ("512", "48")):
        assert name in block
        block = block.replace(name, ours)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text('{"prompt": "say 1", "completion": "abc"}\n' * 4)
    exec(compile(block, "training.md", "exec"), {})
    lm = layerskip.load("./my-model")
    assert lm.facts.exits == (2, 3)
    assert lm.generate("say 1", max_new_tokens=2).stats["drafter"] == "lookup"


@pytest.mark.parametrize("added", [True, False], ids=["with exits", "as it was before"])
def test_the_sft_script_of_the_documents_runs_with_and_without_its_two_new_lines(
    folder, tmp_path, monkeypatch, added
):
    """As it stands, exits apart: TRL's default, bf16, was refused on a machine without a GPU."""
    import layerskip

    pytest.importorskip("datasets")
    pytest.importorskip("trl")
    text = (ROOT / "docs" / "training.md").read_text()
    [block] = [b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "LayerSkipSFTTrainer as" in b]
    new = [line for line in block.splitlines() if line.endswith("# new")]
    assert len(new) == 2
    for line in [] if added else new:
        block = block.replace(line, "bf16=False," if "exits" in line else "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "your-model").symlink_to(folder)
    talk = [{"role": "user", "content": "say 1"}, {"role": "assistant", "content": "abc"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 8)
    names = {}
    exec(compile(block.replace("[4, 8]", "[2, 4]"), "training.md", "exec"), names)
    assert names["args"].bf16 is False or torch.accelerator.is_available()
    assert hasattr(names["trainer"], "exits") == added
    lm = layerskip.load("./my-model")
    assert lm.facts.exits == ((2, 4) if added else ())
    drafted = lm.generate("say 1", max_new_tokens=4, exit_layer=2, draft_length=2)
    assert drafted.tokens == lm.generate("say 1", max_new_tokens=4, mode="ar").tokens


def test_the_python_blocks_of_readme_usage_and_quick_start_run(monkeypatch):
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
    pages = [ROOT / "README.md", ROOT / "docs" / "usage.md", ROOT / "docs" / "quickstart.md"]
    for page in pages:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
            exec(compile(block, page.name, "exec"), names)
