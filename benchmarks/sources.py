"""What each source of drafts is worth, by kind of text: the default, lookup alone, the exit alone, and peers.

    python benchmarks/sources.py --data DATA --model smollm2-135m-base --threads 2 --save
    python benchmarks/sources.py --data DATA --methods ar,default,lookup,exit,exit-4 --threads 2 --save
    python benchmarks/sources.py --data DATA --methods ar,default --temperature 0.8 --threads 2 --save
    python benchmarks/sources.py --data DATA --methods ar,default,hf,hf-lookup-3,hf-lookup-10 --limit 3 --save

DATA holds human-eval/HumanEval.jsonl, gsm8k/test.jsonl.gz, cnn-dailymail/summarization.jsonl and
spec-bench/dev-120.jsonl; kinds.py says what is taken from them. Code of HumanEval ends where the next thing on the
top level begins. Ends of sequence are respected.

Every prompt is decoded by all methods before the next one is begun, led in rotation. What a controller learns from
a prompt is forgotten before the next one, as when a command is called. A speed-up is plain seconds over a method's
own, all prompts of a kind together, behind the first token; with --temperature, where outputs differ, seconds per
token. Peers are compared by whole calls. The mean is over kinds, each counting alike. Agreement: of the
rounds in which the exit reached draft i, all before it kept, the share that kept it; `exit-4` drafts four a round.

Every finished prompt is a line in the work folder: the same command goes on where it was stopped,
unless the package has changed since.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import record
import torch
from builtin_tables import builtin_table, sources_table
from kinds import KINDS, Kind, chosen
from policies import fresh

import layerskip
from layerskip.checkpoint.facts import fingerprint
from layerskip.decode.generation import by_source
from layerskip.decode.load import resolve_device
from layerskip.errors import UserError
from layerskip.measure.intervals import mean_of_ratios, ratio_of_sums
from layerskip.measure.proof.equality import dtype_name, equality_promised, first_difference
from layerskip.measure.records import Record, Records, work_folder
from layerskip.measure.results import named
from layerskip.measure.speed import methods as ways
from layerskip.measure.speed.methods import Method, Run
from layerskip.measure.tasks.generation import STOPS

if TYPE_CHECKING:
    import argparse

    from layerskip.decode.language_model import LanguageModel
    from layerskip.decode.request import Round

OURS: dict[str, dict[str, Any]] = {
    "default": {},
    "lookup": {"drafter": "lookup"},
    "exit": {"drafter": "exit", "guard": True},
    "exit-4": {"drafter": "exit", "draft_length": 4},  # no guard: every round shows drafts 1 to 4
}
PLACES, AGREED = 16, 4  # drafts of a round that are counted, and those whose agreement is told
AR, HF, HF_LOOKUP, ECONOMIZE = "ar", "hf", "hf-lookup-", "economize-"
PEER_CYCLE, PEER_PLAIN = 4, "economize-plain"  # tokens of its round, three of them drafts; without any
PEERS = (HF, ECONOMIZE)  # by whole calls: they do not tell tokens as they come


def methods_of(
    lm: LanguageModel,
    names: Sequence[str],
    stops: Sequence[str],
    temperature: float,
    peers: Path | None = None,
) -> dict[str, Method]:
    """Build the methods by name; ours end where the model does. `peers` holds drafters of economize by name."""
    hf = (
        ways.hugging_face_model(lm, lm.stack.dtype) if any(name.startswith(PEERS) for name in names) else None
    )
    made = {}
    for name in names:
        ends = {"eos_token_id": None, "stop": tuple(stops), "temperature": temperature}
        if name == AR:
            made[name] = ways.ours(lm, AR, 0, **ends)
        elif name in OURS:
            made[name] = fresh(lm, {**OURS[name], **ends})
        elif name == HF or name.startswith(HF_LOOKUP):
            made[name] = Method(name, peer(hf, name.removeprefix(HF_LOOKUP)), 0)
        elif name.startswith(ECONOMIZE):
            drafter = name.removeprefix(ECONOMIZE)
            if drafter.isdecimal():
                made[name] = Method(name, economize(hf, int(drafter)), 0)
            elif peers is None:
                raise UserError(f"{name} is a trained drafter", "--peers names what peer_training.py wrote")
            else:
                own = ways.hugging_face_model(lm, lm.stack.dtype)  # a technique belongs to its model
                made[name] = Method(name, economize_drafter(own, peers, drafter), 0)
        else:
            raise UserError(
                f"unknown method {name!r}",
                f"of ar, {', '.join(OURS)}, hf, hf-lookup-TOKENS, economize-TOKENS, economize-DRAFTER",
            )
    return made


def peer(hf: Any, tokens: str) -> Any:
    """Wrap Hugging Face's greedy `generate`, with prompt lookup where a number of tokens is given."""
    lookup = {"prompt_lookup_num_tokens": int(tokens)} if tokens.isdecimal() else {}

    def decode(index: int, prompt: list[int], budget: int) -> Run:
        ids, run, began = torch.tensor([prompt], device=hf.device), Run(), time.perf_counter()
        out = hf.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=budget,
            pad_token_id=0,
            **lookup,
        )
        run.tokens = out[0, len(prompt) :].tolist()
        run.arrivals.append((time.perf_counter() - began, len(run.tokens)))
        return run

    return decode


def economize(hf: Any, tokens: int) -> Any:
    """Wrap economize's greedy `generate` with its prompt lookup (Apache-2.0, from PyPI; no dependency of ours)."""
    import economize as peers
    from economize.techniques.lookup import LookupConfig

    model = peers.apply(hf, LookupConfig(match="latest"))
    decoding = peers.DecodeConfig(cycle_length=tokens + 1)

    def decode(index: int, prompt: list[int], budget: int) -> Run:
        ids, run, began = torch.tensor([prompt], device=hf.device), Run(), time.perf_counter()
        out = model.generate(ids, max_new_tokens=budget, decoding=decoding)
        run.tokens = out[0, len(prompt) :].tolist()
        run.arrivals.append((time.perf_counter() - began, len(run.tokens)))
        return run

    return decode


def economize_drafter(hf: Any, folder: Path, name: str) -> Any:
    """Wrap economize's greedy decoding with a drafter that peer_training.py has trained; `plain` is without."""
    import economize as peers

    trained = (
        next(one for one in sorted(folder.iterdir()) if one.is_dir()) if name == "plain" else folder / name
    )
    model = peers.load(hf, str(trained))
    decoding = peers.DecodeConfig(cycle_length=1 if name == "plain" else PEER_CYCLE)
    ends = hf.generation_config.eos_token_id

    def decode(index: int, prompt: list[int], budget: int) -> Run:
        run, began = Run(), time.perf_counter()
        out = model.decode(torch.tensor(prompt), budget, decoding=decoding, stop=ends)
        end = time.perf_counter() - began  # when a cycle's tokens came is not told, how many were is
        run.tokens, left = out.tokens.tolist(), len(out.tokens) - 1
        run.arrivals.append((end, min(1, len(run.tokens))))
        for _, kept in out.acceptance if name != "plain" else [(0, 0)] * left:
            run.arrivals.append((end, min(left, kept + 1)))
            left -= run.arrivals[-1][1]
        return run

    return decode


def counted(rounds: Sequence[Round]) -> dict[str, dict[str, Any]]:
    """Count by who drafted: rounds, drafts, accepted ones; rounds that reached draft 1, 2, ... and that kept it.

    A round reaches a draft that was judged behind kept ones only.
    """
    counts: dict[str, dict[str, Any]] = by_source(rounds)
    for own in counts.values():
        own |= {"reached": [0] * PLACES, "kept": [0] * PLACES}
    for one in rounds:
        for i in range(min(one.drafted, one.accepted + 1, PLACES)):
            counts[one.source]["reached"][i] += 1
            counts[one.source]["kept"][i] += i < one.accepted
    return counts


def measured(
    lm: LanguageModel,
    methods: Mapping[str, Method],
    prompts: Sequence[list[int]],
    records: Records,
    budget: int,
    trials: int,
    title: str,
) -> list[Record]:
    """Decode what is not on file yet; a record of each trial and prompt."""
    names, warm = [*methods], False
    for trial in range(trials):
        for index, prompt in enumerate(prompts):
            if (trial, index) in records.found:
                continue
            for name in names if not warm else ():
                methods[name].decode(0, prompts[0], min(budget, 24))
            warm, runs = True, {}
            for turn in range(len(names)):
                name = names[(turn + trial + index) % len(names)]
                began = time.perf_counter()
                run = methods[name].decode(index, prompt, budget)
                runs[name] = (run, time.perf_counter() - began)
            plain = runs[AR][0].tokens
            kept = {
                name: {
                    "tokens": len(run.tokens),
                    "call_s": seconds,
                    "decode_s": run.decode_s,
                    "decode_tokens": run.decode_tokens,
                    "rounds": len(run.arrivals) - 1,
                    "plain_rounds": sum(not r.draft for r in run.rounds[1:]),
                    "by_source": counted([r for r in run.rounds if r.source != "prefill"]),
                    "difference": first_difference(plain, run.tokens),
                }
                for name, (run, seconds) in runs.items()
            }
            records.keep({"trial": trial, "index": index, "runs": kept})
            print(
                f"{title}: trial {trial + 1}, prompt {index + 1} of {len(prompts)}",
                file=sys.stderr,
                flush=True,
            )
    return [records.found[trial, index] for trial in range(trials) for index in range(len(prompts))]


def columns(
    found: Sequence[Record], name: str, temperature: float, base: str = AR
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of `base` and of a method, by prompt, trials added up; peers by whole calls."""
    sums: dict[int, list[float]] = {}
    for one in found:
        a, b = one["runs"][base], one["runs"][name]
        key = "call_s" if name.startswith(PEERS) else "decode_s"
        size = "tokens" if name.startswith(PEERS) else "decode_tokens"
        alike = a[size] / max(1, b[size]) if temperature or name.startswith(PEERS) else 1.0
        total = sums.setdefault(one["index"], [0.0, 0.0])
        total[0] += a[key]
        total[1] += b[key] * alike
    above, below = np.array([pair for pair in sums.values() if all(pair)]).reshape(-1, 2).T
    return above, below


def report(
    by_kind: Mapping[str, Sequence[Record]], names: Sequence[str], temperature: float
) -> dict[str, Any]:
    """Sum up every method by kind, and over kinds; counts are of the first trial, equality of all."""
    kinds: dict[str, Any] = {}
    for kind, found in by_kind.items():
        kinds[kind] = {}
        for name in names:
            runs = [one["runs"][name] for one in found if one["trial"] == 0]
            told: dict[str, Any] = {"prompts": len(runs), "new_tokens": sum(run["tokens"] for run in runs)}
            rounds = sum(run["rounds"] for run in runs)
            told["tokens_per_round"] = sum(run["decode_tokens"] for run in runs) / rounds if rounds else None
            told["plain_share"] = sum(run["plain_rounds"] for run in runs) / rounds if rounds else None
            told |= drafts(runs)
            if name != AR:
                unequal = {one["index"] for one in found if one["runs"][name]["difference"] is not None}
                told["equal"] = len(runs) - len(unequal)
                told["speedup"] = ratio_of_sums(*columns(found, name, temperature)).record()
            kinds[kind][name] = told
    mean = {
        name: mean_of_ratios([columns(found, name, temperature) for found in by_kind.values()]).record()
        for name in names
        if name != AR
    }
    own = {
        name: mean_of_ratios([columns(f, name, temperature, PEER_PLAIN) for f in by_kind.values()]).record()
        for name in names
        if name.startswith(ECONOMIZE) and PEER_PLAIN in {*names} - {name}
    }
    return {"kinds": kinds, "mean": mean} | ({"over_own_plain": own} if own else {})


def drafts(runs: Sequence[Record]) -> dict[str, Any]:
    """Add up what was drafted, by source; the share that was accepted; the agreement of the exit's first drafts."""
    sources: dict[str, dict[str, Any]] = {}
    for run in runs:
        for source, own in run["by_source"].items():
            into = sources.setdefault(source, {})
            for key, count in own.items():
                into[key] = np.add(into.get(key, 0), count).tolist()
    acceptance = {
        source: own["accepted"] / own["drafted"] for source, own in sources.items() if own["drafted"]
    }
    told: dict[str, Any] = {"by_source": sources, "acceptance": acceptance}
    if "exit" in sources:
        places = zip(sources["exit"]["kept"][:AGREED], sources["exit"]["reached"], strict=False)
        told["agreement"] = [kept / reached if reached else None for kept, reached in places]
    return told


def measured_kinds(
    arguments: argparse.Namespace, lm: LanguageModel, kinds: Mapping[str, Kind], names: Sequence[str]
) -> dict[str, list[Record]]:
    """Decode the prompts of every kind by all methods, or read what was decoded before."""
    by_kind = {}
    for name, kind in kinds.items():
        stops = STOPS if name == "humaneval" else ()
        setup = {
            "data": hashlib.sha256((arguments.data / kind.file).read_bytes()).hexdigest()[:16],
            "code": fingerprint(Path(layerskip.__file__).parent, "**/*.py", "**/*.h", "**/*.cpp"),
            "model": fingerprint(lm.path, "*.safetensors", "config.json", "draft_vocab.json"),
            "places": PLACES,
            "dtype": dtype_name(lm.stack.dtype),
            "device": lm.stack.device.type,
            "stops": stops,
            "methods": ",".join(names),
            **{key: getattr(arguments, key) for key in ("max_new_tokens", "temperature", "threads")},
        }
        prompts = [
            lm.encode(text, chat=kind.chat and lm.has_template)
            for text in kind.prompts(arguments.data, arguments.limit)
        ]
        methods = methods_of(lm, names, stops, arguments.temperature, arguments.peers)
        records = Records(work_folder(arguments.work, f"sources-{name}", setup), key=("trial", "index"))
        by_kind[name] = measured(
            lm, methods, prompts, records, arguments.max_new_tokens, arguments.trials, name
        )
    return by_kind


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    kinds = chosen(arguments.tasks)
    names = list(dict.fromkeys([AR, *arguments.methods.split(",")]))
    device = resolve_device(arguments.device)
    lm = layerskip.load(arguments.model, dtype=arguments.dtype, device=device)
    dtype = dtype_name(lm.stack.dtype)
    by_kind = measured_kinds(arguments, lm, kinds, names)
    result = report(by_kind, names, arguments.temperature)
    result["row_costs"] = lm.row_costs().points
    result["configuration"] = record.configuration(arguments, device)
    result["configuration"] |= {"dtype": dtype, "stack": lm.stack.name, "trained_exits": list(lm.facts.exits)}
    print("\n".join(sources_table(result)))
    if "exit-4" in names:
        print("\n".join(["", *builtin_table(result)]))
    if arguments.save:
        title = (
            "sources" + ("" if not arguments.temperature else "-sampled") + ("-peers" if HF in names else "")
        )
        record.save(result, title, arguments.name or named(arguments.model), dtype, device.type)
    unequal = [
        f"{name} on {kind}"
        for kind, by_name in result["kinds"].items()
        for name in names
        if name in OURS and by_name[name]["equal"] < by_name[name]["prompts"]
    ]
    if unequal and equality_promised(lm) and not arguments.temperature:
        raise SystemExit(f"not lossless: {', '.join(unequal)}")


def parsed() -> argparse.Namespace:
    parser = record.comparison(__doc__, ",".join(KINDS))
    parser.add_argument(
        "--methods",
        default="ar,default",
        help=f"ar, {', '.join(OURS)}, hf, hf-lookup-TOKENS, economize-TOKENS, economize-DRAFTER",
    )
    parser.add_argument(
        "--peers", type=Path, help="what peer_training.py wrote: drafters of economize by name"
    )
    parser.add_argument("--limit", type=int, default=12, help="prompts of a kind")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--trials", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    return parser.parse_args()


if __name__ == "__main__":
    record.run(main)
