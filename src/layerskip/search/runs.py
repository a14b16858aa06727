"""One run of a search: `layerskip train` as a process, watched through its checkpoints, stopped and resumed.

    run = TrialRun(folder, settings)
    for step, figures in run.follow():          # at every evaluation; `run.stop()` ends it with a checkpoint
        ...

Nothing of a run is in this process, so that a search may be killed at any moment: the folder says all there is.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from layerskip.errors import UserError
from layerskip.train import checkpoints

POLL_S = 0.2
RESULT = "result.json"
LOG = "train.log"


class Figures(NamedTuple):
    """What an evaluation told: predicted speed-up, and the loss of the whole model in nats per token."""

    speedup: float | None
    loss: float | None


class TrialRun:
    """A run in a folder of its own: begun, resumed, or done already."""

    def __init__(self, folder: Path, recipe: str, settings: Sequence[str]) -> None:
        self.folder, self.output = folder, folder / "run"
        self._command = [
            sys.executable, "-m", "layerskip", "--quiet", "train", recipe, *settings, f"output={self.output}",
            "--json",
        ]  # fmt: skip
        self._process: subprocess.Popen[str] | None = None

    @property
    def result(self) -> dict[str, Any] | None:
        """The final figures, once they are there."""
        file = self.folder / RESULT
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def follow(self) -> Iterator[tuple[int, Figures]]:
        """Train to the end, or to `stop`; yield every evaluation once, those of an earlier sitting too.

        Raises: UserError with the last lines of a run that failed.
        """
        told = 0
        if self.result is None:
            self._begin()
        while True:
            ended = self._process is None or self._process.poll() is not None
            for step, figures in self._evaluated():
                if step > told:
                    told = step
                    yield step, figures
            if ended:
                break
            time.sleep(POLL_S)
        if self._process is not None:
            self._end()

    def stop(self) -> None:
        """End the process; what it has done stays in its checkpoint."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait()

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        resume = ["--resume"] if (self.output / "recipe.yaml").is_file() else []
        with (self.folder / LOG).open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [*self._command, *resume], stdout=subprocess.PIPE, stderr=log, text=True
            )

    def _end(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        printed = self._process.stdout.read().strip()
        if self._process.returncode == 0:
            from layerskip.checkpoint.files import write_json

            write_json(self.folder / RESULT, json.loads(printed.split("\n")[-1]))
        elif self._process.returncode not in (130, -signal.SIGTERM, 143):
            said = (self.folder / LOG).read_text(encoding="utf-8").strip().split("\n")[-3:]
            raise UserError(
                f"a run of the search failed: {' '.join(said)[-500:]}", f"see {self.folder / LOG}"
            )

    def _evaluated(self) -> list[tuple[int, Figures]]:
        """Read the evaluations of the newest checkpoint, and of the end."""
        found = []
        newest = checkpoints.latest(self.output)
        if newest is not None:
            history = json.loads((newest / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
            found = [(line["step"], figures_of(line)) for line in history if "eval_predicted_speedup" in line]
        if (done := self.result) is not None and not any(step == done["steps"] for step, _ in found):
            found.append((done["steps"], Figures(done["predicted_speedup"], whole_loss(done["exits"]))))
        return found


def figures_of(line: dict[str, Any]) -> Figures:
    """Read a line of a trainer's log."""
    exits = {key.split("_")[2]: {"loss": value} for key, value in line.items() if key.startswith("eval_exit_")
             and key.endswith("_loss")}  # fmt: skip
    return Figures(line.get("eval_predicted_speedup"), whole_loss(exits))


def whole_loss(exits: dict[str, Any]) -> float | None:
    """The loss of the last layer."""
    return exits[max(exits, key=int)]["loss"] if exits else None
