"""What a checkpoint says about its exits: the single key `layerskip` in its `config.json`."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from layerskip.checkpoint.configuration import read_configuration
from layerskip.checkpoint.files import inside, write_json
from layerskip.errors import UserError, hint_of, nearest
from layerskip.option import check_value, option, options_of
from layerskip.reading import read_json, reason

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor


POLICIES = ("fixed", "confidence", "adaptive")
MOST_DRAFTS = 31  # K at most: 32 positions in one pass, and a bound of what a request may ask


@dataclass(frozen=True)
class Facts:
    """Our entry in a checkpoint's configuration; an absent entry means untrained exits."""

    exits: tuple[int, ...] = option((), "Exit layers that were trained.")
    exit_layer: int | None = option(None, "E, layers that draft; 0: an adapter reads the embedding.", least=0)
    draft_length: int | None = option(None, "K, tokens drafted per round.", least=0, most=MOST_DRAFTS)
    draft_vocab: str | None = option(
        None, "File beside config.json: a JSON list of ids by falling frequency."
    )
    draft_head: str | None = option(
        None, "File beside config.json: the draft head's own rows, [draft vocabulary, D] in its order."
    )
    exit_adapter: str | None = option(
        None, "File beside config.json: the adapter between the exit and the draft head (.safetensors)."
    )
    draft_vocab_size: int | None = option(
        None,
        "How many of the draft vocabulary's first ids to use, without one of the lowest; 0: none.",
        least=0,
    )
    mode: str | None = option(  # None: see `pays`
        None, "The default way of decoding, as measured.", choices=("ar", "self-speculative")
    )
    policy: str | None = option(
        None, "Who chooses E and K each round: fixed, confidence or adaptive.", choices=POLICIES
    )
    drafter: str | None = option(
        None,
        "Where drafts come from: the exit, lookup in the text so far, auto (both where the exit pays), or off.",
        choices=("auto", "exit", "lookup", "off"),
    )
    match_min: int | None = option(None, "Copy behind matches of at least so many tokens.", least=1, most=32)
    copy_length: int | None = option(None, "Copy so many tokens a round at most.", least=1, most=MOST_DRAFTS)
    confidence: float | None = option(
        None, "Stop drafting where the exit's largest probability is below this.", least=0, most=1
    )
    recipe: str | None = option(None, "The recipe it was trained by.")
    versions: dict[str, str] | None = option(None, "Versions of the libraries that trained it.")

    @property
    def trained(self) -> bool:
        return bool(self.exits)

    def owns_head(self, exit_layer: int) -> bool:
        """Whether drafts of this exit go through rows or an adapter of its own; such an exit is trained alone."""
        return (self.draft_head or self.exit_adapter) is not None and self.exits == (exit_layer,)

    @property
    def first_exit(self) -> int:
        """The lowest exit layer there is: 0, the embedding, where an adapter was trained to read it."""
        return 0 if self.owns_head(0) else 1

    @property
    def pays(self) -> bool:
        """Whether drafting is the default: as measured, else with trained exits one of which is the default.

        Trained exits without a default one were predicted to be slower.
        """
        if self.mode is not None:
            return self.mode != "ar"
        return self.trained and self.exit_layer is not None


# Checkpoints published by the method's authors carry no entry of ours; settings from the paper's tables.
_PUBLISHED = {
    "layerskip-llama2-7b": Facts(exits=(8,), exit_layer=8, draft_length=12),
    "layerskip-llama2-13b": Facts(exits=(7, 15), exit_layer=7, draft_length=4),
}


def facts_of(config: Any, name: str = "") -> Facts:
    """Read the entry from a Hugging Face config object; fall back to the table of published checkpoints.

    Raises: UserError for keys or values we do not know.
    """
    entry = getattr(config, "layerskip", None)
    if entry is None:
        last = str(name or getattr(config, "_name_or_path", "")).rstrip("/").rsplit("/", 1)[-1].lower()
        return _PUBLISHED.get(last, Facts())
    known = {field.name for field in fields(Facts)}
    if not isinstance(entry, dict):
        raise UserError(f"config.json: layerskip is {entry!r}, not an object of " + ", ".join(sorted(known)))
    for key in entry:
        if key not in known:
            raise UserError(f"config.json: unknown key layerskip.{key}", nearest(key, known))
    layers, least = config.get_text_config().num_hidden_layers, 0 if entry.get("exit_adapter") else 1
    exits, default = entry.get("exits") or [], entry.get("exit_layer")
    for exit_layer in [
        *(exits if isinstance(exits, list) else [exits]),
        *([] if default is None else [default]),
    ]:
        if type(exit_layer) is not int or not least <= exit_layer < layers:
            raise UserError(
                f"config.json: layerskip names exit {exit_layer!r}, the model has {layers} layers",
                f"exits are whole numbers from {least} to {layers - 1}; exits is a list of them",
            )
    for key, (kind, _, told) in options_of(Facts).items():
        if key in entry and key != "exits":
            check_value(f"config.json: layerskip.{key}", kind, told, entry[key])
    return Facts(**{**entry, "exits": tuple(exits if isinstance(exits, list) else [exits])})


def ranked_vocabulary(path: Path | None, facts: Facts) -> list[int] | None:
    """Read the checkpoint's draft vocabulary, ids by falling frequency; None when it has none.

    The whole list: how much of it drafting uses by default is `Facts.draft_vocab_size`.

    Raises: UserError for a file that is missing or no list of token ids.
    """
    if path is None or facts.draft_vocab is None:
        return None
    again = "layerskip draft-vocab writes a new one, or use --draft-vocab off"
    file = inside(path, facts.draft_vocab)
    ranked: list[int] = read_json(file, list, again)
    strange = [token for token in ranked if type(token) is not int or not 0 <= token < 2**31]
    if strange or not ranked:
        told = f"has {str(strange[0])[:80]!r}" if strange else "is empty"
        raise UserError(f"{file} {told}: it is a JSON list of token ids", again)
    if len({*ranked}) < len(ranked):
        raise UserError(f"{file} names a token twice", again)
    return ranked


def draft_rows(path: Path | None, facts: Facts) -> Tensor | None:
    """Read the draft head's own rows, [draft vocabulary, D]; None where it shares those of the head.

    Raises: UserError for what is no such matrix of finite numbers.
    """
    if path is None or facts.draft_head is None:
        return None
    again = "copy or download the folder again"
    file = inside(path, facts.draft_head)
    weight = _tensors(file, "draft head").get("weight")
    if weight is None:
        raise UserError(f"cannot read the draft head {file}: it has no `weight`", again)
    if weight.dim() != 2 or not weight.is_floating_point():
        shape = f"{list(weight.shape)} of {weight.dtype}"
        raise UserError(f"{file} holds {shape}: a draft head is [draft vocabulary, width] of floats", again)
    if not weight.isfinite().all():
        raise UserError(f"{file} has values that are not finite", again)
    ranked = ranked_vocabulary(path, facts)
    if ranked is not None and len(ranked) != len(weight):
        raise UserError(
            f"{file} has {len(weight)} rows for a draft vocabulary of {len(ranked)} tokens", again
        )
    return weight


def adapter_weights(path: Path | None, facts: Facts) -> dict[str, Tensor] | None:
    """Read the exit adapter, see `model/adapter.py`; None where a checkpoint has none. Raises: UserError."""
    if path is None or facts.exit_adapter is None:
        return None
    return _tensors(inside(path, facts.exit_adapter), "exit adapter")


def _tensors(file: Path, what: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Tensor] = load_file(file)
        return found
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"cannot read the {what} {file}: {reason(error)}", "copy or download the folder again"
        ) from error


def write_draft_head(folder: Path, ids: Sequence[int], weight: Tensor | None) -> dict[str, str]:
    """Put a draft vocabulary, by falling frequency, and any rows of its own, [ids, D], into a folder; name both."""
    from safetensors.torch import save_file

    write_json(folder / "draft_vocab.json", list(ids))
    named = {"draft_vocab": "draft_vocab.json"}
    if weight is not None:
        save_file({"weight": weight.contiguous()}, folder / "draft_head.safetensors")
        named["draft_head"] = "draft_head.safetensors"
    return named


def write_adapter(folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, str]:
    """Put an exit adapter into a folder, in the dtype of the model, and name it."""
    from safetensors.torch import save_file

    save_file(
        {n: w.detach().to("cpu", dtype).contiguous() for n, w in weights.items()},
        folder / "exit_adapter.safetensors",
    )
    return {"exit_adapter": "exit_adapter.safetensors"}


def fingerprint(folder: Path | None, *kinds: str) -> str:
    """Tell files of a checkpoint apart by parts of them, by default its weights: training on keeps their names."""
    digest = hashlib.sha256()
    files = (
        () if folder is None else (file for kind in kinds or ("*.safetensors",) for file in folder.glob(kind))
    )
    for file in sorted(files):
        with file.open("rb") as content:
            size = content.seek(0, 2)
            for place in range(0, size, max(1, size // 64)):
                content.seek(place)
                digest.update(content.read(4096))
    return digest.hexdigest()[:16]


def write_draft_vocabulary(folder: Path, ids: Sequence[int], facts: Facts) -> Path:
    """Put `draft_vocab.json` into a checkpoint and name it in `config.json`; see `write_entry`.

    The list is replaced before the configuration that names it.
    Raises: UserError where the draft head has rows of its own, which belong to its list.
    """
    if facts.draft_head is not None:
        raise UserError(
            f"the draft head of {folder} was trained for the vocabulary it has",
            "--draft-vocab N uses a part of it",
        )
    file = folder / "draft_vocab.json"
    with _writing(folder):
        write_json(file, list(ids))
    write_entry(folder, facts, draft_vocab=file.name, draft_vocab_size=None)
    return file


def write_entry(folder: Path, facts: Facts, **changes: Any) -> None:
    """Change keys of our entry in a checkpoint's `config.json`; None removes one, every other key stays.

    `facts` are those the checkpoint is known by: a published one gets an entry only now, which must not hide
    its default exit. The file is replaced whole. Raises: UserError when the folder cannot be written.
    """
    with _writing(folder):
        config = read_configuration(folder / "config.json")
        known = {
            "exits": list(facts.exits),
            "exit_layer": facts.exit_layer,
            "draft_length": facts.draft_length,
        }
        entry = config.get("layerskip") or {key: value for key, value in known.items() if value}
        merged = {**entry, **changes}
        config["layerskip"] = {key: value for key, value in merged.items() if value is not None}
        write_json(folder / "config.json", config, indent=2)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write into {folder}: {error}", hint_of(error, "use a copy that is writable")
        ) from error


def entry(facts: Facts) -> dict[str, Any]:
    """Word the facts as the `layerskip` key of config.json."""
    told: dict[str, Any] = {
        "exits": list(facts.exits),
        "exit_layer": facts.exit_layer,
        "draft_length": facts.draft_length,
        "recipe": facts.recipe,
        "versions": {name: version(name) for name in ("layerskip", "torch", "transformers")},
    }
    return {key: value for key, value in told.items() if value is not None}
