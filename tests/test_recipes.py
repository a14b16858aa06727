"""Recipes: every published setting as a file, overrides that say what is wrong, pictures of a schedule."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import get_scheduler

from layerskip.errors import UserError
from layerskip.train.job.plot import sampled
from layerskip.train.job.recipe import (
    FSDP_SETTINGS,
    Recipe,
    as_yaml,
    changed,
    differing_keys,
    read_recipe,
    recipe_names,
)
from layerskip.train.objective.schedule import Schedule

# The paper's table of settings: layers, p_max, S, e_scale, curriculum, R, learning rate, rows per step, steps.
PUBLISHED = {
    "continual-llama2-7b": (32, 0.1, "const", 0.2, "rotational", 8, 3e-5, 256, 50_000),
    "continual-llama2-13b": (40, 0.1, "const", 0.1, "rotational", 39, 2e-5, 256, 50_000),
    "continual-llama3-8b": (32, 0.1, "const", 0.1, "rotational", 8, None, None, None),
    "continual-llama3.2-1b": (16, 0.1, "const", 0.1, "rotational", 8, None, None, None),
    "scratch-llama-1.5b": (24, 0.1, "exp", 0.2, "rotational", 23, 8e-4, 128, 50_000),
    "scratch-llama2-7b": (32, 0.2, "exp", 0.2, "rotational", 31, 8e-4, 128, 50_000),
    "code-llama1-7b": (32, 0.1, "const", 1.0, "rotational", 16, 1e-4, 128, 10_000),
    "task-topv2-llama-1.5b": (24, 0.2, "const", 1.0, "gradual", None, 1e-4, 256, 5_800),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_are_those_of_the_paper(name):
    layers, p_max, time, e_scale, curriculum, rotation, learning_rate, rows, steps = PUBLISHED[name]
    recipe = read_recipe(name)
    assert (recipe.p_max, recipe.drop_depth, recipe.drop_time) == (p_max, "exp", time)
    assert (recipe.e_scale, recipe.weighting, recipe.exit_loss) == (e_scale, "paper", "ce")
    assert (recipe.curriculum, recipe.rotation, recipe.exits) == (curriculum, rotation, None)
    assert (recipe.residual_scale, recipe.lora) == ("none", None)
    if learning_rate is not None:
        assert (recipe.learning_rate, recipe.global_batch, recipe.steps) == (learning_rate, rows, steps)
    schedule = Schedule.of(layers, recipe, recipe.exits)
    rates = schedule.drop_rates(
        (steps and steps - 1) or 0, steps or 1
    )  # at the end, where S is 1 in any case
    assert rates[0] == 0.0
    assert rates[-1] == pytest.approx(p_max)
    assert rates[layers // 2] == pytest.approx(p_max * (2 ** ((layers // 2) / (layers - 1)) - 1))
    assert max(schedule.weights(0, steps or 1)) == layers


def test_every_recipe_is_read_and_reads_back_the_same(tmp_path):
    assert {
        *PUBLISHED,
        "revised-dropout",
        "scratch-small",
        "continual-small",
        "topv2",
        "finetune",
        "lora",
        "exit-adapter",
        "tiny",
    } == {*recipe_names()}
    for name in recipe_names():
        recipe = read_recipe(name)
        assert recipe.description
        assert recipe.source
        file = tmp_path / f"{name}.yaml"
        file.write_text(as_yaml(recipe))
        assert read_recipe(str(file)) == recipe


def test_a_constant_rate_is_warmed_up(tmp_path):
    from layerskip.train.job.plan import arguments_for
    from layerskip.train.job.run import schedule_for

    recipe = read_recipe("continual-small")
    given = arguments_for(recipe, tmp_path, schedule_for(recipe, 30), "cpu")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    rates = get_scheduler(given.lr_scheduler_type, optimizer, given.get_warmup_steps(2442), 2442)
    assert rates.get_last_lr() == [0.0]
    for _ in range(50):
        optimizer.step()
        rates.step()
    assert rates.get_last_lr() == [1.0]


def test_the_revised_dropout_fades_out_and_scales_up():
    recipe = read_recipe("revised-dropout")
    assert (recipe.drop_time, recipe.residual_scale) == ("linear_down", "inverse")
    schedule = Schedule.of(32, recipe, recipe.exits)
    assert schedule.drop_rates(0, 100)[-1] == recipe.p_max
    assert schedule.drop_rates(99, 100)[-1] == 0.0


def test_the_last_layer_is_no_exit_that_rotates():
    """It was counted as one, so that pictures averaged over parts of a rotation."""
    weights = sampled(Schedule(9, exits=(2, 4, 9), weighting="uniform"), 1000).mean_weights
    assert weights[2] == weights[4] > 0


def test_every_key_is_explained():
    for key, field in Recipe.model_fields.items():
        assert field.description, key


def test_overrides_are_yaml_with_dotted_keys():
    recipe = read_recipe(
        "topv2", ["learning_rate=1e-4", "template=off", "exits=[8, 2]", "lora.rank=8", "lora.layers=[1, 2]",
                  "columns.prompt=utterance", "weighting={2: 1, 8: 2e-1}", "output=2026-01-01", "data=[a, b]",
                  "arguments.adam_beta2=0.95", 'separator=" => "', "eval_data=on"],
    )  # fmt: skip
    assert (recipe.learning_rate, recipe.template, recipe.exits) == (1e-4, "off", [2, 8])
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.layers) == (8, 32, [1, 2])
    assert (recipe.columns.prompt, recipe.columns.completion) == ("utterance", "response")
    assert recipe.weighting == {2: 1.0, 8: 0.2}
    assert (recipe.output, recipe.sources, recipe.separator) == ("2026-01-01", ["a", "b"], " => ")
    assert recipe.eval_sources == ["on"]
    assert recipe.arguments == {"adam_beta2": 0.95}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("learning_rat=1", "unknown key 'learning_rat' in the recipe\n  did you mean 'learning_rate'"),
        ("lora.rnk=1", "unknown key 'lora.rnk' in the recipe\n  did you mean 'lora.rank' or 'lora.ranks'?"),
        ("columns.promt=x", "did you mean 'columns.prompt'?"),
        ("learning_rate=fast", "learning_rate is 'fast': it should be a valid number"),
        ("lora.rank=0", "lora.rank is 0: it should be greater than or equal to 1\n  lora.rank: Rank"),
        ("curriculum=spiral", "curriculum is 'spiral': it should be 'rotational', 'gradual', 'all' or 'fixed'"),
        ("p_max=1.5", "p_max is 1.5: it should be less than 1"),
        ("exits=[]", "exits is []: give at least one exit layer"),
        ("exits=[-1]", "exits is -1: it should be greater than or equal to 0"),
        ("exits=[0]", "exit 0, the embedding, is for an adapter: exit_adapter=true"),
        ("best_by=loss", "best_by loss needs eval_data"),
        ("steps", "'steps' is not a setting\n  write key=value"),
        ("exits=[1", "the value of exits is not YAML"),
        ("steps.x=1", "steps is 950, it has no keys inside"),
    ],
)  # fmt: skip
def test_a_wrong_override_says_which_key_and_what_is_allowed(override, says):
    with pytest.raises(UserError) as error:
        read_recipe("topv2", [override])
    assert says in str(error.value)


def test_what_differs_from_the_defaults_is_told_in_yaml():
    told = changed(
        read_recipe("tiny", ["template=off", "lora.rank=16", "columns.text=t", "exits=null", "p_max=0.1"])
    )
    assert (told["template"], told["lora.rank"], told["columns.text"]) == ("'off'", "16", "t")
    assert not {"exits", "p_max", "columns.prompt", "lora.layers"} & {*told}, "those are defaults"


def test_an_unknown_recipe_suggests_the_nearest(tmp_path):
    with pytest.raises(UserError, match="did you mean 'topv2'"):
        read_recipe("topv")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(UserError, match="cannot read the recipe"):
        read_recipe(str(broken))
    broken.write_text("just words")
    with pytest.raises(UserError, match="not a list of `key: value` lines"):
        read_recipe(str(broken))


def test_differing_keys_are_named():
    one, other = read_recipe("topv2"), read_recipe("topv2", ["steps=7", "lora.rank=2"])
    assert differing_keys(one, other) == ["steps", "lora"]


def test_the_sharding_settings_are_those_of_the_second_version():
    settings = yaml.safe_load(FSDP_SETTINGS.read_text())
    assert settings["distributed_type"] == "FSDP"
    assert settings["fsdp_config"]["fsdp_version"] == 2


def test_every_key_and_its_explanation_stand_in_the_documents():
    text = (Path(__file__).parent.parent / "docs" / "training.md").read_text().replace("\\|", "|")
    for key, field in Recipe.model_fields.items():
        assert f"| `{key}` |" in text, key
        assert field.description in text, key


def test_recipes_fit_the_context_of_their_model_and_the_batches_of_their_paper():
    assert read_recipe("code-llama1-7b").length == 2048
    assert not read_recipe("task-topv2-llama-1.5b").pack, "32 x 8 are examples, not rows full of them"
