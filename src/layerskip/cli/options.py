"""Dataclasses as options of a verb: a parameter annotated with one becomes an option per field.

    def demo(model: Model, drafting: Annotated[DraftOptions, only("exit_layer", "draft_length")]) -> None: ...

`spread` gives Typer a function with the flat signature, and collects the dataclass again. Name, type, default,
range and help are those of the field's `Option`; a single parameter may carry an `Option` too. `only`, `without`,
`default` and `worded` say, from left to right, how a verb's options differ from the fields.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce, wraps
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from layerskip.option import Option, check_value, options_of

Offered = dict[str, tuple[Any, Any, Option]]  # type, default and record, by name
Change = Callable[[Offered], Offered]


@dataclass(frozen=True)
class Given:
    """What the command line said: a verb's values by option, as typed, and what they would be unsaid."""

    values: dict[str, Any]
    defaults: dict[str, Any]

    @property
    def changed(self) -> dict[str, Any]:
        return {name: value for name, value in self.values.items() if value != self.defaults[name]}


def only(*names: str) -> Change:
    """Offer these fields alone, in this order."""
    return lambda offered: {name: offered[name] for name in names}


def without(*names: str) -> Change:
    """Offer all fields but these."""
    return lambda offered: {name: one for name, one in offered.items() if name not in names}


def default(**values: Any) -> Change:
    """Give fields another default."""

    def change(offered: Offered) -> Offered:
        for name, value in values.items():
            kind, _, told = offered[name]
            offered = offered | {name: (kind, value, replace(told, shown=None))}
        return offered

    return change


def worded(name: str, **words: Any) -> Change:
    """Give a field another help, shown default or flags."""

    def change(offered: Offered) -> Offered:
        kind, value, told = offered[name]
        return offered | {name: (kind, value, replace(told, **words))}

    return change


def spread(verb: Callable[..., None]) -> Callable[..., None]:
    """Make the function that Typer reads and calls in place of `verb`.

    A parameter annotated `Given` gets all that was typed. Raises, when called: UserError for a value that an
    option may not have, before the verb runs.
    """
    hints, flat, told_to = get_type_hints(verb, include_extras=True), [], []
    groups: dict[str, tuple[Any, Offered]] = {}
    for name, parameter in inspect.signature(verb).parameters.items():
        kind: Any
        kind, *notes = get_args(hints[name]) if get_origin(hints[name]) is Annotated else (hints[name],)
        if kind is Given:
            told_to.append(name)
            continue
        if hasattr(kind, "__dataclass_fields__"):
            offered = {field: one for field, one in options_of(kind).items() if one[2].offered}
            groups[name] = kind, reduce(lambda left, change: change(left), notes, offered)
        elif notes and isinstance(notes[0], Option):
            groups[name] = None, {name: (kind, parameter.default, notes[0])}
        else:  # an argument
            flat.append(parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY))
            continue
        flat += [_parameter(field, *one) for field, one in groups[name][1].items()]

    @wraps(verb)
    def command(**typed: Any) -> None:
        given = Given(dict(typed), {one.name: one.default for one in flat})
        collected: dict[str, Any] = dict.fromkeys(told_to, given)
        for name, (kind, offered) in groups.items():
            values = {field: _read(field, typed.pop(field), *one) for field, one in offered.items()}
            collected[name] = values[name] if kind is None else kind(**values)
        verb(**typed, **collected)

    command.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in flat}
    return command


def _parameter(name: str, kind: Any, value: Any, told: Option) -> inspect.Parameter:
    """Word a field as Typer has it."""
    typed = kind if told.typed is None else told.typed
    flags = list(told.flags)
    if not flags and bool in (kind, *get_args(kind)):
        flags = [_flag(name) + ("" if value is False else f"/--no-{_flag(name)[2:]}")]
    completed = _completed(told.choices) if told.choices else None
    shown = typer.Option(*flags, help=told.help, show_default=told.shown or True, autocompletion=completed)
    required = value is inspect.Parameter.empty
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=value if required or value != () else None,
        annotation=Annotated[typed, shown],
    )


def _completed(choices: Sequence[str]) -> Callable[[str], list[str]]:
    def completed(begun: str) -> list[str]:
        return [one for one in choices if one.startswith(begun)]

    return completed


def _read(name: str, typed: Any, kind: Any, value: Any, told: Option) -> Any:
    """Turn what was typed into the value, checked; what was not typed is the default."""
    if typed is None:
        return value
    read = typed if told.read is None else told.read(typed)
    check_value((told.flags or [_flag(name)])[0], kind, told, read)
    return read


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
