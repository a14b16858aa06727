"""What an exit is worth: figures equal their definitions, the last layer is Hugging Face's own model."""

import gzip
import math

import pytest
import torch

import tiny
from layerskip.errors import UserError
from layerskip.measure.exits import evaluation
from layerskip.measure.exits.evaluation import Text, judged, read_text, rows, windows

L = tiny.NUM_LAYERS


def tokens(count, seed=0):
    return torch.randint(2, tiny.VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def whole(sequence):
    return Text(sequence, {"text": range(len(sequence) - 1)})


def table(stack, texts, exits, source="text"):
    return {row["exit_layer"]: row for row in rows(list(judged(stack, texts, exits)), source)}


@pytest.mark.parametrize("name", ["llama", "llama+native", "gemma2", "gpt2", "mistral+torch"])
def test_perplexity_of_the_last_layer_is_that_of_the_hugging_face_loss(name):
    model, stack = tiny.calibrated(name.partition("+")[0]), tiny.stack(name)
    cut = windows(tokens(130), 40)
    assert [len(window) for window in cut] == [40, 40, 40, 10]
    with torch.no_grad():
        losses = [
            model(input_ids=torch.tensor([window]), labels=torch.tensor([window])).loss.item()
            for window in cut
        ]
    counts = [len(window) - 1 for window in cut]
    loss = sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)
    [row] = table(stack, [whole(window) for window in cut], [L]).values()
    assert math.log(row["perplexity"]) == pytest.approx(loss, abs=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert row["tokens"] == sum(counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama+native", "gemma2", "gpt2"])
def test_the_last_layer_agrees_with_itself_exactly(name, dtype):
    stack = tiny.stack(name, dtype, tiny.calibrated(name.partition("+")[0], dtype))
    found = table(stack, [whole(tokens(50)), whole(tokens(31, seed=1))], [2, L])
    assert (found[L]["agreement"], found[L]["kl"], found[L]["tv"]) == (1.0, 0.0, 0.0)
    assert found[2]["agreement"] < 1.0
    assert found[2]["kl"] > 0.0


def test_figures_equal_their_definitions_in_float64(llama):
    model, stack = llama
    sequence = tokens(60)
    with torch.no_grad():
        hidden = model(torch.tensor([sequence]), output_hidden_states=True).hidden_states
        exit_logits = stack.logits(hidden[3][0, :-1]).double()  # [N, V]
        full = model(torch.tensor([sequence])).logits[0, :-1].double()
    p, q = full.softmax(-1), exit_logits.softmax(-1)
    expected = {
        "agreement": (full.argmax(-1) == exit_logits.argmax(-1)).double().mean(),
        "kl": (p * (p / q).log()).sum(-1).mean(),
        "tv": 0.5 * (p - q).abs().sum(-1).mean(),
        "perplexity": (-q.log().gather(-1, torch.tensor(sequence[1:])[:, None]).mean()).exp(),
    }
    found = table(stack, [whole(sequence)], [3, L])[3]
    assert {k: found[k] for k in expected} == pytest.approx(
        {k: v.item() for k, v in expected.items()}, rel=1e-5, abs=1e-6
    )


def test_texts_judged_together_are_what_they_are_alone_and_chunks_do_not_show(llama, monkeypatch):
    stack = llama[1]
    texts = [whole(tokens(n, seed=n)) for n in (50, 3, 34, 2, 33)]
    together = list(judged(stack, texts, [1, 3, L]))
    monkeypatch.setattr(
        evaluation, "chunks", lambda *given, **more: original(*given, **more, batch_tokens=1, size=8)
    )
    alone = [next(judged(stack, [text], [1, 3, L])) for text in texts]
    assert len(together) == len(texts)
    for a, b in zip(together, alone, strict=True):
        assert a["text"]["tokens"] == b["text"]["tokens"]
        for k in ("1", "3", str(L)):
            assert a["text"]["exits"][k] == pytest.approx(b["text"]["exits"][k], abs=1e-3)


original = evaluation.chunks


def test_the_parts_of_a_text_share_it_out(llama, monkeypatch):
    """The token before a continuation predicts its first token and belongs to it; parts may span several chunks."""
    monkeypatch.setattr(evaluation, "chunks", lambda *given, **more: original(*given, **more, size=8))
    prompt, sequence = 13, tokens(40)
    parts = {"prompts": range(prompt - 1), "continuations": range(prompt - 1, len(sequence) - 1)}
    [split] = judged(llama[1], [Text(sequence, parts)], [2, L])
    [one] = judged(llama[1], [whole(sequence)], [2, L])
    assert (split["prompts"]["tokens"], split["continuations"]["tokens"]) == (12, 27)
    for name, total in one["text"]["exits"]["2"].items():
        assert sum(part["exits"]["2"][name] for part in split.values()) == pytest.approx(total, abs=1e-4)
    [first] = judged(llama[1], [whole(sequence[:prompt])], [2])
    assert split["prompts"]["exits"]["2"] == pytest.approx(first["text"]["exits"]["2"], abs=1e-4)


def test_progress_counts_every_token_and_records_come_as_soon_as_a_text_is_done(llama):
    told = []
    found = judged(llama[1], [whole(tokens(257)), whole(tokens(21))], [2], told.append)
    next(found)
    assert sum(told) == 256
    next(found)
    assert sum(told) == 276


def test_a_source_without_tokens_has_no_figures(llama):
    [record] = judged(llama[1], [Text([5], {"prompts": range(0)})], [2])
    [row] = rows([record], "prompts")
    assert row == {
        "exit_layer": 2,
        "agreement": None,
        "kl": None,
        "tv": None,
        "perplexity": None,
        "tokens": 0,
    }
    assert rows([], "text") == []
    assert list(judged(llama[1], [], [2])) == []


def test_an_exit_far_off_the_mark_has_a_finite_perplexity():
    assert math.isfinite(evaluation.perplexity(5000.0))


def test_logits_that_are_not_numbers_are_refused():
    model = tiny.random_model("gpt2")
    stack = tiny.stack("gpt2", model=model)
    with torch.no_grad():
        model.transformer.h[3].mlp.c_fc.weight[0, 0] = torch.inf
    with pytest.raises(UserError, match="not all finite"):
        list(judged(stack, [whole(tokens(12))], [2, L]))


def test_windows_do_not_overlap_and_a_single_token_at_the_end_is_dropped():
    assert windows([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4]]
    assert windows([1, 2, 3], 10) == [[1, 2, 3]]
    assert windows([1], 4) == []


def test_text_is_read_as_it_is_from_files_of_any_name(tmp_path):
    for name in ("wiki.test.raw", "notes.md"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbfa\r\n b ")
        assert read_text(tmp_path / name) == "a\r\n b "
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"abc", mtime=0))
    assert read_text(tmp_path / "a.txt.gz") == "abc"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "cannot read"),
        ("empty.txt", b" \n", "is empty"),
        ("image.png", b"\x89PNG\x00", "cannot read"),
        ("zeros.txt", b"a\0b", "is not text"),
        ("cut.gz", gzip.compress(b"abc" * 100, mtime=0)[:-10], "cannot read"),
        ("data.jsonl", b'{"text": "a"}', "--prompts takes JSON lines"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_text(tmp_path / name)
