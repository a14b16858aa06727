"""Exports in the engines they are for: does it open, is the output equal, how many drafts are kept?

    python benchmarks/engines.py --model smollm2-135m-base --exit-layer 8 --work W --llama-server W/llama --save
    python benchmarks/engines.py --model ./my-model --work W --vllm VLLM_ENV/bin/python

Everything is greedy and float32 (GGUF: f32), so that outputs can be compared token by token, and told where they
part. Ours is measured with the same drafts: exit E with K tokens each round. W keeps the exports. `--llama-server`
names a folder where llama.cpp's server is installed by name; `--vllm` the Python of an environment with vLLM
(`bash benchmarks/peers/environments.sh FOLDER` makes FOLDER/vllm/bin/python).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import record
import torch

from layerskip.decode.load import load, resolve_device
from layerskip.decode.options import Options
from layerskip.errors import UserError
from layerskip.export.targets import Source, Wanted, export
from layerskip.measure import prompt_file
from layerskip.measure.lines import read_prompts
from layerskip.measure.results import named

PEERS = Path(__file__).parent / "peers"
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, help="a model whose exit has the shared head or rows of its own"
    )
    parser.add_argument("--exit-layer", type=int, help="E; default: the checkpoint's")
    parser.add_argument("--draft-length", type=int, default=4, help="K of every round")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--limit", type=int, default=6, help="prompts")
    parser.add_argument("--work", type=Path, required=True, help="folder for the exports")
    parser.add_argument("--llama-server", type=Path, help="folder for llama.cpp's server")
    parser.add_argument("--vllm", type=Path, help="Python of an environment with vLLM")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write a file into benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    lm = load(arguments.model, dtype="float32", progress=False)
    assert lm.path is not None
    lines = [line.content for line in read_prompts(prompt_file())][: arguments.limit]
    prompts = [lm.encode(line, chat=lm.has_template) for line in lines]
    exit_layer = arguments.exit_layer or lm.facts.exit_layer
    if exit_layer is None:
        raise UserError(f"{arguments.model} names no exit", "give --exit-layer E")
    how = {"max_new_tokens": arguments.max_new_tokens, "eos_token_id": (), "policy": "fixed", "guard": False}
    ends = lm.eos_ids(Options())
    plain = [lm.generate(ids, mode="ar", **how).tokens for ids in prompts]
    drafts = {"exit_layer": exit_layer, "draft_length": arguments.draft_length, "drafter": "exit"}
    if not lm.facts.owns_head(exit_layer):
        drafts["draft_vocab"] = "off"
    ours = [lm.generate(ids, mode="self-speculative", **drafts, **how) for ids in prompts]
    drafted = sum(len(round.draft) for one in ours for round in one.rounds)
    accepted = sum(round.accepted for one in ours for round in one.rounds)
    rows: list[Row] = [
        {
            "artefact": "the checkpoint", "engine": "layerskip", "acceptance": accepted / drafted,
            "equal": _equal(plain, [one.tokens for one in ours]),
            "command": f"layerskip generate --exit-layer {exit_layer} --draft-length {arguments.draft_length}",
        }
    ]  # fmt: skip
    print(json.dumps(rows[0]), flush=True)

    source, exit_ = Source(lm.path, arguments.model), arguments.exit_layer
    wanted = {"vllm": Wanted(exit_), "gguf": Wanted(exit_, "f32"), "custom-generate": Wanted()}
    made = {name: arguments.work / f"{named(arguments.model)}-{name}" for name in wanted}
    for name, place in made.items():
        shutil.rmtree(place, ignore_errors=True)
        export(source, name, place, wanted[name])
    engines: list[Callable[[], Iterator[Row]]] = [
        lambda: in_transformers(made, prompts, plain, arguments),
        lambda: in_llama_cpp(made["gguf"], prompts, [_before(ids, ends) for ids in plain], arguments),
        lambda: in_vllm(made["vllm"], prompts, plain, arguments),
    ]
    for engine in engines:
        for row in engine():
            rows.append(row)
            print(json.dumps(row), flush=True)
    result = {"rows": rows, "exit_layer": exit_layer, "prompts": len(prompts)}
    if arguments.save:
        result["configuration"] = record.configuration(arguments, resolve_device("cpu"))
        record.save(result, "engines", named(arguments.model), "float32", "cpu")


def in_transformers(
    made: dict[str, Path], prompts: list[list[int]], plain: list[list[int]], arguments: argparse.Namespace
) -> Iterator[Row]:
    """The draft as `assistant_model`, then our own loop out of the exported folder."""
    import transformers
    from transformers.generation.candidate_generator import AssistedCandidateGenerator as Candidates

    folder = made["vllm"]
    model, draft = (
        transformers.AutoModelForCausalLM.from_pretrained(folder / part, dtype=torch.float32).eval()
        for part in ("model", "draft")
    )
    settings = draft.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = arguments.draft_length, "constant"
    settings.assistant_confidence_threshold = 0.0
    counts, update, propose = [0, 0], Candidates.update_candidate_strategy, Candidates.get_candidates

    def updated(self: Any, ids: Any, scores: Any, matches: int) -> None:
        counts[0] += int(matches)
        update(self, ids, scores, matches)

    def proposed(self: Any, ids: Any, *rest: Any, **more: Any) -> Any:
        found = propose(self, ids, *rest, **more)
        counts[1] += found[0].shape[1] - ids.shape[1]
        return found

    Candidates.update_candidate_strategy, Candidates.get_candidates = updated, proposed
    how = {
        "max_new_tokens": arguments.max_new_tokens,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    try:
        found = [_continued(model, ids, assistant_model=draft, **how) for ids in prompts]
    finally:
        Candidates.update_candidate_strategy, Candidates.get_candidates = update, propose
    engine = f"transformers {transformers.__version__}"
    yield {
        "artefact": "draft", "engine": engine, "equal": _equal(plain, found), "acceptance": counts[0] / counts[1],
        "command": "model.generate(**inputs, assistant_model=draft)",
    }  # fmt: skip
    place = str(made["custom-generate"])
    model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    own = {"custom_generate": place, "trust_remote_code": True}
    yield {
        "artefact": "custom-generate", "engine": engine, "acceptance": None,
        "equal": _equal(plain, [_continued(model, ids, **own, **how) for ids in prompts]),
        "command": 'model.generate(**inputs, custom_generate="FOLDER", trust_remote_code=True)',
    }  # fmt: skip


def _continued(model: Any, ids: list[int], **how: Any) -> list[int]:
    given = torch.tensor([ids])
    out = model.generate(given, attention_mask=torch.ones_like(given), **how)
    return [int(token) for token in out[0, len(ids) :]]


def in_llama_cpp(
    place: Path, prompts: list[list[int]], said: list[list[int]], arguments: argparse.Namespace
) -> Iterator[Row]:
    """Both GGUF files in llama.cpp's server: the model alone, then with its draft.

    `said` ends before ends of sequence, since llama.cpp never says one where it is told to go on.
    """
    if arguments.llama_server is None:
        return
    from peers.llama_server import PACKAGE, llama_server

    [draft] = place.glob("*-first-*.gguf")
    [model] = {*place.glob("*.gguf")} - {draft}
    for what, second in (("gguf", None), ("gguf, with its draft", draft)):
        folder, threads = arguments.llama_server, arguments.threads
        with llama_server(folder, model, 1, threads, second, arguments.draft_length) as url:
            found, counts = [], [0, 0]
            for ids in prompts:
                body = {
                    "prompt": ids, "n_predict": arguments.max_new_tokens, "temperature": 0,
                    "return_tokens": True, "cache_prompt": False,
                }  # fmt: skip
                told = _posted(f"{url}/completion", body)
                found.append(told["tokens"])
                counts[0] += told["timings"].get("draft_n_accepted") or 0
                counts[1] += told["timings"].get("draft_n") or 0
        yield {
            "artefact": what, "engine": f"llama.cpp ({PACKAGE})", "equal": _equal(said, found),
            "acceptance": counts[0] / counts[1] if counts[1] else None,
            "command": f"llama-server -m {model.name}" + (f" -md {draft.name}" if second else ""),
        }  # fmt: skip


def _posted(url: str, body: dict[str, Any]) -> dict[str, Any]:
    asked = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=300) as answer:
        told: dict[str, Any] = json.load(answer)
    return told


def in_vllm(
    place: Path, prompts: list[list[int]], plain: list[list[int]], arguments: argparse.Namespace
) -> Iterator[Row]:
    """Both folders in vLLM, in an environment of its own: the model alone, then with its draft."""
    if arguments.vllm is None:
        return
    for what, draft in (("vllm", None), ("vllm, with its draft", str(place / "draft"))):
        asked = {
            "model": str(place / "model"), "draft": draft, "drafts": arguments.draft_length, "prompts": prompts,
            "budget": arguments.max_new_tokens,
        }  # fmt: skip
        script = PEERS / "vllm_draft.py"
        done = subprocess.run([arguments.vllm, script, json.dumps(asked)], capture_output=True, text=True)
        line = next((line for line in done.stdout.splitlines() if line.startswith("answer ")), None)
        if line is None:
            yield {"artefact": what, "engine": "vLLM", "failed": done.stderr[-800:]}
            continue
        told = json.loads(line.removeprefix("answer "))
        yield {
            "artefact": what, "engine": f"vLLM {told['version']}", "equal": _equal(plain, told["tokens"]),
            "acceptance": told["accepted"] / told["drafted"] if told["drafted"] else None,
            "command": _command(place, draft),
        }  # fmt: skip


def _before(tokens: list[int], ends: Collection[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def _command(place: Path, draft: str | None) -> str:
    """What serve.sh runs, without its draft where there is none."""
    line = (place / "serve.sh").read_text(encoding="utf-8").splitlines()[-1]
    command = line.partition("exec ")[2].removesuffix(' "$@"')
    return command if draft else command.partition(" --speculative-config")[0]


def _equal(plain: list[list[int]], found: list[list[int]]) -> dict[str, Any]:
    """How many outputs are token for token the same, and where the others part: ends before the plain one, too."""
    missing = [[*other, *[None] * (len(one) - len(other))] for one, other in zip(plain, found, strict=True)]
    parted = [
        next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        for one, other in zip(plain, missing, strict=True)
    ]
    return {"same": sum(place is None for place in parted), "of": len(plain), "parted_at": parted}


if __name__ == "__main__":
    record.run(main)
