"""A delta file: what it restores, how large it is, what it is refused for."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import layerskip
import tiny
from layerskip.checkpoint import delta
from layerskip.checkpoint.delta import apply_delta, make_delta, pin, read_delta
from layerskip.errors import UserError

ENTRY = {"exits": [2], "exit_layer": 2, "draft_length": 3, "mode": "self-speculative", "recipe": "tiny"}
BUDGET = 1_000_000


def changed(base, folder, change, entry=ENTRY):
    """Copy a folder, change its weights by name, and write an entry and a draft vocabulary."""
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: weight + change(name, weight) for name, weight in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    config["layerskip"] = entry | {"draft_vocab": "ranked.json"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "ranked.json").write_text(json.dumps([9, 7, 5, 40]))
    return folder


def lora(name, weight):
    """A change of rank 2 of every matrix, of a size of its own, and a small one of the norms."""
    generator = torch.Generator().manual_seed(len(name))
    if weight.dim() < 2:
        return 0.01 * torch.randn(weight.shape, generator=generator)
    left = torch.randn(weight.shape[0], 2, generator=generator)
    return 0.02 * left @ torch.randn(2, weight.shape[1], generator=generator)


@pytest.fixture(scope="module")
def tuned(folder, tmp_path_factory):
    return changed(folder, tmp_path_factory.mktemp("tuned") / "tuned", lora)


@pytest.fixture(scope="module")
def packed(folder, tuned, tmp_path_factory):
    file = tmp_path_factory.mktemp("delta") / "tiny.safetensors"
    return file, make_delta(folder, tuned, file, BUDGET, {"base": "tiny-base", "data": "none"})


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_a_change_of_low_rank_is_restored_but_for_the_rounding(folder, tuned, packed, tmp_path):
    file, report = packed
    assert report["kept"] > 0.999
    assert {row["mean_rank"] for row in report["kinds"]} == {2.0, None}
    assert report["bytes"] == file.stat().st_size < sum(w.nbytes for w in weights(tuned).values()) / 3
    apply_delta(folder, file, tmp_path / "merged")
    before, after, merged = weights(folder), weights(tuned), weights(tmp_path / "merged")
    assert merged.keys() == after.keys()
    for name, weight in merged.items():
        lost = (weight - after[name]).norm() / (before[name] - after[name]).norm()
        assert lost < (0.03 if weight.dim() > 1 else 1e-4), name


def test_the_merged_folder_opens_everywhere_and_has_the_facts(folder, packed, tmp_path):
    head = apply_delta(folder, packed[0], tmp_path / "merged")
    assert (head["base"], head["about"]["data"]) == ("tiny-base", "none")
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    lm = layerskip.load(tmp_path / "merged")
    assert lm.facts.exits == (2,)
    assert (lm.facts.exit_layer, lm.facts.draft_length, lm.facts.recipe) == (2, 3, "tiny")
    assert json.loads((tmp_path / "merged" / "draft_vocab.json").read_text()) == [9, 7, 5, 40]
    assert lm.generate("say 1", max_new_tokens=4).stats["mode"] == "self-speculative"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (folder / name).read_bytes()


def test_packing_and_merging_give_the_same_bytes_each_time(folder, tuned, packed, tmp_path):
    make_delta(folder, tuned, tmp_path / "again.safetensors", BUDGET, {"base": "tiny-base", "data": "none"})
    assert (tmp_path / "again.safetensors").read_bytes() == packed[0].read_bytes()
    for name, threads in (("one", 1), ("two", 2)):
        torch.set_num_threads(threads)
        apply_delta(folder, packed[0], tmp_path / name)
    torch.set_num_threads(1)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("budget", [45_000, 60_000, 90_000])
def test_the_file_is_never_larger_than_its_budget(folder, tmp_path, budget):
    full = changed(folder, tmp_path / "full", lambda name, weight: 0.01 * torch.randn_like(weight))
    report = make_delta(folder, full, tmp_path / "d.safetensors", budget, {"quotes": '"\\é' * 99})
    assert budget - 20_000 < (tmp_path / "d.safetensors").stat().st_size <= budget  # its header was guessed
    apply_delta(folder, tmp_path / "d.safetensors", tmp_path / "merged")
    before, after, merged = weights(folder), weights(full), weights(tmp_path / "merged")
    left = sum((merged[name] - after[name]).square().sum() for name in merged)
    of = sum((before[name] - after[name]).square().sum() for name in merged)
    assert report["kept"] == pytest.approx(1 - float(left / of), abs=1e-3)


def test_a_budget_without_room_for_a_matrix_is_refused(folder, tuned, tmp_path):
    with pytest.raises(UserError, match="no room for matrices"):
        make_delta(folder, tuned, tmp_path / "d.safetensors", 1000, {})
    assert list(tmp_path.iterdir()) == []


def test_what_training_left_alone_is_not_in_the_file(folder, tmp_path):
    one = changed(folder, tmp_path / "one", lambda name, weight: lora(name, weight) * ("3.mlp.up" in name))
    report = make_delta(folder, one, tmp_path / "d.safetensors", BUDGET, {})
    _, tensors = read_delta(tmp_path / "d.safetensors")
    assert {name.split(":")[0] for name in tensors} == {"model.layers.3.mlp.up_proj.weight", "draft_vocab"}
    assert [(row["name"], row["parameters"]) for row in report["layers"]] == [("layer 3", 1)]


def test_two_equal_folders_make_a_delta_of_facts_alone(folder, tmp_path):
    same = changed(folder, tmp_path / "same", lambda name, weight: 0 * weight)
    assert make_delta(folder, same, tmp_path / "d.safetensors", BUDGET, {})["kept"] == 1.0
    apply_delta(folder, tmp_path / "d.safetensors", tmp_path / "merged")
    assert weights(tmp_path / "merged").keys() == weights(folder).keys()


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    tiny.random_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tied = changed(tmp_path / "base", tmp_path / "tuned", lora)
    report = make_delta(tmp_path / "base", tied, tmp_path / "d.safetensors", BUDGET, {})
    assert report["kept"] > 0.999
    apply_delta(tmp_path / "base", tmp_path / "d.safetensors", tmp_path / "merged")
    assert "lm_head.weight" not in weights(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_shards_stay_shards_and_16_bit_stays_16_bit(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder).bfloat16()
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(lora(name, weight).bfloat16())
    model.save_pretrained(tmp_path / "tuned")
    make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "d.safetensors", BUDGET, {})
    apply_delta(tmp_path / "base", tmp_path / "d.safetensors", tmp_path / "merged")
    files = [file.name for file in (tmp_path / "merged").iterdir()]
    assert sorted(files) == sorted(file.name for file in (tmp_path / "base").iterdir())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    wanted = dict(model.named_parameters())
    for name, weight in merged.named_parameters():
        assert (weight - wanted[name]).norm() < 0.02 * wanted[name].norm(), name


def test_another_base_is_refused_by_its_weights(tuned, packed, tmp_path):
    with pytest.raises(UserError, match=r"was made for tiny-base \(weights_sha256 .*tuned is another model"):
        apply_delta(tuned, packed[0], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_built_in_base_is_known_by_its_file_and_rebuild(folder, tuned, tmp_path):
    base = shutil.copytree(folder, tmp_path / "base")
    source = {"file_sha256": "ab", "rebuild": 1, "licence": "Apache-2.0", "name": "any"}
    (base / delta.SOURCE_FILE).write_text(json.dumps(source))
    assert pin(base) == {"file_sha256": "ab", "rebuild": 1}
    make_delta(base, tuned, tmp_path / "d.safetensors", BUDGET, {})
    head = apply_delta(base, tmp_path / "d.safetensors", tmp_path / "merged")
    assert (head["base"], head["about"]["licence"]) == ("base", "Apache-2.0")
    assert not (tmp_path / "merged" / delta.SOURCE_FILE).exists()
    for other in ({"rebuild": 2}, {"file_sha256": "cd"}):
        (base / delta.SOURCE_FILE).write_text(json.dumps(source | other))
        with pytest.raises(UserError, match=r"the delta d\.safetensors was made for base"):
            apply_delta(base, tmp_path / "d.safetensors", tmp_path / "other")


def test_a_file_of_another_format_is_refused(folder, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(delta, "FORMAT", 2)
    with pytest.raises(UserError, match="format 1, this layerskip reads 2"):
        apply_delta(folder, packed[0], tmp_path / "merged")


@pytest.mark.parametrize("damage", ["bit", "end", "text", "head"])
def test_a_damaged_file_is_refused(folder, packed, tmp_path, damage):
    content = bytearray(packed[0].read_bytes())
    if damage == "bit":
        content[-100] ^= 1
    elif damage == "end":
        del content[-100:]
    elif damage == "text":
        content = bytearray(b"version https://git-lfs.github.com/spec/v1\n")
    else:
        content = content.replace(b"tiny-base", b"tiny-case")
    (tmp_path / "d.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        apply_delta(folder, tmp_path / "d.safetensors", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_checkpoint_is_no_delta_and_a_missing_file_is_named(folder, tmp_path):
    with pytest.raises(UserError, match="is not a delta"):
        apply_delta(folder, folder / "model.safetensors", tmp_path / "merged")
    with pytest.raises(UserError, match=r"none\.safetensors"):
        apply_delta(folder, tmp_path / "none.safetensors", tmp_path / "merged")


def test_folders_that_are_not_before_and_after_are_refused(folder, tuned, tmp_path):
    def refused(match, *, config=None, tokenizer=None, model=None):
        other = shutil.copytree(tuned, tmp_path / "other")
        if config:
            settings = json.loads((other / "config.json").read_text())
            (other / "config.json").write_text(json.dumps(settings | config))
        if tokenizer:
            content = json.loads((other / "tokenizer.json").read_text())
            content["model"]["vocab"]["zz"] = 300
            (other / "tokenizer.json").write_text(json.dumps(content))
        if model:
            save_file(model(weights(other)), other / "model.safetensors")
        with pytest.raises(UserError, match=match):
            make_delta(folder, other, tmp_path / "d.safetensors", BUDGET, {})
        shutil.rmtree(other)

    norm = "model.norm.weight"
    refused("other parameters: 1 stand in one only", model=lambda w: {k: w[k] for k in w if k != norm})
    refused(r"model.norm.weight is \[32\] in .* and \[8\]", model=lambda w: w | {norm: w[norm][:8].clone()})
    refused("values that are not finite", model=lambda w: w | {norm: w[norm] * float("nan")})
    refused("rms_norm_eps is", config={"rms_norm_eps": 0.5})
    refused("other tokenizers: tokenizer.json differs", tokenizer=True)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(folder, tuned, tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        make_delta(folder, tuned, tmp_path / "none" / "d.safetensors", BUDGET, {})
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        make_delta(folder, tuned, tmp_path / "d.safetensors", BUDGET, {})
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]


def test_a_long_draft_vocabulary_travels_by_its_first_ids(folder, tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(delta, "NUM_VOCAB", 2)
    make_delta(folder, tuned, tmp_path / "d.safetensors", BUDGET, {})
    apply_delta(folder, tmp_path / "d.safetensors", tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "draft_vocab.json").read_text()) == [9, 7]
    with safe_open(tmp_path / "d.safetensors", "pt") as file:
        assert file.get_tensor("draft_vocab").dtype == torch.int32
