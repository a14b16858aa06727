"""The tables of the built-in model and its base: what drafting gains by kind of text, and what training cost.

`builtin_table(result)` lays out a result of sources.py, `builtin_cost_table(result)` one of builtin_cost.py; the
others make whole blocks of a page from the newest result files, see tables.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import record
from cells import away, head, line, link, machine, number, ratio, share
from kinds import KINDS

MODEL, BASE = "smollm2-135m", "smollm2-135m-base"
METHODS = {"exit": "exit alone", "lookup": "copies alone", "default": "default"}


def gain() -> str:
    """A row per kind of text for the first page: what the default gains, without and with a trained exit."""
    results = [json.loads(record.newest(f"sources_{name}_*.json").read_text()) for name in (BASE, MODEL)]
    heads = ("nothing trained: copies", "trained exit, and copies")
    lines = head("text", *(cell for words in heads for cell in (words, "tokens per round")))
    for kind in results[1]["kinds"]:
        found = [result["kinds"].get(kind, {}).get("default", {}) for result in results]
        lines.append(line(KINDS[kind].title, *_pairs(found)))
    lines.append(line("mean", *_pairs([{"speedup": result["mean"]["default"]} for result in results])))
    told = results[1]["configuration"]
    note = (
        f"Speed-up of the default over our own plain decoding of the same model: `{BASE}`, and `{MODEL}` with its "
        f"trained exit. {_equal(results, ['default'])} outputs are those of plain decoding, token for token. "
        f"Greedy, up to {told['max_new_tokens']} tokens, {machine(told)}; brackets are 95% intervals over prompts."
    )
    return "\n".join([*lines, "", note])


def price() -> str:
    """What it costs, for the first page: the model's quality, where nothing is gained, what one task brings."""
    cost, topv2 = (
        json.loads(record.newest(f"{kind}_*.json").read_text()) for kind in ("builtin-cost", "topv2")
    )
    text, tasks, scores = cost["perplexity"], cost["tasks"], topv2["methods"]
    most = max(
        (row["speedup"] for row in scores.values() if "speedup" in row), key=lambda found: found["median"]
    )
    kinds = json.loads(record.newest(f"sources_{MODEL}_*.json").read_text())["kinds"]
    exits = {kind: own["exit"]["speedup"] for kind, own in kinds.items()}
    least, most_of = (pick(exits, key=lambda kind: exits[kind]["ratio"]) for pick in (min, max))
    return "\n".join(
        [
            f"- **Quality.** Training changes the model. The perplexity of the built-in model on WikiText-2 is "
            f"{text['model']['all_layers']:.2f}; that of its base is {text['base']['all_layers']:.2f} "
            f"({away(text['relative_difference'], '%')}). Of {tasks['humaneval']['items']} items each it solves "
            f"{_changed(tasks['humaneval'])} of HumanEval and {_changed(tasks['gsm8k'])} of GSM8K; a model this "
            "small is near zero on both, so they show little.",
            "- **Not every text gains.** Copies gain where text repeats its prompt or itself; a small model "
            "repeats itself often, a larger one less. The trained exit alone gives "
            f"{ratio(exits[most_of])} on {KINDS[most_of].title} and {ratio(exits[least])} on "
            f"{KINDS[least].title}.",
            f"- **One task gains more and costs more.** SmolLM2-135M trained on TOPv2 only reaches "
            f"{ratio(most)}. Exact match is {share(scores['full']['exact_match'])} instead of the "
            f"{share(scores['baseline']['exact_match'])} of the same training without exits "
            f"({away(topv2['exact_match_difference'], ' points')}).",
        ]
    )


def _changed(task: dict) -> str:
    """A score of the model, that of its base and the difference."""
    now, before = (share(task[who]["score"]) for who in ("model", "base"))
    return f"{now} (its base {before}, {away(task.get('difference'), ' points')})"


def sources() -> str:
    """What each source gains by kind of text, a table per model."""
    parts = []
    for path in record.newest_of_each("sources_*.json"):
        result = json.loads(path.read_text())
        told, names = result["configuration"], [name for name in METHODS if name in result["mean"]]
        note = (
            f"`{told['model']}`, speed-up over our own plain decoding, {_prompts(result)} prompts a kind, up to "
            f"{told['max_new_tokens']} tokens, greedy, {machine(told)}; brackets are 95% intervals over prompts. "
            f"{_equal([result], names)} outputs are those of plain decoding ({link(path)})."
        )
        parts.append("\n".join([*sources_table(result, names), "", note]))
    return "\n\n".join(parts)


def sources_table(result: dict, names: Sequence[str] = ()) -> list[str]:
    """A row per kind of text, two columns per method: speed-up and tokens per round."""
    names = names or [*result["mean"]]
    lines = head(
        "kind of text", *(cell for name in names for cell in (METHODS.get(name, name), "tokens per round"))
    )
    for kind, by_name in result["kinds"].items():
        lines.append(line(kind, *_pairs([by_name[name] for name in names])))
    return [*lines, line("mean", *_pairs([{"speedup": result["mean"][name]} for name in names]))]


def _pairs(found: Sequence[dict]) -> list[str]:
    return [
        cell for one in found for cell in (ratio(one.get("speedup")), number(one.get("tokens_per_round")))
    ]


def _equal(results: Sequence[dict], names: Sequence[str]) -> str:
    """How many outputs of these methods are those of plain decoding."""
    found = [own[name] for result in results for own in result["kinds"].values() for name in names]
    return "{} of {}".format(*(sum(one[key] for one in found) for key in ("equal", "prompts")))


def _prompts(result: dict) -> int:
    return max(one["prompts"] for by_name in result["kinds"].values() for one in by_name.values())


def builtin() -> str:
    """The built-in model and its base by kind of text, and what training cost."""
    paths = [record.newest(f"sources_{name}_*.json") for name in (MODEL, BASE)]
    model, base = (json.loads(path.read_text()) for path in paths)
    told = model["configuration"]
    times = "once" if told["trials"] == 1 else f"{told['trials']} times"
    note = (
        f"Greedy, up to {told['max_new_tokens']} new tokens, ended at the end of sequence; {_prompts(model)} "
        f"prompts a kind, each {times}, the methods in turn. Speed-up: seconds of plain decoding of the same model "
        "over a method's own, behind the first token, summed over the prompts of a kind, with a 95% interval over "
        "prompts. The default drafts by exit and copies, that of the base by copies. Tokens per round and drafts "
        "kept are those of the default. Drafts 1 to 4 right: of the rounds of four drafts by the exit alone that "
        "kept all drafts before this one, the share that kept it. Equal outputs: of all methods of a row, those of "
        "plain decoding, token for token. The mean counts each kind alike. "
        f"{machine(told)} ({', '.join(map(link, paths))})."
    )
    lines = [*builtin_table(model, base), "", note]
    if (path := record.newest("builtin-cost_*.json")) is not None:
        cost = json.loads(path.read_text())
        note = (
            "All layers, greedy. Differences are paired by window and by item, with 95% intervals. Perplexity "
            f"is per token, in windows of 1,024 tokens. {cost['configuration']['dtype']} ({link(path)})."
        )
        lines += ["", *builtin_cost_table(cost), "", note]
    return "\n".join(lines)


def builtin_table(result: dict, base: dict | None = None) -> list[str]:
    """A row per kind of text and their mean: what exit, copies and both gain, and how good the drafts are."""
    columns = [(title, result, name) for name, title in METHODS.items()]
    columns += [] if base is None else [("base's default", base, "default")]
    quality = ("tokens per round", "drafts 1 to 4 right, %", "exit's drafts kept", "copies kept")
    lines = head("text", *(title for title, _, _ in columns), *quality, "equal outputs")
    figures, counts = [], []
    for kind, by_name in result["kinds"].items():
        found = [told["kinds"].get(kind, {}).get(name, {}) for _, told, name in columns]
        figures.append(_figures(by_name))
        counts.append([sum(one.get(key, 0) for one in found) for key in ("equal", "prompts")])
        speedups = [ratio(one.get("speedup")) for one in found]
        lines.append(
            line(KINDS[kind].title, *speedups, *_worded(figures[-1]), "{} of {}".format(*counts[-1]))
        )
    speedups = [ratio(told["mean"].get(name)) for _, told, name in columns]
    total = [sum(column) for column in zip(*counts, strict=True)]
    means = [_mean(column) for column in zip(*figures, strict=True)]
    return [*lines, line("mean", *speedups, *_worded(means), "{} of {}".format(*total))]


def _figures(by_name: dict) -> list[float | None]:
    """Tokens per round of the default, the agreement of four drafts, shares kept of the default's drafts."""
    default = by_name.get("default", {})
    sources = [default.get("by_source", {}).get(name) for name in ("exit", "lookup")]
    kept = [own["accepted"] / own["drafted"] if own and own["drafted"] else None for own in sources]
    # Files before there were any have neither the method nor the counts.
    agreement = by_name.get("exit-4", {}).get("agreement", [None] * 4)
    return [default.get("tokens_per_round"), *agreement, *kept]


def _worded(figures: Sequence[float | None]) -> list[str]:
    per_round, *agreement, exit_kept, copies_kept = figures
    right = " ".join("-" if value is None else f"{100 * value:.0f}" for value in agreement)
    return [
        number(per_round), right if any(value is not None for value in agreement) else "", share(exit_kept),
        share(copies_kept),
    ]  # fmt: skip


def _mean(values: Sequence[float | None]) -> float | None:
    """Count each kind alike; a mean of some of them would be of other text."""
    return None if None in values else sum(values) / len(values)


def builtin_cost_table(result: dict[str, Any]) -> list[str]:
    """What training the exits cost the full model: a row for the text, a row per task."""
    lines = head("all layers", "trained exits", "base", "difference")
    text, difference = result["perplexity"], result["perplexity"].get("relative_difference")
    cells = [f"{text[who]['all_layers']:.2f}" if who in text else "" for who in ("model", "base")]
    title = f"WikiText-2 perplexity, {text['model']['tokens']:,} tokens"
    lines.append(line(title, *cells, away(difference, "%")))
    for name, task in result["tasks"].items():
        title = {"humaneval": "HumanEval", "gsm8k": "GSM8K"}[name]
        cells = [share(task[who]["score"]) if who in task else "" for who in ("model", "base")]
        title = f"{title} {task['metric'].replace('_', ' ')}, {task['items']} items"
        lines.append(line(title, *cells, away(task.get("difference"), " points")))
    return lines
