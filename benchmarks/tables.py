"""Write the tables of README.md and docs from committed result files, and those of options from the code.

python benchmarks/tables.py           # prints them
python benchmarks/tables.py --write   # puts them between their markers
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).parent
TASKS = {
    "humaneval": "code (HumanEval)", "gsm8k": "maths questions (GSM8K)", "cnn-dm": "news summaries (CNN/DM)",
    "chat": "chat",
}  # fmt: skip


# Files up to then call smollm2-135m what is smollm2-135m-base now; those of builtin* do not.
UNTRAINED = "2026-11-24"


def newest(pattern: str) -> Path | None:
    """The latest result file of a kind; names end in their date."""
    return max(HERE.glob(f"results/{pattern}"), key=lambda path: path.name[-15:], default=None)


def overhead() -> str:
    path = newest("overhead_*.json")
    report = json.loads(path.read_text())
    configuration = report["configuration"]
    names = {
        ("plain", "ours / hf"): "plain decoding, ours over Hugging Face `generate`",
        ("acceptance 100%", "ours self-speculative / ours"): "self-speculation over our own plain decoding",
        (
            "acceptance 100%",
            "hf assistant_early_exit / hf",
        ): "the same in Hugging Face, over its plain decoding",
        ("acceptance 100%", "ours self-speculative / hf assistant_early_exit"): "ours over Hugging Face's "
        "`assistant_early_exit`",
    }
    lines = _head("speed ratio", "median", "95% interval")
    for (part, key), name in names.items():
        figures = report[part]["speedup"][key]
        low, high = figures["ci95"]
        lines.append(_line(name, f"{figures['median']:.2f} x", f"{low:.2f} - {high:.2f}"))
    exit_layer, draft_length = configuration["exit_layer"], configuration["draft_length"]
    lines += [
        "",
        f"{_model(path, configuration)}, float32, {configuration['threads']} threads of an {configuration['cpu']}, "
        f"{configuration['limit']} prompts, {configuration['max_new_tokens']} new tokens, all outputs equal. "
        f"Self-speculation with E = {exit_layer}, K = {draft_length} and acceptance made 100% by zeroing the "
        f"output projections above E: this measures overhead, not quality; the cost model's limit is "
        f"{report['limit']:.2f} x ([{path.name}](benchmarks/results/{path.name})).",
    ]
    return "\n".join(lines)


def demo() -> str:
    """The transcript with one prompt of the four, and the figures of all."""
    text = (HERE / "results" / "demo.txt").read_text().rstrip()
    prompts = {part.split("]")[0]: part for part in re.split(r"^\[(?=\w+\]$)", text, flags=re.M)[1:]}
    words = textwrap.wrap(prompts["maths"].split("]\n", 1)[1], 100)
    figures = [line.rstrip() for line in text[text.index("\nequality:") + 1 :].splitlines()]
    lines = ["...", "[maths]", *words, "...", *figures]
    assert not any(line.startswith("```") for line in lines), "a fence in the transcript would end its own"
    return "\n".join(["```text", "$ make demo", *lines, "```"])


KINDS = {
    "chat": "chat",
    "qa": "short questions",
    "summaries": "news summaries",
    "translation": "translation",
    "retrieval": "answers from given passages",
    "maths": "maths questions",
    "gsm8k": "maths questions (GSM8K)",
    "humaneval": "code (HumanEval)",
}


def gain() -> str:
    """A row per kind of text for the first page: what the default gains, without and with a trained exit."""
    base, model = (
        json.loads(newest(f"sources_{name}_*.json").read_text())
        for name in ("smollm2-135m-base", "smollm2-135m")
    )
    told = model["configuration"]
    lines = _head(
        "text", "nothing trained: copies", "tokens per round", "trained exit, and copies", "tokens per round"
    )
    for kind, name in KINDS.items():
        cells = []
        for result in (base, model):
            own = result["kinds"][kind]["default"]
            cells += [_interval(own["speedup"]), f"{own['tokens_per_round']:.2f}"]
        lines.append(_line(name, *cells))
    outputs = [own["default"] for result in (base, model) for own in result["kinds"].values()]
    equal, of = (sum(own[key] for own in outputs) for key in ("equal", "prompts"))
    lines += [
        _line(
            "mean", *(cell for result in (base, model) for cell in (_interval(result["mean"]["default"]), ""))
        ),
        "",
        f"Speed-up of the default over our own plain decoding of the same model: `smollm2-135m-base`, and "
        f"`smollm2-135m` with its trained exit. {equal} of {of} outputs are those of plain decoding, token for "
        f"token. Greedy, up to {told['max_new_tokens']} tokens, {told['dtype']}, {told['threads']} threads of an "
        f"{told['device_name']}; brackets are 95% intervals over prompts.",
    ]
    return "\n".join(lines)


def price() -> str:
    """What it costs, for the first page: the model's quality, where nothing is gained, what one task brings."""
    cost, topv2 = (json.loads(newest(f"{kind}_*.json").read_text()) for kind in ("builtin-cost", "topv2"))
    result = json.loads(newest("builtin_*.json").read_text())
    text, tasks = cost["perplexity"], cost["tasks"]
    most = max(
        (row for row in topv2["methods"].values() if "speedup" in row),
        key=lambda row: row["speedup"]["median"],
    )
    lost, scores = topv2["exact_match_difference"], topv2["methods"]
    kinds = json.loads(newest("sources_smollm2-135m_*.json").read_text())["kinds"]
    exits = {kind: own["exit"]["speedup"] for kind, own in kinds.items()}
    least, most_of = min(exits, key=lambda x: exits[x]["ratio"]), max(exits, key=lambda x: exits[x]["ratio"])
    return "\n".join(
        [
            f"- **Quality.** Training changes the model. The perplexity of the built-in model on WikiText-2 is "
            f"{text['model']['all_layers']:.2f}; that of its base is {text['base']['all_layers']:.2f} "
            f"({_away(text['relative_difference'], '%')}). Of {tasks['humaneval']['items']} items each it solves "
            f"{_changed(tasks['humaneval'])} of HumanEval and {_changed(tasks['gsm8k'])} of GSM8K; a model this "
            "small is near zero on both, so they show little.",
            "- **Not every text gains.** Copies gain where text repeats its prompt or itself; a small model "
            "repeats itself often, a larger one less. The trained exit alone gives "
            f"{_interval(exits[most_of])} on {KINDS[most_of]} and {_interval(exits[least])} on {KINDS[least]}. "
            f"Exits that were never trained lose: {_ratio(result['mean']['base']['speedup'])}.",
            f"- **One task gains more and costs more.** SmolLM2-135M trained on TOPv2 only reaches "
            f"{_ratio(most['speedup'])}. Exact match is {_share(scores['full']['exact_match'])} instead of "
            f"the {_share(scores['baseline']['exact_match'])} of the same training without exits "
            f"({100 * lost['mean']:+.1f} points [{100 * lost['ci95'][0]:+.1f}, {100 * lost['ci95'][1]:+.1f}]).",
        ]
    )


def _changed(task: dict) -> str:
    """A score of the model, that of its base and the difference."""
    now, before = (_share(task[who]["score"]) for who in ("model", "base"))
    return f"{now} (its base {before}, {_away(task.get('difference'), ' points')})"


def lossless() -> str:
    """A row per model, dtype and stack: outputs equal to plain decoding, and how near the ties were."""
    lines = [
        _line("setting", "equal outputs", "Hugging Face's plain decoding", "largest gap"),
        "| --- " * 4 + "|",
    ]
    for path in _newest_of_each("lossless_*.json"):
        report = json.loads(path.read_text())
        told, cells = report["configuration"], report["cells"]
        stack = "native stack" if "native" in path.name else "Hugging Face's modules"
        words = (told["dtype"], told.get("quantize"), stack, told.get("draft_vocab") and "draft vocabulary")
        setting = ", ".join(filter(None, words))
        own = [cell for cell in cells if cell["name"].startswith("self-speculative")]
        equal = "; ".join(f"{c['name'].split(' ', 1)[1]}: {c['equal']} of {c['of']}" for c in own)
        theirs = [f"{c['equal']} of {c['of']}" for c in cells if c["name"].startswith("Hugging Face")]
        gaps = [place["gap"] for cell in cells for place in cell["divergences"]]
        largest = f"{max(gaps):.3g}" if gaps else ""
        lines.append(_line(f"[{setting}](benchmarks/results/{path.name})", equal, "".join(theirs), largest))
    tokens = cells[0]["tokens"]
    return "\n".join([*lines, "", f"SmolLM2-135M without trained exits, greedy, {tokens} tokens a prompt."])


def bench() -> str:
    """A row per result file, equality before speed: the newest of each model, dtype, weights and device."""
    newest_of = _newest_of_each("bench_*.json")
    if not newest_of:
        return "(no result file yet)"
    heads = (
        "setting", "outputs equal to plain", "plain over Hugging Face", "self-speculation over plain",
        "acceptance", "predicted", "plain step over its products", "of the roofline",
    )  # fmt: skip
    lines = _head(*heads)
    machines = set()
    for path in newest_of:
        report = json.loads(path.read_text())
        told = report["configuration"]
        threads = f", {report['card']['threads']} threads" if told["device"] == "cpu" else ""
        machines.add(told["device_name"] + threads)
        lines.append(_line(*_bench_cells(path, report)))
    note = (
        "Hugging Face is its greedy `generate` in float32. Where acceptance is simulated, every pass is computed "
        "and the verdict on each draft is drawn at random: no output is real, so none is compared. "
        "Predicted: by the cost model, from step times of the same run. Medians with 95% intervals; the methods "
        f"take turns. {'; '.join(sorted(machines))}. Each row links to its result file."
    )
    return "\n".join([*lines, "", note])


def _bench_cells(path: Path, report: dict) -> list[str]:
    told, methods, speedup = report["configuration"], report["methods"], report["speedup"]
    own, plain = methods.get("self-speculative"), methods["ar"]
    setting = ", ".join(filter(None, (_model(path, told), told["dtype"], told["quantize"], told["device"])))
    if own is not None:
        vocab = "" if own["draft_vocab"] == "off" else f", draft vocabulary {own['draft_vocab']}"
        setting += f", E {own['exit_layer']}, K {own['draft_length']}{vocab}"
    equal = [
        f"{name} {m['equal_outputs']} of {m['of']}"
        for name, m in methods.items()
        if name not in ("ar", "early-exit") and m["equal_to_ar"] is not None
    ]
    share = "" if own is None else f"{100 * own['acceptance']:.0f}%"
    if "simulated" in report:
        share += f" (simulated {100 * report['simulated']:.0f}%)"
    ratio = plain["step"]["ratio"]
    return [
        f"[{setting}](benchmarks/results/{path.name})",
        ", ".join(equal) or "not asked",
        _ratio(speedup.get("ar/hf")),
        _ratio(speedup.get("self-speculative/ar")),
        share,
        "" if report["predicted_speedup"] is None else f"{report['predicted_speedup']:.2f} x",
        "" if ratio is None else f"{ratio:.2f}",
        f"{100 * plain['roofline_share']:.0f}%",
    ]


def _ratio(figures: dict | None) -> str:
    if figures is None:
        return ""
    middle = figures["median"] if "median" in figures else figures["ratio"]
    return "{:.2f} x [{:.2f}, {:.2f}]".format(middle, *figures["ci95"])


def topv2() -> str:
    path = newest("topv2_*.json")
    result = json.loads(path.read_text())
    told = result["configuration"]
    vocabulary = result["draft_vocab"]
    drafted = "the whole head" if vocabulary == "off" else f"a draft vocabulary of {vocabulary}"
    lines = [
        *topv2_table(result),
        "",
        f"{result['items']} items of TOPv2's test file, greedy, {told['dtype']}, {told['threads']} threads of an "
        f"{told['device_name']}, {drafted}. Tokens/s include the prefill and were measured on "
        f"{result['timed_items']} of the items, one at a time. Speed-up: the median over items of the ratio to "
        "plain decoding of the same model, with its 95% interval. Predicted: by the cost model in layers, at "
        f"these tokens per round. K was chosen on {result['tuning']['items']} other items "
        f"([{path.name}](benchmarks/results/{path.name})).",
    ]
    return "\n".join(lines)


def topv2_table(result: dict) -> list[str]:
    """A row per method: equality before speed, and what the exits are worth without verification."""
    names = {"full": "all layers", "baseline": "all layers, trained without LayerSkip"}
    heads = (
        "method", "exact match", "up to spaces", "equal to all layers", "acceptance", "tokens/round", "tokens/s",
        "speed-up", "predicted",
    )  # fmt: skip
    lines = _head(*heads)
    for name, row in result["methods"].items():
        kind = name.rpartition(" ")[0]
        if kind == "self-speculative":
            title = f"self-speculation, E {row['exit_layer']}, K {row['draft_length']}"
        else:
            title = f"layers 1 to {row['exit_layer']} only" if kind else names[name]
        cells = [title, _share(row["exact_match"]), _share(row["normalised_match"])]
        cells.append(f"{row['equal']} of {result['items']}" if "equal" in row else "")
        cells.append(_share(row.get("acceptance")))
        per_round = row.get("tokens_per_round")
        cells.append("" if per_round is None else f"{per_round:.2f}")
        cells += [f"{row['tokens_per_s']:.1f}", _ratio(row.get("speedup"))]
        cells.append(f"{row['predicted_speedup']:.2f} x" if "predicted_speedup" in row else "")
        lines.append(_line(*cells))
    if (found := result.get("exact_match_difference")) is not None:
        low, high = (100 * end for end in found["ci95"])
        lines += [
            "",
            f"Exact match, LayerSkip less baseline: {100 * found['mean']:+.1f} points, 95% interval "
            f"[{low:+.1f}, {high:+.1f}], paired by item.",
        ]
    return lines


def tuning() -> str:
    """A row per model: what was predicted and what was measured, on other prompts."""
    from layerskip.measure.advice.cells import worded

    heads = ("model", "choice", "predicted", "measured", "over the best of a 4 x 4 grid", "outputs equal")
    lines = _head(*heads)
    told = {}
    for path in _newest_of_each("tuning_*.json"):
        result = json.loads(path.read_text())
        told, compared = result["configuration"], result["tuned_against_best"]
        for name, row in (("doctor", result["doctor_choice"]), ("tune", result["tuner_choice"])):
            copies = {
                "drafter": "exit",
                "match_min": None,
                "copy_length": None,
            }  # files before there were any
            setting = f"{name}: {worded({**copies, **row}).removeprefix('exit, ')}"
            setting += "" if row["policy"] == "fixed" else f", {row['policy']}"
            cells = [f"[{_model(path, told)}](benchmarks/results/{path.name})", setting]
            cells += [f"{row['predicted_speedup']:.2f} x", _ratio(row["speedup"])]
            cells += [_ratio(compared["ratio"]) if name == "tune" else "", f"{row['equal']} of {row['of']}"]
            lines.append(_line(*cells))
    note = (
        "`doctor` and `tune` chose on one set of prompts; the speed-up was measured on another. It is the "
        "seconds of plain decoding over those of self-speculation, summed over prompts, with a 95% interval "
        "over prompts; both stop at the end of sequence and take turns. The best cell of the grid was picked "
        f"by the numbers it is compared with, which favours it. {told['dtype']}, {told['threads']} threads of an "
        f"{told['device_name']}."
    )
    return "\n".join([*lines, "", note])


def policies() -> str:
    """A row per model and policy, over plain decoding and over the best fixed (E, K) of a grid."""
    heads = ("model", "policy", "over plain decoding", "over the best fixed E and K")
    lines = _head(*heads)
    told = {}
    for path in _newest_of_each("policies_*.json"):
        result = json.loads(path.read_text())
        told, best = result["configuration"], result["best_fixed"]
        for name, row in result["methods"].items():
            if name == "ar":
                continue
            own = name.startswith("fixed ")
            title = (
                f"fixed, E {best['exit_layer']}, K {best['draft_length']}, best of the grid" if own else name
            )
            cells = [
                f"[{_model(path, told)}](benchmarks/results/{path.name})",
                title,
                _ratio(row["over_plain"]),
            ]
            lines.append(_line(*cells, "" if own else _ratio(row["over_best_fixed"])))
    note = (
        f"{told['max_new_tokens']} tokens a prompt; all outputs equal those of plain decoding. Fresh: the policy "
        "starts every prompt without what it learned; otherwise that is kept from prompt to prompt. Medians "
        f"with 95% intervals; the methods take turns. {told['dtype']}, {told['threads']} threads of an "
        f"{told['device_name']}."
    )
    return "\n".join([*lines, "", note])


SOURCES = {"default": "default", "lookup": "lookup alone", "exit": "exit alone"}


def sources() -> str:
    """What each source gains by kind of text, a table per model."""
    parts = []
    for path in _newest_of_each("sources_*.json"):
        result = json.loads(path.read_text())
        told = result["configuration"]
        names = [name for name in SOURCES if name in result["mean"]]
        lines = _head(
            "kind of text", *(cell for name in names for cell in (SOURCES[name], "tokens per round"))
        )
        for kind, by_name in result["kinds"].items():
            cells = []
            for name in names:
                one = by_name[name]
                cells += [_interval(one["speedup"]), f"{one['tokens_per_round']:.2f}"]
            lines.append(_line(kind, *cells))
        lines.append(
            _line("mean", *(cell for name in names for cell in (_interval(result["mean"][name]), "")))
        )
        prompts = next(iter(result["kinds"].values()))["default"]["prompts"]
        lines += [
            "",
            f"`{told['model']}`, speed-up over our own plain decoding, {prompts} prompts a kind, up to "
            f"{told['max_new_tokens']} tokens, greedy, {told['dtype']}, {told['threads']} threads of an "
            f"{told['device_name']}; brackets are 95% intervals over prompts. All outputs are those of plain "
            f"decoding ([{path.name}](benchmarks/results/{path.name})).",
            "",
        ]
        parts.append("\n".join(lines).rstrip())
    return "\n\n".join(parts)


def _interval(ratio: dict) -> str:
    low, high = ratio["ci95"]
    return f"{ratio['ratio']:.2f} x [{low:.2f}, {high:.2f}]"


def builtin() -> str:
    """The built-in model and its base, task by task, and what training cost."""
    path = newest("builtin_*.json")
    result = json.loads(path.read_text())
    told, drafting = result["configuration"], result["drafting"]
    note = (
        f"Greedy, up to {told['max_new_tokens']} new tokens, stopped at the end of sequence; the methods take "
        f"turns on every prompt. Both models draft with E {drafting['exit_layer']}, K "
        f"{drafting['draft_length']}, draft vocabulary {drafting['draft_vocab']}, policy {drafting['policy']} "
        "and the guard. Speed-up: seconds of plain decoding of the same model over seconds of "
        "self-speculation, counted from the first token, summed over the prompts of a task, with a 95% "
        "interval over prompts. With the prompt: the same, counted from the call. Exit alone: how often "
        "layers 1 to E predict the token of plain decoding, read by the model's head (as Hugging Face does). "
        f"By draft head: the same, read by the draft head, which was trained for this exit. {told['dtype']}, "
        f"{told['threads']} threads of an {told['device_name']} ([{path.name}](benchmarks/results/{path.name}))."
    )
    lines = [*builtin_table(result), "", note]
    if (path := newest("builtin-cost_*.json")) is not None:
        cost = json.loads(path.read_text())
        told = cost["configuration"]
        note = (
            "All layers, greedy. Differences are paired by window and by item, with 95% intervals. Perplexity "
            f"is per token, in windows of 1,024 tokens. {told['dtype']} "
            f"([{path.name}](benchmarks/results/{path.name}))."
        )
        lines += ["", *builtin_cost_table(cost), "", note]
    return "\n".join(lines)


def builtin_table(result: dict) -> list[str]:
    """A row per task and model, their means, and Hugging Face's where it was asked for."""
    names = {"model": "trained exits", "base": "base"}
    heads = (
        "task", "model", "outputs equal to plain", "acceptance", "tokens/round", "exit alone",
        "by draft head", "speed-up", "with the prompt",
    )  # fmt: skip
    lines = _head(*heads)
    for task, models in result["tasks"].items():
        for who, found in models.items():
            row, alone = found["methods"]["self-speculative"], found["exit"]
            per_round = row["tokens_per_round"]
            cells = [task, names[who], f"{row['equal']} of {row['prompts']}", _share(row["acceptance"])]
            cells += ["" if per_round is None else f"{per_round:.2f}", _share(alone["agreement"])]
            cells += [_share(alone["agreement_draft_vocab"])]
            lines.append(_line(*cells, _ratio(row["speedup"]), _ratio(row["speedup_with_prompt"])))
    for who, mean in result["mean"].items():
        ratios = (_ratio(mean[key]) for key in ("speedup", "speedup_with_prompt"))
        if result["mean_of"]:
            lines.append(_line(f"mean of {len(result['mean_of'])}", names[who], *[""] * 5, *ratios))
    theirs = {task: told["model"]["methods"] for task, told in result["tasks"].items()}
    if any("hf" in methods for methods in theirs.values()):
        heads = (
            "Hugging Face, trained exits", "prompts", "plain, equal to ours", "over our plain",
            "`assistant_early_exit`, equal to ours", "over its plain",
        )  # fmt: skip
        lines += ["", *_head(*heads)]
        for task, methods in theirs.items():
            plain, early = methods["hf"], methods["hf-early-exit"]
            equal = [f"{row['equal']} of {row['prompts']}" for row in (plain, early)]
            cells = [task, str(plain["prompts"]), equal[0], _ratio(plain["speedup"]), equal[1]]
            lines.append(_line(*cells, _ratio(early["speedup"])))
    return lines


def builtin_cost_table(result: dict) -> list[str]:
    """What training the exits cost the full model: a row for the text, a row per task."""
    lines = _head("all layers", "trained exits", "base", "difference")
    text, away = result["perplexity"], result["perplexity"].get("relative_difference")
    cells = [f"{text[who]['all_layers']:.2f}" if who in text else "" for who in ("model", "base")]
    title = f"WikiText-2 perplexity, {text['model']['tokens']:,} tokens"
    lines.append(_line(title, *cells, _away(away, "%")))
    for name, task in result["tasks"].items():
        title = {"humaneval": "HumanEval", "gsm8k": "GSM8K"}[name]
        cells = [_share(task[who]["score"]) if who in task else "" for who in ("model", "base")]
        title = f"{title} {task['metric'].replace('_', ' ')}, {task['items']} items"
        lines.append(_line(title, *cells, _away(task.get("difference"), " points")))
    return lines


def _away(found: dict | None, unit: str) -> str:
    if found is None:
        return ""
    low, high = (100 * end for end in found["ci95"])
    return f"{100 * found['mean']:+.1f}{unit} [{low:+.1f}, {high:+.1f}]"


PYTHON = {
    "chat": "messages only",
    "threads": "torch's own number",
}  # defaults in which the command line differs


def options() -> str:
    from layerskip.decode.options import DraftOptions, SamplingOptions

    return _options(DraftOptions, SamplingOptions)


def loading() -> str:
    from layerskip.decode.options import LoadOptions

    return _options(LoadOptions)


def _options(*kinds: type) -> str:
    """A row per option, as Python has it."""
    from layerskip.option import options_of

    lines = _head("option", "default", "")
    for kind in kinds:
        for name, (_, default, told) in options_of(kind).items():
            meant = PYTHON.get(name, told.shown)
            shown = f"`{default!r}`" if meant is None or default is not None else f"`None`: {meant}"
            lines.append(_line(f"`{name}`", shown, told.help.replace("|", "\\|")))
    return "\n".join(lines)


def _model(path: Path, told: dict) -> str:
    """What a file's model is called now."""
    early = told["model"] == "smollm2-135m" and path.stem[-10:] <= UNTRAINED
    return "smollm2-135m-base" if early else str(told["model"])


def _head(*cells: str) -> list[str]:
    return [_line(*cells), "| --- " * len(cells) + "|"]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _newest_of_each(pattern: str) -> list[Path]:
    """The latest result file of each model, dtype and device."""
    found = sorted((HERE / "results").glob(pattern), key=lambda path: path.name[-15:])
    return sorted({path.name[:-15]: path for path in found}.values())


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


PAGES = {
    "README.md": {"table: gain": gain, "list: price": price, "transcript: demo": demo},
    "docs/drafting.md": {"table: sources": sources},
    "docs/usage.md": {"table: options": options, "table: loading": loading},
    "docs/results.md": {
        "table: builtin": builtin,
        "table: topv2": topv2,
        "table: tuning": tuning,
        "table: policies": policies,
        "table: lossless": lossless,
        "table: bench": bench,
        "table: overhead": overhead,
    },
}


def filled(page: str) -> str:
    """The page with every marked block made anew, links as they are from its folder."""
    text = (HERE.parent / page).read_text()
    for marker, make in PAGES[page].items():
        pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- end -->)", re.S)
        assert pattern.search(text), f"{page} has no <!-- {marker} --> with <!-- end --> below it"
        made = make().replace("](", "](" + "../" * page.count("/"))
        text = pattern.sub(lambda match, made=made: f"{match[1]}\n{made}\n\n{match[2]}", text)
    return text


if __name__ == "__main__":
    for page, blocks in PAGES.items():
        if "--write" in sys.argv:
            (HERE.parent / page).write_text(filled(page))
        else:
            print("\n\n".join(make() for make in blocks.values()))
