"""When a layer is dropped, which exits are trained and how much each counts: pure functions of (step, total).

Nothing here has a state, so a resumed run continues with the same numbers. `Schedule` holds a recipe's choice
and is asked once per optimiser step.

Source: LayerSkip (arXiv 2404.16710), equations 1 to 6; `linear_down` and the linear depth profile follow the
revised layer dropout of arXiv 2609.05275. E counts the layers executed: the paper's layer l is exit l + 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from layerskip.errors import UserError, nearest

DEPTHS = ("exp", "linear", "uniform")
TIMES = ("const", "exp", "linear_down")
CURRICULA = ("rotational", "gradual", "all", "fixed")
WEIGHTINGS = ("paper", "uniform")


def drop_rates(
    num_layers: int, p_max: float, depth: str = "exp", time: str = "const", step: int = 0, total: int = 1
) -> list[float]:
    """Rate at which each layer is dropped at optimiser step `step` of `total`: S(t) D(l) p_max.

    Source: LayerSkip, eq. 1 and 2.
    Raises: UserError for an unknown profile or a rate outside 0..1.
    """
    if not 0.0 <= p_max <= 1.0:
        raise UserError(f"p_max is {p_max}", "a drop rate is between 0 and 1; the paper uses 0.1 and 0.2")
    scale = p_max * _over_time(_known(time, TIMES, "drop_time"), _share(step, total))
    shares = [_share(layer, num_layers) for layer in range(num_layers)]
    return [scale * _over_depth(_known(depth, DEPTHS, "drop_depth"), share) for share in shares]


def exit_weights(
    num_layers: int,
    enabled: Sequence[int],
    e_scale: float,
    weighting: str | Mapping[int, float] = "paper",
) -> dict[int, float]:
    """Share of the loss of each enabled exit; they sum to 1 and exits of weight zero are left out.

    `paper`: e(k) of the paper, growing with the square of depth. `uniform`: 1 for the last layer, `e_scale` for
    every exit. A mapping gives each exit its own weight (1 where it names none), times `e_scale` below the last.
    Source: LayerSkip, eq. 4 and 5.
    Raises: UserError for a scale outside 0..1, a negative weight or an exit the model does not have.
    """
    if not 0.0 <= e_scale <= 1.0:
        raise UserError(f"e_scale is {e_scale}", "the scale of the exits' loss is between 0 and 1")
    _check_exits(num_layers, enabled)
    if isinstance(weighting, Mapping):
        _check_exits(num_layers, list(weighting))
        if strange := [k for k, weight in weighting.items() if not weight >= 0.0]:
            raise UserError(
                f"weighting of exit {strange[0]} is {weighting[strange[0]]}", "weights are 0 or more"
            )
    elif weighting not in WEIGHTINGS:
        raise UserError(f"unknown weighting {weighting!r}", nearest(str(weighting), WEIGHTINGS))
    raw = {k: _weight(num_layers, k, e_scale, weighting) for k in sorted({*enabled})}
    total = sum(raw.values())
    if total == 0.0:  # a model of one layer, or weights that leave nothing: the last layer is what there is
        return {num_layers: 1.0}
    return {k: share for k, weight in raw.items() if (share := weight / total) > 0.0}


def enabled_exits(
    num_layers: int,
    curriculum: str,
    step: int,
    total: int,
    rotation: int | None = None,
    exits: Sequence[int] | None = None,
) -> list[int]:
    """Exits whose loss is on at optimiser step `step` of `total`, the last layer always among them.

    `exits` restricts the candidates (all of 1..L-1 without it). `rotational`: of the candidates in order, every
    `rotation`-th is on and the choice moves by one each step, so that `rotation` steps visit each once; the
    default and the most, the number of candidates, is one exit a step. `gradual`: from the last
    layer down, exit k from step (L-k) total / 2L on, all of them by half of the run. `fixed`: the candidates.
    Source: LayerSkip, eq. 6 and section 3.1.2; that the last layer does not rotate is our reading.
    Raises: UserError for an unknown curriculum, a rotation below 1 or exits the model does not have.
    """
    _known(curriculum, CURRICULA, "curriculum")
    candidates = list(range(1, num_layers)) if exits is None else sorted({*exits} - {num_layers})
    _check_exits(num_layers, candidates)
    if curriculum == "fixed" and exits is None:
        raise UserError(
            "curriculum fixed needs a list of exits", f"exits=[...], numbers from 1 to {num_layers}"
        )
    if curriculum == "rotational":
        if rotation is not None and rotation < 1:
            raise UserError(
                f"rotation is {rotation}", "every rotation-th exit is on at a step; it is at least 1"
            )
        most = max(1, len(candidates))  # a longer turn would have steps without an exit
        period = most if rotation is None else min(rotation, most)
        chosen = [k for place, k in enumerate(candidates) if (place - step) % period == 0]
    elif curriculum == "gradual":
        chosen = [k for k in candidates if 2 * num_layers * step >= (num_layers - k) * total]
    else:
        chosen = candidates
    return [*chosen, num_layers]


@dataclass(frozen=True)
class Schedule:
    """A recipe's choice of the above for a model of `num_layers` layers.

    Raises: UserError for an unknown choice, a value out of range, or exits that would never be trained.
    """

    num_layers: int
    p_max: float = 0.1
    drop_depth: str = "exp"
    drop_time: str = "const"
    e_scale: float = 1.0
    weighting: str | Mapping[int, float] = "paper"
    curriculum: str = "rotational"
    rotation: int | None = None
    exits: tuple[int, ...] | None = None
    last_every: int = 1

    def __post_init__(self) -> None:
        self.drop_rates(0, 1)
        self.weights(0, 1)
        if self.exits is not None and not {*self.exits} - {self.num_layers}:
            raise UserError(
                f"exits {list(self.exits)} has no early exit",
                f"name at least one layer from 1 to {self.num_layers - 1}, or set e_scale=0 for plain training",
            )
        if self.exits is not None and self.e_scale > 0 and not self.trained:
            raise UserError(
                f"exits {list(self.exits)} have no weight, so no exit would be trained",
                "weighting=uniform counts every exit; the paper's counts all but exit 1",
            )
        if self.last_every < 1:
            raise UserError(f"last_every is {self.last_every}", "1 runs every row through all layers")

    @classmethod
    def of(cls, num_layers: int, settings: Any, exits: Sequence[int] | None) -> Schedule:
        """Take the fields from a recipe or from arguments, which call them the same."""
        named = {
            f.name: getattr(settings, f.name) for f in fields(cls) if f.name not in ("num_layers", "exits")
        }
        return cls(num_layers, **named, exits=None if exits is None else tuple(exits))

    def drop_rates(self, step: int, total: int) -> list[float]:
        """Rate at which each layer is dropped at this step, the first layer first."""
        return drop_rates(self.num_layers, self.p_max, self.drop_depth, self.drop_time, step, total)

    def weights(self, step: int, total: int) -> dict[int, float]:
        """Weights of the exits on at this step: by exit layer, the last layer included, summing to 1."""
        enabled = enabled_exits(self.num_layers, self.curriculum, step, total, self.rotation, self.exits)
        return exit_weights(self.num_layers, enabled, self.e_scale, self.weighting)

    def whole(self, step: int, first_row: int, rows: int) -> list[bool]:
        """Which rows of a pass go through all layers; the others end at the deepest early exit that is on.

        Every `last_every`-th row of a step's global batch, moving by one each step: each place has its turn.
        """
        return [(first_row + row + step) % self.last_every == 0 for row in range(rows)]

    @property
    def candidates(self) -> tuple[int, ...]:
        """Early exits that are given, or all."""
        every = range(1, self.num_layers)
        return tuple(every if self.exits is None else sorted({*self.exits} - {self.num_layers}))

    @property
    def trained(self) -> tuple[int, ...]:
        """Early exits that have a weight at some step."""
        weights = exit_weights(
            self.num_layers, [*self.candidates, self.num_layers], self.e_scale, self.weighting
        )
        return tuple(k for k in weights if k < self.num_layers)


def _share(index: int, count: int) -> float:
    """Place of `index` among `count`, from 0 to 1; the only one stands at the start."""
    return min(1.0, max(0.0, index / (count - 1))) if count > 1 else 0.0


def _over_depth(profile: str, share: float) -> float:
    return {"exp": math.exp2(share) - 1.0, "linear": share, "uniform": 1.0}[profile]


def _over_time(profile: str, share: float) -> float:
    return {"const": 1.0, "exp": math.exp2(share) - 1.0, "linear_down": 1.0 - share}[profile]


def _weight(num_layers: int, k: int, e_scale: float, weighting: str | Mapping[int, float]) -> float:
    if isinstance(weighting, Mapping):
        return weighting.get(k, 1.0) * (1.0 if k == num_layers else e_scale)
    if weighting == "uniform":
        return 1.0 if k == num_layers else e_scale
    layer = k - 1
    if k < num_layers:
        return e_scale * layer * (layer + 1) / 2
    return (num_layers - 1) + e_scale * (num_layers - 1) * (num_layers - 2) / 2


def _check_exits(num_layers: int, exits: Sequence[int]) -> None:
    for k in exits:
        if type(k) is not int or not 0 <= k <= num_layers:
            raise UserError(
                f"exit {k!r}: the model has {num_layers} layers",
                f"an exit is the number of layers executed, from 1 to {num_layers - 1}; 0 is for an exit_adapter",
            )


def _known(name: str, names: Sequence[str], key: str) -> str:
    if name not in names:
        raise UserError(f"unknown {key} {name!r}", nearest(str(name), names))
    return name
