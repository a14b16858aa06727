"""The demonstration: four real prompts, plain and self-speculative in turn, equality before speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerskip.decode.generation import Generation
    from layerskip.decode.language_model import LanguageModel

PROMPTS = {
    "code": "Write a Python function `median(numbers)` that returns the median of a list of numbers.",
    "summary": (
        "Summarize in one sentence: The lighthouse on the northern cape was built in 1874 after three ships were "
        "lost in a single winter. Its keeper lit the lamp every evening for forty years and wrote down the "
        "weather, the ships and the birds he saw. When the lamp was made electric in 1921 his books were found in "
        "the tower; they are now the longest record of bird migration on that coast."
    ),
    "maths": (
        "A baker sells 12 loaves in the morning and twice as many in the afternoon. Each loaf costs 3 dollars. How "
        "much money does she make in a day?"
    ),
    "chat": "I have eggs, rice and spinach. What can I cook for dinner?",
}


@dataclass(frozen=True)
class Contest:
    """One prompt decoded both ways."""

    task: str
    plain: Generation
    speculative: Generation

    @property
    def equal(self) -> bool:
        return self.plain.tokens == self.speculative.tokens

    @property
    def speedup(self) -> float:
        """Decode seconds of plain over self-speculative decoding (same tokens when equal)."""
        return float(self.plain.stats["decode_s"] / self.speculative.stats["decode_s"])


def contests(
    lm: LanguageModel, exit_layer: int | None, draft_length: int | None, max_new_tokens: int
) -> Iterator[Contest]:
    """Decode the prompts greedily, plain and self-speculative one after the other."""
    lm.generate("warm up", mode="ar", max_new_tokens=4)  # the first call pays for allocations
    for task, prompt in PROMPTS.items():
        message = [{"role": "user", "content": prompt}] if lm.has_template else prompt
        plain = lm.generate(message, mode="ar", max_new_tokens=max_new_tokens)
        speculative = lm.generate(
            message,
            mode="self-speculative",
            exit_layer=exit_layer,
            draft_length=draft_length,
            max_new_tokens=max_new_tokens,
        )
        yield Contest(task, plain, speculative)


def as_record(model: str, lm: LanguageModel, results: Sequence[Contest]) -> dict[str, Any]:
    """Lay the contests out for machines; a speed-up is only given where the outputs are equal."""
    return {
        "model": model,
        "trained_exits": lm.facts.trained,
        "equal": sum(contest.equal for contest in results),
        "prompts": [
            {
                "task": contest.task,
                "equal": contest.equal,
                "speedup": contest.speedup if contest.equal else None,
                "plain": contest.plain.stats,
                "self_speculative": contest.speculative.stats,
            }
            for contest in results
        ],
    }
