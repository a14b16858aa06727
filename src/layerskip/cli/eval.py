"""The verb eval: what every exit is worth on texts and prompts, and tasks at an exit beside the full model."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from layerskip.cli.app import AsJson, Loading, Model, Save, exit_layers, verb
from layerskip.cli.options import Given, only, worded
from layerskip.cli.prompts import Separator, encoded, unescaped
from layerskip.cli.results import configuration, loaded, progress, save_result
from layerskip.cli.show.evaluation import print_evaluation
from layerskip.cli.show.terminal import note, tell
from layerskip.decode.options import DraftOptions, Options, SamplingOptions
from layerskip.errors import UserError, nearest
from layerskip.option import option
from layerskip.watch import Watch, silent

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel
    from layerskip.decode.options import Keywords
    from layerskip.measure.lines import LikelihoodLine
    from layerskip.measure.records import Record, Records

WINDOW, CONTINUATION = 1024, 128  # tokens, by default
LIKELIHOOD = "loglikelihood"
SOURCES = ("text", "continuations", "prompts")  # the first one present is what `exits` of a result tells


@dataclass(frozen=True)
class Asked:
    """What exits are judged on."""

    text: Path | None = option(None, "Plain text, also .gz.")
    prompts: Path | None = option(None, "JSON lines with prompt or messages, also .gz.")
    task: str | None = option(None, "loglikelihood, topv2, humaneval or gsm8k.")
    data: Path | None = option(None, "The task's items, JSON lines, also .gz.")
    exits: str = option("all", "Exits to judge: all, or 1,4,8; the last layer always is.")
    limit: int | None = option(None, "Use the first windows, prompts or items only.", least=1, shown="all")
    window: int | None = option(  # a token and one that follows it
        None, "Tokens of a window of text.", least=2, shown=f"{WINDOW}, or the context"
    )
    max_new_tokens: int | None = option(
        None, "Budget of a continuation.", least=1, shown=f"{CONTINUATION}; of a task, its own"
    )
    modes: str = option(
        "ar,early-exit,self-speculative",
        "How a generation task is done; of ar, early-exit, self-speculative.",
    )
    work: Path | None = option(None, "Keep results per item here.", shown="in the cache folder")


@verb
def eval(
    model: Model,
    asked: Asked,
    drafting: Annotated[
        DraftOptions,
        only("exit_layer", "draft_length", "draft_vocab"),
        worded(
            "exit_layer",
            help="E, the exit a task is done at.",
            shown="by checkpoint, or a quarter of the layers",
        ),
    ],
    reading: Annotated[
        SamplingOptions,
        only("batch_size", "chat"),
        worded("chat", help="Wrap prompts as messages.", shown="prompts, if it can"),
    ],
    loading: Loading,
    given: Given,
    separator: Separator = "",
    save: Save = False,
    as_json: AsJson = False,
) -> None:
    """Judge every exit on text, on prompts and on the model's own continuations; run again to go on after a stop.

    layerskip eval smollm2-135m --text wikitext.txt --limit 4
    """
    chosen, after = exit_layers(asked.exits), unescaped(separator)
    _check_used(given)
    wanted = _read(asked)
    modes = [name.strip() for name in asked.modes.split(",") if name.strip()]
    for name in modes or [asked.modes]:
        Options(mode=name)
    lm, load_s = loaded(model, loading)
    if lm.tokenizer is None:
        raise UserError(f"{model} has no tokenizer, so it cannot read text", "add its tokenizer.json")
    wrap = lm.has_template if reading.chat is None else reading.chat
    if asked.prompts is not None and wrap and after:
        raise UserError("--separator does nothing: this model's template wraps prompts", "add --no-chat")
    run = _Run(lm, chosen, asked, loading.quantize)
    sources: dict[str, list[dict[str, Any]]] = {}
    tasks: dict[str, Any] = {}
    try:
        with progress() as watch:
            run.watch = watch
            if asked.text is not None:
                sources |= run.text(wanted["text"], asked.text)
            if asked.prompts is not None:
                sources |= run.prompts(wanted["prompts"], asked.prompts, reading.batch_size, wrap, after)
            if asked.task == LIKELIHOOD:
                tasks[asked.task] = run.likelihood(
                    wanted["items"], drafting.exit_layer, bool(reading.chat), after
                )
            elif asked.task is not None:
                tasks[asked.task] = run.task(asked.task, wanted["items"], modes, drafting, reading)
    except KeyboardInterrupt:
        note("stopped; run the same command again to go on")
        sys.exit(130)
    result = {
        "exits": next((sources[name] for name in SOURCES if name in sources), []),
        "sources": sources,
        "tasks": tasks,
        "configuration": configuration(
            given, lm, load_s, layers=lm.stack.num_layers, own_heads=run.own_sizes
        ),
    }
    tell(result, as_json, print_evaluation)
    note(f"results per item: {', '.join(map(str, run.files))}")
    if save:
        save_result(result, "eval", *(sources or tasks))


# -- before the model is loaded ------------------------------------------------------------------------------


def _read(asked: Asked) -> dict[str, Any]:
    """Read what is asked for. Raises: UserError for a file that cannot be read."""
    from layerskip.measure.exits.evaluation import read_text
    from layerskip.measure.lines import read_likelihoods, read_prompts
    from layerskip.measure.tasks import generation as tasks

    found: dict[str, Any] = {}
    if asked.text is not None:
        found["text"] = read_text(asked.text)
    if asked.prompts is not None:
        found["prompts"] = [line.content for line in read_prompts(asked.prompts)][: asked.limit]
    if asked.data is not None:
        if asked.task == LIKELIHOOD:
            found["items"] = read_likelihoods(asked.data)[: asked.limit]
        elif asked.task is not None:
            found["items"] = tasks.read(asked.task, asked.data, asked.limit)
    return found


def _check_used(given: Given) -> None:
    """Refuse a request for nothing, and an option that nothing asked for would read. Raises: UserError."""
    from layerskip.measure.tasks.generation import NAMES

    name, known = given.values["task"], (LIKELIHOOD, *NAMES)
    text, prompts, task, data = (given.values[key] is not None for key in ("text", "prompts", "task", "data"))
    if not (text or prompts or task):
        if data:
            raise UserError("--data comes without a task", f"--task is one of {', '.join(known)}")
        raise UserError("there is nothing to judge on", "give --text, --prompts, or --task with --data")
    if task and name not in known:
        raise UserError(f"unknown task {name!r}", nearest(name, known))
    if task != data:
        missing = "--task" if data else "--data"
        raise UserError(f"{missing} is missing", "a task needs its items: --task NAME --data FILE.jsonl")
    scores = name == LIKELIHOOD
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
    for field, (used, needed) in needs.items():
        if not used and field in given.changed:
            raise UserError(f"--{field.replace('_', '-')} has nothing to do here", f"it goes with {needed}")
    if given.values["chat"] and given.values["separator"]:
        raise UserError("--separator does nothing under --chat", "a template says what follows a prompt")


# -- with the model ------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """A model to judge and where its results are kept; a method does one kind of work, or what is left of it."""

    lm: LanguageModel
    exits: list[int] | None
    asked: Asked
    quantize: str | None
    watch: Watch = silent

    def __post_init__(self) -> None:
        from layerskip.measure.exits.states import check_exits, own_heads

        layers, first = self.lm.stack.num_layers, self.lm.facts.first_exit
        self.heads = own_heads(self.lm)
        self.files: list[Path] = []
        if self.exits is None:
            self.exits = list(range(first, layers + 1))
        check_exits(self.exits, layers, first)
        self.exits = sorted({*self.exits, layers})

    @property
    def own_sizes(self) -> dict[str, int]:
        """Tokens of the heads of exits that are read by rows of their own."""
        return {str(k): head.size for k, head in self.heads.items()}

    def text(self, content: str, path: Path) -> dict[str, list[dict[str, Any]]]:
        """Judge the exits on running text, window by window."""
        from layerskip.measure.exits.evaluation import Text, windows

        context, window = self.lm.stack.context, self.asked.window
        size = min(WINDOW, context or WINDOW) if window is None else window
        if context is not None and size > context:
            raise UserError(f"window is {size}", f"the model's context is {context} tokens")
        cut = windows(self.lm.encode(content), size)[: self.asked.limit]
        if not cut:
            raise UserError(f"{path} is a single token", "there is nothing to predict in it")
        texts = [Text(tokens, {"text": range(len(tokens) - 1)}) for tokens in cut]
        records = self._records("text", path, exits=self.exits, window=size)
        return self._judged(texts, records, ("text",))

    def prompts(
        self, contents: Sequence[Any], path: Path, batch_size: int, chat: bool, separator: str
    ) -> dict[str, list[dict[str, Any]]]:
        """Judge the exits on prompts and on the model's own continuations of them."""
        from layerskip.measure.exits.evaluation import Text
        from layerskip.measure.records import Records

        lm, budget = self.lm, self.asked.max_new_tokens or CONTINUATION
        given = [encoded(lm, content, chat, separator) for content in contents]
        more = {"chat": chat, "separator": separator, "eos": sorted(lm.eos_ids(Options()))}
        records = self._records("prompts", path, exits=self.exits, max_new_tokens=budget, **more)
        written = Records(records.file.parent, "continuations")
        left = [i for i in range(len(given)) if i not in written.found]
        options: Keywords = {"mode": "ar", "chat": False, "max_new_tokens": budget, "batch_size": batch_size}
        results = lm.each([given[i] for i in left], indices=left, **options)
        for number, (i, one) in enumerate(zip(left, results, strict=True), len(given) - len(left) + 1):
            one.checked()
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
        self, items: Sequence[LikelihoodLine], exit_layer: int | None, chat: bool, separator: str
    ) -> dict[str, Any]:
        """Score responses or choices at an exit and with all layers."""
        from layerskip.measure.tasks.likelihood import pairs_of, scored, summary

        exits = [self._exit_layer(exit_layer), self.lm.stack.num_layers]
        pairs = [pairs_of(self.lm, item, separator, chat) for item in items]
        if exits[0] in self.heads:
            note(
                f"exit {exits[0]} is read by the model's head: its own draft head has not all tokens to score"
            )
        records = self._records(LIKELIHOOD, self.asked.data, exits=exits, chat=chat, separator=separator)
        left = [i for i in range(len(items)) if i not in records.found]
        advance = self._advance("scoring", [sum(n for _, n in of_item) for of_item in pairs], left)
        adapted = {k: head for k, head in self.heads.items() if head.adapts(k)}
        found = scored(
            self.lm.stack, [items[i] for i in left], [pairs[i] for i in left], exits, advance, adapted
        )
        for i, record in zip(left, found, strict=True):
            records.keep({"index": i, **record})
        kept = [records.found[i] for i in range(len(items))]
        modes = {"ar": summary(kept, exits[1]), "early-exit": summary(kept, exits[0])}
        return {"items": len(items), "modes": modes}

    def task(
        self,
        name: str,
        items: Sequence[Any],
        modes: Sequence[str],
        drafting: DraftOptions,
        reading: SamplingOptions,
    ) -> dict[str, Any]:
        """Do a generation task in several modes."""
        from layerskip.measure.tasks import generation as tasks

        lm = self.lm
        chat = tasks.wrapped(lm, name) if reading.chat is None else reading.chat
        plan = lm.plan(Options(**{**vars(drafting), "mode": "self-speculative"}))
        chosen = {"exit_layer": plan.exit_layer, "draft_length": plan.draft_length}
        ranked = json.dumps([lm.ranked_vocabulary, lm.facts.draft_vocab_size])
        records = self._records(
            name,
            self.asked.data,
            draft_vocab=drafting.draft_vocab,
            **chosen,
            max_new_tokens=self.asked.max_new_tokens,
            chat=chat,
            drafting=plan.keywords,
            ranked=hashlib.sha256(ranked.encode()).hexdigest()[:16],
            eos=tasks.ends(lm),
        )
        result = tasks.run(
            lm,
            name,
            items,
            modes,
            chat=chat,
            batch_size=reading.batch_size,
            watch=self.watch,
            done=records.found,
            keep=records.keep,
            max_new_tokens=self.asked.max_new_tokens,
            **{key: getattr(drafting, key) for key in ("exit_layer", "draft_length", "draft_vocab")},
        )
        return {**chosen, **result}

    def _exit_layer(self, given: int | None) -> int:
        from layerskip.measure.exits.states import check_exits

        layers = self.lm.stack.num_layers
        chosen = next(k for k in (given, self.lm.facts.exit_layer, max(1, layers // 4)) if k is not None)
        check_exits([chosen], layers, self.lm.facts.first_exit)
        return chosen

    def _judged(
        self, texts: Sequence[Any], records: Records, sources: Sequence[str]
    ) -> dict[str, list[dict[str, Any]]]:
        from layerskip.measure.exits.evaluation import judged, rows

        assert self.exits is not None
        left = [i for i in range(len(texts)) if i not in records.found]
        advance = self._advance("judging, tokens", [max(1, len(text.tokens) - 1) for text in texts], left)
        found = judged(self.lm.stack, [texts[i] for i in left], self.exits, advance, self.heads)
        for i, sums in zip(left, found, strict=True):
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
            **({"own_heads": self.own_sizes} if self.own_sizes else {}),
            "versions": {package: facts[package] for package in ("layerskip", "torch", "transformers")},
        }
        records = Records(work_folder(self.asked.work, name, setup))
        self.files.append(records.file)
        if records.found:
            note(f"{len(records.found)} results of an earlier run found")
        return records
