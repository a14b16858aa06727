"""The verb pack-delta: what training changed, as a small file beside the base it was trained from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from layerskip.cli.app import AsJson, verb
from layerskip.cli.results import progress
from layerskip.cli.show.terminal import out, share, tell
from layerskip.errors import UserError
from layerskip.option import Option
from layerskip.reading import read_json


@verb
def pack_delta(
    base: Annotated[str, typer.Argument(help="What training began with: built-in name, folder or hub id.")],
    tuned: Annotated[str, typer.Argument(help="What training made of it: a folder or hub id.")],
    output: Annotated[Path, Option("A .safetensors file; one that is there is replaced.")],
    size_mb: Annotated[float, Option("The largest size of the file, in 10^6 bytes.", above=0)] = 24.0,
    about: Annotated[Path | None, Option("A JSON object to carry along: data, licence, results.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write what training changed as a small file, at the rank that its size allows, and say how much is kept.

    layerskip pack-delta smollm2-135m-base ./my-model --output my-model.safetensors --size-mb 24
    """
    if output.suffix != ".safetensors":
        raise UserError(f"{output} is not named .safetensors", "--output my-model.safetensors")
    if not output.resolve().parent.is_dir():
        raise UserError(f"no folder {output.parent}", "make it first, or name another --output")
    told = {} if about is None else _told(about)
    from layerskip.checkpoint import resolve as hub
    from layerskip.checkpoint.delta import make_delta

    folders = [hub.resolve(name) for name in (base, tuned)]
    told.setdefault("base", folders[0].resolve().name if Path(base).is_dir() else base)
    with progress() as watch:
        report = make_delta(folders[0], folders[1], output, int(size_mb * 1e6), told, watch)
    tell(report, as_json, _show)


def _told(path: Path) -> dict[str, Any]:
    told: dict[str, Any] = read_json(path, dict, "--about names a file with one JSON object")
    return told


def _show(report: dict[str, Any]) -> None:
    table = Table("parameters", "of the change", "kept", "mean rank", "MB", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in report["kinds"]:
        rank = "" if row["mean_rank"] is None else f"{row['mean_rank']:.0f}"
        many = "" if row["parameters"] == 1 else f" ({row['parameters']})"
        name = row["name"].removeprefix("model.").removesuffix(".weight")
        table.add_row(name + many, share(row["share"]), share(row["kept"]), rank, f"{row['bytes'] / 1e6:.2f}")
    out.print(table)
    ids = f", {report['draft_vocab']} ids of the draft vocabulary" if report["draft_vocab"] else ""
    out.print(
        f"{report['file']}: {report['bytes'] / 1e6:.2f} MB, {share(report['kept'])} of the squared change{ids}"
    )
