"""The verbs that measure: bench, draft-vocab. `register` adds them to the app; heavy imports happen inside."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from layerskip.cli.app import (
    AsJson,
    Confidence,
    Device,
    DraftLength,
    Dtype,
    ExitLayer,
    Guard,
    Limit,
    Model,
    Policy,
    Prompts,
    Quantize,
    StackName,
    Threads,
    load,
    vocabulary_size,
)
from layerskip.cli.results import (
    check_counts,
    configuration,
    encoded,
    loaded,
    looked_at,
    progress,
    prompt_lines,
)
from layerskip.cli.results import save as save_result
from layerskip.cli.show.terminal import err, out, print_bench, print_card, print_coverage
from layerskip.errors import UserError

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel
    from layerskip.watch import Watch

METHODS = "ar,self-speculative,early-exit"


def register(app: typer.Typer) -> None:
    """Add the verbs of this file to the command line."""
    app.command()(bench)
    app.command(name="draft-vocab")(draft_vocab)


def bench(
    model: Model,
    prompts: Prompts = None,
    limit: Limit = None,
    max_new_tokens: Annotated[int, typer.Option(help="Every method makes exactly this many.")] = 64,
    exit_layer: ExitLayer = None,
    draft_length: DraftLength = None,
    draft_vocab: Annotated[
        str | None,
        typer.Option(
            help="Tokens the draft head knows: a number, auto (by the cost model) or off.",
            show_default="by checkpoint",
        ),
    ] = None,
    policy: Policy = None,
    confidence: Confidence = None,
    guard: Guard = None,
    dtype: Dtype = "auto",
    hf_dtype: Annotated[
        str | None, typer.Option(help="Dtype of the hf methods.", show_default="same as --dtype")
    ] = None,
    device: Device = "auto",
    stack: StackName = "auto",
    quantize: Quantize = None,
    methods: Annotated[
        str, typer.Option(help="Any of ar, self-speculative, early-exit, hf, hf-early-exit; ar always is.")
    ] = METHODS,
    trials: Annotated[int, typer.Option(help="Timed turns of every method on every prompt.")] = 3,
    threads: Threads = None,
    simulate_acceptance: Annotated[
        float | None,
        typer.Option(
            help="Pretend this accepted/drafted: all work is real, the output is not.", show_default="off"
        ),
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Write a result file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare ways of decoding: equality first, methods interleaved, medians with intervals.

    layerskip bench smollm2-135m --exit-layer 6 --draft-length 4 --limit 4 --max-new-tokens 32
    """
    given = {name: value for name, value in locals().items() if name not in ("as_json", "save")}
    from layerskip.decode.load import resolve_device, resolve_dtype
    from layerskip.measure.speed import bench as benches
    from layerskip.measure.speed.methods import parsed
    from layerskip.measure.speed.settings import Prompt, Settings

    chosen = parsed(methods)
    check_counts(limit=limit, trials=trials, threads=threads)
    settings = Settings(
        methods=chosen,
        exit_layer=exit_layer,
        draft_length=draft_length,
        draft_vocab=None if draft_vocab is None else vocabulary_size(draft_vocab),
        max_new_tokens=max_new_tokens,
        trials=trials,
        simulate_acceptance=simulate_acceptance,
        hf_dtype=None if hf_dtype is None else resolve_dtype(hf_dtype, resolve_device(device)),
        quantisation=quantize,
        policy=policy,
        confidence=confidence,
        guard=guard,
    )
    settings.options(draft_vocab=settings.draft_vocab or "auto")
    lines = prompt_lines(prompts, limit)
    lm, load_s = loaded(model, dtype, device, stack, quantize, threads)
    items = [Prompt(line.task, encoded(lm, line.content)) for line in lines]
    try:
        with progress() as watch:
            result = benches.bench(
                lm,
                items,
                settings,
                announce=lambda card: print_card(err if as_json else out, card),
                watch=watch,
            )
    except benches.NotLossless as error:
        err.print(Text(f"not lossless: {error}", style="bold red"))
        sys.exit(1)
    result["configuration"] = configuration(given, lm, load_s, **looked_at(prompts, len(items)))
    if simulate_acceptance is not None:
        result["simulated"] = simulate_acceptance
    if as_json:
        print(json.dumps(result))
    else:
        print_bench(result)
    if save:
        parts = [quantize] if quantize else []
        parts += [] if simulate_acceptance is None else [f"sim{100 * simulate_acceptance:.0f}"]
        err.print(Text(f"written: {save_result(result, 'bench', *parts)}", style="dim"))


def draft_vocab(
    model: Model,
    data: Annotated[list[Path], typer.Option(help="Text the model should write; may be repeated.")],
    size: Annotated[int, typer.Option(help="Tokens to keep.")] = 8192,
    column: Annotated[
        str | None, typer.Option(help="Column of JSON lines.", show_default="text, response, messages")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Write the list here and leave the checkpoint alone.", show_default=False),
    ] = None,
    exit_layer: ExitLayer = None,
    draft_length: DraftLength = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Rank a model's tokens by frequency, so that drafting reads a small part of the head.

    layerskip draft-vocab smollm2-135m --data notes.jsonl --data code.py --size 8192
    """
    from layerskip.checkpoint.facts import write_draft_vocabulary
    from layerskip.checkpoint.files import write_json
    from layerskip.decode.options import Options
    from layerskip.measure.exits import vocabulary

    for path in data:
        if not path.is_file():
            raise UserError(
                f"no data file {path}", "--data names a .jsonl, .txt, .md or .py file, or its .gz"
            )
    lm = load(model, dtype, device)
    if lm.tokenizer is None:
        raise UserError(f"{model} has no tokenizer, so text cannot be counted", "add its tokenizer.json")
    full = lm.stack.vocab_size
    with progress() as watch:
        texts = _watched((text for path in data for text in vocabulary.documents(path, column)), watch)
        found = vocabulary.frequencies(lm.tokenizer, texts, full)
    ranking = vocabulary.ranked(found.counted)
    ids = vocabulary.first_ids(ranking, size, sorted(lm.eos_ids(Options())))
    sizes = [n for n in vocabulary.DRAFT_VOCABULARIES if n < full]
    covered = vocabulary.coverage(found.held_out, ranking, sorted({*sizes, size}))
    record: dict[str, Any] = {
        "size": size,
        "tokens_counted": int(found.counted.sum()),
        "tokens_held_out": int(found.held_out.sum()),
        "coverage": [{"size": n, "coverage": share} for n, share in covered.items()],
        **_suggestion(lm, covered, exit_layer, draft_length),
    }
    if output is not None:
        try:
            write_json(output, ids)
        except OSError as error:
            raise UserError(f"cannot write {output}: {error}") from error
        record["file"] = str(output)
    else:
        assert lm.path is not None
        record["file"] = str(write_draft_vocabulary(lm.path, ids, lm.facts))
    if as_json:
        print(json.dumps(record))
    else:
        print_coverage(record)


# -- shared by the verbs -------------------------------------------------------------------------------------


def _watched(texts: Iterator[str], watch: Watch) -> Iterator[str]:
    for number, text in enumerate(texts):
        if number % 100 == 0:
            watch("counting documents", number, 0)
        yield text


def _suggestion(
    lm: LanguageModel, covered: dict[int, float | None], exit_layer: int | None, draft_length: int | None
) -> dict[str, Any]:
    """Price each size with the cost model at an assumed agreement; nothing where there is no coverage."""
    from layerskip.decode.options import Options
    from layerskip.measure.speed import draft_sizes
    from layerskip.model.cost import best_draft_vocabulary

    plan = lm.plan(Options(mode="self-speculative", exit_layer=exit_layer, draft_length=draft_length))
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
