"""The tables of the built-in model: what drafting gains by kind of text, and that the model is its base.

`builtin_table(result)` lays out a result of sources.py; the others make whole blocks of a page from the newest
result files, see tables.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import record
from cells import away, head, line, link, machine, number, ratio, share
from kinds import KINDS

MODEL, BASE = "smollm2-135m", "smollm2-135m-base"
METHODS = {"exit": "adapter alone", "lookup": "copies alone", "default": "default"}
PEERS = {
    "exit": "ours, adapter alone",
    "hf": "transformers, plain",
    "economize-plain": "economize, plain",
    "economize-jump": "economize, `jump`",
    "economize-early_exit": "economize, `early_exit`",
}


def gain() -> str:
    """A row per kind of text for the first page: what the default gains, without and with a trained drafter."""
    result = json.loads(_newest("sources").read_text())
    lines = head(
        "text",
        "nothing trained: copies",
        "tokens per round",
        "trained adapter, and copies",
        "tokens per round",
    )
    for kind, by_name in result["kinds"].items():
        lines.append(line(KINDS[kind].title, *_pairs([by_name[name] for name in ("lookup", "default")])))
    means = [{"speedup": result["mean"][name]} for name in ("lookup", "default")]
    told = result["configuration"]
    note = (
        f"Speed-up over our own plain decoding of the same model, `{MODEL}`: a file of a few megabytes beside the "
        f"weights of `{BASE}`, which it leaves as they are. {_equal([result], ['lookup', 'default'])} outputs are "
        f"those of plain decoding, token for token. Greedy, up to {told['max_new_tokens']} tokens, "
        f"{machine(told)}; brackets are 95% intervals over prompts."
    )
    return "\n".join([*lines, line("mean", *_pairs(means)), "", note])


def price() -> str:
    """What it costs, for the first page: the model's quality, where little is gained, what one task brings."""
    same, topv2 = (
        json.loads(path.read_text()) for path in (_newest("untouched"), record.newest("topv2_*.json"))
    )
    scores = topv2["methods"]
    most = max(
        (row["speedup"] for row in scores.values() if "speedup" in row), key=lambda found: found["median"]
    )
    kinds = json.loads(_newest("sources").read_text())["kinds"]
    gains = {
        name: {kind: own[name]["speedup"] for kind, own in kinds.items()} for name in ("exit", "default")
    }

    def ends(name: str) -> list[str]:
        of = gains[name]
        places = [pick(of, key=lambda kind: of[kind]["ratio"]) for pick in (max, min)]
        return [f"{ratio(of[kind])} on {KINDS[kind].title}" for kind in places]

    return "\n".join(
        [
            f"- **Quality: nothing.** The built-in model has the weights of its base, byte for byte; "
            f"{same['same_bits']} of {same['prompts']} plain outputs of "
            f"{same['configuration']['max_new_tokens']} tokens have the same bits in every state. An adapter "
            "drafts, and the whole model judges.",
            "- **Texts gain unlike.** Copies gain where text repeats its prompt or itself; a small model repeats "
            "itself often, a larger one less. The adapter alone gives {} and {}; both together {} and {}.".format(
                *ends("exit"), *ends("default")
            ),
            f"- **One task, exits in the model.** SmolLM2-135M trained on TOPv2 with LayerSkip's recipe reaches "
            f"{ratio(most)}. Exact match is {share(scores['full']['exact_match'])} instead of the "
            f"{share(scores['baseline']['exact_match'])} of the same training without exits "
            f"({away(topv2['exact_match_difference'], ' points')}).",
        ]
    )


def _newest(kind: str) -> Path:
    path = record.newest(f"{kind}_{MODEL}_*.json")
    assert path is not None, f"no {kind}_{MODEL}_*.json among the results"
    return path


def sources() -> str:
    """What each source gains by kind of text, a table per model."""
    parts = []
    for path in sorted(record.newest_of_each("sources_*.json"), reverse=True):
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


def peers() -> str:
    """Drafters of economize and of ours, trained on the same tokens, over each engine's plain decoding."""
    path = record.newest("sources-peers_*.json")
    assert path is not None
    result = json.loads(path.read_text())
    kinds, told, own = result["kinds"], result["configuration"], result.get("over_own_plain", {})
    lines = head("method", "tokens per round", "over its own plain decoding", "over our plain decoding")
    for name, over in result["mean"].items():
        rounds = [by_name[name]["tokens_per_round"] for by_name in kinds.values()]
        known = number(sum(rounds) / len(rounds)) if None not in rounds else ""
        lines.append(
            line(
                PEERS.get(name, name),
                known,
                ratio(own.get(name, over if name in METHODS else None)),
                ratio(over),
            )
        )
    note = (
        f"Means over {len(kinds)} kinds of text with {_prompts(result)} prompts each, up to "
        f"{told['max_new_tokens']} tokens, greedy, {machine(told)}; brackets are 95% intervals over prompts. Other "
        f"engines by whole calls, prompt and all, ours behind the first token ({link(path)})."
    )
    return "\n".join([*lines, "", note])


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
    """The built-in model by kind of text, and that it is its base."""
    path, other = _newest("sources"), _newest("untouched")
    result, same = (json.loads(file.read_text()) for file in (path, other))
    told = result["configuration"]
    times = "once" if told["trials"] == 1 else f"{told['trials']} times"
    note = (
        f"Greedy, up to {told['max_new_tokens']} new tokens, ended at the end of sequence; {_prompts(result)} "
        f"prompts a kind, each {times}, the methods in turn. Speed-up: seconds of plain decoding of the same model "
        "over a method's own, behind the first token, summed over the prompts of a kind, with a 95% interval over "
        "prompts. The default drafts by adapter and copies; copies alone are what the base gains. Tokens per "
        "round and drafts kept are those of the default. Drafts 1 to 4 right: of the rounds of four drafts by the "
        "adapter alone that kept all drafts before this one, the share that kept it. Equal outputs: of all methods "
        "of a row, those of plain decoding, token for token. The mean counts each kind alike. "
        f"{machine(told)} ({link(path)})."
    )
    cost = (
        f"What it cost: nothing. Weight files {'are' if same['same_files'] else 'ARE NOT'} those of `{BASE}`, byte "
        f"for byte; of {same['prompts']} plain outputs of {same['configuration']['max_new_tokens']} tokens "
        f"{same['same_tokens']} have the same tokens and {same['same_bits']} the same bits in every state "
        f"({link(other)})."
    )
    return "\n".join([*builtin_table(result), "", note, "", cost])


def builtin_table(result: dict) -> list[str]:
    """A row per kind of text and their mean: what exit, copies and both gain, and how good the drafts are."""
    quality = ("tokens per round", "drafts 1 to 4 right, %", "adapter's drafts kept", "copies kept")
    lines = head("text", *METHODS.values(), *quality, "equal outputs")
    figures, counts = [], []
    for kind, by_name in result["kinds"].items():
        found = [by_name.get(name, {}) for name in METHODS]
        figures.append(_figures(by_name))
        counts.append([sum(one.get(key, 0) for one in found) for key in ("equal", "prompts")])
        speedups = [ratio(one.get("speedup")) for one in found]
        lines.append(
            line(KINDS[kind].title, *speedups, *_worded(figures[-1]), "{} of {}".format(*counts[-1]))
        )
    speedups = [ratio(result["mean"].get(name)) for name in METHODS]
    total = [sum(column) for column in zip(*counts, strict=True)]
    means = [_mean(column) for column in zip(*figures, strict=True)]
    return [*lines, line("mean", *speedups, *_worded(means), "{} of {}".format(*total))]


def _figures(by_name: dict) -> list[float | None]:
    """Tokens per round of the default, the agreement of four drafts, shares kept of the default's drafts."""
    default = by_name.get("default", {})
    sources = [default.get("by_source", {}).get(name) for name in ("exit", "lookup")]
    kept = [own["accepted"] / own["drafted"] if own and own["drafted"] else None for own in sources]
    # Files before there were any have neither the method nor the counts.
    drafted = by_name.get("exit-4") or by_name.get("exit") or {}  # the latter shows the first K
    agreement = drafted.get("agreement", [None] * 4)
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
