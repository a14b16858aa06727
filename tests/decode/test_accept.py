"""What `accept` commits follows the target law p exactly, whatever the draft law q was.

Two proofs of one claim: by integrating over every uniform (closed form), and by chi-square on many rounds of a toy
model; test_engine_laws.py has a third, through the engine. Controls with known biases must fail that chi-square.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from laws import (
    FAILS,
    PASSES,
    PLAIN,
    p_value,
)
from layerskip.decode.sampling import (
    Processing,
    Sampling,
    accept,
    accept_greedy,
    draw,
    warp,
)
from layerskip.model.head import Head

# Closed forms are a few dozen float64 products and sums: each rounds by 1e-16.
TOLERANCE = 1e-12
LARGEST = 1 - 2.0**-53  # the largest uniform below one


# -- closed form ---------------------------------------------------------------------------------------------

CLOSED_VOCAB = 3
WEIGHTS = st.lists(st.integers(0, 5), min_size=CLOSED_VOCAB, max_size=CLOSED_VOCAB).filter(any)
LAWS = st.lists(WEIGHTS, min_size=4 * CLOSED_VOCAB, max_size=4 * CLOSED_VOCAB)
SAME = [[1, 2, 3], [3, 2, 1], [0, 1, 4]] * 4
APART = [[1, 2, 0]] * 6 + [[0, 0, 3]] * 6


def law_table(weights: list[list[int]]) -> torch.Tensor:
    """Next-token laws by previous token; row 0 also begins the sequence."""
    table = torch.tensor(weights, dtype=torch.float64)
    return table / table.sum(-1, keepdim=True)


def expected_next_law(p: torch.Tensor, q: torch.Tensor | None) -> list[float]:
    """Write out what follows a rejection (q given) or a fully kept draft (None), without using the source."""
    if q is None:
        return p.tolist()
    rest = [max(a - b, 0.0) for a, b in zip(p.tolist(), q.tolist(), strict=True)]
    return [x / sum(rest) for x in rest] if sum(rest) > 0 else p.tolist()


def inner_points(edges: list[float]) -> list[tuple[float, list[float]]]:
    """Split [0, 1] at the edges: the width of each interval with points near both ends and in the middle."""
    edges = sorted({0.0, 1.0, *(x for x in edges if 1e-9 < x < 1 - 1e-9)})
    pairs = [(a, b) for a, b in itertools.pairwise(edges) if b - a > 1e-9]
    return [(b - a, [a + (b - a) * f for f in (0.5, 1e-6, 1 - 1e-6)]) for a, b in pairs]


def integrated_law(draft: list[int], q: torch.Tensor, p: torch.Tensor) -> dict[tuple[int, int], float]:
    """Integrate `accept` over all uniforms for one draft: the probability of every (kept, next).

    The thresholds are worked out here; that `accept` is constant between them is checked at points close to
    all corners of every cell, so its value in the middle times the cell's volume is its exact integral.
    """
    length = len(draft)
    ratios = [float(p[i, x] / q[i, x]) for i, x in enumerate(draft)]
    ends = []
    for i in range(length + 1):
        ends += itertools.accumulate(expected_next_law(p[i], q[i] if i < length else None))
    cells = list(itertools.product(*(inner_points([ratio]) for ratio in ratios), inner_points(ends)))
    corners = [list(itertools.product(*(points for _, points in cell))) for cell in cells]
    uniforms = torch.tensor(corners, dtype=torch.float64)  # [cells, corners, K+1]
    lead = uniforms.shape[:2]
    kept, following = accept(
        torch.tensor(draft).expand(*lead, -1), q.expand(*lead, -1, -1), p.expand(*lead, -1, -1), uniforms
    )
    assert (kept == kept[:, :1]).all()
    assert (following == following[:, :1]).all()
    law: dict[tuple[int, int], float] = {}
    for cell, k, x, corner in zip(cells, kept[:, 0].tolist(), following[:, 0].tolist(), corners, strict=True):
        volume = 1.0
        for width, _ in cell:
            volume *= width
        law[k, x] = law.get((k, x), 0.0) + volume
        keeps = [u < ratio for u, ratio in zip(corner[0][:-1], ratios, strict=True)]
        assert k == (keeps.index(False) if False in keeps else length)
    return law


def committed_law(target: torch.Tensor, drafter: torch.Tensor, length: int) -> torch.Tensor:
    """The law of the first two committed tokens, from `accept` integrated over drafts and uniforms: [V, V]."""
    joint = torch.zeros(CLOSED_VOCAB, CLOSED_VOCAB, dtype=torch.float64)
    for draft in itertools.product(range(CLOSED_VOCAB), repeat=length):
        before = [0, *draft]
        q, p = drafter[before[:-1]], target[before]
        chance = float(torch.stack([q[i, x] for i, x in enumerate(draft)]).prod())
        if chance == 0:
            continue
        for (kept, following), volume in integrated_law(list(draft), q, p).items():
            tokens = [*draft[:kept], following]
            if len(tokens) == 1:  # a second token would come from the next round: from p
                joint[tokens[0]] += chance * volume * target[tokens[0]]
            else:
                joint[tokens[0], tokens[1]] += chance * volume
    return joint


@pytest.mark.parametrize("length", [1, 2])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(weights=LAWS)
@example(weights=SAME)
@example(weights=APART)
def test_the_committed_law_integrates_to_the_target_law(length, weights):
    target, drafter = law_table(weights[:CLOSED_VOCAB]), law_table(weights[-CLOSED_VOCAB:])
    joint = committed_law(target, drafter, length)
    exact = target[0][:, None] * target
    assert (joint.sum(1) - target[0]).abs().max() < TOLERANCE
    assert (joint - exact).abs().max() < TOLERANCE


def keeps_one(p: list[float], q: list[float], uniform: float, token: int = 0) -> bool:
    laws = (torch.tensor([q], dtype=torch.float64), torch.tensor([p, p], dtype=torch.float64))
    uniforms = torch.tensor([uniform, 0.5], dtype=torch.float64)
    return bool(accept(torch.tensor([token]), *laws, uniforms)[0])


def test_a_draft_is_kept_strictly_below_the_ratio_of_its_probabilities():
    p, q = [0.25, 0.75], [0.5, 0.5]
    assert keeps_one(p, q, 0.5 - 2.0**-54)
    assert not keeps_one(p, q, 0.5)
    assert not keeps_one(p, q, 0.5 + 2.0**-53)


def test_a_draft_the_target_forbids_is_never_kept_even_at_uniform_zero():
    assert not keeps_one([0.0, 1.0], [0.5, 0.5], 0.0)


@pytest.mark.parametrize("q", [0.5, 0.1, 1 / 3, 0.2])
def test_a_draft_the_target_likes_at_least_as_much_is_kept_even_at_the_largest_uniform(q):
    assert keeps_one([q, 1 - q], [q, 1 - q], LARGEST)
    assert keeps_one([1.0, 0.0], [q, 1 - q], LARGEST)


def test_a_residual_without_mass_falls_back_to_the_target():
    """Rounding can reject a draft although p equals q; such laws are exaggerated here."""
    draft, q = torch.tensor([0]), torch.tensor([[0.5, 0.75, 0.0]])
    p = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]])
    found = {u: accept(draft, q, p, torch.tensor([0.9, u])) for u in (0.0, 0.24, 0.26, 0.99)}
    assert {u: (int(kept), int(x)) for u, (kept, x) in found.items()} == {
        0.0: (0, 0), 0.24: (0, 0), 0.26: (0, 1), 0.99: (0, 1)
    }  # fmt: skip


# -- chi-square on a toy model -------------------------------------------------------------------------------

TOY_VOCAB = 4
NUM_ROUNDS = 30_000
START = 0  # the token before the first
TARGET_LOGITS, DRAFT_LOGITS = torch.randn(2, TOY_VOCAB, TOY_VOCAB, generator=torch.Generator().manual_seed(5))
ONLY_LOW, ONLY_HIGH = ([0.0, 0.0, -torch.inf, -torch.inf], [-torch.inf, -torch.inf, 0.0, 0.0])


@dataclass(frozen=True)
class Toy:
    """A target and a draft chain with what shapes their laws; a law depends on all tokens before it."""

    target: torch.Tensor = TARGET_LOGITS
    draft: torch.Tensor = DRAFT_LOGITS
    processing: Processing = PLAIN
    draft_processing: Processing | None = None  # where it differs

    def target_laws(self, depth: int) -> list[torch.Tensor]:
        return laws_after_every_prefix(self.target, self.processing, depth)

    def draft_laws(self, depth: int) -> list[torch.Tensor]:
        return laws_after_every_prefix(self.draft, self.draft_processing or self.processing, depth)


def laws_after_every_prefix(logits: torch.Tensor, processing: Processing, depth: int) -> list[torch.Tensor]:
    """Laws by position: entry i is [V**i, V], one row per prefix read as a number in base V."""
    tables = []
    for i in range(depth):
        prefixes = [[START, *prefix] for prefix in itertools.product(range(TOY_VOCAB), repeat=i)]
        rows = [processing.law_logits(logits[prefix[-1]], prefix, ())[0] for prefix in prefixes]
        tables.append(warp(torch.stack(rows), processing.sampling))
    return tables


def joint_law(tables: list[torch.Tensor]) -> torch.Tensor:
    """The law of the whole sequence, [V**depth]."""
    joint = torch.ones(1, dtype=torch.float64)
    for table in tables:
        joint = (joint[:, None] * table.double()).flatten()
    return joint


def prompt_lookup_laws(depth: int) -> list[torch.Tensor]:
    """One-hot laws that look at the whole prefix, as a draft copied from the prompt has."""
    indices = (torch.arange(TOY_VOCAB**i) * 7 + 3 * i + 1 for i in range(depth))
    return [torch.nn.functional.one_hot(index % TOY_VOCAB, TOY_VOCAB).float() for index in indices]


def play(p_tables, q_tables, seed=0, rule=accept, counts=None, drawn_from=None, num_rounds=NUM_ROUNDS):
    """Run many rounds at once and complete them to K+1 tokens from p; return sequence counts and kept.

    `counts` maps (draft, q) to each round's number of drafts; `drawn_from` are the tables drafts really come
    from, where the control lies about q. Slots behind a round's count are filled with nonsense.
    """
    length, generator = len(q_tables), torch.Generator().manual_seed(seed)
    rand = torch.rand(num_rounds, 3 * length + 2, dtype=torch.float64, generator=generator)
    prefix, drafts, q, p = (
        torch.zeros(num_rounds, dtype=torch.long),
        [],
        [],
        [p_tables[0].expand(num_rounds, -1)],
    )
    for i, table in enumerate(q_tables):
        q.append(table[prefix])
        drafts.append(draw((drawn_from or q_tables)[i][prefix], rand[:, i]))
        prefix = prefix * TOY_VOCAB + drafts[-1]
        p.append(p_tables[i + 1][prefix])
    draft, q, p = torch.stack(drafts, -1), torch.stack(q, -2), torch.stack(p, -2)
    ragged = {}
    if counts is not None:
        ragged["counts"] = counts(draft, q)
        padded = torch.arange(length) >= ragged["counts"][:, None]
        nonsense = torch.nn.functional.one_hot(torch.tensor(1), TOY_VOCAB).to(q)
        draft = draft.masked_fill(padded, 1)
        q = torch.where(padded[..., None], nonsense, q)
        p = torch.cat([p[:, :1], torch.where(padded[..., None], nonsense, p[:, 1:])], 1)
    kept, following = rule(draft, q, p, rand[:, length : 2 * length + 1], **ragged)
    assert (following >= 0).all()
    prefix = torch.zeros(num_rounds, dtype=torch.long)
    for i, table in enumerate(p_tables):
        later = draw(table[prefix], rand[:, 2 * length + 1 + i])
        drafted = draft[:, min(i, length - 1)]
        token = torch.where(i < kept, drafted, torch.where(i == kept, following, later))
        prefix = prefix * TOY_VOCAB + token
    return torch.bincount(prefix, minlength=TOY_VOCAB ** (length + 1)), kept


def shaped(**shape) -> Toy:
    return Toy(processing=Processing(Sampling(**{"temperature": 1.0, **shape})))


def draft_vocabulary(*ids: int) -> torch.Tensor:
    """The draft chain's logits as a reduced head gives them: scattered, -inf outside the subset."""
    subset = torch.tensor(ids)
    return Head(subset, torch.zeros(len(ids), 1)).scatter(DRAFT_LOGITS[:, subset], TOY_VOCAB)


TOYS = {
    "two different chains": Toy(),
    "the same chain": Toy(draft=TARGET_LOGITS),
    "disjoint supports": Toy(TARGET_LOGITS + torch.tensor(ONLY_LOW), DRAFT_LOGITS + torch.tensor(ONLY_HIGH)),
    "overlapping supports": Toy(
        target=TARGET_LOGITS + torch.tensor([0.0, 0.0, 0.0, -torch.inf]),
        draft=DRAFT_LOGITS + torch.tensor([-torch.inf, 0.0, 0.0, 0.0]),
    ),
    "low temperature": shaped(temperature=0.5),
    "high temperature": shaped(temperature=2.5),
    "top-k": shaped(top_k=2),
    "top-p": shaped(top_p=0.8),
    "min-p": shaped(min_p=0.25),
    "repetition penalty": shaped(repetition_penalty=1.8),
    "every shape at once": shaped(temperature=1.5, top_k=3, top_p=0.95, min_p=0.05, repetition_penalty=1.3),
    "a greedy draft": Toy(draft_processing=Processing(Sampling())),
    "a draft of another temperature": Toy(draft_processing=Processing(Sampling(temperature=0.4))),
    "a draft vocabulary": Toy(draft=draft_vocabulary(0, 2)),
    "a draft vocabulary of one token": Toy(draft=draft_vocabulary(3)),
    "a draft vocabulary under top-p": Toy(
        draft=draft_vocabulary(0, 1, 3), processing=Processing(Sampling(1.0, top_p=0.9, repetition_penalty=1.3))
    ),
}  # fmt: skip


@pytest.mark.parametrize("length", [1, 2, 3, 4])
@pytest.mark.parametrize("name", TOYS)
def test_many_rounds_follow_the_target(name, length):
    toy = TOYS[name]
    p_tables, q_tables = toy.target_laws(length + 1), toy.draft_laws(length)
    found, kept = play(p_tables, q_tables, seed=length)
    assert p_value(found, joint_law(p_tables)) > PASSES
    if name == "the same chain":
        assert (kept == length).all()
    if name == "disjoint supports":
        assert (kept == 0).all()


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_drafts_copied_from_the_prompt_follow_the_target(length):
    p_tables = Toy().target_laws(length + 1)
    found, _ = play(p_tables, prompt_lookup_laws(length), seed=length)
    assert p_value(found, joint_law(p_tables)) > PASSES


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_rounds_of_unequal_draft_lengths_follow_the_target(length):
    def any_count(draft, _q):
        return torch.arange(len(draft)) % (length + 1)

    toy = Toy()
    p_tables = toy.target_laws(length + 1)
    found, kept = play(p_tables, toy.draft_laws(length), seed=length, counts=any_count)
    assert (kept <= any_count(kept, None)).all()
    assert p_value(found, joint_law(p_tables)) > PASSES


def test_stopping_before_a_draw_when_the_draft_law_is_unsure_follows_the_target():
    """The right way to be cautious: the decision depends on q, not on the token drawn from it."""

    def confident(_draft, q):
        return (q.amax(-1) >= 0.5).long().cumprod(-1).sum(-1)

    toy = Toy()
    p_tables = toy.target_laws(4)
    found, _ = play(p_tables, toy.draft_laws(3), counts=confident)
    assert p_value(found, joint_law(p_tables)) > PASSES


# -- controls: known biases the test must see ---------------------------------------------------------------


def test_a_residual_without_the_subtraction_is_seen():
    def no_subtraction(draft, q, p, uniforms):
        kept, _ = accept(draft, q, p, uniforms)
        return kept, draw(p[torch.arange(len(p)), kept], uniforms[:, -1])

    toy = Toy()
    p_tables = toy.target_laws(3)
    found, _ = play(p_tables, toy.draft_laws(2), rule=no_subtraction)
    assert p_value(found, joint_law(p_tables)) < FAILS


def test_throwing_away_a_drawn_token_for_its_low_probability_is_seen():
    """Trap 8 of the method notes, with its numbers: .5/.3/.2 becomes .55/.15/.30."""
    p, q = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.2, 0.3, 0.5, 0.0])

    def drop_unlikely(draft, q):
        return (q.gather(-1, draft[..., None])[..., 0] >= 0.4).long().sum(-1)

    p_tables = [p[None], p.expand(TOY_VOCAB, -1)]
    found, _ = play(p_tables, [q[None]], counts=drop_unlikely)
    first = found.view(TOY_VOCAB, TOY_VOCAB).sum(1)
    assert p_value(first, p) < FAILS
    assert p_value(first, torch.tensor([0.55, 0.15, 0.30, 0.0])) > PASSES


def test_a_draft_drawn_from_another_law_than_the_one_declared_is_seen():
    """A warper on one side only: drafts from the plain law, `accept` told the warped one."""
    warped, plain = shaped(top_p=0.8), Toy()
    p_tables = warped.target_laws(3)
    found, _ = play(p_tables, warped.draft_laws(2), drawn_from=plain.draft_laws(2))
    assert p_value(found, joint_law(p_tables)) < FAILS


def test_a_target_left_unwarped_is_seen():
    """A warper on one side only: drafts are warped, verification forgot to."""
    warped, plain = shaped(temperature=0.8), Toy()
    found, _ = play(plain.target_laws(3), warped.draft_laws(2))
    assert p_value(found, joint_law(warped.target_laws(3))) < FAILS


# -- greedy, counts, empty drafts ----------------------------------------------------------------------------


def one_hot(tokens: torch.Tensor, vocab: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(tokens, vocab).double()


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_greedy_acceptance_is_right_for_every_draft_target_and_count(length):
    """Exhaustive over two tokens, against a plain loop; sampling from one-hot laws agrees with it."""
    every = itertools.product(
        itertools.product((0, 1), repeat=length),
        itertools.product((0, 1), repeat=length + 1),
        range(length + 1),
    )
    drafts, targets, counts = (torch.tensor(list(column)) for column in zip(*every, strict=True))
    drafts = drafts.view(len(targets), length).long()
    expected = []
    for draft, target, count in zip(drafts.tolist(), targets.tolist(), counts.tolist(), strict=True):
        kept = 0
        while kept < count and draft[kept] == target[kept]:
            kept += 1
        expected.append([kept, target[kept]])
    assert torch.stack(accept_greedy(drafts, targets, counts), -1).tolist() == expected
    for uniform in (0.0, 0.5, LARGEST):
        uniforms = torch.full(targets.shape, uniform, dtype=torch.float64)
        sampled = accept(drafts, one_hot(drafts, 2), one_hot(targets, 2), uniforms, counts)
        assert torch.stack(sampled, -1).tolist() == expected
    full = counts == length
    uncounted = torch.stack(accept_greedy(drafts[full], targets[full]), -1)
    assert uncounted.tolist() == [row for row, is_full in zip(expected, full, strict=True) if is_full]


def test_an_empty_draft_takes_the_next_token_from_the_target():
    no_draft, no_law = torch.empty(0, dtype=torch.long), torch.empty(0, 3)
    for uniform, token in ((0.0, 1), (0.24, 1), (0.26, 2), (LARGEST, 2)):
        uniforms = torch.tensor([uniform], dtype=torch.float64)
        kept, following = accept(no_draft, no_law, torch.tensor([[0.0, 0.25, 0.75]]), uniforms)
        assert (int(kept), int(following)) == (0, token)
    kept, following = accept_greedy(no_draft, torch.tensor([2]))
    assert (int(kept), int(following)) == (0, 2)


def test_rows_of_any_leading_shape_are_judged_one_by_one():
    generator = torch.Generator().manual_seed(0)
    rand = {"dtype": torch.float64, "generator": generator}
    q, p = torch.rand(2, 5, 3, 4, **rand).softmax(-1), torch.rand(2, 5, 4, 4, **rand).softmax(-1)
    draft, uniforms = torch.randint(4, (2, 5, 3), generator=generator), torch.rand(2, 5, 4, **rand)
    counts = torch.randint(4, (2, 5), generator=generator)
    together = accept(draft, q, p, uniforms, counts)
    greedy = accept_greedy(draft, p.argmax(-1), counts)
    for at in itertools.product(range(2), range(5)):
        cut = counts[at]
        alone = accept(draft[at][:cut], q[at][:cut], p[at][: cut + 1], uniforms[at][[*range(cut), -1]])
        assert [x[at] for x in together] == [*alone]
        alone = accept_greedy(draft[at][:cut], p[at][: cut + 1].argmax(-1))
        assert [x[at] for x in greedy] == [*alone]
