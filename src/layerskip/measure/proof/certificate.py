"""A certificate for one checkpoint on one machine: every check, cheap ones first, within a time.

    result = certify(lm, prompts, Scope(max_new_tokens=32, seconds=240), watch)
    result["holds"], result["checks"]

The model is checked as it is loaded; then it is loaded again in float32, where transformers' own `generate` is
the measure, and in every weight format that runs here.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from layerskip.checkpoint.facts import fingerprint
from layerskip.decode.language_model import LanguageModel
from layerskip.decode.load import load
from layerskip.errors import UserError, nearest
from layerskip.measure.proof import laws, stability
from layerskip.measure.proof.cases import Case, Clock, cases, draft_vocabulary, exit_layers
from layerskip.measure.proof.equality import (
    DIFFERS,
    HOLDS,
    NEAR_TIES,
    NOT_RUN,
    Equality,
    Finding,
    Gap,
    dtype_name,
)
from layerskip.measure.speed.methods import hugging_face, hugging_face_model
from layerskip.model.cache import available_bytes
from layerskip.model.huggingface import HuggingFaceStack
from layerskip.model.native.formats import FORMATS, require_format
from layerskip.model.native.load import native_stack
from layerskip.model.parity import PARITY
from layerskip.watch import Watch, silent

CHECKS = {  # name: share of the time that is over when the check must end; what it does not use is the next one's
    "bits": 0.06,
    "twice": 0.12,
    "beside": 0.22,
    "greedy": 0.5,
    "sampling": 0.72,
    "float32": 0.9,
    "formats": 1.0,
}
READ, FEW = 2, 4  # prompts that are read in all ways; that transformers continues
DRAWS = 768  # of a setting, at most


@dataclass(frozen=True)
class Scope:
    """How much is checked. `only` names checks; without `formats` the loaded weight format is the only one.

    Raises: UserError for an unknown check.
    """

    max_new_tokens: int = 32
    seconds: float = 240.0
    only: tuple[str, ...] = tuple(CHECKS)
    formats: bool = True

    def __post_init__(self) -> None:
        for name in self.only:
            if name not in CHECKS:
                raise UserError(f"unknown check {name!r}", nearest(name, CHECKS))


def certify(
    lm: LanguageModel, prompts: list[list[int]], scope: Scope, watch: Watch = silent
) -> dict[str, Any]:
    """Run the checks; returns the certificate without its `configuration`. Raises: UserError for one layer."""
    if lm.stack.num_layers < 2:
        raise UserError("the model has one layer", "self-speculation needs a layer above the exit")
    clock = Clock(scope.seconds)
    equality = Equality(lm, prompts, scope.max_new_tokens, watch)
    usual = usual_case(lm)
    others = [Case(exit_layer, 2, on_device=True) for exit_layer in exit_layers(lm)]
    families: dict[str, Callable[[Clock], list[Finding]]] = {
        "bits": lambda due: [stability.bits(lm, prompts[:READ], usual.exit_layer, due, watch)],
        "twice": lambda due: [stability.twice(equality, usual)],
        "beside": lambda due: [stability.company(equality, replace(usual, rows=3))],
        "greedy": lambda due: [equality.check(cases(lm), due)],
        "sampling": lambda due: [laws.sampled(lm, prompts, usual, others, DRAWS, due, watch)],
        "float32": lambda due: in_float32(equality, due),
        "formats": lambda due: [found for name in FORMATS for found in in_format(equality, name, due)],
    }
    found: list[Finding] = []
    seconds: dict[str, float] = {}
    for name, share in CHECKS.items():
        if name in scope.only and (name != "formats" or scope.formats):
            began = clock.spent
            found += families[name](clock.until(share))
            seconds[name] = clock.spent - began
    return {
        "holds": not any(one.lost for one in found),
        "complete": not any(one.cut for one in found),
        "checks": [asdict(one) for one in found],
        "near_ties": near_ties(found),
        "seconds": clock.spent,
        "seconds_by_check": seconds,
        "stack": lm.stack.name,
        "row_exact": lm.stack.row_exact,
        "layers": lm.stack.num_layers,
        "fingerprint": fingerprint(lm.path),
    }


def shortly(lm: LanguageModel, prompts: list[list[int]], max_new_tokens: int, case: Case) -> list[Finding]:
    """Decode twice, and compare a handful of settings around a case with plain decoding: what doctor runs."""
    equality = Equality(lm, prompts, max_new_tokens)
    few = [
        case,
        replace(case, on_device=True),
        replace(case, policy="confidence", rows=len(prompts)),
        replace(case, draft_length=2 * case.draft_length),
        replace(case, drafter="lookup"),
        replace(case, drafter="auto"),
    ]
    return [stability.twice(equality, case), equality.check(few, Clock(float("inf")))]


def usual_case(lm: LanguageModel) -> Case:
    """How the checkpoint drafts by default; an exit after a quarter of the layers where it says nothing."""
    exit_layer = lm.facts.exit_layer
    if exit_layer is None:
        exit_layer = max(1, lm.stack.num_layers // 4)
    return Case(exit_layer, lm.facts.draft_length or 2, draft_vocabulary(lm))


def near_ties(found: Sequence[Finding]) -> dict[str, Any]:
    """Count first differences that sit where the two best logits are as good as equal, and tell the largest gap."""
    gaps = [gap["relative"] for one in found for gap in one.numbers.get("gaps", ())]
    return {"differences": len(gaps), "largest_gap": max(gaps, default=None)}


# -- the same checkpoint, loaded otherwise -------------------------------------------------------------------


def in_float32(of: Equality, clock: Clock) -> list[Finding]:
    """Continue prompts with transformers in float32, then plainly by ours, then by a few settings of ours."""
    title, lm = "transformers, float32", of.lm
    if reason := _no_room(lm, torch.float32):
        return [Finding(title, NOT_RUN, "none", reason)]
    of.watch("loading in float32", 0, 0)
    hf = hugging_face_model(lm, torch.float32)
    prompts = of.prompts[:FEW]
    wanted: list[list[int]] = []
    method = hugging_face(hf)
    for index, prompt in enumerate(prompts):
        if wanted and clock.over:
            break
        of.watch(title, index, len(prompts))
        wanted.append(method.decode(index, prompt, of.budget).tokens)
    same = hf is lm.hf or (lm.stack.dtype == torch.float32 and getattr(lm.stack, "quantize", None) is None)
    if same:
        ours = of
    else:
        stack = HuggingFaceStack(hf) if lm.stack.name == "hf" else native_stack(hf)
        ours = Equality(_beside(lm, stack, hf), of.prompts, of.budget, of.watch)
    del hf, method
    found = [against_transformers(ours, wanted)]
    return found if same else [*found, ours.check(cases(ours.lm, strength=1), clock)]


def against_transformers(ours: Equality, wanted: Sequence[Sequence[int]]) -> Finding:
    """Compare our plain outputs with transformers', ends of sequence included.

    Its kernels round otherwise, so near ties may turn over; what counts as one is the parity check's."""
    gaps, allowed, tokens = [], PARITY[torch.float32], 0
    for index, reference in enumerate(wanted):
        plain = ours.plain(index)
        tokens += len(plain)
        if plain != list(reference[: len(plain)]):
            gaps.append(Gap.of(ours.lm.stack, index, ours.prompts[index], reference[: len(plain)], plain))
    worst = max(gaps, key=lambda gap: gap.relative, default=None)
    lost = worst is not None and worst.relative > allowed
    told = f"{len(wanted) - len(gaps)} of {len(wanted)} plain outputs are those of generate(do_sample=False)"
    if worst is not None:
        told += f"; prompt {worst.prompt + 1} parts at token {worst.position + 1}, "
        told += f"{worst.relative:.2g} of the largest logit apart"
    failure = None
    if lost and worst is not None:
        end = worst.position + 1
        failure = {
            "prompt": ours.prompts[worst.prompt],
            "transformers": list(wanted[worst.prompt][:end]),
            "own": ours.plain(worst.prompt)[:end],
        }
    return Finding(
        "transformers, float32",
        DIFFERS if lost else NEAR_TIES if gaps else HOLDS,
        f"{len(wanted)} prompts, {tokens:,} tokens",
        told,
        {
            "prompts": len(wanted),
            "tokens": tokens,
            "differing": len(gaps),
            "gaps": [vars(gap) for gap in gaps],
        },
        failure,
        ["--only", "float32"] if lost else [],
        cut=len(wanted) < min(FEW, len(ours.prompts)),
    )


def in_format(of: Equality, name: str, clock: Clock) -> Iterator[Finding]:
    """Load a weight format and compare its drafted output with its own plain one, unless it is that loaded already.

    Raises: nothing where the format cannot be loaded: the finding then is that it was not run, and why.
    """
    lm = of.lm
    if getattr(lm.stack, "quantize", None) == name:
        return
    title, dtype = f"greedy, {name}", FORMATS[name].dtypes[0]
    try:
        require_format(name, dtype, lm.stack.device)
        if reason := _no_room(lm, dtype):
            raise UserError(reason)
        of.watch(f"loading in {name}", 0, 0)
        loaded = load(str(lm.path), dtype=dtype, device=lm.stack.device, quantize=name, progress=False)
    except UserError as error:
        yield Finding(title, NOT_RUN, "none", error.message)
        return
    loaded.facts = lm.facts
    yield Equality(loaded, of.prompts, of.budget, of.watch).check(cases(loaded, strength=1), clock)


def _beside(lm: LanguageModel, stack: Any, hf: Any) -> LanguageModel:
    made = LanguageModel(stack, lm.tokenizer, lm.path, hf)
    made.facts, made.generation_config = lm.facts, lm.generation_config
    return made


def _no_room(lm: LanguageModel, dtype: torch.dtype) -> str | None:
    """Say why the checkpoint cannot be loaded once more; None where it can."""
    if lm.path is None:
        return None if lm.hf is not None and lm.stack.dtype == dtype else "there is no folder to load it from"
    gc.collect()  # what was loaded before is no longer needed
    stack, available = lm.stack, available_bytes(lm.stack.device)
    weights = stack.num_layers * stack.layer_bytes + stack.head_bytes + stack.table_bytes
    needed = 2 * weights * dtype.itemsize // stack.dtype.itemsize  # read once, laid out once
    if available is not None and needed > available:
        return f"{dtype_name(dtype)} takes {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free"
    return None
