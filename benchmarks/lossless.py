"""Is the output really identical? Self-speculation against plain decoding on real prompts, token by token.

    python benchmarks/lossless.py --dtype float32 [--save]
    python benchmarks/lossless.py --dtype bfloat16 [--save]

In float32 every output must be equal, to Hugging Face `generate` too. In 16 bit the native stack on the CPU keeps
the promise against its own plain decoding (`row_exact`); elsewhere verification of several rows uses other kernels
than a single row, and rounding may turn over a near tie: the script reports the exact-match rate and, for every
first divergence, how far the two best logits of the target were apart there (in float32, and in units of the last
place of the dtype at that size).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import time
from pathlib import Path

import torch
import transformers

import layerskip

HERE = Path(__file__).parent


def first_divergence(a: list[int], b: list[int]) -> int | None:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
        None if a == b else min(len(a), len(b)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-base")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stack", default="auto", help="native, hf or auto")
    parser.add_argument("--quantize", help="int8")
    parser.add_argument("--draft-vocab", type=int, help="tokens the draft head knows")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, default=10, help="prompts")
    parser.add_argument("--cells", default="6x8,15x4,29x3", help="ExK, comma-separated")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/lossless_*.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lm = layerskip.load(
        arguments.model, dtype=arguments.dtype, device=arguments.device, stack=arguments.stack,
        quantize=arguments.quantize,
    )  # fmt: skip
    hf = (
        lm.hf
        or layerskip.load(arguments.model, dtype=arguments.dtype, device=arguments.device, stack="hf").hf
    )
    lines = (HERE / "prompts.jsonl").read_text().splitlines()[: arguments.limit]
    prompts = [lm.encode([{"role": "user", "content": json.loads(line)["prompt"]}]) for line in lines]
    new = arguments.max_new_tokens
    common = {"max_new_tokens": new, "eos_token_id": []}
    plain = [lm.generate(prompt, mode="ar", **common).tokens for prompt in prompts]
    cells = []
    for cell in arguments.cells.split(","):
        exit_layer, draft_length = map(int, cell.split("x"))
        outputs = [
            lm.generate(
                prompt,
                mode="self-speculative",
                exit_layer=exit_layer,
                draft_length=draft_length,
                draft_vocab=arguments.draft_vocab or "off",
                **common,
            )
            for prompt in prompts
        ]
        cells.append(
            report(
                lm,
                hf,
                f"self-speculative E={exit_layer} K={draft_length}",
                prompts,
                plain,
                [o.tokens for o in outputs],
            )
        )
        drafted, accepted = (sum(o.stats[key] for o in outputs) for key in ("drafted", "accepted"))
        cells[-1]["acceptance"] = accepted / drafted
    theirs = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=lm.stack.device)
        out = hf.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        theirs.append(out[0, len(prompt) :].tolist())
    cells.append(report(lm, hf, "Hugging Face generate", prompts, plain, theirs))
    result = {
        "cells": cells,
        "configuration": {
            **vars(arguments),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "commit": subprocess.run(
                ["git", "rev-parse", "HEAD"], capture_output=True, text=True
            ).stdout.strip(),
        },
    }
    if arguments.save:
        day = time.strftime("%Y-%m-%d")
        kind = "".join(
            f"_{part}" for part in (lm.stack.name, arguments.quantize, arguments.draft_vocab) if part
        )
        model = arguments.model.replace("/", "-")
        name = f"lossless_{model}_{arguments.dtype}{kind}_{arguments.device}_{day}.json"
        (HERE / "results" / name).write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: benchmarks/results/{name}")
    promised = (
        cells if arguments.dtype in ("float32", "float64") else cells[:-1] if lm.stack.row_exact else []
    )
    if any(cell["equal"] < len(prompts) for cell in promised):
        raise SystemExit("not lossless")


def report(lm, hf, name: str, prompts: list, plain: list, others: list) -> dict:
    """Count equal outputs; measure the target's top-two gap at each first divergence."""
    divergences = []
    for index, (prompt, a, b) in enumerate(zip(prompts, plain, others, strict=True)):
        at = first_divergence(a, b)
        if at is not None:
            with torch.no_grad():
                logits = hf(torch.tensor([prompt + a[:at]], device=lm.stack.device)).logits[0, -1].float()
            top = logits.topk(2)
            spacing = torch.finfo(lm.stack.dtype).eps * 2.0 ** math.floor(
                math.log2(top.values[0].abs().item())
            )
            gap = (top.values[0] - top.values[1]).item()
            divergences.append(
                {
                    "prompt": index,
                    "position": at,
                    "gap": gap,
                    "gap_in_ulp": gap / spacing,
                    "both_among_top_two": {a[at], b[at]} <= set(top.indices.tolist()),
                }
            )
    equal = len(plain) - len(divergences)
    print(f"{name}: {equal} of {len(plain)} outputs equal to plain decoding, {len(plain[0])} tokens each")
    for d in divergences:
        print(
            f"  prompt {d['prompt']}: first differs at token {d['position']}, the target's two best logits are "
            f"{d['gap']:.4f} apart ({d['gap_in_ulp']:.1f} units in the last place), both candidates among them: "
            f"{d['both_among_top_two']}"
        )
    return {
        "name": name,
        "equal": equal,
        "of": len(plain),
        "tokens": len(plain[0]),
        "divergences": divergences,
    }


if __name__ == "__main__":
    main()
