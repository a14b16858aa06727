"""What is printed from files, names and models cannot act on a terminal."""

import io
import json

import pytest
from rich.segment import Segment, Segments

from layerskip.cli.show import terminal
from layerskip.cli.show.terminal import visible


def test_control_characters_are_spelled_and_text_is_not():
    assert visible("a\tb\r\nc é 世 🙂\u200d") == "a\tb\r\nc é 世 🙂\u200d"
    assert visible("\x1b[31m\x9b2J\x07\u202e\x7f\ud800") == r"\x1b[31m\x9b2J\x07\u202e\x7f\ud800"
    assert visible("over\rwritten") == r"over\rwritten"


@pytest.mark.parametrize(("to_terminal", "shown"), [(True, r"\x1b]0;owned\x07"), (False, "\x1b]0;owned\x07")])
def test_a_models_text_keeps_its_codes_on_the_way_to_a_file_only(to_terminal, shown):
    written = io.StringIO()
    console = terminal._Console(file=written, force_terminal=to_terminal, highlight=False)
    console.print(Segments([Segment("tab\t\x1b]0;owned\x07")]))
    assert f"tab\t{shown}" in written.getvalue()


def test_an_error_shows_the_codes_of_a_name_and_of_a_file(fails, tmp_path):
    """A model's name or config.json could set the terminal's title, or hide what an error says."""
    assert "\x1b" not in (message := fails("generate", "no\x1b[2Jmodel", "hello"))
    assert r"\x1b[2J" in message
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": "\x1b[8mhidden"}))
    assert "\x1b" not in fails("generate", tmp_path, "hello")
