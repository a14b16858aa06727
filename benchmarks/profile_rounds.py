"""Where a round's time goes: matrix work, attention, norms, cache writes, sampling, Python.

    python benchmarks/profile_rounds.py --exit-layer 6 --draft-length 4
    python benchmarks/profile_rounds.py --dtype bfloat16 --draft-vocab 8192

Each mode decodes a prompt twice: once alone, for the wall time of a round, and once under torch.profiler, for the
shares of the operations. The profiler slows every operation down by some microseconds, so small operations look
larger than they are and the profiled wall time is longer: both wall times are printed, and "Python and the rest"
is what the profiled wall time leaves over, the profiler's own work included. A norm that a model spells out as
multiplications and means counts as element-wise. Times are the operations' own (self)
time; on CUDA that of the kernels, which run beside Python.

(Not called profile.py: a script's folder comes first on the path, and Python's own cProfile imports `profile`.)
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

import layerskip
from layerskip import Round
from layerskip.measure import prompt_file

REST = "Python and the rest"
# The first category that has a word of the operation's name: the order matters.
CATEGORIES = {
    "attention": "scaled_dot_product flash fmha attention softmax",
    "norms": "norm rsqrt",
    "matrix work": "linear addmm ::mm matmul bmm gemm gemv _weight_int8pack cutlass nvjet",
    "cache writes and copies": "copy index_put scatter memcpy slice_backward ::cat _to_copy contiguous",
    "sampling and argmax": "argmax ::max aten::sort topk cumsum multinomial item isfinite local_scalar",
    "embedding": "embedding index_select gather ::index",
    "element-wise": "swiglu mul add silu gelu sigmoid tanh neg div sub pow mean where cos sin elementwise triton",
    "views and allocation": (
        "view reshape transpose empty expand slice select as_strided split unsqueeze squeeze narrow "
        "permute resize detach alias zero fill arange ::to unbind lift"
    ),
}


def named_kernels(kernels) -> None:
    """Let the profiler see the compiled regions, which it cannot by itself."""
    for name in (
        ("norm", "glu", "product", "best", "drafts", "attention", "layers") if kernels is not None else ()
    ):
        call = getattr(kernels, name)

        def recorded(*arguments, _name=name, _call=call):
            with record_function(f"compiled {_name}"):
                return _call(*arguments)

        setattr(kernels, name, recorded)


def category(operation: str) -> str:
    name = operation.lower()
    found = (kind for kind, words in CATEGORIES.items() if any(word in name for word in words.split()))
    return next(found, "other operations")


def decoding(lm, prompt: list[int], options: dict) -> Iterator[Round]:
    """Prefill, and return the rounds that are still to come."""
    rounds = lm.stream(prompt, eos_token_id=[], **options)
    next(round for round in rounds if round.tokens)
    return rounds


def decode(lm, prompt: list[int], options: dict) -> tuple[float, int]:
    """Decode; returns wall seconds after the first token, and the number of rounds."""
    rounds = decoding(lm, prompt, options)
    began = time.perf_counter()
    count = sum(1 for _ in rounds)
    return time.perf_counter() - began, count


def profiled(lm, prompt: list[int], options: dict) -> tuple[dict[str, float], float, int]:
    """Decode under the profiler: seconds per category, wall seconds after prefill, rounds."""
    cuda = lm.stack.device.type == "cuda"
    rounds = decoding(lm, prompt, options)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as recorded:
        began = time.perf_counter()
        count = sum(1 for _ in rounds)
        wall = time.perf_counter() - began
    seconds: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages():
        own = event.self_device_time_total if cuda else event.self_cpu_time_total  # microseconds
        # On CUDA only the kernels count: their times are attributed a second time to the operations behind them.
        if own > 0 and (not cuda or event.device_type == DeviceType.CUDA):
            seconds[category(event.key)] += own / 1e6
    return dict(seconds), wall, count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-base")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quantize", help="int8")
    parser.add_argument("--stack", default="auto", help="native, hf or auto")
    parser.add_argument("--exit-layer", type=int)
    parser.add_argument("--draft-length", type=int)
    parser.add_argument("--draft-vocab", default="auto", help="a number, auto or off")
    parser.add_argument("--simulate-acceptance", type=float, help="accepted/drafted to pretend")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--modes", default="ar,self-speculative")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lm = layerskip.load(
        arguments.model, dtype=arguments.dtype, device=arguments.device, stack=arguments.stack,
        quantize=arguments.quantize,
    )  # fmt: skip
    named_kernels(getattr(lm.stack, "kernels", None))
    text = json.loads(prompt_file().read_text(encoding="utf-8").splitlines()[0])["prompt"]
    prompt = lm.encode(text, chat=lm.has_template)
    vocab = int(arguments.draft_vocab) if arguments.draft_vocab.isdecimal() else arguments.draft_vocab
    for mode in arguments.modes.split(","):
        options = {"mode": mode, "max_new_tokens": arguments.max_new_tokens}
        if mode == "self-speculative":
            options |= {
                "exit_layer": arguments.exit_layer,
                "draft_length": arguments.draft_length,
                "draft_vocab": vocab,
                "simulate_acceptance": arguments.simulate_acceptance,
            }
        decode(lm, prompt, options)  # warms up
        alone, count = decode(lm, prompt, options)
        seconds, wall, _ = profiled(lm, prompt, options)
        walls = f"{1e3 * alone / count:.2f} ms each; {1e3 * wall / count:.2f} ms under the profiler"
        print(f"\n{mode}: {count} rounds, {walls}")
        if wall < alone:
            print("  (the profiled run was the faster one: the machine was busy, take the shares with care)")
        seconds[REST] = max(0.0, wall - sum(seconds.values()))
        for name, spent in sorted(seconds.items(), key=lambda item: -item[1]):
            print(f"  {name:<26}{1e3 * spent / count:>9.3f} ms{100 * spent / wall:>7.1f}%")


if __name__ == "__main__":
    main()
