"""What a run of a recipe refuses, writes down and takes up again, below the command line."""

import errno
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, RwkvConfig

import layerskip
import training
from layerskip.checkpoint.facts import Facts, facts_of
from layerskip.cli.show.training import print_plan, print_result
from layerskip.decode.options import Options
from layerskip.errors import UserError
from layerskip.train import figures
from layerskip.train.data.packing import most_frequent
from layerskip.train.figures import Setting
from layerskip.train.job import loading
from layerskip.train.job import run as runs
from layerskip.train.job.lora import adapted_modules
from layerskip.train.job.plan import REFUSED
from layerskip.train.job.recipe import Lora, read_recipe


@pytest.fixture
def recipe(folder, data, tmp_path):
    """The smoke recipe on the tiny checkpoint, with settings over it."""

    def made(*settings):
        return training.tiny_recipe(folder, data, tmp_path / "out", "steps=4", "save_every=2", *settings)

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
    console = Console(file=io.StringIO(), width=1000)  # paths of tests are long
    print_plan(console, prepared.plan, prepared.warnings)
    assert "4 steps of 6 rows (2 x 3 passes)" in console.file.getvalue()


def test_the_tokens_of_the_plan_are_those_of_its_epochs(recipe):
    """One step of sixteen rows over five rows was told as 15.6 k tokens of 4.9 k."""
    plan = runs.prepare(recipe("steps=null", "epochs=1", "batch_size=2", "global_batch=64")).plan
    assert (plan["steps"], plan["epochs"], plan["tokens"]) == (1, 1.0, plan["tokens_per_epoch"])
    plan = runs.prepare(recipe("steps=null", "epochs=3", "batch_size=2", "global_batch=64")).plan
    assert plan["tokens"] == 3 * plan["tokens_per_epoch"]


def test_a_plan_too_short_to_teach_says_how_long_it_should_be(recipe, data):
    run = runs.prepare(recipe("steps=null", "epochs=2"))
    [told] = run.warnings
    needed = -(-100_000 // run.plan["tokens_per_epoch"])
    assert "teach an exit little. One task needs some 100,000" in told
    assert told.endswith(f"give more data, or epochs={needed}")
    [told] = runs.prepare(recipe("steps=4")).warnings
    assert "or steps=" in told
    assert runs.prepare(recipe("steps=4000")).warnings == []
    assert runs.prepare(recipe("e_scale=0")).warnings == []


def test_the_plan_adds_up_the_disk(recipe):
    """Three steps left 2.1 GB and nothing had said so."""
    prepared = runs.prepare(recipe("keep=1"))
    weights = 4 * prepared.plan["parameters"]
    assert prepared.plan["disk_bytes"] == weights + 2 * 3 * weights
    result = runs.finish(prepared)
    written = sum(file.stat().st_size for file in Path(result["output"]).rglob("*") if file.is_file())
    assert weights + 3 * weights < written < 1.5 * prepared.plan["disk_bytes"]
    assert runs.prepare(recipe("output=null"), planning=True).plan["steps"] == 4


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
    monkeypatch.setattr("layerskip.train.figures.predicted", lambda *_: Setting(0.8, 2, 1, 1 << 20))
    result = runs.train(recipe("hold_out=8"))
    assert (result["exit_layer"], result["draft_length"], result["predicted_speedup"]) == (None, None, 0.8)
    folder = Path(result["output"])
    facts = facts_of(AutoConfig.from_pretrained(folder))
    assert facts == Facts((2, 3), recipe="tiny", versions=facts.versions)
    assert "does not pay yet: the cost model predicts 0.80 x at best" in (folder / "README.md").read_text()
    assert Options().plan(facts, 5).drafter == "lookup"
    asked = Options(drafter="exit").plan(facts, 5)
    assert (asked.mode, asked.exit_layer) == ("self-speculative", 2), "the trained exit nearest to a quarter"
    assert Options().plan(replace(facts, exit_layer=2), 5).mode == "self-speculative"
    console = Console(file=io.StringIO(), width=1000)  # paths of tests are long
    print_result(console, result)
    assert "drafting with the exit does not pay yet, 0.80 x" in console.file.getvalue()


def test_figures_of_training_batches_choose_no_default_exit(recipe):
    """A default was praised as 1.45 x by figures of the batches it had learnt, and decoded at 0.85 x."""
    result = runs.train(recipe())  # forty examples are too few to set some aside
    assert result["measured_on"] == "training"
    assert {*result["exits"]} == {"2", "3", "5"}
    assert (result["exit_layer"], result["predicted_speedup"], result["draft_vocab"]) == (None, None, None)
    facts = facts_of(AutoConfig.from_pretrained(result["output"]))
    assert (facts.exits, facts.exit_layer, facts.draft_vocab) == ((2, 3), None, None)
    console = Console(file=io.StringIO(), width=1000)  # paths of tests are long
    print_result(console, result)
    told = console.file.getvalue()
    assert "measured on the last training batches, so no default exit was chosen" in told
    assert f"layerskip tune {result['output']} --prompts FILE --save" in told


def test_examples_set_aside_choose_the_default_and_the_terminal_and_the_card_say_so(recipe, monkeypatch):
    monkeypatch.setattr("layerskip.train.figures.DRAFT_VOCABULARIES", (4, 8, 1024))
    monkeypatch.setattr("layerskip.train.figures.head_layers", lambda exits: 30.0)  # as of a large vocabulary
    run = runs.prepare(recipe("hold_out=8"))
    assert (run.num_held_out, run.plan["held_out"], run.plan["examples"]) == (8, 8, 32)
    result = runs.finish(run)
    assert (result["measured_on"], result["held_out"]) == ("held_out", 8)
    assert result["draft_vocab"] == 8
    folder = Path(result["output"])
    facts = facts_of(AutoConfig.from_pretrained(folder))
    assert (facts.exit_layer, facts.draft_length) == (result["exit_layer"], result["draft_length"])
    assert facts.exit_layer is not None
    ranked = json.loads((folder / facts.draft_vocab).read_text())
    assert ranked == run.train_rows.frequent(8, run.ends)
    assert run.ends <= {*ranked}
    told = f"the cost model predicts {result['predicted_speedup']:.2f} x"
    assert "8 examples of the data, set aside and not trained on" in (folder / "README.md").read_text()
    assert told in (folder / "README.md").read_text()
    console = Console(file=io.StringIO(), width=300)
    print_result(console, result)
    assert "measured on 8 examples of the data, set aside" in console.file.getvalue()
    assert told in console.file.getvalue()
    loaded = layerskip.load(folder)
    assert loaded.draft_head(Options()).size == 8


def test_what_is_set_aside_is_decided_by_data_and_seed_and_stays_so_in_a_resumed_run(recipe, refused):
    first, again = (runs.prepare(recipe("hold_out=8")) for _ in range(2))
    other = runs.prepare(recipe("hold_out=8", "seed=1"))
    assert first.eval_rows.tokens.tolist() == again.eval_rows.tokens.tolist()
    assert first.train_rows.tokens.tolist() == again.train_rows.tokens.tolist()
    assert first.eval_rows.tokens.tolist() != other.eval_rows.tokens.tolist()
    runs.finish(first)
    assert json.loads((first.output / runs.FACTS_FILE).read_text())["held_out"] == 8
    assert "differs in hold_out" in refused("hold_out=9", resume=True)


@pytest.mark.parametrize(
    ("examples", "count"), [(79, 0), (80, 8), (400, 8), (5_000, 100), (10_000, 200), (1_000_000, 200)]
)
def test_two_percent_are_set_aside_within_limits_and_nothing_of_tiny_data(examples, count):
    assert loading.num_held_out(read_recipe("finetune"), examples) == count
    assert loading.num_held_out(read_recipe("finetune", ["hold_out=3"]), examples) == 3


def test_evaluation_data_and_examples_set_aside_exclude_each_other(recipe, data):
    with pytest.raises(UserError, match="hold_out takes the place of eval_data"):
        recipe("hold_out=8", f"eval_data={data}")
    assert recipe("hold_out=0", f"eval_data={data}").eval_data is not None, "nothing is set aside"


def test_a_draft_vocabulary_is_as_large_as_the_tokens_of_unseen_text_need(monkeypatch):
    """Coverage counts tokens that were not trained on, by a ranking of those that were."""
    monkeypatch.setattr(figures, "DRAFT_VOCABULARIES", (2, 3, 100))

    class Read:
        def __init__(self, *labels):
            self.labels = np.array(labels)

        def frequent(self, size, always):
            return most_frequent(self.labels, size, always)

    trained = Read(-100, 5, 5, 5, 6, 6, 7)
    assert figures.coverage(trained, Read(5, 5, 7, -100, 9), {1}, 10) == {2: 0.5, 3: 0.5, 10: 1.0}


def test_a_run_that_measured_nothing_says_so_and_decodes_plainly(recipe):
    result = runs.train(recipe("arguments.logging_strategy=no", "arguments.logging_first_step=false"))
    assert (result["exits"], result["exit_layer"], result["predicted_speedup"]) == ({}, None, None)
    folder = Path(result["output"])
    card = (folder / "README.md").read_text()
    assert "Nothing was measured." in card
    assert "No exit drafts by default: no data were held out" in card
    assert [line for line in card.splitlines() if line.startswith("```")] == [
        "```sh",
        "```",
        "```text",
        "```",
    ]
    assert Options().plan(facts_of(AutoConfig.from_pretrained(folder)), 5).drafter == "lookup"


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
