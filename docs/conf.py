"""The site, made by Sphinx: `make docs` writes it into build/docs."""

from dataclasses import fields, is_dataclass
from importlib.metadata import version as version_of
from typing import Any

from layerskip.option import options_of

project = "layerskip"
author = "The layerskip authors"
copyright = author
release = version = version_of("layerskip")
extensions = ["myst_nb", "sphinx.ext.autodoc"]  # myst_nb brings myst_parser
nb_execution_mode = "off"  # `make story` runs the notebook, and keeps its outputs
html_theme = "furo"
html_title = f"layerskip {version}"
html_show_sphinx = False
myst_heading_anchors = 4
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
# Pages link to files of the repository, too, which are no pages of the site.
suppress_warnings = ["myst.xref_missing"]


def _escaped(text: str) -> str:
    return text.replace("*", "\\*").replace("|", "\\|")


def _worded(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: a star in them is a star. Dataclasses of options list these."""
    lines[:] = [_escaped(line) for line in lines]
    if what == "class" and is_dataclass(thing) and all("option" in one.metadata for one in fields(thing)):
        for option, (_, default, told) in options_of(thing).items():
            lines += ["", f"- `{option}`, by default {told.shown or f'`{default!r}`'}: {_escaped(told.help)}"]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _worded)
