"""lm-eval's tasks on this engine: log-likelihoods at any exit, generation with drafts.

    layerskip-lm-eval run --model layerskip --model_args pretrained=smollm2-135m --tasks gsm8k
    layerskip-lm-eval run --model layerskip --model_args pretrained=./my-model,likelihood_exit=6 --tasks hellaswag

It is lm-eval's own command line with one more model. Model arguments: `pretrained`; `dtype`, `device`, `quantize`,
`stack` and `threads` as in `layerskip.load`; `mode`, `drafter`, `exit_layer`, `draft_length`, `policy` and `guard`
as in `generate`; `likelihood_exit`, the layer that log-likelihoods are read at (default: the last one);
`max_length`, `max_gen_toks`. Contexts are cut, texts encoded and outputs ended as lm-eval's own `hf` model does it,
so the numbers of the last layer are its numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from layerskip.decode.load import load
from layerskip.decode.options import Options
from layerskip.errors import UserError, nearest
from layerskip.measure.exits.states import own_heads
from layerskip.measure.lines import LikelihoodLine
from layerskip.measure.tasks.likelihood import scored

LOADING = ("dtype", "device", "quantize", "stack", "threads")
DRAFTING = ("mode", "drafter", "exit_layer", "draft_length", "policy", "guard")
PASSED = ("max_batch_size", "trust_remote_code")  # what lm-eval hands to every model
SAMPLING = ("top_k", "top_p", "min_p")
BUDGETS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
ROWS = 8  # decoded together, where lm-eval says auto

Scored = tuple[tuple[str, str], list[int], list[int]]  # texts, context and continuation in tokens


@register_model("layerskip")
class LayerSkipLM(TemplateLM):
    """A model of lm-eval; see the module. Raises: UserError for arguments that are unknown or out of range."""

    backend = "causal"

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = ROWS,
        likelihood_exit: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        **more: Any,
    ) -> None:
        super().__init__()
        for name in more:
            if name not in (*LOADING, *DRAFTING, *PASSED):
                raise UserError(f"unknown model argument {name!r}", nearest(name, (*LOADING, *DRAFTING)))
        loading = {name: more[name] for name in LOADING if more.get(name) is not None}
        self.drafting = {name: more[name] for name in DRAFTING if more.get(name) is not None}
        self.lm = load(pretrained, **loading)
        self.rows = int(batch_size) if str(batch_size).isdecimal() else ROWS
        layers = self.lm.stack.num_layers
        self.exit = layers if likelihood_exit is None else int(likelihood_exit)
        self.heads = own_heads(self.lm)
        self.max_length = int(max_length or self.lm.stack.context or 2048)
        self.max_gen_toks, self.add_bos_token = int(max_gen_toks), add_bos_token
        self.lm.call(Options.parse(self.drafting))  # a slip shows now, not after minutes
        if not (1 <= self.exit <= layers or self.exit in self.heads):
            raise UserError(f"exit layer {self.exit} is out of range", f"exits are layers 1 to {layers}")

    # -- tokens, as lm-eval's own model has them ---------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        return self.lm.tokenizer

    @property
    def tokenizer_name(self) -> str:
        return str(self.lm.path or "").replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        return int(self.lm.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        first = self.lm.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
        """Encode a text; what starts a text is added once, as the tokenizer does it."""
        start = self.lm.tokenizer.bos_token
        if add_special_tokens is None and start and string.startswith(start):
            add_special_tokens = False
        given = self.add_bos_token if add_special_tokens is None else add_special_tokens
        how = {} if given is None else {"add_special_tokens": given}
        ids: list[int] = self.lm.tokenizer.encode(string, **how)
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True, **more: Any
    ) -> str:
        """Word a conversation as the model reads it."""
        text: str = self.lm.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        return text

    # -- log-likelihoods -----------------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: Sequence[Scored], **more: Any) -> list[tuple[float, bool]]:
        pairs = []
        for _, context, continuation in requests:
            if not continuation:
                raise UserError("a continuation is nothing in tokens", "leave that document out")
            if len(continuation) > self.max_length:
                raise UserError(f"a continuation of {len(continuation)} tokens passes {self.max_length}")
            pairs.append([((context + continuation)[-self.max_length - 1 :], len(continuation))])
        items = [LikelihoodLine(context="", response="scored by its tokens")] * len(pairs)
        told = []
        for record in scored(self.lm.stack, items, pairs, [self.exit], heads=self.heads):
            [found] = record["exits"][str(self.exit)]
            told.append((sum(found["tokens"]), found["greedy"]))
        return told

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, window by window where they are longer than the context."""
        told = []
        for request in requests:
            windows = [
                (("", ""), *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
                )
            ]
            told.append(sum(one for one, _ in self._loglikelihood_tokens(windows)))
        return told

    # -- generation ----------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts until one of their stop texts; greedily unless a task samples.

        Raises: UserError for a budget that leaves no room for a context.
        """
        groups: dict[tuple[Any, ...], list[int]] = {}
        for place, request in enumerate(requests):
            how = dict(request.args[1])
            until = how.get("until") or ()
            until = (until,) if isinstance(until, str) else tuple(until)
            budget = next((int(how[key]) for key in BUDGETS if how.get(key)), self.max_gen_toks)
            groups.setdefault((until, budget, *_law(how).items()), []).append(place)
        texts = [""] * len(requests)
        for (until, budget, *law), places in groups.items():
            room = self.max_length - budget
            if room < 1:
                raise UserError(
                    f"{budget} new tokens fill the context of {self.max_length}", "lower max_gen_toks"
                )
            prompts = [self.tok_encode(requests[place].args[0])[-room:] for place in places]
            stops = tuple(text for text in until if text)
            options = self.drafting | dict(law) | {"max_new_tokens": budget, "stop": stops}
            found: Iterator[Any] = self.lm.each(prompts, batch_size=self.rows, **options)
            for place, generation in zip(places, found, strict=True):
                texts[place] = generation.checked().text
        return texts


def _law(how: dict[str, Any]) -> dict[str, Any]:
    """Read how a task wants tokens drawn, in our words; without `do_sample` they are not drawn."""
    temperature, names = how.get("temperature"), ["repetition_penalty"]
    law = {}
    if how.get("do_sample") or (how.get("do_sample") is None and temperature):
        law["temperature"] = 1.0 if temperature is None else temperature
        names += SAMPLING
    return law | {name: how[name] for name in names if how.get(name) is not None}


def main() -> None:
    """Run lm-eval's command line, which now knows the model `layerskip`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
