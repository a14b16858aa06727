"""Prompts that the built-in model answers to learn to draft; every source is permissive and counted.

    python scripts/builtin_prompts.py work/prompts --open-turns 1600       # then distill-data continues these
    python scripts/builtin_prompts.py work/prompts --data DATA --questions work/questions.jsonl

Writes JSON lines, one file for each kind; `asked.jsonl`, all of them mixed but code; `continued.jsonl`, code, which
is continued as text; and `sources.json`: per source its name, licence and count. `--data` is a folder with gsm8k/,
oasst-en-100/, synthetic-conversations/ and standard-ebooks/ (what is missing is left out); Python source comes from
the interpreter's own library and from the packages named here, where installed. An open turn is a chat up to where
the user speaks: what the model writes there is a question as it knows them.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import importlib.util
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGES = {
    "sympy": "BSD-3-Clause",
    "networkx": "BSD-3-Clause",
    "numpy": "BSD-3-Clause",
    "pandas": "BSD-3-Clause",
    "sklearn": "BSD-3-Clause",
    "django": "BSD-3-Clause",
    "twisted": "MIT",
    "sqlalchemy": "MIT",
    "nltk": "Apache-2.0",
    "sphinx": "BSD-2-Clause",
    "transformers": "Apache-2.0",
}
OPEN_TURN = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n"
)
SUMMARIES = (
    "Summarize: {}",
    "Article: {}\nSummary:",
    "Summarize the following text:\n\n{}",
    "{}\n\nWrite a short summary of the text above.",
    "Summarize in three sentences:\n\n{}",
)
ABOUT = (
    "{}\n\nWhat is the main point of this passage?",
    "Read the text and answer in your own words: who or what is it about?\n\n{}",
    "Continue the story:\n\n{}",
    "{}\n\nHow does the writer feel about what happens here, and how can you tell?",
)
REWRITES = (
    "Rewrite this in plain modern English:\n\n{}",
    "Correct the grammar and spelling of the following text. Change nothing else.\n\n{}",
    "Rewrite the text below so that it is half as long:\n\n{}",
    "Make this more formal:\n\n{}",
    "Rewrite this as a list of short sentences, one for each fact:\n\n{}",
    "Change the text into the present tense:\n\n{}",
    "Replace every name in this text by a modern one, and keep the rest as it is:\n\n{}",
)
EXTRACTIONS = (
    "List all the names of people and places in this text:\n\n{}",
    "Extract the key facts from the text as bullet points.\n\n{}",
    "{}\n\nGive the most important words of the text above as a JSON list.",
    "Quote the sentence of this text that matters most, word for word.\n\n{}",
    "Make a table with the columns who, what and where from this text:\n\n{}",
    "{}\n\nWhich sentences above contain direct speech? Copy them.",
)
QUESTIONS = (
    "{context}\n\nQuestion: who is {name}?\nAnswer:",
    "Use the passages to answer the question.\n\n{context}\n\nWhat do the passages say about {name}?",
    "{context}\n\nAccording to the text, what does {name} do?",
    "Answer from the context only, and quote the sentence that says it.\n\nContext: {context}\n\nQuestion: "
    "where is {name} mentioned?",
)
LANGUAGES = {"de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "pt": "Portuguese"}
INTO = ("Translate to {}: {}", "Translate English to {}: {}", "How do you say this in {}? {}")
ON_CODE = (
    "Explain what this Python function does:\n\n```python\n{}\n```",
    "Write a docstring for this function:\n\n```python\n{}\n```",
    "Rewrite this function with type hints:\n\n```python\n{}\n```",
    "Find possible mistakes in this code and show it corrected:\n\n```python\n{}\n```",
    "Write unit tests for this function:\n\n```python\n{}\n```",
)


class Collection:
    """Files of JSON lines, and what went into them."""

    def __init__(self, folder: Path, seed: int, share: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.random, self.share = folder, random.Random(seed), share
        self.sources: list[dict[str, Any]] = []

    def count(self, number: int) -> int:
        return max(4, round(number * self.share))

    def write(self, kind: str, lines: list[dict[str, Any]], source: str, licence: str) -> None:
        """Append lines to the kind's file; nothing is said of a source that gave nothing."""
        if not lines:
            return
        with (self.folder / f"{kind}.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self.sources.append({"kind": kind, "source": source, "licence": licence, "count": len(lines)})

    def sample(self, items: list[Any], number: int) -> list[Any]:
        return self.random.sample(items, min(len(items), self.count(number)))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines, also .gz; nothing where there is no such file."""
    if not path.is_file():
        return []
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in content.decode("utf-8").split("\n") if line]


def maths(made: Collection, data: Path) -> None:
    questions = read_lines(data / "gsm8k" / "train.jsonl.gz")
    lines = [{"prompt": line["prompt"]} for line in questions[: made.count(7473)]]
    made.write("maths", lines, "GSM8K, training questions", "MIT")


def chat(made: Collection, data: Path, questions: Path | None) -> None:
    """People's questions, and those the model makes up itself (what it continues a user's turn with)."""
    asked = [str(line) for line in read_lines(data / "oasst-en-100" / "prompt_lottery_en_250_text.jsonl")]
    asked += [t["prompt"]["text"] for t in read_lines(data / "oasst-en-100" / "en_100_tree.jsonl")]
    unique = [{"prompt": text} for text in dict.fromkeys(asked)]
    made.write("chat", made.sample(unique, 400), "OpenAssistant, English prompts", "Apache-2.0")
    chats = read_lines(data / "synthetic-conversations" / "synthetic_conversations_1k.jsonl")
    plain = {re.sub(r" \(v\d+\)", "", line["messages"][0]["content"]): None for line in chats}
    lines = [{"prompt": text} for text in plain]
    made.write("chat", lines, "synthetic conversations, first turns without their number", "Apache-2.0")
    own = [] if questions is None else read_lines(questions)
    ended = {line["completion"].strip() for line in own if line.get("finish_reason") == "eos"}
    lines = [{"prompt": text} for text in sorted(ended) if 15 <= len(text) <= 500 and text.isascii()]
    made.write("chat", lines, "questions written by SmolLM2-135M-Instruct itself", "Apache-2.0")


def passages(text: str, random_: random.Random, low: int, high: int) -> Iterator[str]:
    """Cut running text at its paragraphs into passages of `low` to `high` characters."""
    passage, size = [], random_.randint(low, high)
    for paragraph in re.split(r"\n\s*\n", text):
        passage.append(" ".join(paragraph.split()))
        if sum(map(len, passage)) >= size:
            if (joined := "\n\n".join(passage)) and len(joined) <= 1.3 * high:
                yield joined
            passage, size = [], random_.randint(low, high)


def books(made: Collection, data: Path) -> None:
    path = data / "standard-ebooks" / "standard_ebooks_en.txt.gz"
    if not path.is_file():
        return
    text = gzip.decompress(path.read_bytes()).decode("utf-8").replace("<|book|>", "\n\n")
    source, licence = "Standard Ebooks, 14 books", "CC0-1.0"
    short = made.sample(list(passages(text, made.random, 500, 1800)), 1500)
    cut = len(short) * 2 // 3
    for kind, templates, part in (("summaries", SUMMARIES, short[:cut]), ("chat", ABOUT, short[cut:])):
        lines = [{"prompt": made.random.choice(templates).format(passage)} for passage in part]
        made.write(kind, lines, source, licence)
    made.write(
        "rewriting",
        filled(made, REWRITES, list(passages(text, made.random, 200, 900)), 2000),
        source,
        licence,
    )
    made.write(
        "extraction",
        filled(made, EXTRACTIONS, list(passages(text, made.random, 400, 1500)), 1500),
        source,
        licence,
    )
    pairs = list(zip(*[iter(passages(text, made.random, 400, 1200))] * 2, strict=False))
    made.random.shuffle(pairs)
    lines = []
    for pair in pairs:
        names = re.findall(r"(?<=[a-z,] )[A-Z][a-z]{3,}(?: [A-Z][a-z]+)?", " ".join(pair))
        if names:
            context, name = "\n\n".join(pair), made.random.choice(names)
            lines.append({"prompt": made.random.choice(QUESTIONS).format(context=context, name=name)})
    made.write("retrieval", lines[: made.count(1500)], source, licence)
    sentences = re.findall(r"(?<=[.!?] )[A-Z][^.!?“”]{30,180}[.!?]", " ".join(text.split()))
    lines = [
        {"prompt": made.random.choice(INTO).format(made.random.choice([*LANGUAGES.values()]), sentence)}
        for sentence in made.sample(sentences, 1000)
    ]
    made.write("translation", lines, source, licence)


def filled(
    made: Collection, templates: tuple[str, ...], texts: list[str], number: int
) -> list[dict[str, Any]]:
    """Put some of the texts into templates, one each."""
    return [{"prompt": made.random.choice(templates).format(text)} for text in made.sample(texts, number)]


def translations(made: Collection) -> None:
    """Messages of Django and Sphinx in other languages, to be put into English."""
    for name, licence in (("django", "BSD-3-Clause"), ("sphinx", "BSD-2-Clause")):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        lines = []
        for code, language in LANGUAGES.items():
            for path in sorted(Path(spec.origin).parent.rglob(f"locale/{code}/LC_MESSAGES/*.po")):
                for match in re.finditer(
                    r'^msgstr ((?:"[^"\\]*"\n)+)', path.read_text(encoding="utf-8"), re.M
                ):
                    said = "".join(re.findall(r'"([^"]*)"', match[1]))
                    if 40 <= len(said) <= 400 and "%" not in said and "{" not in said:
                        lines.append({"prompt": f"Translate {language} to English: {said}"})
        made.write("translation", made.sample(lines, 700), f"{name} (PyPI), messages", licence)


def python_files() -> Iterator[tuple[str, str, list[Path]]]:
    """Python source by package: the interpreter's own library, then the named packages that are installed."""
    library = Path(sysconfig.get_paths()["stdlib"])
    own = [path for path in library.rglob("*.py") if not {"site-packages", "test", "tests"} & {*path.parts}]
    yield "Python standard library", "PSF-2.0", sorted(own)
    for name, licence in PACKAGES.items():
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            files = Path(spec.origin).parent.rglob("*.py")
            yield f"{name} (PyPI)", licence, sorted(path for path in files if "tests" not in path.parts)


def beginnings(source: str) -> Iterator[str]:
    """The head of each documented function, up to the end of its docstring."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines()
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or node.decorator_list:
            continue
        told = ast.get_docstring(node)
        if told is None or not 60 <= len(told) <= 700 or len(node.body) < 2:
            continue
        yield "\n".join(lines[node.lineno - 1 : node.body[0].end_lineno])


def functions(source: str) -> Iterator[str]:
    """Functions of a file that are neither trivial nor long."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in tree.body:
        if (
            isinstance(node, ast.FunctionDef)
            and node.end_lineno is not None
            and 5 <= node.end_lineno - node.lineno <= 30
        ):
            yield "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])


def documentation(source: str) -> str | None:
    """What a file says of itself at its head, where that is more than a line."""
    try:
        told = ast.get_docstring(ast.parse(source))
    except (SyntaxError, ValueError):
        return None
    return told[:3000] if told is not None and len(told) > 400 else None


def code(made: Collection) -> None:
    for source, licence, files in python_files():
        texts = [path.read_text(encoding="utf-8", errors="ignore") for path in made.sample(files, 400)]
        heads = [head for text in texts for head in beginnings(text)]
        made.write("code", [{"prompt": head} for head in made.sample(heads, 150)], source, licence)
        whole = [function for text in texts for function in functions(text)]
        made.write("on-code", filled(made, ON_CODE, whole, 150), source, licence)
        told = [doc for text in texts if (doc := documentation(text)) is not None]
        made.write("summaries", filled(made, SUMMARIES, told, 60), source, licence)


def once(folder: Path) -> None:
    """Keep one of prompts that differ in numbers, case and marks alone, whatever file they stand in."""
    seen = set()
    for path in sorted(folder.glob("*.jsonl")):
        kept = []
        for line in read_lines(path):
            words = re.findall(r"[a-z]+", line["prompt"].lower())
            if (key := " ".join(words)) not in seen:
                kept.append(json.dumps(line, ensure_ascii=False) + "\n")
            seen.add(key)
        path.write_text("".join(kept), encoding="utf-8")


def mixed(folder: Path, random_: random.Random) -> None:
    """Put prompts in random order, so that the first thousand are of all kinds; each tells its kind in its id."""
    files = {path.stem: read_lines(path) for path in sorted(folder.glob("*.jsonl"))}
    for name, kinds in (("asked", {*files} - {"code"}), ("continued", {"code"} & {*files})):
        lines = [
            {"id": f"{kind}:{i}", **line} for kind in sorted(kinds) for i, line in enumerate(files[kind])
        ]
        random_.shuffle(lines)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--questions", type=Path, help="what distill-data wrote for open user turns")
    parser.add_argument("--open-turns", type=int, help="write so many of these and nothing else")
    parser.add_argument("--share", type=float, default=1.0, help="of the default counts")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.open_turns is not None:
        given.output.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"prompt": OPEN_TURN}) + "\n"
        (given.output / "open.jsonl").write_text(line * given.open_turns, encoding="utf-8")
        return
    for old in given.output.glob("*.json*"):
        old.unlink()
    made = Collection(given.output, given.seed, given.share)
    maths(made, given.data)
    chat(made, given.data, given.questions)
    books(made, given.data)
    translations(made)
    code(made)
    once(given.output)
    mixed(given.output, made.random)
    (given.output / "sources.json").write_text(json.dumps(made.sources, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
