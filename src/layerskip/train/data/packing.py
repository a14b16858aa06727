"""Training data: rows of packed examples, batches of rows, what is held out; names what cannot be trained on.

encoded = encode(examples("train.jsonl", columns), tokenizer, options)
trained, held_out = split(encoded, share=0.02)
dataset = rows(trained, options)          # a torch Dataset; collate makes batches of it
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from layerskip.errors import UserError
from layerskip.train.data.encoding import IGNORED, DataOptions, Encoded, encode
from layerskip.train.data.sources import Columns, examples

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Columns",
    "DataOptions",
    "Encoded",
    "Rows",
    "check_labels",
    "collate",
    "encode",
    "examples",
    "most_frequent",
    "packs",
    "rows",
    "split",
]

_OPEN_ROWS = 64  # rows that may still take an example; more would pack little better

T = TypeVar("T")


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of packed examples, a torch Dataset; positions restart at 0 where an example begins."""

    def __init__(self, packed: Sequence[Sequence[Encoded]], pad_id: int = 0) -> None:
        ordered = [example for row in packed for example in row]
        sizes = [len(example.input_ids) for example in ordered]
        self.pad_id = pad_id
        self.states = [example.states for example in ordered]
        self.numbered = False  # whether batches tell the numbers of their rows, and their lengths
        self.tokens = np.concatenate([example.input_ids for example in ordered])
        self.labels = np.concatenate([example.labels for example in ordered])
        self.starts = np.cumsum([0, *sizes])  # of examples, in tokens
        self.bounds = np.cumsum([0, *map(len, packed)])  # of rows, in examples
        self.num_examples, self.num_tokens = len(ordered), len(self.tokens)
        self.num_targets = int((self.labels != IGNORED).sum())
        self.longest = int(np.diff(self.starts[self.bounds]).max())

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Shapes: input_ids, labels and position_ids [T] of this row, not padded."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        starts = self.starts[self.bounds[index % len(self)] : self.bounds[index % len(self) + 1] + 1]
        first, last = starts[0], starts[-1]
        positions = np.arange(first, last) - np.repeat(starts[:-1], np.diff(starts))
        columns = (self.tokens[first:last], self.labels[first:last], positions)
        names = ("input_ids", "labels", "position_ids")
        row = {
            name: torch.from_numpy(column.astype(np.int64))
            for name, column in zip(names, columns, strict=True)
        }
        return row | ({"rows": torch.tensor([index % len(self), last - first])} if self.numbered else {})

    def frequent(self, size: int, always: Collection[int] = ()) -> list[int]:
        """See `most_frequent`."""
        return most_frequent(self.labels, size, always)

    def collate(self, batch: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return collate(batch, self.pad_id)


def rows(encoded: Sequence[Encoded], options: DataOptions, pad_id: int = 0) -> Rows:
    """Pack examples greedily into rows of at most `length` tokens, or give each its own row.

    An example goes, in order, into the open row that it fills best; none is cut.

    Raises: UserError when there are no examples.
    """
    if not encoded:
        raise UserError("no example is left to train on", "give more data, or hold fewer examples out")
    if not options.pack:
        return Rows([[example] for example in encoded], pad_id)
    packed: list[list[Encoded]] = []
    opened: dict[int, int] = {}  # row -> tokens of room
    for example in encoded:
        size = len(example.input_ids)
        row = min((row for row, room in opened.items() if room >= size), key=opened.__getitem__, default=None)
        if row is None:
            row = len(packed)
            packed.append([])
            opened[row] = options.length
        packed[row].append(example)
        opened[row] -= size
        if opened[row] < 2:
            del opened[row]
        elif len(opened) > _OPEN_ROWS:
            del opened[min(opened, key=opened.__getitem__)]
    return Rows(packed, pad_id)


def most_frequent(labels: NDArray[np.integer[Any]], size: int, always: Collection[int] = ()) -> list[int]:
    """The `size` tokens that are learnt most often, by falling count, those of `always` among the first."""
    counts = np.bincount(labels[labels != IGNORED], minlength=1 + max(always, default=0))
    counts[list(always)] += 1 + len(labels)
    return [int(token) for token in np.argsort(-counts, kind="stable")[:size]]


def collate(batch: Sequence[Mapping[str, torch.Tensor]], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """Pad rows to the longest of the batch. There is no attention mask: positions tell examples apart.

    Padding is an example of its own, without labels. The model is to be called with use_cache=False, for with a
    cache transformers takes a row for one sequence.

    Shapes: input_ids, labels, position_ids [B, T].
    """
    longest = max(len(row["input_ids"]) for row in batch)
    shape = (len(batch), longest)
    made = {
        "input_ids": torch.full(shape, pad_id),
        "labels": torch.full(shape, IGNORED),
        "position_ids": torch.zeros(shape, dtype=torch.long),
    }
    for index, row in enumerate(batch):
        size = len(row["input_ids"])
        for name, padded in made.items():
            padded[index, :size] = torch.as_tensor(row[name])
        made["position_ids"][index, size:] = torch.arange(longest - size)
    return made | ({"rows": torch.stack([row["rows"] for row in batch])} if "rows" in batch[0] else {})


def split(
    encoded: Sequence[T], share: float | None = None, num: int | None = None, seed: int = 0
) -> tuple[list[T], list[T]]:
    """Hold out a share or a number of examples, the same ones every time; both parts keep their order.

    Raises: UserError when one part would be empty.
    """
    count = num if num is not None else round(len(encoded) * (share or 0.0))
    if not 0 < count < len(encoded):
        raise UserError(
            f"cannot hold out {count} of {len(encoded)} examples", "give an evaluation file, or another share"
        )
    held = set(np.random.default_rng(seed).permutation(len(encoded))[:count].tolist())
    kept = [item for index, item in enumerate(encoded) if index not in held]
    return kept, [item for index, item in enumerate(encoded) if index in held]


def check_labels(rows: Rows, vocab_size: int) -> None:
    """Find token ids and labels the model has no row for, before a device error does. Raises: UserError."""
    labels = rows.labels[rows.labels != IGNORED]
    for what, ids in (("token id", rows.tokens), ("label", labels)):
        for worst in (int(ids.min(initial=0)), int(ids.max(initial=0))):
            if not 0 <= worst < vocab_size:
                raise UserError(
                    f"{what} {worst} is outside the model's vocabulary of {vocab_size}",
                    "use the model's own tokenizer, or resize its embeddings to the tokenizer",
                )
    if not len(labels):
        raise UserError("no row has a token to learn", "set loss_on=all, or give completions")


@torch.no_grad()
def packs(model: Any) -> bool:
    """Probe whether a model keeps packed examples apart and counts their positions anew.

    Two rows differ in their first example only: the second example's logits must not. They must also be, up to
    rounding, those of the example alone. On a CPU that is asked in float32: torch's 16 bits may be wrong by half
    of what logits vary by, differently for each number of tokens (without AVX-512).
    """
    training, device = model.training, next(model.parameters()).device
    wide = {name: p.float() for name, p in model.named_parameters()} if device.type == "cpu" else {}

    def logits(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        given = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
        found: torch.Tensor = torch.func.functional_call(model, wide, (), given).logits.float()
        return found

    model.eval()
    try:
        first, second = (
            torch.tensor([[5, 6, 7, 8, 9], [9, 8, 5, 7, 6]]),
            torch.tensor([3, 4, 5, 6, 7, 8]).expand(2, 6),
        )
        tokens = torch.cat([first, second], 1).to(device)
        positions = torch.cat([torch.arange(5), torch.arange(6)]).expand(2, 11).to(device)
        packed = logits(tokens, positions)[:, 5:]
        alone = logits(tokens[:, 5:], positions[:, 5:])
    except TypeError:  # takes no position_ids
        return False
    finally:
        model.train(training)
    spread = alone.std()
    apart = (packed[0] - packed[1]).abs().max() <= 1e-4 * spread
    return bool(apart and (packed - alone).norm() <= 0.05 * (alone - alone.mean()).norm())
