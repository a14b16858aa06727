"""What training the exits cost the full model: perplexity and scores of all layers, trained model against its base.

    python benchmarks/builtin_cost.py --data DATA --threads 2 --save

DATA holds wikitext-2/test.txt, human-eval/HumanEval.jsonl and gsm8k/test.jsonl.gz. The text is cut into windows of
1,024 tokens that do not overlap, the first --windows of them are read; HumanEval and GSM8K are decoded plainly,
--batch rows together, and scored as `layerskip eval` does. Differences are paired, by window and by item.

Every finished window and item is a line in the work folder: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import record
import torch

import layerskip
from layerskip.checkpoint.facts import fingerprint
from layerskip.decode.load import resolve_device
from layerskip.decode.options import Options
from layerskip.measure.exits.evaluation import Text, judged, perplexity, read_text, windows
from layerskip.measure.intervals import resampled
from layerskip.measure.records import Record, Records, work_folder
from layerskip.measure.results import named
from layerskip.measure.speed.methods import AR, SELF_SPECULATIVE
from layerskip.measure.tasks import generation as tasks

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel

MODEL, BASE = "model", "base"
WINDOW = 1024
FILES = {
    "text": "wikitext-2/test.txt",
    tasks.HUMANEVAL: "human-eval/HumanEval.jsonl",
    tasks.GSM8K: "gsm8k/test.jsonl.gz",
}


def judged_windows(
    lm: LanguageModel, content: str, count: int, exits: Sequence[int], records: Records
) -> list[Record]:
    """Read the windows that are not on file yet; a record of sums for each, in order."""
    cut = windows(lm.encode(content), WINDOW)[:count]
    left = [i for i in range(len(cut)) if i not in records.found]
    texts = [Text(cut[i], {"text": range(len(cut[i]) - 1)}) for i in left]
    for i, sums in zip(left, judged(lm.stack, texts, exits), strict=True):
        records.keep({"index": i, **sums})
        print(f"text: window {i + 1} of {len(cut)}", file=sys.stderr, flush=True)
    return [records.found[i] for i in range(len(cut))]


def likelihoods(found: Sequence[Record], layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood at a layer and number of tokens, by window."""
    nll = [one["text"]["exits"][str(layers)]["nll"] for one in found]
    return np.array(nll), np.array([one["text"]["tokens"] for one in found], dtype=float)


def perplexities(found: Mapping[str, Sequence[Record]], exit_layer: int, layers: int) -> dict[str, Any]:
    """Perplexity per token of every model, and by how much the trained one's is above the base's."""
    told: dict[str, Any] = {}
    for who, records in found.items():
        (whole, tokens), (exit_alone, _) = (likelihoods(records, k) for k in (layers, exit_layer))
        told[who] = {
            "all_layers": perplexity(whole.sum() / tokens.sum()),
            "exit_alone": perplexity(exit_alone.sum() / tokens.sum()),
            "windows": len(records),
            "tokens": int(tokens.sum()),
        }
    if BASE in found:
        (a, tokens), (b, _) = (likelihoods(found[who], layers) for who in (MODEL, BASE))
        above = lambda x, y, n: np.exp((x.sum(-1) - y.sum(-1)) / n.sum(-1)) - 1  # noqa: E731
        told["relative_difference"] = {
            "mean": float(above(a, b, tokens)),
            "ci95": resampled(above, a, b, tokens),
        }
    return told


def scores(name: str, found: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """Scores of every model on a task, and their difference, paired by item."""
    told: dict[str, Any] = {"metric": tasks.METRICS[name], "items": len(found[MODEL])}
    by = {who: np.array([one["modes"][AR]["score"] for one in records]) for who, records in found.items()}
    for who, column in by.items():
        told[who] = {"score": float(column.mean()), "ci95": resampled(lambda x: x.mean(-1), column)}
    if BASE in found:
        paired = by[MODEL] - by[BASE]
        told["difference"] = {
            "mean": float(paired.mean()),
            "ci95": resampled(lambda x: x.mean(-1), paired),
            "only_model": int((paired > 0).sum()),
            "only_base": int((paired < 0).sum()),
        }
    return told


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    content = read_text(arguments.data / FILES["text"])
    limit = arguments.quality_limit or None
    items = {
        name: tasks.read(name, arguments.data / FILES[name], limit)
        for name in arguments.tasks.split(",")
        if name
    }
    device = resolve_device(arguments.device)
    names = {MODEL: arguments.model, BASE: arguments.base}
    text: dict[str, list[Record]] = {}
    answers: dict[str, dict[str, list[Record]]] = {name: {} for name in items}
    exit_layer = layers = 0
    for who, name in names.items():  # one model in memory at a time
        if not name:
            continue
        lm = layerskip.load(name, dtype=arguments.dtype, device=device)
        if who == MODEL:
            exit_layer, layers = lm.plan(Options(mode=SELF_SPECULATIVE)).exit_layer, lm.stack.num_layers
        common = {"weights": fingerprint(lm.path), "dtype": str(lm.stack.dtype).removeprefix("torch.")}
        common |= {"device": device.type, "stack": lm.stack.name}

        def kept(kind: str, who: str = who, common: dict[str, Any] = common, **more: Any) -> Records:
            data = hashlib.sha256((arguments.data / FILES[kind]).read_bytes()).hexdigest()[:16]
            setup = {**common, "data": data, **more}
            return Records(work_folder(arguments.work, f"builtin-cost-{kind}-{who}", setup))

        exits = sorted({exit_layer, layers})
        text[who] = judged_windows(lm, content, arguments.windows, exits, kept("text", exits=exits))
        for task, of_task in items.items():
            records = kept(task, max_new_tokens=arguments.max_new_tokens)
            tasks.run(
                lm,
                task,
                of_task,
                [AR],
                max_new_tokens=arguments.max_new_tokens,
                batch_size=arguments.batch,
                watch=lambda what, done, of, who=who: print(
                    f"{who}, {what}: {done} of {of}", file=sys.stderr, flush=True
                ),
                done=records.found.copy(),
                keep=records.keep,
            )
            answers[task][who] = [records.found[item.index] for item in of_task]
    result: dict[str, Any] = {
        "perplexity": perplexities(text, exit_layer, layers),
        "tasks": {task: scores(task, found) for task, found in answers.items()},
        "exit_layer": exit_layer,
        "configuration": record.configuration(arguments, device),
    }
    result["configuration"] |= {"dtype": common["dtype"], "stack": common["stack"]}
    from builtin_tables import builtin_cost_table

    print("\n".join(builtin_cost_table(result)))
    if arguments.save:
        record.save(
            result, "builtin-cost", arguments.name or named(arguments.model), common["dtype"], device.type
        )


def parsed() -> argparse.Namespace:
    parser = record.comparison(__doc__, f"{tasks.HUMANEVAL},{tasks.GSM8K}")
    parser.add_argument("--base", default="smollm2-135m-base", help="what it was before; '' for none")
    parser.add_argument("--windows", type=int, default=60, help="windows of text")
    parser.add_argument("--quality-limit", type=int, default=0, help="items of a task, the first; 0: all")
    parser.add_argument("--max-new-tokens", type=int, help="default: the task's own budget")
    parser.add_argument("--batch", type=int, default=48, help="items decoded together")
    return parser.parse_args()


if __name__ == "__main__":
    record.run(main)
