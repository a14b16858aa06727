"""Tables of other engines with our exports, of lm-eval with our model, and of the search."""

from __future__ import annotations

import json

import record
from cells import head, line, link, machine, share


def engines() -> str:
    """What each engine made of each export; nothing where none was measured."""
    parts = []
    for path in record.newest_of_each("engines_*.json"):
        result = json.loads(path.read_text())
        told = result["configuration"]
        lines = head("artefact", "engine", "opened", "equal outputs", "drafts kept", "command")
        for row in result["rows"]:
            equal, command = row.get("equal"), row.get("command", "layerskip generate")
            same = "" if equal is None else f"{equal['same']} of {equal['of']}"
            lines.append(
                line(
                    row["artefact"],
                    row["engine"],
                    "no: " + row["failed"] if "failed" in row else "yes",
                    same,
                    share(row.get("acceptance")),
                    f"`{command}`",
                )
            )
        parts.append(
            "\n".join([
                *lines, "",
                f"`{told['model']}`, exit {result['exit_layer']}, {told['draft_length']} drafts a round, "
                f"float32, greedy, {result['prompts']} prompts of {told['max_new_tokens']} tokens. Equal "
                "outputs: token for token those of our plain decoding. Drafts kept: of all drafted, as the "
                f"engine counts them ({link(path)}).",
            ])
        )  # fmt: skip
    return "\n\n".join(parts)


def harness() -> str:
    """lm-eval's numbers through its own model and through ours."""
    path = record.newest("harness_*.json")
    result = json.loads(path.read_text())
    told, rows = result["configuration"], result["rows"]
    lines = head(
        "model of lm-eval", "GSM8K, exact match", "WikiText-2, perplexity per word", "same answers as `hf`"
    )
    for name, row in rows.items():
        numbers = row["numbers"]
        lines.append(
            line(
                name,
                share(numbers["gsm8k"]["exact_match"]),
                f"{numbers['wikitext']['word_perplexity']:.4f}",
                f"{row['same_answers']} of {told['limit']}",
            )
        )  # fmt: skip
    about = (
        f"`{told['model']}`, {told['limit']} questions and pieces of text, greedy, "
        f"{machine(told | {'dtype': 'float32'})}; ours drafts by default, which changes no answer. At another "
        f"layer only likelihoods are read there ({link(path)})."
    )
    return "\n".join([*lines, "", about])


def search() -> str:
    """What a search found with the time of ten runs, beside the best of a grid."""
    path = record.newest("search_*.json")
    result = json.loads(path.read_text())
    other, told = result["other"], result["configuration"]
    lines = head("chosen by", "runs", "to their end", "minutes", "settings", "held-out rows", "other text")
    for name, kind in (("grid", "a grid of 24"), ("search", "the search")):
        own = result[name]
        settings = (
            own["settings"] if name == "grid" else [f"{k}={_short(v)}" for k, v in own["settings"].items()]
        )
        lines.append(
            line(
                kind,
                str(own.get("runs", own.get("trials"))),
                str(own.get("finished", own.get("runs"))),
                f"{own['seconds'] / 60:.1f}",
                ", ".join(f"`{one}`" for one in settings),
                f"{own['speedup']:.3f} x",
                f"{other[name]:.3f} x",
            )
        )  # fmt: skip
    low, high = other["difference"]["ci95"]
    about = (
        f"Predicted speed-up of a small model that {told['steps']} steps of `scratch-small` gave exits; what "
        "the whole model pays beyond 1% counts against it. The search had the time of ten runs. On "
        f"{other['windows']} windows of text that neither chose by, the search's choice less the grid's: "
        f"{other['difference']['mean']:+.3f} x [{low:+.3f}, {high:+.3f}], its last layer's perplexity "
        f"{100 * other['perplexity_change']:+.2f}% ({link(path)})."
    )
    return "\n".join([*lines, "", about])


def _short(value: object) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)
