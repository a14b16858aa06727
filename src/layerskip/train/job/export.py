"""What a finished run leaves: a plain Hugging Face folder with the `layerskip` entry, and a model card.

Everything is written aside and moved into place file by file, `config.json` last: until it stands there the folder
is no checkpoint, so a kill or a full disk never leaves a mixture that loads.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.checkpoint.configuration import read_configuration
from layerskip.checkpoint.contents import TOKENIZER, matching, own_weights
from layerskip.checkpoint.facts import entry
from layerskip.checkpoint.files import write_json
from layerskip.errors import UserError, hint_of
from layerskip.train.objective.binding import shape
from layerskip.train.objective.exit_map import as_checkpoint, write_parts
from layerskip.train.objective.objective import Objective

if TYPE_CHECKING:
    from collections.abc import Sequence

    from layerskip.checkpoint.facts import Facts
    from layerskip.train.job.plan import Run
    from layerskip.train.job.recipe import Recipe

MAKING = ".exporting"


def export(
    trainer: Any, run: Run, facts: Facts, vocabulary: Sequence[int] | None, result: dict[str, Any]
) -> None:
    """Write the trained model into the run's output; every rank calls it, the first one writes.

    Adapters are merged; `vocabulary`, ids by falling frequency, is that of the draft head, whose rows a map of the
    exit goes into. Tokenizer and generation config are those of the model before training, byte for byte.
    Raises: UserError when there is no room; checkpoints and a former export stay as they were.
    """
    from safetensors import SafetensorError

    trainer.exits.detach()
    output, model = run.output, _whole(trainer, run.recipe)
    if trainer.args.process_index == 0:
        making = output / MAKING
        try:
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir(parents=True)
            _check_space(model, output)
            if run.recipe.exit_adapter:
                _beside_weights(model, run.folder, making, facts, vocabulary)
            else:
                with as_checkpoint(model, making, facts, vocabulary):
                    model.save_pretrained(making)
            for file in matching(run.folder, TOKENIZER):
                shutil.copyfile(file, making / file.name)
            (making / "README.md").write_text(model_card(run.recipe, facts, result), encoding="utf-8")
            _move(making, output)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot write the model into {output}: {error}",
                hint_of(error, "copy the folder to a larger or writable place")
                + "; --resume finishes from the last checkpoint",
            ) from error
        finally:
            shutil.rmtree(making, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def model_card(recipe: Recipe, facts: Facts, result: dict[str, Any]) -> str:
    """Write the model card: how to use it, what each exit knows, how it was trained."""
    base = Path(recipe.model).name if recipe.model and recipe.from_config is None else None
    header = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [layerskip, early-exit]",
    ]
    if base is not None and recipe.model is not None and not Path(recipe.model).expanduser().exists():
        header += [f"base_model: {recipe.model}"] if "/" in recipe.model else []
    lines = [*header, "---", "", f"# {Path(str(result['output'])).name}", ""]
    lines += [
        f"{base or 'A model from random weights'}, trained with {'layer dropout and ' if recipe.p_max else ''}"
        "early-exit loss, so that its first layers can draft for the rest (LayerSkip, arXiv 2404.16710).",
        "",
        "```sh",
        f'layerskip generate ./{Path(str(result["output"])).name} "..."',
        "```",
        "",
        "An ordinary checkpoint otherwise: `AutoModelForCausalLM.from_pretrained` opens it.",
        "",
        "| exit layer | loss | agrees with the last layer |",
        "| --- | --- | --- |",
    ]
    for k, figures in result["exits"].items():
        lines.append(f"| {k} | {_number(figures['loss'], '.3f')} | {_number(figures['agreement'], '.1%')} |")
    told = f"Measured on {measured_on(result)}: per token, with the right text before it."
    lines += ["", told if result["exits"] else "Nothing was measured."]
    lines += ["", *_default(facts, result)] if facts.trained else []
    keys = (
        "p_max", "drop_depth", "drop_time", "residual_scale", "e_scale", "weighting", "curriculum", "rotation",
        "exits", "exit_loss", "exit_map", "exit_adapter", "exit_vocab", "last_every", "last_loss", "freeze",
        "learning_rate", "lr_schedule", "dtype", "seed",
    )  # fmt: skip
    steps, tokens = result["steps"], result.get("tokens")
    trained = f"{steps} steps" + ("" if tokens is None else f", {tokens:,} tokens with padding")
    lines += ["", f"Recipe {recipe.name or 'of its own'}, {trained}.", "", "```text"]
    lines += [f"{key}: {getattr(recipe, key)}" for key in keys]
    lines += [f"lora: rank {recipe.lora.rank}, merged"] if recipe.lora else []
    return "\n".join([*lines, "```", ""])


def measured_on(result: dict[str, Any]) -> str:
    """Say which text a run's figures come from."""
    if not result["exits"]:
        return "nothing"
    return {
        "eval_data": "the evaluation data",
        "held_out": f"{result.get('held_out')} examples of the data, set aside and not trained on",
        "training": "the last training batches",
    }[result["measured_on"]]


def _default(facts: Facts, result: dict[str, Any]) -> list[str]:
    """Say what drafting is predicted to gain, and whether it is the default."""
    name, speedup = Path(str(result["output"])).name, _number(result["predicted_speedup"], ".2f")
    measure = f"`layerskip tune ./{name} --prompts FILE --save` measures and sets a default"
    if result["predicted_speedup"] is None:
        return [f"No exit drafts by default: no data were held out to choose one by. {measure}."]
    told = f"the cost model predicts {speedup} x"
    if facts.exit_layer is None:
        return [f"Drafting does not pay yet: {told} at best, so no exit drafts by default. {measure}."]
    vocabulary = result["draft_vocab"]
    head = "" if vocabulary is None else f", draft vocabulary the data's {vocabulary:,} most frequent tokens"
    return [
        f"Default: exit layer E = {facts.exit_layer}, draft length K = {facts.draft_length}{head}. "
        f"From these agreements {told}. That is a prediction, no measurement: `layerskip bench ./{name}` measures."
    ]


def _whole(trainer: Any, recipe: Recipe) -> Any:
    """Gather the model on the first rank, adapters merged."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if trainer.is_fsdp_enabled:
        from transformers import AutoModelForCausalLM

        state = trainer.accelerator.get_state_dict(trainer.model)
        if trainer.args.process_index != 0:
            return None
        model = AutoModelForCausalLM.from_config(trainer.exits.hf.config, dtype=trainer.exits.hf.dtype)
        shape(Objective.of(recipe), model, trainer.exits.schedule)
        if recipe.lora is not None:
            from layerskip.train.job.lora import with_adapters

            model = with_adapters(model, recipe.lora)
        model.load_state_dict(state)
    return model.merge_and_unload() if recipe.lora is not None else model


def _beside_weights(
    model: Any, source: Path, making: Path, facts: Facts, vocabulary: Sequence[int] | None
) -> None:
    """Write adapter and draft head beside a copy of the weights, which no training has touched: byte for byte."""
    for file in own_weights(source):
        shutil.copyfile(file, making / file.name)
    config = read_configuration(source / "config.json")
    config["layerskip"] = entry(facts) | write_parts(model, making, vocabulary)
    write_json(making / "config.json", config, indent=2)


def _check_space(model: Any, output: Path) -> None:
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    if (free := shutil.disk_usage(output).free) < needed * 1.02:
        raise UserError(
            f"the model takes {needed / 1e9:.2f} GB and {output} has {free / 1e9:.2f} GB free",
            "free some space; --resume finishes from the last checkpoint",
        )


def _move(making: Path, output: Path) -> None:
    for file in making.iterdir():  # what is moved must be on the disk, or a power cut leaves empty files
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    (output / "config.json").unlink(missing_ok=True)
    for old in output.glob("*.safetensors*"):
        old.unlink()  # of a former export, maybe cut into other shards
    weights_mode = (making / "config.json").stat().st_mode
    for file in sorted(making.iterdir(), key=lambda path: path.name == "config.json"):
        file.chmod(weights_mode)  # safetensors writes files that only their owner reads
        os.replace(file, output / file.name)


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)
