"""What a model can be exported to: one function a target, a row in `WRITERS`.

    report = export(Source(folder, "my-model"), "draft", output, Wanted(exit_layer=4))

Everything is written aside, opened again and compared; only then it gets its name.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from layerskip.checkpoint.configuration import num_layers_in
from layerskip.checkpoint.contents import checkpoint_files
from layerskip.checkpoint.facts import Facts, facts_of
from layerskip.checkpoint.files import write_text
from layerskip.decode.options import DEFAULT_DRAFT_LENGTH
from layerskip.errors import UserError, nearest
from layerskip.export.folders import carry, sizes, whole_folder
from layerskip.export.gguf import write_gguf
from layerskip.export.prefix import write_prefix

TYPE = "f16"  # of GGUF's matrices, unasked


class Source(NamedTuple):
    """A checkpoint's folder, and what its user calls it."""

    folder: Path
    name: str

    @property
    def short(self) -> str:
        return self.name.rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Wanted:
    """What a user may say of an export: the exit whose layers draft, and the type of GGUF's matrices."""

    exit_layer: int | None = None
    type: str | None = None


def export(source: Source, target: str, output: Path, wanted: Wanted) -> dict[str, Any]:
    """Write a target into a folder; tell its files, in bytes, the commands that use it and what to know.

    Raises: UserError where the model has no such thing, a wish does not fit the target, or something is there.
    """
    if target not in WRITERS:
        raise UserError(f"unknown target {target!r}", nearest(target, WRITERS))
    if wanted.exit_layer is not None and target in ("hf", "custom-generate"):
        raise UserError(f"the target {target} has no draft of its own", "leave out --exit-layer")
    if wanted.type is not None and target != "gguf":
        raise UserError(f"the target {target} keeps the weights as they are", "leave out --type")
    with whole_folder(output) as folder:
        told = WRITERS[target](source, folder, output, wanted)
        files = sizes(folder)
    return {"target": target, "output": str(output), "files": files} | told


def _hf(source: Source, folder: Path, output: Path, wanted: Wanted) -> dict[str, Any]:
    carry(checkpoint_files(source.folder), folder)
    return {"use": [f'layerskip generate {_path(output)} "..."'], "compared": "every file, byte for byte"}


def _draft(source: Source, folder: Path, output: Path, wanted: Wanted) -> dict[str, Any]:
    told = write_prefix(source.folder, wanted.exit_layer, folder)
    code = (
        f"draft = AutoModelForCausalLM.from_pretrained({str(output)!r})",
        "model.generate(**inputs, assistant_model=draft)",
    )
    return told | {"use": [*code], "compared": _as_exit(told["exit_layer"])}


def _gguf(source: Source, folder: Path, output: Path, wanted: Wanted) -> dict[str, Any]:
    kind = wanted.type or TYPE
    name = f"{source.short}-{kind}.gguf"
    write_gguf(source.folder, folder / name, kind, source.short)
    use = [f'llama-cli -m {_path(output / name)} -p "..."']
    told: dict[str, Any] = {"compared": "every parameter and the logits, read again by transformers"}
    prefix = folder / ".prefix"
    facts = _facts(source)
    exit_layer, note = _prefix(source, facts, wanted, prefix)
    if exit_layer is not None:
        small = f"{source.short}-first-{exit_layer}-{kind}.gguf"
        write_gguf(prefix, folder / small, kind, f"{source.short} first {exit_layer}")
        shutil.rmtree(prefix)
        count = facts.draft_length or DEFAULT_DRAFT_LENGTH
        models = f"-m {_path(output / name)} -md {_path(output / small)}"
        use.append(f'llama-speculative {models} --draft-max {count} -p "..."')
    return told | note | {"use": use}


def _vllm(source: Source, folder: Path, output: Path, wanted: Wanted) -> dict[str, Any]:
    (folder / "model").mkdir()
    carry(checkpoint_files(source.folder), folder / "model")
    facts = _facts(source)
    exit_layer, note = _prefix(source, facts, wanted, folder / "draft")
    count = facts.draft_length or DEFAULT_DRAFT_LENGTH
    how: dict[str, Any] = {"method": "ngram", "num_speculative_tokens": count, "prompt_lookup_max": 4}
    compared = "the model's files, byte for byte"
    if exit_layer is not None:
        how = {"method": "draft_model", "model": "draft", "num_speculative_tokens": count}
        compared += "; " + _as_exit(exit_layer)
    command = f"vllm serve model --speculative-config {shlex.quote(json.dumps(how))}"
    write_text(folder / "serve.sh", f'#!/bin/sh\ncd "$(dirname "$0")" && exec {command} "$@"\n')
    return {"use": [_path(output / "serve.sh")], "compared": compared, "serves": command} | note


def _custom_generate(source: Source, folder: Path, output: Path, wanted: Wanted) -> dict[str, Any]:
    carry(checkpoint_files(source.folder), folder)
    (folder / "custom_generate").mkdir()
    write_text(folder / "custom_generate" / "generate.py", GENERATE)
    write_text(folder / "custom_generate" / "requirements.txt", f"layerskip>={version('layerskip')}\n")
    code = f"model.generate(**inputs, custom_generate={str(output)!r}, trust_remote_code=True)"
    return {"use": [code], "compared": "the model's files, byte for byte"}


GENERATE = '''"""Decode with drafts of the model itself: `pip install layerskip`.

    model.generate(**inputs, custom_generate="FOLDER or hub id", trust_remote_code=True)

`draft_length`, `drafter` (auto, exit, lookup, off) and `streamer` may be given beside what `generate` takes.
"""

import layerskip


def generate(model, inputs=None, streamer=None, draft_length=None, drafter=None, **options):
    decode = layerskip.custom_generate_with(streamer=streamer, draft_length=draft_length, drafter=drafter)
    return model.generate(inputs, custom_generate=decode, **options)
'''


def _path(path: Path) -> str:
    """Spell a path for a shell, one that no verb takes for a name."""
    plain = str(path)
    return shlex.quote(plain if path.is_absolute() or plain.startswith(".") else f"./{plain}")


def _as_exit(exit_layer: int) -> str:
    return f"the draft's logits, loaded again, with those of exit {exit_layer}"


def _facts(source: Source) -> Facts:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True)
    return facts_of(config, source.name)


def _prefix(source: Source, facts: Facts, wanted: Wanted, place: Path) -> tuple[int | None, dict[str, str]]:
    """Write the prefix draft; None and a note where the checkpoint's own way of drafting has no counterpart."""
    if wanted.exit_layer is None and (facts.exit_layer is None or facts.exit_adapter is not None):
        most = (num_layers_in(source.folder) or 2) - 1
        why = "drafts through an adapter" if facts.exit_adapter else "names no exit"
        note = f"the model {why}, so there is no draft model; --exit-layer E (1 to {most}) makes one"
        return None, {"note": note}
    place.mkdir()
    return write_prefix(source.folder, wanted.exit_layer, place)["exit_layer"], {}


WRITERS: dict[str, Callable[[Source, Path, Path, Wanted], dict[str, Any]]] = {
    "hf": _hf,
    "draft": _draft,
    "gguf": _gguf,
    "vllm": _vllm,
    "custom-generate": _custom_generate,
}
