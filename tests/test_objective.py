"""An objective is given, not attached: a recipe, a trainer, TRL's, a loop of one's own teach the same."""

import ast
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import layerskip
import training
from layerskip.checkpoint import facts as checkpoint
from layerskip.errors import UserError
from layerskip.train.job.recipe import recipe_from
from layerskip.train.job.run import finish, prepare
from layerskip.train.objective.binding import Bound, bound
from layerskip.train.objective.exit_map import add_map, as_checkpoint, map_of
from layerskip.train.objective.exits import ExitTraining
from layerskip.train.objective.objective import Objective
from layerskip.train.objective.schedule import Schedule
from layerskip.train.trainer import LayerSkipArguments, LayerSkipTrainer

EXIT, STEPS = 2, 3
SCHEDULE = {"exits": [EXIT], "curriculum": "fixed", "weighting": "uniform", "p_max": 0.0, "last_every": 2}
MAPPED = {"exit_map": True, "exit_vocab": 24}
OBJECTIVES = {
    "exit_vocab": {"exit_vocab": 8},
    "kl": {"last_loss": "kl", "freeze": "embeddings"},
    "anchor": {"last_loss": "anchor", "freeze": "above"},
    "exit_map": {**MAPPED, "freeze": "embeddings"},
    "the map alone": {**MAPPED, "freeze": "model"},
    "anchored map": {**MAPPED, "freeze": "above", "last_loss": "anchor"},
}
COMMON = {"learning_rate": 1e-2, "seed": 3}
GIVEN = {
    **SCHEDULE, **COMMON, "max_steps": STEPS, "per_device_train_batch_size": 4, "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03, "logging_steps": 1, "logging_first_step": True, "save_strategy": "no", "report_to": [],
    "use_cpu": True, "bf16": False, "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def few_rows_measure_an_anchor():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layerskip.train.objective.anchor.ROWS", 4)
        yield


def recipe_run(folder, path, **settings):
    """A recipe's run that passed its checks, on twelve examples."""
    lines = ({"prompt": f"say {i % 5}", "completion": "abc " * (1 + i % 4)} for i in range(12))
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    common = {
        "model": str(folder), "data": str(path / "data.jsonl"), "output": str(path / "run"), "length": 48,
        "batch_size": 4, "steps": STEPS, "dtype": "float32", "template": "off", "pack": False, "log_every": 1,
    }  # fmt: skip
    return prepare(recipe_from({**common, **SCHEDULE, **COMMON, **settings}))


@pytest.fixture(scope="module", params=OBJECTIVES.values(), ids=OBJECTIVES)
def taught(request, folder, tmp_path_factory):
    """A recipe's run that is done, and its objective."""
    run = recipe_run(folder, tmp_path_factory.mktemp("taught"), **request.param)
    finish(run)
    return run, request.param


@pytest.fixture
def run(folder, tmp_path):
    return recipe_run(folder, tmp_path)


def model_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trainer(folder, rows, output, model=None, **settings):
    return LayerSkipTrainer(
        model=model_of(folder) if model is None else model,
        args=LayerSkipArguments(str(output), **{**GIVEN, "remove_unused_columns": False, **settings}),
        train_dataset=rows,
        data_collator=rows.collate,
    )


def logged(run):
    state = json.loads((run.output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [line["loss"] for line in state["log_history"] if "loss" in line]


def test_a_trainer_given_the_fields_of_a_recipe_does_what_the_recipe_does(taught, folder, tmp_path):
    run, objective = taught
    ours = trainer(folder, run.train_rows, tmp_path / "ours", **objective)
    ours.train()
    assert training.losses(ours) == logged(run)
    ours.save_model(str(tmp_path / "saved"))
    names = sorted(file.name for file in run.output.glob("*.safetensors"))
    for name in names:
        one, other = (load_file(path / name) for path in (run.output, tmp_path / "saved"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert ("draft_head.safetensors" in names) == ("exit_map" in objective)
    lm = layerskip.load(str(tmp_path / "saved"), dtype="float32")
    assert lm.facts.exits == (EXIT,)
    assert checkpoint.ranked_vocabulary(lm.path, lm.facts) == checkpoint.ranked_vocabulary(
        run.output, lm.facts
    )
    assert (map_of(ours.model) is not None) == ("exit_map" in objective), "training can go on"


def test_the_trainer_of_trl_does_what_the_recipe_does(taught, folder, tmp_path):
    run, objective = taught
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("trl")
    from layerskip.train.trl import LayerSkipSFTConfig, LayerSkipSFTTrainer

    rows = [{key: row[key].tolist() for key in ("input_ids", "labels")} for row in run.train_rows]
    skip = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    ours = LayerSkipSFTTrainer(
        model=model_of(folder),
        args=LayerSkipSFTConfig(str(tmp_path / "ours"), **{**GIVEN, **skip, **objective}),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=run.tokenizer,
    )
    ours.train()
    assert training.losses(ours) == pytest.approx(logged(run), rel=1e-4)


def test_a_loop_of_ones_own_starts_with_the_recipes_loss(taught, folder):
    run, objective = taught
    first = trainer(folder, run.train_rows, run.output / "unused", **objective).get_train_dataloader()
    model, rows = model_of(folder).train(), run.train_rows
    schedule = Schedule(model.config.num_hidden_layers, **SCHEDULE)
    objective = Objective(**objective)
    given = bound(objective, model, schedule, [rows.collate([row]) for row in rows], seed=COMMON["seed"])
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    found = []
    with ExitTraining(model, schedule, given) as exits:
        for step, batch in zip(range(STEPS), first, strict=False):
            exits.begin(step, STEPS)
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
    assert found[0] == pytest.approx(logged(run)[0], rel=1e-5)
    assert found[-1] < found[0]


def test_a_resumed_trainer_measures_what_the_first_one_measured(run, folder, tmp_path):
    settings = OBJECTIVES["anchored map"] | {"save_strategy": "steps", "save_steps": 2}
    straight, again = (trainer(folder, run.train_rows, tmp_path / "ours", **settings) for _ in range(2))
    assert torch.equal(straight.exits.bound.anchor.fisher, again.exits.bound.anchor.fisher)
    straight.train()
    again.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2"))
    assert training.difference(training.weights(straight), training.weights(again)) == 0.0
    assert (
        "draft_head" not in json.loads((tmp_path / "ours/checkpoint-2/config.json").read_text())["layerskip"]
    )


def adapted(model, **changes):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=4, **changes))


def test_adapters_that_save_the_map_train_it_and_are_merged_into_a_checkpoint(run, folder, tmp_path):
    add_map(run.model)
    tuned = adapted(run.model, modules_to_save=["exit_map"])
    ours = trainer(folder, run.train_rows, tmp_path / "ours", model=tuned, **MAPPED)
    ours.train()
    with pytest.warns(UserWarning, match="no draft head"):
        ours.save_model(str(tmp_path / "adapters"))
    ours.exits.detach()
    merged = tuned.merge_and_unload()
    assert map_of(merged).weight.abs().max() > 0.001
    with as_checkpoint(merged, tmp_path / "whole", checkpoint.Facts((EXIT,)), ours.exits.bound.vocabulary):
        merged.save_pretrained(tmp_path / "whole")
    lm = layerskip.load(str(tmp_path / "whole"))
    assert lm.facts.owns_head(EXIT)
    assert not any("exit_map" in name for name in load_file(lm.path / "model.safetensors"))


def test_adapters_that_would_lose_the_map_are_refused(run, folder, tmp_path):
    with pytest.raises(UserError, match="put on before exit_map"):
        trainer(folder, run.train_rows, tmp_path, model=adapted(run.model), **MAPPED)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"last_loss": "kl"}, "needs the head it compares with"),
        ({"last_loss": "anchor", "freeze": "embeddings"}, "anchor needs"),
        ({**MAPPED, "freeze": "embeddings", "exits": [1, 2]}, "belongs to one exit"),
        ({"freeze": "model"}, "freeze model leaves the map"),
        ({"freeze": "above", "e_scale": 0.0}, "there are none"),
        ({"freeze": "everything"}, "unknown freeze"),
        ({"exit_vocab": 0}, "exit_vocab is 0"),
    ],
)
def test_fields_that_contradict_each_other_are_refused_as_in_a_recipe(run, folder, tmp_path, settings, says):
    with pytest.raises(UserError, match=says):
        trainer(folder, run.train_rows, tmp_path, **settings)


def test_an_objective_that_needs_data_says_so():
    model = training.model()
    schedule = training.one_exit(model.config.num_hidden_layers, EXIT)
    for objective in (Objective(last_loss="anchor", freeze="above"), Objective(exit_vocab=4)):
        with pytest.raises(UserError, match="rows of the training data"):
            ExitTraining(model, schedule, objective)


def test_an_optimizer_that_does_not_know_the_map_is_refused(tmp_path):
    model = training.model()
    args = training.arguments(tmp_path, **{**SCHEDULE, **OBJECTIVES["exit_map"]})
    optimizers = torch.optim.SGD(model.parameters()), None
    with pytest.raises(UserError, match="knows no exit_map"):
        LayerSkipTrainer(model=model, args=args, train_dataset=training.counting(8), optimizers=optimizers)


def test_nothing_is_set_on_exits_once_they_are_made():
    """The run used to hang reference, anchor and vocabulary on the trainer's exits, where no one else had them."""
    assert Bound.__dataclass_params__.frozen
    assert {field.name for field in fields(Bound)} == {"objective", "vocabulary", "reference", "anchor"}
    for path in (Path(layerskip.__file__).parent / "train").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                owner = node.value
                assert getattr(owner, "attr", getattr(owner, "id", None)) != "exits", f"{path}: {node.attr}"


def test_the_loop_of_the_documents_runs():
    class Data(list):
        @staticmethod
        def collate(rows):
            return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    text = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    [block] = [b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "optimizer.step" in b]
    model, data = training.model(), Data(training.counting(12))
    for name, ours in (("num_layers=30", f"num_layers={model.config.num_hidden_layers}"), ("(4,)", "(2,)")):
        assert name in block
        block = block.replace(name, ours)
    batches = [data.collate(data[:6]), data.collate(data[6:])]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exec(block, {"model": model, "data": data, "batches": batches, "torch": torch})
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(".layers.0." in name or ".layers.1." in name for name in moved)
