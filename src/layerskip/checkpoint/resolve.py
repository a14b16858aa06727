"""Where checkpoints come from: a folder, a hub id, or the name of a built-in model.

`resolve("smollm2-135m")`, `resolve("org/name")` and `resolve("./folder")` all return a plain Hugging Face
folder: config.json, safetensors weights, tokenizer. Pickled weights are neither read nor downloaded.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from layerskip.checkpoint.builtin import finished, make
from layerskip.checkpoint.catalogue import BUILTINS, Builtin, shipped
from layerskip.checkpoint.configuration import check_ids, read_configuration
from layerskip.checkpoint.contents import named_parts
from layerskip.checkpoint.files import cache_folder, check_regular
from layerskip.checkpoint.weights import check_weights, shards_of
from layerskip.errors import UserError, nearest
from layerskip.reading import named_path, read_json, reason

__all__ = ["Builtin", "builtins", "cache_folder", "cached", "check_folder", "resolve"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
UNWANTED = ("*/*", "consolidated*.safetensors")
"""Other formats of the same weights: subfolders such as onnx/ and original/, Mistral's own layout."""
_SAVED = "name the folder that `save_pretrained` wrote, which has config.json and *.safetensors"
_CONVERT = {
    ".gguf": "layerskip reads no GGUF: convert with AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)"
    ".save_pretrained(new_folder), and its tokenizer likewise"
}


def resolve(name: str, *, progress: bool = True) -> Path:
    """Return the checkpoint folder that `name` stands for, getting it first if need be.

    A built-in name is downloaded and rebuilt once into `cache_folder()`; `org/name` goes through
    huggingface_hub and its cache; anything that is a folder here is used as it is.

    Raises: UserError when it cannot be had, or is not a safetensors checkpoint.
    """
    for builtin in builtins():
        if name == builtin.name:
            return make(builtin, cache_folder(), progress=progress)
    folder = named_path(name)
    if folder.is_dir():
        check_folder(folder)
        return folder
    if folder.is_file():
        raise UserError(f"{folder} is a file; a model is a folder", _CONVERT.get(folder.suffix, _SAVED))
    if HUB_ID.fullmatch(name) and not folder.exists():
        return _from_hub(name, progress)
    raise UserError(
        f"no model {name!r}: not a built-in name, a folder here, or a hub id of the form org/name",
        nearest(name, (builtin.name for builtin in builtins())),
    )


def check_folder(path: Path) -> None:
    """Refuse a folder that is not a whole safetensors checkpoint, saying what is missing.

    Raises: UserError.
    """
    try:
        files = sorted(path.iterdir())
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {reason(error)}", "copy or download the folder again"
        ) from error
    if not (path / "config.json").exists():
        gguf = next((_CONVERT[".gguf"] for file in files if file.suffix == ".gguf"), None)
        raise UserError(f"{path} is not a checkpoint: it has no config.json", gguf or _SAVED)
    read_configuration(path / "config.json")
    for file in files:
        if any(file.match(pattern) for pattern in WANTED):  # transformers opens these unasked
            check_regular(file)
        if file.suffix == ".safetensors":
            check_weights(file)
    if (path / "generation_config.json").exists():
        generation = read_json(path / "generation_config.json", dict)
        check_ids(generation.get("eos_token_id") or [], f"{path / 'generation_config.json'}: eos_token_id")
    if all(file.stem == "draft_head" for file in path.glob("*.safetensors")):
        pickles = [file.name for file in files if file.suffix in PICKLES]
        found = f"only pickled weights ({', '.join(pickles)})" if pickles else "no *.safetensors weights"
        raise UserError(
            f"{path} has {found}; a pickle can run code when it is read, so only safetensors are",
            "convert where you trust the file: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder)",
        )
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = shards_of(index)
        if missing := [shard for shard in shards if not (path / shard).exists()]:
            raise UserError(
                f"{path} lacks {len(missing)} of {len(shards)} weight files: {', '.join(missing[:3])}",
                "copy or download the folder again",
            )


def builtins() -> list[Builtin]:
    """List the models that `resolve` knows by a name of their own; where a delta lacks, with what its base is."""
    described = {one.name: one.description for one in BUILTINS}
    return [replace(one, description=described[shipped(one).name]) for one in BUILTINS]


def cached(name: str) -> Path | None:
    """Find the folder of a built-in model that is ready to use, without making it."""
    return next((finished(builtin, cache_folder()) for builtin in builtins() if builtin.name == name), None)


def at_hand(name: str) -> Path | None:
    """Find the folder that `name` stands for where nothing need be downloaded or made."""
    folder = named_path(name)
    return cached(name) or (folder if folder.is_dir() else None)


def folder_of(hf: Any) -> Path | None:
    """Find the folder a model in memory was loaded from; None where it is gone, or there never was one.

    Of a hub's, only the files that its `layerskip` entry names are fetched, where they are not in the cache yet;
    none where the model has learnt an adapter since. Raises: UserError where they cannot be had.
    """
    name = str(getattr(hf, "name_or_path", None) or "")
    if name and (Path(name) / "config.json").is_file():
        return Path(name)
    files = named_parts(getattr(hf.config, "layerskip", None))
    revision = getattr(hf.config, "_commit_hash", None)  # only what came from a hub has one
    learnt = getattr(hf, "exit_adapter", None) is not None
    if learnt or not (files and revision and HUB_ID.fullmatch(name)):
        return None
    from huggingface_hub import hf_hub_download

    try:
        found = [hf_hub_download(name, file, revision=revision) for file in ["config.json", *files]]
    except Exception as error:  # whatever the hub, its library or the network say
        raise UserError(
            f"cannot get {', '.join(files)} of {name}: {reason(error)}",
            "connect once and they stay in the cache, or load a folder that has them",
        ) from error
    return Path(found[0]).parent


def _from_hub(name: str, progress: bool) -> Path:
    """Download `org/name` into huggingface_hub's cache, or find it there when offline."""
    from huggingface_hub import snapshot_download, utils
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # of httpx or httpx2, whichever this version speaks through
        RepositoryNotFoundError,
    )

    login = "`hf auth login`, or set HF_TOKEN"
    silence = not progress and not utils.are_progress_bars_disabled()
    if silence:
        utils.disable_progress_bars()
    try:
        folder = snapshot_download(name, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED))
    except GatedRepoError as error:
        raise UserError(
            f"{name} is gated: its owner wants its terms accepted first",
            f"accept them on its page, then {login}",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"no model {name!r} on the hub that this machine may read, and no such folder here",
            f"check the spelling; if it is private: {login}",
        ) from error
    except (OSError, HTTPError) as error:
        why = "the hub answered with an error" if isinstance(error, HfHubHTTPError) else "no connection"
        first_line = f"{error}\n".splitlines()[0][:200] or type(error).__name__
        raise UserError(
            f"cannot download {name}: {why} ({first_line})",
            "connect once and it stays in the cache; offline, name a checkpoint folder; or set HF_ENDPOINT "
            "to a mirror",
        ) from error
    finally:
        if silence:
            utils.enable_progress_bars()
    check_folder(Path(folder))
    return Path(folder)
