"""What our loop costs: plain decoding against Hugging Face `generate`, self-speculation at acceptance 100%.

    python benchmarks/overhead.py [--save]

Acceptance is made 100% by zeroing the output projections (o_proj, down_proj) of the layers [E, L): every exit
from E on then equals the full model, all work is still done, and what remains is pure overhead. The methods of a
trial run in turn (A B C, A B C, ...), every ratio is taken within a trial, and the median over prompts and trials
is printed with a bootstrap interval. Equality of the tokens is checked first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import time
from pathlib import Path

import torch
import transformers

import layerskip
from layerskip.model.cost import Cost

HERE = Path(__file__).parent


def timed(work):
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def interval(ratios: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Median and 95% bootstrap interval."""
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[50], medians[1949]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-base")
    parser.add_argument("--exit-layer", type=int, default=6)
    parser.add_argument("--draft-length", type=int, default=8)
    parser.add_argument("--limit", type=int, default=6, help="prompts")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/overhead_*.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    exit_layer, draft_length, new = arguments.exit_layer, arguments.draft_length, arguments.max_new_tokens

    lm = layerskip.load(arguments.model, dtype="float32", device="cpu", stack="hf")
    hf = lm.hf
    lines = (HERE / "prompts.jsonl").read_text().splitlines()[: arguments.limit]
    prompts = [lm.encode([{"role": "user", "content": json.loads(line)["prompt"]}]) for line in lines]

    def ours(prompt, **options):
        done = lm.generate(prompt, max_new_tokens=new, eos_token_id=[], **options)
        return done.tokens, done.stats

    def hugging_face(prompt, **options):
        ids = torch.tensor([prompt])
        out = hf.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new,
            eos_token_id=None, pad_token_id=0, **options,
        )  # fmt: skip
        return out[0, len(prompt) :].tolist(), {}

    assistant = hf.generation_config  # as keyword arguments these do not reach the assistant
    assistant.num_assistant_tokens = draft_length
    assistant.num_assistant_tokens_schedule = "constant"
    assistant.assistant_confidence_threshold = 0.0

    plain = {"ours": lambda p: ours(p, mode="ar"), "hf": hugging_face}
    speculative = {
        "ours": plain["ours"],
        "ours self-speculative": lambda p: ours(
            p, mode="self-speculative", exit_layer=exit_layer, draft_length=draft_length
        ),
        "hf": hugging_face,
        "hf assistant_early_exit": lambda p: hugging_face(p, assistant_early_exit=exit_layer),
    }
    report = {
        "plain": compare(plain, prompts, arguments.trials, [("ours", "hf")]),
    }
    layers = hf.model.layers
    with torch.no_grad():
        for layer in layers[exit_layer:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    pairs = [
        ("ours self-speculative", "ours"),
        ("ours self-speculative", "hf assistant_early_exit"),
        ("hf assistant_early_exit", "hf"),
        ("ours", "hf"),
    ]
    report["acceptance 100%"] = compare(speculative, prompts, arguments.trials, pairs)
    head = lm.stack.vocab_size * lm.stack.width / sum(p.numel() for p in layers[0].parameters())
    cost = Cost(layers=len(layers), early=exit_layer, head=head, draft_head=head)
    report["limit"] = cost.speedup(draft_length, draft_length + 1)
    print(f"\nlimit of the cost model at E={exit_layer}, K={draft_length}: {report['limit']:.2f} x")
    report["configuration"] = {
        **vars(arguments),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": cpu_name(),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
    }
    if arguments.save:
        name = f"overhead_{arguments.model.replace('/', '-')}_cpu_{time.strftime('%Y-%m-%d')}.json"
        path = HERE / "results" / name
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written: benchmarks/results/{name}")


def compare(methods: dict, prompts: list, trials: int, pairs: list[tuple[str, str]]) -> dict:
    """Check equality, then time the methods in turn on every prompt; print and return the ratios."""
    reference = [methods["ours"](prompt)[0] for prompt in prompts]
    acceptance = {}
    for name, method in methods.items():  # the warm-up is the equality check
        outputs = [method(prompt) for prompt in prompts]
        equal = sum(tokens == expected for (tokens, _), expected in zip(outputs, reference, strict=True))
        print(f"equal to our plain decoding: {name}: {equal} of {len(prompts)}")
        if outputs[0][1].get("drafted"):
            acceptance[name] = sum(s["accepted"] for _, s in outputs) / sum(s["drafted"] for _, s in outputs)
            print(f"  acceptance {acceptance[name]:.3f}")
        if equal != len(prompts):
            raise SystemExit(f"{name} gives other tokens: no speed is worth printing")
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(trials):
        for prompt in prompts:
            for name, method in methods.items():
                seconds[name].append(timed(lambda m=method, p=prompt: m(p))[1])
    speedups = {}
    for fast, slow in pairs:
        ratios = [s / f for f, s in zip(seconds[fast], seconds[slow], strict=True)]
        median, low, high = interval(ratios)
        speedups[f"{fast} / {slow}"] = {"median": median, "ci95": [low, high]}
        print(f"speed of {fast} over {slow}: {median:.3f} x  [{low:.3f}, {high:.3f}]")
    return {"seconds": seconds, "acceptance": acceptance, "speedup": speedups}


def cpu_name() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            return next(
                (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), ""
            )
    return platform.processor()


if __name__ == "__main__":
    main()
