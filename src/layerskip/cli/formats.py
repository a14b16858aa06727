"""The verb formats: weights in fewer bits, and what they cost and gain here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from rich.text import Text

from layerskip.cli.app import AsJson, Loading, Model, load, verb
from layerskip.cli.options import without
from layerskip.cli.results import progress
from layerskip.cli.show.terminal import out, share, tell
from layerskip.errors import UserError

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel


@verb
def formats(
    model: Model, loading: Annotated[Loading, without("quantize", "dtype")], as_json: AsJson = False
) -> None:
    """Measure what each format of weights costs and gains here: bytes, time of a step, perplexity.

    layerskip formats smollm2-135m
    """
    from layerskip.checkpoint.resolve import resolve
    from layerskip.decode import weight_formats
    from layerskip.measure.speed.card import BUFFER_BYTES, bandwidth
    from layerskip.model.native.formats import FORMATS

    folder = resolve(model)

    def loaded(name: str | None) -> LanguageModel:
        lm = load(str(folder), Loading(**vars(loading) | {"quantize": name}))
        if lm.stack.name != "native" or lm.stack.device.type != "cpu":
            raise UserError("formats are of the native stack on the CPU", "docs/limits.md names its families")
        return lm

    with progress() as watch:
        rows = weight_formats.compared(folder, loaded, watch, again=True)
        import torch

        told = weight_formats.as_records(rows, bandwidth(torch.device("cpu"), BUFFER_BYTES))
    abouts = {name: one.about for name, one in FORMATS.items()}
    chosen = weight_formats.fastest(rows)
    records = [{**row, "about": abouts.get(row["name"], "as loaded")} for row in told]
    tell({"formats": records, "auto": chosen}, as_json, _show)


def _show(found: dict[str, Any]) -> None:
    table = Table("weights", "MB a step", "ms a step", "faster", "of the bandwidth", "perplexity", box=None)
    for row in found["formats"]:
        table.add_row(
            row["name"] or "full",
            f"{row['step_bytes'] / 1e6:.0f}",
            f"{1000 * row['step_s']:.1f}",
            f"{row['step_ratio']:.2f} x",
            share(row["bandwidth_share"]),
            f"+{100 * row['perplexity_cost']:.2f}%" if row["name"] else "",
        )
    out.print(table)
    name = found["auto"]
    told = (
        "--quantize auto leaves the weights as they are" if name is None else f"--quantize auto takes {name}"
    )
    out.print(
        Text(f"{told}: the fastest for less than 1% of perplexity, on the model's own text", style="dim")
    )
