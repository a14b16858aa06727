"""The verb doctor: which source of drafts, with which settings, does it pay here? Predicted."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerskip.cli.app import AsJson, Loading, Model, listed_layers, verb
from layerskip.cli.options import Given
from layerskip.cli.prompts import PromptOptions, encoded, unescaped
from layerskip.cli.results import configuration, loaded, progress
from layerskip.cli.show.advice import print_doctor
from layerskip.cli.show.terminal import tell
from layerskip.decode.options import vocabulary_size
from layerskip.errors import UserError
from layerskip.option import option

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel
    from layerskip.measure.lines import PromptLine


@dataclass(frozen=True)
class Asked(PromptOptions):
    """What doctor predicts and tune measures."""

    max_new_tokens: int = option(64, "Budget of each continuation.", least=2)  # the prompt gives the first
    chat: bool | None = option(None, "Wrap prompts as messages.", shown="if it can")
    separator: str = option("", "What follows a text prompt that is not wrapped; \\n is a line break.")
    exits: list[int] | None = option(
        None,
        "E to try, comma-separated.",
        typed=str | None,
        read=listed_layers,
        shown="trained ones, or a spread",
    )
    draft_vocab: int | str = option(
        "auto", "Draft vocabulary: a number, auto (try several) or off.", choices=("auto", "off"), typed=str,
        read=vocabulary_size,
    )  # fmt: skip

    def encoded(self, lm: LanguageModel, lines: list[PromptLine]) -> tuple[bool, list[list[int]]]:
        """Whether prompts are wrapped, and their tokens. Raises: UserError for one that passes the context."""
        chat = lm.has_template if self.chat is None else self.chat
        items = [encoded(lm, line.content, chat, unescaped(self.separator)) for line in lines]
        context, budget = lm.stack.context, self.max_new_tokens
        for number, tokens in enumerate(items, 1):
            if context is not None and len(tokens) + budget > context:
                raise UserError(
                    f"prompt {number} has {len(tokens)} tokens; with {budget} new ones it passes the context "
                    f"of {context}",
                    "lower --max-new-tokens, or leave such prompts out",
                )
        return chat, items


@verb
def doctor(model: Model, asked: Asked, loading: Loading, given: Given, as_json: AsJson = False) -> None:
    """Say what each source of drafts (copies, an exit, both) would gain here, and what stands in its way.

    layerskip doctor smollm2-135m
    """
    lines = asked.lines()
    lm, load_s = loaded(model, loading)
    from layerskip.measure.advice.doctor import examine
    from layerskip.measure.advice.prediction import analyse

    as_chat, items = asked.encoded(lm, lines)
    with progress() as watch:
        analysis = analyse(lm, items, asked.max_new_tokens, asked.exits, asked.draft_vocab, watch=watch)
        watch("decoding twice", 0, 0)
        result = examine(lm, analysis, as_chat, shlex.quote(model), _repeated(given))
    result["configuration"] = configuration(given, lm, load_s, **asked.looked_at(len(items)))
    tell(result, as_json, print_doctor)


def _repeated(given: Given) -> str:
    """Spell the options that are not at their default, for another verb."""
    words = ""
    for name, value in given.changed.items():
        if name in ("model", "as_json"):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words += f" --{flag}" if value else f" --no-{flag}"
        else:
            words += f" --{flag} {shlex.quote(str(value))}"
    return words
