"""The same promises on a CUDA device: `python -m pytest -m gpu`."""

import copy
import warnings

import pytest
import torch

import tiny
from layerskip.decode.engine import Engine
from layerskip.decode.request import Request
from layerskip.decode.rounds import device as device_rounds
from layerskip.decode.sampling import Processing, Sampling
from layerskip.model.huggingface import HuggingFaceStack
from rounds import decode

pytestmark = pytest.mark.gpu
PROMPTS = [[5, 9, 20, 33], list(range(7, 18)), [40]]
FAMILIES = [
    *tiny.FAMILIES,
    *(name for name in tiny.NATIVE if name.endswith("+torch")),
]  # no kernels off the CPU


def on_device(name, dtype=torch.float32):
    model = copy.deepcopy(tiny.calibrated(name.partition("+")[0], dtype)).to("cuda")
    return tiny.stack(name, model=model)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_self_speculation_equals_plain_decoding_on_the_device(family):
    torch.backends.cuda.matmul.allow_tf32 = False
    stack = on_device(family)
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


SAMPLED = Processing(Sampling(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01))


@pytest.mark.parametrize("processing", [Processing(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_rounds_are_the_rounds_of_the_host(family, processing):
    """In float64, where padding to a bucket cannot turn a near tie over."""
    stack = on_device(family, torch.float64)
    for exit_layer, draft_length, more in (
        (2, 3, {}),
        (4, 6, {}),
        (None, 0, {}),
        (None, 5, {"drafter": "lookup"}),
    ):
        options = {"processing": processing, "seed": 3, "capacity": 120, **more}
        host = decode(stack, PROMPTS, 70, exit_layer, draft_length, device_rounds=False, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a failed capture warns and goes on eagerly
            ours = decode(stack, PROMPTS, 70, exit_layer, draft_length, **options)
        assert ours.tokens == host.tokens
        drafts = [[[r.draft, r.accepted, r.drafted] for r in rounds] for rounds in host.rounds]
        assert [[[r.draft, r.accepted, r.drafted] for r in rounds] for rounds in ours.rounds] == drafts
        graphs = ours.engine.device_rounds.graphs
        assert graphs.eager_runs == 0
        assert graphs.captured <= 10, "batches of 1, 2 (in place or gathered) and 3, two length buckets"


def test_64_tokens_from_one_prompt_take_one_graph_per_length_bucket():
    stack = HuggingFaceStack(copy.deepcopy(tiny.calibrated("llama")).to("cuda"))
    for new, buckets in ((60, 1), (64, 2)):
        record = decode(stack, PROMPTS[:1], new, 2, 4, capacity=200)
        graphs = record.engine.device_rounds.graphs
        assert (graphs.captured, graphs.replays) == (buckets, len(record.rounds[0]) - 1)


@pytest.mark.parametrize("processing", [Processing(), SAMPLED], ids=["greedy", "sampled"])
def test_a_replayed_round_waits_for_the_device_once(monkeypatch, processing):
    stack = HuggingFaceStack(copy.deepcopy(tiny.calibrated("llama")).to("cuda"))
    engine = Engine(stack, rows=3, capacity=64)
    for index, prompt in enumerate(PROMPTS):
        engine.add(Request(prompt, 40, 2, 3, index=index, processing=processing))
    while any(engine.cache.lengths[row] < len(PROMPTS[row]) for row in range(3)):
        engine.step()
    engine.step()  # captures, and fills the pool of pinned memory
    fetches, original = [], device_rounds.fetched

    def fetched(outputs):
        torch.cuda.set_sync_debug_mode("default")
        answers = original(outputs)
        torch.cuda.set_sync_debug_mode("error")
        fetches.append(len(answers))
        return answers

    monkeypatch.setattr(device_rounds, "fetched", fetched)
    captured = engine.device_rounds.graphs.captured
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert fetches == [3] * 3
    assert engine.device_rounds.graphs.captured == captured


def test_a_failed_capture_leaves_a_device_that_decodes_on(monkeypatch):
    stack = HuggingFaceStack(copy.deepcopy(tiny.calibrated("llama")).to("cuda"))
    wanted = decode(stack, PROMPTS, 24, 2, 3, device_rounds=False).tokens
    logits = stack.logits

    def looking(h, head=None):
        out = logits(h, head)
        assert out.isfinite().all().item()  # waits: a graph cannot hold it
        return out

    monkeypatch.setattr(stack, "logits", looking)
    with pytest.warns(RuntimeWarning, match="CUDA graphs are off"):
        record = decode(stack, PROMPTS, 24, 2, 3)
    assert record.tokens == wanted
    assert record.engine.device_rounds.graphs.eager_runs > 0


def test_a_16_bit_model_decodes_and_mostly_agrees_with_plain_decoding():
    stack = HuggingFaceStack(copy.deepcopy(tiny.calibrated("llama")).to("cuda", torch.bfloat16))
    prompts = [[i, i + 1, i + 2] for i in range(2, 42, 4)]
    plain, own = decode(stack, prompts, 24).tokens, decode(stack, prompts, 24, 2, 5).tokens
    assert sum(a == b for a, b in zip(plain, own, strict=True)) >= len(prompts) // 2
