"""Options stand once: in dataclasses, of which Python keywords, checks and the command line are made."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Annotated

import pytest
import torch
import typer
from typer.main import get_command

from layerskip.cli.main import ORDER, app
from layerskip.cli.options import Given, default, only, spread, without, worded
from layerskip.decode.load import load
from layerskip.decode.options import DTYPES, DraftOptions, LoadOptions, Options, SamplingOptions
from layerskip.decode.sampling import Sampling
from layerskip.errors import UserError
from layerskip.model.load import KINDS
from layerskip.option import Option, check, option, options_of

CLASSES = (LoadOptions, SamplingOptions, DraftOptions)
COMMANDS = get_command(app).commands
MODULES = [import_module(f"layerskip.cli.{name}") for name in ("prompts", *ORDER)]
OWN = {
    thing
    for module in MODULES
    for thing in vars(module).values()
    if hasattr(thing, "__dataclass_fields__")
    and thing.__module__ in [module.__name__ for module in MODULES]
    and thing.__dataclass_params__.frozen
}


@dataclass(frozen=True)
class Toy:
    """Something of every kind."""

    rows: int = option(8, "Rows at once.", least=1, most=9)
    share: float = option(0.5, "A share.", above=0, below=1)
    colour: str | None = option(None, "Red or green.", choices=("green", "red"), shown="by mood")
    size: int | str = option(
        "all",
        "A number, or all.",
        choices=("all",),
        typed=str,
        read=lambda text: int(text) if text.isdecimal() else text,
    )
    names: Sequence[str] = option((), "Names; may be repeated.", typed=list[str] | None)
    loud: bool = option(False, "Say it loud.")
    guard: bool | None = option(None, "Guard it.")
    hidden: int = option(3, "Of Python alone.", offered=False)


@pytest.fixture
def toy(capsys):
    """Call a verb that takes a `Toy`, changed by `notes`; returns what the verb got, or what help says."""

    def call(*words, notes=()):
        got = []

        def verb(
            toy: Annotated[Toy, without(), *notes],
            given: Given,
            path: Annotated[Path | None, Option("A file.")] = None,
        ):
            got.append((toy, given, path))

        cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        cli.command()(spread(verb))
        with pytest.raises(SystemExit):
            cli(words)
        return got[0] if got else capsys.readouterr().out

    return call


def test_a_dataclass_becomes_options_and_is_a_dataclass_again(toy):
    assert toy()[0] == Toy()
    words = (
        "--rows",
        "2",
        "--share",
        "0.1",
        "--colour",
        "red",
        "--size",
        "7",
        "--names",
        "a",
        "--names",
        "b",
    )
    got, given, path = toy(*words, "--loud", "--no-guard", "--path", "x")
    assert got == Toy(2, 0.1, "red", 7, ["a", "b"], True, False)
    assert path == Path("x")
    assert given.values["size"] == "7", "as typed"
    assert "hidden" not in given.values
    assert toy("--rows", "8", "--loud")[1].changed == {"loud": True}


def test_help_is_made_of_the_records(toy, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    page = " ".join(toy("--help").replace("│", " ").split())
    assert "--rows <int> Rows at once. [default: 8]" in page
    assert "--colour <str> Red or green. [default: (by mood)]" in page
    assert "--loud <bool> Say it loud." in page
    assert "--guard --no-guard <bool> Guard it." in page
    assert "hidden" not in page


def test_a_verb_takes_a_part_and_may_change_defaults_and_words(toy, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    notes = (only("rows", "colour"), default(rows=4), worded("colour", help="Paint.", flags=("--paint",)))
    assert toy(notes=notes)[0] == Toy(rows=4)
    assert toy("--paint", "red", notes=notes)[0] == Toy(rows=4, colour="red")
    page = toy("--help", notes=notes)
    assert "Paint." in page
    assert "--share" not in page
    assert "--rows" not in toy("--help", notes=(without("rows"),))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rows", "0"), "--rows is 0\n  --rows must be a whole number, from 1 to 9: Rows at once."),
        (("--share", "1"), "--share is 1.0\n  --share must be a number, above 0 and below 1: A share."),
        (("--share", "nan"), "--share is nan"),
        (("--colour", "rde"), "unknown colour 'rde'\n  did you mean 'red'"),
        (("--size", "most"), "--size is 'most'\n  --size must be a whole number or all: A number, or all."),
    ],
    ids=str,
)
def test_a_value_outside_its_range_is_a_user_error_naming_the_option(toy, words, message):
    with pytest.raises(UserError) as error:
        toy(*words)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": True}, "rows is True"),
        ({"rows": 2.0}, "rows is 2.0"),
        ({"rows": None}, "rows is None"),
        ({"share": "half"}, "share is 'half'"),
        ({"colour": 3}, "colour is 3\n  colour must be green or red"),
        ({"names": "abc"}, "names is 'abc'"),
        ({"loud": 1}, "loud is 1\n  loud must be true or false"),
    ],
    ids=str,
)
def test_a_value_of_the_wrong_type_is_one_too(values, message):
    with pytest.raises(UserError, match=message):
        check(Toy, values)
    check(Toy, {"rows": 3, "share": 0.25, "names": ["a"], "colour": None})


@pytest.mark.parametrize(
    "kind", [*CLASSES, *sorted(OWN, key=str)], ids=lambda kind: f"{kind.__module__}.{kind.__name__}"
)
def test_every_option_has_help_and_a_default_that_it_allows(kind):
    for field in fields(kind):
        assert field.metadata["option"].help.strip().endswith("."), field.name
    check(kind, {name: default for name, (_, default, _) in options_of(kind).items()})


MEANT = {  # defaults in which a verb differs on purpose; all others are the dataclass's
    ("distill-data", "seed"): 0,  # a run that goes on must draw as it began
    ("search", "seed"): 0,  # what is tried is to repeat
    ("chat", "max_new_tokens"): 512,
    **{(verb, "max_new_tokens"): 64 for verb in ("demo", "bench", "doctor", "tune")},
    ("eval", "max_new_tokens"): None,  # a task's own
    ("bench", "draft_vocab"): None,  # the checkpoint's: auto asks the cost model there
    ("tune", "batch_size"): 1,
    ("verify", "max_new_tokens"): 32,
}


@pytest.mark.parametrize("verb", sorted(COMMANDS))
def test_a_verbs_options_have_the_defaults_of_the_dataclasses(verb):
    """So nothing is said twice: a default that changes in a dataclass changes everywhere."""
    for parameter in getattr(COMMANDS[verb], "params", ()):
        for kind in CLASSES:
            if parameter.name in options_of(kind):
                wanted = MEANT.get((verb, parameter.name), options_of(kind)[parameter.name][1])
                assert parameter.default == (None if wanted == () else wanted), parameter.name


def test_options_of_a_generation_are_those_of_sampling_and_drafting():
    assert set(options_of(Options)) == {*options_of(SamplingOptions), *options_of(DraftOptions)}
    with pytest.raises(UserError, match="unknown option 'max_tokens'\n  did you mean 'max_new_tokens'"):
        Options.parse({"max_tokens": 3})
    with pytest.raises(UserError, match="top_k is -1"):
        Options(top_k=-1)


def test_load_takes_its_defaults_from_the_options_and_is_checked_by_them():
    wanted = {name: default for name, (_, default, _) in options_of(LoadOptions).items()}
    assert load.__kwdefaults__ == wanted
    for name in ("dtype", "stack"):  # before anything is looked for
        with pytest.raises(UserError, match=f"unknown {name} 'x'"):
            load("no-such-model", **{name: "x"})


def test_choices_are_those_of_the_rooms_below():
    assert set(options_of(LoadOptions)["stack"][2].choices) == set(KINDS)
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in DTYPES if name != "auto")


@pytest.mark.parametrize("name", [field.name for field in fields(Sampling)])
def test_ranges_of_sampling_are_where_its_mathematics_ends(name):
    told = options_of(SamplingOptions)[name][2]
    step = 1 if name == "top_k" else 1e-6
    ends = [(told.least, -step), (told.most, step)]  # allowed itself, and where it is not
    ends += [(told.above + step, -step)] if told.above is not None else []
    ends += [(told.below - step, step)] if told.below is not None else []
    for end, out in ends:
        if end is not None:
            for kind in (Sampling, SamplingOptions):
                kind(**{name: end})
                with pytest.raises(UserError, match=name):
                    kind(**{name: end + out})
    for kind in (Sampling, SamplingOptions):
        with pytest.raises(UserError, match=name):
            kind(**{name: math.nan})
    assert options_of(SamplingOptions)[name][1] == getattr(Sampling(), name)
