"""The method's published results beside what this repository reaches at its size.

Facts: LayerSkip (arXiv 2404.16710), greedy, up to 512 new tokens, one H100 unless said.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import record
from cells import head, line, link, ratio, share

from layerskip.model.cost import Cost


class Published(NamedTuple):
    """A row: shares as 0 to 1; `layers` and `head` (parameters over a layer's) are of its model."""

    what: str
    layers: int
    head: float
    exit_layer: int
    draft_length: int
    acceptance: float
    speedup: float
    here: str  # which of our results stands beside it

    @property
    def predicted(self) -> float:
        """The speed-up by the cost model in layers, at the drafts kept."""
        cost = Cost(self.layers, self.exit_layer, self.head, self.head)
        return cost.speedup(self.draft_length, 1 + self.acceptance * self.draft_length)


# Layers, and the head of 32,000 tokens in layers; that of the 1.5 B model is not published and taken as the 7 B's.
L7, L13, SMALL = (32, 0.65), (40, 0.52), (24, 0.65)
ROWS = (
    Published("Llama2-7B continual, CNN/DM", *L7, 8, 12, 0.689, 1.86, "cnn-dm"),
    Published("Llama2-7B continual, XSUM", *L7, 8, 12, 0.546, 1.54, ""),
    Published("Llama2-7B continual, HumanEval", *L7, 8, 6, 0.671, 1.83, "humaneval"),
    Published("Llama2-13B continual, CNN/DM", *L13, 15, 12, 0.745, 1.81, "cnn-dm"),
    Published("Llama2-13B continual, XSUM", *L13, 15, 4, 0.677, 1.34, ""),
    Published("Llama2-13B continual, HumanEval", *L13, 7, 4, 0.570, 1.66, "humaneval"),
    Published("Llama1-7B code, HumanEval (A100)", *L7, 6, 12, 0.45, 1.82, "humaneval"),
    Published("Llama 1.5B TOPv2", *SMALL, 18, 8, 0.989, 1.24, "12"),
    Published("Llama 1.5B TOPv2", *SMALL, 12, 8, 0.976, 1.64, "8"),
    Published("Llama 1.5B TOPv2", *SMALL, 6, 8, 0.760, 2.00, "4"),
    Published("Llama 1.5B TOPv2 on a CPU", *SMALL, 18, 7, 0.99, 1.23, "12"),
    Published("Llama 1.5B TOPv2 on a CPU", *SMALL, 12, 7, 0.97, 1.59, "8"),
    Published("Llama 1.5B TOPv2 on a CPU", *SMALL, 6, 7, 0.76, 1.90, "4"),
)


def reference() -> str:
    """Published rows, what the cost model in layers says of them, and ours."""
    kinds = record.newest("sources_smollm2-135m_bfloat16_*.json")
    task = record.newest("topv2_*.json")
    of_kind, of_task = (json.loads(path.read_text()) for path in (kinds, task))
    lines = head(
        "published", "E of L, K", "drafts kept", "speed-up", "cost model", "here", "drafts kept", "speed-up"
    )
    for row in ROWS:
        lines.append(
            line(
                row.what,
                f"{row.exit_layer} of {row.layers}, {row.draft_length}",
                share(row.acceptance),
                f"{row.speedup:.2f} x",
                f"{row.predicted:.2f} x",
                *_ours(row.here, of_kind["kinds"], of_task["methods"]),
            )
        )
    about = (
        "Published: models of 1.5 to 13 billion parameters, drafts of exit E; those of the first seven rows "
        "learnt their exits in 5 to 52 billion tokens. Cost model: in layers, of that model. Here: "
        "SmolLM2-135M (30 layers) on two CPU cores. CNN/DM and HumanEval are the built-in model, whose "
        "weights are untouched: its exit adapter (5 million tokens) and copies draft together, and the drafts "
        "kept are the adapter's. TOPv2 is the recipe after 0.7 million tokens, its deepest exits beside the "
        "published ones in order, at the best K. The head of 49,152 tokens is as dear as eight layers of so "
        "small a model, so ours drafts with a few thousand tokens, and gains more from fewer drafts kept. "
        "XSUM was not run here; training from scratch (published: 2.16 x on CNN/DM) was, at 4 million "
        f"parameters and 5 million tokens, see below. From {link(kinds)} "
        f"and {link(task)}."
    )
    return "\n".join([*lines, "", about])


def _ours(here: str, kinds: dict, methods: dict) -> tuple[str, str, str]:
    if here in kinds:
        own = kinds[here]["default"]
        return "adapter and copies", share(own["acceptance"]["exit"]), ratio(own["speedup"])
    own = [
        m
        for m in methods.values()
        if str(m.get("exit_layer")) == here and m.get("speedup") and "acceptance" in m
    ]
    if not own:
        return "", "", ""
    best = max(own, key=lambda m: m["speedup"]["median"])
    return f"E {here} of 30, K {best['draft_length']}", share(best["acceptance"]), ratio(best["speedup"])
