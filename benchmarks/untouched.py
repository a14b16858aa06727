"""Does a trained drafter leave its model as it was? Weight files, and the bits of what plain decoding computes.

    python benchmarks/untouched.py --threads 2 --save

Both models decode the built-in prompts plainly; equal are the tokens and every bit of the last layer's states.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import record
import torch

from layerskip.checkpoint.contents import own_weights
from layerskip.checkpoint.resolve import resolve
from layerskip.decode.load import load, resolve_device
from layerskip.measure import prompt_file
from layerskip.measure.lines import read_prompts
from layerskip.measure.results import named


def weights(folder: Path) -> dict[str, str]:
    """The digest of every weight file that is the model's own."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in own_weights(folder)}


def decoded(name: str, dtype: str, prompts: list[Any], budget: int) -> list[tuple[list[int], str]]:
    """Tokens of each prompt's plain continuation, and a digest of the states that said them."""
    lm = load(name, dtype=dtype, progress=False)
    found = []
    for prompt in prompts:
        done = lm.generate(prompt, mode="ar", states=True, max_new_tokens=budget, eos_token_id=())
        bits = done.states.contiguous().view(torch.uint8).numpy().tobytes()
        found.append((done.tokens, hashlib.sha256(bits).hexdigest()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--base", default="smollm2-135m-base")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, default=10, help="prompts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write a file into benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prompts = [line.content for line in read_prompts(prompt_file())][: arguments.limit]
    own, base = (weights(resolve(name)) for name in (arguments.model, arguments.base))
    ours, theirs = (
        decoded(name, arguments.dtype, prompts, arguments.max_new_tokens)
        for name in (arguments.model, arguments.base)
    )
    pairs = list(zip(ours, theirs, strict=True))
    result: dict[str, Any] = {
        "files": [*base],
        "same_files": own == base,
        "prompts": len(prompts),
        "same_tokens": sum(a[0] == b[0] for a, b in pairs),
        "same_bits": sum(a == b for a, b in pairs),
    }
    print(
        f"weight files {'the same, byte for byte' if result['same_files'] else 'DIFFERENT'}; of {len(prompts)} "
        f"plain outputs of {arguments.max_new_tokens} tokens {result['same_tokens']} have the same tokens, "
        f"{result['same_bits']} the same bits in every state"
    )
    if arguments.save:
        result["configuration"] = record.configuration(arguments, resolve_device("cpu"))
        record.save(result, "untouched", named(arguments.model), arguments.dtype, "cpu")


if __name__ == "__main__":
    record.run(main)
