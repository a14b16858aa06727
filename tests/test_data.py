"""Training data: which tokens are learnt, how rows are packed, and what models make of packed rows."""

import json
import warnings

import numpy as np
import pytest
import torch

import tiny
from conftest import CLOSE
from layerskip.errors import UserError
from layerskip.train.data.packing import (
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


def encoded(records, length=64, tokenizer=TOKENIZER, **options):
    return encode(records, tokenizer, DataOptions(length, **options))


def learnt(example):
    return TOKENIZER.decode(example.input_ids[example.labels != -100])


def shown(example):
    return TOKENIZER.decode(example.input_ids)


def sized(*sizes):
    return [Encoded(np.full(n, 3, np.int32), np.full(n, 3, np.int32)) for n in sizes]


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
    (path := tmp_path / "a.jsonl").write_text(json.dumps({"prompt": CHAT[:3], "completion": CHAT[3:]}))
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
