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


BLOCKS = {"table: overhead": overhead, "transcript: demo": demo}


def filled(text: str) -> str:
    """The README with every marked block made anew."""
    for marker, make in BLOCKS.items():
        pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- end -->)", re.S)
        assert pattern.search(text), marker
        made = make()
        text = pattern.sub(lambda match, made=made: f"{match[1]}{made}\n{match[2]}", text)
    return text


if __name__ == "__main__":
    if "--write" in sys.argv:
        README.write_text(filled(README.read_text()))
    else:
        print("\n\n".join(make() for make in BLOCKS.values()))
