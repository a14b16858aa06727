"""What each weight format costs and gains for one model on this machine; kept in the cache folder.

    rows = compared(folder, load)        # load(name or None) gives the model in that format
    name = fastest(rows)                 # within 1% of perplexity

The cost is taken on the model's own text: the model writes some, and of every token the law that a format gives is
held against the model's own (Kullback-Leibler). Its exponential is the ratio of perplexities to be expected there.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from layerskip.checkpoint.facts import fingerprint
from layerskip.checkpoint.kept import MACHINE, decoders, keep, kept_file
from layerskip.decode.options import Options
from layerskip.errors import UserError
from layerskip.model.native.formats import FORMATS
from layerskip.model.native.stored import LAYOUT
from layerskip.model.step import Step
from layerskip.model.threads import BUSY, busy_cores
from layerskip.reading import read_json
from layerskip.watch import silent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from layerskip.decode.language_model import LanguageModel
    from layerskip.watch import Watch

    Load = Callable[[str | None], LanguageModel]

DEAR = 0.01  # of perplexity, that `auto` does not pay
ROWS, TOKENS = 8, 64  # of the model's own text
STEPS = 15


@dataclass(frozen=True)
class Worth:
    """One format: bytes of weights and seconds of a plain step, and what it adds to perplexity, as a share."""

    name: str | None  # None: the weights as they are loaded
    step_bytes: int
    step_s: float
    perplexity_cost: float


def compared(folder: Path, load: Load, watch: Watch = silent, again: bool = False) -> list[Worth]:
    """Measure all formats, once per model and machine: some seconds each. The first row is the model as it is.

    What was timed while others kept the cores busy is not kept; `again` measures anew.
    """
    if not again and (found := kept(folder)) is not None:
        return found
    file = _file(folder)
    disturbed = (busy_cores(0.05) or 0.0) > BUSY
    names: list[str | None] = [None, *FORMATS]
    rows, texts, laws = [], torch.empty(0), torch.empty(0)
    for done, name in enumerate(names):
        watch(f"weights in {name or 'full'}", done, len(names))
        lm = load(name)
        with torch.inference_mode():
            if name is None:
                texts = _own_text(lm)
            own = _laws(lm, texts)
            laws = own if name is None else laws
            cost = math.expm1(float((laws.exp() * (laws - own)).sum(-1).mean()))
            rows.append(Worth(name, step_bytes(lm), _step_s(lm), max(cost, 0.0)))  # a NaN stays one
        del lm, own
        gc.collect()  # the next one must not stand beside it
    if disturbed:
        return rows
    keep(file, [asdict(row) for row in rows])
    return rows


def kept(folder: Path | None) -> list[Worth] | None:
    """What was measured before of this model on this machine; None where nothing was."""
    file = None if folder is None else _file(folder)
    return None if file is None else _read(file)


def fastest(rows: Sequence[Worth]) -> str | None:
    """Choose the quickest step among those that cost next to nothing."""
    return min((row for row in rows if row.perplexity_cost < DEAR), key=lambda row: row.step_s).name


def _own_text(lm: LanguageModel) -> Tensor:
    """Let the model write from nothing. Shapes: [ROWS, TOKENS + 1]."""
    starts = [getattr(lm.config, "bos_token_id", None), *sorted(lm.eos_ids(Options())), 0]
    start = next(token for token in starts if isinstance(token, int))
    made = lm.generate(
        [[start]] * ROWS, max_new_tokens=TOKENS, temperature=1.0, seed=0, mode="ar", eos_token_id=(),
        batch_size=ROWS,
    )  # fmt: skip
    return torch.tensor([[start, *one.tokens] for one in made])


def _laws(lm: LanguageModel, texts: Tensor) -> Tensor:
    """Log-probabilities behind every token but the last. Shapes: [B, T + 1] -> float32 [B, T, V]."""
    stack, (rows, size) = lm.stack, (len(texts), texts.shape[1] - 1)
    cache = stack.new_cache(rows, size)
    step = Step.span(range(rows), [0] * rows, [size] * rows, stack.device, spill=size)
    h, _ = stack.run(stack.embed(texts[:, :-1], step), 0, stack.num_layers, step, cache)
    return stack.logits(h).log_softmax(-1)


def _step_s(lm: LanguageModel) -> float:
    stack, tokens = lm.stack, torch.zeros(1, 1, dtype=torch.long)
    cache, seconds = stack.new_cache(1, STEPS + 1), []
    for position in range(STEPS + 1):
        began = time.perf_counter()
        step = Step.span([0], [position], [1], stack.device, spill=STEPS + 1)
        h, _ = stack.run(stack.embed(tokens, step), 0, stack.num_layers, step, cache)
        stack.logits(h)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def step_bytes(lm: LanguageModel) -> int:
    """Bytes of weights that a plain step reads."""
    return lm.stack.num_layers * lm.stack.layer_bytes + lm.stack.head_bytes


# -- what is kept --------------------------------------------------------------------------------------------


def _file(folder: Path) -> Path | None:
    model = [fingerprint(folder), fingerprint(folder, "config.json"), sorted(FORMATS), LAYOUT]
    return kept_file(
        "formats", [model, decoders(), MACHINE, torch.__version__, torch.get_num_threads()], "worth-"
    )


def _read(file: Path) -> list[Worth] | None:
    try:
        rows = [Worth(**row) for row in read_json(file, list, "")]
        return rows if [row.name for row in rows] == [None, *FORMATS] else None
    except (OSError, UserError, TypeError, ValueError, AttributeError):
        return None


def as_records(rows: Sequence[Worth], bandwidth_gb_s: float) -> list[dict[str, Any]]:
    """Lay rows out with what they say beside a machine's bandwidth: shares of it, steps over the first row's."""
    return [
        asdict(row)
        | {
            "step_ratio": rows[0].step_s / row.step_s,
            "bandwidth_share": row.step_bytes / row.step_s / (1e9 * bandwidth_gb_s),
        }
        for row in rows
    ]
