"""The server under load: plain decoding against drafts at 1, 4, 8 and 16 rows, a shared prefix, JSON, memory.

    python benchmarks/serving.py --threads 2 --save
    python benchmarks/serving.py --parts rows,peer --model smollm2-135m --quantize int4 --llama-server F

Each part starts `layerskip serve` as a process of its own and asks it over HTTP. `rows`: as many streams at a time
as rows, the same prompts greedily with mode ar and by default, in turns; a ratio is of tokens per second, with a
95% interval over turns. `prefix`: time to first token of prompts that share 500 tokens of system prompt. `json`:
answers sampled under a schema, judged by a validator. `memory`: the server's resident memory over many requests.
`peer`: llama.cpp's own server on the file the built-in model was made of (4 bits), with the same load in turns; F
is a folder where its package is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import record

from layerskip.decode.load import resolve_device
from layerskip.errors import UserError
from layerskip.measure import prompt_file
from layerskip.measure.intervals import resampled
from layerskip.measure.lines import read_prompts
from layerskip.measure.results import named
from layerskip.serve.load import Target, asked, measured

ROWS = (1, 4, 8, 16)
PARTS = ("rows", "prefix", "json", "memory")  # and peer, with --llama-server
SYSTEM = "You are a careful assistant who answers in few words, says so where something is not known, and is kind. "
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@contextlib.contextmanager
def served(arguments: argparse.Namespace, rows: int) -> Iterator[tuple[Target, int]]:
    """A server process; its target and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "layerskip", "serve", arguments.model, "--port", str(port), "--rows", str(rows),
        "--context", "2048", "--queue", "256", "--threads", str(arguments.threads),
    ]  # fmt: skip
    if arguments.quantize:
        command += ["--quantize", arguments.quantize]
    # A pipe that nobody reads would stop the server once it is full of its log.
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, text=True)
        target, end = Target(f"http://127.0.0.1:{port}"), time.monotonic() + 120
        try:
            while True:
                try:
                    target.first_model()
                    break
                except UserError:
                    if process.poll() is not None or time.monotonic() > end:
                        said.seek(0)
                        raise UserError(f"the server did not start: {said.read()[-800:]}") from None
                    time.sleep(0.2)
            yield target, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def by_rows(arguments: argparse.Namespace, prompts: list[Any]) -> list[dict[str, Any]]:
    """Tokens per second of plain decoding and of the default, in turns, for each number of rows."""
    told = []
    for rows in ROWS:
        with served(arguments, rows) as (target, _):
            requests = max(2 * rows, 8)
            runs: dict[str, list[dict[str, Any]]] = {"plain": [], "drafts": []}
            texts: dict[str, list[str]] = {}
            for turn in range(arguments.trials + 1):
                for name, own in (("plain", {"mode": "ar"}), ("drafts", {})):
                    result, answers = measured(
                        target,
                        prompts,
                        requests,
                        rows,
                        arguments.max_new_tokens,
                        temperature=0,
                        layerskip=own,
                    )
                    if turn:
                        runs[name].append(_whole(result))
                        texts[name] = [answer.text for answer in answers]
            row: dict[str, Any] = {"rows": rows, "requests": requests} | _compared(runs, "drafts", "plain")
            row["equal"] = sum(a == b for a, b in zip(texts["plain"], texts["drafts"], strict=True))
            told.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return told


def beside_peer(arguments: argparse.Namespace, prompts: list[Any]) -> list[dict[str, Any]]:
    """Tokens per second and times of our default and of llama.cpp's server, in turns, for each number of rows."""
    from peers.llama_cpp import builtin_file
    from peers.llama_server import llama_server

    told, folder = [], arguments.llama_server
    for rows in ROWS:
        with (
            served(arguments, rows) as (ours, _),
            llama_server(folder, builtin_file(folder), rows, arguments.threads) as url,
        ):
            runs: dict[str, list[dict[str, Any]]] = {"ours": [], "llama.cpp": []}
            for turn in range(arguments.trials + 1):
                for name, target in (("ours", ours), ("llama.cpp", Target(url))):
                    asked_for = prompts[turn:] + prompts[:turn]
                    result, _ = measured(
                        target, asked_for, max(2 * rows, 8), rows, arguments.max_new_tokens,
                        temperature=0, ignore_eos=True,
                    )  # fmt: skip
                    if turn:
                        runs[name].append(_whole(result))
            told.append({"rows": rows} | _compared(runs, "ours", "llama.cpp"))
            print(json.dumps(told[-1]), file=sys.stderr, flush=True)
    return told


def _whole(result: dict[str, Any]) -> dict[str, Any]:
    """A result of which nothing failed. Raises: UserError."""
    if result["failed"]:
        raise UserError(f"{result['failed']} requests failed: {result['errors']}")
    return result


def _compared(runs: dict[str, list[dict[str, Any]]], one: str, other: str) -> dict[str, Any]:
    """The ratio of tokens per second of two ways that ran in turns, and each one's times."""
    speeds = {name: np.array([run["tokens_per_s"] for run in found]) for name, found in runs.items()}
    logs = np.log(speeds[one]) - np.log(speeds[other])
    ends = resampled(lambda x: x.mean(-1), logs)
    told: dict[str, Any] = {"ratio": math.exp(logs.mean()), "ci95": [math.exp(end) for end in ends]}
    for name, found in runs.items():
        told[name] = {
            "tokens_per_s": float(np.median(speeds[name])),
            "prompt_tokens": found[-1]["prompt_tokens"],
        } | {
            key: {p: statistics.median(run[key][p] for run in found) for p in ("p50", "p95")}
            for key in ("first_s", "each_s")
        }
    return told


def prefix(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time to first token behind a system prompt of 500 tokens: the first request's, and those of later ones."""
    with served(arguments, 4) as (target, _):
        model = target.first_model()
        system, firsts, laters = SYSTEM, [], []
        for trial in range(5):
            text = f"Rule {trial}. " + system * 26
            for place, question in enumerate(["Who are you?", "What is a bee?", "Why is it cold?"]):
                messages = [{"role": "system", "content": text}, {"role": "user", "content": question}]
                body = {
                    "model": model, "messages": messages, "stream": True, "max_tokens": 8, "temperature": 0,
                    "stream_options": {"include_usage": True},
                }  # fmt: skip
                answer = asked(target, body)
                (laters if place else firsts).append(answer.first_s)
        return {
            "prompt_tokens": answer.prompt_tokens,
            "first_s": statistics.median(firsts),
            "later_s": statistics.median(laters),
            "ratio": statistics.median(laters) / statistics.median(firsts),
        }


def as_json(arguments: argparse.Namespace) -> dict[str, Any]:
    """Sample answers under a schema with drafts on; count those that end and those of them that are valid."""
    with served(arguments, 8) as (target, _):
        format_ = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
        prompts = [f"Invent person number {i}: name, age and tags." for i in range(arguments.answers)]
        result, answers = measured(
            target, prompts, len(prompts), 8, 200, temperature=1.0, seed=1, response_format=format_,
            layerskip={"drafter": "auto"},
        )  # fmt: skip
    valid = sum(_is_valid(answer.text) for answer in answers if answer.error is None and answer.tokens < 200)
    ended = sum(answer.error is None and answer.tokens < 200 for answer in answers)
    return {"asked": len(prompts), "ended": ended, "valid": valid, "acceptance": result["acceptance"]}


def _is_valid(text: str) -> bool:
    try:
        told = json.loads(text)
    except ValueError:
        return False
    return (
        {*told} == {"name", "age", "tags"}
        and isinstance(told["name"], str)
        and type(told["age"]) is int
        and 0 <= told["age"] <= 120
        and isinstance(told["tags"], list)
        and len(told["tags"]) <= 3
        and all(isinstance(tag, str) and len(tag) <= 12 for tag in told["tags"])
    )


def memory(arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Resident megabytes of the server after so many requests."""
    told = []
    with served(arguments, 8) as (target, pid):
        done = 0
        while done < arguments.requests:
            prompts = [f"Number {done + i}: say a word." for i in range(100)]
            result, _ = measured(target, prompts, 100, 16, 4, temperature=0.7)
            done += 100
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            row = {
                "requests": done,
                "mb": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
                "failed": result["failed"],
            }
            told.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quantize", help="weights in so many bits")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--answers", type=int, default=200, help="under a schema")
    parser.add_argument("--requests", type=int, default=2000, help="of the memory part")
    parser.add_argument("--llama-server", type=Path, help="folder for llama.cpp's server, of the peer part")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write a file into benchmarks/results")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    known = (*PARTS, "peer")
    if unknown := {*parts} - {*known}:
        raise UserError(f"unknown parts {sorted(unknown)}", "known: " + ", ".join(known))
    if "peer" in parts and arguments.llama_server is None:
        raise UserError("the peer part needs a folder for llama.cpp's server", "give --llama-server FOLDER")
    prompts = [line.content for line in read_prompts(prompt_file())]
    result: dict[str, Any] = {}
    if "rows" in parts:
        result["rows"] = by_rows(arguments, prompts)
    if "peer" in parts:
        result["peer"] = beside_peer(arguments, prompts)
    if "prefix" in parts:
        result["prefix"] = prefix(arguments)
    if "json" in parts:
        result["json"] = as_json(arguments)
    kept = {"serving": result} if result else {}
    if "memory" in parts:
        kept["serving-memory"] = {"memory": memory(arguments)}
    for kind, told in kept.items():
        print(json.dumps(told, indent=1))
        if arguments.save:
            told["configuration"] = record.configuration(arguments, resolve_device("cpu"))
            parts_of_name = [arguments.quantize] if arguments.quantize else []
            record.save(told, kind, named(arguments.model), *parts_of_name, "cpu")


if __name__ == "__main__":
    record.run(main)
