"""What a model can be exported to: one function a target, a row in `WRITERS`.

    report = export(Source(folder, "my-model"), "draft", output, Wanted(exit_layer=4))

Everything is written aside, opened again and compared; only then it gets its name.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from layerskip.checkpoint.configuration import num_layers_in
from layerskip.checkpoint.facts import Facts, facts_of
from layerskip.checkpoint.files import write_text
from layerskip.errors import UserError, nearest
from layerskip.export.folders import carry, sizes, whole_folder
from layerskip.export.gguf import write_gguf
from layerskip.export.prefix import write_prefix

DRAFTS = 4  # tokens drafted where the checkpoint says nothing


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
    type: str = "f16"


def export(source: Source, target: str, output: Path, wanted: Wanted) -> dict[str, Any]:
    """Write a target into a folder; tell its files, in bytes, the commands that use it and what to know.

    Raises: UserError where the model has no such thing, or something is there already.
    """
    if target not in WRITERS:
        raise UserError(f"unknown target {target!r}", nearest(target, WRITERS))
    with whole_folder(output) as folder:
        told = WRITERS[target](source, folder, output, wanted)
        files = sizes(folder)
    return {"target": target, "output": str(output), "files": files} | told


def _hf(source: Source, folder: Path, output: Path, wanted: Wanted) -> dict[str, Any]:
    carry(source.folder, folder)
    return {"use": [f'layerskip generate ./{output} "..."'], "compared": "every file, byte for byte"}


def _draft(source: Source, folder: Path, output: Path, wanted: Wanted) -> dict[str, Any]:
    told = write_prefix(source.folder, wanted.exit_layer, folder)
    code = (
        f'draft = AutoModelForCausalLM.from_pretrained("{output}")',
        "model.generate(**inputs, assistant_model=draft)",
    )
    return told | {"use": [*code], "compared": _as_exit(told)}


def _gguf(source: Source, folder: Path, output: Path, wanted: Wanted) -> dict[str, Any]:
    name = f"{source.short}-{wanted.type}.gguf"
    write_gguf(source.folder, folder / name, wanted.type, source.short)
    told: dict[str, Any] = {"compared": "every parameter and the logits, read again by transformers"}
    use = [f'llama-cli -m {output / name} -p "..."']
    draft = _drafting(source, wanted, folder, told)
    if draft is not None:
        exit_layer, made = draft
        small = f"{source.short}-first-{exit_layer}-{wanted.type}.gguf"
        write_gguf(Path(made.name), folder / small, wanted.type, f"{source.short} first {exit_layer}")
        made.cleanup()
        count = _facts(source).draft_length or DRAFTS
        use.append(f'llama-speculative -m {output / name} -md {output / small} --draft-max {count} -p "..."')
    return told | {"use": use}


def _vllm(source: Source, folder: Path, output: Path, wanted: Wanted) -> dict[str, Any]:
    (folder / "model").mkdir()
    carry(source.folder, folder / "model")
    told: dict[str, Any] = {"compared": "the model's files, byte for byte"}
    draft, count = _drafting(source, wanted, folder, told), _facts(source).draft_length or DRAFTS
    if draft is None:
        how = f'{{"method": "ngram", "num_speculative_tokens": {count}, "prompt_lookup_max": 4}}'
    else:
        exit_layer, made = draft
        Path(made.name).rename(folder / "draft")
        told["compared"] += "; " + _as_exit({"exit_layer": exit_layer})
        how = f'{{"method": "draft_model", "model": "{output / "draft"}", "num_speculative_tokens": {count}}}'
    command = f"vllm serve {output / 'model'} --speculative-config '{how}'"
    write_text(folder / "serve.sh", f"#!/bin/sh\n# Run in the folder that holds {output.name}.\n{command}\n")
    return told | {"use": [command]}


def _custom_generate(source: Source, folder: Path, output: Path, wanted: Wanted) -> dict[str, Any]:
    carry(source.folder, folder)
    (folder / "custom_generate").mkdir()
    write_text(folder / "custom_generate" / "generate.py", GENERATE)
    write_text(folder / "custom_generate" / "requirements.txt", f"layerskip>={version('layerskip')}\n")
    code = f'model.generate(**inputs, custom_generate="{output}", trust_remote_code=True)'
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


def _as_exit(told: dict[str, Any]) -> str:
    return f"the draft's logits, loaded again, with those of exit {told['exit_layer']}"


def _facts(source: Source) -> Facts:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True)
    return facts_of(config, source.name)


def _drafting(
    source: Source, wanted: Wanted, beside: Path, told: dict[str, Any]
) -> tuple[int, tempfile.TemporaryDirectory[str]] | None:
    """Write the prefix draft aside; None, with a note, where the checkpoint's own way has no counterpart."""
    facts = _facts(source)
    if wanted.exit_layer is None and (facts.exit_layer is None or facts.exit_adapter is not None):
        most = (num_layers_in(source.folder) or 2) - 1
        why = "drafts through an adapter" if facts.exit_adapter else "names no exit"
        told["note"] = f"the model {why}, so there is no draft model; --exit-layer E (1 to {most}) makes one"
        return None
    made = tempfile.TemporaryDirectory(dir=beside, prefix=".draft-")
    exit_layer = write_prefix(source.folder, wanted.exit_layer, Path(made.name))["exit_layer"]
    return exit_layer, made


WRITERS: dict[str, Callable[[Source, Path, Path, Wanted], dict[str, Any]]] = {
    "hf": _hf,
    "draft": _draft,
    "gguf": _gguf,
    "vllm": _vllm,
    "custom-generate": _custom_generate,
}
