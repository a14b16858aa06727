"""Two ways to the same training run: the same weights, or the same figures."""

import contextlib
import copy
import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import tiny
import training
from layerskip.errors import UserError
from layerskip.model.cost import Cost
from layerskip.train.objective.exits import ExitTraining
from layerskip.train.objective.schedule import Schedule
from layerskip.train.trainer import LayerSkipTrainer

PARTS = {
    "all exits": {},
    "dropout, rotating exits": {"p_max": 0.5, "curriculum": "rotational", "rotation": 2},
    "dropout, distilled": {"p_max": 0.5, "drop_depth": "uniform", "exit_loss": "ce+kl", "exits": [1, 3]},
    "rows that end early": {"p_max": 0.5, "last_every": 2, "exits": [1, 3]},
    "plain": {"e_scale": 0.0},
    "plain with dropout": {"e_scale": 0.0, "p_max": 0.5, "residual_scale": "inverse"},
}


@pytest.mark.parametrize("recipe", PARTS.values(), ids=PARTS)
def test_four_micro_batches_of_two_are_one_batch_of_eight(tmp_path, recipe):
    """Rows have between one and all of their labels: tokens are averaged, not micro-batches."""
    data = training.counting(64, masked=True)
    whole = training.trained(tmp_path, data=data, **recipe)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    cut = training.trained(tmp_path, data=data, **recipe, **parts)
    assert training.difference(whole, cut) < training.SAME
    assert training.difference(whole, training.model().state_dict()) > 1e-2


def test_a_batch_cut_unevenly_keeps_its_rows_and_masks(tmp_path):
    """An epoch of 20 rows ends in half a batch, and in a micro-batch of one row."""
    recipe = PARTS["dropout, rotating exits"] | {"max_steps": 6}
    data = training.counting(20, masked=True)
    whole = training.trained(tmp_path, data=data, **recipe)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert (
        training.difference(whole, training.trained(tmp_path, data=data, **recipe, **parts)) < training.SAME
    )


@pytest.mark.parametrize("kwargs", [{}, {"every_n_layers": 2}], ids=str)
def test_activation_checkpointing_changes_nothing(tmp_path, kwargs):
    recipe = PARTS["dropout, rotating exits"]
    plain = training.trained(tmp_path, **recipe)
    recomputed = training.trained(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs, **recipe
    )
    assert training.difference(plain, recomputed) == 0.0


def test_without_dropout_and_exits_it_is_the_plain_trainer_bit_for_bit(tmp_path):
    """With AdamW, warm-up, decay and clipping: everything is Hugging Face's."""
    settings = {"optim": "adamw_torch", "warmup_steps": 2, "lr_scheduler_type": "cosine", "max_steps": 5}
    settings |= {
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
    }
    data = training.counting(64, masked=True)
    ours = training.trainer(tmp_path, data=data, e_scale=0.0, **settings)
    ours.train()
    known = {name for name in TrainingArguments.__dataclass_fields__ if name != "output_dir"}
    args = {name: value for name, value in vars(ours.args).items() if name in known and name in settings}
    args |= {
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 0.1,
    }
    theirs = Trainer(
        model=training.model(),
        args=TrainingArguments(str(tmp_path), disable_tqdm=True, **args),
        train_dataset=data,
    )
    theirs.train()
    assert training.difference(training.weights(ours), theirs.model.state_dict()) == 0.0
    assert training.losses(ours) == training.losses(theirs)
    assert training.losses(ours, "grad_norm") == training.losses(theirs, "grad_norm")


def test_leaving_gives_the_model_back_as_it_was():
    model = training.model()
    model.model.layers[1].train()
    tokens = torch.arange(2, 26).reshape(2, 12)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    logits, own = model(tokens).logits, [dict(vars(module)) for module in model.modules()]
    exits = ExitTraining(model, Schedule(tiny.NUM_LAYERS, p_max=0.5, curriculum="all"))
    with exits:
        assert [module.training for module in model.modules()] == modes
        model.train()
        exits.begin(0, 1)
        model(input_ids=tokens, labels=tokens).loss.backward()
        assert model.state_dict().keys() == before.keys()
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    for module, attributes in zip(model.modules(), own, strict=True):
        assert vars(module).keys() == attributes.keys()
        assert not module._forward_hooks
        assert "forward" not in vars(module)
    exits.detach()
    assert torch.equal(model(tokens).logits, logits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("recipe", ["plain with dropout", "dropout, rotating exits"])
def test_a_second_trainer_of_a_model_replaces_the_first(tmp_path, recipe):
    """Both used to stay in the model's forward: a plain second run trained the exits of the first."""
    wanted = training.trained(tmp_path, **PARTS[recipe])
    model = training.model()
    first = training.trainer(tmp_path, start=model, max_steps=1, learning_rate=0.0, **PARTS["all exits"])
    first.train()
    assert training.difference(wanted, training.trained(tmp_path, start=model, **PARTS[recipe])) == 0.0
    assert not first.exits.attached
    assert "eval_exit_4_loss" in first.evaluate(training.counting(8))
    assert first.exits.attached


def test_more_tensors_by_position_are_a_type_error():
    with (
        ExitTraining(training.model(), Schedule(tiny.NUM_LAYERS)) as exits,
        pytest.raises(TypeError, match="by name"),
    ):
        exits.hf(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4))


def test_a_model_keeps_its_logits_beside_the_trainer(tmp_path):
    """In evaluation mode with labels it used to return a loss alone, also long after training."""
    run = training.trainer(tmp_path, max_steps=1)
    tokens = torch.arange(2, 26).reshape(2, 12)
    expected = run.model.eval()(input_ids=tokens).logits
    assert torch.equal(run.model(input_ids=tokens, labels=tokens).logits, expected)
    run.train()
    assert run.model.eval()(input_ids=tokens, labels=tokens).logits is not None


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dropout, rotating exits", "plain"])
def test_a_compiled_model_has_the_same_losses(tmp_path, recipe):
    torch._dynamo.reset()
    plain = training.trainer(tmp_path, **PARTS[recipe])
    compiled = training.trainer(tmp_path, torch_compile=True, torch_compile_backend="eager", **PARTS[recipe])
    plain.train()
    compiled.train()
    assert training.difference(training.weights(plain), training.weights(compiled)) < training.SAME
    for ours, theirs in zip(training.losses(plain), training.losses(compiled), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_bfloat16_autocast_trains_the_same_exits(tmp_path):
    plain = training.trainer(tmp_path, **PARTS["dropout, rotating exits"])
    mixed = training.trainer(
        tmp_path, bf16=True, save_strategy="steps", save_steps=2, **PARTS["dropout, rotating exits"]
    )
    plain.train()
    mixed.train()
    for ours, theirs in zip(training.losses(plain), training.losses(mixed), strict=True):
        assert ours == pytest.approx(theirs, rel=0.02)
    assert training.losses(plain, "exit_2_loss")
    assert len(training.losses(plain, "exit_4_loss")) == len(training.losses(mixed, "exit_4_loss"))


def independent(model, rows, exits):
    """Loss and agreement with the last layer of every exit, from whole logits."""
    tokens, labels = (torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels"))
    with torch.no_grad():
        out = model(input_ids=tokens, output_hidden_states=True)
        figures = {}
        wanted = labels[:, 1:] != -100
        best = out.logits[:, :-1].argmax(-1)
        for k in exits:
            last = k == tiny.NUM_LAYERS  # its state comes normed already
            hidden = out.hidden_states[k] if last else model.model.norm(out.hidden_states[k])
            logits = model.lm_head(hidden)[:, :-1]
            loss = F.cross_entropy(logits[wanted].double(), labels[:, 1:][wanted])
            figures[k] = (float(loss), float((logits.argmax(-1) == best)[wanted].double().mean()))
    return figures


def test_evaluation_agrees_with_an_independent_computation(tmp_path):
    rows = training.counting(19, masked=True, seed=1)
    run = training.trainer(tmp_path, eval_dataset=rows, exits=[2, 3], per_device_eval_batch_size=4)
    run.train()
    figures = run.evaluate()
    expected = independent(copy.deepcopy(run.model), rows, (2, 3, tiny.NUM_LAYERS))
    for k, (loss, agreement) in expected.items():
        assert figures[f"eval_exit_{k}_loss"] == pytest.approx(loss, rel=1e-5)
        assert figures[f"eval_exit_{k}_agreement"] == pytest.approx(agreement)
    assert figures["eval_loss"] == pytest.approx(expected[tiny.NUM_LAYERS][0], rel=1e-5)
    layer = sum(p.numel() for p in run.model.model.layers[0].parameters())
    head = run.model.lm_head.weight.numel() / layer
    chances = [
        Cost(tiny.NUM_LAYERS, k, head, head).speedup(n, sum(alpha**i for i in range(n + 1)))
        for k, alpha in ((k, expected[k][1]) for k in (2, 3))
        for n in range(1, 13)
    ]
    assert figures["eval_predicted_speedup"] == pytest.approx(max(chances), rel=1e-4)


def test_the_best_checkpoint_is_the_one_with_the_best_predicted_speedup(tmp_path):
    run = training.trainer(
        tmp_path,
        eval_dataset=training.counting(16, seed=1),
        max_steps=6,
        learning_rate=0.5,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        metric_for_best_model="eval_predicted_speedup",
        load_best_model_at_end=True,
    )
    run.train()
    seen = training.losses(run, "eval_predicted_speedup")
    best = tmp_path / f"checkpoint-{1 + seen.index(max(seen))}"
    assert len(set(seen)) > 1
    assert run.state.best_metric == max(seen)
    assert run.state.best_model_checkpoint == str(best)
    loaded = AutoModelForCausalLM.from_pretrained(best)
    assert training.difference(training.weights(run), loaded.state_dict()) == 0.0
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted(
        {best.name, "checkpoint-6"} if best.name != "checkpoint-6" else {best.name, "checkpoint-5"}
    )
    for path in tmp_path.iterdir():
        said = json.loads((path / "trainer_state.json").read_text())["best_model_checkpoint"]
        assert ".saving" not in said


class Poison(TrainerCallback):
    """Make one layer's output not finite, from a step on."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                model.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))


def test_a_loss_that_is_not_finite_stops_before_it_does_harm(tmp_path):
    run = training.trainer(
        tmp_path, optim="adamw_torch", save_strategy="steps", save_steps=1, callbacks=[Poison()]
    )
    with pytest.raises(UserError) as error:
        run.train()
    assert error.value.message.startswith(
        "the loss of exit 3, exit 4, the final layer is not finite at step 2"
    )
    assert str(tmp_path / "checkpoint-2") in error.value.hint
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    for name, value in model.state_dict().items():
        if name != "model.layers.2.mlp.down_proj.weight":
            assert torch.equal(value, run.model.state_dict()[name]), "no step was made with it"
    state = run.optimizer.state[run.model.lm_head.weight]
    assert int(state["step"]) == 2
    assert state["exp_avg"].isfinite().all()


def test_a_trainer_that_refused_a_loss_trains_again(tmp_path):
    """The sums of the refused step stayed, and were refused again for ever."""
    run = training.trainer(tmp_path, callbacks=[Poison()])
    good = training.weights(run)
    with pytest.raises(UserError):
        run.train()
    run.exits.hf.load_state_dict(good)
    run.remove_callback(Poison)
    run.train()
    assert run.state.global_step == 4


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    run = training.trainer(tmp_path, max_grad_norm=0.0)
    run.model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(UserError, match="the gradient is not finite at step 0"):
        run.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label smoothing"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "reentrant"),
    ],
)
def test_settings_that_would_bypass_the_exits_are_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        training.trainer(tmp_path, **settings)


@pytest.mark.parametrize("name", ["compute_loss_func", "compute_metrics", "model_init"])
def test_functions_that_would_bypass_the_exits_are_refused(tmp_path, name):
    """`model_init` makes a second model when training starts: the exits stayed on the first, silently."""
    model = {} if name == "model_init" else {"model": training.model()}
    with pytest.raises(UserError, match=name):
        LayerSkipTrainer(args=training.arguments(tmp_path), **model, **{name: lambda *args: training.model()})


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"torch_compile": True}], ids=str)
def test_micro_batches_and_recomputation_on_the_device(tmp_path, settings):
    """TF32 off; in bfloat16 autocast micro-batches round differently, losses stay close."""
    torch.backends.cuda.matmul.allow_tf32 = False
    recipe = PARTS["dropout, rotating exits"] | {"use_cpu": False, **settings}
    data = training.counting(64, masked=True)
    runs = []
    for change in (
        {},
        {"gradient_checkpointing": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ):
        with contextlib.suppress(AttributeError):
            torch._dynamo.reset()
        run = training.trainer(tmp_path, data=data, **recipe, **change)
        run.train()
        runs.append(run)
    for other in runs[1:]:
        for ours, theirs in zip(training.losses(runs[0]), training.losses(other), strict=True):
            assert ours == pytest.approx(theirs, rel=0.02 if settings.get("bf16") else 1e-4)
