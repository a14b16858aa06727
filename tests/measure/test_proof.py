"""The proof of losslessness: settings cover all pairs, laws are told apart, and one broken line is found."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch

import tiny
from layerskip.checkpoint.facts import Facts
from layerskip.decode import sampling
from layerskip.decode.language_model import LanguageModel
from layerskip.decode.rounds.host import HostRounds
from layerskip.errors import UserError
from layerskip.measure.proof import cases as settings
from layerskip.measure.proof import certificate, laws, stability
from layerskip.measure.proof.cases import Case, Clock, covering, decoded, read_case
from layerskip.measure.proof.equality import (
    DIFFERS,
    HOLDS,
    NEAR_TIES,
    NO_CLAIM,
    NO_POWER,
    NOT_RUN,
    Equality,
    Gap,
    bisected,
    first_difference,
)
from layerskip.model.huggingface import HuggingFaceStack
from layerskip.model.native.bfloat16 import compiles_bfloat16
from layerskip.watch import silent

PROMPTS = [[5, 9, 20, 33], list(range(7, 18)), [40]]
FOREVER = Clock(float("inf"))
CASE = Case(2, 3)


def model_of(family="llama+native", dtype=torch.float32):
    return LanguageModel(tiny.stack(family, dtype))


@pytest.fixture(scope="module")
def lm():
    return model_of()


def misplaced(monkeypatch, kind):
    """Shift the rotary positions by one in the late layers of a verification: one line, as it could be written."""
    run = kind.run

    def shifted(stack, h, start, stop, step, cache, taps=()):
        late = start > 0 and step.width > 1 and (not step.starts or step.starts[0] > 0)
        step = replace(step, positions=step.positions + 1, shared={}) if late else step
        return run(stack, h, start, stop, step, cache, taps)

    monkeypatch.setattr(kind, "run", shifted)


# -- settings ------------------------------------------------------------------------------------------------


def test_every_pair_of_values_occurs_in_a_case_and_every_value_in_the_short_list():
    values = [(1, 2, 3), "ab", (True, False), "xyzw"]
    pairs = {pair for cell in covering(values, 2) for pair in itertools.combinations(enumerate(cell), 2)}
    wanted = {
        pair for cell in itertools.product(*values) for pair in itertools.combinations(enumerate(cell), 2)
    }
    assert pairs == wanted
    assert len(covering(values, 1)) == 4


def test_settings_come_by_their_work_and_vary_in_everything_asked_for(lm):
    lm.facts = Facts(exits=(3,), exit_layer=3, draft_length=2)
    try:
        made = settings.cases(lm)
    finally:
        lm.facts = Facts()
    assert [case.work for case in made] == sorted(case.work for case in made)
    assert {case.exit_layer for case in made} == {1, 2, 3, 4}
    assert {case.draft_length for case in made} == {1, 2, 4, 8}
    assert {case.draft_vocab for case in made} == {"off", tiny.VOCAB // 4}
    assert {(case.policy, case.guard) for case in made} == {*settings.POLICIES}
    assert {(case.on_device, case.rows) for case in made} == {*itertools.product((True, False), (1, 3))}
    assert len(made) < 30


def test_a_case_is_read_as_it_was_written_and_slips_are_refused():
    from layerskip.measure.proof.equality import Counterexample

    case = Case(2, 4, 16, "adaptive", True, on_device=True, rows=3)
    failure = Counterexample(case, [[1, 2], [3]], 7, [], [])
    assert read_case(failure.spelled()) == (case, [[1, 2], [3]], 7)
    for text in ("{", "[]", '{"prompts": [[1]]}', '{"prompts": ["a"], "max_new_tokens": 1, "exit_layer": 1}',
                 '{"prompts": [[1]], "max_new_tokens": 1, "exit_layer": 1, "draft_lenght": 2}'):  # fmt: skip
        with pytest.raises(UserError, match="--case"):
            read_case(text)


def test_bisection_finds_a_small_number_that_fails():
    assert bisected(40, lambda n: n >= 7) == 7
    assert bisected(40, lambda n: False) == 40
    assert bisected(1, lambda n: True, least=2) == 1


def test_a_clock_lets_a_part_run_until_its_share_is_over():
    now = [0.0]
    clock = Clock(10, now=lambda: now[0])
    assert not clock.until(0.5).over
    now[0] = 5.0
    assert clock.over
    assert not clock.until(1.0).over


# -- greedy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama+native"])
def test_nothing_differs_on_a_sound_model(family):
    lm = model_of(family)
    found = Equality(lm, PROMPTS, 8).check(settings.cases(lm), FOREVER)
    assert found.verdict == HOLDS, found
    assert found.numbers["settings"] == found.numbers["of"]
    assert found.numbers["drafts"]["kept"] > 0


def test_the_time_ends_a_check_between_cases_and_it_says_so(lm):
    found = Equality(lm, PROMPTS, 4).check([CASE, replace(CASE, draft_length=2)], Clock(0))
    assert found.verdict == HOLDS
    assert found.cases.startswith("1 of 2 settings")
    assert found.cut


@pytest.mark.parametrize("family", ["llama", "llama+native"])
def test_a_wrong_position_in_the_late_layers_is_found_with_its_smallest_case(family, monkeypatch):
    lm = model_of(family)
    misplaced(monkeypatch, type(lm.stack))
    equality = Equality(lm, PROMPTS, 16)
    found = equality.check(settings.cases(lm), FOREVER)
    assert found.verdict == DIFFERS
    assert found.numbers["settings"] < found.numbers["of"], "a failing family stops"
    case, prompts, budget = read_case(found.command[1])
    assert found.failure["plain"] != found.failure["own"]
    assert [decoded(lm, prompts, budget, case)] == [found.failure["own"]]
    if len(prompts) == 1 and budget > 2:
        shorter = decoded(lm, prompts, budget - 1, case)
        assert shorter == [decoded(lm, prompts, budget - 1)[0]], "one token less does not fail"


def generous(monkeypatch):
    """Keep one draft more than agreed."""
    judge = HostRounds.judge

    def judged(rounds, rows, drafts, logits):
        verdicts = judge(rounds, rows, drafts, logits)
        return [
            v._replace(kept=min(v.kept + 1, len(d.tokens))) for v, d in zip(verdicts, drafts, strict=True)
        ]

    monkeypatch.setattr(HostRounds, "judge", judged)


def test_one_more_draft_kept_than_agreed_is_found(lm, monkeypatch):
    generous(monkeypatch)
    assert Equality(lm, PROMPTS, 12).check(settings.cases(lm), FOREVER).verdict == DIFFERS


def test_where_16_bit_rounds_otherwise_a_difference_must_sit_at_a_near_tie(monkeypatch):
    """The stack of transformers' modules is not row-exact in bfloat16: near ties are counted, others are lost."""
    lm = model_of("llama", torch.bfloat16)
    equality = Equality(lm, [[i, i + 1, i + 2] for i in range(2, 42, 4)], 24)
    many = [replace(CASE, draft_length=5, rows=10)]
    found = equality.check(many, FOREVER)
    assert found.verdict in (HOLDS, NEAR_TIES)
    assert found.numbers["largest_gap"] <= equality.allowed
    assert found.numbers["differing"] == len(found.numbers["gaps"])
    generous(monkeypatch)
    assert equality.check(many, FOREVER).verdict == DIFFERS


def test_a_gap_is_that_of_the_two_tokens_at_which_outputs_part(lm):
    [plain] = decoded(lm, PROMPTS[:1], 6)
    other = [*plain[:3], plain[3] ^ 1, *plain[4:]]
    gap = Gap.of(lm.stack, 0, PROMPTS[0], plain, other)
    assert gap.position == 3
    assert gap.relative > 0
    assert Gap.of(lm.stack, 0, PROMPTS[0], plain, plain[:4]).relative == 2.0
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1]) == 1


# -- what it rests on ----------------------------------------------------------------------------------------


def test_bits_company_and_repetition_hold_on_a_sound_model(lm):
    equality = Equality(lm, PROMPTS, 8)
    assert stability.bits(lm, PROMPTS[:2], 2, FOREVER, silent).verdict == HOLDS
    assert stability.company(equality, replace(CASE, rows=3)).verdict == HOLDS
    assert stability.twice(equality, CASE).verdict == HOLDS


def test_a_position_whose_bits_depend_on_its_call_is_found_where_they_must_not(monkeypatch):
    if not compiles_bfloat16():
        pytest.skip("no bfloat16 products here")
    lm = model_of("llama+native", torch.bfloat16)
    misplaced(monkeypatch, type(lm.stack))
    found = stability.bits(lm, PROMPTS[:2], 2, FOREVER, silent)
    assert found.verdict == DIFFERS
    assert found.failure["positions_a_call"] == 2
    lm.stack.row_exact = False
    assert stability.bits(lm, PROMPTS[:2], 2, FOREVER, silent).verdict == NO_CLAIM


def test_numbers_that_do_not_repeat_and_rows_that_mix_are_found(lm, monkeypatch):
    equality, calls = Equality(lm, PROMPTS, 8), itertools.count()

    def noisy(uniforms, row, position, purpose, began=0):
        return 0.1 + 0.8 * (next(calls) % 2)

    monkeypatch.setattr(sampling.Uniforms, "at", noisy)
    found = [stability.twice(equality, CASE), stability.company(equality, replace(CASE, rows=3))]
    assert DIFFERS in {one.verdict for one in found}


# -- sampling ------------------------------------------------------------------------------------------------


def law_check(lm, usual=CASE, draws=320):
    others = [Case(1, 2, on_device=True), Case(3, 2, on_device=True)]
    return laws.sampled(lm, PROMPTS, usual, others, draws, FOREVER, silent)


def test_sampled_drafts_obey_the_models_law_and_wrong_laws_are_told_apart(lm):
    found = law_check(lm)
    assert found.verdict == HOLDS, found
    seen = found.numbers["settings"]
    assert [one["on_device"] for one in seen] == [False, True]
    for one in seen:
        assert one["p"] > laws.PASSES
        assert one["outside"] == 0
    for name in ("always kept", "drawn again from p"):
        assert min(one["wrong_laws"][name] for one in seen) < laws.POWER


def swapped(draft, q, p, uniforms, counts=None):
    """Keep where u p < q: the ratio upside down."""
    length = draft.shape[-1]
    return accept(draft, p[..., :length, :], torch.cat([q, p[..., length:, :]], -2), uniforms, counts)


def turned(draft, q, p, uniforms, counts=None):
    """Keep where u q >= p, the comparison turned round: the likely drafts are those that go."""
    kept_at = uniforms[..., :-1] * q.gather(-1, draft[..., None])[..., 0]
    turned_round = kept_at >= p[..., :-1, :].gather(-1, draft[..., None])[..., 0]
    opposite = torch.where(turned_round, 0.0, 2.0)  # 0 is always kept where p > 0, 2 only where p > 2 q
    return accept(draft, q, p, torch.cat([opposite, uniforms[..., -1:]], -1), counts)


accept = sampling.accept


@pytest.mark.parametrize("wrong", [swapped, turned])
@pytest.mark.parametrize("on_device", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_wrong_acceptance_is_found_by_its_law(lm, monkeypatch, wrong, on_device):
    monkeypatch.setattr(sampling, "accept", wrong)
    found = law_check(lm, Case(2, 2, on_device=on_device))
    assert found.verdict == DIFFERS
    assert found.failure["p"] <= laws.PASSES


def test_the_exact_law_is_that_of_a_forward_pass():
    model = tiny.calibrated("llama")
    law = laws.exact_law(LanguageModel(HuggingFaceStack(model)), PROMPTS[0], 2)
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-6)
    first, second = max(law, key=law.get)
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPTS[0], first]])).logits[0, -2:]
    one, two = sampling.warp(logits, laws.LAW)
    assert law[first, second] == pytest.approx(float(one[first] * two[second]), rel=1e-4)


def test_drafts_that_are_always_right_show_nothing(lm, monkeypatch):
    right = {(1, 2): 0.5, (1, 3): 0.5}
    monkeypatch.setattr(laws, "exact_law", lambda *given: {(*pair, 0): mass for pair, mass in right.items()})
    monkeypatch.setattr(laws, "wrong_laws", lambda *given: {"always kept": right})
    monkeypatch.setattr(laws, "telling", lambda lm, prompt, cases: dict.fromkeys(cases, 1.0))
    monkeypatch.setattr(laws, "drawn", lambda *given: Counter({(1, 2, 0): 130, (1, 3, 0): 126}))
    assert law_check(lm).verdict == NO_POWER


# -- the whole -----------------------------------------------------------------------------------------------


def test_a_certificate_of_a_model_in_memory_leaves_out_what_it_cannot_load(lm):
    only = ("twice", "greedy", "float32", "formats")
    result = certificate.certify(lm, PROMPTS, certificate.Scope(4, seconds=0, only=only))
    assert result["holds"]
    assert not result["complete"]
    verdicts = {check["check"]: check["verdict"] for check in result["checks"]}
    assert verdicts["transformers, float32"] == NOT_RUN
    assert verdicts["greedy, float32"] == HOLDS


def test_another_answer_of_transformers_is_a_difference_unless_it_is_a_near_tie(lm):
    ours = Equality(lm, PROMPTS, 6)
    plain = [ours.plain(0), ours.plain(1)]
    assert certificate.against_transformers(ours, [[*plain[0], 9], plain[1]]).verdict == HOLDS
    other = [plain[0][0], plain[0][1] ^ 1, *plain[0][2:]]
    found = certificate.against_transformers(ours, [other, plain[1]])
    assert found.verdict == DIFFERS
    assert found.failure["own"] == plain[0][:2]


def test_an_unknown_check_is_refused():
    with pytest.raises(UserError, match="unknown check 'gredy'"):
        certificate.Scope(only=("gredy",))
