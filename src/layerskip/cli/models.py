"""The verb models: what is built in, and what is cached."""

from __future__ import annotations

import json

from rich.text import Text

from layerskip.cli.app import AsJson, verb
from layerskip.cli.show.terminal import out


@verb
def models(as_json: AsJson = False) -> None:
    """List built-in models and what is cached.

    layerskip models
    """
    from layerskip.checkpoint import resolve as hub

    rows = [
        {
            "name": builtin.name,
            "description": builtin.description,
            "licence": builtin.licence,
            "download_bytes": builtin.size_bytes,
            "path": None if (path := hub.cached(builtin.name)) is None else str(path),
        }
        for builtin in hub.builtins()
    ]
    if as_json:
        print(json.dumps(rows))
        return
    for builtin in hub.builtins():
        out.print(Text(builtin.name, style="bold") + Text(f"  {builtin.description} ({builtin.licence})"))
        cached = hub.cached(builtin.name)
        size = f"not downloaded yet, {builtin.size_bytes / 1e6:.0f} MB"
        out.print(Text(f"  {size if cached is None else cached}", style="dim"))
    out.print(Text("A Hugging Face folder or hub id works in the same place.", style="dim"))
