"""The verb export: a model for other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from layerskip.cli.app import AsJson, Model, verb
from layerskip.cli.show.terminal import notes, out, tell
from layerskip.export.names import TARGETS, TYPES
from layerskip.option import Option


@verb
def export(
    model: Model,
    to: Annotated[
        str,
        Option("; ".join(f"{name}: {what}" for name, what in TARGETS.items()) + ".", choices=tuple(TARGETS)),
    ],
    output: Annotated[
        Path | None, Option("Folder to write.", flags=("--output", "-o"), shown="MODEL-TARGET")
    ] = None,
    exit_layer: Annotated[
        int | None, Option("E, layers of the draft.", least=1, shown="the checkpoint's")
    ] = None,
    type: Annotated[str | None, Option("How GGUF stores matrices.", choices=TYPES, shown="f16")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model for another engine, open what was written and compare it.

    layerskip export ./my-model --to gguf --exit-layer 6
    """
    from layerskip.checkpoint.resolve import resolve
    from layerskip.export.targets import Source, Wanted
    from layerskip.export.targets import export as written

    source = Source(resolve(model), model)
    place = output or Path(f"{source.short}-{to}")
    with notes.status(f"Writing {place} …"):
        report = written(source, to, place, Wanted(exit_layer, type))
    tell(report, as_json, _show)


def _show(report: dict[str, Any]) -> None:
    for name, size in report["files"].items():
        out.print(f"{size / 1e6:10.2f} MB  {report['output']}/{name}")
    out.print(f"compared: {report['compared']}")
    if "note" in report:
        out.print(f"note: {report['note']}")
    for command in report["use"]:
        out.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)
