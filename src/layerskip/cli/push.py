"""The verb push: a model to a hub."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from layerskip.cli.app import AsJson, Model, verb
from layerskip.cli.show.terminal import notes, out, tell
from layerskip.option import Option


@verb
def push(
    model: Model,
    repo: Annotated[str, typer.Argument(help="Where to: org/name of the hub.", show_default=False)],
    private: Annotated[bool, Option("Make the repository a private one, if it is made.")] = False,
    message: Annotated[str, Option("What the change is called.")] = "Upload with layerskip",
    as_json: AsJson = False,
) -> None:
    """Upload a model's folder to a hub, as `hf auth login` or HF_TOKEN allows; only files of a checkpoint go.

    layerskip push ./my-model my-name/my-model
    """
    from layerskip.checkpoint.resolve import resolve
    from layerskip.export.upload import pushed

    folder = resolve(model)
    with notes.status(f"Uploading {folder.name} to {repo} …"):
        report = pushed(folder, repo, private=private, message=message)
    tell(report, as_json, _show)


def _show(report: dict[str, Any]) -> None:
    out.print(f"{len(report['files'])} files, {sum(report['files'].values()) / 1e6:.2f} MB: {report['url']}")
