"""Whatever files and command lines hold: success or a UserError, nothing half-written, nothing read outside.

Seeded mutations of inputs that work: a failure names its seed, `case("config", 17, ...)` repeats it.
LAYERSKIP_FULL=1 tries 2,000 of them.
"""

import json
import os
import random
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import layerskip
import tiny
from conftest import FULL
from layerskip.checkpoint.tokenizer import tokenizer_in
from layerskip.cli.main import main
from layerskip.decode.text import encode_prompt, final_text
from layerskip.errors import UserError
from layerskip.measure.lines import read_likelihoods, read_prompts, read_questions
from layerskip.train.data.encoding import DataOptions, encode
from layerskip.train.data.sources import Columns, examples
from layerskip.train.job.recipe import as_yaml, read_recipe

SHARES = {"config": 20, "draft": 15, "tokenizer": 20, "prompts": 30, "data": 30, "recipe": 20, "command": 15}
FACTOR = 14 if FULL else 1
TINY = tiny.tokenizer()
SECRETS = ("/etc/passwd", "/dev/zero", "secret.json")
NASTY = [
    None, True, False, -1, 0, 1, 2, 3, 7, 1.5, -0.0, 1e308, float("nan"), 2**31, 2**63, 10**30, "", " ", "a", "4",
    "a\0b", "/dev/zero", "/etc/passwd", "../secret.json", "../../secret.json", "\ud800", "\x1b[2J\x07", "\u202e",
    "x" * 5000, "{{ 1/0 }}", "{% for", "<|im_end|>", [], [[]], [None], [1, "a"], [True], {}, {"a": 1}, {"": None},
    [-1], ["../x"],
]  # fmt: skip
LETTERS = [
    b"\0",
    b"\xff",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b"\n",
    b"\\",
    b"\xe2\x80",
    b"9" * 5000,
    b"[" * 3000,
]
OPENED: list[str] = []
WATCHED = [False]


def watch_files(event, arguments):
    """Note what Python opens: an audit hook sees every way to."""
    if WATCHED[0] and event == "open" and isinstance(arguments[0], (str, bytes)):
        OPENED.append(os.fsdecode(arguments[0]))


sys.addaudithook(watch_files)


def changed(value, dice):
    """Put something nasty at one place of a value, drop it or add to it."""
    if isinstance(value, dict) and value and dice.random() < 0.8:
        key = dice.choice(sorted(value))
        kind = dice.random()
        if kind < 0.1:
            return {name: one for name, one in value.items() if name != key}
        if kind < 0.2:
            return {
                **value,
                dice.choice(["new", "auto_map", "", "text_config", "id", key + "x"]): dice.choice(NASTY),
            }
        return {**value, key: changed(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.8:
        at = dice.randrange(len(value))
        return [*value[:at], changed(value[at], dice), *value[at + 1 :]]
    return dice.choice(NASTY)


def scrambled(content, dice):
    """Cut, repeat or overwrite bytes."""
    at, end = sorted(dice.choices(range(len(content) + 1), k=2))
    kind = dice.randrange(4)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + content[end:]
    return content[:at] + dice.choice(LETTERS) + content[at + (kind == 2) :]


def written(file, value, dice):
    """Write a value as JSON, changed as a value or as bytes."""
    if dice.random() < 0.7:
        for _ in range(dice.choice([1, 1, 2])):
            value = changed(value, dice)
        content = json.dumps(value).encode()
    else:
        content = scrambled(json.dumps(value).encode(), dice)
    file.write_bytes(content)


def continued(folder):
    lm = layerskip.load(folder)
    lm.generate("ab", max_new_tokens=2)
    lm.generate([{"role": "user", "content": "ab"}], max_new_tokens=2, chat=True)


def config(folder, dice):
    file = folder / "config.json"
    written(file, json.loads(file.read_text()), dice)
    return lambda: continued(folder)


def draft(folder, dice):
    told = json.loads((folder / "config.json").read_text())
    entry = {
        "exits": [2],
        "exit_layer": 2,
        "draft_length": 3,
        "draft_vocab": "vocab.json",
        "draft_vocab_size": 20,
    }
    if dice.random() < 0.5:
        entry |= {"draft_head": "head.safetensors"}
        rows = load_file(folder / "model.safetensors")["lm_head.weight"][:40].clone()
        from safetensors.torch import save

        content = save({"weight": rows})
        (folder / "head.safetensors").write_bytes(
            scrambled(content, dice) if dice.random() < 0.5 else content
        )
    if dice.random() < 0.5:
        entry = changed(entry, dice)
    (folder / "config.json").write_text(json.dumps({**told, "layerskip": entry}))
    written(folder / "vocab.json", list(range(39, -1, -1)), dice)
    return lambda: continued(folder)


def tokenizer(folder, dice):
    file = folder / dice.choice(["tokenizer.json", "tokenizer_config.json"])
    written(file, json.loads(file.read_text()), dice)

    def read():
        found = tokenizer_in(folder)
        for chat in (None, True):
            final_text(found, encode_prompt(found, "ab<|im_end|> c", chat)[:5])

    return read


def prompts(folder, dice):
    file = folder / dice.choice(["a.jsonl", "a.json", "a.jsonl.gz"])
    line = {"prompt": "hi", "task": "x", "context": "a", "response": "b", "id": 3}
    chat = {
        "messages": [{"role": "user", "content": "hi"}],
        "choices": ["a", "b"],
        "answer": 1,
        "turns": ["a"],
        "question_id": 1,
        "category": "qa",
    }
    shared = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    written(file, dice.choice([line, chat, shared, [line, chat]]), dice)
    read = dice.choice([read_prompts, read_likelihoods, read_questions])
    column = dice.choice([None, "prompt", "turns", "conversations", "nothing"])

    def each():
        lines = read_prompts(file, column) if read is read_prompts else read(file)
        for one in lines:
            if read is read_prompts:
                encode_prompt(TINY, one.content, None)

    return each


def data(folder, dice):
    file = folder / (
        "d" + dice.choice([".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".jsonl.gz", ".xlsx", ""])
    )
    record = dice.choice(
        [
            {"prompt": "a", "completion": "b", "text": "c"},
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"text": "abc", "input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "finish_reason": "length"},
            {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]},
        ]
    )
    if file.suffix in (".csv", ".tsv"):
        file.write_bytes(scrambled(b'prompt,completion\na,"b,c"\nd,e\n', dice))
    else:
        written(file, [record, record] if file.suffix == ".json" else record, dice)
    options = DataOptions(dice.choice([8, 64]), template=dice.choice(["auto", "off"]), long="cut")
    source = dice.choice([file, file, folder])

    def read():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            encode(examples(source, Columns()), TINY, options)

    return read


def recipe(folder, dice):
    settings = yaml.safe_load(
        as_yaml(read_recipe(dice.choice(["tiny", "finetune", "lora", "topv2"])), explain=False)
    )
    file = folder / "recipe.yaml"
    if dice.random() < 0.6:
        file.write_bytes(json.dumps(changed(settings, dice)).encode())  # JSON is YAML
    else:
        file.write_bytes(scrambled(yaml.safe_dump(settings).encode(), dice))
    key = dice.choice([*settings, "lora.rank", "columns.text", "x", "lora", ""])
    value = str(dice.choice(NASTY))
    overrides = [f"{key}={value}"] * dice.randrange(2) + [
        dice.choice(["a", "=", "a.b.c=1", "steps=[", "steps=&a"])
    ] * (dice.random() < 0.2)
    return lambda: as_yaml(read_recipe(str(file), overrides))


def command(folder, dice):
    """Call the command line with arguments that a user may slip into."""
    verb = dice.choice(
        ["generate", "generate", "recipes", "models", "train", "inspect", "eval", "doctor", "bench", "x"]
    )
    flags = ["--max-new-tokens", "--exit-layer", "--draft-length", "--draft-vocab", "--temperature", "--top-k",
             "--stop", "--policy", "--stack", "--dtype", "--device", "--batch-file", "--prompt-file", "--seed",
             "--threads"]  # fmt: skip
    nasty = [str(one) for one in NASTY if not (isinstance(one, str) and "\0" in one)]
    words = {"recipes": [dice.choice(["show", "ls", "plot", "x"])], "train": ["tiny"]}.get(
        verb, [str(folder), "hi"]
    )
    for _ in range(dice.choice([1, 1, 2])):
        if verb in ("generate", "inspect", "eval", "doctor", "bench"):
            words += [dice.choice(flags), dice.choice(nasty)]
        else:
            words.append(dice.choice(nasty) if dice.random() < 0.5 else f"steps={dice.choice(nasty)}")
    if dice.random() < 0.3:
        words[0] = dice.choice(nasty)
    words += ["--max-new-tokens", "2"] if verb == "generate" else []

    def call():
        before = sys.argv, sys.stdin, os.getcwd()
        sys.argv, sys.stdin = ["layerskip", verb, *words], None
        os.chdir(folder)
        try:
            main()
        except SystemExit as left:
            code = left.code
        finally:
            sys.argv, sys.stdin = before[:2]
            os.chdir(before[2])
        assert code in (0, 1, 2, None)

    return call


MAKERS = {kind.__name__: kind for kind in (config, draft, tokenizer, prompts, data, recipe, command)}


def case(kind, seed, folder, scratch):
    """Make one input and use it. Raises: AssertionError, or what should have been a UserError."""
    dice = random.Random(f"{kind} {seed}")
    place = scratch / str(seed)
    if kind in ("prompts", "data", "recipe"):
        place.mkdir()
    else:
        shutil.copytree(folder, place)
    call = MAKERS[kind](place, dice)
    before = {file.relative_to(place) for file in place.rglob("*")}
    refusal = "fine"
    OPENED.clear()
    WATCHED[0] = True
    try:
        call()
    except UserError as error:
        refusal = error.message
    finally:
        WATCHED[0] = False
    outside = [name for name in OPENED if name in SECRETS or Path(name).name == "secret.json"]
    assert not outside or kind == "command", "read outside the folder"  # a user may name any file
    left = {file.relative_to(place) for file in place.rglob("*")} - before
    assert not left, "left behind"
    assert refusal.strip()
    shutil.rmtree(place)


@pytest.mark.parametrize("kind", MAKERS)
def test_any_input_is_read_or_refused(kind, folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LAYERSKIP_KERNELS", "off")
    for place in (tmp_path, tmp_path / kind):
        place.mkdir(exist_ok=True)
        (place / "secret.json").write_text("[1, 2, 3]")
    for seed in range(SHARES[kind] * FACTOR):
        try:
            case(kind, seed, folder, tmp_path / kind)
        except BaseException as error:
            error.add_note(f"input: {kind} {seed}")
            raise
    assert "Traceback" not in capfd.readouterr().err
