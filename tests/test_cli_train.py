"""The verbs that train, in process on a tiny checkpoint: what they print, leave behind, continue, refuse."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import layerskip
from layerskip.checkpoint.facts import facts_of
from layerskip.train.job.export import MAKING
from layerskip.train.job.recipe import read_recipe

SHORT = (
    "exits=[2, 3]",
    "length=48",
    "steps=4",
    "save_every=2",
    "log_every=1",
    "template=off",
    "dtype=float32",
)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Reports go nowhere; the number of threads stays that of the tests."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@pytest.fixture
def train(run, folder, data, tmp_path):
    """Run `layerskip train tiny` on the tiny checkpoint; returns exit code, JSON of the last line, both outputs."""

    def call(*settings, recipe="tiny", **changed):
        given = {"model": folder, "data": data, "output": tmp_path / "out"} | changed
        words = [f"{key}={value}" for key, value in given.items() if value is not None]
        code, printed, message = run("train", recipe, *SHORT, *words, *settings)
        last = printed.rstrip("\n").split("\n")[-1]
        return code, json.loads(last) if code in (0, 130) else None, printed, message

    return call


# -- what it prints and leaves -------------------------------------------------------------------------------


def test_the_last_line_holds_every_exit_and_the_folder_is_a_plain_checkpoint(train, folder, data, tmp_path):
    code, result, printed, message = train(f"eval_data={data}", "eval_limit=6")
    assert code == 0, message
    assert [*result["exits"]] == ["2", "3", "5"]
    assert all({"loss", "agreement"} <= {*figures} for figures in result["exits"].values())
    assert result["exits"]["5"]["agreement"] == 1.0
    assert (result["steps"], result["interrupted"], result["recipe"]) == (4, False, "tiny")
    assert result["tokens"] > 0
    for word in (
        "recipe",
        "exits: [2, 3]",
        "dtype: float32",
        "recipes show",
        "may be deleted",
        "plan",
        "4 steps of 2 rows",
        "exits 2, 3",
        "step 4/4",
        "tokens/s",
        "work dropped",
        "written:",
    ):
        assert word in printed, word

    out = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.use_cache, "the trainer turns it off, the folder must not keep that"
    facts = facts_of(model.config)
    assert (facts.exits, facts.recipe) == ((2, 3), "tiny")
    assert (facts.exit_layer, facts.draft_length) == (result["exit_layer"], result["draft_length"])
    assert {*facts.versions} == {"layerskip", "torch", "transformers"}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
    card = (out / "README.md").read_text()
    assert "| 2 |" in card
    assert str(tmp_path) not in card, "no path of a machine is published"
    assert str(tmp_path) not in (out / "config.json").read_text()
    assert read_recipe(str(out / "recipe.yaml")).steps == 4
    assert not list(out.glob(".*")), "nothing half written stays"
    lm = layerskip.load(str(out))
    assert lm.facts.trained
    assert lm.generate("say 1", max_new_tokens=4).stats["mode"] == "self-speculative"


def test_the_tiny_recipe_brings_its_data(train):
    """It was there "to see that everything works" and needed a file to begin with."""
    code, result, printed, message = train("length=96", data=None)
    assert code == 0, message
    assert "20 examples" in printed
    assert result["steps"] == 4


def test_an_anchored_exit_with_a_map_has_a_head_of_its_own(train, tmp_path):
    keys = (
        "p_max=0",
        "weighting=uniform",
        "curriculum=fixed",
        "exit_map=true",
        "last_loss=anchor",
        "freeze=above",
    )
    code, result, _, message = train("exits=[2]", "exit_vocab=24", "last_every=2", *keys)
    assert code == 0, message
    assert [*result["exits"]] == ["2", "5"]
    facts = facts_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out").config)
    assert facts.owns_head(2)


def test_json_alone_leaves_nothing_else_on_standard_output(train):
    code, _, printed, message = train("--json")
    assert code == 0
    assert len(printed.strip().split("\n")) == 1
    assert "step 4/4" in message


def test_without_evaluation_data_the_figures_are_those_of_training(train):
    code, result, _, _ = train()
    assert code == 0
    assert [*result["exits"]] == ["2", "3", "5"]
    assert "eval_loss" not in result


def test_a_run_shorter_than_its_reports_tells_its_first_and_last_step(train):
    """It was silent, and its table of exits empty."""
    code, result, printed, _ = train("log_every=50", "steps=3")
    assert code == 0
    assert [*result["exits"]] == ["2", "3", "5"]
    assert "step 1/3" in printed
    assert "step 3/3" in printed


def test_adapters_are_merged_into_the_plain_folder(train, folder, tmp_path):
    code, _, _, message = train("lora.rank=2", "lora.layers=[2]", "learning_rate=0.01")
    assert code == 0, message
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert {*before} == {*after}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("model.layers.1.") for name in changed), "layer 2, counted from 1, and no head"


def test_a_model_starts_from_its_configuration_alone(train, folder, tmp_path, recwarn):
    code, result, _, message = train(f"from_config={folder / 'config.json'}", model="null")
    assert code == 0, message
    assert result["steps"] == 4
    assert "random weights" in (tmp_path / "out" / "README.md").read_text()
    recwarn.clear()
    words = [f"from_config={folder / 'config.json'}", "model=null", "lora.rank=2"]
    assert train(*words, output=tmp_path / "adapted")[0] == 0
    assert [str(w.message) for w in recwarn] == [], (
        "PEFT asked the hub for a configuration, and deprecated names"
    )


def test_the_best_checkpoint_by_predicted_speedup_is_the_one_exported(train, data, tmp_path):
    code, result, _, message = train(f"eval_data={data}", "best_by=speedup", "save_every=1", "keep=1")
    assert code == 0, message
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / result["best_checkpoint"]).state_dict()
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(best[name], final[name]) for name in final)


# -- stopping and going on -----------------------------------------------------------------------------------


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def test_a_resumed_run_ends_with_the_weights_of_a_straight_one(train, run, tmp_path):
    assert train()[0] == 0
    whole, half = tmp_path / "out", tmp_path / "half"
    half.mkdir()
    for name in ("recipe.yaml", "checkpoint-2"):
        (shutil.copytree if (whole / name).is_dir() else shutil.copyfile)(whole / name, half / name)
    code, printed, message = run("train", half / "recipe.yaml", f"output={half}", "--resume")
    assert code == 0, message
    assert "from step 2 on" in printed
    one, other = weights(whole), weights(half)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_stopped_between_its_last_step_and_its_export_makes_no_step_more(train, run, tmp_path):
    """Hugging Face's trainer would make one step too many, with a learning rate of zero at best."""
    assert train()[0] == 0
    out = tmp_path / "out"
    before = weights(out)
    for name in ("config.json", "model.safetensors"):
        (out / name).unlink()
    code, printed, message = run("train", out / "recipe.yaml", "--resume")
    assert code == 0, message
    assert json.loads(printed.strip().split("\n")[-1])["steps"] == 4
    after = weights(out)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_resume_starts_a_run_that_was_not_begun(train):
    assert train("--resume")[0] == 0


def test_another_recipe_does_not_resume_a_run(train):
    assert train()[0] == 0
    code, _, _, message = train("--resume", "learning_rate=0.1", "p_max=0.3", "log_every=2")
    assert code == 2
    assert "another recipe, it differs in p_max, learning_rate" in message


def test_a_full_folder_needs_resume_and_a_foreign_one_is_left_alone(train, tmp_path):
    assert train()[0] == 0
    code, _, _, message = train()
    assert code == 2
    assert "is not empty" in message
    assert "--resume continues it" in message
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    code, _, _, message = train("--resume", output=tmp_path / "other")
    assert code == 2
    assert "no run to resume" in message


def test_an_interrupt_saves_says_how_to_go_on_and_exports_nothing(train, monkeypatch, tmp_path):
    from layerskip.train import trainer

    original = trainer.LayerSkipMixin.training_step

    def interrupted(self, *args, **kwargs):
        self.wants_to_stop = self.state.global_step == 0
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer.LayerSkipMixin, "training_step", interrupted)
    code, result, printed, _ = train()
    assert code == 130
    assert result["interrupted"]
    assert {"exit_layer", "draft_length", "predicted_speedup"} <= {*result}
    assert f"layerskip train {tmp_path / 'out'}/recipe.yaml --resume" in printed
    assert (tmp_path / "out" / "checkpoint-1").is_dir()
    assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.undo()
    assert train("--resume")[1]["steps"] == 4


def test_a_disk_that_fills_up_during_export_leaves_no_half_model(train, monkeypatch, tmp_path):
    from layerskip.train.job import export

    def full(model, output):
        (output / MAKING / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_check_space", full)
    code, _, _, message = train()
    assert code == 2
    assert "cannot write the model" in message
    assert "--resume" in message
    out = tmp_path / "out"
    assert not (out / "config.json").exists()
    assert not (out / MAKING).exists()
    monkeypatch.undo()
    assert train("--resume")[0] == 0


# -- refused before any step ---------------------------------------------------------------------------------


@pytest.fixture
def refused(train, monkeypatch):
    """A mistake: exit code 2, a message without traceback, and no step was made."""
    from layerskip.train import trainer

    steps = []
    monkeypatch.setattr(trainer.LayerSkipMixin, "training_step", lambda *_, **__: steps.append(1))

    def call(*settings, **changed):
        code, _, printed, message = train(*settings, **changed)
        assert code == 2, message or printed
        assert "Traceback" not in message
        assert message.count("error: ") == 1
        assert not steps
        return message

    return call


def lines(file, *records):
    file.write_text("\n".join(map(json.dumps, records)))
    return file


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["steps=3", "learning_rat=1"], "unknown key 'learning_rat'"),
        (["arguments.adam_beta=1"], "unknown key arguments.adam_beta"),
        (["arguments.max_steps=1"], "decided by the recipe's own keys"),
        (["exits=[2, 9]"], "trains exit 9, the model has 5 layers"),
        (["exits=[5]"], "no early exit"),
        (["e_scale=0", "best_by=speedup", "eval_data=x"], "best_by speedup needs an exit"),
        (["weighting={9: 1.0}"], "weighs exit 9"),
        (["length=4096"], "longer than the model's context of 256"),
        (["columns.prompt=question"], "data.jsonl"),
        (["length=8"], "are over length=8"),
        (["template=on", "data=null"], "the recipe has no data"),
        (["lora.layers=[9]"], "layer 9, the model has 5"),
        (["lora.targets=[q_prj]"], "did you mean 'q_proj'"),
        (["global_batch=3"], "not a multiple of batch_size 2"),
        (["model=no-such-model"], "no model 'no-such-model'"),
        (["from_config=nowhere.json"], "no configuration nowhere.json"),
        (["output=null"], "the recipe has no output"),
    ],
)  # fmt: skip
def test_what_a_recipe_cannot_do_is_said_before_any_step(refused, settings, says):
    assert says in refused(*settings)


def test_a_recipe_trains_no_model_but_the_one_that_is_named(refused):
    """Without `model=` a run of finetune trained SmolLM2 unasked."""
    assert "the recipe has no model" in refused("exits=[0]", recipe="exit-adapter", model=None)


def test_data_that_cannot_be_trained_on_is_said_before_any_step(refused, tmp_path):
    assert "missing.jsonl" in refused(data=tmp_path / "missing.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert "empty.jsonl" in refused(data=empty)
    wrong = lines(tmp_path / "wrong.jsonl", {"question": "a", "answer": "b"})
    assert "question" in refused(data=wrong)


def test_labels_outside_the_vocabulary_are_said_before_any_step(refused, folder, tmp_path):
    """A tokenizer with more tokens than the model has rows."""
    other = shutil.copytree(folder, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["abc"])
    tokenizer.save_pretrained(other)
    assert "outside the model's vocabulary of 259" in refused(model=other)


def test_a_recipe_for_more_layers_than_the_model_has_is_refused(refused):
    assert "is for 40 layers, the model has 5" in refused("exits=null", recipe="continual-llama2-13b")


def test_a_loss_that_is_not_finite_stops_with_exit_code_2(train, monkeypatch):
    from layerskip.train.objective import exits

    original = exits.multi_exit_loss

    def broken(*args, **kwargs):
        loss, sums = original(*args, **kwargs)
        sums.ce[0] = float("nan")
        return loss, sums

    monkeypatch.setattr(exits, "multi_exit_loss", broken)
    code, _, _, message = train()
    assert code == 2
    assert "the loss of exit" in message


# -- recipes -------------------------------------------------------------------------------------------------


def test_recipes_are_listed_with_the_sharding_settings(run):
    code, printed, _ = run("recipes", "ls")
    assert code == 0
    assert "continual-llama2-7b" in printed
    assert "fsdp2.accelerate.yaml" in printed
    assert {row["name"] for row in json.loads(run("recipes", "ls", "--json")[1])} >= {"topv2", "tiny"}


def test_a_shown_recipe_is_a_recipe_file(run, tmp_path):
    code, printed, _ = run("recipes", "show", "topv2", "steps=7", "lora.rank=4")
    assert code == 0
    file = tmp_path / "mine.yaml"
    file.write_text(printed)
    assert read_recipe(str(file)) == read_recipe("topv2", ["steps=7", "lora.rank=4"])
    assert json.loads(run("recipes", "show", "topv2", "--json")[1])["rotation"] == 2


def test_a_recipe_is_drawn_as_a_picture_and_in_characters(run, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "picture.png"
    code, printed, message = run("recipes", "plot", "scratch-llama-1.5b", "-o", file)
    assert (code, printed.strip()) == (0, f"written: {file}"), message
    assert file.read_bytes().startswith(b"\x89PNG")
    code, printed, _ = run("recipes", "plot", "task-topv2-llama-1.5b", "--text")
    assert code == 0
    rows = printed.rstrip("\n").split("\n")
    assert [row.split()[0] for row in rows[1:-1]] == [str(k) for k in range(24, 0, -1)]
    assert rows[1].count("█") > rows[12].count("█") > 0, "the last layer is on from the start, others later"


def test_a_recipe_for_any_depth_is_drawn_for_the_built_in_models(run):
    code, printed, message = run("recipes", "plot", "finetune", "--text")
    assert code == 0, message
    assert [row.split()[0] for row in printed.rstrip("\n").split("\n")[1:-1]] == [
        str(k) for k in range(30, 0, -1)
    ]


def test_the_picture_falls_back_to_characters_without_matplotlib(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    code, printed, message = run("recipes", "plot", "topv2")
    assert code == 0
    assert "no matplotlib" in message
    assert "█" in printed


# -- several processes ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_and_one_of_them_prints(folder, data, tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "layerskip", "train", "tiny", *SHORT, f"model={folder}", f"data={data}", f"output={tmp_path / 'out'}",
        "batch_size=1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(layerskip.__file__).parent.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    [last] = [line for line in done.stdout.split("\n") if line.startswith("{")]
    assert json.loads(last)["steps"] == 4
    assert done.stdout.count("written:") == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()
