"""The verb draft-vocab: the tokens a draft head should know."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from layerskip.cli.app import AsJson, Loading, Model, load, verb
from layerskip.cli.options import only
from layerskip.cli.results import progress
from layerskip.cli.show.bench import print_coverage
from layerskip.cli.show.terminal import note, tell
from layerskip.decode.options import DraftOptions, Options
from layerskip.errors import UserError, hint_of
from layerskip.option import Option

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel
    from layerskip.decode.options import Plan
    from layerskip.watch import Watch


@verb
def draft_vocab(
    model: Model,
    data: Annotated[list[Path], Option("Text the model should write; may be repeated.")],
    drafting: Annotated[DraftOptions, only("exit_layer", "draft_length")],
    loading: Annotated[Loading, only("dtype", "device")],
    size: Annotated[int, Option("Tokens to keep.")] = 8192,
    column: Annotated[str | None, Option("Column of JSON lines.", shown="text, response, messages")] = None,
    output: Annotated[Path | None, Option("Write the list here and leave the checkpoint alone.")] = None,
    as_json: AsJson = False,
) -> None:
    """Rank a model's tokens by frequency, so that drafting reads a small part of the head.

    layerskip draft-vocab smollm2-135m --data notes.jsonl --data code.py --size 8192
    """
    from layerskip.checkpoint.facts import write_draft_vocabulary
    from layerskip.checkpoint.files import write_json
    from layerskip.measure.exits import vocabulary
    from layerskip.model.head import DRAFT_VOCABULARIES

    for path in data:
        if not path.is_file():
            raise UserError(
                f"no data file {path}", "--data names a .jsonl, .txt, .md or .py file, or its .gz"
            )
    lm = load(model, loading)
    if lm.tokenizer is None:
        raise UserError(f"{model} has no tokenizer, so text cannot be counted", "add its tokenizer.json")
    full = lm.stack.vocab_size
    vocabulary.check_size(size, full)  # a slip costs no time
    plan = lm.plan(Options(**{**vars(drafting), "mode": "self-speculative", "drafter": "exit"}))
    with progress() as watch:
        texts = _watched((text for path in data for text in vocabulary.documents(path, column)), watch)
        found = vocabulary.frequencies(lm.tokenizer, texts, full)
    ranking = vocabulary.ranked(found.counted)
    if output is None and (counted := int(found.counted.sum())) < size:
        raise UserError(
            f"{counted:,} tokens were counted, too few to say which {size:,} are the most frequent",
            "give more text the model should write, a smaller --size, or --output FILE to try it out",
        )
    ids = vocabulary.first_ids(ranking, size, sorted(lm.eos_ids(Options())))
    sizes = [n for n in DRAFT_VOCABULARIES if n < full]
    covered = vocabulary.coverage(found.held_out, ranking, sorted({*sizes, size}))
    record: dict[str, Any] = {
        "size": size,
        "tokens_counted": int(found.counted.sum()),
        "tokens_held_out": int(found.held_out.sum()),
        "coverage": [{"size": n, "coverage": share} for n, share in covered.items()],
        **_suggestion(lm, covered, plan),
    }
    if output is not None:
        try:
            write_json(output, ids)
        except OSError as error:
            raise UserError(
                f"cannot write {output}: {error}", hint_of(error, "give another --output")
            ) from error
        record["file"] = str(output)
    else:
        assert lm.path is not None
        record["file"] = str(write_draft_vocabulary(lm.path, ids, lm.facts))
        if lm.facts.draft_vocab is not None:
            note(f"the draft vocabulary that {lm.path} had is replaced", "yellow")
    tell(record, as_json, print_coverage)


def _watched(texts: Iterator[str], watch: Watch) -> Iterator[str]:
    for number, text in enumerate(texts):
        if number % 100 == 0:
            watch("counting documents", number, 0)
        yield text


def _suggestion(lm: LanguageModel, covered: dict[int, float | None], plan: Plan) -> dict[str, Any]:
    """Price each size with the cost model at an assumed agreement; nothing where there is no coverage."""
    from layerskip.measure.speed import draft_sizes
    from layerskip.model.cost import best_draft_vocabulary

    if None in covered.values() or plan.draft_length == 0:
        return {}
    shares = {size: share for size, share in covered.items() if share is not None}
    speedups = draft_sizes.predicted_sizes(lm, plan, shares)
    return {
        "assumed": {
            "exit_layer": plan.exit_layer,
            "draft_length": plan.draft_length,
            "agreement": draft_sizes.ASSUMED_AGREEMENT,
        },
        "predicted_speedup": {str(n): value for n, value in speedups.items()},
        "suggested_size": best_draft_vocabulary(speedups),
    }
