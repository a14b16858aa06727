"""The same promises on a CUDA device: `python -m pytest -m gpu`."""

import copy

import pytest
import torch

import tiny
from layerskip.decode.sampling import Processing, Sampling
from layerskip.model.huggingface import HuggingFaceStack
from rounds import decode

pytestmark = pytest.mark.gpu
PROMPTS = [[5, 9, 20, 33], list(range(7, 18)), [40]]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_self_speculation_equals_plain_decoding_on_the_device(family):
    torch.backends.cuda.matmul.allow_tf32 = False
    stack = HuggingFaceStack(copy.deepcopy(tiny.calibrated(family)).to("cuda"))
    plain = decode(stack, PROMPTS, 32)
    assert plain.tokens == [decode(stack, [prompt], 32).tokens[0] for prompt in PROMPTS]
    for exit_layer, draft_length in ((1, 3), (2, 8), (4, 1)):
        assert decode(stack, PROMPTS, 32, exit_layer, draft_length).tokens == plain.tokens


def test_sampling_on_the_device_draws_what_the_cpu_draws():
    """Uniform numbers are addressed on the host, so a device changes rounding and nothing else."""
    model = tiny.calibrated("llama", torch.float64)
    processing = Processing(Sampling(temperature=0.9, top_p=0.95))
    outputs = []
    for device in ("cpu", "cuda"):
        stack = HuggingFaceStack(copy.deepcopy(model).to(device))
        outputs.append(decode(stack, PROMPTS, 24, 2, 3, processing=processing, seed=7).tokens)
    assert outputs[0] == outputs[1]


def test_a_16_bit_model_decodes_and_mostly_agrees_with_plain_decoding():
    stack = HuggingFaceStack(copy.deepcopy(tiny.calibrated("llama")).to("cuda", torch.bfloat16))
    prompts = [[i, i + 1, i + 2] for i in range(2, 42, 4)]
    plain, own = decode(stack, prompts, 24).tokens, decode(stack, prompts, 24, 2, 5).tokens
    assert sum(a == b for a, b in zip(plain, own, strict=True)) >= len(prompts) // 2
