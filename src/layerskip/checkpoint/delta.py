"""Trained weights as a small file over a base: what training changed, at low rank and in few bits.

    report = make_delta(base, tuned, Path("my-model.safetensors"), 24_000_000, {"licence": "Apache-2.0"})
    apply_delta(base, Path("my-model.safetensors"), output)

Of D = tuned - base a vector is stored whole and a matrix as `lowrank` packs it. The ranks of all matrices are
chosen together: singular directions go in by squared singular value per byte until the budget is used up. A
parameter that training left alone is not in the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.checkpoint import lowrank
from layerskip.checkpoint.catalogue import SOURCE_FILE
from layerskip.checkpoint.configuration import read_configuration
from layerskip.checkpoint.weights import shards_of
from layerskip.errors import UserError, hint_of
from layerskip.reading import parsed, read_json
from layerskip.watch import Watch, silent

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

FORMAT = 1
KEY = "layerskip_delta"  # one entry of metadata: safetensors writes several in random order
VOCAB = "draft_vocab"
HEAD = "draft_head"
ADAPTER = "exit_adapter"
NUM_VOCAB = 16_384
PINS = ("file_sha256", "rebuild", "base_file_sha256", "delta_sha256")
"""What tells built-in models apart in their source file."""

OTHERWISE = {"layerskip", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "use_cache"}
"""Keys of config.json that training may change without making another model of it."""

HEADER_BYTES = 100  # at most, of a tensor's entry in the header, its name apart
NUM_PARTS = 6  # at most, of a matrix


def make_delta(
    base: Path, tuned: Path, file: Path, budget_bytes: int, about: Mapping[str, Any], watch: Watch = silent
) -> dict[str, Any]:
    """Write what makes `tuned` of `base` into a file of at most `budget_bytes`; report what of it was kept.

    `about` travels along as JSON, beside the `layerskip` entry and the draft vocabulary of `tuned`; its `base`
    names the base, by default its folder does. The same folders give the same bytes. `kept` is the share of the
    squared norm of D that the file restores, rounding included.

    Raises: UserError where the two are not one model before and after training, or the budget holds nothing.
    """
    import torch

    stored, found = _stored(base), _stored(tuned)
    _check_pair(base, tuned, stored, found)
    entry, ranked, own, adapter = _facts(tuned)
    record = {"licence": _source(base).get("licence"), **about, "layerskip": entry}
    head = {"format": FORMAT, "base": record.pop("base", base.name), "pin": pin(base), "about": record}

    def change(name: str) -> Tensor:
        difference = _read(found[name][0], name) - _read(stored[name][0], name)
        if not difference.isfinite().all():
            raise UserError(f"{name} in {tuned} has values that are not finite", "take an earlier checkpoint")
        return difference if difference.dim() < 2 else difference.flatten(1)

    tensors, energy, spectra, shapes = {}, {}, {}, {}
    for number, name in enumerate(sorted(stored)):
        watch("reading what training changed", number, len(stored))
        if not (changed := change(name)).any():
            continue
        energy[name] = float(changed.double().square().sum())
        if changed.dim() < 2:
            tensors[name] = changed
        else:
            spectra[name], shapes[name] = lowrank.directions(changed)[0], (changed.shape[0], changed.shape[1])
    if own is not None:
        whole, scale = lowrank.rounded(own.float(), 8)
        tensors |= {f"{HEAD}:whole": whole, f"{HEAD}:scale": scale}
    tensors |= {f"{ADAPTER}:{name}": weight for name, weight in adapter.items()}
    if ranked:
        tensors[VOCAB] = torch.tensor(ranked, dtype=torch.int32)
    fixed = len(json.dumps(json.dumps(head))) + 200 + sum(tensor.nbytes for tensor in tensors.values())
    fixed += sum(HEADER_BYTES + len(name) for name in tensors)
    fixed += NUM_PARTS * sum(HEADER_BYTES + len(name) for name in spectra)
    if fixed > budget_bytes:
        raise UserError(
            f"a delta of {budget_bytes / 1e6:.2f} MB has no room for matrices",
            f"vectors, draft vocabulary and facts alone take {fixed / 1e6:.2f} MB",
        )
    kept = lowrank.chosen(spectra, shapes, budget_bytes - fixed)

    lost = {name: energy[name] for name in spectra}
    for number, name in enumerate(kept):
        watch("packing it", number, len(kept))
        if kept[name].rank:
            changed = change(name)
            parts = lowrank.packed(changed, kept[name])
            tensors |= {f"{name}:{part}": tensor for part, tensor in parts.items()}
            lost[name] = sum(
                float((changed[span].double() - lowrank.rows(parts, span, changed.shape[1])).square().sum())
                for span in lowrank.spans(len(changed))
            )
    _write(file, head, tensors)
    size = file.stat().st_size
    assert size <= budget_bytes, "the header is longer than it was taken for"
    ranks = {name: kept[name].rank for name in kept if f"{name}:whole" not in tensors}
    return {
        "file": file.name,
        "bytes": size,
        "budget_bytes": budget_bytes,
        "draft_vocab": len(ranked),
        "kept": 1 - sum(lost.values()) / sum(energy.values()) if energy else 1.0,
        "kinds": _summary(energy, lost, ranks, tensors, r"\.\d+\.", ".*."),
        "layers": _summary(energy, lost, ranks, tensors, r".*?\.(\d+)\..*", r"layer \1"),
    }


def apply_delta(base: Path, file: Path, output: Path) -> dict[str, Any]:
    """Write the model that a delta makes of its base into `output`, a plain Hugging Face folder.

    Returns what the delta tells about itself. The weights have the base's files and dtypes; sums are made in
    float64, so that the bytes are the same each time. All other files are the base's, except the `layerskip`
    entry of config.json and draft_vocab.json.

    Raises: UserError for another base, another format, a damaged file.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    from layerskip.checkpoint.files import write_json

    head, tensors = read_delta(file)
    if pin(base) != head["pin"]:
        raise UserError(
            f"the delta {file.name} was made for {head['base']} ({_pinned(head['pin'])}); "
            f"{base.name} is another model, or made in another way ({_pinned(pin(base))})",
            "a delta fits the very weights it was made from: take that base, or a newer layerskip",
        )
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        name, _, part = key.partition(":")
        parts[name][part] = tensor
    ranked, own, adapter = (parts.pop(name, None) for name in (VOCAB, HEAD, ADAPTER))
    output.mkdir(parents=True, exist_ok=True)
    mode = (base / "config.json").stat().st_mode
    try:
        for weights in _weight_files(base):
            with safe_open(weights, "pt") as opened:
                metadata = opened.metadata()
                merged = {name: _merged(opened.get_tensor(name), parts.get(name)) for name in opened.keys()}  # noqa: SIM118
            save_file(merged, output / weights.name, metadata=metadata)
            (output / weights.name).chmod(mode)  # safetensors writes them readable by the owner alone
    except SafetensorError as error:
        raise UserError(f"cannot write the weights of {output}: {error}", "is the disk full?") from error
    for other in base.iterdir():
        if (
            other.is_file()
            and other.suffix != ".safetensors"
            and other.name not in ("config.json", SOURCE_FILE)
        ):
            (output / other.name).write_bytes(other.read_bytes())
    config = read_configuration(base / "config.json")
    config.pop("layerskip", None)
    if entry := head["about"]["layerskip"]:
        config["layerskip"] = entry
    beside = {} if adapter is None else {ADAPTER: dict(adapter)}
    if own is not None:
        beside[HEAD] = {"weight": lowrank.rows(own, slice(None), own["whole"].shape[1]).float()}
    for name, own_weights in beside.items():
        save_file(own_weights, output / f"{name}.safetensors")
        (output / f"{name}.safetensors").chmod(mode)
    if ranked is not None:
        write_json(output / f"{VOCAB}.json", ranked[""].tolist())
    write_json(output / "config.json", config, indent=2)
    return head


def read_delta(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a delta: what it says about itself, and its tensors. Raises: UserError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            head = parsed((opened.metadata() or {}).get(KEY, "null"), str(file), "install or copy it again")
            if head is None:
                raise UserError(f"{file} is not a delta", "layerskip pack-delta makes one")
            if head["format"] != FORMAT:
                raise UserError(
                    f"{file} is a delta of format {head['format']}, this layerskip reads {FORMAT}",
                    "use the layerskip it was made with, or make it again",
                )
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        whole = head.pop("sha256") == _digest(head, tensors)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error}") from error
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {error}", "install or copy it again") from error
    if not whole:
        raise UserError(f"{file} is damaged: its bytes are not those written", "install or copy it again")
    return head, tensors


def pin(base: Path) -> dict[str, Any]:
    """Tell a base from all others: a built-in one by the files it is made of, any other by its weights."""
    if pinned := {key: value for key, value in _source(base).items() if key in PINS}:
        return pinned
    digest = hashlib.sha256()
    for file in _weight_files(base):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return {"weights_sha256": digest.hexdigest()}


# -- folders and files ---------------------------------------------------------------------------------------


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in shards_of(index)]
    return sorted(file for file in folder.glob("*.safetensors") if file.stem not in (HEAD, ADAPTER))


def _stored(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Find every parameter's file and shape."""
    from safetensors import SafetensorError, safe_open

    found = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    found[name] = file, tuple(opened.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {file}: {error}", "copy or download the folder again") from error
    return found


def _read(file: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
        return tensor.float()


def _json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_json(file, dict)
    return content


def _source(folder: Path) -> dict[str, Any]:
    return _json(folder / SOURCE_FILE) if (folder / SOURCE_FILE).is_file() else {}


def _facts(tuned: Path) -> tuple[dict[str, Any], list[int], Tensor | None, dict[str, Tensor]]:
    """Read the `layerskip` entry, the draft vocabulary's first ids, the draft head's own rows and the adapter."""
    from layerskip.checkpoint.facts import Facts, adapter_weights, draft_rows, ranked_vocabulary

    entry = dict(_json(tuned / "config.json").get("layerskip") or {})
    named = Facts(draft_vocab=entry.get(VOCAB), draft_head=entry.get(HEAD), exit_adapter=entry.get(ADAPTER))
    adapter = adapter_weights(tuned, named) or {}
    ranked, rows = ranked_vocabulary(tuned, named) or [], draft_rows(tuned, named)
    if ranked:
        entry[VOCAB] = f"{VOCAB}.json"
    if rows is not None:
        entry[HEAD] = f"{HEAD}.safetensors"
    if adapter:
        entry[ADAPTER] = f"{ADAPTER}.safetensors"
    return entry, ranked[:NUM_VOCAB], rows, adapter


def _check_pair(base: Path, tuned: Path, stored: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse two folders of which one cannot have been trained from the other."""
    hint = "a delta is made of a model and of what training made of that very model"
    if alone := sorted(stored.keys() ^ found.keys()):
        raise UserError(
            f"{base} and {tuned} have other parameters: {len(alone)} stand in one only, {alone[0]} first",
            hint,
        )
    for name, (_, shape) in stored.items():
        if found[name][1] != shape:
            raise UserError(f"{name} is {list(shape)} in {base} and {list(found[name][1])} in {tuned}", hint)
    ours, theirs = _json(base / "config.json"), _json(tuned / "config.json")
    for key in sorted((ours.keys() & theirs.keys()) - OTHERWISE):
        if ours[key] != theirs[key]:
            raise UserError(
                f"config.json: {key} is {ours[key]!r} in {base}, {theirs[key]!r} in {tuned}", hint
            )
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja"):
        files = base / name, tuned / name
        if all(file.is_file() for file in files) and _vocabulary(files[0]) != _vocabulary(files[1]):
            raise UserError(f"{base} and {tuned} have other tokenizers: {name} differs", hint)


def _vocabulary(file: Path) -> Any:
    """Read what decides how a tokenizer cuts; its JSON also holds settings that calls leave behind."""
    if file.suffix != ".json":
        return file.read_bytes()
    content = _json(file)
    return {key: content.get(key) for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")}


def _merged(weight: Tensor, parts: Mapping[str, Tensor] | None) -> Tensor:
    if parts is None:
        return weight
    if "" in parts:
        return (weight.double() + parts[""]).to(weight.dtype)
    total = weight.flatten(1).clone()
    for span in lowrank.spans(len(total)):
        more = lowrank.rows(parts, span, total.shape[1])
        total[span] = (total[span].double() + more).to(weight.dtype)
    return total.view(weight.shape)


def _pinned(pinned: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {str(value)[:12]}" for key, value in pinned.items())


def _digest(head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    import torch

    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(file: Path, head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Replace the file as a whole."""
    from safetensors.torch import save

    from layerskip.checkpoint.files import write_bytes

    content = save(dict(tensors), {KEY: json.dumps({**head, "sha256": _digest(head, tensors)})})
    try:
        write_bytes(file, content)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error}", hint_of(error, "name a file elsewhere")) from error


def _summary(
    energy: Mapping[str, float],
    lost: Mapping[str, float],
    ranks: Mapping[str, int],
    tensors: Mapping[str, Tensor],
    pattern: str,
    instead: str,
) -> list[dict[str, Any]]:
    """Sum up parameters whose names become one when `pattern` is replaced; most of D first."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in energy:
        groups[re.sub(pattern, instead, name)].append(name)
    num_bytes: dict[str, int] = defaultdict(int)
    for key, tensor in tensors.items():
        num_bytes[key.partition(":")[0]] += tensor.nbytes
    rows = []
    for group, names in groups.items():
        of = sum(energy[name] for name in names)
        factored = [ranks[name] for name in names if name in ranks]
        rows.append(
            {
                "name": group,
                "parameters": len(names),
                "bytes": sum(num_bytes[name] for name in names),
                "mean_rank": sum(factored) / len(factored) if factored else None,
                "share": of / sum(energy.values()),
                "kept": 1 - sum(lost.get(name, 0.0) for name in names) / of,
            }
        )
    return sorted(rows, key=lambda row: -row["share"])
