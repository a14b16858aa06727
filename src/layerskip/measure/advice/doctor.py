"""What a model would gain here, whether it is fit for it, and a verdict in words.

    result = examine(lm, analysis, chat=True, name="smollm2-135m")
    print(result["verdict"])

The predictions are `prediction.analyse`'s; here are the checks beside them: does an output end, is it the same
twice, are drafts judged by the same numbers that plain decoding goes by, what memory does it take.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layerskip.decode import weight_formats
from layerskip.decode.options import Options
from layerskip.measure.advice.prediction import default_cell
from layerskip.measure.proof.cases import Case
from layerskip.measure.proof.certificate import shortly
from layerskip.measure.proof.equality import HOLDS, equality_promised
from layerskip.measure.speed.card import BUFFER_BYTES, bandwidth

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel
    from layerskip.measure.advice.cells import Analysis, Cell

TRAINED_AGREEMENT = 0.5  # of an exit in the lower half: SmolLM2's untrained ones reach a tenth
MARK = "qzx"  # stands for an answer, to see what a template puts behind it
VERIFIED, VERIFIED_TOKENS = 3, 32  # prompts, and their new tokens


def examine(lm: LanguageModel, analysis: Analysis, chat: bool, name: str, also: str = "") -> dict[str, Any]:
    """Put predictions, checks and verdict together.

    `name` is how the user calls the model, `also` the options that let tune look at the same.
    """
    checks = {**ending(lm, analysis, chat), **sameness(lm, analysis)}
    trained = lm.facts.trained or _looks_trained(lm, analysis)
    return {
        "verdict": verdict(analysis, name, trained, default_cell(lm), also),
        "recommended_mode": "ar" if analysis.recommended is None else "self-speculative",
        "trained_exits": trained,
        "exits": list(lm.facts.exits),
        "layers": lm.stack.num_layers,
        **analysis.record(),
        "checks": checks,
        "memory": memory(lm, analysis.best.cell),
        "formats": formats(lm),
    }


def formats(lm: LanguageModel) -> list[dict[str, Any]] | None:
    """What weight formats are worth here: empty where nobody measured it yet, None where there are none."""
    stack = lm.stack
    if stack.name != "native" or stack.device.type != "cpu" or lm.path is None:
        return None
    rows = weight_formats.kept(lm.path)
    return [] if rows is None else weight_formats.as_records(rows, bandwidth(stack.device, BUFFER_BYTES))


def _looks_trained(lm: LanguageModel, analysis: Analysis) -> bool:
    """Whether an exit of the lower half agrees as only trained ones do, though the checkpoint does not say."""
    half = lm.stack.num_layers // 2
    return any(share >= TRAINED_AGREEMENT for k, share in analysis.seen.agreement.items() if k <= half)


def verdict(analysis: Analysis, name: str, trained: bool, default: Cell | None, also: str = "") -> str:
    """Say in a few sentences which source of drafts earns what, and what to do."""
    chosen, confirm = analysis.recommended, f"layerskip tune {name}{also} --save"
    best = chosen or max(analysis.sources.values(), key=lambda one: one.speedup)
    given, (low, high) = flags(best.cell), best.interval
    gain = f"{best.speedup:.2f} x [{low:.2f}, {high:.2f}]"
    if chosen is None:
        told = f"You will get {gain} at best, with {given}: use plain decoding (--drafter off). "
        told += (
            f"{confirm} measures it and makes that the default." if default else "It is the default already."
        )
    elif best.cell == default:
        told = f"You will get {gain} by default, which is {given}."
    else:
        now = analysis.of(default)
        than = f" (the default, {now.cell}, is predicted {now.speedup:.2f} x)" if now else ""
        told = f"You will get {gain} with {given}{than}; {confirm} measures it and makes it the default."
    if chosen is not None and low <= 1:
        told += " The interval does not exclude a loss: measure before you rely on it."
    told += f" {_earnings(analysis)}"
    return told if best.cell.draft_length and chosen else f"{told} {_about_exits(analysis, name, trained)}"


def flags(cell: Cell) -> str:
    """Spell a setting as options, copies as the checkpoint has them."""
    exit = f"--exit-layer {cell.exit_layer} --draft-length {cell.draft_length}"
    exit += f" --draft-vocab {cell.draft_vocab or 'off'}"
    both = f"--drafter {cell.drafter}"
    return {"exit": exit, "lookup": both, "auto": f"{both} {exit} --guard"}[cell.drafter]


def _earnings(analysis: Analysis) -> str:
    """Say what each source is predicted to give."""
    words = {"lookup": "copies alone (lookup)", "exit": "exit {} alone", "auto": "both (auto)"}
    told = [
        f"{words[name].format(one.cell.exit_layer)} {one.speedup:.2f} x"
        for name, one in analysis.sources.items()
    ]
    return f"Predicted: {', '.join(told)}."


def _about_exits(analysis: Analysis, name: str, trained: bool) -> str:
    """Say why exits earn nothing here, and what would change that."""
    exit_layer = analysis.best.cell.exit_layer
    if not trained:
        train = f"layerskip train exit-adapter model={name} data=... output=..."
        return f"The exits are not trained; to gain from them, train them: {train}"
    return (
        f"The exits are trained, but exit {exit_layer} agrees with the whole model at "
        f"{100 * analysis.seen.agreement[exit_layer]:.0f}% of the positions of these prompts. Give prompts like "
        f"those it was trained for (--prompts), or train it further on such data: "
        f"layerskip train exit-adapter model={name} data=..."
    )


# -- does an output end --------------------------------------------------------------------------------------


def ending(lm: LanguageModel, analysis: Analysis, chat: bool) -> dict[str, Any]:
    """Compare who says what ends an output: generation config, tokenizer, chat template; and how outputs ended."""
    tokenizer = lm.tokenizer
    used = sorted(lm.eos_ids(Options()))
    own = getattr(tokenizer, "eos_token_id", None)
    turn = end_of_turn(tokenizer)
    ended = sum(one.ended for one in analysis.continuations)
    warnings = []
    if not used:
        warnings.append(
            "no end-of-sequence token is known: outputs run to the budget. Name one as eos_token_id in "
            "generation_config.json"
        )
    for token, whose in (
        (own, "the tokenizer's end of sequence"),
        (turn, "the chat template's end of a turn"),
    ):
        if token is not None and token not in used and used:
            text = tokenizer.convert_ids_to_tokens(token)
            warnings.append(
                f"{whose} {text} (id {token}) does not end an output here: add {token} to eos_token_id in "
                f"generation_config.json, or give --stop '{text}'"
            )
    if tokenizer is not None and not lm.has_template:
        warnings.append("there is no chat template: prompts are continued as plain text")
    if chat and turn is None and lm.has_template:
        warnings.append("the chat template ends an answer with no token of its own: outputs may run on")
    return {
        "chat_template": lm.has_template,
        "prompts_as_chat": chat,
        "eos_ids": used,
        "tokenizer_eos_id": own,
        "end_of_turn_id": turn,
        "ended": ended,
        "continuations": len(analysis.continuations),
        "warnings": list(dict.fromkeys(warnings)),
    }


def end_of_turn(tokenizer: Any) -> int | None:
    """Find the special token a chat template writes behind an answer; None without one."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    from jinja2 import TemplateError  # as in decode.text

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
    try:  # templates are code of the checkpoint's authors: they may refuse, or expect what is not there
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except (TemplateError, ValueError, TypeError, AttributeError, KeyError):
        return None
    behind = text.rpartition(MARK)[2].lstrip()
    special = [token for token in tokenizer.all_special_tokens if token and behind.startswith(token)]
    added = [str(t) for t in tokenizer.added_tokens_decoder.values() if str(t) and behind.startswith(str(t))]
    found = max([*special, *added], key=len, default=None)
    return None if found is None else int(tokenizer.convert_tokens_to_ids(found))


# -- is it the same twice ------------------------------------------------------------------------------------


def sameness(lm: LanguageModel, analysis: Analysis) -> dict[str, Any]:
    """Run the short form of `layerskip verify`, and tell how near the two best logits come."""
    cell, seen = analysis.best.cell, analysis.seen
    ordered = sorted(analysis.continuations, key=lambda one: -len(one.tokens))
    prompts = [one.prompt for one in ordered[:VERIFIED]]
    best = Case(cell.exit_layer, cell.draft_length, cell.draft_vocab or "off")
    twice, equality = shortly(lm, prompts, min(analysis.budget, VERIFIED_TOKENS), best)
    gaps = equality.numbers["gaps"]
    return {
        "deterministic": twice.verdict == HOLDS,
        "self_speculative_equal": not gaps,
        "first_difference": min((gap["position"] for gap in gaps), default=None),
        "settings": equality.numbers["settings"],
        "equality_promised": equality_promised(lm),
        "row_exact": lm.stack.row_exact,
        "dtype": str(lm.stack.dtype).removeprefix("torch."),
        "stack": lm.stack.name,
        "ties": seen.ties,
        "near_ties": seen.near_ties,
        "pass_equals_decoding": seen.equal,
    }


def memory(lm: LanguageModel, cell: Cell) -> dict[str, int]:
    """Bytes of the weights, of the keys and values of one token, and of the draft head's own rows."""
    cache = lm.stack.new_cache(1, 1)
    slots = cache.keys[0].shape[2]
    head = lm.draft_head(Options.parse({"draft_vocab": cell.draft_vocab or "off"}))
    stack = lm.stack
    return {
        "weight_bytes": stack.num_layers * stack.layer_bytes + stack.head_bytes + stack.table_bytes,
        "cache_bytes_per_token": cache.num_bytes // slots,
        "draft_head_bytes": 0 if head is None else head.num_bytes,
    }
