"""Logits to laws to tokens: the same numbers as Hugging Face, draws that respect zeros."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers as hf
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tiny
from layerskip.decode.sampling import (
    DRAFT,
    KEEP,
    NEXT,
    Processing,
    Sampling,
    Uniforms,
    draw,
    penalised,
    warp,
)
from layerskip.errors import UserError

# Laws are computed with Hugging Face's own operations and must be equal to the bit. Only the inverse CDF is
# compared with numbers worked out elsewhere: float64 sums of at most 8 terms.
TOLERANCE = 1e-14
LARGEST = 1 - 2.0**-53  # the largest uniform below one
EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True)
VOCAB = 8


# -- laws, against Hugging Face ------------------------------------------------------------------------------

# A coarse grid makes ties, also at the borders of top-k and top-p; -inf is a token some processor forbade.
TIED = st.sampled_from([-torch.inf, -3.0, -0.5, 0.0, 0.5, 0.5, 2.0])
LOGIT = st.one_of(TIED, st.floats(-30, 30, width=32))
ROW = st.lists(LOGIT, min_size=VOCAB, max_size=VOCAB).filter(lambda row: max(row) > -torch.inf)
SHAPE = st.builds(
    Sampling,
    temperature=st.sampled_from([0.05, 0.3, 0.7, 1.0, 1.0, 1.9, 30.0]),
    top_k=st.integers(0, VOCAB + 2),
    top_p=st.one_of(st.sampled_from([0.25, 0.5, 0.75, 1.0]), st.floats(0.001, 1.0)),
    min_p=st.one_of(st.sampled_from([0.0, 0.25, 0.5]), st.floats(0.0, 0.999)),
)


def hugging_face_law(scores: torch.Tensor, shape: Sampling) -> torch.Tensor:
    """Chain Hugging Face's warpers in the order of `generate`: [N, V] -> [N, V]."""
    chain = hf.LogitsProcessorList([hf.TemperatureLogitsWarper(shape.temperature)])
    if shape.top_k:
        chain.append(hf.TopKLogitsWarper(shape.top_k))
    if shape.top_p < 1:
        chain.append(hf.TopPLogitsWarper(shape.top_p))
    if shape.min_p:
        chain.append(hf.MinPLogitsWarper(shape.min_p))
    return chain(None, scores.clone()).softmax(-1)


@EXAMPLES
@given(rows=st.lists(ROW, min_size=1, max_size=3), shape=SHAPE)
@example(rows=[[1.0] * VOCAB], shape=Sampling(1.0, top_k=3))
@example(rows=[[1.0] * VOCAB], shape=Sampling(1.0, top_p=0.5))
@example(rows=[[1.0] * VOCAB], shape=Sampling(0.5, top_k=5, top_p=0.3, min_p=0.9))
@example(rows=[[0.0] + [-torch.inf] * (VOCAB - 1)], shape=Sampling(1.0, top_k=4, top_p=0.1, min_p=0.1))
def test_warping_equals_the_chain_of_hugging_face_warpers(rows, shape):
    logits = torch.tensor(rows)
    before = logits.clone()
    law = warp(logits, shape)
    assert torch.equal(law, hugging_face_law(logits, shape))
    assert torch.equal(logits, before)
    one_by_one = torch.stack([warp(row, shape) for row in logits])
    assert torch.equal(one_by_one, torch.cat([hugging_face_law(row[None], shape) for row in logits]))


@EXAMPLES
@given(
    row=ROW,
    prefix=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
    penalty=st.one_of(st.sampled_from([0.5, 1.0, 2.0]), st.floats(0.1, 5.0)),
)
@example(row=[0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -torch.inf], prefix=[*range(VOCAB)] * 2, penalty=1.7)
def test_the_penalty_equals_hugging_faces(row, prefix, penalty):
    logits = torch.tensor(row)
    before = logits.clone()
    theirs = hf.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prefix]), logits[None].clone())[0]
    assert torch.equal(penalised(logits, prefix, penalty), theirs)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "shape",
    [
        Sampling(0.7, top_k=9, top_p=0.9, min_p=0.02, repetition_penalty=1.3),
        Sampling(1.6, top_k=50, top_p=0.6, repetition_penalty=0.8),
        Sampling(1.0, min_p=0.3),
    ],
)
def test_laws_equal_those_of_generate_at_every_step(shape):
    """Names and order of application, as `generate` itself wires them, prompt included in the penalty."""
    torch.manual_seed(0)
    prompt = [5, 9, 5, 33]
    out = tiny.random_model("llama").generate(
        torch.tensor([prompt]), do_sample=True, max_new_tokens=6, top_k=shape.top_k, top_p=shape.top_p,
        temperature=shape.temperature, min_p=shape.min_p or None, repetition_penalty=shape.repetition_penalty,
        output_logits=True, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    tokens = out.sequences[0].tolist()
    for i, (raw, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        logits, _ = Processing(shape).law_logits(raw[0], tokens[: len(prompt) + i], ())
        assert torch.equal(warp(logits, shape), scores[0].softmax(-1))


# -- greedy --------------------------------------------------------------------------------------------------


@EXAMPLES
@given(row=ROW, top_k=st.integers(0, 4), top_p=st.floats(0.1, 1.0), min_p=st.floats(0.0, 0.9))
def test_temperature_zero_puts_all_mass_on_the_first_largest_logit(row, top_k, top_p, min_p):
    law = warp(torch.tensor(row), Sampling(0.0, top_k, top_p, min_p))
    assert law.tolist() == [float(i == row.index(max(row))) for i in range(VOCAB)]
    for uniform in (0.0, 0.5, LARGEST):
        assert int(draw(law, torch.tensor(uniform, dtype=torch.float64))) == row.index(max(row))


def test_only_greedy_decoding_without_processing_may_skip_the_law():
    assert Sampling().greedy
    assert Processing().plain_greedy
    assert Processing(Sampling(top_k=5, top_p=0.5, min_p=0.1)).plain_greedy
    assert not Processing(Sampling(temperature=1e-6)).plain_greedy
    assert not Processing(Sampling(repetition_penalty=1.1)).plain_greedy
    assert not Processing(processors=(hf.MinLengthLogitsProcessor(3, 0),)).plain_greedy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", -0.5),
        ("min_p", -0.1),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -2.0),
        *((name, float("nan")) for name in ("temperature", "top_p", "min_p", "repetition_penalty")),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=rf"^{name} is {value}\n  {name} must be "):
        Sampling(**{name: value})


# -- drawing -------------------------------------------------------------------------------------------------

MASS = st.one_of(st.just(0.0), st.sampled_from([5e-324, 1e-300, 1e-45, 1e-12, 1.0]), st.floats(0.0, 1e6))
UNIFORM = st.one_of(st.sampled_from([0.0, 2.0**-53, 0.5, LARGEST]), st.floats(0, 1, exclude_max=True))


@EXAMPLES
@given(masses=st.lists(MASS, min_size=1, max_size=VOCAB).filter(any), uniform=UNIFORM)
@example(masses=[0.0, 0.0, 1.0, 0.0, 0.0], uniform=0.0)
@example(masses=[0.0, 0.0, 1.0, 0.0, 0.0], uniform=LARGEST)
@example(masses=[5e-324, 0.0], uniform=LARGEST)  # the threshold rounds up to the whole mass
@example(masses=[0.0, 1e-45, 1.0], uniform=0.0)
def test_a_draw_inverts_the_cdf_and_never_returns_a_token_of_probability_zero(masses, uniform):
    for dtype in (torch.float64, torch.float32):
        law = torch.tensor(masses, dtype=dtype)
        if not law.any():  # the mass is too small for this type
            continue
        token = int(draw(law, torch.tensor(uniform, dtype=torch.float64)))
        assert law[token] > 0
        cdf = [0.0, *itertools.accumulate(law.double().tolist())]
        slack = TOLERANCE * cdf[-1] + 5e-324
        assert cdf[token] - slack <= uniform * cdf[-1] <= cdf[token + 1] + slack


def test_each_token_owns_the_uniforms_from_the_cdf_before_it_up_to_but_not_including_its_own():
    law = torch.tensor([0.25, 0.0, 0.5, 0.25])
    edges = [(0.0, 0), (0.25 - 2.0**-54, 0), (0.25, 2), (0.75 - 2.0**-53, 2), (0.75, 3), (LARGEST, 3)]
    for uniform, token in edges:
        assert int(draw(law, torch.tensor(uniform, dtype=torch.float64))) == token


def test_a_float32_law_that_sums_to_less_than_one_still_has_no_gap_at_the_end():
    law = torch.full((3000,), 1 / 3000)
    law[-1] = 0.0
    assert int(draw(law, torch.tensor(LARGEST, dtype=torch.float64))) == 2998


def test_each_row_of_a_batch_is_drawn_with_its_own_uniform():
    generator = torch.Generator().manual_seed(0)
    laws = torch.rand(3, 5, VOCAB, generator=generator) * torch.randint(2, (3, 5, VOCAB), generator=generator)
    uniforms = torch.rand(3, 5, dtype=torch.float64, generator=generator)
    together = draw(laws, uniforms)
    assert together.dtype == torch.int64
    for at in itertools.product(range(3), range(5)):
        assert together[at] == draw(laws[at], uniforms[at])


# -- addressed uniforms --------------------------------------------------------------------------------------


def test_a_uniform_depends_on_its_address_alone():
    addresses = list(itertools.product(range(3), range(5), (DRAFT, KEEP, NEXT)))
    forward, source = [Uniforms(7).at(*address) for address in addresses], Uniforms(7)
    backward = [source.at(*address) for address in reversed(addresses)]
    assert forward == backward[::-1]
    assert [source.at(*addresses[4]) for _ in range(3)] == [forward[4]] * 3


def test_seeds_rows_positions_and_purposes_all_have_their_own_uniforms():
    found = [
        Uniforms(seed).at(row, position, purpose)
        for seed in (0, 1, 2, 2**62)
        for row in range(8)
        for position in [*range(12), 1000, 2**31]
        for purpose in (DRAFT, KEEP, NEXT)
    ]
    assert len(set(found)) == len(found)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_large_and_negative_seeds_have_their_own_uniforms():
    """A list of a key above 2**63 and a small row became float64: seeds -1, -2 and 0 gave one output."""
    found = [Uniforms(seed).at(1, 0, 0) for seed in (0, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1, -2)]
    assert len(set(found)) == len(found)


def test_uniforms_are_uniform_and_independent_of_their_neighbours():
    """Chi-square over 4 x 4 cells of (u, its neighbour) along each axis of the address."""
    axes = {"row": (1, 0, 0), "position": (0, 1, 0), "purpose": (0, 0, 1)}
    source = Uniforms(3)
    addresses = list(itertools.product(range(12), range(60), (DRAFT, KEEP, NEXT)))
    values = {address: source.at(*address) for address in addresses}
    assert all(0 <= value < 1 for value in values.values())
    for step in axes.values():
        counts = torch.zeros(4, 4, dtype=torch.float64)
        for address, value in values.items():
            neighbour = values.get(tuple(a + b for a, b in zip(address, step, strict=True)))
            if neighbour is not None:
                counts[int(value * 4), int(neighbour * 4)] += 1
        expected = counts.sum() / 16
        statistic = ((counts - expected) ** 2 / expected).sum()
        half = torch.tensor([15.0, statistic], dtype=torch.float64) / 2
        assert torch.special.gammaincc(half[0], half[1]) > 1e-4


# -- NaN -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 3, 7])
def test_nan_logits_are_refused_wherever_they_stand(place):
    logits = torch.zeros(VOCAB)
    logits[place] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        Processing().law_logits(logits, [1], ())


def test_forbidden_tokens_are_not_mistaken_for_nan():
    logits = torch.tensor([-torch.inf, 1.0])
    assert Processing().law_logits(logits, [1], ())[0] is logits


def test_a_model_that_allows_nothing_or_overflows_is_an_error():
    for logits, match in (([-torch.inf, -torch.inf], "forbid every token"), ([torch.inf, 0.0], "infinite")):
        with pytest.raises(UserError, match=match):
            Processing().law_logits(torch.tensor(logits), [1], ())
