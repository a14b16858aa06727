"""An option of any kind says its type, default, range and help once: for Python, command line and config.json.

@dataclass(frozen=True)
class Mine:
    rows: int = option(8, "Rows decoded together.", least=1)

check(Mine, {"rows": 0})  # UserError: rows is 0
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from numbers import Integral
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from layerskip.errors import UserError, nearest


@dataclass(frozen=True)
class Option:
    """What a field says beside its type and default."""

    help: str
    least: float | None = None
    most: float | None = None
    above: float | None = None  # as `least`, itself excluded
    below: float | None = None
    choices: Sequence[str] = ()  # what a text may be; empty: anything
    shown: str | None = None  # what help shows in place of the default
    flags: Sequence[str] = ()  # spellings on the command line, where not the field's name
    typed: Any = None  # type on the command line, where it is not the field's
    read: Callable[[Any], Any] | None = None  # from what was typed to the value
    offered: bool = True  # on the command line


def option(default: Any, help: str, **more: Any) -> Any:
    """Make a field of a dataclass with an `Option`; `more` are its other fields."""
    return field(default=default, metadata={"option": Option(help, **more)})


def same(kind: Any, name: str, **changes: Any) -> Any:
    """Make a field whose `Option` is another dataclass's, but for `changes`; unset by default."""
    return field(default=None, metadata={"option": replace(options_of(kind)[name][2], **changes)})


@cache
def options_of(kind: Any) -> dict[str, tuple[Any, Any, Option]]:
    """Type, default and `Option` of every field, by name."""
    kinds = get_type_hints(kind)
    return {one.name: (kinds[one.name], one.default, one.metadata["option"]) for one in fields(kind)}


def check(kind: type, values: Mapping[str, Any]) -> None:
    """Hold values against the options of a dataclass. Raises: UserError naming the option."""
    for name, (type_, _, told) in options_of(kind).items():
        if name in values:
            check_value(name, type_, told, values[name])


def check_value(name: str, type_: Any, told: Option, value: Any) -> None:
    """Hold a value against type, choices and range; `name` is how the user spells the option.

    Raises: UserError naming the option and what is allowed.
    """
    if value is None and _accepts(type_, None):
        return
    known, texts = told.choices, {*_members(type_)} <= {str, NoneType, Any}
    if texts and known and isinstance(value, str) and value not in known:
        raise UserError(f"unknown {name.removeprefix('--')} {value!r}", nearest(value, known))
    if not (_accepts(type_, value) and _inside(told, value)):
        raise UserError(f"{name} is {value!r}", f"{name} must be {_allowed(type_, told)}: {told.help}")


def _members(type_: Any) -> tuple[Any, ...]:
    return get_args(type_) if get_origin(type_) in (Union, UnionType) else (type_,)


def _accepts(type_: Any, value: Any) -> bool:
    for member in _members(type_):
        origin = get_origin(member) or member
        if origin is Sequence:
            inner = get_args(member)[0]
            fits = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
            if fits and inner is not Any and isinstance(value, Collection):  # a generator is read once
                fits = all(_accepts(inner, one) for one in value)
        elif origin in (int, float):
            fits = isinstance(value, (Integral, origin)) and not isinstance(value, bool)
        else:
            fits = origin is Any or isinstance(value, origin)
        if fits:
            return True
    return False


def _inside(told: Option, value: Any) -> bool:
    if isinstance(value, str):
        return not told.choices or value in told.choices
    if not isinstance(value, (int, float)):
        return True
    return (  # written so that NaN is outside
        (told.least is None or value >= told.least)
        and (told.most is None or value <= told.most)
        and (told.above is None or value > told.above)
        and (told.below is None or value < told.below)
    )


def _allowed(type_: Any, told: Option) -> str:
    """Word what an option may be: a whole number, at least 1."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Sequence: "a list"}
    kinds = [words.get(get_origin(member) or member) for member in _members(type_)]
    named = [kind for kind in kinds if kind and not (kind == "text" and told.choices)]
    if told.least is not None and told.most is not None:
        limits = f"from {told.least:g} to {told.most:g}"
    else:
        ends = (
            ("at least", told.least),
            ("above", told.above),
            ("at most", told.most),
            ("below", told.below),
        )
        limits = " and ".join(f"{word} {end:g}" for word, end in ends if end is not None)
    *others, last = [*named, *told.choices]
    return (f"{', '.join(others)} or {last}" if others else last) + (f", {limits}" if limits else "")
