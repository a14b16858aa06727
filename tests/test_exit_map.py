"""A learnt map at the exit: what training reads through it is what the checkpoint's draft head reads."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import layerskip
from layerskip.checkpoint import facts as checkpoint
from layerskip.checkpoint.delta import apply_delta, make_delta
from layerskip.decode.options import Options
from layerskip.errors import UserError
from layerskip.measure.exits.continuations import continuations, observed
from layerskip.measure.exits.evaluation import Text, judged, rows
from layerskip.measure.exits.lens import lens
from layerskip.measure.exits.states import chunks, own_heads
from layerskip.train.job.recipe import recipe_from
from layerskip.train.job.run import finish, prepare
from layerskip.watch import silent

WAYS = {
    "all weights": {"freeze": "embeddings"},
    "adapters": {"lora": {"rank": 4, "ranks": {1: 8}}},
    "layers under an anchor": {"freeze": "above", "last_loss": "anchor", "p_max": 0.0},
    "the map alone": {"freeze": "model"},
}


def recipe(folder, data, output, **changes):
    settings = {
        "model": str(folder), "data": str(data), "output": str(output), "length": 64, "batch_size": 4, "steps": 12,
        "learning_rate": 1e-2, "dtype": "float32", "exits": [2], "curriculum": "fixed", "weighting": "uniform",
        "exit_map": True, "exit_vocab": 24, "last_every": 2, "last_loss": "kl", "template": "off",
    }  # fmt: skip
    return recipe_from({**settings, **changes})


@pytest.fixture(scope="module", params=WAYS.values(), ids=WAYS)
def trained(request, folder, data, tmp_path_factory):
    run = prepare(recipe(folder, data, tmp_path_factory.mktemp("trained") / "out", **request.param))
    finish(run)
    return run


def test_the_draft_head_of_the_checkpoint_reads_what_training_read(trained):
    lm = layerskip.load(str(trained.output), dtype="float32", stack="hf")
    assert lm.facts.exits == (2,)
    head = lm.draft_head(Options.parse({"exit_layer": 2, "draft_length": 2}))
    tokens = list(range(3, 15))
    found = torch.cat([chunk.logits(2, head) for chunk in chunks(lm.stack, [tokens], [2])])
    hf = lm.hf
    with torch.no_grad():
        states = hf.base_model.norm(
            hf.base_model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[2]
        )
    assert not any("exit_map" in name for name in load_file(lm.path / "model.safetensors"))
    rows = checkpoint.draft_rows(lm.path, lm.facts)
    place = {token: n for n, token in enumerate(lm.ranked_vocabulary)}
    wanted = states[0] @ rows[[place[int(token)] for token in head.ids]].T
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    shared = hf.get_output_embeddings().weight.detach()[head.ids]
    assert (
        shared - rows[[place[int(token)] for token in head.ids]]
    ).abs().max() > 0.01  # it learnt something


def test_other_exits_and_plain_decoding_do_not_know_the_map(trained):
    lm = layerskip.load(str(trained.output), dtype="float32", stack="hf")
    own, shared = (lm.draft_head(Options.parse({"exit_layer": e, "draft_length": 2})) for e in (2, 3))
    h = torch.randn(1, 3, lm.stack.width, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(own.project(h), shared.project(h))
    rows = lm.hf.get_output_embeddings().weight.detach()[shared.ids]
    torch.testing.assert_close(shared.project(h), h @ rows.T)
    plain = lm.generate("say 1", mode="ar", max_new_tokens=24)
    drafted = lm.generate("say 1", mode="self-speculative", exit_layer=2, draft_length=3, max_new_tokens=24)
    assert plain.tokens == drafted.tokens


def test_an_exit_with_a_head_of_its_own_is_shown_by_it(trained, run, data, tmp_path):
    """eval and inspect read it by the shared head, which it was not trained for: it looked broken."""
    lm = layerskip.load(str(trained.output), dtype="float32")
    heads = own_heads(lm)
    assert {k: head.size for k, head in heads.items()} == {2: 24}
    tokens = lm.encode("say 1\nabc abc abc abc say 2")
    (chunk,) = chunks(lm.stack, [tokens], [1, 2], heads=heads)
    found = dict(chunk.exits())
    assert torch.equal(found[1], chunk.logits(1))
    best = heads[2].ids[chunk.logits(2, heads[2]).argmax(-1)]
    assert found[2].argmax(-1).tolist() == best.tolist()
    assert int(found[2].isfinite().sum(-1).max()) == 24
    seen = lens(lm.stack, lm.tokenizer, tokens, [2], heads=heads)
    full = chunk.full.argmax(-1)
    assert seen.agrees[0] == (best == full).tolist()
    (text,) = judged(lm.stack, [Text(tokens, {"text": range(len(tokens) - 1)})], [1, 2, 5], heads=heads)
    told = {row["exit_layer"]: row for row in rows([text], "text")}
    assert told[2]["agreement"] == pytest.approx(float((best == full)[:-1].float().mean()))
    assert 0 <= told[2]["tv"] <= 1
    assert (told[2]["kl"], told[2]["perplexity"]) == (None, None)
    assert None not in told[1].values()

    (tmp_path / "text.txt").write_text("say 1\nabc abc abc say 2")
    path, work = trained.output, tmp_path / "work"
    code, printed, message = run("eval", path, "--text", tmp_path / "text.txt", "--work", work)
    assert code == 0, message
    assert "exit 2 is read by its own draft head of 24 tokens" in printed
    code, printed, message = run("inspect", path, "say 1")
    assert code == 0, message
    assert "exit 2 is read by its own draft head of 24 tokens" in message


def test_doctor_and_tune_tell_the_agreement_of_the_head_that_drafts(trained):
    lm = layerskip.load(str(trained.output), dtype="float32")
    found = continuations(lm, [lm.encode("say 1")], 8, silent)
    own = observed(lm, found, [2], [0, 24], [1, 2], silent)
    lm.facts = replace(lm.facts, draft_head=None)
    lm._heads.clear()
    shared = observed(lm, found, [2], [0, 24], [1, 2], silent)
    assert own.agreement[1] == shared.agreement[1]
    (chunk,) = chunks(lm.stack, [[*found[0].prompt, *found[0].tokens[:-1]]], [2], [len(found[0].prompt) - 1])
    told = (chunk.logits(2).argmax(-1) == chunk.full.argmax(-1)).float().mean()
    assert shared.agreement[2] == pytest.approx(float(told))
    lm = layerskip.load(str(trained.output), dtype="float32")
    head = own_heads(lm)[2]
    told = (head.ids[chunk.logits(2, head).argmax(-1)] == chunk.full.argmax(-1)).float().mean()
    assert own.agreement[2] == pytest.approx(float(told))


def test_early_exit_decoding_says_that_it_does_not_read_the_exits_own_head(trained, recwarn):
    lm = layerskip.load(str(trained.output), dtype="float32")
    recwarn.clear()
    lm.generate("say 1", mode="early-exit", exit_layer=3, max_new_tokens=2)
    lm.generate("say 1", mode="self-speculative", exit_layer=2, max_new_tokens=2)
    assert not recwarn
    lm.generate("say 1", mode="early-exit", exit_layer=2, max_new_tokens=2)
    assert "exit 2 was trained for a draft head of its own" in str(recwarn.pop(UserWarning).message)


def test_a_model_in_memory_drafts_with_the_head_of_the_folder_it_came_from(trained, tmp_path, recwarn):
    """In transformers the exit was read by the shared head: 6% of the drafts were kept, nothing said why."""
    from transformers import AutoModelForCausalLM

    copy, settings = tmp_path / "copy", {"mode": "self-speculative", "exit_layer": 2, "max_new_tokens": 24}
    shutil.copytree(trained.output, copy)
    hf = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32).eval()
    recwarn.clear()
    lm = layerskip.load(str(copy), dtype="float32", stack="hf")
    prompt = lm.encode("say 1")
    own, loaded = layerskip.generate(hf, prompt, **settings), lm.generate(prompt, **settings)
    assert own.tokens == loaded.tokens
    assert own.stats["accepted"] == loaded.stats["accepted"]
    ids = hf.generate(
        torch.tensor([prompt]), custom_generate=layerskip.custom_generate, assistant_early_exit=2,
        max_new_tokens=24, do_sample=False,
    )  # fmt: skip
    assert ids[0, len(prompt) :].tolist() == own.tokens
    assert not [one for one in recwarn if "draft head" in str(one.message)]
    shutil.rmtree(copy)
    with pytest.warns(
        UserWarning, match="exit 2 was trained for a draft head of its own, which is in its folder"
    ):
        layerskip.generate(hf, prompt, **settings)
    layerskip.generate(hf, prompt, **settings | {"exit_layer": 3})


def test_a_resumed_run_keeps_its_map(folder, data, tmp_path):
    for way, settings in WAYS.items():
        outputs = [tmp_path / f"{name} {way}" for name in ("whole", "parts")]
        finish(prepare(recipe(folder, data, outputs[0], steps=4, save_every=2, **settings)))
        shutil.copytree(*outputs)
        for name in ("config.json", "model.safetensors", "draft_head.safetensors"):
            (outputs[1] / name).unlink()
        shutil.rmtree(outputs[1] / "checkpoint-4")
        finish(prepare(recipe(folder, data, outputs[1], steps=4, save_every=2, **settings), resume=True))
        one, other = (
            checkpoint.draft_rows(o, checkpoint.Facts(draft_head="draft_head.safetensors")) for o in outputs
        )
        torch.testing.assert_close(one, other)


def test_a_delta_carries_the_draft_head(trained, folder, tmp_path):
    make_delta(folder, trained.output, tmp_path / "d.safetensors", 300_000, {})
    apply_delta(folder, tmp_path / "d.safetensors", tmp_path / "merged")
    facts = checkpoint.Facts(draft_head="draft_head.safetensors")
    one, other = (checkpoint.draft_rows(path, facts) for path in (trained.output, tmp_path / "merged"))
    torch.testing.assert_close(one, other, rtol=0, atol=float(one.abs().max()) / 127)
    entry = json.loads((tmp_path / "merged" / "config.json").read_text())["layerskip"]
    assert entry["draft_head"] == "draft_head.safetensors"


def test_a_frozen_model_is_exported_as_it_was(folder, data, tmp_path):
    """Its card told of layer dropout, which it had not, and left out the map and what was frozen."""
    finish(prepare(recipe(folder, data, tmp_path / "out", freeze="model", p_max=0.0)))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trained with early-exit loss" in card
    assert {"freeze: model", "exit_map: True", "last_loss: kl", "last_every: 2"} < {*card.splitlines()}
    one, other = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert make_delta(folder, tmp_path / "out", tmp_path / "d.safetensors", 100_000, {})["draft_vocab"] == 24


def test_a_vocabulary_that_the_head_was_not_trained_for_is_refused(trained):
    lm = layerskip.load(str(trained.output))
    with pytest.raises(UserError, match="was trained for the vocabulary"):
        checkpoint.write_draft_vocabulary(trained.output, [1, 2, 3], lm.facts)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"exits": [1, 2]}, "belongs to one exit"),
        ({"exit_vocab": None}, "needs exit_vocab"),
        ({"freeze": "nothing", "last_loss": "ce"}, "needs a head that stays"),
        ({"exit_map": False, "freeze": "nothing"}, "needs the head it compares with"),
        ({"freeze": "model", "lora": {}}, "freeze model leaves the map"),
        ({"freeze": "model", "exit_map": False}, "freeze model leaves the map"),
    ],
)
def test_a_recipe_whose_map_could_not_be_used_is_refused(changes, says):
    with pytest.raises(UserError, match=says):
        recipe("m", "d", "o", **{"freeze": "embeddings", **changes})
