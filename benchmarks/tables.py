"""Write the tables of README.md and docs from committed result files, and those of options from the code.

python benchmarks/tables.py           # prints them
python benchmarks/tables.py --write   # puts them between their markers

Those of the built-in model are made in builtin_tables.py.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path

import record
from builtin_tables import builtin, gain, peers, price, sources
from cells import away, head, line, link, machine, number, ratio, share
from engine_tables import engines, harness
from reference_table import reference
from speed_tables import serving, shapes
from training_tables import scratch, search

from layerskip.train.job.curve import POINTS

HERE = Path(__file__).parent
# Files up to then call smollm2-135m what is smollm2-135m-base now.
UNTRAINED = "2026-11-24"


def overhead() -> str:
    path = record.newest("overhead_*.json")
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
    lines = head("speed ratio", "median", "95% interval")
    for (part, key), name in names.items():
        figures = report[part]["speedup"][key]
        low, high = figures["ci95"]
        lines.append(line(name, f"{figures['median']:.2f} x", f"{low:.2f} - {high:.2f}"))
    exit_layer, draft_length = configuration["exit_layer"], configuration["draft_length"]
    lines += [
        "",
        f"{_model(path, configuration)}, float32, {configuration['threads']} threads of an {configuration['cpu']}, "
        f"{configuration['limit']} prompts, {configuration['max_new_tokens']} new tokens, all outputs equal. "
        f"Self-speculation with E = {exit_layer}, K = {draft_length} and acceptance made 100% by zeroing the "
        f"output projections above E: this measures overhead, not quality; the cost model's limit is "
        f"{report['limit']:.2f} x ({link(path)}).",
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


def lossless() -> str:
    """A row per model, dtype and stack: outputs equal to plain decoding, and how near the ties were."""
    lines = head("setting", "equal outputs", "Hugging Face's plain decoding", "largest gap")
    for path in record.newest_of_each("lossless_*.json"):
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
        lines.append(line(link(path, setting), equal, "".join(theirs), largest))
    tokens = cells[0]["tokens"]
    return "\n".join([*lines, "", f"SmolLM2-135M without trained exits, greedy, {tokens} tokens a prompt."])


def bench() -> str:
    """A row per result file, equality before speed: the newest of each model, dtype, weights and device."""
    newest_of = record.newest_of_each("bench_*.json")
    if not newest_of:
        return "(no result file yet)"
    heads = (
        "setting", "outputs equal to plain", "plain over Hugging Face", "self-speculation over plain",
        "acceptance", "predicted", "plain step over its products", "of the roofline",
    )  # fmt: skip
    lines = head(*heads)
    machines = set()
    for path in newest_of:
        report = json.loads(path.read_text())
        told = report["configuration"]
        threads = f", {report['card']['threads']} threads" if told["device"] == "cpu" else ""
        machines.add(told["device_name"] + threads)
        lines.append(line(*_bench_cells(path, report)))
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
    accepted = "" if own is None else f"{100 * own['acceptance']:.0f}%"
    if "simulated" in report:
        accepted += f" (simulated {100 * report['simulated']:.0f}%)"
    return [
        link(path, setting),
        ", ".join(equal) or "not asked",
        ratio(speedup.get("ar/hf")),
        ratio(speedup.get("self-speculative/ar")),
        accepted,
        "" if report["predicted_speedup"] is None else f"{report['predicted_speedup']:.2f} x",
        number(plain["step"]["ratio"]),
        f"{100 * plain['roofline_share']:.0f}%",
    ]


def topv2() -> str:
    path = record.newest("topv2_*.json")
    result = json.loads(path.read_text())
    told = result["configuration"]
    vocabulary = result["draft_vocab"]
    drafted = "the whole head" if vocabulary == "off" else f"a draft vocabulary of {vocabulary}"
    lines = [
        *topv2_table(result),
        "",
        f"{result['items']} items of TOPv2's test file, greedy, {machine(told)}, "
        f"{drafted}. Tokens/s include the prefill and were measured on "
        f"{result['timed_items']} of the items, one at a time. Speed-up: the median over items of the ratio to "
        "plain decoding of the same model, with its 95% interval. Predicted: by the cost model in layers, at "
        f"these tokens per round. K was chosen on {result['tuning']['items']} other items "
        f"({link(path)}).",
    ]
    return "\n".join(lines)


def topv2_table(result: dict) -> list[str]:
    """A row per method: equality before speed, and what the exits are worth without verification."""
    names = {"full": "all layers", "baseline": "all layers, trained without LayerSkip"}
    heads = (
        "method", "exact match", "up to spaces", "equal to all layers", "acceptance", "tokens/round", "tokens/s",
        "speed-up", "predicted",
    )  # fmt: skip
    lines = head(*heads)
    for name, row in result["methods"].items():
        kind = name.rpartition(" ")[0]
        if kind == "self-speculative":
            title = f"self-speculation, E {row['exit_layer']}, K {row['draft_length']}"
            title += f", stopping below {row['confidence']:g}" if "confidence" in row else ""
        else:
            title = f"layers 1 to {row['exit_layer']} only" if kind else names[name]
        cells = [title, share(row["exact_match"]), share(row["normalised_match"])]
        cells.append(f"{row['equal']} of {result['items']}" if "equal" in row else "")
        cells += [share(row.get("acceptance")), number(row.get("tokens_per_round"))]
        cells += [f"{row['tokens_per_s']:.1f}", ratio(row.get("speedup"))]
        cells.append(f"{row['predicted_speedup']:.2f} x" if "predicted_speedup" in row else "")
        lines.append(line(*cells))
    if (found := result.get("exact_match_difference")) is not None:
        told = away(found, " points, 95% interval")
        lines += ["", f"Exact match, LayerSkip less baseline: {told}, paired by item."]
    return lines


def tuning() -> str:
    """A row per model: what was predicted and what was measured, on other prompts."""
    from layerskip.measure.advice.cells import worded

    heads = ("model", "choice", "predicted", "measured", "over the best of a 4 x 4 grid", "outputs equal")
    lines = head(*heads)
    told = {}
    for path in record.newest_of_each("tuning_*.json"):
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
            cells = [link(path, _model(path, told)), setting]
            cells += [f"{row['predicted_speedup']:.2f} x", ratio(row["speedup"])]
            cells += [ratio(compared["ratio"]) if name == "tune" else "", f"{row['equal']} of {row['of']}"]
            lines.append(line(*cells))
    note = (
        "`doctor` and `tune` chose on one set of prompts; the speed-up was measured on another. It is the "
        "seconds of plain decoding over those of self-speculation, summed over prompts, with a 95% interval "
        "over prompts; both stop at the end of sequence and take turns. The best cell of the grid was picked "
        f"by the numbers it is compared with, which favours it. {machine(told)}."
    )
    return "\n".join([*lines, "", note])


def policies() -> str:
    """A row per model and policy, over plain decoding and over the best fixed (E, K) of a grid."""
    heads = ("model", "policy", "over plain decoding", "over the best fixed E and K")
    lines = head(*heads)
    told = {}
    for path in record.newest_of_each("policies_*.json"):
        result = json.loads(path.read_text())
        told, best = result["configuration"], result["best_fixed"]
        for name, row in result["methods"].items():
            if name == "ar":
                continue
            own = name.startswith("fixed ")
            title = (
                f"fixed, E {best['exit_layer']}, K {best['draft_length']}, best of the grid" if own else name
            )
            cells = [link(path, _model(path, told)), title, ratio(row["over_plain"])]
            lines.append(line(*cells, "" if own else ratio(row["over_best_fixed"])))
    note = (
        f"{told['max_new_tokens']} tokens a prompt; all outputs equal those of plain decoding. Fresh: the policy "
        "starts every prompt without what it learned; otherwise that is kept from prompt to prompt. Medians "
        f"with 95% intervals; the methods take turns. {machine(told)}."
    )
    return "\n".join([*lines, "", note])


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

    lines = head("option", "default", "")
    for kind in kinds:
        for name, (_, default, told) in options_of(kind).items():
            meant = PYTHON.get(name, told.shown)
            shown = f"`{default!r}`" if meant is None or default is not None else f"`None`: {meant}"
            lines.append(line(f"`{name}`", shown, told.help.replace("|", "\\|")))
    return "\n".join(lines)


def _model(path: Path, told: dict) -> str:
    """What a file's model is called now."""
    early = told["model"] == "smollm2-135m" and path.stem[-10:] <= UNTRAINED
    return "smollm2-135m-base" if early else str(told["model"])


def formats() -> str:
    """A table for each processor that formats were measured on, and what all of them mean."""
    parts = []
    for path in sorted(record.newest_of_each("formats_*.json"), reverse=True):
        result = json.loads(path.read_text())
        told, decoded, memory = result["configuration"], result["decoding"], result["processes"]["bfloat16"]
        text = f"; perplexity of {result['text']['tokens']:,} tokens" if "text" in result else ""
        parts += [
            *formats_table(result),
            "",
            f"`{told['model']}`, {told['threads']} threads of an {told['device_name']}, {decoded['prompts']} "
            f"prompts, {decoded['new_tokens']} new tokens each{text}; {memory['imports_mb']:.0f} MB of the memory "
            f"are imports ({link(path)}).",
            "",
        ]
    about = (
        "Greedy, with the model's defaults for drafts; the formats and llama.cpp take turns. Faster: a plain step "
        "against bfloat16's. Rows: a pass over so many positions "
        "against one, in brackets what its multiplications alone take at the vector unit's peak, measured in "
        "between; weights as decoding has them, kept in the last cache where they fit, and from memory, with "
        "another model's weights read between two passes. Bandwidth: of steps from memory. llama.cpp "
        "(node-llama-cpp 3.22.1) has the Q4_1 file that the model was made of and its better number of threads. "
        "Perplexity: of WikiText-2's test text in windows of 512, against bfloat16, paired. Memory: the peak of a "
        "process that loads it and writes 128 tokens, and its share of bfloat16's. Load: after the first time, "
        "imports done. 95% intervals."
    )
    return "\n".join([*parts, about])


def formats_table(result: dict) -> list[str]:
    """A row per weight format, and llama.cpp's where it was measured."""
    decoded, text = result["decoding"], result.get("text", {})
    lines = head(
        "weights", "MB a step", "faster", "of the bandwidth", "4 rows", "9 rows", "4 from memory", "9 from memory",
        "plain decoding", "with drafts",
        "plain over llama.cpp", "with drafts", "first token", "perplexity", "drafts equal to plain",
        "memory", "load",
    )  # fmt: skip
    for name, own in result["steps"].items():
        plain, drafts = decoded[f"{name} plain"], decoded[f"{name} drafts"]
        over = [_rows(told, width) for told in (own, own.get("from_memory", {})) for width in (4, 9)]
        cost = text.get(name, {}).get("cost")
        steps = (
            f"{own['bytes'] / 1e6:.0f}",
            f"{own['faster']:.2f} x",
            f"{100 * own['bandwidth_share']:.0f}%",
        )
        ratios = (ratio(plain.get("over_full")) or "1", ratio(drafts["over_full"]))
        ratios += (ratio(plain.get("over_llama_cpp")), ratio(drafts.get("over_llama_cpp")))
        first, equal = f"{1000 * plain['first_token_s']:.0f} ms", f"{drafts['equal']} of {decoded['prompts']}"
        cells = (name, *steps, *over, *ratios, first, away(cost, "%"), equal)
        process = result["processes"][name]
        cells += (f"{process['peak_mb']:.0f} MB ({process['of_full']:.2f})", f"{process['load_s']:.2f} s")
        lines.append(line(*cells))
    if (best := decoded["best_llama_cpp"]) is not None:
        over = 1 / decoded["bfloat16 plain"]["over_llama_cpp"]["ratio"]
        first = f"{1000 * decoded[best]['first_token_s']:.0f} ms"
        lines.append(
            line(best, "", "", "", "", "", "", "", f"{over:.2f} x", "", "1", "", first, "", "", "", "")
        )
    return lines


def _rows(told: dict, width: int) -> str:
    """What so many rows take of one, and the least that multiplications allow."""
    over, least = (
        {int(w): found for w, found in told.get(key, {}).items()} for key in ("over_one", "least_over_one")
    )
    cells = [f"{over[width]:.2f}"] if over else []
    return " ".join([*cells, f"({least[width]:.2f})"] if least else cells)


def curve() -> str:
    """What the long run of the adapter had learnt along its way, the points that `layerskip plan` goes by."""
    lines = head("tokens of answers", "drafts 1, 2, 3, 4 right where those before were", "tokens per round")
    for point in json.loads(POINTS.read_text())["exit-adapter"]["points"]:
        right = ", ".join(f"{100 * one:.0f}%" for one in point["right"])
        lines.append(line(f"{point['tokens'] / 1e6:.1f} M", right, number(point["tokens_per_round"])))
    return "\n".join(lines)


PAGES = {
    "README.md": {"table: gain": gain, "list: price": price, "transcript: demo": demo},
    "docs/training.md": {"table: curve": curve},
    "docs/drafting.md": {"table: sources": sources},
    "docs/usage.md": {"table: options": options, "table: loading": loading},
    "docs/results.md": {
        "table: builtin": builtin,
        "table: peers": peers,
        "table: topv2": topv2,
        "table: reference": reference,
        "table: scratch": scratch,
        "table: search": search,
        "table: tuning": tuning,
        "table: policies": policies,
        "table: lossless": lossless,
        "table: formats": formats,
        "table: shapes": shapes,
        "table: serving": serving,
        "table: engines": engines,
        "table: harness": harness,
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
