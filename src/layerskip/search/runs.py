"""One run of a search: `layerskip train` as a process, watched through its checkpoints, stopped and resumed.

    run = TrialRun(folder, recipe, settings)
    for step, figures in run.follow():          # at every evaluation; `run.stop()` ends it with a checkpoint
        ...

Nothing of a run is in this process, so that a search may be killed at any moment: the folder says all there is.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from layerskip.checkpoint.files import write_json, write_text
from layerskip.errors import UserError

POLL_S = 0.2
NOTE_S = 5.0  # between two notes of the time a run has taken
RESULT, TOOK = "result.json", "seconds.txt"
LOG = "train.log"


class Figures(NamedTuple):
    """What an evaluation told: predicted speed-up, and the loss of the whole model in nats per token."""

    speedup: float | None
    loss: float | None


class StoppedError(Exception):
    """A run was ended from outside: it goes on from its checkpoint when it is followed again."""


class TrialRun:
    """A run in a folder of its own: begun, resumed, or done already.

    `held` is the descriptor of a lock that the process keeps, too: should this one be killed, nobody else begins
    the run before its process has ended.
    """

    def __init__(self, folder: Path, recipe: str, settings: Sequence[str], held: int | None = None) -> None:
        self.folder, self.output, self._held = folder, folder / "run", held
        place = json.dumps(str(self.output))  # quoted as YAML reads it
        self._command = [
            sys.executable, "-m", "layerskip", "--quiet", "train", recipe, *settings, f"output={place}", "--json",
        ]  # fmt: skip
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False
        self._sitting: tuple[float, float] | None = None  # seconds taken before it, and when it began
        self._read: dict[Path, dict[int, dict[str, Any]]] = {}  # the evaluations of files that were read

    @property
    def result(self) -> dict[str, Any] | None:
        """The final figures, once they are there."""
        file = self.folder / RESULT
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    @property
    def seconds(self) -> float:
        """Wall-clock seconds that it took, start, loading and evaluations among them, over all sittings."""
        if self._sitting is not None:
            before, began = self._sitting
            return before + time.monotonic() - began
        file = self.folder / TOOK
        return float(file.read_text(encoding="utf-8")) if file.is_file() else 0.0

    def follow(self) -> Iterator[tuple[int, Figures]]:
        """Train to the end, or to `stop`; yield every evaluation once, those of an earlier sitting too.

        Raises: UserError with the last lines of a run that failed; StoppedError where it was ended from outside.
        """
        told, ended, noted = 0, self.result is not None, 0.0
        if not ended:
            self._sitting = self.seconds, time.monotonic()
            self._begin()
        try:
            while True:
                for step, figures in self._evaluated():
                    if step > told:
                        told = step
                        yield step, figures
                if ended or self._stopped:
                    return
                time.sleep(POLL_S)
                if self.seconds - noted > NOTE_S:
                    noted = self._note_time()
                if self._process is not None and self._process.poll() is not None:
                    self._end()
                    ended = True
        finally:
            self.stop()
            if self._sitting is not None:
                self._note_time()
                self._sitting = None

    def _note_time(self) -> float:
        seconds = self.seconds
        write_text(self.folder / TOOK, f"{seconds:.1f}\n")
        return seconds

    def stop(self) -> None:
        """End the process, where it still runs; what it has done stays in its checkpoint."""
        self._stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait()

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        resume = ["--resume"] if (self.output / "recipe.yaml").is_file() else []
        if not resume:  # what was killed before it had written down what it is
            shutil.rmtree(self.output, ignore_errors=True)
        held = () if self._held is None else (self._held,)
        with (self.folder / LOG).open("a", encoding="utf-8") as log:
            # In a group of its own: Ctrl-C reaches this process alone, which then ends it with a checkpoint.
            self._process = subprocess.Popen(
                [*self._command, *resume],
                stdout=subprocess.PIPE, stderr=log, text=True, pass_fds=held, process_group=0,
            )  # fmt: skip

    def _end(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        printed, code = self._process.stdout.read().strip(), self._process.returncode
        if code == 0:
            write_json(self.folder / RESULT, json.loads(printed.split("\n")[-1]))
        elif code in (130, 143, -signal.SIGTERM, -signal.SIGINT, -signal.SIGKILL):
            raise StoppedError(f"the run in {self.folder} was stopped")
        else:
            said = (self.folder / LOG).read_text(encoding="utf-8").strip().split("\n")[-3:]
            raise UserError(
                f"a run of the search failed: {' '.join(said)[-500:]}", f"see {self.folder / LOG}"
            )

    def evaluations(self) -> dict[int, dict[str, Any]]:
        """The lines of the trainer's log that are evaluations, by step, as all checkpoints together have them."""
        for state in self.output.glob("checkpoint-*/trainer_state.json"):
            if state not in self._read:
                with suppress(OSError, ValueError):  # it is being removed
                    history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
                    self._read[state] = {line["step"]: line for line in history if losses_of(line)}
        return {step: line for lines in self._read.values() for step, line in lines.items()}

    def _evaluated(self) -> list[tuple[int, Figures]]:
        """Read the evaluations of the newest checkpoint, and of the end."""
        found = {step: figures_of(line) for step, line in self.evaluations().items()}
        if (done := self.result) is not None:
            found.setdefault(done["steps"], Figures(done["predicted_speedup"], whole_loss(done["exits"])))
        return sorted(found.items())


def figures_of(line: dict[str, Any]) -> Figures:
    """Read a line of a trainer's log."""
    exits = {k: {"loss": loss} for k, loss in losses_of(line).items()}
    return Figures(line.get("eval_predicted_speedup"), whole_loss(exits))


def losses_of(line: dict[str, Any]) -> dict[str, float]:
    """The loss of each exit in a line of a trainer's log, in nats per token."""
    return {key.split("_")[2]: value for key, value in line.items() if key.startswith("eval_exit_")
            and key.endswith("_loss")}  # fmt: skip


def whole_loss(exits: dict[str, Any]) -> float | None:
    """The loss of the last layer."""
    return exits[max(exits, key=int)]["loss"] if exits else None
