"""Train economize's drafters on the answers our adapter learns from, for sources.py to compare.

    python benchmarks/peer_training.py --data OWN.jsonl --tokens 500000 --output PEERS --threads 2
    layerskip train exit-adapter model=smollm2-135m-base data=PEERS/data.jsonl output=OURS epochs=1
    python benchmarks/sources.py --data DATA --model OURS --peers PEERS --limit 2 --save \\
        --methods ar,exit,hf,economize-plain,economize-jump,economize-early_exit

economize (Apache-2.0, from PyPI) is no dependency of ours: `pip install economize==0.3.2`. Drafters are trained
by its own `fit` with its own losses and rates, one pass over the lines. Settings are those of its card, in the same
share of the depth: a jump over two thirds of it with a linear predictor, and an exit after an eighth, all layers
frozen; in float32, twice as fast here as bfloat16. The jump's training rolls drafts out and takes hours on two
cores; the command goes on from its last checkpoint. PEERS/data.jsonl are the lines that were read, PEERS/NAME the
drafters, PEERS/told.json sizes and the seconds of the last sitting.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from layerskip.checkpoint.resolve import resolve
from layerskip.model.threads import keep_memory


def configurations(layers: int) -> dict[str, Any]:
    """The settings of its card, for a model of so many layers."""
    import economize
    from economize.techniques.early_exit import EarlyExitConfig

    middle = 2 * layers // 3
    jump = economize.JumpConfig(
        target_layer=middle, source_layer=middle + 1, exit_layer=middle + 1, predictor="linear"
    )
    return {"early_exit": EarlyExitConfig(exit_layer=max(1, layers // 8)), "jump": jump}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, action="append", required=True, help="what distill-data wrote")
    parser.add_argument("--model", default="smollm2-135m-base")
    parser.add_argument("--tokens", type=int, default=500_000, help="of answers")
    parser.add_argument("--length", type=int, default=512, help="of a row; the rest is left out")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    import economize
    from economize.train import fit
    from economize.train.data import Example

    torch.set_num_threads(given.threads)
    keep_memory()
    given.output.mkdir(parents=True, exist_ok=True)
    taken, count = [], 0
    for line in (
        line for path in given.data for line in path.read_text(encoding="utf-8").split("\n") if line
    ):
        taken.append(line)
        count += sum(json.loads(line)["completion_mask"])
        if count >= given.tokens:
            break
    (given.output / "data.jsonl").write_text("\n".join([*taken, ""]), encoding="utf-8")
    rows = [json.loads(line) for line in taken]
    rows = [
        Example(
            torch.tensor(row["input_ids"][: given.length]),
            torch.tensor(row["completion_mask"][: given.length]),
        )
        for row in rows
        if any(row["completion_mask"][: given.length])
    ]
    kept = given.output / "told.json"
    told: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    told |= {"tokens": count, "rows": len(rows), "economize": economize.__version__}
    for name in configurations(24):
        if (given.output / name).is_dir():
            continue
        hf = transformers.AutoModelForCausalLM.from_pretrained(
            resolve(given.model), dtype=torch.bfloat16
        ).float()
        model = economize.apply(hf, configurations(hf.config.num_hidden_layers)[name])
        began = time.perf_counter()
        fit(
            model, rows, steps=len(rows) // given.batch, batch_size=given.batch, log_every=10, seed=0,
            output_dir=given.output / f"{name}.run", save_every=20, keep_checkpoints=1, resume=True,
            callbacks=[functools.partial(print, name, flush=True)],
        )  # fmt: skip
        size = sum(parameter.numel() for parameter in model.technique_parameters())
        told[name] = {"train_s": time.perf_counter() - began, "parameters": size}
        model.save_pretrained(str(given.output / name))
        kept.write_text(json.dumps(told) + "\n", encoding="utf-8")
        print(name, told[name], flush=True)


if __name__ == "__main__":
    main()
