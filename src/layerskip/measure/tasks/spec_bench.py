"""Spec-Bench (arXiv 2401.07851) on this engine: a method that its scripts call, and its questions answered here.

    method = Method(lm)                                          # in a clone of Spec-Bench
    run_eval(model=method, tokenizer=lm.tokenizer, forward_func=method, model_id="layerskip", ...)

    answers(lm, Path("question.jsonl"), Path("layerskip.jsonl"), "layerskip")                 # without one
    answers(lm, Path("question.jsonl"), Path("plain.jsonl"), "plain", drafter="off")

Both count as Spec-Bench does: a step is a pass of the whole model that ends in tokens, the prompt's own included,
and the length of a step is what it committed: drafts kept, and the model's own token. So plain decoding has steps
of length 1, and the lengths sum to the new tokens. Its `speed.py` and `equal.py` read the files.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import TYPE_CHECKING, Any, Unpack

import torch

from layerskip.errors import UserError
from layerskip.measure.lines import read_questions
from layerskip.measure.records import Records

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from layerskip.decode.language_model import LanguageModel
    from layerskip.decode.options import Keywords
    from layerskip.decode.request import Round
    from layerskip.measure.records import Record

MAX_NEW_TOKENS = 1024  # of a turn, Spec-Bench's default


class Method:
    """A loaded model in the shape of Spec-Bench's `forward_func`; options are those of `generate`.

    It also stands in for the model that Spec-Bench hands around, which is asked for `eval()`, `training`, `config`.
    Exact: greedy output is plain decoding's (tests/measure/test_spec_bench.py).
    """

    training = False

    def __init__(self, lm: LanguageModel, **options: Unpack[Keywords]) -> None:
        self.lm, self.options, self.config = lm, options, lm.config

    def eval(self) -> Method:
        return self

    def __call__(
        self, inputs: Any, model: Any = None, tokenizer: Any = None, max_new_tokens: int = MAX_NEW_TOKENS,
        **options: Any,
    ) -> tuple[torch.Tensor, int, int, list[int]]:  # fmt: skip
        """Continue one prompt: its ids with those of the output, new tokens, steps, the length of each step.

        `inputs` is what a tokenizer gave, or the ids. `options` go before those of the method.

        Shapes: ids int64 [1, T] -> [1, T + new tokens], on their device.
        Raises: UserError for more than one prompt, and as `generate` does.
        """
        ids = getattr(inputs, "input_ids", inputs)
        if ids.dim() != 2 or len(ids) != 1:
            raise UserError(
                f"input ids have the shape {list(ids.shape)}", "Spec-Bench gives one prompt, [1, T]"
            )
        given: Any = {**self.options, "max_new_tokens": max_new_tokens, **options}
        done = self.lm.generate(ids[0], **given)
        new = torch.tensor([done.tokens], dtype=ids.dtype, device=ids.device)
        lengths = step_lengths(done.rounds)
        return torch.cat([ids, new], dim=1), len(done.tokens), len(lengths), lengths


def step_lengths(rounds: Sequence[Round]) -> list[int]:
    """Count the tokens that each step committed; pieces of a prompt that end in none are no steps."""
    return [len(round.tokens) for round in rounds if round.tokens]


def answers(
    lm: LanguageModel, questions: Path, output: Path, model_id: str, **options: Unpack[Keywords]
) -> list[Record]:
    """Answer a file of questions into a file of Spec-Bench's form, and return its answers in the questions' order.

    Appends a line to `output` as soon as a question is answered, and leaves out those that have one: the same call
    goes on after a kill. Turns of a question are a conversation whose cache is kept. `options` are those of `chat`,
    1,024 new tokens a turn by default; without a seed, sampling takes seed 0.

    Units: `wall_time` in seconds per turn, the pass over what the turn adds to the prompt included.
    Raises: UserError for a question that cannot be read or has no room, and for answers of another method.
    """
    asked = read_questions(questions)
    if output.suffix != ".jsonl":
        raise UserError(f"{output.name} is no file of answers", "name a .jsonl file")
    given: Any = {"max_new_tokens": MAX_NEW_TOKENS, "seed": 0, **options}
    told = json.loads(json.dumps(given, default=lambda value: type(value).__name__))
    records = Records(output.parent, output.stem, ("question_id",), "name another file")
    for record in records.found.values():
        if (record.get("model_id"), record.get("options")) != (model_id, told):
            raise UserError(f"{output} has answers of another method or other options", "name another file")
    for question in asked:
        if question.question_id in records.found:
            continue
        try:
            choice = _choice(lm, question.turns, given)
        except UserError as error:
            where = f"question {question.question_id}"
            raise UserError(f"{where}: {error.message}", error.hint) from error
        records.keep(
            {
                "question_id": question.question_id,
                "category": question.category,
                "answer_id": uuid.uuid4().hex,
                "model_id": model_id,
                "options": told,
                "choices": [choice],
                "tstamp": time.time(),
            }
        )
    return [records.found[question.question_id] for question in asked]


def _choice(lm: LanguageModel, turns: Sequence[str], options: Any) -> dict[str, Any]:
    """Answer all turns of a question; `accept_lengths` runs through the turns, other lists have one of each."""
    lists: tuple[str, ...] = ("turns", "decoding_steps", "new_tokens", "wall_time", "accept_lengths")
    told: dict[str, Any] = {"index": 0, **{name: [] for name in lists}}
    chat = lm.chat(**options)
    try:
        for turn in turns:
            began = time.perf_counter()
            lengths = step_lengths([*chat.send(turn)])
            told["wall_time"].append(time.perf_counter() - began)
            told["turns"].append(chat.last.text if chat.last else "")
            told["decoding_steps"].append(len(lengths))
            told["new_tokens"].append(sum(lengths))
            told["accept_lengths"] += lengths
    finally:
        chat.close()
    return told
