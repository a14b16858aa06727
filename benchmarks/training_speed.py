"""What layer dropout saves and what exits cost, in time per training step.

    python benchmarks/training_speed.py --threads 2 --save
    python benchmarks/training_speed.py --layers 4 --rows 2 --length 16 --limit 2      # a rehearsal, seconds

Two questions, each answered by forward and backward passes over the same rows, the cases in turn (A B C, A B C,
...) and ratios taken within a turn. First, layer dropout at p_max 0.5, the same for every layer, the last exit
only: half of the layers' work is not done, so time should fall by 28% or more (the head over the vocabulary is
never dropped). Second, a LayerSkip step with 1, 2 and 4 early exits on against the plain model's own step: each
exit costs a head, so the step may take 1.1 x (L + h (1 + exits)) / (L + h) of the plain one, where h is the head
in layers. Every position has a label, for the plain step computes the head everywhere and ours only where there
is a label. The optimiser's step, the same in both, is left out: with it the ratios would be nearer to 1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import record
import torch
import transformers

from layerskip.checkpoint import resolve as hub
from layerskip.decode.load import resolve_device
from layerskip.measure.intervals import Interval, interval
from layerskip.measure.speed.card import synchronise
from layerskip.train.figures import head_layers
from layerskip.train.objective.exits import ExitTraining
from layerskip.train.objective.schedule import Schedule

P_MAX, WANTED_SAVING, ALLOWANCE = 0.5, 0.28, 1.1
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}  # bfloat16 is autocast over float32 weights


def training_model(name: str, layers: int | None, device: torch.device) -> Any:
    """Load a model for training, or make one of its widths with `layers` layers and random weights."""
    folder = hub.resolve(name)
    if layers is None:
        hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        config = transformers.AutoConfig.from_pretrained(folder)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        torch.manual_seed(0)
        hf = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return hf.to(device).train()


def random_rows(hf: Any, rows: int, length: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Rows of random tokens, each a label too; what they say costs no time."""
    vocabulary = hf.get_output_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)
    return {
        "input_ids": ids,
        "labels": ids,
        "num_items_in_batch": torch.tensor(rows * (length - 1), device=device),
    }


def spread(num_layers: int, count: int) -> tuple[int, ...]:
    """Choose `count` exits below the last layer, evenly."""
    return tuple(sorted({max(1, round(num_layers * i / (count + 1))) for i in range(1, count + 1)}))


def timed(hf: Any, batch: dict[str, torch.Tensor], dtype: torch.dtype, device: torch.device) -> list[float]:
    """Seconds of one forward and one backward pass."""
    hf.zero_grad(set_to_none=True)
    synchronise(device)
    began = time.perf_counter()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = hf(**batch, use_cache=False).loss
    synchronise(device)
    between = time.perf_counter()
    loss.backward()
    synchronise(device)
    return [between - began, time.perf_counter() - between]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-base")
    parser.add_argument("--layers", type=int, help="random weights with so many layers, for a rehearsal")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES), help="bfloat16 is autocast")
    parser.add_argument("--rows", type=int, default=8, help="rows of the batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--early-exits", default="1,2,4", help="numbers of early exits on, comma-separated")
    parser.add_argument("--limit", type=int, default=9, help="timed turns of every case")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/training-speed_*.json")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.threads = torch.get_num_threads()
    device, dtype = resolve_device(arguments.device), DTYPES[arguments.dtype]
    hf = training_model(arguments.model, arguments.layers, device)
    batch = random_rows(hf, arguments.rows, arguments.length, device)
    layers = hf.config.get_text_config().num_hidden_layers
    result = {
        "dropout": dropout_saving(hf, layers, batch, dtype, device, arguments.limit),
        "exits": cost_of_exits(
            hf, layers, batch, dtype, device, arguments.limit, [int(n) for n in arguments.early_exits.split(",")]
        ),
        "configuration": record.configuration(arguments, device),
    }  # fmt: skip
    if arguments.save:
        record.save(result, "training-speed", arguments.model, arguments.dtype, device.type)


def dropout_saving(
    hf: Any, layers: int, batch: dict[str, Any], dtype: torch.dtype, device: torch.device, turns: int
) -> dict[str, Any]:
    """Time the last exit alone with and without layer dropout; masks are drawn anew in every turn."""
    schedules = {
        "p_max 0": Schedule(layers, p_max=0.0, e_scale=0.0),
        f"p_max {P_MAX:g}": Schedule(layers, p_max=P_MAX, drop_depth="uniform", e_scale=0.0),
    }
    none, half = schedules
    seconds: dict[str, list[list[float]]] = {name: [] for name in schedules}
    dropped = 0.0
    with ExitTraining(hf, schedules[none]) as exits:
        for turn in range(turns + 1):
            for name, schedule in schedules.items():
                exits.schedule = schedule
                exits.begin(turn, turns + 1)
                exits.drain()
                passes = timed(hf, batch, dtype, device)
                if turn:  # the first turn warms up
                    seconds[name].append(passes)
                    dropped += exits.totals.dropped / exits.totals.layer_rows / turns
        head = head_layers(exits)
    ratios = [sum(a) / sum(b) for a, b in zip(seconds[half], seconds[none], strict=True)]
    found = interval([[1.0 - ratio] for ratio in ratios])
    ideal = dropped * layers / (layers + head)
    print(
        f"layer dropout, {half}, the same for every layer: {100 * dropped:.1f}% of the layers' work is dropped; "
        f"time of a step {_medians(seconds[none])} -> {_medians(seconds[half])}"
    )
    print(
        f"  saved {_percent(found)} of the time; wanted {100 * WANTED_SAVING:.0f}%: "
        f"{'reached' if found.median >= WANTED_SAVING else 'missed'}; a step in layers alone would save "
        f"{100 * ideal:.0f}%"
    )
    return {
        "p_max": P_MAX,
        "dropped": dropped,
        "saved": {**found.record(), "wanted": WANTED_SAVING, "ideal": ideal},
        "seconds": _told(seconds),
    }


def cost_of_exits(
    hf: Any,
    layers: int,
    batch: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    turns: int,
    counts: list[int],
) -> dict[str, Any]:
    """Time the plain model and the model with exits on; outside of its own turn the recipe is detached."""
    trainings = {}
    for count in counts:
        chosen = spread(layers, count)
        if len(chosen) < count:
            raise SystemExit(f"{layers} layers have no {count} early exits: give --early-exits less")
        schedule = Schedule(layers, p_max=0.0, weighting="uniform", curriculum="fixed", exits=chosen)
        trainings[count] = ExitTraining(hf, schedule)
    seconds: dict[str, list[list[float]]] = {"plain": [], **{str(count): [] for count in counts}}
    for turn in range(turns + 1):
        passes = {"plain": timed(hf, batch, dtype, device)}
        for count, exits in trainings.items():
            with exits:
                passes[str(count)] = timed(hf, batch, dtype, device)
        if turn:
            for name, one in passes.items():
                seconds[name].append(one)
    head = head_layers(trainings[counts[0]])
    print(
        f"a step with exits on against the model's own step, {_medians(seconds['plain'])} (h = {head:.1f} layers)"
    )
    print("| early exits on | step | over plain [95%] | bound | |\n| --- | --- | --- | --- | --- |")
    cases = []
    for count in counts:
        ratios = [sum(a) / sum(b) for a, b in zip(seconds[str(count)], seconds["plain"], strict=True)]
        found = interval([[ratio] for ratio in ratios])
        bound = ALLOWANCE * (layers + head * (1 + count)) / (layers + head)
        ratio = f"{found.median:.2f} x [{found.low:.2f}, {found.high:.2f}]"
        told = "within" if found.median <= bound else "over"
        print(f"| {count} | {_medians(seconds[str(count)])} | {ratio} | {bound:.2f} x | {told} |")
        cases.append(
            {
                "early_exits": count,
                "exits": list(spread(layers, count)),
                "ratio": found.record(),
                "bound": bound,
            }
        )
    return {"layers": layers, "head": head, "cases": cases, "seconds": _told(seconds)}


def _told(seconds: dict[str, list[list[float]]]) -> dict[str, Any]:
    names = ("forward_s", "backward_s")
    return {
        case: {name: [round(one[i], 5) for one in passes] for i, name in enumerate(names)}
        for case, passes in seconds.items()
    }


def _medians(passes: list[list[float]]) -> str:
    forward, backward = (statistics.median(one[i] for one in passes) for i in (0, 1))
    both = statistics.median(sum(one) for one in passes)
    return f"{both:.3f} s (forward {forward:.3f}, backward {backward:.3f})"


def _percent(found: Interval) -> str:
    return f"{100 * found.median:.1f}% [{100 * found.low:.1f}, {100 * found.high:.1f}]"


if __name__ == "__main__":
    main()
