"""Weight formats side by side: plain steps, what more rows cost, decoding with drafts, perplexity, llama.cpp.

    python benchmarks/formats.py --threads 2 --save
    python benchmarks/formats.py --text DATA/wikitext-2/test.txt --llama-cpp build/llama-cpp --threads 2 --save

All formats of one model are loaded and take turns: at every width of a pass, on every prompt and every window of
the text; before that each is loaded by processes of its own, which tell seconds and memory. How fast the vector
unit multiplies at most is measured between passes (arithmetic.py): none can be shorter than its products. Decoding
is greedy and goes on past ends of sequence, so that everybody makes as many tokens. A ratio is of seconds of the
prompts together, with a 95% interval over prompts; bandwidth is measured in the same run.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import record
import torch
from arithmetic import Peak
from passes import timed_pass
from tables import formats_table

import layerskip
from layerskip.decode.load import resolve_device
from layerskip.decode.weight_formats import step_bytes
from layerskip.errors import UserError
from layerskip.measure import prompt_file
from layerskip.measure.intervals import ratio_of_sums, resampled
from layerskip.measure.lines import read_prompts
from layerskip.measure.results import named
from layerskip.measure.speed.card import BUFFER_BYTES, bandwidth
from layerskip.model.native.formats import FORMATS
from layerskip.model.step import Step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from layerskip.decode.language_model import LanguageModel

FULL = "bfloat16"
WIDTHS = (1, 2, 4, 6, 9, 12, 16)
CONTEXT = 128
WINDOW = 512
WARM = 10  # passes after which a model's weights are where decoding has them
PROCESSES = 3  # of each format
OWN_PROCESS = """
import resource, sys, time
import torch, transformers.models.llama.modeling_llama
import layerskip
from layerskip.decode import language_model
model, quantize, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
imports, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
lm = layerskip.load(model, dtype="bfloat16", quantize=quantize or None)
seconds = time.perf_counter() - began
lm.generate([lm.encode("What do bees do in winter?")[0]] * 64, max_new_tokens=128, eos_token_id=())
print(seconds, imports, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def processes(model: str, threads: int) -> dict[str, Any]:
    """Seconds of loading, imports done, and megabytes at the peak, of processes that load a format and decode."""
    told: dict[str, list[list[float]]] = {name: [] for name in (FULL, *FORMATS)}
    for turn in range(PROCESSES + 1):  # the first one may make what the others read
        for name, found in told.items():
            command = [sys.executable, "-c", OWN_PROCESS, model, "" if name == FULL else name, str(threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UserError(f"a process that loads {name} failed: {done.stderr[-500:]}")
            if turn:
                found.append([float(x) for x in done.stdout.split()[-3:]])
    kinds = ("load_s", "imports_mb", "peak_mb")
    scale = (1.0, 1024 / 1e6, 1024 / 1e6)
    rows = {
        name: {
            kind: by * statistics.median(one[i] for one in found)
            for i, (kind, by) in enumerate(zip(kinds, scale, strict=True))
        }
        for name, found in told.items()
    }
    return {name: row | {"of_full": row["peak_mb"] / rows[FULL]["peak_mb"]} for name, row in rows.items()}


@torch.inference_mode()
def steps(models: Mapping[str, LanguageModel], repeats: int, threads: int) -> dict[str, Any]:
    """Seconds of a pass over one position, of so many over those, and what multiplications alone take at the least.

    Twice: as decoding has it, a model's weights kept in the last cache as far as they fit, and from memory, another
    model's weights read in between. Medians of turns; the peak of the vector unit is measured in every one.
    """
    tokens = torch.arange(CONTEXT + max(WIDTHS))[None] % 40_000
    caches = {name: lm.stack.new_cache(1, CONTEXT + max(WIDTHS)) for name, lm in models.items()}
    peak, rates = Peak(), {name: list[float]() for name in models}
    kept: dict[tuple[str, int], list[float]] = {}
    fresh: dict[tuple[str, int], list[float]] = {}

    def run(name: str, start: int, count: int) -> float:
        return timed_pass(models[name].stack, caches[name], tokens, start, count)

    for name in models:
        run(name, 0, CONTEXT)
    for turn in range(repeats + 2):
        for width in WIDTHS:
            for name in models:
                if turn >= 2:
                    fresh.setdefault((name, width), []).append(run(name, CONTEXT, width))
        for name in models:
            rates[name].append(peak(name, threads))
            for _ in range(WARM):
                run(name, CONTEXT, 1)
            for width in WIDTHS:
                if turn >= 2:
                    kept.setdefault((name, width), []).append(run(name, CONTEXT, width))
    weights = step_bytes(models[FULL]) / 2
    told: dict[str, Any] = {}
    for name in models:
        rate = statistics.median(rates[name])
        least = weights / rate
        told[name] = _rows(name, kept, least) | {
            "from_memory": _rows(name, fresh, least),
            "products_per_s": rate,
        }
    return told


def _rows(name: str, seconds: Mapping[tuple[str, int], list[float]], least: float) -> dict[str, Any]:
    """A pass over one position, and how many of it others take; `least` are the seconds of one's products."""
    one = statistics.median(seconds[name, 1])
    return {
        "step_s": one,
        "over_one": {w: statistics.median(seconds[name, w]) / one for w in WIDTHS},
        "least_over_one": {w: w * least / one for w in WIDTHS},
    }


def decoding(
    models: Mapping[str, LanguageModel], prompts: Sequence[list[int]], budget: int, peer: Any
) -> dict[str, Any]:
    """Plain decoding and the default, each format in turn on every prompt; llama.cpp between them."""
    runs: dict[str, list[tuple[float, float, list[int]]]] = {}
    for index, prompt in enumerate(prompts):
        for name, lm in models.items():
            for way, options in (("plain", {"mode": "ar"}), ("drafts", {})):
                out = lm.generate(prompt, max_new_tokens=budget, eos_token_id=(), **options)
                told = (out.stats["prefill_s"], out.stats["decode_s"], out.tokens)
                runs.setdefault(f"{name} {way}", []).append(told)
        for threads in (1, 2) if peer is not None else ():
            answer = peer.decode(prompt, budget, threads)
            told = (answer.first_s, answer.decode_s, answer.tokens)
            runs.setdefault(f"llama.cpp {threads}", []).append(told)
        print(f"prompt {index + 1} of {len(prompts)}", file=sys.stderr, flush=True)
    seconds = {name: np.array([told[1] for told in found]) for name, found in runs.items()}
    peers = [name for name in runs if name.startswith("llama.cpp")]
    best = min(peers, key=lambda name: seconds[name].sum(), default=None)
    result: dict[str, Any] = {"prompts": len(prompts), "new_tokens": budget, "best_llama_cpp": best}
    for name, found in runs.items():
        row: dict[str, Any] = {
            "tokens_per_s": (budget - 1) * len(found) / float(seconds[name].sum()),
            "first_token_s": statistics.median(told[0] for told in found),
        }
        if name != f"{FULL} plain":
            row["over_full"] = ratio_of_sums(seconds[f"{FULL} plain"], seconds[name]).record()
        if best is not None and name != best:
            row["over_llama_cpp"] = ratio_of_sums(seconds[best], seconds[name]).record()
        if name.endswith("drafts"):
            plain = runs[name.replace("drafts", "plain")]
            row["equal"] = sum(a[2] == b[2] for a, b in zip(found, plain, strict=True))
            row["over_own_plain"] = ratio_of_sums(
                seconds[name.replace("drafts", "plain")], seconds[name]
            ).record()
        result[name] = row
    return result


@torch.inference_mode()
def perplexity(models: Mapping[str, LanguageModel], text: str, windows: int) -> dict[str, Any]:
    """Perplexity per token in windows, and what each format adds to it, paired by window."""
    ids = next(iter(models.values())).encode(text)[: windows * WINDOW]
    sums: dict[str, list[float]] = {name: [] for name in models}
    for start in range(0, len(ids) - WINDOW + 1, WINDOW):
        window = torch.tensor([ids[start : start + WINDOW]])
        for name, lm in models.items():
            stack = lm.stack
            step = Step.span([0], [0], [WINDOW], stack.device, spill=WINDOW)
            h, _ = stack.run(stack.embed(window, step), 0, stack.num_layers, step, stack.new_cache(1, WINDOW))
            laws = stack.logits(h)[0, :-1].log_softmax(-1)
            sums[name].append(-float(laws.gather(1, window[0, 1:, None]).mean()))
        print(f"window {start // WINDOW + 1} of {len(ids) // WINDOW}", file=sys.stderr, flush=True)
    told: dict[str, Any] = {"tokens": len(sums[FULL]) * (WINDOW - 1)}
    for name, found in sums.items():
        own = {"perplexity": math.exp(statistics.mean(found))}
        if name != FULL:
            away = np.array(found) - np.array(sums[FULL])
            ends = resampled(lambda x: x.mean(-1), away)
            own["cost"] = {"mean": math.expm1(away.mean()), "ci95": [math.expm1(end) for end in ends]}
        told[name] = own
    return told


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    device = resolve_device("cpu")
    loaded = processes(arguments.model, arguments.threads)
    names = [FULL, *FORMATS]
    models = {
        name: layerskip.load(arguments.model, dtype="bfloat16", quantize=None if name == FULL else name)
        for name in names
    }
    speed = bandwidth(device, BUFFER_BYTES)
    result: dict[str, Any] = {"bandwidth_gb_s": speed, "processes": loaded}
    result["steps"] = steps(models, arguments.repeats, arguments.threads)
    for name, lm in models.items():
        own = result["steps"][name]
        own["bytes"] = step_bytes(lm)
        own["bandwidth_share"] = own["bytes"] / own["from_memory"]["step_s"] / (1e9 * speed)
        own["faster"] = result["steps"][FULL]["step_s"] / own["step_s"]
    lm = models[FULL]
    lines = read_prompts(arguments.prompts, None)[: arguments.limit]
    prompts = [lm.encode(line.content, chat=lm.has_template) for line in lines]
    peer = None
    if arguments.llama_cpp is not None:
        from peers.llama_cpp import LlamaCpp

        peer = LlamaCpp(arguments.llama_cpp)
    result["decoding"] = decoding(models, prompts, arguments.max_new_tokens, peer)
    if peer is not None:
        peer.close()
    if arguments.text is not None:
        result["text"] = perplexity(models, arguments.text.read_text(encoding="utf-8"), arguments.windows)
    result["configuration"] = record.configuration(arguments, device)
    print("\n".join(formats_table(result)))
    if arguments.save:
        record.save(result, "formats", arguments.name or named(arguments.model), "cpu")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-base")
    parser.add_argument(
        "--prompts", type=Path, default=prompt_file(), help="JSON lines; default: those of the package"
    )
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=25, help="turns of the steps")
    parser.add_argument("--text", type=Path, help="text for perplexity")
    parser.add_argument("--windows", type=int, default=60, help="of it")
    parser.add_argument("--llama-cpp", type=Path, help="folder for node-llama-cpp; measures it too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", help="what the result file calls the model")
    parser.add_argument("--save", action="store_true", help="write a file into benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    record.run(main)
