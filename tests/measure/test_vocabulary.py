"""Draft vocabularies: what is read, how it is ranked, what it covers."""

import gzip
import json

import numpy as np
import pytest

import tiny
from layerskip.errors import UserError
from layerskip.measure.exits.vocabulary import coverage, documents, first_ids, frequencies, ranked


def written(tmp_path, name, content):
    path = tmp_path / name
    data = content.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def lines(*items):
    return "\n".join(json.dumps(item) for item in items) + "\n"


CHAT = [
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "first"},
    {"role": "assistant", "content": "second"},
]


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content", "column", "wanted"),
    [
        ("a.jsonl", lines({"text": "one"}, {"text": "two", "id": 3}), None, ["one", "two"]),
        ("a.jsonl", lines({"prompt": "p", "response": "r"}), None, ["r"]),
        ("a.jsonl", lines({"messages": CHAT}), None, ["first", "second"]),
        ("a.jsonl", lines({"conversations": [{"from": "gpt", "value": "r"}]}), None, ["r"]),
        ("a.jsonl", lines({"body": "b", "text": "t"}), "body", ["b"]),
        ("a.jsonl", "\ufeff" + lines({"text": "x\u2028y"}) + "\n", None, ["x\u2028y"]),
        ("a.txt", "hello\nthere\n", None, ["hello\nthere\n"]),
        ("a.py", "x = 1\n", None, ["x = 1\n"]),
    ],
)
def test_what_a_model_would_write_is_read_from_every_kind_of_file(
    tmp_path, end, name, content, column, wanted
):
    assert list(documents(written(tmp_path, name + end, content), column)) == wanted


def test_a_long_text_is_cut_into_documents_at_line_ends(tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    pieces = list(documents(written(tmp_path, "long.txt", text)))
    assert len(pieces) > 2
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces)


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("a.csv", "x", None, "no kind that can be read"),
        ("a.jsonl", "{}\n", None, "line 1 has no text"),
        ("a.jsonl", lines({"text": "a"}) + "hello", None, "line 2 is not JSON"),
        ("a.jsonl", "[1]", None, "is not an object"),
        ("a.jsonl", lines({"text": 5}), None, "line 1 has no text"),
        ("a.jsonl", lines({"text": "a"}), "body", "has no body"),
        ("a.txt", "\udcff", None, "cannot read"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_line(tmp_path, name, content, column, message):
    path = tmp_path / name
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message):
        list(documents(path, column))


def test_a_packed_file_that_is_none_is_an_error(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(b"not packed")
    with pytest.raises(UserError, match="cannot read"):
        list(documents(path))


def test_every_tenth_document_is_held_out_across_batches(monkeypatch):
    from layerskip.measure.exits import vocabulary

    monkeypatch.setattr(vocabulary, "BATCH", 7)
    tokenizer = tiny.tokenizer()
    texts = ["b" if i % 10 == 9 else "a" for i in range(40)]
    found = frequencies(tokenizer, texts, 259)
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    assert (found.counted[a], found.counted.sum()) == (36, 36)
    assert (found.held_out[b], found.held_out.sum()) == (4, 4)
    with pytest.raises(UserError, match="no tokens to count"):
        frequencies(tokenizer, [], 259)


def test_ids_are_ranked_by_falling_count_and_ties_by_id():
    counts = np.array([0, 5, 2, 5, 0])
    assert ranked(counts) == [1, 3, 2, 0, 4]


def test_what_must_be_in_the_list_pushes_out_the_rarest():
    ranking = [4, 2, 3, 0, 1]
    assert first_ids(ranking, 3, []) == [4, 2, 3]
    assert first_ids(ranking, 3, [2, 0]) == [4, 2, 0]
    assert first_ids(ranking, 1, [0, 1]) == [0]
    for size in (0, 6):
        with pytest.raises(UserError, match="from 1 to 5"):
            first_ids(ranking, size, [])


def test_coverage_is_the_share_of_counted_tokens_inside():
    counts = np.array([1, 0, 3, 6])
    assert coverage(counts, [3, 2, 0, 1], [1, 2, 9]) == {1: 0.6, 2: 0.9, 9: 1.0}
    assert coverage(np.zeros(4, int), [3, 2, 0, 1], [1]) == {1: None}
