"""How a certificate looks: in a terminal, and as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from layerskip.cli.show.terminal import out

STYLES = {"holds": "green", "near ties only": "yellow", "differs": "bold red"}  # others are dim


def print_proof(result: dict[str, Any]) -> None:
    """Print the verdict, a line per check, the smallest failing case."""
    out.print(Text(verdict(result), style="bold green" if result["holds"] else "bold red"))
    table = Table("check", "cases", "verdict", box=None)
    for check in result["checks"]:
        style = STYLES.get(check["verdict"], "dim")
        word = check["verdict"] + (", cut short" if check["cut"] else "")
        table.add_row(check["check"], check["cases"], Text(word, style))
    out.print(table)
    for check in result["checks"]:
        if check["verdict"] != "holds" or "draws" in check["cases"]:
            out.print(Text(f"{check['check']}: {check['told']}"))
    for check in result["checks"]:
        if check["command"]:
            out.print(Text(f"{check['check']}, the smallest case found; run it again with"))
            out.print(Text(f"  {check['command']}", style="bold"))
    if not result["complete"]:
        out.print(Text("what was cut short goes on with a larger --seconds", style="yellow"))
    for line in facts(result):
        out.print(Text(line, style="dim"))


def print_case(told: dict[str, Any]) -> None:
    """Print both outputs of a case that was run again."""
    for number, (plain, own) in enumerate(zip(told["plain"], told["own"], strict=True), 1):
        out.print(f"prompt {number}: plain      {plain}")
        out.print(f"prompt {number}: self-spec. {own}")
    good = told["holds"]
    out.print(Text("equal" if good else "they differ", style="green" if good else "bold red"))


def verdict(result: dict[str, Any]) -> str:
    model, dtype = result["configuration"]["model"], result["configuration"]["dtype"]
    where = f"{model} in {dtype} on this machine"
    if not result["holds"]:
        return f"not lossless: {where}"
    ties = result["near_ties"]["differences"]
    good = f"lossless but for {ties} near ties" if ties else "nothing differs"
    return f"{good}{'' if result['complete'] else ' in what the time allowed'}: {where}"


def facts(result: dict[str, Any]) -> Iterator[str]:
    """What was verified, with what, where."""
    told = result["configuration"]
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    row = "row-exact" if result["row_exact"] else "not row-exact"
    exits = ", ".join(map(str, told["trained_exits"])) or "none"
    yield f"weights {result['fingerprint']}, {result['layers']} layers, trained exits: {exits}"
    yield f"{told['dtype']}, {result['stack']} stack ({row}), {told['device_name']}, {told['threads']} threads"
    yield f"{told['num_prompts']} prompts, up to {told['max_new_tokens']} new tokens, {result['seconds']:.0f} s"
    yield f"versions: {versions}"


def markdown(result: dict[str, Any]) -> str:
    """Write the certificate as a page."""
    lines = [f"# {verdict(result)}", "", f"`layerskip verify`, {result['configuration']['date']}.", ""]
    lines += ["| check | cases | verdict | |", "| --- | --- | --- | --- |"]
    for check in result["checks"]:
        word = check["verdict"] + (", cut short" if check["cut"] else "")
        lines.append(f"| {check['check']} | {check['cases']} | {word} | {check['told']} |")
    for check in result["checks"]:
        if check["command"]:
            lines += ["", f"{check['check']}, the smallest case found:", "", f"```\n{check['command']}\n```"]
    lines += ["", *(f"- {line}" for line in facts(result))]
    return "\n".join(lines) + "\n"
