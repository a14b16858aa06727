"""How comparisons of speed look: equality first, then rates with their intervals, then what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from layerskip.cli.show.terminal import out, rate, share

if TYPE_CHECKING:
    from rich.console import Console

    from layerskip.decode.language_model import LanguageModel
    from layerskip.measure.speed.card import Card
    from layerskip.measure.speed.contests import Contest


def print_contests(model: str, lm: LanguageModel, results: Sequence[Contest]) -> None:
    """Print the demo's verdict: equality first, then the speeds, then what they mean."""
    equal = sum(contest.equal for contest in results)
    verdict = f"\nequality: {equal} of {len(results)} outputs are token for token those of plain decoding"
    out.print(Text(verdict, style="bold green" if equal == len(results) else "bold red"))
    table = Table("prompt", "plain", "self-speculative", "acceptance", "tokens/round", "speed-up", box=None)
    for c in results:
        plain, own = c.plain.stats, c.speculative.stats
        table.add_row(
            c.task,
            rate(plain["decode_tokens_per_s"]),
            rate(own["decode_tokens_per_s"]),
            share(own["acceptance"]),
            f"{own['tokens_per_round'] or 0:.2f}",
            f"{c.speedup:.2f} x" if c.equal else "not equal",
        )
    out.print(table)
    plan = results[0].speculative.stats
    exit_layer, layers = plan["exit_layer"], lm.stack.num_layers
    name = f"exit E = {exit_layer} of {layers} layers" if exit_layer else "an adapter on the embedding, E = 0"
    exits = f"{name}, K = {plan['draft_length']}"
    settings = {"lookup": "copies from the text so far", "auto": f"{exits}, and copies"}.get(
        plan["drafter"], exits
    )
    dtype = str(lm.stack.dtype).removeprefix("torch.")
    out.print(Text(f"{settings}, greedy, {dtype} on {lm.stack.device}", style="dim"))
    if not lm.facts.trained:
        out.print(
            Text(
                f"{model} has no trained exits: drafts are copied from the text so far, which gains where it "
                "repeats itself.",
                style="yellow",
            )
        )


def print_card(console: Console, card: Card) -> None:
    """Print the roofline card: what plain decoding could reach here at best."""
    kind = f"{card.dtype}, {card.quantisation} weights" if card.quantisation else card.dtype
    kind += f" (perplexity +{100 * card.perplexity_cost:.2f}%)" if card.perplexity_cost else ""
    threads = f", {card.threads} threads" if card.device_type == "cpu" else ""
    lines = [
        f"{card.device}{threads} · {kind} · {card.stack} stack",
        f"{card.layers} layers of {card.layer_bytes / 1e6:.1f} MB, head {card.head_bytes / 1e6:.1f} MB, "
        f"weights {card.weight_bytes / 1e6:.0f} MB",
        f"a plain token at context {card.context} reads {card.bytes_per_token / 1e6:.0f} MB; memory gives "
        f"{card.bandwidth_gb_s:.0f} GB/s: at most {card.roofline_tokens_per_s:.1f} tokens/s",
    ]
    console.print(Text("\n".join(lines), style="dim"))


def print_bench(result: dict[str, Any]) -> None:
    """Print a benchmark: equality first, then rates and ratios with their intervals, then the prediction."""
    methods, simulated = result["methods"], result.get("simulated")
    for name, figures in methods.items():
        if name != "ar":
            out.print(_equality(name, figures))
    if simulated is not None:
        out.print(
            Text(
                f"simulated: drafts are kept at random, accepted/drafted {simulated} in the mean of many rounds (a "
                "short run can be ten points off; the speed-up is that of the share it had); no output is real",
                "yellow",
            )
        )
    label = {name: f"{name} (simulated)" if "simulated" in m else name for name, m in methods.items()}
    if "early-exit" in label:
        label["early-exit"] += " (not verified)"
    speeds = Table("method", "tokens/s", "over ar", "accepted", "per round", box=None)
    costs = Table("", "prefill tokens/s", "peak memory", "first call, more", box=None, style="dim")
    for name, figures in methods.items():
        style = "yellow" if label[name] != name else None
        ratio, peak = result["speedup"].get(f"{name}/ar"), figures["peak_bytes"]
        speeds.add_row(
            label[name],
            f"{figures['decode_tokens_per_s']:.1f}",
            "" if ratio is None else _ratio(ratio),
            share(figures["acceptance"]),
            f"{figures['tokens_per_round']:.2f}",
            style=style,
        )
        costs.add_row(
            label[name],
            f"{figures['prefill_tokens_per_s']:.0f}",
            "-" if peak is None else f"{peak / 1e6:.0f} MB",
            f"{figures['setup_s']:.2f} s",
            style=style,
        )
    out.print(speeds)
    for name, ratio in result["speedup"].items():
        if not name.endswith("/ar"):
            out.print(Text(f"{name}: {_ratio(ratio)}"))
    own = methods.get("self-speculative")
    if own is not None:
        text = f"drafter {own['drafter']}"
        if own["drafter"] in ("exit", "auto"):
            text += (
                f", E = {own['exit_layer']}, K = {own['draft_length']}, draft vocabulary {own['draft_vocab']}"
            )
        text += "" if own["policy"] == "fixed" else f", {own['policy']}"
        if (predicted := result["predicted_speedup"]) is not None:
            text += f"; the cost model predicts {predicted:.2f} x from this run's step times"
        out.print(Text(text, style="dim"))
    reached = f"plain decoding reaches {share(methods['ar']['roofline_share'])} of the roofline"
    out.print(Text(reached, style="dim"))
    out.print(costs)


def _equality(name: str, figures: dict[str, Any]) -> Text:
    """Say how many outputs are those of plain decoding."""
    if figures["equal_to_ar"] is None:
        return Text(f"equality: not asked of {name}, its acceptance is simulated", style="yellow")
    count = (
        f"equality: {name}: {figures['equal_outputs']} of {figures['of']} outputs are those of plain decoding"
    )
    if name == "early-exit":
        return Text(f"{count} (not verified: other output by design)", style="dim")
    return Text(count, style="bold green" if figures["equal_to_ar"] else "bold yellow")


def _ratio(ratio: dict[str, Any]) -> str:
    low, high = ratio["ci95"]
    return f"{ratio['median']:.2f} x [{low:.2f}, {high:.2f}]"


def print_coverage(record: dict[str, Any]) -> None:
    """Print what draft vocabularies of several sizes cover, and what the cost model makes of it."""
    speedups = record.get("predicted_speedup", {})
    table = Table("tokens", "covers, held out", *(["predicted speed-up"] if speedups else []), box=None)
    for row in record["coverage"]:
        covered = "-" if row["coverage"] is None else f"{100 * row['coverage']:.2f}%"
        predicted = [f"{speedups[str(row['size'])]:.2f} x"] if speedups else []
        table.add_row(str(row["size"]), covered, *predicted)
    if speedups:
        full = list(speedups)[-1]
        table.add_row(f"all {full}", "100.00%", f"{speedups[full]:.2f} x")
    out.print(table)
    counted = f"counted {record['tokens_counted']} tokens, held out {record['tokens_held_out']}"
    few = "" if record["tokens_held_out"] else ": too few documents to hold out a tenth"
    out.print(Text(counted + few, style="dim"))
    if speedups:
        told = record["assumed"]
        out.print(
            Text(
                f"predicted from measured step times at E = {told['exit_layer']}, K = {told['draft_length']}, "
                f"assuming that the exit agrees at {share(told['agreement'])} of the tokens inside",
                style="dim",
            )
        )
    out.print(Text(f"written: {record['file']} ({record['size']} tokens)"))
