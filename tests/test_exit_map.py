"""A learnt map at the exit: what training reads through it is what the checkpoint's draft head reads."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import layerskip
from layerskip.checkpoint import facts as checkpoint
from layerskip.checkpoint.delta import apply_delta, make_delta
from layerskip.decode.options import Options
from layerskip.errors import UserError
from layerskip.measure.exits.states import chunks
from layerskip.train.job.recipe import recipe_from
from layerskip.train.job.run import finish, prepare

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
    finish(prepare(recipe(folder, data, tmp_path / "out", freeze="model")))
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
        ({"freeze": "model", "lora": {}}, "the map alone"),
        ({"freeze": "model", "exit_map": False}, "the map alone"),
    ],
)
def test_a_recipe_whose_map_could_not_be_used_is_refused(changes, says):
    with pytest.raises(UserError, match=says):
        recipe("m", "d", "o", **{"freeze": "embeddings", **changes})
