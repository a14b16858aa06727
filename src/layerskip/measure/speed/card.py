"""The roofline card, printed before a measurement: what the machine could do at best with these weights.

Plain decoding reads every layer, the head and the keys and values of the context once per token, so its tokens
per second are at most bandwidth / bytes per token.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from layerskip.measure.environment import device_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from layerskip.model.stack import Stack

BUFFER_BYTES = 2**30  # well beyond any cache
REPEATS = 5


@dataclass(frozen=True)
class Card:
    """Sizes in bytes; bandwidth in GB/s (1e9 bytes)."""

    device: str  # its name
    device_type: str
    dtype: str
    quantisation: str | None
    stack: str
    threads: int
    layers: int
    layer_bytes: int
    head_bytes: int
    table_bytes: int
    context: int  # tokens in the cache at which keys and values are priced
    token_bytes: int  # keys and values of one token, all layers
    bandwidth_gb_s: float
    perplexity_cost: float | None = (
        None  # of the weight format, on the model's own text, where it was measured
    )

    @property
    def weight_bytes(self) -> int:
        return self.layers * self.layer_bytes + self.head_bytes + self.table_bytes

    @property
    def bytes_per_token(self) -> int:
        """What a plain step reads: all layers, the head, the cache; of the embedding table only a row."""
        return self.layers * self.layer_bytes + self.head_bytes + self.context * self.token_bytes

    @property
    def roofline_tokens_per_s(self) -> float:
        """Bandwidth over bytes per token: plain decoding cannot be faster when memory is the limit."""
        return self.bandwidth_gb_s * 1e9 / self.bytes_per_token

    def as_record(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "weight_bytes": self.weight_bytes,
            "bytes_per_token": self.bytes_per_token,
            "roofline_tokens_per_s": self.roofline_tokens_per_s,
        }


def card(
    stack: Stack,
    context: int,
    token_bytes: int,
    quantisation: str | None = None,
    perplexity_cost: float | None = None,
) -> Card:
    """Fill in the card of a loaded stack, measuring the device's bandwidth."""
    return Card(
        device=device_name(stack.device),
        device_type=stack.device.type,
        dtype=str(stack.dtype).removeprefix("torch."),
        quantisation=quantisation,
        stack=stack.name,
        threads=torch.get_num_threads(),
        layers=stack.num_layers,
        layer_bytes=stack.layer_bytes,
        head_bytes=stack.head_bytes,
        table_bytes=stack.table_bytes,
        context=context,
        token_bytes=token_bytes,
        perplexity_cost=perplexity_cost,
        bandwidth_gb_s=bandwidth(stack.device, BUFFER_BYTES),
    )


def bandwidth(device: torch.device, num_bytes: int) -> float:
    """Measure how fast memory is read, in GB/s: the median of a few passes over a filled buffer.

    On the CPU all threads sum a buffer (written first: pages never written are all the same page of zeros).
    On accelerators a copy is timed, which reads and writes.
    """
    buffer = torch.full((num_bytes // 4,), 1.0, device=device)
    if device.type == "cpu":
        moved = num_bytes
        work: Callable[[], Tensor] = lambda: buffer.sum()  # noqa: E731 - chosen once, called in the loop
    else:
        target = torch.empty_like(buffer)
        moved, work = 2 * num_bytes, lambda: target.copy_(buffer)
    seconds = []
    for _ in range(REPEATS + 1):
        synchronise(device)
        began = time.perf_counter()
        work()
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return moved / statistics.median(seconds[1:]) / 1e9  # the first pass warms up


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
