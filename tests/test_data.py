"""Training data: what is read, which tokens are learnt, how rows are packed, and mistakes named before training."""

import gzip
import json
import warnings

import numpy as np
import pytest
import torch

import tiny
from conftest import CLOSE
from layerskip.errors import UserError
from layerskip.train.data.packing import (
    Columns,
    DataOptions,
    Encoded,
    check_labels,
    collate,
    encode,
    examples,
    packs,
    rows,
    split,
)

TOKENIZER = tiny.tokenizer()
CHAT = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "6"},
]
CANNOT_PACK = {"opt"}  # transformers gives its mask no positions


def jsonl(path, records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def encoded(records, length=64, tokenizer=TOKENIZER, **options):
    return encode(records, tokenizer, DataOptions(length, **options))


def learnt(example):
    return TOKENIZER.decode(example.input_ids[example.labels != -100])


def shown(example):
    return TOKENIZER.decode(example.input_ids)


def sized(*sizes):
    return [Encoded(np.full(n, 3, np.int32), np.full(n, 3, np.int32)) for n in sizes]


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


# -- labels --------------------------------------------------------------------------------------------------


def test_prompt_and_completion_are_tokenised_apart_and_only_the_completion_is_learnt():
    pair = {"prompt": "Say a", "completion": "a"}
    (example,) = encoded([pair], template="off")
    assert shown(example) == "Say a\na<|im_end|>"
    assert learnt(example) == "a<|im_end|>"
    (everything,) = encoded([pair], template="off", loss_on="all", separator=" -> ")
    assert shown(everything) == "Say a -> a<|im_end|>"
    assert learnt(everything) == shown(everything)[1:]  # nothing predicts the first token
    assert example.labels.dtype == np.int32


def test_a_pair_is_wrapped_as_a_chat_where_the_tokenizer_can():
    pair = {"prompt": "Say a", "completion": "a"}
    (example,) = encoded([pair])
    assert shown(example) == "user: Say a<|im_end|>assistant: a<|im_end|>"
    assert learnt(example) == "a<|im_end|>"


def test_every_answer_of_a_chat_is_learnt_with_its_end_and_nothing_else():
    (example,) = encoded([{"messages": CHAT}], length=128)
    assert learnt(example) == "4<|im_end|>6<|im_end|>"
    assert example.input_ids.tolist() == TOKENIZER.apply_chat_template(CHAT, return_dict=False)
    (all_of_it,) = encoded([{"messages": CHAT}], length=128, loss_on="all")
    assert learnt(all_of_it) == shown(all_of_it)[1:]


def test_what_the_template_puts_after_an_answer_is_not_learnt():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_end|>\n")
    (example,) = encoded([{"messages": CHAT}], length=128, tokenizer=tokenizer)
    assert learnt(example) == "4<|im_end|>6<|im_end|>"


def test_a_turn_may_end_with_another_token_than_the_tokenizers_end():
    """Llama-3 and Gemma do so: what follows a turn was learnt, and the end of an answer that had none."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<s>\n")
    (end,) = tokenizer.encode("<s>")
    (example,) = encode([{"messages": CHAT}], tokenizer, DataOptions(128), ends=[end])
    assert learnt(example) == "4<s>6<s>"
    pair = {"prompt": "a", "completion": "bc", "finish_reason": "length"}
    assert learnt(encode([pair], tokenizer, DataOptions(64), ends=[end])[0]) == "bc"


def test_a_chat_cut_in_two_learns_the_second_part_only(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": CHAT[:3], "completion": CHAT[3:]}])
    (example,) = encoded(examples(path), length=128)
    assert learnt(example) == "6<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(UserError, match="shows earlier turns differently"):
        encoded([{"messages": CHAT, "where": "a.jsonl, line 1"}], tokenizer=tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(UserError, match="line 1: the chat template failed: no such role"):
        encoded([{"messages": CHAT, "where": "a.jsonl, line 1"}], tokenizer=tokenizer)


def test_a_chat_without_a_template_and_a_template_that_is_missing_are_named():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="is a chat, but this tokenizer has no chat template"):
        encoded([{"messages": CHAT}], tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"no chat template\n.*template=off"):
        encoded([{"text": "a"}], tokenizer=tokenizer, template="on")
    (example,) = encoded([{"prompt": "a", "completion": "b"}], tokenizer=tokenizer)
    assert shown(example) == "a\nb<|im_end|>"


def test_running_text_is_cut_into_windows_that_share_nothing():
    text = "abcdefghij" * 3
    windows = encoded([{"text": text}, {"text": "  "}, {"text": "xy"}], length=8)
    assert [len(w.input_ids) for w in windows] == [8, 8, 8, 7, 3]
    assert "".join(map(shown, windows)) == text + "<|im_end|>xy<|im_end|>"
    assert all(w.labels[0] == -100 and (w.labels[1:] == w.input_ids[1:]).all() for w in windows)


def test_long_text_is_tokenised_in_pieces_without_loss(monkeypatch):
    monkeypatch.setattr("layerskip.train.data.encoding._PIECE", 10)
    text = "one two\nthree\n" * 40 + "x" * 35
    assert "".join(map(shown, encoded([{"text": text}]))) == text + "<|im_end|>"


def test_a_start_token_stands_where_the_tokenizer_puts_one():
    import tokenizers as tk

    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = tk.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    pair, text = encoded(
        [{"prompt": "a", "completion": "b"}, {"text": "c"}], template="off", tokenizer=tokenizer
    )
    assert (shown(pair), shown(text)) == ("<s>a\nb<|im_end|>", "<s>c<|im_end|>")
    (chat,) = encoded([{"messages": CHAT[:2]}], tokenizer=tokenizer)
    assert shown(chat).startswith("user")


def test_an_example_without_a_token_to_learn_is_an_error():
    with pytest.raises(UserError, match="line 7 has no token to learn"):
        encoded([{"messages": CHAT[:1], "where": "a.jsonl, line 7"}])
    for template in ("auto", "off"):  # the end alone used to be learnt
        with pytest.raises(UserError, match="no token to learn: its completion is empty"):
            encoded([{"prompt": "", "completion": ""}], template=template)
    own = {"prompt": "a", "completion": "", "finish_reason": "eos"}
    assert learnt(encoded([own])[0]) == "<|im_end|>", "what a model wrote may be nothing"


def test_examples_over_the_length_are_an_error_or_dropped_or_cut():
    records = [{"prompt": "p" * n, "completion": "c" * 9} for n in (4, 8, 40)]
    with pytest.raises(
        UserError, match=r"2 of 3 examples are over length=16, the longest has 51 tokens\n.*set length=51"
    ):
        encoded(records, length=16, template="off")
    with pytest.warns(UserWarning, match="0 cut at their end, 2 left out"):
        assert len(encoded(records, length=16, template="off", long="drop")) == 1
    with pytest.warns(UserWarning, match="1 cut at their end, 1 left out: nothing to learn within the first"):
        assert [learnt(e) for e in encoded(records, length=16, template="off", long="cut")] == [
            "ccccccccc<|im_end|>",
            "ccccccc",
        ]
    warnings.simplefilter("ignore")
    with pytest.raises(UserError, match="no example is left"):
        encoded(records[1:], length=16, template="off", long="drop")


def test_options_are_checked():
    with pytest.raises(UserError, match=r"long is 'dorp'\n.*'drop'"):
        DataOptions(16, long="dorp")
    with pytest.raises(UserError, match="length is 1"):
        DataOptions(1)


# -- data a model has written --------------------------------------------------------------------------------


def test_token_ids_that_belong_to_the_text_are_taken_as_they_are():
    """A model may write a text in other tokens than the tokenizer would: those are the ones to learn."""
    ids = TOKENIZER.encode("user: a") + TOKENIZER.encode("bc") + [2]
    record = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}],
        "input_ids": ids,
        "completion_mask": [0] * 7 + [1, 1, 1],
    }
    (example,) = encoded([record])
    assert example.input_ids.tolist() == ids
    assert learnt(example) == "bc<|im_end|>"
    foreign = {**record, "input_ids": [9] * 10}
    assert shown(encoded([foreign])[0]) == "user: a<|im_end|>assistant: bc<|im_end|>"
    with pytest.raises(UserError, match="do not fit"):
        encoded([{**record, "completion_mask": [1]}])


@pytest.mark.parametrize("template", ["off", "auto"])
def test_a_completion_its_writer_did_not_end_gets_no_end(template):
    pair = {"prompt": "a", "completion": "bc", "finish_reason": "length"}
    (example,) = encoded([pair], template=template)
    assert learnt(example) == "bc"


# -- rows ----------------------------------------------------------------------------------------------------


def test_packing_cuts_nothing_fills_rows_and_repeats_itself():
    random = np.random.default_rng(0)
    many = [
        Encoded(ids, ids) for n in random.integers(2, 65, 500) for ids in [random.integers(3, 9, n, np.int32)]
    ]
    packed = rows(many, DataOptions(64))
    assert packed.longest <= 64
    assert packed.num_tokens / len(packed) / 64 > 0.9
    assert sorted(map(len, np.split(packed.tokens, packed.starts[1:-1]))) == sorted(
        len(e.input_ids) for e in many
    )
    again = rows(many, DataOptions(64))
    assert (again.tokens == packed.tokens).all()
    assert (again.bounds == packed.bounds).all()
    alone = rows(many, DataOptions(64, pack=False))
    assert len(alone) == 500
    assert alone[3]["input_ids"].tolist() == many[3].input_ids.tolist()


def test_positions_restart_at_every_example_and_in_the_padding():
    packed = rows(sized(3, 2, 4), DataOptions(5))
    assert [row["position_ids"].tolist() for row in packed] == [[0, 1, 2, 0, 1], [0, 1, 2, 3]]
    batch = collate(list(packed), pad_id=7)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch["input_ids"][1].tolist() == [3, 3, 3, 3, 7]
    assert batch["labels"][1].tolist() == [3, 3, 3, 3, -100]
    assert "attention_mask" not in batch


def test_held_out_examples_are_the_same_every_time_and_never_trained_on():
    kept, held = split(range(100), share=0.1, seed=3)
    assert (kept, held) == split(range(100), num=10, seed=3)
    assert sorted(kept + held) == list(range(100))
    assert kept == sorted(kept)
    assert held != split(range(100), num=10, seed=4)[1]
    for nothing in ({"share": 0.0}, {"num": 100}):
        with pytest.raises(UserError, match="cannot hold out"):
            split(range(100), **nothing)


def test_ids_outside_the_vocabulary_are_named():
    check_labels(rows(sized(4), DataOptions(8)), vocab_size=4)
    with pytest.raises(UserError, match="token id 3 is outside the model's vocabulary of 3"):
        check_labels(rows(sized(4), DataOptions(8)), vocab_size=3)
    tokens = np.full(4, 1, np.int32)
    with pytest.raises(UserError, match="label -7 is outside"):
        check_labels(rows([Encoded(tokens, np.full(4, -7, np.int32))], DataOptions(8)), vocab_size=3)


# -- rows through models -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(set(tiny.FAMILIES) - CANNOT_PACK))
def test_logits_of_a_packed_row_are_those_of_each_example_alone(family):
    model = tiny.random_model(family)
    random = np.random.default_rng(1)
    parts = [random.integers(2, tiny.VOCAB, n).astype(np.int32) for n in (9, 12, 3, 5)]
    many = [Encoded(ids, ids) for ids in parts]
    batch = collate(list(rows(many, DataOptions(24))))  # one row of three examples, one with padding
    assert batch["input_ids"].shape == (2, 24)
    given = {name: batch[name] for name in ("input_ids", "position_ids")}
    logits = model(**given, use_cache=False).logits.reshape(48, -1)
    at = 0
    for ids in parts:
        alone = model(input_ids=torch.tensor(ids[None].astype(np.int64)), use_cache=False).logits[0]
        torch.testing.assert_close(logits[at : at + len(ids)], alone, atol=CLOSE[torch.float32], rtol=1e-4)
        at += len(ids)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_the_probe_tells_which_models_keep_packed_examples_apart(family):
    model = tiny.random_model(family).train()
    assert packs(model) == (family not in CANNOT_PACK)
    assert model.training


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
        encoded(examples(jsonl(tmp_path / "a.jsonl", [record])))
    assert f"{tmp_path / 'a.jsonl'}, line 1" in error.value.message


def test_half_a_character_is_named_in_examples_from_anywhere():
    for record in ({"text": "\ud800"}, {"messages": [{"role": "user", "content": "\udfff"}, CHAT[1]]}):
        with pytest.raises(UserError, match="example 1 has half a character"):
            encoded([record])
