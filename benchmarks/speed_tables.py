"""Tables of larger models' shapes and of the server, from committed result files."""

from __future__ import annotations

import json
from pathlib import Path

import record
from cells import head, line, link, ratio, share


def shapes() -> str:
    """Larger models' shapes in each format, with random weights and simulated acceptance."""
    lines = head(
        "shape", "weights", "MB a token", "plain tokens/s", "of the roofline", "4, 9 positions over 1",
        "rounds over plain", "predicted", "acceptance",
    )  # fmt: skip
    for path in record.newest_of_each("shape_*_cpu_*.json"):
        result = json.loads(path.read_text())
        card, told, plain = result["card"], result["configuration"], result["methods"]["ar"]
        acceptance = result["methods"]["self-speculative"]["acceptance"]
        lines.append(
            line(
                link(path, told["shape"]),
                told["quantize"] or card["dtype"],
                f"{card['bytes_per_token'] / 1e6:,.0f}",
                f"{plain['decode_tokens_per_s']:.1f}",
                f"{100 * plain['roofline_share']:.0f}% of {card['bandwidth_gb_s']:.0f} GB/s",
                ", ".join(f"{cost:.2f}" for width, cost in result["over_one"].items() if width != "1"),
                ratio(result["speedup"]["self-speculative/ar"]),
                f"{result['predicted_speedup']:.2f} x",
                share(acceptance),
            )
        )
    about = (
        f"{card['threads']} threads of an {card['device']}, E 4, K 4, a draft vocabulary of "
        f"{told['draft_vocab']:,}; the bandwidth is that of one buffer, read in the same run. Predicted: by "
        "the cost model, from step times of the same run."
    )
    return "\n".join([*lines, "", about])


def serving() -> str:
    """The server under load, beside itself without drafts and beside llama.cpp's, in each format measured."""
    memory = map(_memory, record.newest_of_each("serving-memory_*.json"))
    return "\n\n".join([*map(_served, record.newest_of_each("serving_*.json")), *memory])


def _memory(path: Path) -> str:
    result = json.loads(path.read_text())
    told, memory = result["configuration"], result["memory"]
    some = [memory[0], memory[len(memory) // 2], memory[-1]]
    sizes = ", ".join(f"{one['mb']:,.0f} MB after {one['requests']:,} requests" for one in some)
    weights = told["quantize"] or "bfloat16"
    return f"The server's memory (`{told['model']}` in {weights}, {told['device_name']}): {sizes} ({link(path)})."


def _served(path: Path) -> str:
    result = json.loads(path.read_text())
    told = result["configuration"]
    lines = head(
        "rows", "drafts over plain", "equal texts", "tokens/s plain", "with drafts", "first token, ms: p50, p95",
        "per token, ms: p50, p95", "over llama.cpp's server", "its first token, ms", "its tokens/s",
    )  # fmt: skip
    peers = {one["rows"]: one for one in result.get("peer", [])}
    for one in result.get("rows", []):
        drafts, peer = one["drafts"], peers.get(one["rows"])
        cells = [str(one["rows"]), ratio(one), f"{one['equal']} of {one['requests']}"]
        cells += [f"{one[kind]['tokens_per_s']:.0f}" for kind in ("plain", "drafts")]
        cells += [_percentiles(drafts["first_s"]), _percentiles(drafts["each_s"])]
        if peer is not None:
            other = peer["llama.cpp"]
            cells += [ratio(peer), _percentiles(other["first_s"]), f"{other['tokens_per_s']:.0f}"]
        lines.append(line(*cells, *[""] * (10 - len(cells))))
    weights = told["quantize"] or "bfloat16"
    about = [
        f"`{told['model']}` in {weights}, {told['threads']} threads of an {told['device_name']}, over HTTP, "
        f"greedy, {told['max_new_tokens']} tokens a request, as many streams at a time as rows; both take turns, "
        "95% intervals over turns. llama.cpp's server has the Q4_1 file that the model was made of."
    ]
    if (prefix := result.get("prefix")) is not None:
        about.append(
            f"Behind a shared system prompt ({prefix['prompt_tokens']} tokens in all) the first token of a later "
            f"request comes after {1000 * prefix['later_s']:.0f} ms, of the first one after "
            f"{1000 * prefix['first_s']:.0f}: {prefix['ratio']:.2f}."
        )
    if (shaped := result.get("json")) is not None:
        about.append(f"Of {shaped['asked']} answers sampled under a JSON schema {shaped['valid']} are valid.")
    return "\n".join([*lines, "", f"{' '.join(about)} ({link(path)})"])


def _percentiles(seconds: dict) -> str:
    return f"{1000 * seconds['p50']:.1f}, {1000 * seconds['p95']:.1f}"
