"""Make what a training from scratch begins with: a tokenizer, a small Llama's configuration, packed text.

    python scripts/make_scratch.py TEXTS MORE.jsonl --output scratch      # files and folders of text
    layerskip train scratch-small from_config=scratch/model data=scratch/train.jsonl output=run

A document is a text file, or a line of JSON lines with `text`; --split-at cuts files that hold several. The same
document twice counts once. Whole documents are held out, chosen by --seed, and the tokenizer, byte-level BPE, is
trained on the others alone. In the output folder:

    model/          config.json and the tokenizer; no weights, which `from_config` draws
    train.jsonl     rows of tokens, {"input_ids": [...]}, of at most --length; a document's last one ends in <|end|>
    held.jsonl      the same of the documents that were held out
    held.txt        their text, for `layerskip eval --text`
    prompts.jsonl   beginnings of it, for `layerskip bench --prompts`
    made.json       what all of this was made of, and the number of parameters

The same texts, options and seed give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from layerskip.checkpoint.files import write_json, write_text
from layerskip.errors import UserError
from layerskip.train.data.sources import examples

END = "<|end|>"
HEAD_SIZE = 32
PROMPTS, PROMPT_TOKENS = 64, 48


@dataclass(frozen=True)
class Split:
    """Documents to train on and documents held out."""

    train: list[str]
    held: list[str]


def documents(sources: Sequence[str], split_at: str | None = None) -> list[str]:
    """Read the documents of files and folders, each once. Raises: UserError for data that is not text."""
    found: dict[bytes, str] = {}
    for example in (one for source in sources for one in examples(source)):
        if "text" not in example:
            raise UserError(f"{example['where']} is not plain text", "give .txt files, or .jsonl with `text`")
        for text in example["text"].split(split_at) if split_at else [example["text"]]:
            if words := text.split():
                found.setdefault(hashlib.sha256(" ".join(words).encode()).digest(), text.strip())
    return list(found.values())


def split(texts: Sequence[str], share: float, seed: int) -> Split:
    """Hold out whole documents of at least `share` of all characters, in an order drawn by `seed`.

    Raises: UserError where nothing would be left to train on.
    """
    order = sorted(texts)  # whatever the order of files is
    random.Random(seed).shuffle(order)
    wanted, count, held = share * sum(map(len, order)), 0, 0
    while held < wanted and count < len(order):
        held += len(order[count])
        count += 1
    if not 0 < count < len(order):
        raise UserError(
            f"{len(order)} documents are too few to hold out {share:.0%}", "give more, or use --split-at"
        )
    return Split(order[count:], order[:count])


def tokenizer_of(texts: Sequence[str], size: int) -> Any:
    """Train a byte-level BPE tokenizer of `size` tokens, the end of a document among them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=END)


def configuration(vocabulary: int, end: int, width: int, layers: int, length: int) -> LlamaConfig:
    """Shape a small Llama: heads of 32, two of which share keys and values, an MLP of 2.75 times the width.

    Raises: UserError for a width that heads do not fill.
    """
    heads = width // HEAD_SIZE
    if not heads or width % HEAD_SIZE:
        raise UserError(f"--width is {width}", f"give a multiple of {HEAD_SIZE}, the size of a head")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )


def parameters(config: LlamaConfig) -> dict[str, int]:
    """Count parameters: of the layers and the last norm, and of the embeddings, which are the head as well."""
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    attention = 2 * width * width + 2 * width * head * config.num_key_value_heads
    layer = attention + 3 * width * config.intermediate_size + 2 * width
    return {
        "layers": config.num_hidden_layers * layer + width,
        "embeddings": config.vocab_size * width,
    }


def rows(texts: Sequence[str], tokenizer: Any, length: int, most: int | None = None) -> Iterator[list[int]]:
    """Yield rows of tokens of each document and its end; none begins after `most` tokens."""
    told = 0
    for text in texts:
        ids = [*tokenizer.backend_tokenizer.encode(text).ids, tokenizer.eos_token_id]
        for start in range(0, len(ids) - 1, length):  # a last single token has nothing to learn
            if most is not None and told >= most:
                return
            told += len(row := ids[start : start + length])
            yield row


def write_rows(path: Path, found: Iterator[list[int]]) -> dict[str, int]:
    """Write rows as JSON lines; returns how many rows and tokens."""
    count = tokens = 0
    with path.open("w", encoding="utf-8") as file:
        for row in found:
            file.write(json.dumps({"input_ids": row}, separators=(",", ":")) + "\n")
            count, tokens = count + 1, tokens + len(row)
    return {"rows": count, "tokens": tokens}


def prompts(texts: Sequence[str], tokenizer: Any) -> list[str]:
    """Cut beginnings off documents, and off places within them where documents are few."""
    found: list[str] = []
    each = -(-PROMPTS // len(texts))
    for text in texts:
        ids = tokenizer.backend_tokenizer.encode(text).ids
        apart = max(PROMPT_TOKENS, len(ids) // each)
        cuts = (ids[i : i + PROMPT_TOKENS] for i in range(0, len(ids) - PROMPT_TOKENS + 1, apart))
        said = (tokenizer.decode(cut).strip() for cut in cuts)
        found += [one for one in said if one and "\ufffd" not in one][:each]  # half characters are no text
    return found[:PROMPTS]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", nargs="+", help="text files, JSON lines, folders")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--split-at", help="what stands between documents of one file")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row, and the model's context")
    parser.add_argument(
        "--held", type=float, default=0.02, help="share of the characters to hold out, at least"
    )
    parser.add_argument("--tokens", type=int, help="tokens to train on, at most")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    parts = split(documents(given.texts, given.split_at), given.held, given.seed)
    tokenizer = tokenizer_of(parts.train, given.vocabulary)
    config = configuration(len(tokenizer), tokenizer.eos_token_id, given.width, given.layers, given.length)
    folder: Path = given.output
    (folder / "model").mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    train = write_rows(folder / "train.jsonl", rows(parts.train, tokenizer, given.length, given.tokens))
    held = write_rows(folder / "held.jsonl", rows(parts.held, tokenizer, given.length))
    write_text(folder / "held.txt", "\n\n".join(parts.held) + "\n")
    asked = "".join(json.dumps({"prompt": one}) + "\n" for one in prompts(parts.held, tokenizer))
    write_text(folder / "prompts.jsonl", asked)
    made = {
        "train": {"documents": len(parts.train), **train},
        "held": {"documents": len(parts.held), **held},
        "characters_per_token": round(sum(map(len, parts.held)) / held["tokens"], 2),
        "vocabulary": len(tokenizer),
        "parameters": parameters(config),
        "width": given.width,
        "layers": given.layers,
        "length": given.length,
        "seed": given.seed,
        "digest": hashlib.sha256((folder / "train.jsonl").read_bytes()).hexdigest(),
    }
    write_json(folder / "made.json", made, indent=1)
    print(json.dumps(made))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error.message}\n{error.hint or ''}") from None
