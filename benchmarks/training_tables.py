"""Tables of runs from scratch and of the search beside a grid, from committed result files."""

from __future__ import annotations

import json
import re
from typing import Any

import record
from cells import head, line, link, number


def scratch() -> str:
    """What dropout and exit loss each do: the last layer, the exits that were raced, then every exit."""
    path = record.newest("scratch_small_*.json")
    assert path is not None
    result = json.loads(path.read_text())
    cells, told = result["cells"], result["configuration"]
    first = next(iter(cells.values()))["exits"]
    raced = [k for k in first if "speedup" in first[k]]
    lines = head(
        "trained with", "seeds", "perplexity of the last layer", "over the baseline's",
        *(f"exit {k}: agreement, drafts kept, speed-up" for k in raced),
    )  # fmt: skip
    last = max(first, key=int)
    for name, cell in cells.items():
        exits = cell["exits"]
        change = "" if name == "baseline" else _percent(cell["perplexity_change"])
        lines.append(
            line(
                name, str(len(cell["by_seed"])), spread(exits[last]["perplexity"]), change,
                *(_raced(exits[k]) for k in raced),
            )
        )  # fmt: skip
    lines += ["", *head("exit", *cells)]
    for k in sorted(first, key=int):
        own = (cell["exits"][k] for cell in cells.values())
        lines.append(line(k, *(f"{_share(e['agreement'])}, {number(e['perplexity']['ratio'])}" for e in own)))
    made, tokens = result["made"], 1
    for key in ("steps", "batch_size", "length"):
        found = re.search(rf"^{key}: (\d+)", result["recipe"], re.M)
        assert found is not None
        tokens *= int(found[1])
    size = sum(made["parameters"].values()) / 1e6
    equal = min(cell["exits"][k]["equal"]["ratio"] for cell in cells.values() for k in raced)
    about = (
        f"A Llama of {size:.1f} M parameters and {made['layers']} layers, {tokens / 1e6:.0f} M tokens a run, the "
        f"same for all. Perplexity: {told['windows']} windows of held-out text. Speed-up: self-speculation over "
        f"plain decoding, K {told['draft_length']}, {told['prompts']} prompts of {told['max_new_tokens']} tokens, "
        f"{told['trials']} trials, {told['dtype']}, {told['threads']} threads of an {told['device_name']}; "
        f"{100 * equal:.0f}% of outputs equal. Intervals: 95% over seeds, by Student's t; of one seed there is "
        f"none. The second table: agreement and perplexity of every exit ({link(path)})."
    )
    return "\n".join([*lines, "", about])


def continual() -> str:
    """Each exit before and after continual training, then what more tokens would do to its loss."""
    path = record.newest("continual_*.json")
    assert path is not None
    result = json.loads(path.read_text())
    before, cells, told = result["before"], result["cells"], result["configuration"]
    trained = sorted(next(iter(cells.values()))["curve"][0]["loss"], key=int)
    lines = head("exit", "before", *cells)
    for k in trained:
        lines.append(line(k, _judged(before[k]), *(_judged(cell["exits"][k]) for cell in cells.values())))
    fits = {name: cell["more"] for name, cell in cells.items() if cell["more"]}
    for name, more in fits.items():
        lines += [
            "",
            *head(
                f"{name}: loss of exit", "a doubling of the tokens", "after twice as many", "after 16 times"
            ),
        ]
        for k in trained:
            doubling, *later = (
                {"ratio": fit["middle"], "ci95": fit["ci95"]}
                for fit in map(more[k].get, ("doubling", "2", "16"))
            )
            lines.append(line(k, spread(doubling, "+.3f"), *map(spread, later)))
    paid = "; ".join(f"{name} {_percent(cell['perplexity_change'])}" for name, cell in cells.items())
    tokens = next(iter(cells.values()))["curve"][-1]["tokens"]
    about = (
        f"Of each exit: agreement with the last layer, perplexity, on {told['windows']} windows, before and after "
        f"{tokens / 1e6:.1f} M tokens. The last layer's perplexity: {paid} (95% over windows). Losses in nats per "
        "token on held-out text, by a line over the logarithm of the tokens: of one run each, and if the line goes "
        f"on ({link(path)})."
    )
    return "\n".join([*lines, "", about])


def _judged(found: dict[str, Any]) -> str:
    return f"{_share({'ratio': found['agreement']})}, {number(found['perplexity'])}"


def spread(found: dict[str, Any], form: str = ".2f") -> str:
    """A mean over seeds and its interval, where there is one."""
    middle = format(found["ratio"], form)
    return (
        middle if "ci95" not in found else f"{middle} [{found['ci95'][0]:{form}}, {found['ci95'][1]:{form}}]"
    )


def _percent(found: dict[str, Any]) -> str:
    scaled = {
        name: [100 * x for x in value] if name == "ci95" else 100 * value for name, value in found.items()
    }
    return spread(scaled, "+.1f") + "%"


def _share(found: dict[str, Any]) -> str:
    return f"{100 * found['ratio']:.0f}%"


def _raced(found: dict[str, Any]) -> str:
    return f"{_share(found['agreement'])}, {_share(found['acceptance'])}, {spread(found['speedup'])} x"


def search() -> str:
    """The search's choice beside the best of a grid, on data that neither saw."""
    path = record.newest("search_scratch-small_*.json")
    assert path is not None
    result = json.loads(path.read_text())
    other = result["other"]
    lines = head("", "runs", "to their end", "minutes", "its choice", "predicted", "elsewhere")
    for name, own in (("grid", result["grid"]), ("search", result["search"])):
        chosen = own["settings"]
        if isinstance(chosen, dict):
            chosen = [
                f"{key}={value:.2g}" if isinstance(value, float) else f"{key}={value}"
                for key, value in chosen.items()
            ]
        runs, ended = own.get("trials", own.get("runs")), own.get("finished", own.get("runs"))
        times = (f"{own['speedup']:.3f} x", f"{other[name]:.3f} x")
        minutes = f"{own['seconds'] / 60:.0f}"
        lines.append(line(name, str(runs), str(ended), minutes, f"`{' '.join(chosen)}`", *times))
    gap = other["difference"]
    low, high = gap["ci95"]
    about = (
        "Predicted: on the data that both chose by. Elsewhere: on another book, "
        f"{other['windows']} windows; the search less the grid {gap['mean']:+.3f} [{low:+.3f}, {high:+.3f}] (95%, "
        f"over windows), its last layer's perplexity {100 * other['perplexity_change']:+.1f}% over the grid's "
        f"({link(path)})."
    )
    return "\n".join([*lines, "", about])
