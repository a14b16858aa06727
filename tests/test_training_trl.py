"""The trainer's mixin on TRL's `SFTTrainer`, and adapters by PEFT."""

import json
import pickle
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import layerskip
import tiny
import training
from layerskip.errors import UserError
from layerskip.train import checkpoints

TEXTS = [f"{i} {i + 1} {i + 2} {i + 3}" for i in range(16)]
SOURCES = {
    "text": [{"text": text} for text in TEXTS],
    "prompt and completion": [{"prompt": text[:4], "completion": text[4:]} for text in TEXTS],
    "messages": [
        {"messages": [{"role": "user", "content": text[:4]}, {"role": "assistant", "content": text[4:]}]}
        for text in TEXTS
    ],
}
RECIPE = {"p_max": 0.5, "curriculum": "rotational", "rotation": 2, "exits": [2, 3]}


def sft(output, rows, model=None, peft_config=None, **changes):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("trl")
    from layerskip.train.trl import LayerSkipSFTConfig, LayerSkipSFTTrainer

    tokenizer = tiny.tokenizer()
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "max_length": 32,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return LayerSkipSFTTrainer(
        model=training.model(vocab_size=len(tokenizer)) if model is None else model,
        args=LayerSkipSFTConfig(str(output), **{**settings, **RECIPE, **changes}),
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows[:6]),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", SOURCES)
def test_fine_tuning_with_trl_trains_the_exits(tmp_path, kind, packing):
    run = sft(tmp_path, SOURCES[kind], packing=packing)
    run.train()
    assert len(training.losses(run, "exit_2_loss")) == 2
    assert len(training.losses(run, "exit_3_loss")) == 1
    assert training.losses(run, "exit_5_loss")[-1] < training.losses(run, "exit_5_loss")[0]
    assert training.losses(run, "dropped")[0] > 0.0
    figures = run.evaluate()
    tokens, loss = 0, 0.0
    with torch.no_grad():
        for batch in run.get_eval_dataloader():
            logits = run.model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
            wanted = batch["labels"][:, 1:]
            kept = wanted != -100
            loss += float(torch.nn.functional.cross_entropy(logits[kept], wanted[kept], reduction="sum"))
            tokens += int(kept.sum())
    assert figures["eval_loss"] == pytest.approx(loss / tokens, rel=1e-4)
    assert figures["eval_exit_5_agreement"] == 1.0
    assert figures["eval_predicted_speedup"] > 0.0


def test_packed_examples_do_not_see_one_another(tmp_path):
    """One packed row gives the loss of its examples alone."""
    rows = SOURCES["text"][:4]
    packed, padded = (
        sft(tmp_path, rows, packing=packing, max_length=64, per_device_eval_batch_size=4).evaluate()
        for packing in (True, False)
    )
    for name in ("eval_loss", "eval_exit_2_loss", "eval_exit_3_loss"):
        assert packed[name] == pytest.approx(padded[name], rel=1e-4)


def test_a_run_with_trl_saves_and_resumes_exactly(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = sft(tmp_path / "straight", SOURCES["text"], **settings)
    straight.train()
    folder = tmp_path / "straight" / "checkpoint-2"
    again = sft(tmp_path / "straight", SOURCES["text"], **settings)
    again.train(resume_from_checkpoint=str(folder))
    assert training.difference(training.weights(straight), training.weights(again)) == 0.0
    AutoModelForCausalLM.from_pretrained(checkpoints.latest(tmp_path / "straight"))
    assert pickle.loads(pickle.dumps(again.args)).exits == [2, 3]


ALONE = {"exits": [2], "curriculum": "fixed", "weighting": "uniform", "p_max": 0.0, "rotation": None}
MAPPED = {"exit_map": True, "exit_vocab": 24}
OBJECTIVES = {
    "exit_loss": {"exit_loss": "kl"},
    "last_loss kl": {"last_loss": "kl", "freeze": "embeddings"},
    "last_loss anchor": {"last_loss": "anchor", "freeze": "above", **ALONE},
    "exit_vocab": {"exit_vocab": 24, "last_every": 2, **ALONE},
    "exit_map": {**MAPPED, "freeze": "model", **ALONE},
    "freeze embeddings": {"freeze": "embeddings"},
    "freeze above": {"freeze": "above", **ALONE},
    "exit_adapter": {
        "exit_adapter": True,
        "exit_loss": "kl",
        "freeze": "model",
        "optimizer": "muon",
        **ALONE,
    },
}

PARTS = {
    "draft_vocab.json": "exit_vocab",
    "draft_head.safetensors": "exit_map",
    "exit_adapter.safetensors": "exit_adapter",
}


@pytest.mark.parametrize("changes", OBJECTIVES.values(), ids=OBJECTIVES)
def test_every_objective_of_a_recipe_takes_effect_with_trl(tmp_path, changes, monkeypatch):
    monkeypatch.setattr("layerskip.train.objective.anchor.ROWS", 4)
    run = sft(tmp_path / "run", SOURCES["prompt and completion"], **changes)
    before = training.weights(run)
    run.train()
    moved = {name for name, value in training.weights(run).items() if not torch.equal(value, before[name])}
    assert "exit_2_loss" in run.state.log_history[0]
    kept = changes.get("freeze", "nothing")
    assert ({"model.embed_tokens.weight", "lm_head.weight"} <= moved) == (kept == "nothing")
    assert any(".layers.1." in name for name in moved) == (kept != "model")
    assert any(".layers.3." in name for name in moved) == (kept in ("nothing", "embeddings"))
    given = run.exits.bound
    assert (given.reference is not None) == (changes.get("last_loss") == "kl")
    assert (given.anchor is not None) == (changes.get("last_loss") == "anchor")
    assert ("exit_2_kl" in run.state.log_history[0]) == ("kl" in changes.get("exit_loss", ""))
    assert ("exit_5_kl" in run.state.log_history[0]) == (changes.get("last_loss") == "kl")
    assert any("exit_map" in name for name in moved) == ("exit_map" in changes)
    assert any("exit_adapter" in name for name in moved) == ("exit_adapter" in changes)
    assert ("eval_tokens_per_round" in run.evaluate()) == ("exit_adapter" in changes)
    run.save_model(str(tmp_path / "saved"))
    told = json.loads((tmp_path / "saved" / "config.json").read_text())["layerskip"]
    for file, key in PARTS.items():
        assert (tmp_path / "saved" / file).exists() == (key in changes) == (file in told.values())
    assert len(given.vocabulary or ()) == changes.get("exit_vocab", 0)


def test_other_losses_of_trl_are_refused(tmp_path):
    with pytest.raises(UserError, match="other loss types"):
        sft(tmp_path, SOURCES["text"], loss_type="dft")


def test_without_trl_a_hint_says_what_to_install(monkeypatch):
    import layerskip.train.trl as module

    for name in module.NAMES:
        monkeypatch.delattr(module, name, raising=False)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UserError, match="needs trl"):
        module.LayerSkipSFTTrainer  # noqa: B018
    with pytest.raises(AttributeError):
        module.LayerSkipDPOTrainer  # noqa: B018


def adapted(layers=(1, 2), **changes):
    peft = pytest.importorskip("peft")
    config = {
        "target_modules": ["q_proj", "down_proj"],
        "r": 4,
        "lora_alpha": 8,
        "layers_to_transform": layers,
    }
    return peft.get_peft_model(training.model(), peft.LoraConfig(**{**config, **changes}))


@pytest.mark.parametrize("recipe", [RECIPE, {"e_scale": 0.0, "p_max": 0.5}], ids=["exits", "plain"])
def test_adapters_of_chosen_layers_are_all_that_trains(tmp_path, recipe):
    model = adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = training.trainer(
        tmp_path,
        start=model,
        optim="adamw_torch",
        learning_rate=0.01,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=4,
        **recipe,
    )
    assert run.exits.hf is model.get_base_model(), "exits are attached below PEFT"
    run.train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name and (".layers.1." in name or ".layers.2." in name) for name in changed)
    saved = tmp_path / "checkpoint-4"
    assert (saved / "adapter_model.safetensors").is_file()
    assert not (saved / "model.safetensors").exists()
    assert json.loads((saved / "adapter_config.json").read_text())["layers_to_transform"] == [1, 2]

    tokens = torch.arange(2, 26).reshape(2, 12)
    model.eval()
    expected = model(input_ids=tokens).logits
    run.exits.detach()
    merged = model.merge_and_unload()
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert torch.allclose(merged(input_ids=tokens).logits, expected, atol=1e-5)


def test_adapters_resume_exactly(tmp_path):
    settings = {**RECIPE, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
    torch.manual_seed(0)
    straight = training.trainer(tmp_path, start=adapted(), **settings)
    straight.train()
    torch.manual_seed(1)
    again = training.trainer(tmp_path, start=adapted(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert training.difference(training.weights(straight), training.weights(again)) == 0.0


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj", "lm_head"], "layers": None},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=["adapted", "copied"],
)
def test_an_adapter_on_the_head_is_refused(tmp_path, changes):
    with pytest.raises(UserError, match="head"):
        training.trainer(tmp_path, start=adapted(**changes), **RECIPE)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_trl_trains_adapters_too_and_what_they_are_merged_to_decodes(tmp_path, dora):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["q_proj", "down_proj"], layers_to_transform=[1], r=4, use_dora=dora
    )
    run = sft(tmp_path / "run", SOURCES["text"], peft_config=config, packing=True, max_steps=12)
    trained = {name: p.clone() for name, p in run.model.named_parameters() if p.requires_grad}
    assert len(trained) == (6 if dora else 4)
    assert any("magnitude" in name for name in trained) == dora
    run.train()
    now = dict(run.model.named_parameters())
    assert not any(torch.equal(now[name], value) for name, value in trained.items())
    assert training.losses(run, "exit_2_loss")[-1] < training.losses(run, "exit_2_loss")[0]

    tokens = torch.arange(2, 26).reshape(2, 12)
    expected = run.model.eval()(input_ids=tokens).logits
    run.exits.detach()
    folder = tmp_path / "merged"
    run.model.merge_and_unload().save_pretrained(folder)
    run.processing_class.save_pretrained(folder)
    lm = layerskip.load(str(folder), dtype="float32")
    assert lm.facts.exits == (2, 3)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(merged(input_ids=tokens).logits, expected, atol=1e-5)
    drafted = lm.generate("1 2 3", max_new_tokens=8, exit_layer=2, draft_length=3)
    assert drafted.tokens == lm.generate("1 2 3", max_new_tokens=8, mode="ar").tokens
