"""Recipes: every setting of a training run in one flat, validated file.

`read_recipe("topv2", ["output=out", "steps=200"])` reads a built-in recipe or a YAML file and lays `key=value` over
it. Each key's docstring is what `layerskip recipes show` prints beside its value.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from layerskip.errors import UserError, nearest
from layerskip.reading import named_path, read_text
from layerskip.train.objective.objective import Objective

FOLDER = Path(__file__).parents[2] / "recipes"
FSDP_SETTINGS = FOLDER / "fsdp2.accelerate.yaml"
"""Settings for `accelerate launch --config_file`: parameters sharded over all GPUs, a layer at a time."""

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, coerce_numbers_to_str=True
    )


class ColumnNames(_Strict):
    """What the data calls its columns."""

    text: str = "text"
    """Plain text, trained on whole."""
    messages: str = "messages"
    """Conversations: lists of {role, content}."""
    prompt: str = "prompt"
    """What is asked; comes with a completion."""
    completion: str = "completion"
    """What is to be answered."""


class Lora(_Strict):
    """Low-rank adapters instead of all weights; the output has them merged."""

    rank: Count = 16
    """Rank of the adapters."""
    alpha: float = Field(default=32, gt=0)
    """Scale of the adapters; the update is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapters."""
    targets: str | list[str] = "all-linear"
    """Module names to adapt; all-linear is every linear layer but the head."""
    layers: list[Count] | None = None
    """Layers to adapt, counted from 1; null is all."""
    ranks: dict[Count, Count] = {}
    """Ranks of single layers, {layer: rank}; their updates are scaled like the others."""
    dora: bool = False
    """DoRA: a trained size of each output beside the low-rank change of its direction."""


NESTED: dict[str, type[BaseModel]] = {"columns": ColumnNames, "lora": Lora}


class Recipe(_Strict):
    """All settings of a run."""

    # what
    name: str = ""
    """What results call it; the file's name if not given."""
    description: str = ""
    """What this recipe is for."""
    source: str = ""
    """Where its settings come from."""
    model: str | None = None
    """Built-in name, folder or hub id to start from; with from_config only its tokenizer is used."""
    from_config: str | None = None
    """A config.json (or its folder) to start from random weights."""
    layers: Count | None = None
    """Number of layers this recipe was written for; a model with fewer is refused; null is any."""
    output: str | None = None
    """Folder for checkpoints and the finished model."""

    # data
    data: str | list[str] | None = None
    """Training data: .jsonl(.gz), .json, .csv, .parquet, .txt(.gz), a folder of these, or a `datasets` name."""
    eval_data: str | list[str] | None = None
    """Data to evaluate on, never trained on; null evaluates nothing."""
    eval_limit: Count | None = 200
    """Examples of eval_data to use; null is all."""
    hold_out: int | None = Field(default=None, ge=0)
    """Without eval_data, examples of data to set aside for it; null is 2%, 8 to 200, of 80 or more; 0 is none."""
    columns: ColumnNames = ColumnNames()
    """What the data calls its columns: text, messages, or prompt and completion."""
    template: Literal["auto", "on", "off"] = "auto"
    """Chat template: auto uses it for messages (and for prompt/completion where the tokenizer has one)."""
    separator: str = "\n"
    """Between prompt and completion where no template is used."""
    loss_on: Literal["completions", "all"] = "completions"
    """Tokens that are learned: completions (assistant turns), or all; text is always learned whole."""
    control_tokens: bool = False
    """Read control tokens that the data spell as such: data that bring their own template."""
    length: int = Field(default=1024, ge=2)
    """Tokens in a row; not more than the model's context."""
    pack: bool = True
    """Fill rows with several examples, which do not see each other."""
    long: Literal["error", "cut", "drop"] = "error"
    """An example longer than a row is an error, cut at its end, or left out; text goes on in the next row."""

    # layer dropout
    p_max: float = Field(default=0.1, ge=0, lt=1)
    """Largest probability that a row skips a layer; 0 is no layer dropout."""
    drop_depth: Literal["exp", "linear", "uniform"] = "exp"
    """How the drop rate grows with depth: exp and linear from 0 at the first layer, uniform not at all."""
    drop_time: Literal["const", "exp", "linear_down"] = "const"
    """How the drop rate changes over the run: const for trained models, exp from scratch."""
    residual_scale: Literal["none", "inverse"] = "none"
    """inverse divides a kept layer's output by its probability of being kept."""

    # exit loss
    e_scale: Share = 1.0
    """Weight of the early exits against the last layer; 0 is plain training."""
    weighting: Literal["paper", "uniform"] | dict[int, Annotated[float, Field(ge=0)]] = "paper"
    """paper grows with the square of depth, uniform is equal, {exit: weight} is your own, 1 for exits not named."""
    curriculum: Literal["rotational", "gradual", "all", "fixed"] = "rotational"
    """Exits trained at a step: in turn (rotational), from the last layer down (gradual), all, or those in exits."""
    rotation: Count | None = None
    """R: each exit is trained once in R steps (rotational only); null or more than the exits: one exit a step."""
    exits: list[Annotated[int, Field(ge=0)]] | Literal["auto"] | None = None
    """Exit layers to train: null is all, auto eighths of the depth up to its half; paper has no 1, adapters 0."""
    last_every: Count = 1
    """N: every N-th row runs all layers and trains the last one; the others stop at the deepest exit in use."""
    exit_vocab: Count | None = None
    """Rows that stop at the exit are scored against the N most frequent tokens only, as a draft head is."""
    exit_map: bool = False
    """Read the one exit through a trained square matrix, which the finished model folds into its draft head."""
    exit_adapter: bool = False
    """Read the one exit, and what the last layer said one position before, through a trained adapter."""
    adapter_blocks: int = Field(default=1, ge=0)
    """Blocks of the adapter behind its two maps; each is an MLP with a gate."""
    adapter_hidden: Count | None = None
    """Width of a block's hidden layer; null is that of the model's MLPs."""
    adapter_steps: Count = 3
    """Drafts of a round that are trained, each on what the one before it gave."""
    exit_loss: Literal["ce", "kl", "ce+kl"] = "ce"
    """Exits learn the data (ce), the last layer's distribution (kl), or both; last_loss is for the last layer."""

    last_loss: Literal["ce", "kl", "anchor"] = "ce"
    """The last layer learns the data (ce) or keeps its distribution: kl on whole rows, anchor at the exit."""

    # optimisation
    freeze: Literal["nothing", "embeddings", "above", "model"] = "nothing"
    """Not trained: embeddings and head; above: also layers above the deepest exit; model: any layer."""
    steps: Count | None = None
    """Optimiser steps; null goes by epochs."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data, unless steps is given."""
    batch_size: Count = 4
    """Rows per device in a forward pass; with global_batch set, fewer rows mean more passes per step."""
    accumulation: Count = 1
    """Forward passes per optimiser step."""
    global_batch: Count | None = None
    """Rows per optimiser step over all devices; sets accumulation to fit the number of devices."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon with the same scale of learning rates, which is for freeze=model: it steps matrices alone."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate; before a head stronger than SmolLM2's an adapter's is lowered by that, and told."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup: float = Field(default=0.03, ge=0)
    """Steps of warm-up; below 1 a share of all steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are clipped to this norm; 0 is off."""
    seed: int = Field(default=0, ge=0)
    """Decides order of the data, layer dropout and random weights."""
    arguments: dict[str, Any] = {}
    """Any further field of Hugging Face's TrainingArguments, such as adam_beta2."""

    # machine
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Arithmetic; bfloat16 is autocast over float32 weights."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    states_gb: float = Field(default=4.0, ge=0)
    """Disk for states of the model that exit_adapter reads again in the next epoch; 0 computes them anew."""
    compile: bool = False
    """Compile the model with torch.compile."""
    workers: int = Field(default=0, ge=0)
    """Processes that load data."""

    # bookkeeping
    save_every: Count = 200
    """Steps between checkpoints."""
    keep: Count = 2
    """Checkpoints to keep, besides the best."""
    log_every: Count = 10
    """Steps between reports."""
    eval_every: Count | None = None
    """Steps between evaluations; null is every save_every, and at the end."""
    best_by: Literal["loss", "speedup", "none"] = "none"
    """The finished model is the checkpoint of least loss, of largest predicted speed-up, or the last one."""
    report_to: str | list[str] = "none"
    """tensorboard, wandb, ... as in Hugging Face's Trainer."""

    lora: Lora | None = None
    """Adapters instead of all weights: rank, alpha, dropout, targets, layers."""

    @field_validator("exits")
    @classmethod
    def _some_exits(cls, exits: Any) -> Any:
        if exits == []:
            raise ValueError("give at least one exit layer, or null for every layer")
        return sorted(set(exits)) if isinstance(exits, list) else exits

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.curriculum == "fixed" and self.exits is None:
            raise ValueError("curriculum fixed needs exits")
        if self.best_by != "none" and self.eval_data is None:
            raise ValueError(f"best_by {self.best_by} needs eval_data")
        if self.hold_out and self.eval_data is not None:
            raise ValueError("hold_out takes the place of eval_data, give one of them")
        if reason := Objective.of(self).contradiction(self, adapters=self.lora is not None):
            raise ValueError(reason)
        if self.global_batch is not None and self.accumulation != 1:
            raise ValueError("accumulation and global_batch exclude each other")
        return self

    @property
    def sources(self) -> list[str]:
        return [self.data] if isinstance(self.data, str) else self.data or []

    @property
    def eval_sources(self) -> list[str]:
        return [self.eval_data] if isinstance(self.eval_data, str) else self.eval_data or []


def recipe_names() -> list[str]:
    """List the built-in recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path != FSDP_SETTINGS)


def recipe_path(name_or_path: str) -> Path:
    """Find a recipe's file. Raises: UserError with the nearest built-in name."""
    if name_or_path in recipe_names():
        return FOLDER / f"{name_or_path}.yaml"
    path = named_path(name_or_path)
    if path.is_file() or path.is_fifo():
        return path
    raise UserError(
        f"no recipe {name_or_path!r}: not a built-in name, nor a YAML file here",
        nearest(name_or_path, recipe_names()),
    )


def read_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a built-in recipe or a YAML file, with "key=value" laid over it (dotted keys, values in YAML).

    Raises: UserError for an unknown recipe or key (with the nearest name) and for a value that cannot be.
    """
    path = recipe_path(name_or_path)
    try:
        settings = yaml.load(read_text(path, pipe=True), _loader())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read the recipe {path}: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UserError(f"the recipe {path} is not a list of `key: value` lines")
    settings.setdefault("name", path.stem)
    if path.parent == FOLDER and isinstance(data := settings.get("data"), str):
        settings["data"] = str(
            FOLDER / data
        )  # a built-in recipe's own; the user's are found from where they stand
    for override in overrides:
        _lay_over(settings, override)
    return recipe_from(settings)


def recipe_from(settings: dict[str, Any]) -> Recipe:
    """Validate settings. Raises: UserError naming the key, its value and what is allowed."""
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise _user_error(error) from None


def as_yaml(recipe: Recipe, explain: bool = True) -> str:
    """Write a recipe as a file that `read_recipe` reads back, each key explained by a comment."""
    lines: list[str] = []
    values = recipe.model_dump()
    for key, field in Recipe.model_fields.items():
        comment = f"  # {field.description}" if explain else ""
        value = values[key]
        if value is not None and key in NESTED:
            lines.append(f"{key}:{comment}")
            for inner, told in NESTED[key].model_fields.items():
                note = f"  # {told.description}" if explain else ""
                lines.append(f"  {inner}: {_scalar(value[inner])}{note}")
        else:
            lines.append(f"{key}: {_scalar(value)}{comment}")
    return "\n".join(lines) + "\n"


def changed(recipe: Recipe) -> dict[str, str]:
    """Give the settings that are not their key's default, in YAML; keys inside others are dotted."""
    found: dict[str, str] = {}
    for key, field in Recipe.model_fields.items():
        value, default = getattr(recipe, key), field.default
        inner = NESTED[key].model_fields if key in NESTED and value is not None else ()
        pairs = {f"{key}.{name}": (getattr(value, name), getattr(default, name, None)) for name in inner}
        for name, (one, other) in (pairs or {key: (value, default)}).items():
            if one != other:
                found[name] = _scalar(one)
    return found


def differing_keys(one: Recipe, other: Recipe) -> list[str]:
    """Name the keys in which two recipes differ."""
    return [key for key in Recipe.model_fields if getattr(one, key) != getattr(other, key)]


def _scalar(value: Any) -> str:
    """Put a value on one line."""
    if isinstance(value, str) and "\n" in value:
        return yaml.safe_dump(value, default_style='"', width=10**6).strip()
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _lay_over(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} is not a setting", "write key=value, for example steps=200")
    try:
        value = yaml.load(text, _loader())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(
            f"the value of {key} is not YAML: {' '.join(str(error).split())}",
            f"quote text with special characters: {key}='\"...\"'",
        ) from error
    *outer, last = key.split(".")
    place: Any = settings
    for part in outer:
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
        if not isinstance(place, dict):
            raise UserError(f"{key}: {part} is {place!r}, it has no keys inside")
    place[last] = value


def _user_error(error: ValidationError) -> UserError:
    """Turn the first finding into one line about the key and one about what is allowed."""
    first: Any = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    names = Recipe.model_fields
    if first["type"] == "extra_forbidden":
        inside = len(path) > 1 and path[0] in NESTED
        known, prefix = (NESTED[path[0]].model_fields, f"{path[0]}.") if inside else (names, "")
        return UserError(f"unknown key {'.'.join(path)!r} in the recipe", nearest(path[-1], known, prefix))
    reason = str(first["msg"]).removeprefix("Value error, ")
    if not path:
        return UserError(
            f"the recipe contradicts itself: {reason}", "layerskip recipes show explains the keys"
        )
    field, key = names[path[0]], path[0]
    if key in NESTED and len(path) > 1:
        field, key = NESTED[key].model_fields[path[1]], ".".join(path[:2])
    told = field.description
    allowed = f"{reason[:1].lower()}{reason[1:]}".replace("input should be", "it should be")
    return UserError(f"{key} is {first['input']!r}: {allowed}", f"{key}: {told}")


@cache
def _loader() -> type[yaml.SafeLoader]:
    """Read plain words as YAML 1.2 does.

    PyYAML follows 1.1, where `off` is false, 1e-4 is text and 2024-01-01 a date; here they are a word, a number and
    a word.
    """

    class Loader(yaml.SafeLoader):
        pass

    tag = "tag:yaml.org,2002:"
    replaced = {tag + name for name in ("bool", "float", "timestamp")}
    Loader.yaml_implicit_resolvers = {
        first: [(name, pattern) for name, pattern in resolvers if name not in replaced]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    number = r"[-+]?(?:\.\d+|\d+\.\d*|\d+(?=[eE]))(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN)"
    Loader.add_implicit_resolver(tag + "bool", re.compile("^(?:true|True|false|False)$"), list("tTfF"))
    Loader.add_implicit_resolver(tag + "float", re.compile(f"^(?:{number})$"), list("-+0123456789."))
    return Loader
