"""What a search found, as files: the best recipe, a page, and a picture of speed-up against cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

from layerskip.checkpoint.files import write_text
from layerskip.search.study import SECONDS, SPEEDUP, WHY, Search, front, speedup_of
from layerskip.train.job.recipe import as_yaml

if TYPE_CHECKING:
    import optuna

BEST, PAGE, PICTURE = "best.yaml", "report.md", "front.png"
LEAST = 4  # finished trials of which importances say something


def report(search: Search) -> dict[str, Any]:
    """Write the files; return what they say. The picture is left out where there is no matplotlib."""
    finished = search.finished()
    trials = search.study.get_trials(deepcopy=False)
    told: dict[str, Any] = {
        "folder": str(search.folder),
        "trials": len(trials),
        "finished": len(finished),
        "spent_s": search.spent_s,
        "max_cost": search.max_cost,
        "best": None,
        "importance": importances(search, finished),
        "front": [_row(search, trial) for trial in front(finished, search.cost_of)],
        "all": [_row(search, trial) for trial in trials],
    }
    if finished:
        best = finished[0]
        told["best"] = _row(search, best) | {"recipe": str(search.folder / BEST)}
        write_text(search.folder / BEST, as_yaml(search.recipe_of(best)))
        picture(search, finished, search.folder / PICTURE)
    write_text(search.folder / PAGE, page(search, told))
    return told


def importances(search: Search, finished: list[optuna.trial.FrozenTrial]) -> dict[str, float]:
    """How much of the difference between good and other trials each key explains; nothing of few trials."""
    if len(finished) < LEAST or len(search.space.ranges) < 2:
        return {}
    try:
        found = get_param_importances(search.study, evaluator=PedAnovaImportanceEvaluator())
    except (ValueError, RuntimeError):  # all alike
        return {}
    return {key: float(value) for key, value in found.items()}


def _row(search: Search, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "state": trial.state.name.lower(),
        "speedup": trial.user_attrs.get(SPEEDUP),
        "cost": search.cost_of(trial) if SPEEDUP in trial.user_attrs else None,
        "seconds": trial.user_attrs.get(SECONDS),
        "steps": max(trial.intermediate_values, default=0),
        "settings": dict(trial.params),
        "why": trial.user_attrs.get(WHY),
    }


def page(search: Search, told: dict[str, Any]) -> str:
    """The report in words and tables."""
    keys = [*search.space.ranges]
    lines = [f"# Search of {search.recipe}", ""]
    best = told["best"]
    if best is None:
        lines += ["No trial has finished.", ""]
    else:
        within = best["cost"] is None or best["cost"] <= search.max_cost
        lines += [
            f"Best: trial {best['trial']}, {best['speedup']:.2f} x predicted, perplexity "
            f"+{100 * (best['cost'] or 0):.1f}%"
            + (
                "."
                if within
                else f": no trial stayed within +{100 * search.max_cost:.1f}%, this one lost least beyond it."
            ),
            f"`layerskip train {best['recipe']} output=FOLDER steps=...` trains it in full.",
            "",
        ]
    if told["importance"]:
        shares = ", ".join(f"{key} {100 * value:.0f}%" for key, value in told["importance"].items())
        lines += [f"What made the difference: {shares}.", ""]
    lines += ["| trial | predicted | perplexity | steps | " + " | ".join(keys) + " | |"]
    lines += ["| --- " * (len(keys) + 5) + "|"]
    for row in sorted(told["all"], key=lambda row: -(row["speedup"] or 0.0)):
        cells = [str(row["settings"].get(key, "")) for key in keys]
        speedup = "" if row["speedup"] is None else f"{row['speedup']:.2f} x"
        cost = "" if row["cost"] is None else f"+{100 * row['cost']:.1f}%"
        lines.append(
            f"| {row['trial']} | {speedup} | {cost} | {row['steps']} | "
            + " | ".join(cells)
            + f" | {row['why'] or ''} |"
        )
    untried = _untried(search, told)
    lines += ["", f"Not tried: {untried}." if untried else "Every choice was tried.", ""]
    return "\n".join(lines)


def _untried(search: Search, told: dict[str, Any]) -> str:
    """Choices that no trial had, and ends of ranges that none came near."""
    missing = []
    for key, told_range in search.space.ranges.items():
        seen = [row["settings"][key] for row in told["all"] if key in row["settings"]]
        if told_range.choices:
            missing += [f"{key}={choice}" for choice in told_range.choices if choice not in seen]
        elif seen:
            scale = math.log if told_range.logarithmic else float
            low, high, least, most = map(scale, (told_range.low, told_range.high, min(seen), max(seen)))
            fifth = (high - low) / 5
            missing += [f"{key} below {min(seen):g}"] if least > low + fifth else []
            missing += [f"{key} above {max(seen):g}"] if most < high - fifth else []
    return ", ".join(missing)


def picture(search: Search, finished: list[optuna.trial.FrozenTrial], file: Path) -> Path | None:
    """Draw speed-up against cost, the front as a line."""
    from layerskip.errors import UserError
    from layerskip.measure.exits import draw

    points = {trial.number: (100 * search.cost_of(trial), speedup_of(trial)) for trial in finished}
    try:
        return draw.front(
            points, [t.number for t in front(finished, search.cost_of)], 100 * search.max_cost, file
        )
    except UserError:  # no matplotlib
        return None
