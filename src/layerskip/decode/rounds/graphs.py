"""Captured computations, replayed with new numbers in the same buffers: CUDA graphs, a bounded number of them.

    graphs = Graphs(device, capture=CudaCapture(device))
    outputs = graphs.run(key, program, inputs)      # captures at the first use of a key, replays from then on

A graph replays kernels on the addresses it was captured with, so every key owns a buffer that the inputs are
copied into. What cannot be captured, or would be one graph too many, runs eagerly: the same function, the same
numbers, only slower. `capture` is passed in, so that all of this is tested without a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LIMIT = 32  # 4 exits x 4 draft lengths in two length buckets; each graph holds its activations
FAILURES = 3  # shapes that could not be captured, after which none is tried any more
PATIENCE = 256  # runs a graph may sit out before a new key takes its place

Replay = Callable[[], Tensor]
Capture = Callable[[Callable[[], Tensor]], Replay]


class Program(Protocol):
    """What is captured: tensor operations only, and repeatable, since capturing may run it first."""

    def __call__(self, inputs: Tensor) -> Tensor: ...

    def count(self) -> None:
        """Note that it ran once: a replay executes no Python that could."""


class CudaCapture:
    """Capture into CUDA (or HIP) graphs that share one memory pool.

    Sharing is safe because each replay's outputs are fetched before the next replay starts.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        with torch.cuda.device(self.device):
            usual = torch.cuda.current_stream()
            self.stream.wait_stream(usual)
            with torch.cuda.stream(self.stream):
                function()  # libraries load kernels and take workspaces at their first call, outside of graphs
            usual.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            try:  # thread_local: what other threads do with the device meanwhile is no error of this capture
                with torch.cuda.graph(
                    graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
                ):
                    outputs = function()
            finally:
                torch.cuda.set_stream(usual)  # torch's own exit does not get there when a capture fails

        def replay() -> Tensor:
            graph.replay()
            return outputs

        return replay


@dataclass
class _Graph:
    program: Program
    inputs: Tensor  # on the device, read by every replay
    replay: Replay
    used: int = 0  # number of the last run that used it


class Graphs:
    """Run programs by key: captured where possible, at most `limit` at a time, eagerly elsewhere."""

    def __init__(
        self, device: torch.device, capture: Capture | None, limit: int = LIMIT, patience: int = PATIENCE
    ) -> None:
        self.device, self.capture, self.limit, self.patience = device, capture, limit, patience
        self.captured = self.replays = self.eager_runs = 0
        self._graphs: dict[Hashable, _Graph] = {}
        self._failed: set[Hashable] = set()
        self._warned: set[str] = set()

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, program: Program, inputs: Tensor) -> Tensor:
        """Compute program(inputs) for inputs on the host; the outputs are overwritten by the key's next run.

        Programs of equal keys must do the same, and take inputs of the same shape: the first one is kept.
        """
        graph = self._graphs.get(key) or self._captured(key, program, inputs)
        if graph is None:
            self.eager_runs += 1
            outputs = program(inputs.to(self.device, non_blocking=True))
        else:
            program = graph.program
            graph.used = self._runs
            graph.inputs.copy_(inputs, non_blocking=True)
            outputs = graph.replay()
            self.replays += 1
        program.count()
        return outputs

    @property
    def _runs(self) -> int:
        return self.replays + self.eager_runs

    def _captured(self, key: Hashable, program: Program, inputs: Tensor) -> _Graph | None:
        """Capture a new key; None when there is no capturing (any more) or no room."""
        if self.capture is None or key in self._failed or not self._make_room():
            return None
        own = torch.empty_like(inputs, device=self.device)
        own.copy_(inputs)  # the trial run works on real numbers and leaves behind what the replay will
        try:
            replay = self.capture(lambda: program(own))
        except (
            RuntimeError
        ) as error:  # how torch reports operations that a graph cannot hold, and lack of memory
            reason = str(error).splitlines()[0]
            self._failed.add(key)
            if len(self._failed) < FAILURES:
                self._warn("capture", f"a round runs without a CUDA graph, others may have one: {reason}")
            else:  # the model itself cannot be captured
                self.capture = None
                self._warn("off", f"CUDA graphs are off, decoding goes on without: {reason}")
            return None
        self.captured += 1
        self._graphs[key] = _Graph(program, own, replay)
        return self._graphs[key]

    def _make_room(self) -> bool:
        if len(self._graphs) < self.limit:
            return True
        oldest = min(self._graphs, key=lambda key: self._graphs[key].used, default=None)
        if oldest is None or self._runs - self._graphs[oldest].used < self.patience:
            self._warn("full", f"{self.limit} CUDA graphs are in use, further shapes run without one")
            return False
        del self._graphs[oldest]
        return True

    def clear(self) -> None:
        """Let go of all graphs: the tensors they were captured on are gone."""
        self._graphs.clear()

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        self._warned.add(kind)
