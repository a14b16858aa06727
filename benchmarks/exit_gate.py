"""The gate before a long run: what short runs of different settings teach the exits, and what it would be worth.

    layerskip train smollm2-135m data=own.jsonl output=RUNS/all steps=40 ...     # one short run for each setting
    python benchmarks/exit_gate.py RUNS/* --held gsm.jsonl --held code.jsonl --text wiki.txt --save

Held-out lines are what `distill-data` wrote: prompts and the base's own greedy answers. Per run and kind of
prompt: agreement of every exit with the run's own last layer along these answers (inside the draft vocabulary), how
often the last layer still says what the base said, and the speed-up the cost model in layers predicts for the best
(E, K), rounds replayed exactly. Perplexity of the whole model on running text tells what training cost.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import record
import torch

import layerskip
from layerskip.decode.options import Options
from layerskip.measure.exits.evaluation import windows
from layerskip.measure.exits.replay import joined, replay
from layerskip.measure.exits.states import chunks
from layerskip.model.cost import Cost
from layerskip.model.head import draft_ids

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel

LENGTHS = range(1, 9)
WINDOW = 512


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs")
    parser.add_argument("--base", default="smollm2-135m-base", help="the model they started from")
    parser.add_argument("--held", action="append", type=Path, required=True, help="distilled, not trained on")
    parser.add_argument("--text", type=Path, required=True, help="running text for perplexity")
    parser.add_argument("--windows", type=int, default=24, help=f"windows of {WINDOW} tokens of the text")
    parser.add_argument("--limit", type=int, default=24, help="held-out lines of each file")
    parser.add_argument("--exits", default="2,3,4,5,6,8")
    parser.add_argument("--draft-vocab", type=int, default=8192)
    parser.add_argument("--vocab-from", action="append", type=Path, default=[], help="training data to count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/exit-gate_*.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    exits = [int(k) for k in given.exits.split(",")]
    held = {path.name.split(".")[0]: _lines(path, given.limit) for path in given.held}
    ids = frequent(given.vocab_from, given.draft_vocab)
    result: dict[str, Any] = {"runs": {}}
    reference = None
    for name, model in {"base": given.base, **{path.name: path for path in given.runs}}.items():
        lm = layerskip.load(str(model), dtype="bfloat16", device="cpu")
        told = judged(lm, held, exits, ids, given.draft_vocab)
        told["perplexity"] = perplexity(lm, given.text, given.windows)
        reference = reference or told["perplexity"]
        told["perplexity_ratio"] = told["perplexity"] / reference
        told["recipe"] = _recipe(model)
        result["runs"][name] = told
        print(_line(name, told), flush=True)
    result["configuration"] = record.configuration(given, torch.device("cpu"))
    if given.save:
        record.save(result, "exit-gate", "smollm2-135m")


def frequent(files: list[Path], size: int) -> list[int]:
    """Rank the tokens of the answers in distilled files, the draft vocabulary a run would ship with."""
    counts = np.zeros(0, np.int64)
    for line in (line for path in files for line in _lines(path, None)):
        own = [t for t, m in zip(line["input_ids"], line["completion_mask"], strict=True) if m]
        found = np.bincount(own)
        longer, shorter = (found, counts) if len(found) > len(counts) else (counts, found)
        longer[: len(shorter)] += shorter
        counts = longer
    order = np.argsort(-counts, kind="stable") if len(counts) else []
    return [int(token) for token in order][:size]


@torch.inference_mode()
def judged(
    lm: LanguageModel,
    held: dict[str, list[dict[str, Any]]],
    exits: list[int],
    vocabulary: list[int],
    size: int,
) -> dict[str, Any]:
    """Read every exit along the base's answers; the last token of a line is only predicted."""
    ids = draft_ids(size, lm.stack.vocab_size, vocabulary, lm.eos_ids(Options()))
    shared = lm.stack.reduced_head(ids)
    heads = dict.fromkeys(exits, shared)
    if lm.facts.draft_head is not None:  # read through a map: by rows of its own
        given = {"exit_layer": lm.facts.exits[0], "draft_length": 1, "draft_vocab": size}
        heads[lm.facts.exits[0]] = lm.draft_head(Options.parse(given)) or shared
    layers = lm.stack.num_layers
    head_layers = lm.stack.head_bytes / lm.stack.layer_bytes
    draft = head_layers * shared.size / lm.stack.vocab_size
    kinds: dict[str, Any] = {}
    for kind, lines in held.items():
        sequences = [line["input_ids"] for line in lines]
        firsts = [line["completion_mask"].index(1) - 1 for line in lines]
        bits: dict[int, list[list[np.ndarray]]] = {e: [[] for _ in lines] for e in exits}
        kept = total = 0
        for chunk in chunks(lm.stack, sequences, exits, firsts):
            wanted = torch.tensor(sequences[chunk.sequence][1:])[chunk.positions.start : chunk.positions.stop]
            full = chunk.full.argmax(-1)[: len(wanted)]
            kept, total = kept + int((full == wanted).sum()), total + len(wanted)
            for e in exits:
                own = heads[e].ids[chunk.logits(e, heads[e]).argmax(-1)][: len(wanted)]
                bits[e][chunk.sequence].append((own == full).numpy())
        rows = {e: [np.concatenate(parts) for parts in bits[e]] for e in exits}
        cells = {}
        for e in exits:
            for k in LENGTHS:
                rounds = joined([replay(row, k) for row in rows[e]])
                cost = Cost(layers, e, head_layers, draft)
                cells[e, k] = cost.speedup(k, rounds.tokens_per_round)
        best = max(cells, key=cells.__getitem__)
        kinds[kind] = {
            "agreement": {str(e): float(np.concatenate(rows[e]).mean()) for e in exits},
            "fidelity": kept / total,
            "tokens": total,
            "best": {"exit_layer": best[0], "draft_length": best[1], "predicted_speedup": cells[best]},
            "by_exit": {str(e): max(cells[e, k] for k in LENGTHS) for e in exits},
        }
    return {"kinds": kinds}


@torch.inference_mode()
def perplexity(lm: LanguageModel, text: Path, limit: int) -> float:
    tokens = lm.tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    nll, count = 0.0, 0
    cut = windows(tokens, WINDOW)[:limit]
    for chunk in chunks(lm.stack, cut, []):
        wanted = torch.tensor(cut[chunk.sequence][1:])[chunk.positions.start : chunk.positions.stop]
        logits = chunk.full[: len(wanted)]
        nll += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        count += len(wanted)
    return math.exp(nll / count)


def _lines(path: Path, limit: int | None) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file][:limit]


def _recipe(model: Any) -> str | None:
    path = Path(model) / "recipe.yaml"
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith(("data:", "eval_data:", "output:")))


def _line(name: str, told: dict[str, Any]) -> str:
    parts = [f"{name:14} perplexity {told['perplexity']:.2f} ({told['perplexity_ratio']:.3f})"]
    for kind, found in told["kinds"].items():
        agreement = " ".join(f"{e}:{a:.2f}" for e, a in found["agreement"].items())
        best = found["best"]
        parts.append(
            f"{kind:10} kept {found['fidelity']:.3f}  {agreement}  "
            f"best E{best['exit_layer']} K{best['draft_length']} {best['predicted_speedup']:.2f}"
        )
    return "\n    ".join(parts)


if __name__ == "__main__":
    main()
