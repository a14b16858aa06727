"""The paper's task experiment at this scale: TOPv2 semantic parsing, quality and speed of a trained model's exits.

    layerskip draft-vocab MODEL --data train.jsonl.gz --size 8192       # training responses by frequency, EOS in
    python benchmarks/topv2.py --model MODEL --baseline BASELINE --data test.jsonl.gz --threads 2 --save
    python benchmarks/topv2.py --model MODEL --data test.jsonl.gz --limit 3 --tune 2           # a rehearsal

MODEL was trained with LayerSkip, BASELINE identically without. Each item {"prompt", "response"} is encoded as in
training: tokens of the prompt and a line break, no chat template; decoding is greedy and stops at the end token.
Methods: plain decoding of all layers ("full"), self-speculation and unverified early exit at every E, plain
decoding of the baseline. A cell ExK@C stops a draft where the exit's largest probability is below C. K is chosen
for every E by tokens per second on items from the end of the file, which are not among the reported ones. Quality,
acceptance and equality come from all items, decoded in batches (where the stack is row-exact an output does not
depend on its batch); speed from the first --timed of them, one at a time, methods one after the other on every
item, prefill included. An output is right when it equals the response, ends stripped; self-speculative output must
equal full output token for token.

Every finished item is a line in the --work folder: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import record
import torch
import yaml

import layerskip
from layerskip.checkpoint.facts import fingerprint
from layerskip.decode.control import Prices
from layerskip.decode.load import resolve_device
from layerskip.decode.options import Options
from layerskip.measure.intervals import interval, ratio_of_sums, resampled
from layerskip.measure.records import Record, Records, work_folder
from layerskip.measure.tasks.generation import (
    TOPV2,
    Item,
    as_trained,
    decoded,
    ends,
    matches,
    read,
)

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel

FULL, BASELINE = "full", "baseline"


@dataclass(frozen=True)
class Method:
    """A way to decode: a name for records and tables, the model, options of `generate`."""

    name: str
    lm: LanguageModel
    options: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the model trained with LayerSkip")
    parser.add_argument("--baseline", help="folder of the model trained identically without")
    parser.add_argument("--data", required=True, type=Path, help="test.jsonl or .jsonl.gz: prompt, response")
    parser.add_argument("--limit", type=int, default=1000, help="items to report, the first of the file")
    parser.add_argument(
        "--timed", type=int, default=150, help="items to time, the first of the reported ones"
    )
    parser.add_argument("--batch", type=int, default=16, help="items decoded together where nothing is timed")
    parser.add_argument("--tune", type=int, default=60, help="items to choose K on, the last of the file")
    parser.add_argument("--exits", default="4,6,8,12", help="E, comma-separated")
    parser.add_argument("--draft-length", default="3,4,6,8,12", help="K to choose from, comma-separated")
    parser.add_argument("--cells", default="", help="further cells to report, ExK or ExK@C, comma-separated")
    parser.add_argument(
        "--draft-vocab", default="auto", help="tokens of the draft head: a number, auto or off"
    )
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--separator", default="\n", help="between prompt and response, as in training")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stack", default="auto", help="native, hf or auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=record.HERE / "items" / "topv2", help="finished items")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/topv2_*.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device)
    exits = [int(k) for k in arguments.exits.split(",")]
    lengths = [int(k) for k in arguments.draft_length.split(",")]
    reported, tuned = read_items(arguments.data, arguments.limit, arguments.tune if len(lengths) > 1 else 0)
    settings = {"dtype": arguments.dtype, "device": device, "stack": arguments.stack}
    lm = layerskip.load(arguments.model, **settings)
    other = None if arguments.baseline is None else layerskip.load(arguments.baseline, **settings)
    draft_vocab = checked_vocabulary(lm, arguments.draft_vocab, arguments.model)
    work_folder(arguments.work.parent, arguments.work.name, setup(arguments, lm, other, exits, lengths))

    common = {"max_new_tokens": arguments.max_new_tokens, "eos_token_id": ends(lm)}
    full = Method(FULL, lm, {"mode": "ar", **common})

    def speculative(exit_layer: int, draft_length: int, confidence: float = 0.0) -> Method:
        name = f"self-speculative {exit_layer}x{draft_length}" + (f"@{confidence:g}" if confidence else "")
        chosen = {"exit_layer": exit_layer, "draft_length": draft_length, "draft_vocab": draft_vocab}
        stops = {"policy": "confidence", "confidence": confidence} if confidence else {}
        return Method(name, lm, {"mode": "self-speculative", **chosen, **stops, **common})

    grid = {(e, k, 0.0): speculative(e, k) for e in exits for k in lengths}
    chosen = dict.fromkeys(exits, lengths[0])
    tuning: dict[str, float] = {}
    if len(lengths) > 1:
        found = run(tuned, [full, *grid.values()], arguments, "tuning")
        tuning = {method.name: rate(found, method.name) for method in [full, *grid.values()]}
        chosen = {e: max(lengths, key=lambda k, e=e: tuning[grid[e, k, 0.0].name]) for e in exits}
    # Unverified exits use the whole head: a reduced one would cut their quality, and nothing would mend it.
    alone = {"mode": "early-exit", "draft_vocab": "off", **common}
    early = {e: Method(f"early-exit {e}", lm, {**alone, "exit_layer": e}) for e in exits}
    given = [read_cell(cell) for cell in arguments.cells.split(",") if cell]
    grid |= {cell: speculative(*cell) for cell in given}
    cells = sorted({*((e, k, 0.0) for e, k in chosen.items()), *given})
    methods = [full, *(grid[cell] for cell in cells), *early.values()]
    if other is not None:
        methods.append(Method(BASELINE, other, {"mode": "ar", **common, "eos_token_id": ends(other)}))
    timed = run(reported[: arguments.timed], methods, arguments, "timed")
    found = run(reported, methods, arguments, "items", arguments.batch)

    table = {FULL: summary(found, FULL, timed)}
    if other is not None:
        table[BASELINE] = summary(found, BASELINE, timed)
    vocabulary = lm.draft_head(Options.parse(grid[exits[0], chosen[exits[0]], 0.0].options))
    for e, k, confidence in cells:
        method = grid[e, k, confidence]
        table[method.name] = told = {"exit_layer": e, "draft_length": k, **summary(found, method.name, timed)}
        if confidence:  # how many are drafted is not known before
            told["confidence"] = confidence
        else:
            cost = Prices.of(lm.stack, vocabulary).cost(e)
            told["predicted_speedup"] = cost.speedup(k, told["tokens_per_round"] or 1.0)
    for e in exits:
        table[f"early-exit {e}"] = {"exit_layer": e, **summary(found, early[e].name, timed)}
    result: dict[str, Any] = {
        "items": len(found),
        "timed_items": len(timed),
        "timed_as_in_batches": sum(same_text(one, all_of) for one, all_of in zip(timed, found, strict=False)),
        "methods": table,
        "tuning": {
            "items": len(tuned),
            "tokens_per_s": tuning,
            "chosen": {str(e): k for e, k in chosen.items()},
        },
        "draft_vocab": "off" if vocabulary is None else vocabulary.size,
        "responses_over_budget": over_budget(reported, lm, arguments.max_new_tokens),
        "stack": lm.stack.name,
        "equality_promised": lm.stack.row_exact or lm.stack.dtype in (torch.float32, torch.float64),
        "training": {"model": recipe_of(lm), "baseline": other and recipe_of(other)},
    }
    if other is not None:
        result["exact_match_difference"] = difference(found)
        result["recipes_differ_in"] = differing(result["training"]["model"], result["training"]["baseline"])
    result["configuration"] = record.configuration(arguments, device)
    print_tables(result)
    if arguments.save:
        record.save(result, "topv2", Path(arguments.model).resolve().name, arguments.dtype, device.type)
    unequal = [
        name
        for name, told in table.items()
        if told.get("equal", len(found)) < len(found) or told.get("equal_timed", len(timed)) < len(timed)
    ]
    if unequal and result["equality_promised"]:
        raise SystemExit(f"not lossless: {', '.join(unequal)}")


# -- data and models -----------------------------------------------------------------------------------------


def read_cell(text: str) -> tuple[int, int, float]:
    """E, K and the confidence below which a draft ends, of `4x8` or `4x8@0.8`."""
    exit_layer, _, rest = text.partition("x")
    draft_length, _, confidence = rest.partition("@")
    try:
        return int(exit_layer), int(draft_length), float(confidence or 0)
    except ValueError:
        raise SystemExit(f"--cells {text}: a cell is ExK or ExK@C, as in 4x8@0.8") from None


def read_items(path: Path, limit: int, tune: int) -> tuple[list[Item], list[Item]]:
    """Take the first `limit` items to report and the last `tune` to choose K on; they may not overlap."""
    items = read(TOPV2, path)
    if limit + tune > len(items):
        raise SystemExit(
            f"{path.name} has {len(items)} items: too few to report {limit} and to tune on {tune} others"
        )
    return items[:limit], items[len(items) - tune :]


def checked_vocabulary(lm: LanguageModel, asked: str, model: str) -> int | str:
    """Refuse a size the checkpoint has no ranking for: the lowest ids would stand in, not the frequent ones."""
    if not asked.isdecimal():
        return asked
    known = len(lm.ranked_vocabulary or ())
    if int(asked) > known:
        raise SystemExit(
            f"{Path(model).name} ranks {known} tokens for drafting, not {asked}; write the ranking first, from "
            f"training data:\n  layerskip draft-vocab {model} --data train.jsonl.gz --size {asked}"
        )
    return int(asked)


def over_budget(items: Sequence[Item], lm: LanguageModel, budget: int) -> int:
    """Count responses that, with their end token, do not fit: no method can be right there."""
    return sum(
        len(ids) + 1 > budget for ids in lm.tokenizer([i.fields["response"] for i in items])["input_ids"]
    )


def recipe_of(lm: LanguageModel) -> dict[str, Any] | None:
    """Read how a model was trained, where its folder says so; paths by their last name only."""
    file = lm.path / "recipe.yaml" if lm.path is not None else None
    if file is None or not file.is_file():
        return None
    recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    kept = {k: v for k, v in recipe.items() if k not in ("output", "description", "source") and v is not None}
    last = lambda value: value.rsplit("/", 1)[-1] if isinstance(value, str) else value  # noqa: E731
    return {k: [last(x) for x in v] if isinstance(v, list) else last(v) for k, v in kept.items()}


def differing(a: dict[str, Any] | None, b: dict[str, Any] | None) -> list[str] | None:
    return None if a is None or b is None else sorted(k for k in {*a, *b} if a.get(k) != b.get(k))


# -- running, item by item -----------------------------------------------------------------------------------


def setup(
    arguments: argparse.Namespace,
    lm: LanguageModel,
    other: LanguageModel | None,
    exits: Sequence[int],
    lengths: Sequence[int],
) -> dict[str, Any]:
    """Say what the records of a work folder are of."""
    names = ("draft_vocab", "max_new_tokens", "separator", "dtype", "device", "stack", "threads", "tune")
    weights = lambda lm: fingerprint(lm.path, "*.safetensors", "*.json")  # noqa: E731 (the draft vocabulary too)
    return {
        **{name: getattr(arguments, name) for name in names},
        "exits": list(exits),
        "draft_lengths": list(lengths),
        "model": weights(lm),
        "baseline": other and weights(other),
        "data": hashlib.sha256(arguments.data.read_bytes()).hexdigest(),
    }


def run(
    items: Sequence[Item], methods: Sequence[Method], arguments: argparse.Namespace, name: str, batch: int = 1
) -> list[Record]:
    """Decode items with every method in turn, `batch` at a time, those on file left out; a line per item."""
    records, names = Records(arguments.work, name), {method.name for method in methods}
    done = {index: one for index, one in records.found.items() if names <= {*one["methods"]}}
    waiting = [item for item in items if item.index not in done]
    if waiting and batch == 1:
        warm = as_trained(methods[0].lm, waiting[0].prompt, arguments.separator)
        for method in methods:
            method.lm.generate(warm, **{**method.options, "max_new_tokens": 24})
    began = time.perf_counter()
    for start in range(0, len(waiting), batch):
        together = waiting[start : start + batch]
        for one in compared(methods, together, arguments.separator):
            records.keep(one)
        number = start + len(together)
        if number % (20 * batch) < batch or number == len(waiting):
            left = (time.perf_counter() - began) / number * (len(waiting) - number) / 60
            so_far = f"{len(items) - len(waiting) + number} of {len(items)} items"
            print(f"{name}: {so_far}, {left:.0f} minutes left", file=sys.stderr, flush=True)
    return [records.found[item.index] for item in items]


def compared(methods: Sequence[Method], items: Sequence[Item], separator: str) -> list[Record]:
    """Decode some items together with every method, and hold the outputs against responses and plain decoding."""
    found: list[Record] = [{"index": item.index, "methods": {}} for item in items]
    reference: list[list[int]] = []
    for method in methods:
        prompts = [as_trained(method.lm, item.prompt, separator) for item in items]
        done = decoded(method.lm, prompts, batch_size=len(items), **method.options)
        tokens = [told.pop("tokens") for told in done]
        reference = tokens if method.name == FULL else reference
        for place, (told, item) in enumerate(zip(done, items, strict=True)):
            told |= matches(told["text"], item.fields["response"])
            told |= {"text": told["text"].strip(), "ended": told.pop("finish_reason") == "eos"}
            if method.name.startswith("self-speculative"):
                told["equal"] = tokens[place] == reference[place]
            found[place]["methods"][method.name] = told
    return found


def same_text(one: Record, other: Record) -> bool:
    """Whether the methods that both have made the same texts."""
    both = one["methods"].keys() & other["methods"].keys()
    return all(one["methods"][name]["text"] == other["methods"][name]["text"] for name in both)


# -- figures -------------------------------------------------------------------------------------------------


def column(found: Sequence[Record], method: str, key: str) -> np.ndarray:
    return np.array([record["methods"][method][key] for record in found], dtype=float)


def rate(found: Sequence[Record], method: str) -> float:
    """Tokens per second over all items."""
    return float(column(found, method, "new_tokens").sum() / column(found, method, "seconds").sum())


def summary(found: Sequence[Record], method: str, timed: Sequence[Record]) -> dict[str, Any]:
    """Sum a method up: quality, speed, and for self-speculation equality, acceptance and speed-up over full."""
    exact, tokens = (column(found, method, key) for key in ("exact", "new_tokens"))
    seconds = column(timed, method, "seconds")
    told: dict[str, Any] = {
        "exact_match": float(exact.mean()),
        "exact_match_ci95": resampled(lambda x: x.mean(-1), exact),
        "normalised_match": float(column(found, method, "loose").mean()),
        "ended": int(column(found, method, "ended").sum()),
        "new_tokens": int(tokens.sum()),
        "tokens_per_s": rate(timed, method),
        "ms_per_token": 1e3 / rate(timed, method),
    }
    if not method.startswith("self-speculative"):
        return told
    drafted, accepted, rounds = (
        column(found, method, key).sum() for key in ("drafted", "accepted", "rounds")
    )
    plain = column(timed, FULL, "seconds")
    paired = interval([[ratio] for ratio in plain / seconds])
    decode = [column(timed, name, "decode_s").sum() for name in (FULL, method)]
    return told | {
        "equal": int(column(found, method, "equal").sum()),
        "equal_timed": int(column(timed, method, "equal").sum()),
        "acceptance": float(accepted / drafted) if drafted else None,
        # Prefill gives one token of each item.
        "tokens_per_round": float((tokens.sum() - len(found)) / rounds) if rounds else None,
        "speedup": paired.record(),
        "speedup_of_sums": ratio_of_sums(plain, seconds).record(),
        "decode_speedup": float(decode[0] / decode[1]) if decode[1] else None,
    }


def difference(found: Sequence[Record]) -> dict[str, Any]:
    """Exact match of the LayerSkip model less that of the baseline, paired by item."""
    paired = column(found, FULL, "exact") - column(found, BASELINE, "exact")
    counts = {"only_model": int((paired > 0).sum()), "only_baseline": int((paired < 0).sum())}
    return {"mean": float(paired.mean()), "ci95": resampled(lambda x: x.mean(-1), paired), **counts}


def print_tables(result: dict[str, Any]) -> None:
    if result["tuning"]["items"]:
        print(f"\nK chosen on {result['tuning']['items']} other items, tokens/s:")
        for name, tokens_per_s in result["tuning"]["tokens_per_s"].items():
            print(f"  {name:<26}{tokens_per_s:>8.1f}")
    if result["responses_over_budget"]:
        print(f"\n{result['responses_over_budget']} responses are longer than --max-new-tokens: never right")
    from tables import topv2_table

    print("\n" + "\n".join(topv2_table(result)))


if __name__ == "__main__":
    record.run(main)
