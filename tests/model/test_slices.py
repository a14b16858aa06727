"""Layers in one call give the bits of the same layers called one by one, whatever stands in the call."""

import pytest
import torch

import tiny
from layerskip.model.native import kernels as compiled
from layerskip.model.native.bfloat16 import compiles_bfloat16
from layerskip.model.native.stack import NativeStack
from layerskip.model.step import Step

found = compiled.kernels()
FORMATS = [None, "int8", "int4"] if compiles_bfloat16() else ["int8", "int4"]
pytestmark = pytest.mark.skipif(found is None, reason="no C++ compiler")
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3"]
CALLS = [  # cache rows, starts, counts
    ((0,), (0,), (7,)),
    ((0,), (7,), (1,)),
    ((0,), (8,), (12,)),
    ((2, 1), (0, 0), (5, 3)),
    ((2, 1, 0), (5, 3, 20), (1, 4, 2)),
]


def passes(stack, taps=()):
    """Some calls on one cache: their states, those tapped, and what the cache holds in the end."""
    cache, told = stack.new_cache(3, 64), []
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for rows, starts, counts in CALLS:
            step = Step.span(rows, starts, counts, stack.device, spill=64)
            tokens = torch.randint(0, stack.vocab_size, (len(rows), max(counts)), generator=generator)
            h = stack.embed(tokens, step)
            h, early = stack.run(h, 0, 2, step, cache, [k for k in taps if k <= 2])
            h, late = stack.run(h, 2, stack.num_layers, step, cache, [k for k in taps if k > 2])
            told += [h, *(state for _, state in sorted((early | late).items()))]
    return told, [*cache.keys, *cache.values]


@pytest.mark.parametrize("quantize", FORMATS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bits_are_those_of_layers_called_one_by_one(family, quantize, monkeypatch):
    stack = NativeStack(tiny.random_model(family, dtype=torch.bfloat16), quantize=quantize)
    assert stack.slices is not None
    together = passes(stack)
    monkeypatch.setattr(stack, "slices", None)
    for ours, wanted in zip(together, passes(stack), strict=True):
        assert all(map(torch.equal, ours, wanted))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit(threads):
    stack = NativeStack(tiny.random_model("qwen3", dtype=torch.bfloat16), quantize="int4")
    before = torch.get_num_threads()
    wanted, _ = passes(stack)
    try:
        torch.set_num_threads(threads)
        ours, _ = passes(stack)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, ours, wanted))


def test_tapped_states_are_those_of_layers_called_one_by_one(monkeypatch):
    stack = NativeStack(tiny.random_model("llama", dtype=torch.bfloat16), quantize="int8")
    together, _ = passes(stack, taps=(1, 2, 4))
    monkeypatch.setattr(stack, "slices", None)
    wanted, _ = passes(stack, taps=(1, 2, 4))
    assert len(together) == 4 * len(CALLS)
    assert all(map(torch.equal, together, wanted))


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gemma", {}), ("llama", {"hidden_act": "gelu"})],
    ids=["gains in float32", "gelu"],
)
def test_what_is_not_compiled_is_called_one_by_one(family, changes):
    model = tiny.random_model(family, dtype=torch.bfloat16, **changes)
    assert NativeStack(model, quantize="int8").slices is None
