"""Tables of other engines with our exports, and of lm-eval with our model."""

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
            equal = row.get("equal")
            same = "" if equal is None else f"{equal['same']} of {equal['of']}"
            lines.append(
                line(
                    row["artefact"],
                    row["engine"],
                    "no: " + row["failed"] if "failed" in row else "yes",
                    same,
                    share(row.get("acceptance")),
                    f"`{row['command']}`" if "command" in row else "",
                )
            )
        parts.append(
            "\n".join([
                *lines, "",
                f"`{told['model']}`, exit {result['exit_layer']}, {told['draft_length']} drafts a round, "
                f"float32, greedy, {result['prompts']} prompts of {told['max_new_tokens']} tokens. Equal "
                "outputs: token for token those of our plain decoding (llama.cpp's stop at an end of "
                f"sequence). Drafts kept: of all drafted, as the engine counts them ({link(path)}).",
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
                f"{numbers['wikitext']['word_perplexity']:.6g}",
                f"{row['same_answers']} of {told['limit']}",
            )
        )  # fmt: skip
    about = (
        f"`{told['model']}`, {told['limit']} questions and pieces of text, greedy, "
        f"{machine(told | {'dtype': 'float32'})}; ours drafts by default, which changes no answer. At another "
        f"layer only likelihoods are read there ({link(path)})."
    )
    return "\n".join([*lines, "", about])
