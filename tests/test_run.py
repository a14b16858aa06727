"""What a run of a recipe refuses, writes down and takes up again, below the command line."""

import errno
import json

import pytest

from layerskip.errors import UserError
from layerskip.train import run as runs
from layerskip.train.recipe import read_recipe


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.jsonl"
    lines = ({"prompt": f"say {i % 5}", "completion": "abc " * (1 + i % 4)} for i in range(40))
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


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


# -- refused before any step ---------------------------------------------------------------------------------


def test_adapters_above_an_exit_are_refused_for_it_would_learn_nothing(refused):
    assert "exit 2 would learn nothing" in refused("lora.layers=[3, 5]")
