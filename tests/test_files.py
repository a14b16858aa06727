"""Files that others made: a checkpoint's stay inside its folder, whatever they hold is read or refused by name."""

import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import layerskip
from layerskip.checkpoint.configuration import read_configuration
from layerskip.checkpoint.facts import Facts, draft_rows, ranked_vocabulary
from layerskip.checkpoint.files import inside
from layerskip.checkpoint.resolve import check_folder, resolve
from layerskip.decode.call import encoded
from layerskip.errors import UserError
from layerskip.measure.lines import read_prompts
from layerskip.reading import named_path, parsed, read_bytes, read_json, read_text


@pytest.fixture
def copy(folder, tmp_path):
    """A checkpoint to spoil."""
    return shutil.copytree(folder, tmp_path / "copy")


def spoil(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def refused(call, *arguments, match=None):
    with pytest.raises(UserError, match=match) as error:
        call(*arguments)
    return error.value


# -- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "/dev/zero",
        "/etc/passwd",
        "../../etc/passwd",
        "..",
        "",
        "a/../../b",
        "..\\x",
        "C:\\x",
        "a\0b",
        7,
        None,
    ],
)
def test_a_checkpoint_names_no_file_outside_its_folder(copy, name):
    """`draft_vocab: /dev/zero` filled the memory, `../../etc/passwd` was read."""
    assert "not inside the folder" in refused(inside, copy, name).message
    if isinstance(name, str):
        refused(ranked_vocabulary, copy, Facts(draft_vocab=name))
        refused(draft_rows, copy, Facts(draft_head=name))


def test_devices_pipes_and_folders_are_no_files_of_a_checkpoint(copy):
    os.mkfifo(copy / "pipe.json")
    (copy / "zero.json").symlink_to("/dev/zero")
    (copy / "folder.json").mkdir()
    for name in ("pipe.json", "zero.json", "folder.json", "none.json"):
        refused(ranked_vocabulary, copy, Facts(draft_vocab=name), match=name)
        if name != "folder.json":
            refused(read_json, copy / name, match=name)
    assert "not a regular file" in refused(check_folder, copy).message  # transformers would open them


def test_links_as_the_cache_of_the_hub_has_them_work(copy, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(copy.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(os.path.relpath(blobs / str(number), copy))
    assert layerskip.load(copy).generate("hello", max_new_tokens=2).tokens


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "~nobody-of-this-name/x", "\ud800"])
def test_a_name_no_file_can_have_is_no_traceback(name):
    refused(named_path, name, match="no file can be named")
    refused(resolve, name)


def test_a_file_where_a_folder_belongs_says_what_to_do(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert "gguf_file=" in refused(resolve, str(tmp_path / "m.gguf"), match="is a file").hint
    assert "gguf_file=" in refused(resolve, str(tmp_path), match="no config.json").hint


# -- content -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[" * 100_000, "nested more than"),
        ('{"a":' * 101 + "1" + "}" * 101, "nested more than"),
        ("9" * 5000, "5000 digits"),
        (f"[{'1' * 40}]", "40 digits"),
        ('"\\ud800"', "half a character"),
        ('{"\\udc00": 1}', "half a character"),
        ("{,}", "is not JSON"),
        ("", "is not JSON"),
    ],
)
def test_json_that_would_break_what_reads_it_is_refused(text, match):
    assert refused(parsed, text, "x.json").message.startswith("x.json")
    refused(parsed, text, "x.json", match=match)


def test_other_json_is_read():
    assert parsed('{"a": ["\\ud83d\\ude42", 0.12345678901234567890, "\\\\ud800", -3]}', "") == {
        "a": ["🙂", 0.12345678901234567890, "\\ud800", -3]
    }
    assert parsed(json.dumps(["[" * 200]), "") == ["[" * 200]
    assert parsed(json.dumps([[i] for i in range(300)]), "") == [[i] for i in range(300)]


def test_files_are_bounded_utf8_and_of_the_kind_that_is_meant(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b"x" * 101)
    refused(read_bytes, file, 100, match="more than")
    for content, match in (
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[1]", "not a JSON object"),
        (b"{", "not valid JSON"),
    ):
        file.write_bytes(content)
        assert str(file) in refused(read_json, file, dict, match=match).message
    bomb = tmp_path / "bomb.gz"
    bomb.write_bytes(gzip.compress(bytes(10**6)))
    refused(read_text, bomb, 10**5, match="more than")
    refused(read_bytes, Path("/dev/zero"), 100, match="regular")


# -- configuration -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": True},
        {"num_attention_heads": 0},
        {"num_attention_heads": "4"},
        {"num_key_value_heads": 3},
        {"hidden_size": 1.5},
        {"vocab_size": []},
        {"rms_norm_eps": "small"},
        {"rope_theta": -1},
        {"eos_token_id": 1.5},
        {"eos_token_id": [True]},
        {"model_type": 7},
        {"model_type": "no-such-model"},
        {"rope_parameters": "none"},
        {"hidden_act": []},
        {"layer_types": 3},
        {"architectures": 3, "model_type": None},
        {"layerskip": []},
        {"layerskip": {"exits": {"1": 1}}},
        {"layerskip": {"exit_layer": [1]}},
        {"layerskip": {"draft_vocab": "/dev/zero", "exits": [2], "exit_layer": 2}},
        {"text_config": {"num_hidden_layers": -3}},
    ],
)
def test_a_configuration_that_cannot_be_is_a_mistake_not_a_traceback(copy, changes, fails, data, tmp_path):
    spoil(copy, **changes)
    fails("generate", copy, "hello", "--max-new-tokens", "2")


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}", '{"a":' * 2000])
def test_a_configuration_is_an_object(copy, content, fails):
    (copy / "config.json").write_text(content)
    fails("generate", copy, "hello")
    if content != "{}":
        refused(read_configuration, copy / "config.json", match=r"config\.json")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation_config.json", '{"eos_token_id": 1.5}'),
        ("generation_config.json", "[]"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[1]"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"chat_template": "{% for"}'),
        ("tokenizer_config.json", '{"model_max_length": "long"}'),
        ("tokenizer_config.json", '{"chat_template": "{{ 1/0 }}"}'),
    ],
)
def test_files_that_transformers_reads_are_mistakes_too(copy, name, content, run):
    (copy / name).write_text(content)
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    code, _, message = run("generate", copy, "hello", "--max-new-tokens", "2")
    assert "Traceback" not in message
    assert code in (0, 2)


def test_training_refuses_such_a_configuration_too(copy, data, tmp_path):
    from layerskip.train.job.recipe import read_recipe
    from layerskip.train.job.run import prepare

    for changes in ({"num_attention_heads": 0}, {"num_hidden_layers": -1}, {"hidden_act": "nothing"}):
        spoil(copy, **changes)
        for source in ("model", "from_config"):
            settings = [f"{source}={copy}", f"data={data}", f"output={tmp_path / 'out'}", "length=48"]
            refused(lambda settings=settings: prepare(read_recipe("tiny", settings)))


# -- weights -------------------------------------------------------------------------------------------------


def test_weights_of_which_a_part_is_missing_are_named_as_an_incomplete_download(copy):
    """A 0-byte safetensors said nothing of the file, or that the disk was full."""
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    for content in (b"", whole[:4], whole[:100], whole[:-1], (2**40).to_bytes(8, "little") + whole[8:]):
        file.write_bytes(content)
        error = refused(check_folder, copy)
        assert str(file) in error.message
        assert "incomplete download" in error.message


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", ["x"], 3])
def test_an_index_names_shards_of_its_folder(copy, shard):
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    refused(check_folder, copy, match=r"index\.json")


# -- the draft head ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [[], [1, 1], [None, 1], [-1], [True], [1.5], ["a"], [2**40], {"1": 1}, None, [[1]], list(range(300))],
)
def test_a_draft_vocabulary_that_cannot_be_is_named_by_its_file(copy, content, fails):
    spoil(copy, layerskip={"exits": [2], "exit_layer": 2, "draft_length": 2, "draft_vocab": "draft.json"})
    (copy / "draft.json").write_text(json.dumps(content))
    message = fails("generate", copy, "hello", "--max-new-tokens", "2")
    assert "draft" in message


def head(rows=6, width=32, **more):
    return {"weight": torch.zeros(rows, width, **more)}


@pytest.mark.parametrize(
    "tensors",
    [
        {"other": torch.zeros(6, 32)},
        {"weight": torch.zeros(6)},
        {"weight": torch.zeros(())},
        head(5),
        head(width=31),
        head(dtype=torch.int64),
        {"weight": torch.full((6, 32), torch.nan)},
    ],
)
def test_a_draft_head_that_cannot_be_is_a_mistake(copy, tensors, fails):
    (copy / "draft.json").write_text(json.dumps([5, 9, 2, 30, 31, 32]))
    entry = {
        "exits": [2],
        "exit_layer": 2,
        "draft_length": 2,
        "draft_vocab": "draft.json",
        "draft_head": "h.safetensors",
    }
    spoil(copy, layerskip=entry)
    save_file(tensors, copy / "h.safetensors")
    message = fails("generate", copy, "hello", "--max-new-tokens", "2")
    assert "draft head" in message or "h.safetensors" in message
    save_file(head(), copy / "h.safetensors")
    assert layerskip.load(copy).generate("hello", max_new_tokens=2, mode="self-speculative").tokens


# -- ids and text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [[True, False], [1, True], [1.5], [1, 2.5], [1, "a"], [-1], [10**9], [10**30], b"hello", bytearray(b"a"), 3,
     None, "half \ud83d", [{"role": "user", "content": "\udc00"}], [{"role": "\ud800", "content": "a"}],
     [{"role": "user", "content": 3}], [None], {"role": "user"}, torch.tensor([1.5]), torch.tensor([True])],
)  # fmt: skip
def test_a_prompt_that_is_none_is_a_mistake(folder, prompt):
    refused(lambda: layerskip.load(folder).generate(prompt, max_new_tokens=1))


def test_ids_are_whole_numbers_wherever_they_are_encoded():
    for prompt in ([5, None], [5, 1.0], [True], b"a", None, 3):
        refused(encoded, None, prompt)


def test_ids_of_numpy_and_torch_are_ids(folder):
    lm = layerskip.load(folder)
    wanted = lm.generate([5, 6, 7], max_new_tokens=3).tokens
    for prompt in (torch.tensor([5, 6, 7]), [np.int64(5), 6, np.int32(7)], (5, 6, 7)):
        assert lm.generate(prompt, max_new_tokens=np.int64(3)).tokens == wanted


@pytest.mark.parametrize(
    "options",
    [{"eos_token_id": 1.5}, {"eos_token_id": [1.5]}, {"eos_token_id": [True]}, {"eos_token_id": "2"}, {"stop": [3]},
     {"stop": 3}, {"stop": [None]}, {"stop": [""]}, {"stop": b"x"}],
)  # fmt: skip
def test_ends_that_are_none_are_mistakes(folder, options):
    refused(lambda: layerskip.load(folder).generate("a", max_new_tokens=1, **options))


def test_a_model_in_memory_without_a_tokenizer_says_how_to_give_one():
    import tiny

    error = refused(lambda: layerskip.generate(tiny.random_model("llama"), "hello", max_new_tokens=1))
    assert "tokenizer=" in error.hint


# -- the cache and outputs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", "long", "nobody"])
def test_an_impossible_cache_folder_is_a_mistake(fails, tmp_path, monkeypatch, place):
    (tmp_path / "file").touch()
    where = {
        "file": tmp_path / "file" / "sub",
        "long": tmp_path / ("x" * 300),
        "nobody": "~nobody-of-this-name/x",
    }
    monkeypatch.setenv("LAYERSKIP_CACHE", str(where[place]))
    assert "LAYERSKIP_CACHE" in fails("generate", "smollm2-135m", "hello")
    assert "free some space" not in fails("generate", "smollm2-135m", "hello")


# -- prompts -------------------------------------------------------------------------------------------------


def test_an_id_stands_in_the_line_of_its_answer(run, folder, tmp_path):
    """A batch's answers could be told apart by their order only."""
    file = tmp_path / "batch.jsonl"
    lines = [{"id": "a-1", "prompt": "one"}, {"prompt": "two"}, {"id": 7, "prompt": "three"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, printed, _ = run("generate", folder, "--batch-file", file, "--json", "--max-new-tokens", "2")
    assert [json.loads(line).get("id") for line in printed.splitlines()] == ["a-1", None, 7]
    code, _, message = run(
        "distill-data", folder, "--prompts", file, "--output", tmp_path / "own.jsonl", "--max-new-tokens", "2"
    )
    assert code == 0, message
    written = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    assert [line.get("id") for line in written] == ["a-1", None, 7]


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("a.jsonl", '[{"prompt": "a"}]', "not one list"),
        ("a.json", '[\n {"prompt": "a"}\n]', "not one list"),
        ("a.csv", "prompt\na\n", "only training data"),
        ("a.jsonl", '{"prompt": "\\ud800"}', ""),
        ("a.jsonl", '{"prompt": "a", "id": ' + "[" * 500 + "]" * 500 + "}", ""),
        ("a.jsonl", "{}\0", "only training data"),
    ],
)
def test_a_batch_file_of_another_kind_says_which(fails, folder, tmp_path, name, content, hint):
    (tmp_path / name).write_text(content)
    assert hint in fails("generate", folder, "--batch-file", tmp_path / name)


@pytest.mark.parametrize("line", ["3", "[]", "null", '"a"', '{"a": 1}'])
def test_a_line_without_the_column_asked_for_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    refused(read_prompts, tmp_path / "a.jsonl", "turns", match="line 1")


def test_a_prompt_that_is_no_utf8_is_a_mistake(fails, folder, tmp_path):
    assert "not text" in fails("generate", folder, stdin=b"\xff\xfe")
    assert "half a character" in fails("generate", folder, "half \udcff")
    (tmp_path / "p.txt").write_bytes(b"a\xff")
    assert "not UTF-8" in fails("generate", folder, "--prompt-file", tmp_path / "p.txt")
