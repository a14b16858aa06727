"""An exit adapter for a model in memory: its own answers to some prompts, then training on them.

    figures = layerskip.train_adapter(model, tokenizer, prompts)      # hundreds of prompts at least
    model.generate(**inputs, custom_generate=layerskip.custom_generate)
    layerskip.generate(model, "...", tokenizer=tokenizer)

`layerskip distill-data` and `layerskip train exit-adapter` do the same for a model on the disk, and can be resumed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.errors import UserError

if TYPE_CHECKING:
    from layerskip.train.data.encoding import Encoded

LEAST_PROMPTS = 8
HELD_OUT = 0.05  # of the answers; K is chosen by them


def train_adapter(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    output: str | Path | None = None,
    exit_layer: int = 0,
    draft_vocab: int = 8192,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    epochs: float = 3.0,
    learning_rate: float = 3e-3,
    steps: int = 2,
    seed: int = 0,
) -> dict[str, float]:
    """Teach a model in memory to draft for itself; its own weights and its plain output stay as they are.

    It answers the prompts (text, messages or token ids), learns from the answers, and keeps the adapter as
    `model.exit_adapter`. With `output` a folder is written that `layerskip.load` opens. Returns figures of answers
    that were set aside: agreement of each draft, tokens per round, the speed-up that the cost model predicts.
    Units: seconds and memory grow with the tokens of the answers; 200,000 are a beginning.
    Raises: UserError for a model that is not supported, or too few prompts.
    """
    from layerskip.checkpoint.facts import Facts, entry
    from layerskip.train.data.packing import DataOptions, rows, split
    from layerskip.train.figures import per_token, predicted
    from layerskip.train.objective.exit_map import as_checkpoint
    from layerskip.train.trainer import LayerSkipArguments, LayerSkipTrainer

    if len(prompts) < LEAST_PROMPTS:
        raise UserError(
            f"{len(prompts)} prompts teach an adapter nothing",
            f"give {LEAST_PROMPTS} at least, better hundreds",
        )
    answers = _answers(model, tokenizer, prompts, max_new_tokens, batch_size)
    longest = max(len(answer.input_ids) for answer in answers)
    options = DataOptions(length=longest, pack=False)
    trained, held_out = split(answers, num=max(2, round(HELD_OUT * len(answers))), seed=seed)
    # The model has a law for prompts too, so that is learnt; judged are drafts of answers.
    trained = [replace(one, labels=one.input_ids) for one in trained]
    data, unseen = rows(trained, options), rows(held_out, options)
    learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as scratch:
        arguments = LayerSkipArguments(
            scratch, p_max=0.0, exits=[exit_layer], curriculum="fixed", weighting="uniform", freeze="model",
            exit_adapter=True, adapter_steps=steps, exit_loss="kl", optimizer="muon",
            exit_vocab=min(draft_vocab, model.get_output_embeddings().weight.shape[0]),
            num_train_epochs=epochs, learning_rate=learning_rate, lr_scheduler_type="cosine", warmup_steps=0.03,
            per_device_train_batch_size=4, per_device_eval_batch_size=4, save_strategy="no", report_to=[],
            remove_unused_columns=False, seed=seed, use_cpu=device.type == "cpu", disable_tqdm=True,
        )  # fmt: skip
        trainer = LayerSkipTrainer(
            model=model, args=arguments, train_dataset=data, eval_dataset=unseen, data_collator=data.collate
        )
        try:
            trainer.train()
            told = trainer.evaluate()
        finally:
            trainer.exits.detach()
            model.train(training)
            for parameter, learns in learning:
                parameter.requires_grad_(learns)
    adapter, vocabulary = model.exit_adapter, list(trainer.exits.bound.vocabulary or ())
    adapter.requires_grad_(requires_grad=False)
    adapter.vocabulary = vocabulary
    best = predicted(trainer.exits, {exit_layer: per_token(told["eval_tokens_per_round"])})
    pays = best is not None and best.speedup >= 1.0
    facts = Facts((exit_layer,), *((exit_layer, best.draft_length) if best is not None and pays else ()))
    if output is not None:
        with as_checkpoint(model, Path(output), facts, vocabulary):
            model.save_pretrained(output)
        tokenizer.save_pretrained(output)
    model.config.layerskip = entry(facts) | {"exit_adapter": "exit_adapter.safetensors"}
    names = ("draft_", "tokens_per_round", "predicted_speedup")
    figures = {key.removeprefix("eval_"): value for key, value in told.items()}
    return {name: value for name, value in figures.items() if name.startswith(names)}


def _answers(
    model: Any, tokenizer: Any, prompts: Sequence[Any], max_new_tokens: int, batch_size: int
) -> list[Encoded]:
    """What the model says to each prompt, greedily, as examples whose answers are learnt."""
    import numpy as np

    from layerskip.decode.load import wrapped
    from layerskip.train.data.encoding import IGNORED, Encoded

    lm = wrapped(model, tokenizer)
    ids = [lm.encode(prompt) for prompt in prompts]
    found = []
    for prompt, made in zip(
        ids, lm.each(ids, max_new_tokens=max_new_tokens, batch_size=batch_size), strict=True
    ):
        tokens = [*prompt, *made.checked().tokens]
        labels = [IGNORED] * len(prompt) + tokens[len(prompt) :]
        found.append(Encoded(np.array(tokens, np.int32), np.array(labels, np.int32)))
    return found
