"""An engine's speed without a trained model: the shape of a known one, random weights, acceptance simulated.

    python benchmarks/shapes.py --shape llama2-7b --device cuda --save       # the paper's setting: E 8, K 12, 68.9%
    python benchmarks/shapes.py --shape qwen2-1.5b --device cpu --quantize int4 --max-new-tokens 65 --save
    python benchmarks/shapes.py --shape tiny --device cpu                    # a rehearsal, seconds

Random weights say nothing about quality; the result file and every line printed say that acceptance is simulated.
On a CPU passes over 1, 4 and 9 positions are timed in turn, too: what verifying costs beside a plain step.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from passes import timed_pass

from layerskip.decode.language_model import LanguageModel
from layerskip.decode.load import resolve_device, resolve_dtype
from layerskip.measure.speed.bench import bench
from layerskip.measure.speed.settings import Prompt, Settings
from layerskip.model.native.formats import FORMATS
from layerskip.model.native.load import native_stack

if TYPE_CHECKING:
    from layerskip.model.stack import Stack

HERE = Path(__file__).parent
WIDTHS = (1, 4, 9)
LLAMA2 = {
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
QWEN2 = {
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "num_key_value_heads": 2,
}
SHAPES = {  # sizes from the models' public configurations; exits, drafts, acceptance from arXiv 2404.16710
    "llama2-7b": (
        {
            **LLAMA2,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        {"exit_layer": 8, "draft_length": 12, "simulate_acceptance": 0.689},
    ),
    "llama2-13b": (
        {
            **LLAMA2,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
        },
        {"exit_layer": 15, "draft_length": 12, "simulate_acceptance": 0.745},
    ),
    "qwen2-0.5b": (
        {
            **QWEN2,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
        },
        {"exit_layer": 4, "draft_length": 4, "simulate_acceptance": 0.7},
    ),
    "qwen2-1.5b": (
        {
            **QWEN2,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
        },
        {"exit_layer": 4, "draft_length": 4, "simulate_acceptance": 0.7},
    ),
    "tiny": (
        {
            **LLAMA2,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
        },
        {"exit_layer": 2, "draft_length": 4, "simulate_acceptance": 0.6},
    ),
}


def random_model(
    shape: str, dtype: torch.dtype, device: torch.device, quantize: str | None = None
) -> LanguageModel:
    """Make a model of a shape on its device, always the same on it; weights keep activations of order one.

    What ends a residual branch is scaled by the number of branches, as GPT-2 begins: else four bits change logits
    of so deep a random model beyond what the check at load takes for rounding.
    """
    config = transformers.LlamaConfig(**SHAPES[shape][0])
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        hf = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for layer in hf.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight *= (2 * config.num_hidden_layers) ** -0.5
    return LanguageModel(native_stack(hf, quantize=quantize), hf=hf)


@torch.inference_mode()
def passes(stack: Stack, context: int, repeats: int = 15) -> dict[int, float]:
    """Time of a pass over 1, 4 and 9 positions after `context` tokens, over that of one: medians of turns."""
    room, seconds = context + max(WIDTHS), {width: list[float]() for width in WIDTHS}
    tokens, cache = torch.arange(room)[None] % stack.vocab_size, stack.new_cache(1, room)
    timed_pass(stack, cache, tokens, 0, context)
    for _ in range(repeats + 1):
        for width, own in seconds.items():
            own.append(timed_pass(stack, cache, tokens, context, width))
    medians = {width: statistics.median(own[1:]) for width, own in seconds.items()}
    return {width: median / medians[1] for width, median in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama2-7b", choices=sorted(SHAPES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantize", choices=sorted(FORMATS))
    parser.add_argument("--draft-vocab", type=int, help="tokens that the draft head knows; default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--max-new-tokens", type=int, default=257)
    parser.add_argument("--limit", type=int, default=2, help="prompts")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/shape_*.json")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    torch.set_num_threads(arguments.threads)
    native = arguments.quantize is not None or device.type != "cpu"  # auto is bfloat16 then
    lm = random_model(
        arguments.shape, resolve_dtype(arguments.dtype, device, native), device, arguments.quantize
    )
    settings = Settings(
        methods=["ar", "self-speculative"],
        max_new_tokens=arguments.max_new_tokens,
        trials=arguments.trials,
        **({} if arguments.draft_vocab is None else {"draft_vocab": arguments.draft_vocab}),
        **SHAPES[arguments.shape][1],
    )
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.limit, arguments.prompt_tokens)
    prompts = torch.randint(5, lm.stack.vocab_size, shape, generator=generator).tolist()
    result = bench(lm, [Prompt(None, prompt) for prompt in prompts], settings)
    card, plain, own = result["card"], result["methods"]["ar"], result["methods"]["self-speculative"]
    ratio = result["speedup"]["self-speculative/ar"]
    weights = "_".join(filter(None, (card["dtype"], arguments.quantize)))
    print(f"{arguments.shape}, random weights, {weights} on {card['device']}; acceptance simulated")
    print(
        f"plain: {plain['decode_tokens_per_s']:.1f} tokens/s, {100 * plain['roofline_share']:.0f}% of the roofline "
        f"({card['roofline_tokens_per_s']:.1f} at {card['bandwidth_gb_s']:.0f} GB/s)"
    )
    print(
        f"self-speculation: {ratio['median']:.2f} x [{ratio['ci95'][0]:.2f}, {ratio['ci95'][1]:.2f}] at acceptance "
        f"{100 * own['acceptance']:.0f}%; the cost model predicts {result['predicted_speedup']:.2f} x"
    )
    if device.type == "cpu":
        result["over_one"] = passes(lm.stack, arguments.prompt_tokens)
        print(", ".join(f"{width} positions: {cost:.2f}" for width, cost in result["over_one"].items()))
    if arguments.save:
        told = {**vars(arguments), "torch": torch.__version__, "transformers": transformers.__version__}
        result |= {
            "simulated": settings.simulate_acceptance,
            "configuration": told,
            "python": platform.python_version(),
        }
        name = f"shape_{arguments.shape}_{weights}_{card['device_type']}_{time.strftime('%Y-%m-%d')}.json"
        (HERE / "results" / name).write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: benchmarks/results/{name}")


if __name__ == "__main__":
    main()
