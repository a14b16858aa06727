"""The verb eval: what every exit is worth on texts and prompts, and tasks at an exit beside the full model."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from layerskip.cli.app import (
    AsJson,
    Device,
    DraftLength,
    DraftVocab,
    Dtype,
    Model,
    Quantize,
    Separator,
    StackName,
    Threads,
    exit_layers,
    vocabulary_size,
)
from layerskip.cli.results import (
    check_counts,
    configuration,
    encoded,
    loaded,
    progress,
    unescaped,
)
from layerskip.cli.results import save as save_result
from layerskip.cli.show.terminal import err
from layerskip.errors import UserError, nearest
from layerskip.watch import Watch, silent

if TYPE_CHECKING:
    from layerskip.config import LikelihoodLine
    from layerskip.decode.language_model import LanguageModel
    from layerskip.measure.records import Record, Records

WINDOW, CONTINUATION = 1024, 128  # tokens, by default
LIKELIHOOD = "loglikelihood"
SOURCES = ("text", "continuations", "prompts")  # the first one present is what `exits` of a result tells


def register(app: typer.Typer) -> None:
    """Add the verb of this file to the command line."""
    app.command(name="eval")(evaluate)


def evaluate(
    model: Model,
    text: Annotated[Path | None, typer.Option(help="Plain text, also .gz.", show_default=False)] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with prompt or messages, also .gz.", show_default=False)
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="loglikelihood, topv2, humaneval or gsm8k.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="The task's items, JSON lines, also .gz.", show_default=False)
    ] = None,
    exits: Annotated[
        str, typer.Option(help="Exits to judge: all, or 1,4,8; the last layer always is.")
    ] = "all",
    limit: Annotated[
        int | None, typer.Option(help="Use the first windows, prompts or items only.", show_default="all")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens of a window of text.", show_default=f"{WINDOW}, or the context")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Budget of a continuation.", show_default=f"{CONTINUATION}; of a task, its own"),
    ] = None,
    exit_layer: Annotated[
        int | None,
        typer.Option(
            help="E, the exit a task is done at.", show_default="by checkpoint, or a quarter of the layers"
        ),
    ] = None,
    modes: Annotated[
        str,
        typer.Option(help="How a generation task is done; of ar, early-exit, self-speculative."),
    ] = "ar,early-exit,self-speculative",
    draft_length: DraftLength = None,
    draft_vocab: DraftVocab = "auto",
    batch_size: Annotated[int, typer.Option(help="Prompts continued together.")] = 8,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Wrap prompts as messages.", show_default="prompts, if it can"),
    ] = None,
    separator: Separator = "",
    work: Annotated[
        Path | None, typer.Option(help="Keep results per item here.", show_default="in the cache folder")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    stack: StackName = "auto",
    quantize: Quantize = None,
    threads: Threads = None,
    save: Annotated[bool, typer.Option("--save", help="Write a result file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Judge every exit on text, on prompts and on the model's own continuations; run again to go on after a stop.

    layerskip eval smollm2-135m --text wikitext.txt --limit 4
    """
    given = {name: value for name, value in locals().items() if name not in ("as_json", "save", "work")}
    from layerskip.decode.options import Options

    counts = {"limit": limit, "window": window, "max-new-tokens": max_new_tokens}
    check_counts(**counts, threads=threads, **{"batch-size": batch_size})
    if window == 1:
        raise UserError("window is 1", "a window needs a token and one that follows it: at least 2")
    chosen, after = exit_layers(exits), unescaped(separator)
    wanted = _read(given)
    mode_names = [name.strip() for name in modes.split(",") if name.strip()]
    drafting: dict[str, Any] = {"draft_length": draft_length, "draft_vocab": vocabulary_size(draft_vocab)}
    for name in mode_names or [modes]:
        Options.parse({"mode": name, **drafting})
    lm, load_s = loaded(model, dtype, device, stack, quantize, threads)
    if lm.tokenizer is None:
        raise UserError(f"{model} has no tokenizer, so it cannot read text", "add its tokenizer.json")
    wrap = lm.has_template if chat is None else chat
    if prompts is not None and wrap and after:
        raise UserError("--separator does nothing: this model's template wraps prompts", "add --no-chat")
    run = _Run(lm, chosen, work, quantize, limit)
    sources: dict[str, list[dict[str, Any]]] = {}
    tasks: dict[str, Any] = {}
    try:
        with progress() as watch:
            run.watch = watch
            if text is not None:
                sources |= run.text(wanted["text"], text, window)
            if prompts is not None:
                budget = max_new_tokens or CONTINUATION
                sources |= run.prompts(wanted["prompts"], prompts, budget, batch_size, wrap, after)
            if task == LIKELIHOOD:
                tasks[task] = run.likelihood(wanted["items"], data, exit_layer, bool(chat), after)
            elif task is not None:
                drafting |= {"exit_layer": exit_layer}
                more = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "chat": chat}
                tasks[task] = run.task(task, wanted["items"], data, mode_names, drafting, more)
    except KeyboardInterrupt:
        err.print(Text("stopped; run the same command again to go on", style="dim"))
        sys.exit(130)
    result = {
        "exits": next((sources[name] for name in SOURCES if name in sources), []),
        "sources": sources,
        "tasks": tasks,
        "configuration": configuration(given, lm, load_s, layers=lm.stack.num_layers),
    }
    if as_json:
        print(json.dumps(result))
    else:
        from layerskip.cli.show.evaluation import print_evaluation

        print_evaluation(result)
    err.print(Text(f"results per item: {', '.join(map(str, run.files))}", style="dim"))
    if save:
        err.print(Text(f"written: {save_result(result, 'eval', *(sources or tasks))}", style="dim"))


# -- before the model is loaded ------------------------------------------------------------------------------


def _read(given: dict[str, Any]) -> dict[str, Any]:
    """Read what is asked for. Raises: UserError for a file or an option of no use, or nothing to do."""
    from layerskip.config import read_likelihoods, read_prompts
    from layerskip.measure.exits.evaluation import read_text
    from layerskip.measure.tasks import generation as tasks

    text, prompts, task, data, limit = (given[k] for k in ("text", "prompts", "task", "data", "limit"))
    known = (LIKELIHOOD, *tasks.NAMES)
    if text is None and prompts is None and task is None:
        if data is not None:
            raise UserError("--data comes without a task", f"--task is one of {', '.join(known)}")
        raise UserError("there is nothing to judge on", "give --text, --prompts, or --task with --data")
    if task is not None and task not in known:
        raise UserError(f"unknown task {task!r}", nearest(task, known))
    if (task is None) != (data is None):
        missing = "--data" if data is None else "--task"
        raise UserError(f"{missing} is missing", "a task needs its items: --task NAME --data FILE.jsonl")
    _check_used(given)
    found: dict[str, Any] = {}
    if text is not None:
        found["text"] = read_text(text)
    if prompts is not None:
        found["prompts"] = [line.content for line in read_prompts(prompts)][:limit]
    if task == LIKELIHOOD:
        found["items"] = read_likelihoods(data)[:limit]
    elif task is not None:
        found["items"] = tasks.read(task, data, limit)
    return found


def _check_used(given: dict[str, Any]) -> None:
    """Refuse an option that nothing asked for would read. Raises: UserError."""
    text, prompts, task = (given[name] is not None for name in ("text", "prompts", "task"))
    scores = given["task"] == LIKELIHOOD
    generates, generation = task and not scores, "--task topv2, humaneval or gsm8k"
    needs = {
        "window": (text, "--text"),
        "exits": (text or prompts, "--text or --prompts; a task has --exit-layer"),
        "exit_layer": (task, "--task"),
        **dict.fromkeys(("modes", "draft_length", "draft_vocab"), (generates, generation)),
        **dict.fromkeys(
            ("max_new_tokens", "batch_size"), (prompts or generates, f"--prompts, or {generation}")
        ),
        "chat": (prompts or task, "--prompts or --task"),
        "separator": (prompts or scores, f"--prompts, or --task {LIKELIHOOD}"),
    }
    for name, (used, needed) in needs.items():
        if not used and given[name] != signature(evaluate).parameters[name].default:
            raise UserError(f"--{name.replace('_', '-')} has nothing to do here", f"it goes with {needed}")
    if given["chat"] and given["separator"]:
        raise UserError("--separator does nothing under --chat", "a template says what follows a prompt")


# -- with the model ------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """A model to judge and where its results are kept; a method does one kind of work, or what is left of it."""

    lm: LanguageModel
    exits: list[int] | None
    work: Path | None
    quantize: str | None
    limit: int | None
    watch: Watch = silent

    def __post_init__(self) -> None:
        from layerskip.measure.exits.states import check_exits

        layers = self.lm.stack.num_layers
        self.files: list[Path] = []
        if self.exits is None:
            self.exits = list(range(1, layers + 1))
        check_exits(self.exits, layers)
        self.exits = sorted({*self.exits, layers})

    def text(self, content: str, path: Path, window: int | None) -> dict[str, list[dict[str, Any]]]:
        """Judge the exits on running text, window by window."""
        from layerskip.measure.exits.evaluation import Text, windows

        context = self.lm.stack.context
        size = min(WINDOW, context or WINDOW) if window is None else window
        if context is not None and size > context:
            raise UserError(f"window is {size}", f"the model's context is {context} tokens")
        cut = windows(self.lm.encode(content), size)[: self.limit]
        if not cut:
            raise UserError(f"{path} is a single token", "there is nothing to predict in it")
        texts = [Text(tokens, {"text": range(len(tokens) - 1)}) for tokens in cut]
        records = self._records("text", path, exits=self.exits, window=size)
        return self._judged(texts, records, ("text",))

    def prompts(
        self, contents: Sequence[Any], path: Path, budget: int, batch_size: int, chat: bool, separator: str
    ) -> dict[str, list[dict[str, Any]]]:
        """Judge the exits on prompts and on the model's own continuations of them."""
        from layerskip.decode.options import Options
        from layerskip.measure.exits.evaluation import Text
        from layerskip.measure.records import Records

        lm = self.lm
        given = [encoded(lm, content, chat, separator) for content in contents]
        more = {"chat": chat, "separator": separator, "eos": sorted(lm.eos_ids(Options()))}
        records = self._records("prompts", path, exits=self.exits, max_new_tokens=budget, **more)
        written = Records(records.file.parent, "continuations")
        left = [i for i in range(len(given)) if i not in written.found]
        options = {"mode": "ar", "chat": False, "max_new_tokens": budget, "batch_size": batch_size}
        results = lm.each([given[i] for i in left], indices=left, **options)
        for number, (i, one) in enumerate(zip(left, results, strict=True), len(given) - len(left) + 1):
            written.keep(
                {"index": i, "tokens": one.tokens, "text": one.text, "finish_reason": one.finish_reason}
            )
            self.watch("continuing prompts", number, len(given))
        texts = []
        for i, tokens in enumerate(given):
            whole = [*tokens, *written.found[i]["tokens"]]
            last = len(tokens) - 1
            texts.append(Text(whole, {"prompts": range(last), "continuations": range(last, len(whole) - 1)}))
        return self._judged(texts, records, ("prompts", "continuations"))

    def likelihood(
        self,
        items: Sequence[LikelihoodLine],
        path: Path | None,
        exit_layer: int | None,
        chat: bool,
        separator: str,
    ) -> dict[str, Any]:
        """Score responses or choices at an exit and with all layers."""
        from layerskip.measure.tasks.likelihood import pairs_of, scored, summary

        exits = [self._exit_layer(exit_layer), self.lm.stack.num_layers]
        pairs = [pairs_of(self.lm, item, separator, chat) for item in items]
        records = self._records(LIKELIHOOD, path, exits=exits, chat=chat, separator=separator)
        left = [i for i in range(len(items)) if i not in records.found]
        advance = self._advance("scoring", [sum(n for _, n in of_item) for of_item in pairs], left)
        found = scored(self.lm.stack, [items[i] for i in left], [pairs[i] for i in left], exits, advance)
        for i, record in zip(left, found, strict=True):
            records.keep({"index": i, **record})
        kept = [records.found[i] for i in range(len(items))]
        modes = {"ar": summary(kept, exits[1]), "early-exit": summary(kept, exits[0])}
        return {"items": len(items), "modes": modes}

    def task(
        self,
        name: str,
        items: Sequence[Any],
        path: Path | None,
        modes: Sequence[str],
        drafting: dict[str, Any],
        more: dict[str, Any],
    ) -> dict[str, Any]:
        """Do a generation task in several modes."""
        from layerskip.decode.options import Options
        from layerskip.measure.tasks import generation as tasks

        lm = self.lm
        more["chat"] = tasks.wrapped(lm, name) if more["chat"] is None else more["chat"]
        plan = lm.plan(Options(mode="self-speculative", **drafting))
        options = {**drafting, "exit_layer": plan.exit_layer, "draft_length": plan.draft_length}
        options |= {key: value for key, value in more.items() if key != "batch_size"}
        options |= {"policy": lm.facts.policy, "confidence": lm.facts.confidence}
        ranked = json.dumps([lm.ranked_vocabulary, lm.facts.draft_vocab_size])
        options |= {"ranked": hashlib.sha256(ranked.encode()).hexdigest()[:16], "eos": tasks.ends(lm)}
        records = self._records(name, path, **options)
        more |= {"watch": self.watch, "done": records.found, "keep": records.keep}
        chosen = {"exit_layer": plan.exit_layer, "draft_length": plan.draft_length}
        return {**chosen, **tasks.run(lm, name, items, modes, **drafting, **more)}

    def _exit_layer(self, given: int | None) -> int:
        from layerskip.measure.exits.states import check_exits

        layers = self.lm.stack.num_layers
        chosen = next(k for k in (given, self.lm.facts.exit_layer, max(1, layers // 4)) if k is not None)
        check_exits([chosen], layers)
        return chosen

    def _judged(
        self, texts: Sequence[Any], records: Records, sources: Sequence[str]
    ) -> dict[str, list[dict[str, Any]]]:
        from layerskip.measure.exits.evaluation import judged, rows

        assert self.exits is not None
        left = [i for i in range(len(texts)) if i not in records.found]
        advance = self._advance("judging, tokens", [max(1, len(text.tokens) - 1) for text in texts], left)
        for i, sums in zip(
            left, judged(self.lm.stack, [texts[i] for i in left], self.exits, advance), strict=True
        ):
            records.keep({"index": i, **sums})
        kept: list[Record] = [records.found[i] for i in range(len(texts))]
        return {source: rows(kept, source) for source in sources}

    def _advance(self, what: str, sizes: Sequence[int], left: Sequence[int]) -> Callable[[int], None]:
        """Say how much of all work is done as parts of it are; what an earlier run did counts."""
        total = sum(sizes)
        done = total - sum(sizes[i] for i in left)

        def advance(part: int) -> None:
            nonlocal done
            done += part
            self.watch(what, done, total)

        advance(0)
        return advance

    def _records(self, name: str, path: Path | None, **options: Any) -> Records:
        """Open the records of this model, this file and these options."""
        from layerskip.checkpoint.facts import fingerprint
        from layerskip.measure.environment import environment
        from layerskip.measure.records import Records, work_folder

        assert path is not None
        lm, facts = self.lm, environment()
        setup = {
            "weights": fingerprint(lm.path),
            "tokenizer": fingerprint(lm.path, "tokenizer*", "*.jinja", "vocab.json", "merges.txt"),
            "data": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
            **options,
            "dtype": str(lm.stack.dtype).removeprefix("torch."),
            "device": lm.stack.device.type,
            "stack": lm.stack.name,
            "quantize": self.quantize,
            "versions": {package: facts[package] for package in ("layerskip", "torch", "transformers")},
        }
        records = Records(work_folder(self.work, name, setup))
        self.files.append(records.file)
        if records.found:
            err.print(Text(f"{len(records.found)} results of an earlier run found", style="dim"))
        return records
