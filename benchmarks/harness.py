"""Two tasks in lm-eval, through its own Hugging Face model and through ours, at the last layer and at an exit.

    python benchmarks/harness.py --data DATA --save       # gsm8k/test.jsonl.gz and wikitext-2/test.txt in it

Everything is float32 and greedy. `gsm8k`: questions of its test part, answers of 128 tokens at most, the last
number of an answer counts. `wikitext`: perplexity per word of pieces of running text. Ours drafts as the
model's default does; at the last layer its numbers must be lm-eval's own.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import record
import torch

import layerskip
from layerskip.decode.load import resolve_device
from layerskip.measure.results import named

HEAD = """\
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
TASKS = {
    "gsm8k": """\
task: gsm8k
output_type: generate_until
doc_to_text: "Question: {{prompt}}\\nAnswer:"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["Question:"], max_gen_toks: 128, do_sample: false}
filter_list:
  - name: last-number
    filter: [{function: regex, regex_pattern: "(-?[0-9][0-9,]*)", group_select: -1}, {function: take_first}]
metric_list: [{metric: exact_match}]
""",
    "wikitext": """\
task: wikitext
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
""",
}
PIECE = 6000  # letters of a piece of running text


def written(data: Path, limit: int, place: Path) -> None:
    """Write the lines of both tasks, and what lm-eval reads of them."""
    with gzip.open(data / "gsm8k" / "test.jsonl.gz", "rt", encoding="utf-8") as file:
        asked = [json.loads(line) for _, line in zip(range(limit), file, strict=False)]
    questions = [
        {"prompt": one["prompt"], "target": one["response"].split("####")[-1].strip()} for one in asked
    ]
    text = (data / "wikitext-2" / "test.txt").read_text(encoding="utf-8")
    pieces = [{"text": text[at : at + PIECE]} for at in range(0, limit * PIECE, PIECE)]
    for name, lines in (("gsm8k", questions), ("wikitext", pieces)):
        file = place / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        (place / f"{name}.yaml").write_text(HEAD.format(file=file) + TASKS[name], encoding="utf-8")


def evaluated(place: Path, model: str, given: str) -> tuple[dict[str, dict[str, float]], list[Any]]:
    """Numbers of each task, and the answers that were written."""
    import lm_eval
    from lm_eval import models  # noqa: F401 - names its own
    from lm_eval.tasks import TaskManager

    import layerskip.measure.tasks.harness  # noqa: F401 - names ours

    manager = TaskManager(include_path=str(place), include_defaults=False)
    told = lm_eval.simple_evaluate(
        model=model, model_args=given, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0,
        log_samples=True, device="cpu", batch_size=1,
    )  # fmt: skip
    numbers = {
        name: {
            key.split(",")[0]: value
            for key, value in found.items()
            if isinstance(value, float) and "stderr" not in key
        }
        for name, found in told["results"].items()
    }
    return numbers, [one["resps"][0][0] for one in told["samples"]["gsm8k"]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=40, help="questions, and pieces of text")
    parser.add_argument("--exit-layer", type=int, default=20, help="E that the second run of ours reads")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write a file into benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = layerskip.load(arguments.model, dtype="float32", progress=False).path
    base = f"pretrained={folder},dtype=float32"
    ways = {
        "hf": ("hf", base),
        "layerskip": ("layerskip", base),
        f"layerskip, layer {arguments.exit_layer}": (
            "layerskip",
            f"{base},likelihood_exit={arguments.exit_layer}",
        ),
    }
    rows = {}
    with tempfile.TemporaryDirectory() as place:
        os.environ["HF_DATASETS_CACHE"] = str(Path(place) / "cache")
        written(arguments.data, arguments.limit, Path(place))
        answers = {}
        for name, (model, given) in ways.items():
            numbers, answers[name] = evaluated(Path(place), model, given)
            rows[name] = {"numbers": numbers}
            rows[name]["same_answers"] = sum(
                a == b for a, b in zip(answers["hf"], answers[name], strict=True)
            )
            print(name, json.dumps(rows[name]), flush=True)
    if arguments.save:
        result = {"rows": rows, "configuration": record.configuration(arguments, resolve_device("cpu"))}
        record.save(result, "harness", named(arguments.model), "float32", "cpu")


if __name__ == "__main__":
    record.run(main)
