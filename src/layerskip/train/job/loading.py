"""What a recipe names, found and checked: configuration, tokenizer, rows of data, the model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.checkpoint.configuration import read_configuration
from layerskip.checkpoint.tokenizer import tokenizer_in
from layerskip.errors import UserError
from layerskip.reading import named_path, reason

if TYPE_CHECKING:
    from layerskip.train.data.encoding import DataOptions, Encoded
    from layerskip.train.data.packing import Rows
    from layerskip.train.job.recipe import Recipe
    from layerskip.watch import Watch


def configuration_of(recipe: Recipe) -> tuple[Path, Any]:
    """Find the model's folder and its configuration; with from_config the folder is that of the tokenizer.

    Raises: UserError where the recipe names neither, or what it names cannot be had or read.
    """
    from transformers import AutoConfig

    from layerskip.checkpoint import resolve as hub

    if recipe.model is None and recipe.from_config is None:
        raise UserError(
            "the recipe has no model", "model=NAME starts from a checkpoint, from_config=FILE from nothing"
        )
    folder = None if recipe.model is None else hub.resolve(recipe.model)
    path = folder
    if recipe.from_config is not None:
        path = named_path(recipe.from_config)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"no configuration {path}", "from_config names a config.json or its folder")
        folder = folder or path.parent
    assert folder is not None
    assert path is not None
    read_configuration(path / "config.json" if path.is_dir() else path)
    try:
        return folder, AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever transformers says of values that cannot be
        raise UserError(f"cannot read the model's configuration {path}: {reason(error)}") from error


def check_length(recipe: Recipe, config: Any) -> None:
    """Refuse rows longer than the model's context. Raises: UserError."""
    from layerskip.model.families import context_of

    context = context_of(config.get_text_config())
    if context is not None and recipe.length > context:
        raise UserError(
            f"rows of {recipe.length} tokens are longer than the model's context of {context}",
            f"length={context} or less",
        )


def tokenizer_of(folder: Path) -> Any:
    """Read the tokenizer of the model's folder. Raises: UserError without one."""
    tokenizer = tokenizer_in(folder)
    if tokenizer is None:
        raise UserError(f"{folder} has no tokenizer", "model=NAME gives one beside from_config")
    return tokenizer


def ends_of(folder: Path, config: Any) -> set[int]:
    """All tokens that end what the model writes: those of its generation config, else of its configuration."""
    from transformers import GenerationConfig

    try:
        generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError):
        generation = GenerationConfig.from_model_config(config)
    ids = generation.eos_token_id
    return {ids} - {None} if not isinstance(ids, list) else {*ids}


def rows_of(
    recipe: Recipe, tokenizer: Any, config: Any, watch: Watch | None, ends: Iterable[int]
) -> tuple[Rows, Rows | None]:
    """Read the rows to train on, and those to evaluate on: of eval_data, else of examples that are set aside.

    Examples are set aside before packing, the same ones for the same data and seed. An adapter may learn from
    prompts too, but drafts stand in answers: there it is judged.
    Raises: UserError for data that cannot be read or encoded, or give no rows.
    """
    from layerskip.train.data import packing as data

    columns = data.Columns(**recipe.columns.model_dump())
    options = data.DataOptions(
        length=recipe.length,
        template=recipe.template,
        separator=recipe.separator,
        loss_on=recipe.loss_on,
        pack=recipe.pack,
        long=recipe.long,
        control_tokens=recipe.control_tokens,
    )
    pad = tokenizer.pad_token_id

    answers = replace(options, loss_on="completions") if recipe.exit_adapter else options

    def read(sources: Sequence[str], options: DataOptions, limit: int | None = None) -> list[Encoded]:
        found = itertools.chain.from_iterable(data.examples(source, columns) for source in sources)
        return data.encode(itertools.islice(found, limit), tokenizer, options, watch, ends)

    def packed(encoded: list[Encoded]) -> Rows:
        made = data.rows(encoded, options, 0 if pad is None else pad)
        data.check_labels(made, config.get_text_config().vocab_size)
        return made

    trained, evaluated = read(recipe.sources, options), []
    if recipe.eval_sources:
        evaluated = read(recipe.eval_sources, answers, recipe.eval_limit)
    elif count := num_held_out(recipe, len(trained)):
        judged = trained if answers == options else read(recipe.sources, answers)
        trained, _ = data.split(trained, num=count, seed=recipe.seed)
        _, evaluated = data.split(judged, num=count, seed=recipe.seed)
    return packed(trained), packed(evaluated) if evaluated else None


LEAST_HELD_OUT, MOST_HELD_OUT = 8, 200  # examples; fewer tell nothing, more cost minutes


def num_held_out(recipe: Recipe, examples: int) -> int:
    """Count the examples to set aside: as asked, else 2%, but no more than a tenth of the data."""
    if recipe.hold_out is not None:
        return recipe.hold_out
    count = min(max(examples // 50, LEAST_HELD_OUT), MOST_HELD_OUT)
    return count if 10 * count <= examples else 0


def model_for(recipe: Recipe, folder: Path, config: Any) -> Any:
    """Load or make the model on the CPU, in float32 but where no weight of it is trained.

    Raises: UserError for a configuration no model can be made of.
    """
    import torch

    from layerskip.model.load import load_model

    if recipe.from_config is None:
        half = recipe.exit_adapter and recipe.dtype == "bfloat16"
        model = load_model(folder, dtype=torch.bfloat16 if half else torch.float32, device="cpu")
    else:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(recipe.seed)
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except Exception as error:
            raise UserError(f"cannot make a model of {recipe.from_config}: {reason(error)}") from error
        model.name_or_path = ""  # PEFT would look for a checkpoint there, then on the hub
    generation = model.generation_config
    try:
        generation.validate(strict=True)
    except ValueError:  # saving would refuse it; the file itself is copied unchanged at the end
        ends = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = type(generation)(**ends)
    return model


def check_packing(recipe: Recipe, model: Any) -> None:
    """Refuse to pack examples where the model does not keep them apart. Raises: UserError."""
    from layerskip.train.data.packing import packs

    if recipe.pack and not packs(model):
        raise UserError(
            f"model type {model.config.model_type!r} does not keep packed examples apart", "pack=false"
        )
