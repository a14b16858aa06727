"""Low-rank approximation of many matrices within one budget of bytes, rounded to 4 or 8 bits.

    kept = chosen({name: directions(matrix)[0]}, {name: tuple(matrix.shape)}, room_bytes=1_000_000)
    parts = packed(matrix, kept[name])
    rows(parts, slice(0, 4096))  # of the approximation, in float64

A matrix [out, in] becomes a sum of directions, scale * left right^T; `delta.py` stores so what training changed.
In `parts` a direction is a row: of `left8` [n, out] and `right8` [n, in] in int8, or of `left4` and `right4`,
two numbers a byte; `scale8` and `scale4` hold a float32 per direction. A matrix that would be larger that way is
`whole` [out, in] in int8 with a `scale` per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

COARSE_LOSS = 0.03
"""Share of a direction's square that 4 bits lose (Gaussian vectors; measured 0.02 to 0.04). 8 bits lose 0.0002."""

NEGLIGIBLE = 1e-8
"""Directions with less than this share of the largest squared singular value are rounding of the weights."""

CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Where 4 bits may end, in units of the largest number: losing an outlier can make all others finer."""

ROWS = 4096  # of a matrix worked on at once: an embedding in float64 is large


class Kept(NamedTuple):
    """How much of a matrix is kept: its first `rank` directions, the first `fine` of those in 8 bits."""

    rank: int = 0
    fine: int = 0


def stored_bytes(shape: tuple[int, int], kept: Kept) -> int:
    """Count the bytes of a matrix; never more than it takes whole."""
    coarse = sum((size + 1) // 2 for size in shape) + 4
    return min(kept.fine * (sum(shape) + 4) + (kept.rank - kept.fine) * coarse, _whole_bytes(shape))


def chosen(
    spectra: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], room_bytes: int
) -> dict[str, Kept]:
    """Choose which directions of all matrices to keep, and which in 8 bits: what restores most per byte goes first.

    `spectra` are squared singular values, falling. A matrix whose next piece does not fit is done; others go on.
    """
    kept, used, done = dict.fromkeys(spectra, Kept()), 0, set()
    queue = []
    for name, squares in spectra.items():
        for square in squares[squares > NEGLIGIBLE * squares[:1]].tolist():
            worth = square / sum(shapes[name])
            queue += [(-worth * (1 - COARSE_LOSS), name, 1, 0), (-worth * COARSE_LOSS, name, 0, 1)]
    for _, name, more, finer in sorted(queue):
        now = kept[name]
        then = Kept(now.rank + more, now.fine + finer)
        price = stored_bytes(shapes[name], then) - stored_bytes(shapes[name], now)
        if name in done or used + price > room_bytes:
            done.add(name)
        else:
            used += price
            kept[name] = then
    return kept


def packed(matrix: Tensor, kept: Kept) -> dict[str, Tensor]:
    """Approximate a matrix by its first directions, or whole where that is no larger; see above for the parts."""
    import torch

    shape = (matrix.shape[0], matrix.shape[1])
    if stored_bytes(shape, kept) == _whole_bytes(shape):
        whole, scale = rounded(matrix, 8)
        return {"whole": whole, "scale": scale}
    across = _tall(matrix)
    short = directions(matrix)[1][:, : kept.rank]  # [small side, n]
    long = torch.cat([across[span].double() @ short for span in spans(len(across))])  # [large side, n]
    left, right = (long.T, short.T) if shape[0] >= shape[1] else (short.T, long.T)
    parts: dict[str, Tensor] = {}
    for bits, part in ((8, slice(0, kept.fine)), (4, slice(kept.fine, kept.rank))):
        if part.start < part.stop:
            (a, a_scale), (b, b_scale) = rounded(left[part], bits), rounded(right[part], bits)
            parts |= {
                f"left{bits}": a,
                f"right{bits}": b,
                f"scale{bits}": (a_scale.double() * b_scale).float(),
            }
    return parts


def rows(parts: Mapping[str, Tensor], span: slice, columns: int) -> Tensor:
    """Multiply a span of rows out of what was packed: float64 [span, columns].

    In float64 neither threads nor kernels show in a rounded sum.
    """
    if "whole" in parts:
        return parts["whole"][span].double() * parts["scale"][span, None]
    pairs = []
    if "scale8" in parts:
        pairs.append((parts["scale8"], parts["left8"], parts["right8"]))
    if "scale4" in parts:
        pairs.append((parts["scale4"], _halves(parts["left4"]), _halves(parts["right4"])[:, :columns]))
    products = [(left[:, span].T.double() * scale) @ right.double() for scale, left, right in pairs]
    return products[0] + products[1] if len(products) == 2 else products[0]


def directions(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Find squared singular values, falling, and the singular vectors of the small side, by its Gram matrix.

    Shapes: [m, n] -> [s], [s, s] with s = min(m, n); float64.
    """
    import torch

    across = _tall(matrix)
    gram = torch.zeros(across.shape[1], across.shape[1], dtype=torch.float64)
    for span in spans(len(across)):
        part = across[span].double()
        gram += part.T @ part
    squares, vectors = torch.linalg.eigh(gram)
    return squares.flip(0).clamp(min=0), vectors.flip(1)


def spans(length: int) -> Iterator[slice]:
    """Cut rows into slices that fit in memory."""
    return (slice(start, min(start + ROWS, length)) for start in range(0, length, ROWS))


def _tall(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def _whole_bytes(shape: tuple[int, int]) -> int:
    return shape[0] * (shape[1] + 4)


def rounded(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round each row to whole numbers times a float32 scale of its own; 4 bits go two to a byte.

    Shapes: [m, n] -> int8 [m, n] (uint8 [m, n/2 rounded up] for 4 bits), float32 [m].
    """
    import torch

    most = 2 ** (bits - 1) - 1
    largest = values.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    scales = [(clip * largest / most).float() for clip in (CLIPS if bits == 4 else CLIPS[:1])]
    scale, whole = scales[0], _steps(values, scales[0], most)
    for other in scales[1:]:
        finer = _steps(values, other, most)
        better = _error(values, other, finer) < _error(values, scale, whole)
        scale, whole = torch.where(better, other, scale), torch.where(better, finer, whole)
    if bits == 8:
        return whole.to(torch.int8).contiguous(), scale[:, 0]
    nibbles = torch.nn.functional.pad((whole + 8).to(torch.uint8), (0, whole.shape[1] % 2), value=8)
    return (nibbles[:, ::2] << 4 | nibbles[:, 1::2]).contiguous(), scale[:, 0]


def _steps(values: Tensor, scale: Tensor, most: int) -> Tensor:
    return (values / scale).round().clamp(-most, most)


def _error(values: Tensor, scale: Tensor, steps: Tensor) -> Tensor:
    return (values - steps * scale).square().sum(1, keepdim=True)


def _halves(packed: Tensor) -> Tensor:
    """Take the two numbers of each byte apart; an odd length has one more, a zero, at its end."""
    import torch

    return torch.stack([packed >> 4, packed & 15], 2).flatten(1).to(torch.int8) - 8
