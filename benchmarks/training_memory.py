"""What exits cost in memory: the peak of a training step with 8 early exits on against 1.

    python benchmarks/training_memory.py --threads 2 --save
    python benchmarks/training_memory.py --layers 10 --rows 2 --length 64 --limit 1 --dtypes float32   # a rehearsal

Two parts. `step`: forward and backward pass of the whole model; beside it the model's own step ("plain"), whose
loss holds the logits of all positions. `loss`: the loss function alone over ready states, so that the backbone's
activations hide nothing; 0 early exits is the last layer by the same function. The peak with 8 exits should be at
most 1.15 x that with 1, over 4,096 tokens or more of a vocabulary of 49k.

Every case has a process of its own, and is repeated. Parameters, gradients and the optimiser's state are in memory
before the measurement starts and are not counted: counted is what the step adds at its peak, on the CPU the growth
of the resident set's high-water mark (pages of the C library's heap included), on CUDA of the allocator's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from typing import Any

import record
import torch
from training_speed import DTYPES, random_rows, spread, training_model

from layerskip.decode.load import resolve_device
from layerskip.measure.speed.memory import growth
from layerskip.train.objective.exits import ExitTraining
from layerskip.train.objective.loss import multi_exit_loss
from layerskip.train.objective.schedule import Schedule

WANTED, FEW, MANY = 1.15, 1, 8
PLAIN = -1  # stands for the model's own step among the numbers of early exits
CASES = {"step": (PLAIN, FEW, MANY), "loss": (0, FEW, MANY)}
MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-base")
    parser.add_argument("--layers", type=int, help="random weights with so many layers; at least 9")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="bfloat16 is autocast")
    parser.add_argument("--parts", default="step,loss")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--limit", type=int, default=3, help="processes per case")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/training-memory_*.json")
    parser.add_argument(
        "--case", help=argparse.SUPPRESS
    )  # part,dtype,early exits: measure it in this process
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.case:
        part, dtype, early = arguments.case.split(",")
        print(json.dumps(measured(arguments, part, DTYPES[dtype], int(early))))
        return
    device = resolve_device(arguments.device)
    tokens = arguments.rows * arguments.length
    print(
        f"{arguments.rows} x {arguments.length} = {tokens} tokens; MB the step adds at its peak, every process"
    )
    if tokens < 4096:
        print("  (under 4,096 tokens: what does not grow with them weighs more than it should)")
    print(f"| part | dtype | early exits on | peak, MB | over {FEW} early exit | |\n" + "| --- " * 6 + "|")
    results = [
        compared(arguments, part, dtype)
        for part in arguments.parts.split(",")
        for dtype in arguments.dtypes.split(",")
    ]
    if arguments.save:
        arguments.threads = torch.get_num_threads()
        result = {"results": results, "configuration": record.configuration(arguments, device)}
        record.save(result, "training-memory", arguments.model, device.type)


def compared(arguments: argparse.Namespace, part: str, dtype: str) -> dict[str, Any]:
    """Run the cases of a part in turn, each in a new process; print a line per case."""
    runs: dict[int, list[dict[str, Any]]] = {early: [] for early in CASES[part]}
    for _ in range(arguments.limit):
        for early in runs:
            runs[early].append(in_new_process(f"{part},{dtype},{early}"))
    peak = {early: [run["peak_bytes"] for run in found] for early, found in runs.items()}
    for early in runs:
        ratios = [a / b for a, b in zip(peak[early], peak[FEW], strict=True)]
        ratio = statistics.median(ratios)
        told = f"{ratio:.3f} x ({min(ratios):.3f} to {max(ratios):.3f})" if early != FEW else ""
        verdict = ("within" if ratio <= WANTED else "over") + f" {WANTED}" if early == MANY else ""
        name = "the model's own loss" if early == PLAIN else str(early)
        each = ", ".join(f"{n / MB:.0f}" for n in peak[early])
        print(f"| {part} | {dtype} | {name} | {each} | {told} | {verdict} |", flush=True)
    return {
        "part": part,
        "dtype": dtype,
        "peak_bytes": {"plain" if early == PLAIN else str(early): found for early, found in peak.items()},
        "process_peak_bytes": {
            "plain" if early == PLAIN else str(early): [run["process_peak_bytes"] for run in found]
            for early, found in runs.items()
        },
        "not_counted_bytes": runs[FEW][0]["not_counted_bytes"],
        "ratio": statistics.median(a / b for a, b in zip(peak[MANY], peak[FEW], strict=True)),
        "wanted": WANTED,
    }


def in_new_process(case: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--case", case]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
    if done.returncode:
        raise SystemExit(f"case {case} failed; its message is above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(arguments: argparse.Namespace, part: str, dtype: torch.dtype, early: int) -> dict[str, Any]:
    """Measure one case in this process, which is new."""
    device = resolve_device(arguments.device)
    # Many exits need layers to sit on; the weights' values do not matter for memory, the shapes do.
    hf = training_model(arguments.model, arguments.layers, device)
    layers = hf.config.get_text_config().num_hidden_layers
    if len(spread(layers, MANY)) < MANY:
        raise SystemExit(f"{MANY} early exits need more than {layers} layers")
    if part == "loss":
        return loss_alone(hf, arguments, dtype, early, device)
    optimiser = torch.optim.AdamW(hf.parameters(), lr=1e-6)
    schedule = Schedule(layers, p_max=0.0, e_scale=0.0)
    if early != PLAIN:
        exits = spread(layers, early)
        schedule = Schedule(layers, p_max=0.0, weighting="uniform", curriculum="fixed", exits=exits)
    training = ExitTraining(hf, schedule)
    if early != PLAIN:
        training.attach()

    def step(batch: dict[str, torch.Tensor]) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = hf(**batch, use_cache=False).loss
        loss.backward()

    step(
        random_rows(hf, 1, 8, device)
    )  # gradients, the optimiser's state and the libraries' buffers come to be
    optimiser.step()
    optimiser.zero_grad(set_to_none=False)
    batch = random_rows(hf, arguments.rows, arguments.length, device)
    with growth(device) as grown:
        step(batch)
    states = sum(
        t.numel() * t.element_size() for s in optimiser.state.values() for t in s.values() if torch.is_tensor(t)
    )  # fmt: skip
    weights = sum(p.numel() * p.element_size() for p in hf.parameters())
    return told(grown.num_bytes, {"parameters": weights, "gradients": weights, "optimiser": states}, device)


def loss_alone(
    hf: Any, arguments: argparse.Namespace, dtype: torch.dtype, early: int, device: torch.device
) -> dict[str, Any]:
    """Measure the loss and its gradients over ready states: one per exit, and the last layer's."""
    head = torch.nn.Parameter(hf.get_output_embeddings().weight.detach().clone())
    del hf
    head.grad = torch.zeros_like(head)
    tokens, layers = arguments.rows * arguments.length, early + 1
    generator = torch.Generator().manual_seed(0)
    states = {
        k: torch.randn(tokens, head.shape[1], generator=generator).to(device).requires_grad_()
        for k in range(1, layers + 1)
    }
    labels = torch.randint(head.shape[0], (tokens,), generator=generator).to(device)

    def step(num: int) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            part = {k: state[:num] for k, state in states.items()}
            loss, _ = multi_exit_loss(part, labels[:num], dict.fromkeys(states, 1 / layers), head)
        loss.backward()

    step(8)
    for state in states.values():
        state.grad = None
    with growth(device) as grown:
        step(tokens)
    size = head.numel() * head.element_size()
    state_bytes = sum(s.numel() * s.element_size() for s in states.values())
    return told(grown.num_bytes, {"parameters": size, "gradients": size, "states": state_bytes}, device)


def told(peak: int | None, not_counted: dict[str, int], device: torch.device) -> dict[str, Any]:
    if peak is None:
        raise SystemExit("the peak of memory cannot be measured here: Linux or CUDA is needed")
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        whole = torch.cuda.max_memory_allocated(device)
    return {"peak_bytes": peak, "process_peak_bytes": whole, "not_counted_bytes": not_counted}


if __name__ == "__main__":
    main()
