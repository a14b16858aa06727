"""What a search may choose from: ranges over the keys of a recipe.

    read_space(["learning_rate=1e-4..1e-2", "exits=[2]|[4]|[2, 4]", "adapter_steps=1..4", "length=512"])

`low..high` is a range: of whole numbers where both ends are, else of numbers, by their logarithm where the upper
end is at least ten times the lower. `a|b|c` is a choice of YAML values. Anything else is a setting that stays.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from layerskip.errors import UserError

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
RANGE = re.compile(rf"({NUMBER})\.\.({NUMBER})")
LOGARITHMIC = 10  # times as large as the lower end

DEFAULTS = {  # for recipes that are searched without a range of one's own
    "exit-adapter": (
        "learning_rate=1e-3..1e-2", "adapter_steps=1..4", "adapter_blocks=0|1|2", "exits=[0]|[1]|[2]",
        "exit_loss=kl|ce",
    ),
    "*": (
        "learning_rate=3e-5..1e-3", "e_scale=0.05..1", "p_max=0..0.3", "exit_loss=ce|kl", "weighting=paper|uniform",
        "curriculum=rotational|all",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Range:
    """What a key may be: one of `choices`, or a number from `low` to `high`."""

    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    choices: tuple[str, ...] = ()

    @property
    def logarithmic(self) -> bool:
        return not self.choices and self.low > 0 and self.high / self.low >= LOGARITHMIC

    def suggested(self, key: str, trial: Any) -> str:
        """Ask a trial of optuna; the answer as YAML."""
        if self.choices:
            return str(trial.suggest_categorical(key, self.choices))
        if self.whole:
            return str(trial.suggest_int(key, int(self.low), int(self.high), log=self.logarithmic))
        return f"{trial.suggest_float(key, self.low, self.high, log=self.logarithmic):.6g}"


class Space(NamedTuple):
    """Ranges by key, and settings that stay as they are, as `key=value`."""

    ranges: dict[str, Range]
    settings: list[str]


def read_space(given: Sequence[str], recipe: str = "") -> Space:
    """Tell ranges from settings; a recipe's default ranges where none is given, but for keys that are set.

    Raises: UserError for what is no `key=value`, or a range that holds nothing.
    """
    ranges: dict[str, Range] = {}
    settings = []
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"{text!r} is no setting", "write key=value, key=low..high or key=a|b")
        found = _range(key, value)
        if found is None:
            settings.append(text)
        else:
            ranges[key] = found
    if not ranges:
        fixed = {text.partition("=")[0] for text in settings}
        pairs = (text.partition("=") for text in DEFAULTS.get(recipe, DEFAULTS["*"]))
        ranges = {key: told for key, _, value in pairs if key not in fixed and (told := _range(key, value))}
    return Space(ranges, settings)


def _range(key: str, value: str) -> Range | None:
    if (ends := RANGE.fullmatch(value)) is not None:
        low, high = float(ends[1]), float(ends[2])
        if not low < high:
            raise UserError(f"{key}={value}: the range holds nothing", "write the smaller end first")
        whole = all(re.fullmatch(r"[-+]?\d+", end) for end in ends.groups())
        return Range(low, high, whole)
    parts = [part.strip() for part in value.split("|")]
    if len(parts) > 1:
        if len({*parts}) < len(parts) or not all(parts):
            raise UserError(f"{key}={value}: a choice is named twice, or is nothing", "write key=a|b|c")
        return Range(choices=tuple(parts))
    return None
