"""The verb env: what a bug report needs."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from layerskip.cli.app import AsJson, verb
from layerskip.cli.show.terminal import out, tell


@verb
def env(as_json: AsJson = False) -> None:
    """Show versions, devices, dtypes and the cache folder: what a bug report needs.

    layerskip env
    """
    from layerskip.measure.environment import environment

    tell(environment(), as_json, _show)


def _show(facts: dict[str, Any]) -> None:
    table = Table(box=None, show_header=False)
    for key, value in facts.items():
        table.add_row(key, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    out.print(table)
