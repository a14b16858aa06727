"""What a training run meets where people train: Liger's kernels, trackers of its figures."""

import importlib
import sys
from types import ModuleType

import pytest
from transformers.integrations import liger

import layerskip
import training
from layerskip.errors import UserError
from layerskip.train.job import run as runs

RECIPE = {"p_max": 0.5, "curriculum": "rotational", "rotation": 2, "exits": [2, 3]}


@pytest.fixture
def patched(monkeypatch):
    """Liger as it patches a model: single modules, and by its default the forward that gives the loss."""
    calls = []

    def apply(model, fused_linear_cross_entropy=True, **others):
        calls.append((fused_linear_cross_entropy, others))
        if fused_linear_cross_entropy:
            model.forward = None
        for layer in model.model.layers:
            layer.mlp.forward = lambda x, mlp=layer.mlp: type(mlp).forward(mlp, x)

    package, inner = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    inner._apply_liger_kernel_to_instance = apply
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", inner)
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: True)
    return calls


def test_with_liger_the_exits_are_trained_and_measured_as_without_it(tmp_path, patched):
    """Its default replaces the model's forward: the run went on and trained no exit."""
    rows = training.counting(8, masked=True)
    settings = {**RECIPE, "eval_dataset": rows}
    plain = training.trainer(tmp_path, **settings)
    run = training.trainer(
        tmp_path, **settings, use_liger_kernel=True, liger_kernel_config={"rms_norm": False}
    )
    plain.train(), run.train()
    assert patched == [(False, {"rms_norm": False})]
    assert training.difference(training.weights(run), training.weights(plain)) == 0.0
    assert training.losses(run, "exit_2_loss") == training.losses(plain, "exit_2_loss")
    assert run.evaluate()["eval_exit_2_loss"] == plain.evaluate()["eval_exit_2_loss"]


def test_liger_is_refused_where_it_takes_the_loss_or_is_not_installed(tmp_path, patched, monkeypatch):
    with pytest.raises(UserError, match="replaces the model's forward"):
        training.trainer(
            tmp_path, use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True}
        )
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: False)
    with pytest.raises(UserError, match=r"not installed\n  pip install liger-kernel"):
        training.trainer(tmp_path, use_liger_kernel=True)


@pytest.fixture
def recipe(folder, data, tmp_path):
    def made(*settings):
        return training.tiny_recipe(folder, data, tmp_path / "out", "steps=2", "hold_out=2", *settings)

    return made


TRACKER = """
from types import SimpleNamespace

run, config, logged, inits, finished = None, {}, [], [], []
__version__ = "0.99"


class Setting:
    def get(self):
        return None


context_vars = SimpleNamespace(current_space_id=Setting(), current_project=Setting())


def init(**given):
    global run
    inits.append(given)
    run = SimpleNamespace(id="1", name=given["name"], summary={}, _label=lambda **told: None)


def log(figures, **others):
    assert run is not None, "logged into a run that was finished"
    logged.append(figures)


def finish():
    global run
    finished.append(run)
    run = None
"""


@pytest.fixture
def tracker(request, tmp_path, monkeypatch):
    """A module in place of wandb or trackio, which keeps what it is told."""
    name, package = request.param, tmp_path / "packages" / request.param
    for folder in ("sdk", "sdk/lib"):
        (package / folder).mkdir(parents=True, exist_ok=True)
        (package / folder / "__init__.py").touch()
    (package / "__init__.py").write_text(TRACKER)
    (package / "sdk" / "lib" / "config_util.py").write_text("ConfigError = ValueError\n")
    monkeypatch.syspath_prepend(package.parent)
    importlib.invalidate_caches()
    yield importlib.import_module(name)
    for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == name]:
        del sys.modules[loaded]


FIGURES = {"exit_2_loss", "exit_2_agreement", "exit_3_loss", "exit_3_agreement", "tokens", "tokens_per_s"}


@pytest.mark.parametrize("tracker", ["wandb", "trackio"], indirect=True)
def test_a_run_tells_a_tracker_its_live_figures_and_those_of_its_end(recipe, tracker):
    """Figures of the end came when trackio had finished: they went into a run with another name."""
    name = tracker.__name__
    runs.train(recipe(f"report_to={name}", "curriculum=all"))
    told = [{**figures} for figures in tracker.logged]
    assert {f"train/{key}" for key in FIGURES} <= told[0].keys()
    assert told[1]["train/global_step"] == 2
    assert any("eval/exit_2_agreement" in figures for figures in told)
    assert {given["name"] for given in tracker.inits} == {"tiny out"}
    assert len(tracker.inits) == (2 if name == "trackio" else 1)
    assert name == "wandb" or len(tracker.finished) == 2
    assert tracker.config["exits"] == [2, 3]


@pytest.mark.parametrize("tracker", ["trackio"], indirect=True)
def test_a_trainer_of_ones_own_tells_a_tracker_too(tmp_path, tracker):
    training.trainer(tmp_path / "out", report_to="trackio", **RECIPE).train()
    assert "train/exit_2_loss" in tracker.logged[0]


def test_tensorboard_finds_the_figures_in_the_output_folder(recipe, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs.train(recipe("report_to=tensorboard", "curriculum=all"))
    [folder] = (tmp_path / "out" / "runs").iterdir()
    told = EventAccumulator(str(folder))
    told.Reload()
    names = {*told.Tags()["scalars"]}
    assert {f"train/{key}" for key in FIGURES} | {"eval/exit_2_agreement", "eval/predicted_speedup"} <= names
    assert [event.step for event in told.Scalars("train/exit_2_loss")] == [1, 2]


def test_a_tracker_that_is_not_there_is_refused_before_any_work(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.is_trackio_available", lambda: False)
    missing = r"report_to trackio needs trackio, which is not installed\n  pip install trackio"
    with pytest.raises(UserError, match=missing):
        runs.prepare(recipe("report_to=[trackio]"))
    with pytest.raises(UserError, match=missing):
        training.trainer(tmp_path, report_to="trackio")
    with pytest.raises(UserError, match="did you mean 'wandb'"):
        runs.prepare(recipe("report_to=wandbb"))
    assert not (tmp_path / "out").exists()


def test_a_recipe_trains_dora_and_leaves_it_merged(recipe, tmp_path):
    prepared = runs.prepare(recipe("lora.rank=2", "lora.dora=true"))
    sizes = [p for name, p in prepared.model.named_parameters() if "magnitude" in name]
    started = [p.detach().clone() for p in sizes]
    runs.finish(prepared)
    assert any(not p.equal(before) for p, before in zip(sizes, started, strict=True))
    lm = layerskip.load(str(tmp_path / "out"), dtype="float32")
    drafted = lm.generate("say 1", max_new_tokens=4, exit_layer=2, draft_length=2)
    assert drafted.tokens == lm.generate("say 1", max_new_tokens=4, mode="ar").tokens
