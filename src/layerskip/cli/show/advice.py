"""How doctor's and tune's findings look in a terminal: the verdict first, then sources, curve, cells, checks."""

from __future__ import annotations

from typing import Any

from rich.table import Column, Table
from rich.text import Text

from layerskip.cli.show.terminal import bar, out, share

BAR = 30
CURVE = 12  # exits of the curve that are printed, beside those that matter
ROWS = 6  # cells


def print_doctor(result: dict[str, Any]) -> None:
    """Print a diagnosis, the verdict on top."""
    good = result["recommended_mode"] == "self-speculative"
    out.print(Text(result["verdict"], style="bold green" if good else "bold yellow"))
    checks = result["checks"]
    for warning in checks["warnings"]:
        out.print(Text(f"warning: {warning}", style="yellow"))
    out.print(sameness_line(checks))
    print_sources(result)
    print_curve(result)
    print_cells(result)
    for line in facts(result):
        out.print(Text(line, style="dim"))


def sameness_line(checks: dict[str, Any]) -> Text:
    """Say whether outputs are the same twice and under self-speculation, and what that rests on."""
    dtype = checks["dtype"]
    if not checks["deterministic"]:
        return Text(
            "decoding the same prompt twice gave two outputs: nothing here is comparable", style="bold red"
        )
    if checks["self_speculative_equal"]:
        how = f"by self-speculation with {checks['settings']} settings"
        return Text(f"equality: decoded twice, and {how}: the same tokens", style="green")
    where = f"self-speculation differs from plain decoding from token {checks['first_difference'] + 1} on"
    if checks["equality_promised"]:
        lost = f"not lossless: {where}, in {dtype} it must not; layerskip verify finds the smallest case"
        return Text(lost, style="bold red")
    ties = f"{share(checks['near_ties'])} of the positions are ties up to one unit in the last place"
    return Text(
        f"{where}: {ties}, and in {dtype} they may turn over here; --dtype float32 is exact", "yellow"
    )


def print_sources(result: dict[str, Any]) -> None:
    """Print what each source of drafts is predicted to give; the one recommended is marked."""
    from layerskip.measure.advice.cells import worded

    table = Table("source", Column("predicted", no_wrap=True), "per round", "plain rounds", "with", box=None)
    for name, row in result["sources"].items():
        table.add_row(
            name,
            speedup(row["predicted_speedup"], row["interval"]),
            f"{row['tokens_per_round']:.2f}",
            share(row["plain_share"]),
            worded(row).removeprefix(f"{name}, "),
            style="bold green" if name == result["recommended_drafter"] else None,
        )
    out.print(table)


def print_curve(result: dict[str, Any]) -> None:
    """Print the agreement of exits as bars; trained exits are marked."""
    table = Table("exit", "agrees with the whole model", "", box=None)
    from layerskip.measure.advice.prediction import spread

    trained, best = set(result.get("exits", ())), result["best"]["exit_layer"]
    few = {*trained, best, *spread([int(name) for name in result["agreement"]], CURVE)}
    for name, value in result["agreement"].items():
        if int(name) not in few:
            continue
        marks = [
            word for word, holds in (("trained", int(name) in trained), ("best", int(name) == best)) if holds
        ]
        drawn = Text(bar(value, BAR), style="green" if marks else "dim")
        table.add_row(
            name, drawn, Text(f"{share(value)} {' '.join(marks)}", style="bold" if marks else "dim")
        )
    out.print(table)


def print_cells(result: dict[str, Any]) -> None:
    """Print the best predicted cells, one per exit first."""
    rows = sorted(result["surface"], key=lambda row: -row["predicted_speedup"])
    leading = {row["exit_layer"]: row for row in reversed(rows)}
    chosen = sorted(leading.values(), key=lambda row: -row["predicted_speedup"])[:ROWS]
    table = Table("E", "K", "vocabulary", "predicted", "accepted", "per round", "round", box=None)
    for row in chosen:
        table.add_row(
            str(row["exit_layer"]),
            str(row["draft_length"]),
            str(row["draft_vocab"]),
            speedup(row["predicted_speedup"], row["interval"]),
            share(row["acceptance"]),
            f"{row['tokens_per_round']:.2f}",
            f"{1000 * row['round_s']:.1f} ms",
        )
    out.print(table)


def speedup(value: float, ends: list[float]) -> str:
    return f"{value:.2f} x [{ends[0]:.2f}, {ends[1]:.2f}]"


def facts(result: dict[str, Any]) -> list[str]:
    """What stands in small print: steps, ties, endings, memory."""
    checks, memory, told = result["checks"], result["memory"], result["configuration"]
    ends = ", ".join(map(str, checks["eos_ids"])) or "none"
    template = "chat template" if checks["prompts_as_chat"] else "as plain text"
    row = " (row-exact)" if checks["row_exact"] else ""
    return [
        f"{told['num_prompts']} prompts, {template}, {result['tokens']} tokens; "
        f"{checks['ended']} of {checks['continuations']} outputs ended by themselves, EOS {ends}",
        f"{checks['dtype']}{row} on {told['device_name']}, {checks['stack']} stack: a plain step takes "
        f"{1000 * result['step_s']['plain']:.1f} ms",
        f"two best logits: equal at {100 * checks['ties']:.1f}%, within a unit in the last place at "
        f"{100 * checks['near_ties']:.1f}% of the positions",
        f"memory: weights {memory['weight_bytes'] / 1e6:.0f} MB, cache "
        f"{memory['cache_bytes_per_token'] / 1e3:.0f} kB a token, "
        f"draft head {memory['draft_head_bytes'] / 1e6:.1f} MB",
        *_formats(result["formats"]),
    ]


def _formats(rows: list[dict[str, Any]] | None) -> list[str]:
    """What weights of fewer bits would give, or how to find out."""
    if rows is None:
        return []
    if not rows:
        return ["weights of fewer bits: `layerskip formats MODEL` measures what they cost and gain here"]
    return [
        f"--quantize {row['name']}: a plain step {row['step_ratio']:.2f} x as fast, "
        f"{row['step_bytes'] / 1e6:.0f} MB at {share(row['bandwidth_share'])} of the bandwidth, "
        f"perplexity +{100 * row['perplexity_cost']:.2f}%"
        for row in rows
        if row["name"] is not None
    ]


def print_tune(result: dict[str, Any]) -> None:
    """Print what was measured, the choice on top, then all settings of the race by rank."""
    from layerskip.measure.advice.cells import worded

    best = result["best"]
    gain, ends = best["measured_speedup"], best["measured_interval"]
    pays = ends[0] > 1
    setting = worded(best)
    if best["policy"] == "adaptive":
        setting += ", policy adaptive"
    if best["policy"] == "confidence":
        setting += f", drafting stops under a confidence of {best['confidence']}"
    found = f"{speedup(gain, ends)} over plain decoding, measured"
    then = "" if pays else "; not faster, so plain decoding (--drafter off) is the choice"
    out.print(Text(f"{setting}: {found}{then}", style="bold green" if pays else "bold yellow"))
    equal, of = (sum(row[key] for row in result["measured"]) for key in ("equal", "of"))
    style = "green" if equal == of else "bold yellow"
    out.print(Text(f"equality: {equal} of {of} outputs are those of plain decoding", style=style))
    measured = Column("measured", no_wrap=True)
    table = Table("setting", "policy", "predicted", measured, "accepted", "runs", box=None)
    for row in result["measured"]:
        sure = row["policy"] if row["confidence"] is None else f"conf. {row['confidence']}"
        table.add_row(
            worded(row),
            sure,
            f"{row['predicted_speedup']:.2f} x",
            speedup(row["speedup"]["ratio"], row["speedup"]["ci95"]),
            share(row["acceptance"]),
            str(row["of"]),
        )
    out.print(table)
    print_curve(result)
    saved = result["saved"]
    out.print(
        Text(f"written: {saved}, every verb uses it now" if saved else result["how_to_save"], style="dim")
    )
