"""Generation tasks: decode a data set's items in each mode, score the outputs, sum them up.

    items = read("humaneval", Path("HumanEval.jsonl"), limit=20)
    result = run(lm, "humaneval", items, keep=lines.append)      # result["modes"]["self-speculative"]["score"]

`topv2`: lines {"prompt", "response"}; right is what equals the response, ends stripped. The prompt is encoded as
training did: its text and a line break, no template. `humaneval`: the lines of the official file; right is a
function that passes its test in the sandbox. The prompt is completed as text, up to what begins the next thing on
the top level; with `chat` the model is asked for the whole function. `gsm8k`: lines {"prompt", "response"}, the
response ends in #### and a number; right is an answer whose last number is that one. The question is wrapped where
the model has a template. Decoding is greedy, so every mode gives one answer, and self-speculation must give plain
decoding's, token for token.
"""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from layerskip.decode.options import MODES, Options
from layerskip.errors import UserError, nearest
from layerskip.measure.intervals import resampled
from layerskip.measure.lines import json_lines
from layerskip.measure.speed.card import synchronise
from layerskip.measure.speed.methods import AR, EARLY_EXIT, SELF_SPECULATIVE
from layerskip.measure.tasks import sandbox
from layerskip.watch import Watch, silent

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel
    from layerskip.measure.records import Record

TOPV2, HUMANEVAL, GSM8K = NAMES = ("topv2", "humaneval", "gsm8k")
METRICS = {TOPV2: "exact_match", HUMANEVAL: "pass@1", GSM8K: "accuracy"}
COUNTED = ("new_tokens", "drafted", "accepted", "rounds", "plain_rounds")  # of each item's statistics, summed
KEYS = {
    TOPV2: ("prompt", "response"),
    HUMANEVAL: ("task_id", "prompt", "entry_point", "test"),
    GSM8K: ("prompt", "response"),
}
# New tokens: the longest responses of TOPv2 and GSM8K fit; the paper's for code.
BUDGETS = {TOPV2: 160, HUMANEVAL: 512, GSM8K: 320}
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # Chen et al. 2021: the function has ended
REQUEST = (
    "Complete this function. Answer with one code block that has the whole function.\n\n```python\n{}\n```"
)
NUMBER = re.compile(r"((?<![\w)])-)?\$?(\d[\d,]*(?:\.\d+)?|\.\d+)")  # a minus behind a number takes away


@dataclass(frozen=True)
class Item:
    """A line of a task's file."""

    index: int  # place in the file, from 0
    fields: Mapping[str, Any]

    @property
    def prompt(self) -> str:
        return str(self.fields["prompt"])


def read(name: str, path: Path, limit: int | None = None) -> list[Item]:
    """Read the first `limit` items of a task's file (JSON lines, possibly .gz).

    Raises: UserError naming the line and what it lacks.
    """
    if name not in NAMES:
        raise UserError(f"unknown task {name!r}", nearest(name, NAMES))
    items: list[Item] = []
    for number, fields in json_lines(path):
        missing = [
            key for key in KEYS[name] if not (isinstance(fields, dict) and type(fields.get(key)) is str)
        ]
        if missing:
            raise UserError(
                f"{path}, line {number} has no text {missing[0]!r}", f"{name} needs {', '.join(KEYS[name])}"
            )
        if name == GSM8K and right_number(fields["response"]) is None:
            raise UserError(f"{path}, line {number} has no number behind ####", "a response ends in one")
        items.append(Item(len(items), fields))
        if len(items) == limit:
            break
    if not items:
        raise UserError(f"{path} has no items", f"one JSON object per line: {', '.join(KEYS[name])}")
    return items


def run(
    lm: LanguageModel,
    name: str,
    items: Sequence[Item],
    modes: Sequence[str] = MODES,
    *,
    chat: bool | None = None,
    batch_size: int = Options.batch_size,
    watch: Watch = silent,
    done: Mapping[int, Record] = {},
    keep: Callable[[Record], None] = lambda record: None,
    **options: Any,
) -> dict[str, Any]:
    """Decode and score the items, `batch_size` together; `keep` gets the record of each when it is finished.

    `done` are records kept before, by index: those that have all modes are not decoded again. Times stand in
    a record when items are decoded one by one. `chat` None: as the task is, see `wrapped`. `options` are further
    ones of `Options`, such as exit_layer; None leaves the task's own.

    Raises: UserError, before any work, for an option or a prompt that cannot be honoured.
    """
    if lm.tokenizer is None:
        raise UserError("this folder has no tokenizer", "a task's items are text: add tokenizer.json")
    chat = wrapped(lm, name) if chat is None else chat
    if chat and name == TOPV2:
        raise UserError(f"{name} has no chat form", "leave out --chat")
    options = {
        "max_new_tokens": BUDGETS[name],
        **{key: value for key, value in options.items() if value is not None},
        "batch_size": batch_size,
        "eos_token_id": ends(lm),
        "stop": STOPS if name == HUMANEVAL and not chat else (),
    }
    # An unverified exit uses the whole head: a reduced one would cut its quality, and nothing would mend it.
    each = {
        mode: {**options, "mode": mode} | ({"draft_vocab": "off"} if mode == EARLY_EXIT else {})
        for mode in modes
    }
    for given in each.values():
        lm.draft_head(Options.parse(given))  # refuses exits, lengths and sizes out of range
    prompts = {item.index: _encoded(lm, name, item, chat) for item in items}
    for index, tokens in prompts.items():
        if lm.stack.context is not None and len(tokens) > lm.stack.context:
            raise UserError(
                f"item {index + 1} has {len(tokens)} tokens, the context is {lm.stack.context}",
                "leave it out",
            )
    known = {index: record for index, record in done.items() if {*modes} <= {*record["modes"]}}
    waiting = [item for item in items if item.index not in known]
    for start in range(0, len(waiting), batch_size):
        watch(f"task: {name}", len(items) - len(waiting) + start, len(items))
        together = waiting[start : start + batch_size]
        asked = [prompts[item.index] for item in together]
        answers = {mode: decoded(lm, asked, **given) for mode, given in each.items()}
        for mode, found in answers.items():
            for one, plain in zip(found, answers.get(AR, ()), strict=False):
                if mode == SELF_SPECULATIVE:
                    one["equal"] = one["tokens"] == plain["tokens"]
        judge(name, [pair for found in answers.values() for pair in zip(together, found, strict=True)], chat)
        for place, item in enumerate(together):
            known[item.index] = {"index": item.index, "modes": {mode: answers[mode][place] for mode in modes}}
            keep(known[item.index])
    watch(f"task: {name}", len(items), len(items))
    records = [known[item.index] for item in items]
    return {
        "items": len(items),
        "modes": {mode: summed(name, [r["modes"][mode] for r in records]) for mode in modes},
    }


# -- decoding ------------------------------------------------------------------------------------------------


def decoded(lm: LanguageModel, prompts: Sequence[list[int]], **options: Any) -> list[Record]:
    """Decode prompts together; a record of each. One prompt alone is timed, on the host, prefill included."""
    synchronise(lm.stack.device)
    began = time.perf_counter()
    found = lm.generate(list(prompts), **options)
    seconds = time.perf_counter() - began
    records = []
    for one in found:
        records.append(
            {
                "text": one.text,
                "tokens": one.tokens,
                "finish_reason": one.finish_reason,
                **{key: one.stats[key] for key in (*COUNTED, "by_source")},
            }
        )
        if len(found) == 1:
            records[-1] |= {"seconds": round(seconds, 6), "decode_s": one.stats["decode_s"]}
    return records


def as_trained(lm: LanguageModel, prompt: str, separator: str = "\n") -> list[int]:
    """Tokens of a prompt as `layerskip train` made them from prompt and completion."""
    return lm.encode(prompt + separator, chat=False)


def ends(lm: LanguageModel) -> list[int]:
    """Every id that ends an output: the one training taught, and those of the checkpoint."""
    return sorted({lm.tokenizer.eos_token_id, *lm.eos_ids(Options())} - {None})


def wrapped(lm: LanguageModel, name: str) -> bool:
    """Whether a task's prompts are messages unless asked otherwise: questions, where the model has a template."""
    return name == GSM8K and lm.has_template


def _encoded(lm: LanguageModel, name: str, item: Item, chat: bool) -> list[int]:
    if name == TOPV2:
        return as_trained(lm, item.prompt)
    if name == GSM8K:
        return lm.encode(item.prompt, chat=chat)
    # Without the line break at its end: byte-pair tokenizers join one to the indentation that follows, so a model
    # has hardly seen it alone (SmolLM2 then writes about the function instead of writing it).
    text = item.prompt.rstrip()
    return lm.encode(REQUEST.format(text) if chat else text, chat=chat)


# -- scoring -------------------------------------------------------------------------------------------------


def judge(name: str, answers: Sequence[tuple[Item, Record]], chat: bool = False) -> None:
    """Score the answers to items, each in place: `score` is 0 or 1, beside it what a task tells more."""
    if name == TOPV2:
        for item, record in answers:
            record |= matches(record["text"], item.fields["response"])
            record["score"] = float(record["exact"])
        return
    if name == GSM8K:
        for item, record in answers:
            found = last_number(record["text"])
            right = found is not None and found == right_number(item.fields["response"])
            record |= {"answer": None if found is None else str(found), "score": float(right)}
        return
    jobs = [job(item, record["text"], chat) for item, record in answers]
    different = list(dict.fromkeys(jobs))  # the modes often agree
    outcomes = dict(zip(different, sandbox.run_all(different), strict=True))
    for one, (_, record) in zip(jobs, answers, strict=True):
        outcome = outcomes[one]
        record |= {"score": float(outcome.passed), "outcome": outcome.status, "detail": outcome.detail}


def matches(text: str, response: str) -> dict[str, bool]:
    """Compare with the response: ends stripped, and up to the number of spaces."""
    return {"exact": text.strip() == response.strip(), "loose": text.split() == response.split()}


def last_number(text: str) -> Decimal | None:
    """Read the last number of an answer; $, commas between digits and zeros behind the point say nothing."""
    found = [*NUMBER.finditer(text)]
    return Decimal((found[-1][1] or "") + found[-1][2].replace(",", "")) if found else None


def right_number(response: str) -> Decimal | None:
    """Read the number behind the last #### of a response."""
    return last_number(response.rpartition("####")[2]) if "####" in response else None


def job(item: Item, text: str, chat: bool = False) -> sandbox.Job:
    """Make a HumanEval item's job from an answer; helpers that the test calls are the prompt's own.

    A chat's code goes behind the prompt, whose imports and helpers it may need: the block that defines the
    function, else the first, else the whole answer.
    """
    entry_point = item.fields["entry_point"]
    if chat:
        blocks = re.findall(r"```[^\n]*\n(.*?)(?:```|\Z)", text, re.DOTALL) or [text]
        defining = [block for block in blocks if f"def {entry_point}(" in block]
        text = "\n\n" + (defining or blocks)[0]
    text = text if text.startswith("\n") else "\n" + text
    prompt, test = item.prompt.rstrip(), f"{item.fields['test']}\ncheck({entry_point})\n"
    return sandbox.Job(prompt + text, test, entry_point, given=f"{prompt}\n    pass\n")


def summed(name: str, records: Sequence[Record]) -> dict[str, Any]:
    """Sum up a mode's records of one task; the interval resamples items."""
    total = {key: sum(record.get(key, 0) for record in records) for key in COUNTED}
    sources: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        for source, counts in record.get("by_source", {}).items():
            sources[source].update(counts)
    decoded_tokens = total["new_tokens"] - len(records)  # prefill gives one token of each item
    scores = np.array([record["score"] for record in records])
    told = {
        "score": float(scores.mean()),
        "score_ci95": resampled(lambda x: x.mean(-1), scores),
        "metric": METRICS[name],
        "acceptance": total["accepted"] / total["drafted"] if total["drafted"] else None,
        "tokens_per_round": decoded_tokens / total["rounds"] if total["rounds"] else None,
        "new_tokens": total["new_tokens"],
        "plain_rounds": total["plain_rounds"],
        "by_source": {source: dict(counts) for source, counts in sources.items()},
    }
    if all("equal" in record for record in records):
        told["equal"] = sum(record["equal"] for record in records)
    if name == TOPV2:
        told["normalised_match"] = float(np.mean([record["loose"] for record in records]))
    elif name == HUMANEVAL:
        told["outcomes"] = dict(Counter(record["outcome"] for record in records).most_common())
    return told
