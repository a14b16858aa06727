"""Write the tables and transcripts of README.md from committed result files.

python benchmarks/tables.py           # prints them
python benchmarks/tables.py --write   # puts them between their markers in README.md
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def newest(pattern: str) -> Path | None:
    """The latest result file of a kind; names end in their date."""
    return max(HERE.glob(f"results/{pattern}"), key=lambda path: path.name[-15:], default=None)


def overhead() -> str:
    path = newest("overhead_*.json")
    if path is None:
        return "(no result file yet)"
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
    lines = ["| speed ratio | median | 95% interval |", "| --- | --- | --- |"]
    for (part, key), name in names.items():
        figures = report[part]["speedup"][key]
        low, high = figures["ci95"]
        lines.append(f"| {name} | {figures['median']:.2f} x | {low:.2f} - {high:.2f} |")
    exit_layer, draft_length = configuration["exit_layer"], configuration["draft_length"]
    lines += [
        "",
        f"{configuration['model']}, float32, {configuration['threads']} threads of an {configuration['cpu']}, "
        f"{configuration['limit']} prompts, {configuration['max_new_tokens']} new tokens, all outputs equal. "
        f"Self-speculation with E = {exit_layer}, K = {draft_length} and acceptance made 100% by zeroing the "
        f"output projections above E: this measures overhead, not quality; the cost model's limit is "
        f"{report['limit']:.2f} x ([{path.name}](benchmarks/results/{path.name})).",
    ]
    return "\n".join(lines)


def demo() -> str:
    path = HERE / "results" / "demo.txt"
    return f"```\n$ make demo\n{path.read_text().rstrip()}\n```" if path.exists() else "(no transcript yet)"


def bench() -> str:
    """Equality, then a line per method and result file: the newest of each model, dtype, weights and device."""
    newest_of: dict[str, Path] = {}
    for path in sorted((HERE / "results").glob("bench_*.json"), key=lambda path: path.name[-15:]):
        newest_of[path.name[:-15]] = path
    if not newest_of:
        return "(no result file yet)"
    equality, notes = [], []
    lines = [
        "| setting | method | over our plain decoding | over Hugging Face | acceptance | tokens per round |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for _, path in sorted(newest_of.items()):
        report = json.loads(path.read_text())
        told, simulated = report["configuration"], report.get("simulated")
        setting = ", ".join(filter(None, (told["model"], told["dtype"], told["quantize"], told["device"])))
        counts = [_equality(name, m) for name, m in report["methods"].items() if name != "ar"]
        equality.append(f"{setting}: {', '.join(counts)}")
        for name, figures in report["methods"].items():
            lines.append(_bench_line(setting, name, figures, report["speedup"]))
        notes.append(_bench_note(path, report, simulated))
    first = "Outputs equal to those of plain decoding: " + "; ".join(equality) + "."
    return "\n".join([first, "", *lines, "", *notes]).rstrip()


def _equality(name: str, figures: dict) -> str:
    if figures["equal_to_ar"] is None:
        return f"{name} not asked, acceptance simulated at {figures['simulated']}"
    by_design = " (other output by design)" if name == "early-exit" else ""
    return f"{name} {figures['equal_outputs']} of {figures['of']}{by_design}"


def _bench_line(setting: str, name: str, figures: dict, speedup: dict) -> str:
    ratios = [speedup.get(f"{name}/{other}") for other in ("ar", "hf")]
    speed = ["" if r is None else "{:.2f} x [{:.2f}, {:.2f}]".format(r["median"], *r["ci95"]) for r in ratios]
    accepted = "" if figures["acceptance"] is None else f"{100 * figures['acceptance']:.0f}%"
    label = f"{name} (simulated)" if "simulated" in figures else name
    cells = (setting, label, *speed, accepted, f"{figures['tokens_per_round']:.2f}")
    return "| " + " | ".join(cells) + " |"


def _bench_note(path: Path, report: dict, simulated: float | None) -> str:
    told, own = report["configuration"], report["methods"].get("self-speculative")
    how = ""
    if own is not None:
        how = (
            f"E = {own['exit_layer']}, K = {own['draft_length']}, draft vocabulary {own['draft_vocab']}, the cost "
            f"model predicts {report['predicted_speedup']:.2f} x; "
        )
    hf = next((m["dtype"] for n, m in report["methods"].items() if n.startswith("hf")), None)
    how += "" if hf is None else f"Hugging Face in {hf}; "
    step = report["methods"]["ar"]["step"]
    if step["ratio"] is not None:
        how += f"a plain step costs {step['ratio']:.2f} x its matrix products alone; "
    made_up = "" if simulated is None else "acceptance is simulated, no output is real; "
    threads = f", {report['card']['threads']} threads" if told["device"] == "cpu" else ""
    return (
        f"{how}{made_up}plain decoding reaches {100 * report['methods']['ar']['roofline_share']:.0f}% of the "
        f"roofline; {told['device_name']}{threads}, {told['num_prompts']} prompts, {told['max_new_tokens']} new "
        f"tokens, {told['trials']} trials ([{path.name}](benchmarks/results/{path.name})).\n"
    )


BLOCKS = {"table: overhead": overhead, "transcript: demo": demo, "table: bench": bench}
OPTIONAL = {"table: bench"}  # while there is no result file


def filled(text: str) -> str:
    """The README with every marked block made anew."""
    for marker, make in BLOCKS.items():
        pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- end -->)", re.S)
        if marker in OPTIONAL and not pattern.search(text) and not newest("bench_*.json"):
            continue
        assert pattern.search(text), marker
        made = make()
        text = pattern.sub(lambda match, made=made: f"{match[1]}{made}\n{match[2]}", text)
    return text


if __name__ == "__main__":
    if "--write" in sys.argv:
        README.write_text(filled(README.read_text()))
    else:
        print("\n\n".join(make() for make in BLOCKS.values()))
