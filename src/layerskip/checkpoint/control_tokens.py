"""Text that spells a control token, such as `<|im_end|>`, in tokens: as the text it is, where others wrote it.

    control = ControlTokens(tokenizer)
    text = tokenizer.apply_chat_template(control.marked(messages), tokenize=False)
    tokens = control.encoded([text])[0]          # the template's own <|im_end|> is one token, a user's is text

Exact: text that spells none gives the tokens of the plain tokenizer (tests/test_control_tokens.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from layerskip.errors import UserError

# Put into what a message spells, behind its first character, so that nothing finds a control token there. Unicode
# keeps it for such inner use; of a message that spells a control token, one of its own is dropped.
MARK = "\ufdd0"


class ControlTokens:
    """The special tokens of a tokenizer, which text must not become by spelling them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = [
            entry
            for entry in tokenizer.added_tokens_decoder.values()
            if entry.special and entry.content and MARK not in entry.content
        ]
        ordered = sorted(added, key=lambda entry: -len(entry.content))  # at one place the longest counts
        self._ids = {entry.content: tokenizer.convert_tokens_to_ids(entry.content) for entry in added}
        # A single character cannot be told from text, and no mark parts it: it is left to the tokenizer.
        spellings = [re.escape(entry.content) for entry in ordered if len(entry.content) > 1]
        self._pattern = re.compile("|".join(spellings) or "(?!)")
        # As the tokenizer finds them itself, with the spaces that some take along.
        cut = "|".join(
            (r"\s*" if entry.lstrip else "")
            + (rf"(?<!\w){re.escape(entry.content)}(?!\w)" if entry.single_word else re.escape(entry.content))
            + (r"\s*" if entry.rstrip else "")
            for entry in ordered
        )
        self._cut = re.compile(cut or "(?!)")
        self._anew: bool | None = None  # whether text behind a control token is cut as at the start of a text

    def spelled(self, value: Any) -> str | None:
        """Find a control token spelled in text, or in any text of a list or dictionary."""
        if isinstance(value, str):
            found = self._pattern.search(value)
            return found and found[0]
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        return next(filter(None, map(self.spelled, inner)), None)

    def marked(self, value: Any) -> Any:
        """Put a mark into what messages spell, for `encoded`; messages that spell nothing come back as they are."""
        return self._marked(value) if self.spelled(value) else value

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            text = value.replace(MARK, "")
            while self._pattern.search(text):  # one may overlap another
                text = self._pattern.sub(lambda found: found[0][0] + MARK + found[0][1:], text)
            return text
        if isinstance(value, Mapping):
            return {key: self._marked(inner) for key, inner in value.items()}
        return [self._marked(inner) for inner in value] if isinstance(value, list) else value

    def encoded(self, texts: list[str], *, around: bool = False, as_text: bool = False) -> list[list[int]]:
        """Tokenise texts; `around` adds what the tokenizer puts around a text, such as a start token.

        What is marked is text, and with `as_text` whatever is spelled is; all else as the tokenizer has it.
        Raises: UserError where the tokenizer gives a control token for text all the same.
        """
        found: list[list[int]] = [[] for _ in texts]
        plain = [at for at, text in enumerate(texts) if MARK not in text]
        whole = {at for at in plain if as_text and self.spelled(texts[at])}
        for places, more in (
            ([at for at in plain if at not in whole], {}),
            (sorted(whole), {"split_special_tokens": True}),
        ):
            if places:
                told = {
                    "add_special_tokens": around,
                    "return_attention_mask": False,
                    "verbose": False,
                    **more,
                }
                ids = self.tokenizer([texts[at] for at in places], **told)["input_ids"]
                for at, tokens in zip(places, ids, strict=True):
                    found[at] = list(tokens)
        for at in whole:
            edge = found[at] if not around else self.encoded([texts[at]], as_text=True)[0]
            self._check(texts[at], edge)
        for at in {*range(len(texts))} - {*plain}:
            found[at] = self._cut_up(texts[at])
        return found

    def _cut_up(self, text: str) -> list[int]:
        """Encode marked text: cut at control tokens, as the tokenizer would."""
        tokens: list[int] = []
        start = 0
        for match in self._cut.finditer(text):
            tokens += self._piece(text[start : match.start()], first=start == 0)
            tokens.append(self._ids[match[0] if match[0] in self._ids else match[0].strip()])
            start = match.end()
        return tokens + self._piece(text[start:], first=start == 0)

    def _piece(self, text: str, first: bool) -> list[int]:
        """Encode text between control tokens, all of it as text."""
        text = text.replace(MARK, "")
        if not text:
            return []
        tokens = self._as_text(text)
        if not first and not self._cuts_anew():
            before, after = self._as_text("\n"), self._as_text("\n" + text)
            if after[: len(before)] == before:
                tokens = after[len(before) :]
        self._check(text, tokens)
        return tokens

    def _as_text(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def _cuts_anew(self) -> bool:
        """Whether text behind a control token begins as a text does; some put a space at the start only."""
        if self._anew is None:
            name, token = next(iter(self._ids.items()))
            whole = list(self.tokenizer.encode(name + "a", add_special_tokens=False))
            self._anew = whole == [token, *self._as_text("a")]
        return self._anew

    def _check(self, text: str, tokens: list[int]) -> None:
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        spelled = {self._ids[found[0]] for found in self._pattern.finditer(text)} - {unknown}
        if spelled & {*tokens}:
            word = self.tokenizer.convert_ids_to_tokens(min(spelled & {*tokens}))
            raise UserError(
                f"this tokenizer knows {word!r} as a control token only, and the text spells it",
                "leave it out, or read it as one: control_tokens=True",
            )
