"""Whatever ends a run, the next one goes on exactly: kills, interrupts and full disks."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

import training
import training_kills
from conftest import FULL
from layerskip.checkpoint.facts import Facts, facts_of
from layerskip.errors import UserError
from layerskip.train import checkpoints

QUICK = "in_weights"  # the one that leaves a checkpoint half written
MOMENTS = [
    pytest.param(name, marks=() if name == QUICK else pytest.mark.slow)
    for name in (moment.__name__ for moment in training_kills.MOMENTS)
]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    run = training_kills.run(tmp_path_factory.mktemp("straight"))
    run.train()
    return run


def resumed(folder):
    """A new trainer, on a model with other weights, that goes on from the newest checkpoint."""
    run = training_kills.run(folder, start=training.model(seed=1))
    run.train(resume_from_checkpoint=True)
    return run


def same(run, straight):
    assert run.state.global_step == 6
    assert training.difference(training.weights(run), training.weights(straight)) == 0.0
    assert training.losses(run, "exit_2_loss") == training.losses(straight, "exit_2_loss")
    assert training.losses(run, "tokens") == training.losses(straight, "tokens")


def killed(folder):
    moments = [moment.__name__ for moment in training_kills.MOMENTS] if FULL else [QUICK]
    command, environment = training.in_tests(training.TESTS / "training_kills.py", folder, *moments)
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True, timeout=300)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_resumes_exactly(tmp_path_factory, straight, moment):
    folder = training.once(tmp_path_factory, "kills", killed) / moment
    assert sorted(path.name for path in folder.glob("check*")) == ["checkpoint-2"]
    assert (folder / checkpoints.STAGING).exists() == (moment != "in_step")
    same(resumed(folder), straight)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


class Signals(TrainerCallback):
    """Send a signal between the two micro-batches of a step."""

    def __init__(self, number, step=2):
        self.number, self.step = number, step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


class SignalsAtStart(Signals):
    def on_step_begin(self, args, state, control, **kwargs):
        super().on_substep_end(args, state, control)

    on_substep_end = TrainerCallback.on_substep_end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_finishes_the_step_saves_and_stops(tmp_path, straight, number):
    before = signal.getsignal(number)
    run = training_kills.run(tmp_path, callbacks=[Signals(number)])
    run.train()
    assert run.interrupted
    assert run.state.global_step == 3
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoint-3"
    assert signal.getsignal(number) == before
    same(resumed(tmp_path), straight)


def test_what_the_trainer_saves_tells_its_exits_and_of_a_plain_run_nothing(tmp_path):
    run = training_kills.run(
        tmp_path / "exits", logging_steps=50, exits=[2, 3], curriculum="all", max_steps=2
    )
    run.train()
    run.save_model(str(tmp_path / "model"))
    for folder in (checkpoints.latest(tmp_path / "exits"), tmp_path / "model"):
        facts = facts_of(AutoConfig.from_pretrained(folder))
        assert (facts.exits, facts.exit_layer) == ((2, 3), None)
        assert "layerskip" in facts.versions
    [last] = [line["step"] for line in run.state.log_history if "exit_2_loss" in line]
    assert last == 2, "the last step is always reported"
    assert not run.args.dataloader_pin_memory, "no accelerator, torch would warn"
    training_kills.run(tmp_path / "plain", e_scale=0.0, p_max=0.0, max_steps=2).train()
    assert facts_of(AutoConfig.from_pretrained(checkpoints.latest(tmp_path / "plain"))) == Facts()


def test_an_interrupt_where_an_epoch_ends_saves_once_and_resumes(tmp_path, straight):
    """The epoch's own save replaces the checkpoint of the same step."""
    run = training_kills.run(tmp_path, callbacks=[SignalsAtStart(signal.SIGINT, 4)], save_strategy="epoch")
    run.train()
    assert (run.interrupted, run.state.global_step) == (True, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    same(resumed(tmp_path), straight)


def test_a_second_signal_acts_as_usual(tmp_path):
    run = training_kills.run(
        tmp_path, callbacks=[Signals(signal.SIGINT, 1), Signals(signal.SIGINT, 1)], save_strategy="no"
    )
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Fails(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise UserError("enough")


def test_signals_act_as_usual_after_a_run_that_failed(tmp_path):
    """The first Ctrl-C after a loss that was not finite used to do nothing."""
    with pytest.raises(UserError):
        training_kills.run(tmp_path, callbacks=[Fails()]).train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signals_act_as_usual_after_a_run_that_began_twice(tmp_path):
    """As one with `auto_find_batch_size` does; the handler to go back to was then our own."""
    run = training_kills.run(tmp_path)
    for _ in range(2):
        run.callback_handler.on_train_begin(run.args, run.state, run.control)
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    run.callback_handler.on_train_end(run.args, run.state, run.control)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Fills(TrainerCallback):
    """Let no file grow past a size from step 3 on, so that torch and safetensors fail for real."""

    def __init__(self, limit):
        self.limit = limit

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (self.limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
            )


@pytest.mark.parametrize("limit", [50_000, 300_000], ids=["weights", "optimizer"])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, straight, limit):
    """torch raises a RuntimeError for it and safetensors an error of its own: both ended in a traceback."""
    size = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError, match="cannot save a checkpoint") as error:
            training_kills.run(tmp_path, callbacks=[Fills(limit)]).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, size)
    assert "free space" in error.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    same(resumed(tmp_path), straight)


@pytest.mark.parametrize("name", ["model", "optimizer", "state", "flush"])
def test_no_space_left_is_the_users_to_fix(tmp_path, monkeypatch, name):
    run = training_kills.run(tmp_path, max_steps=4)
    run.train()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {
        "model": (run, "save_model"),
        "optimizer": (run, "_save_optimizer_and_scheduler"),
        "state": (run.state, "save_to_json"),
        "flush": (checkpoints, "_flush"),
    }[name]
    monkeypatch.setattr(*target, full)
    (tmp_path / "checkpoint-4").rename(tmp_path / "kept")
    with pytest.raises(UserError, match="No space left"):
        run._save_checkpoint(run.model, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "kept"]
    monkeypatch.undo()
    (tmp_path / checkpoints.STAGING / "checkpoint-3").mkdir(parents=True)  # as a kill leaves it
    run._save_checkpoint(run.model, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4", "kept"]


def test_other_errors_of_saving_stay_what_they_are(tmp_path, monkeypatch):
    run = training_kills.run(tmp_path, max_steps=2)

    def broken(*args, **kwargs):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(run, "_save_optimizer_and_scheduler", broken)
    with pytest.raises(RuntimeError, match="a mistake"):
        run.train()


def test_a_checkpoint_caught_while_being_replaced_is_given_back(tmp_path, monkeypatch):
    """A kill between the two renames hid the only checkpoint of its step, and the next save deleted it."""
    final, written = tmp_path / "checkpoint-2", tmp_path / checkpoints.STAGING / "checkpoint-2"
    for folder, content in ((final, "old"), (written, "new")):
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(content)
    rename = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda self, to: exit() if self == written else rename(self, to))
        with pytest.raises(SystemExit):
            checkpoints.publish(written, final)
    assert not final.exists()
    assert checkpoints.latest(tmp_path) == final
    assert (final / "trainer_state.json").read_text() == "old"
    assert list(checkpoints.clear_staging(tmp_path).iterdir()) == []
    shutil.copytree(final, written)
    checkpoints.publish(written, final)
    assert [path.name for path in tmp_path.iterdir() if any(path.iterdir())] == ["checkpoint-2"]


def test_resuming_loads_no_code(tmp_path, monkeypatch):
    training_kills.run(tmp_path, max_steps=2).train()
    loaded, load = {}, torch.load

    def watched(path, *args, **kwargs):
        loaded[Path(path).name] = kwargs.get("weights_only")
        return load(path, *args, **kwargs)

    monkeypatch.setattr(torch, "load", watched)
    resumed(tmp_path)
    assert loaded == {"optimizer.pt": True, "scheduler.pt": True, "rng_state.pth": True}


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 1,
    "metric_for_best_model": "eval_exit_2_loss",
    "greater_is_better": True,  # of a loss that falls: an early step is the best
    "learning_rate": 0.1,
}


@pytest.mark.parametrize("limit", [1, 2])
def test_the_best_checkpoint_and_the_last_survive_their_limit_and_a_restart(tmp_path, limit):
    """With a limit of one Trainer deletes, where training ends, all but the best: also after an interrupt."""
    settings = {**BEST, "save_total_limit": limit, "eval_dataset": training.counting(8, seed=1)}
    run = training_kills.run(tmp_path, callbacks=[Signals(signal.SIGINT, 3)], **settings)
    run.train()
    assert run.interrupted
    assert run.state.best_global_step < 4
    best = tmp_path / f"checkpoint-{run.state.best_global_step}"
    assert sorted(tmp_path.iterdir()) == [best, tmp_path / "checkpoint-4"]
    for folder in tmp_path.iterdir():
        state = json.loads((folder / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(best)
        AutoModelForCausalLM.from_pretrained(folder)
    again = training_kills.run(tmp_path, **settings, start=training.model(seed=1))
    again.train(resume_from_checkpoint=True)
    assert again.state.best_model_checkpoint == str(best)
    assert sorted(tmp_path.iterdir()) == [best, tmp_path / "checkpoint-6"][:limit]


def test_a_moved_run_finds_its_best_checkpoint(tmp_path):
    """Its state names it by the old path, and Trainer forgets what is not there."""
    settings = {**BEST, "save_total_limit": 2, "eval_dataset": training.counting(8, seed=1)}
    run = training_kills.run(tmp_path / "old", callbacks=[Signals(signal.SIGINT, 3)], **settings)
    run.train()
    (tmp_path / "old").rename(tmp_path / "new")
    again = training_kills.run(tmp_path / "new", **settings, start=training.model(seed=1))
    again.train(resume_from_checkpoint=True)
    name = f"checkpoint-{run.state.best_global_step}"
    assert again.state.best_model_checkpoint == str(tmp_path / "new" / name)


def test_tokens_between_a_log_and_a_checkpoint_are_counted(tmp_path):
    run = training_kills.run(tmp_path, logging_steps=3)
    run.train()
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    again = training_kills.run(tmp_path, logging_steps=3)
    again.train(resume_from_checkpoint=True)
    for one in (run, again):
        assert [e["tokens"] for e in one.state.log_history if "loss" in e] == [288, 528]


def test_resuming_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        resumed(tmp_path)
