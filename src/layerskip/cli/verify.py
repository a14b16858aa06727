"""The verb verify: is drafting lossless for this checkpoint, on this machine?"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from layerskip.cli.app import AsJson, Loading, Model, verb
from layerskip.cli.options import Given
from layerskip.cli.prompts import PromptOptions, encoded
from layerskip.cli.results import configuration, loaded, progress
from layerskip.cli.show.proof import markdown, print_case, print_proof
from layerskip.cli.show.terminal import note, tell
from layerskip.errors import UserError
from layerskip.option import Option, option

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel

OURS = (
    "model",
    "as_json",
    "output",
    "only",
    "case",
)  # a failing case's command says these anew, or not at all


@dataclass(frozen=True)
class Asked(PromptOptions):
    """What is verified, and for how long."""

    max_new_tokens: int = option(32, "Budget of each output compared.", least=2)
    seconds: int = option(240, "Time for the checks; what was left out is said.", least=1)
    only: str = option(
        "all",
        "Checks: all, or of bits, twice, beside, greedy, sampling, float32, formats, with commas between.",
    )
    case: str | None = option(None, "Run one failing case again, as verify printed it.")


@verb
def verify(
    model: Model,
    asked: Asked,
    loading: Loading,
    given: Given,
    output: Annotated[
        Path | None, Option("Write FILE.json and a page FILE.md.", flags=("--output", "-o"))
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that drafting changes nothing, for this checkpoint on this machine; else show the smallest case found.

    layerskip verify smollm2-135m --output certificate
    """
    from layerskip.measure.proof.cases import read_case
    from layerskip.measure.proof.certificate import CHECKS, Scope, certify

    only = tuple(CHECKS) if asked.only == "all" else tuple(name.strip() for name in asked.only.split(","))
    scope = Scope(asked.max_new_tokens, asked.seconds, only, formats=loading.quantize is None)
    case = None if asked.case is None else read_case(asked.case)
    if output is not None and not output.absolute().parent.is_dir():
        raise UserError(f"there is no folder {output.parent}", "make it, or name another --output")
    lines = asked.lines()
    lm, load_s = loaded(model, loading)
    if case is not None:
        _run_again(lm, *case, as_json)
    items = fitting([encoded(lm, line.content) for line in lines], lm.stack.context, asked.max_new_tokens)
    with progress() as watch:
        result = certify(lm, items, scope, watch)
    import torch

    told = asked.looked_at(len(items)) | {"threads": torch.get_num_threads()}
    result["configuration"] = configuration(given, lm, load_s, **told)
    for check in result["checks"]:
        if check["command"]:
            check["command"] = spelled(model, given, check["command"])
    tell(result, as_json, print_proof)
    if output is not None:
        write(result, output)
    if not result["holds"]:
        sys.exit(1)


def _run_again(
    lm: LanguageModel, case: Any, prompts: list[list[int]], max_new_tokens: int, as_json: bool
) -> None:
    """Decode one case plainly and as it says, print both, leave with 1 where they differ."""
    from layerskip.measure.proof.cases import decoded

    plain = [decoded(lm, [prompt], max_new_tokens)[0] for prompt in prompts]
    own = decoded(lm, prompts, max_new_tokens, case)
    told = {"case": vars(case), "prompts": prompts, "plain": plain, "own": own, "holds": plain == own}
    tell(told, as_json, print_case)
    sys.exit(0 if told["holds"] else 1)


def fitting(prompts: list[list[int]], context: int | None, budget: int) -> list[list[int]]:
    """Cut prompts that leave no room for the budget, at their front. Raises: UserError where none has room."""
    if context is None:
        return prompts
    if budget >= context:
        raise UserError(f"{budget} new tokens fill the context of {context}", "lower --max-new-tokens")
    return [prompt[-(context - budget) :] for prompt in prompts]


def spelled(model: str, given: Given, more: list[str]) -> str:
    """Spell the command that shows a failing check again, options that were given included."""
    words = ["layerskip", "verify", model]
    for name, value in given.changed.items():
        if name not in OURS:
            flag = name.replace("_", "-")
            words += (
                [f"--{'' if value else 'no-'}{flag}"]
                if isinstance(value, bool)
                else [f"--{flag}", str(value)]
            )
    return shlex.join([*words, *more])


def write(result: dict[str, Any], output: Path) -> None:
    """Write the certificate as JSON and as a page beside it. Raises: UserError."""
    from layerskip.checkpoint.files import write_json, write_text

    base = output.with_suffix("") if output.suffix in (".json", ".md") else output
    files = [base.with_name(base.name + suffix) for suffix in (".json", ".md")]
    try:
        write_json(files[0], result, indent=1)
        write_text(files[1], markdown(result))
    except OSError as error:
        raise UserError(f"cannot write {base}: {error}") from error
    note(f"written: {files[0]}, {files[1]}")
