"""What a run of a recipe refuses, writes down and takes up again, below the command line."""

import errno
import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, RwkvConfig

from layerskip.checkpoint.facts import Facts, facts_of
from layerskip.cli.show.training import print_plan, print_result
from layerskip.decode.options import Options
from layerskip.errors import UserError
from layerskip.train.job import loading
from layerskip.train.job import run as runs
from layerskip.train.job.lora import adapted_modules
from layerskip.train.job.plan import REFUSED
from layerskip.train.job.recipe import Lora, read_recipe


@pytest.fixture
def recipe(folder, data, tmp_path):
    """The smoke recipe on the tiny checkpoint, with settings over it."""

    def made(*settings):
        return read_recipe(
            "tiny",
            [f"model={folder}", f"data={data}", f"output={tmp_path / 'out'}", "exits=[2, 3]", "length=48",
             "steps=4", "save_every=2", "log_every=1", "template=off", "dtype=float32", *settings],
        )  # fmt: skip

    return made


@pytest.fixture
def refused(recipe):
    def call(*settings, resume=False):
        with pytest.raises(UserError) as error:
            runs.prepare(recipe(*settings), resume)
        return str(error.value)

    return call


# -- the plan ------------------------------------------------------------------------------------------------


def test_rows_of_a_global_batch_set_the_accumulation_and_the_plan_tells_it(recipe):
    prepared = runs.prepare(recipe("batch_size=2", "global_batch=6"))
    assert prepared.arguments.gradient_accumulation_steps == 3
    console = Console(file=io.StringIO(), width=200)
    print_plan(console, prepared.plan, prepared.warnings)
    assert "4 steps of 6 rows (2 x 3 passes)" in console.file.getvalue()


def test_automatic_exits_are_eighths_of_the_depth():
    recipe = read_recipe("finetune")
    assert runs.schedule_for(recipe, 32).trained == (4, 8, 12, 16)
    assert runs.schedule_for(recipe, 5).trained == (1, 2)
    assert runs.schedule_for(read_recipe("finetune", ["weighting=paper"]), 8).trained == (2, 3, 4)


# -- going on ------------------------------------------------------------------------------------------------


def test_a_run_goes_on_over_the_same_rows_only(recipe, refused, data, monkeypatch):
    """Data changed in between, or another number of devices, used to resume into something inexact."""
    runs.train(recipe())
    first = data.read_text()
    data.write_text(first.replace("say 1", "say 7"))
    assert "these changed: the data" in refused(resume=True)
    data.write_text(first)
    with monkeypatch.context() as patch:
        patch.setattr("layerskip.train.trainer.LayerSkipArguments.world_size", 2)
        assert "rows_per_step (2 before, now 4)" in refused(resume=True)
    assert runs.prepare(recipe(), resume=True).checkpoint is not None


def test_a_full_disk_at_a_resume_leaves_the_recipe_as_it_was(recipe, monkeypatch):
    """The file was emptied before it was written, and an empty one could not be resumed."""
    run = runs.prepare(recipe())
    runs.finish(run)
    before = (run.output / runs.RECIPE_FILE).read_bytes()
    again = runs.prepare(recipe("log_every=2"), resume=True)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="cannot write into"):
        runs.finish(again)
    assert (run.output / runs.RECIPE_FILE).read_bytes() == before
    assert not list(run.output.glob(".*"))


# -- what it leaves ------------------------------------------------------------------------------------------


def test_exits_that_do_not_pay_yet_leave_plain_decoding_the_default(recipe, monkeypatch):
    """Default E and K were exported even where drafting with them was predicted to be slower."""
    monkeypatch.setattr("layerskip.train.figures.predicted", lambda *_: (2, 1, 0.8))
    result = runs.train(recipe())
    assert (result["exit_layer"], result["draft_length"], result["predicted_speedup"]) == (None, None, 0.8)
    folder = Path(result["output"])
    facts = facts_of(AutoConfig.from_pretrained(folder))
    assert facts == Facts((2, 3), recipe="tiny", versions=facts.versions)
    assert "does not pay yet: the cost model predicts 0.80 x" in (folder / "README.md").read_text()
    assert Options().plan(facts, 5).mode == "ar"
    asked = Options(mode="self-speculative").plan(facts, 5)
    assert (asked.mode, asked.exit_layer) == ("self-speculative", 1)
    assert Options().plan(replace(facts, exit_layer=2), 5).mode == "self-speculative"
    console = Console(file=io.StringIO(), width=200)
    print_result(console, result)
    assert "drafting does not pay yet: 0.80 x" in console.file.getvalue()


def test_a_run_that_measured_nothing_says_so_and_decodes_plainly(recipe):
    result = runs.train(recipe("arguments.logging_strategy=no", "arguments.logging_first_step=false"))
    assert (result["exits"], result["exit_layer"], result["predicted_speedup"]) == ({}, None, None)
    folder = Path(result["output"])
    card = (folder / "README.md").read_text()
    assert "Nothing was measured." in card
    assert "No exit was measured, so plain decoding is the default" in card
    assert Options().plan(facts_of(AutoConfig.from_pretrained(folder)), 5).mode == "ar"


def test_all_ends_of_the_generation_config_end_a_turn(folder, tmp_path):
    config = AutoConfig.from_pretrained(folder)
    assert loading.ends_of(folder, config) == {2}
    config.eos_token_id = [2, 5]
    assert loading.ends_of(tmp_path, config) == {2, 5}, "no generation config there"


# -- refused before any step ---------------------------------------------------------------------------------


@pytest.mark.parametrize("key", REFUSED)
def test_arguments_that_would_be_overwritten_or_break_a_resume_are_refused(refused, key):
    assert f"arguments.{key} cannot be set: {REFUSED[key]}" in refused(f"arguments.{key}=true")


def test_adapters_above_an_exit_are_refused_for_it_would_learn_nothing(refused):
    assert "exit 2 would learn nothing" in refused("lora.layers=[3, 5]")


def test_adapters_of_an_unknown_type_of_model_are_a_users_mistake():
    """It was an AttributeError."""
    config = RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, context_length=16)
    with pytest.raises(UserError, match="'rwkv' is not supported"):
        adapted_modules(AutoModelForCausalLM.from_config(config), Lora())
