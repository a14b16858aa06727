"""What trained exits are worth, task by task: the built-in model beside its untrained base, and Hugging Face.

    python benchmarks/builtin.py --data DATA --threads 2 --save
    python benchmarks/builtin.py --data DATA --tasks gsm8k,chat --limit 20 --hf --threads 2 --save

DATA holds human-eval/HumanEval.jsonl, gsm8k/test.jsonl.gz, cnn-dailymail/summarization.jsonl and
spec-bench/dev-120.jsonl. HumanEval is completed as text up to what begins the next thing on the top level; the
other prompts are wrapped by the chat template. Questions of GSM8K are the last of the file, those of a chat come
from each category in turn. Decoding is greedy and ends where the model ends it.

Every prompt is decoded by all methods before the next one is begun, led in rotation: plain decoding and
self-speculation of the model with its shipped E, K, draft vocabulary and policy (its exit alone: sources.py has
copies too), the same of the base, and with
--hf Hugging Face's `generate`, plain and with `assistant_early_exit`, on the model. The guard is on, and what a
policy learns from a prompt is forgotten before the next one, as when a command is called (--kept: as in a server).
A speed-up is the plain seconds of the same model over its own, all prompts of a task together: once the seconds
behind the first token, once all of them.

Every finished prompt is a line in the work folder: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import record
import torch
from policies import fresh

import layerskip
from layerskip.checkpoint.facts import fingerprint
from layerskip.decode.load import resolve_device
from layerskip.decode.options import Options
from layerskip.errors import UserError
from layerskip.measure.exits.continuations import Continuation, observed
from layerskip.measure.intervals import mean_of_ratios, ratio_of_sums
from layerskip.measure.lines import json_lines
from layerskip.measure.records import Record, Records, work_folder
from layerskip.measure.results import named
from layerskip.measure.speed import methods as ways
from layerskip.measure.speed.bench import schedule
from layerskip.measure.speed.methods import (
    AR,
    HF,
    HF_EARLY_EXIT,
    SELF_SPECULATIVE,
    Method,
    Run,
)
from layerskip.measure.tasks.generation import STOPS
from layerskip.watch import silent

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel

MODEL, BASE = "model", "base"
PLAIN_OF = {SELF_SPECULATIVE: AR, HF: AR, HF_EARLY_EXIT: HF}  # what a method's speed is held against
CHAT = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities", "qa")


# -- prompts -------------------------------------------------------------------------------------------------


def in_turn(lines: Sequence[Mapping[str, Any]], categories: Sequence[str]) -> list[str]:
    """Take the first turns of questions, one of each category after the other."""
    by = [[line["turns"][0] for line in lines if line["category"] == name] for name in categories]
    return [text for turn in itertools.zip_longest(*by) for text in turn if text is not None]


def of_group(*categories: str) -> Callable[[list[Any]], list[str]]:
    return lambda lines: in_turn(lines, categories)


@dataclass(frozen=True)
class Task:
    """Where the prompts of a task lie, in the order they are taken, and whether they are wrapped."""

    file: str
    texts: Callable[[list[Any]], list[str]]
    chat: bool = True

    def prompts(self, data: Path, limit: int) -> list[str]:
        """Read the first of them. Raises: UserError for a file that is missing or of another kind."""
        lines = [line for _, line in json_lines(data / self.file)]
        try:
            found = self.texts(lines)[:limit]
        except (KeyError, TypeError, IndexError) as error:
            raise UserError(f"{self.file} has a line without {error}") from error
        if not found:
            raise UserError(f"{self.file} has no prompts of the wanted kind")
        return found


_QUESTIONS = "spec-bench/dev-120.jsonl"
TASKS = {
    # Without the line break at its end, as the scored task: see layerskip.measure.tasks.generation.
    "humaneval": Task("human-eval/HumanEval.jsonl", lambda x: [one["prompt"].rstrip() for one in x], False),
    "gsm8k": Task("gsm8k/test.jsonl.gz", lambda x: [one["prompt"] for one in reversed(x)]),
    "cnn-dm": Task("cnn-dailymail/summarization.jsonl", lambda x: [one["prompt"] for one in x]),
    "chat": Task(_QUESTIONS, of_group(*CHAT)),
}
GROUPS = {name: Task(_QUESTIONS, of_group(name)) for name in ("translation", "rag")}


# -- decoding ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A model and how it drafts."""

    lm: LanguageModel
    drafting: Mapping[str, Any]  # options of `generate`


def shipped(lm: LanguageModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """Spell out what a checkpoint drafts with by default, so that another model can be told to do the same."""
    given = {"exit_layer": arguments.exit_layer, "draft_length": arguments.draft_length}
    plan = lm.plan(Options.parse({"mode": SELF_SPECULATIVE, "drafter": "exit", "guard": True, **given}))
    told = {"exit_layer": plan.exit_layer, "draft_length": plan.draft_length, "policy": plan.policy}
    told |= {"confidence": plan.confidence or None, "guard": True, "drafter": "exit"}
    head = lm.draft_head(Options.parse({"mode": SELF_SPECULATIVE, **told}))
    return {**told, "draft_vocab": "off" if head is None else head.size}


def contestants(
    subjects: Mapping[str, Subject], stops: Sequence[str], kept: bool, hf: Any
) -> dict[str, Method]:
    """All methods by model and name. Each ends where the model does; Hugging Face's make what they are told."""
    made = {}
    for who, subject in subjects.items():
        ends = {"eos_token_id": None, "stop": tuple(stops)}
        made[f"{who} {AR}"] = ways.ours(subject.lm, AR, 0, **ends)
        options = {**subject.drafting, **ends}
        made[f"{who} {SELF_SPECULATIVE}"] = (
            ways.ours(subject.lm, SELF_SPECULATIVE, 0, **options) if kept else fresh(subject.lm, options)
        )
    if hf is not None:
        drafting = subjects[MODEL].drafting
        made[f"{MODEL} {HF}"] = ways.hugging_face(hf)
        made[f"{MODEL} {HF_EARLY_EXIT}"] = ways.hugging_face(
            hf, drafting["exit_layer"], drafting["draft_length"]
        )
    return made


def measured(
    methods: Mapping[str, Method],
    subjects: Mapping[str, Subject],
    prompts: Sequence[Mapping[str, list[int]]],
    records: Records,
    *,
    budget: int,
    trials: int,
    hf_limit: int,
    title: str,
) -> list[Record]:
    """Decode what is not on file yet; a record of each trial and prompt, in order. Prompts are by model."""
    names = [*methods]
    warm = False
    for (trial, index), turns in itertools.groupby(
        schedule(trials, len(prompts), len(names)), key=lambda turn: turn[:2]
    ):
        order = [names[at] for *_, at in turns]
        order = [name for name in order if index < hf_limit or name.split()[1] not in (HF, HF_EARLY_EXIT)]
        if {*order} <= {*records.found.get((trial, index), {"runs": ()})["runs"]}:
            continue
        for name in names if not warm else ():
            methods[name].decode(0, prompts[0][name.split()[0]], min(budget, 24))
        warm = True
        length = budget  # Hugging Face's methods know no end: they make as many tokens as ours
        if f"{MODEL} {HF}" in order:
            length = len(methods[f"{MODEL} {AR}"].decode(index, prompts[index][MODEL], budget).tokens)
        runs = {}
        for name in order:
            who, kind = name.split()
            allowed = length if kind in (HF, HF_EARLY_EXIT) else budget
            runs[name] = methods[name].decode(index, prompts[index][who], allowed)
        kept = {name: run_record(run, runs[f"{name.split()[0]} {AR}"]) for name, run in runs.items()}
        exits = {
            who: agreed(subject, prompts[index][who], runs[f"{who} {AR}"].tokens)
            for who, subject in subjects.items()
        }
        records.keep({"trial": trial, "index": index, "runs": kept, "exits": exits})
        print(
            f"{title}: trial {trial + 1}, prompt {index + 1} of {len(prompts)}", file=sys.stderr, flush=True
        )
    return [records.found[trial, index] for trial in range(trials) for index in range(len(prompts))]


def run_record(run: Run, plain: Run) -> Record:
    """Put a run into numbers; `difference` is the first place where it is not plain decoding's, else None."""
    rounds = [r for r in run.rounds if r.source != "prefill"]
    return {
        "tokens": run.tokens,
        "prompt_s": run.prefill_s,
        "decode_s": run.decode_s,
        "decode_tokens": run.decode_tokens,
        "rounds": len(run.arrivals) - 1,
        "plain_rounds": sum(r.source == "plain" for r in rounds),
        "drafted": sum(r.drafted for r in rounds),
        "accepted": sum(r.accepted for r in rounds),
        "difference": difference(plain.tokens, run.tokens),
    }


def difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Find the first place where two outputs are not the same; a shorter one differs at its end."""
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return None if at == max(len(a), len(b)) else at


def agreed(subject: Subject, prompt: list[int], tokens: list[int]) -> dict[str, int]:
    """Count the tokens of a plain continuation, but the first, that the exit alone names, by either head."""
    size = subject.drafting["draft_vocab"]
    exit_layer, sizes = subject.drafting["exit_layer"], [0] if size == "off" else [0, size]
    found = [Continuation(prompt, tokens, ended=True)]
    bits = observed(subject.lm, found, [exit_layer], sizes, (), silent).bits
    told = {"tokens": len(tokens) - 1, "whole": int(bits[exit_layer, 0][0].sum())}
    return told | {"draft_head": int(bits[exit_layer, sizes[-1]][0].sum())}


# -- figures -------------------------------------------------------------------------------------------------


def columns(found: Sequence[Record], name: str, whole: bool) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of plain decoding and of a method, by prompt, for the same number of tokens; trials are added up.

    An answer that came at once, with the first token, is left out where only what follows it counts.
    """
    who, kind = name.split()
    plain = f"{who} {PLAIN_OF[kind]}"
    sums: dict[int, list[float]] = {}
    for one in (one for one in found if name in one["runs"]):
        a, b = one["runs"][plain], one["runs"][name]
        alike = a["decode_tokens"] / max(1, b["decode_tokens"])  # 1 where the outputs are equal
        before = (a["prompt_s"], b["prompt_s"]) if whole else (0.0, 0.0)
        total = sums.setdefault(one["index"], [0.0, 0.0])
        total[0] += before[0] + a["decode_s"]
        total[1] += before[1] + b["decode_s"] * alike
    above, below = np.array([pair for pair in sums.values() if all(pair)]).reshape(-1, 2).T
    return above, below


def summary(found: Sequence[Record], name: str) -> dict[str, Any]:
    """Sum a method up over the prompts it decoded; counts are of the first trial."""
    kind = name.split()[1]
    runs = [one["runs"][name] for one in found if name in one["runs"]]
    first = [one["runs"][name] for one in found if name in one["runs"] and one["trial"] == 0]
    total = {
        key: sum(run[key] for run in first)
        for key in ("decode_tokens", "rounds", "plain_rounds", "drafted", "accepted")
    }
    seconds = sum(run["decode_s"] for run in runs)
    told: dict[str, Any] = {
        "prompts": len(first),
        "new_tokens": sum(len(run["tokens"]) for run in first),
        "decode_tokens_per_s": sum(run["decode_tokens"] for run in runs) / seconds if seconds else None,
    }
    if kind == AR:
        return told
    at = [(one["index"], one["runs"][name]["difference"]) for one in found if name in one["runs"]]
    differing = {index: place for index, place in at[::-1] if place is not None}
    told["equal"] = len(first) - len(differing)  # in every trial
    told["first_differences"] = [differing[index] for index in sorted(differing)]
    told["tokens_per_round"] = total["decode_tokens"] / total["rounds"] if total["rounds"] else None
    for key, whole in (("speedup", False), ("speedup_with_prompt", True)):
        above, below = columns(found, name, whole)
        told[key] = ratio_of_sums(above, below).record() if len(below) else None
    if kind == SELF_SPECULATIVE:
        told["acceptance"] = total["accepted"] / total["drafted"] if total["drafted"] else None
        told["plain_rounds"] = total["plain_rounds"] / total["rounds"] if total["rounds"] else None
    return told


def quality(found: Sequence[Record], who: str) -> dict[str, Any]:
    """What the exit alone is worth along the plain continuations: shares of tokens it names."""
    exits = [one["exits"][who] for one in found if one["trial"] == 0]
    tokens = sum(one["tokens"] for one in exits)
    share = lambda key: sum(one[key] for one in exits) / tokens if tokens else None  # noqa: E731
    return {"agreement": share("whole"), "agreement_draft_vocab": share("draft_head"), "tokens": tokens}


def report(by_task: Mapping[str, Sequence[Record]], subjects: Sequence[str]) -> dict[str, Any]:
    """Lay everything out by task and model; the mean is over the tasks of `TASKS`, each counting alike."""
    tasks: dict[str, Any] = {}
    for task, found in by_task.items():
        names = list(dict.fromkeys(name for one in found for name in one["runs"]))
        tasks[task] = {
            who: {
                "methods": {x.split()[1]: summary(found, x) for x in sorted(names) if x.split()[0] == who},
                "exit": quality(found, who),
            }
            for who in subjects
        }
    counted = [task for task in by_task if task in TASKS]
    mean: dict[str, Any] = {}
    for who in subjects:
        name = f"{who} {SELF_SPECULATIVE}"
        for key, whole in (("speedup", False), ("speedup_with_prompt", True)):
            pairs = [columns(by_task[task], name, whole) for task in counted]
            pairs = [pair for pair in pairs if len(pair[0])]
            mean.setdefault(who, {})[key] = mean_of_ratios(pairs).record() if pairs else None
    return {"tasks": tasks, "mean": mean, "mean_of": counted}


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    chosen = {name: task for name, task in {**TASKS, **GROUPS}.items() if name in names}
    if unknown := sorted({*names} - {*chosen}):
        raise UserError(f"unknown task {unknown[0]!r}", "of " + ", ".join([*TASKS, *GROUPS]))
    chosen |= GROUPS if arguments.all_groups else {}
    texts = {name: task.prompts(arguments.data, arguments.limit) for name, task in chosen.items()}
    device = resolve_device(arguments.device)
    lm = layerskip.load(arguments.model, dtype=arguments.dtype, device=device)
    subjects = {MODEL: Subject(lm, shipped(lm, arguments))}
    if arguments.base:
        base = layerskip.load(arguments.base, dtype=arguments.dtype, device=device)
        base.ranked_vocabulary = lm.ranked_vocabulary  # both draft from the same tokens
        subjects[BASE] = Subject(base, subjects[MODEL].drafting)
    hf = ways.hugging_face_model(lm, lm.stack.dtype) if arguments.hf else None
    dtype = str(lm.stack.dtype).removeprefix("torch.")
    by_task = {}
    for name, task in chosen.items():
        stops = STOPS if name == "humaneval" and not arguments.no_stops else ()
        setup = {
            "data": hashlib.sha256((arguments.data / task.file).read_bytes()).hexdigest()[:16],
            "weights": {who: fingerprint(one.lm.path) for who, one in subjects.items()},
            "ranked": hashlib.sha256(str(lm.ranked_vocabulary).encode()).hexdigest()[:16],
            "drafting": subjects[MODEL].drafting,
            "stops": stops,
            "dtype": dtype,
            "device": device.type,
            **{key: getattr(arguments, key) for key in ("max_new_tokens", "kept", "threads")},
        }
        prompts = [
            {
                who: one.lm.encode(text, chat=task.chat and one.lm.has_template)
                for who, one in subjects.items()
            }
            for text in texts[name]
        ]
        by_task[name] = measured(
            contestants(subjects, stops, arguments.kept, hf),
            subjects,
            prompts,
            Records(work_folder(arguments.work, f"builtin-{name}", setup), key=("trial", "index")),
            budget=arguments.max_new_tokens,
            trials=arguments.trials,
            hf_limit=arguments.hf_limit if arguments.hf else 0,
            title=name,
        )
    result = {
        **report(by_task, [*subjects]),
        "drafting": subjects[MODEL].drafting,
        "equality_promised": lm.stack.row_exact or lm.stack.dtype in (torch.float32, torch.float64),
        "configuration": record.configuration(arguments, device),
    }
    result["configuration"] |= {"dtype": dtype, "stack": lm.stack.name, "trained_exits": list(lm.facts.exits)}
    from tables import builtin_table

    print("\n".join(builtin_table(result)))
    if arguments.save:
        record.save(result, "builtin", arguments.name or named(arguments.model), dtype, device.type)
    unequal = [
        f"{who} on {task}"
        for task, told in result["tasks"].items()
        for who, one in told.items()
        if one["methods"][SELF_SPECULATIVE]["first_differences"]
    ]
    if unequal and result["equality_promised"]:
        raise SystemExit(f"not lossless: {', '.join(unequal)}")


def parsed() -> argparse.Namespace:
    parser = record.comparison(__doc__, ",".join(TASKS))
    parser.add_argument("--all-groups", action="store_true", help="further rows: " + ", ".join(GROUPS))
    parser.add_argument("--limit", type=int, default=10, help="prompts of a task")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--trials", type=int, default=1)
    parser.add_argument("--exit-layer", type=int, help="another E than the model's own")
    parser.add_argument("--draft-length", type=int, help="another K than the model's own")
    parser.add_argument("--kept", action="store_true", help="keep what a policy learns from prompt to prompt")
    parser.add_argument("--no-stops", action="store_true", help="let HumanEval run on behind the function")
    parser.add_argument("--hf", action="store_true", help="Hugging Face's generate too, on the model")
    parser.add_argument("--hf-limit", type=int, default=2, help="prompts of a task it decodes")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error.message}\n{error.hint or ''}") from None
