"""Run docs/story.ipynb anew and keep its outputs: `make story`. It needs the built-in model and some minutes.

    python scripts/story.py

What a cell tagged `same` prints is the same in every run on such a machine: `tests/test_story.py` compares it.
"""

from pathlib import Path

import nbformat
import torch
from nbclient import NotebookClient
from nbformat import NotebookNode

from layerskip.measure.environment import device_name, environment

STORY = Path(__file__).parent.parent / "docs" / "story.ipynb"
SECONDS = 1200  # of a cell


def executed(story: Path = STORY) -> NotebookNode:
    """Read a notebook and run all its cells in a fresh kernel; times of day and warnings are left out."""
    notebook = nbformat.read(story, as_version=4)
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", record_timing=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["layerskip"] = machine()
    return notebook


def machine() -> dict[str, str]:
    """What the bits of a state depend on."""
    return {
        "processor": device_name(torch.device("cpu")),
        "vector unit": torch.backends.cpu.get_cpu_capability(),
        "compiled kernels": environment()["compiled kernels"],
    }


def printed(notebook: NotebookNode, tag: str) -> dict[str, str]:
    """What the cells with a tag printed, by the id of the cell."""
    cells = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]
    streams = {cell.id: [one.text for one in cell.outputs if one.output_type == "stream"] for cell in cells}
    return {name: "".join(texts) for name, texts in streams.items()}


if __name__ == "__main__":
    nbformat.write(executed(), STORY)
