"""Training data as it is read: files, folders, data sets, tables, chats of others; mistakes are named."""

import gzip
import json

import pytest

import tiny
from layerskip.errors import UserError
from layerskip.train.data.packing import (
    Columns,
    DataOptions,
    encode,
    examples,
)


def jsonl(path, records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


# -- reading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_every_format_gives_the_same_examples(tmp_path, name):
    records = [
        {"domain": "x", "prompt": "one\u2028line", "response": "1"},
        {"prompt": "two", "response": "2"},
    ]
    path = tmp_path / name
    if name.endswith("json"):
        path.write_text(json.dumps(records))
    elif name.endswith("parquet"):
        pq = pytest.importorskip("pyarrow.parquet")
        pyarrow = pytest.importorskip("pyarrow")
        pq.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        jsonl(path, records)
    found = list(examples(path, Columns(completion="response")))
    assert [(e["prompt"], e["completion"]) for e in found] == [("one\u2028line", "1"), ("two", "2")]
    assert str(path) in found[1]["where"]
    assert "2" in found[1]["where"]


def test_a_folder_gives_its_sources_in_order_and_only_its_data_files_when_it_has_some(tmp_path):
    (tmp_path / "b.py").write_text("pass\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c.md").write_text("# Title\n")
    (tmp_path / "package.json").write_text('{"name": "no data"}')
    (tmp_path / ".hidden.py").write_text("no")
    (tmp_path / "image.png").write_bytes(b"\x89")
    assert [e["text"] for e in examples(tmp_path)] == ["# Title\n", "pass\n"]
    (tmp_path / "bad.py").write_bytes(b"\xff\xfe")
    with pytest.warns(UserWarning, match=r"bad\.py is not UTF-8"):
        assert len(list(examples(tmp_path))) == 2
    jsonl(tmp_path / "train.jsonl", [{"text": "data"}])
    assert [e["text"] for e in examples(tmp_path)] == ["data"]


def test_a_data_set_is_loaded_by_name_config_and_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [{"text": "hello"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("org/name", "org/name:main", "org/name:main:test"):
        assert [e["text"] for e in examples(source)] == ["hello"]
    assert asked == [
        ("org/name", None, "train"),
        ("org/name", "main", "train"),
        ("org/name", "main", "test"),
    ]


@pytest.mark.parametrize(
    ("record", "message", "hint"),
    [
        ({"prompt": "a", "response": "b"}, "'prompt', 'response'", "set columns.completion=response"),
        (
            {"question": "a", "answer": "b"},
            "columns",
            "columns.prompt=question and columns.completion=answer",
        ),
        ({"conversations": []}, "columns", "columns.messages=conversations"),
        ({"content": "a"}, "columns", "columns.text=content"),
        ({"x": "a"}, "columns 'x'", "columns.text=NAME"),
        ({"prompt": "a", "completion": 3}, "'completion' is not text", ""),
        ({"text": 3}, "'text' is not text", "name the column"),
        ({"messages": [{"role": "user"}]}, "message 1 has no text under 'content'", "a chat is a list"),
        ({"messages": []}, "no messages", "a chat is a list"),
        ([1], "not an object", "an example is an object"),
    ],
)
def test_a_wrong_record_is_named_by_line_with_what_to_set(tmp_path, record, message, hint):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "fine"}, record])
    with pytest.raises(UserError) as error:
        list(examples(path))
    assert f"{path}, line 2" in error.value.message
    assert message in error.value.message
    assert hint in error.value.hint


def test_missing_empty_and_broken_sources_are_named(tmp_path):
    jsonl(tmp_path / "train.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=r"no file or folder .*nope\.jsonl\n  check the path"):
        list(
            examples(str(tmp_path / "nope.jsonl"))
        )  # names that shared no more than their ending were suggested
    with pytest.raises(UserError, match=r"no file or folder .*trian\.jsonl\n.*'train\.jsonl'"):
        list(examples(tmp_path / "trian.jsonl"))
    for name, content, message in (
        ("empty.jsonl", b"\n", "no examples"),
        ("empty.txt", b" ", "no examples"),
        ("broken.jsonl", b'{"text": "a"}\n{"text', "line 2 is not JSON"),
        ("object.json", b"{}", "not a list"),
        ("latin.txt", b"\xff", "not UTF-8"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-9], "cannot read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            list(examples(tmp_path / name))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="has no data"):
        list(examples(tmp_path / "folder"))


# -- tables, other chats, and what is refused -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'prompt,completion\n"one, two",1\n"line\nbreak",""\n'),
        ("a.csv", '\ufeffprompt;completion\r\none, two;1\r\n"line\nbreak";\r\n'),
        ("a.tsv", 'prompt\tcompletion\none, two\t1\n"line\nbreak"\t\n'),
        ("a.csv.gz", 'prompt,completion\n"one, two",1\n"line\nbreak",\n'),
    ],
)
def test_a_table_is_read_by_its_columns(tmp_path, name, content):
    """CSV was trained on as running text, header, commas and all, without a word."""
    file = tmp_path / name
    file.write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    found = [(one["prompt"], one["completion"]) for one in examples(file)]
    assert found == [("one, two", "1"), ("line\nbreak", "")]
    assert [one["prompt"] for one in examples(tmp_path)] == ["one, two", "line\nbreak"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,completion\na,b,c\n", "row 1 has 3 cells for 2 columns"),
        ("prompt,prompt\na,b\n", "its header"),
        ("prompt,\na,b\n", "its header"),
        ("question,answer\na,b\n", "columns 'question', 'answer'"),
        ('prompt,completion\n"a,b\n', "cannot read"),
        ("prompt,completion\na\0,b\n", "binary"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        list(examples(tmp_path / "a.csv"))


def test_sharegpt_is_read_as_it_is(tmp_path):
    said = [("system", "be brief"), ("human", "2+2?"), ("gpt", "4")]
    turns = [{"from": speaker, "value": text} for speaker, text in said]
    wanted = [("system", "be brief"), ("user", "2+2?"), ("assistant", "4")]
    for columns in (None, Columns(messages="conversations")):
        [one] = examples(jsonl(tmp_path / "a.jsonl", [{"id": "x", "conversations": turns}]), columns)
        assert [(message["role"], message["content"]) for message in one["messages"]] == wanted
    for wrong, message in (
        ([{"from": "nobody", "value": "a"}], "nobody"),
        ([{"from": "gpt"}], "no text under"),
    ):
        with pytest.raises(UserError, match=message):
            list(examples(jsonl(tmp_path / "a.jsonl", [{"conversations": wrong}])))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("a.xlsx", r"\.csv"),
        ("a.pkl", "pickle"),
        ("a.npz", "parquet"),
        ("a.pdf", r"\.txt"),
        ("a.strange", r"\.txt"),
    ],
)
def test_files_of_other_kinds_are_refused_by_name(tmp_path, name, hint):
    (tmp_path / name).write_text("these bytes happen to be text")
    with pytest.raises(UserError, match=rf"(?s){name}.*{hint}"):
        list(examples(tmp_path / name))


def test_binary_content_under_the_name_of_text_is_refused_or_left_out_of_a_folder(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"PK\x03\x04\0\0")
    with pytest.raises(UserError, match="is binary"):
        list(examples(tmp_path / "a.txt"))
    (tmp_path / "b.txt").write_text("text")
    with pytest.warns(UserWarning, match="is binary"):
        assert [one["text"] for one in examples(tmp_path)] == ["text"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "completion": None}, "'completion' is null"),
        ({"text": "half \ud83d"}, "half a character"),
        ({"input_ids": [5, 6], "completion_mask": [0, 2]}, "completion_mask has '2'"),
        ({"input_ids": [5, 6], "completion_mask": [1]}, "do not fit"),
        ({"input_ids": [5, 6], "completion_mask": []}, "do not fit"),
        ({"input_ids": [5, 6], "completion_mask": 1}, "not a list"),
        ({"input_ids": [5, 2**40]}, "input_ids has"),
        ({"input_ids": [5, -1]}, "input_ids has '-1'"),
        ({"input_ids": [5, 300]}, "the tokenizer's last is 258"),
        ({"input_ids": [5, True]}, "input_ids has 'True'"),
        ({"input_ids": [5.0, 6]}, "input_ids has '5.0'"),
        ({"input_ids": "56"}, "not a list"),
    ],
)
def test_values_that_cannot_be_are_named(tmp_path, record, message):
    with pytest.raises(UserError, match=message) as error:
        encode(examples(jsonl(tmp_path / "a.jsonl", [record])), tiny.tokenizer(), DataOptions(64))
    assert f"{tmp_path / 'a.jsonl'}, line 1" in error.value.message


def test_half_a_character_is_named_in_examples_from_anywhere():
    for record in (
        {"text": "\ud800"},
        {"messages": [{"role": "user", "content": "\udfff"}, {"role": "assistant", "content": "4"}]},
    ):
        with pytest.raises(UserError, match="example 1 has half a character"):
            encode([record], tiny.tokenizer(), DataOptions(64))
