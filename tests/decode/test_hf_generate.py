"""Inside `model.generate` of transformers: the same output."""

import copy
import itertools

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    NoRepeatNGramLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
)
from transformers.generation import GenerateDecoderOnlyOutput

import tiny
from hf_calls import NEW, ONE, RAGGED, L, greedy, masked, own, plain
from layerskip import LanguageModel, UserError, custom_generate, custom_generate_with
from layerskip.decode.load import stack_of
from layerskip.model.cost import RowCosts

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")


@pytest.fixture(scope="module")
def model():
    return tiny.calibrated("llama")


@pytest.fixture(scope="module")
def texts():
    model, tokenizer = tiny.speaking()
    return LanguageModel(stack_of(model), tokenizer, hf=model)


# -- greedy output is that of `generate` ---------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2", "opt"])
def test_greedy_output_is_that_of_generate_for_a_single_row_and_a_padded_batch(family):
    model = tiny.calibrated(family)
    for ids in (ONE, RAGGED):
        assert torch.equal(own(model, ids), plain(model, ids))


def test_drafts_come_from_the_exit_and_num_assistant_tokens_is_their_number(model):
    counters = stack_of(model).counters
    for asked, drafted in ((3, 3), (6, 6), (None, 4), (20, 4)):  # transformers itself fills in 20
        counters.reset()
        assert torch.equal(own(model, num_assistant_tokens=asked), greedy())
        assert counters.runs[2, L, drafted + 1] > 1
    counters.reset()
    assert torch.equal(own(model, generate=custom_generate_with(draft_length=12)), greedy())
    assert counters.runs[2, L, 13] == 1


def test_without_an_exit_layer_tokens_are_copied(model, monkeypatch):
    """Prompt lookup is what any model gains by; its number of tokens is that of transformers."""
    free = RowCosts(((1, 1.0), (64, 1.0)))
    monkeypatch.setattr("layerskip.decode.language_model.measured_row_costs", lambda stack: free)
    counters = stack_of(model).counters
    for how, longest in (({}, 17), ({"prompt_lookup_num_tokens": 2}, 3)):
        counters.reset()
        for _ in range(5):  # the clock has a say in each
            ids = model.generate(**masked(ONE), max_new_tokens=NEW, custom_generate=custom_generate, **how)
            assert torch.equal(ids, greedy())
        widths = [width for _, _, width in counters.runs if width != len(ONE[0])]
        assert 1 < max(widths) <= longest


def test_with_the_drafter_off_decoding_is_plain(model):
    counters = stack_of(model).counters
    counters.reset()
    ids = model.generate(
        **masked(ONE), max_new_tokens=NEW, custom_generate=custom_generate_with(drafter="off")
    )
    assert torch.equal(ids, greedy())
    assert counters.runs == {(0, L, 4): 1, (0, L, 1): NEW - 1}


def ends():
    """Tokens that end the rows of RAGGED, at different lengths and before the budget."""
    new = greedy(padded=True)[:, RAGGED.shape[1] :]
    return [new[0, 5].item(), new[1, 9].item(), new[2, 12].item()]


def test_finished_rows_are_padded_as_in_generate(model):
    for eos in (ends()[0], ends(), ends()[::-1]):
        for pad in (0, None):  # without a pad token, the first eos id pads
            wanted = plain(model, RAGGED, eos_token_id=eos, pad_token_id=pad)
            assert (wanted.shape[1] < RAGGED.shape[1] + NEW) == isinstance(eos, list)
            assert torch.equal(own(model, RAGGED, eos_token_id=eos, pad_token_id=pad), wanted)


def test_the_end_of_sequence_of_the_generation_config_counts(model):
    marked = copy.deepcopy(model)
    for pad in (0, None):
        marked.generation_config.eos_token_id, marked.generation_config.pad_token_id = ends(), pad
        wanted = plain(marked, RAGGED)
        assert wanted.shape[1] < RAGGED.shape[1] + NEW
        assert torch.equal(own(marked, RAGGED), wanted)


class ForbidMultiples(LogitsProcessor):
    """A caller's processor: writes in place, and looks at the padded prefix."""

    def __call__(self, input_ids, scores):
        scores[:, :: 2 + input_ids.shape[1] % 3] = -torch.inf
        return scores


def allowed_tokens(batch_id, ids):
    """Other tokens for each row, and for each position of it."""
    return [batch_id * 20 + (len(ids) * 7 + i) % 20 for i in range(5)]


PROCESSING = {
    "repetition penalty": {"repetition_penalty": 1.5},
    "n-grams": {"no_repeat_ngram_size": 2},
    "prompt penalty": {"encoder_repetition_penalty": 1.5},
    "prompt n-grams": {"encoder_no_repeat_ngram_size": 1},
    "minimum": {"min_new_tokens": 12},
    "bad words": {"bad_words_ids": [[14], [31, 62], [51]]},
    "forced end": {"forced_eos_token_id": 2, "eos_token_id": None},
    "bias": {"sequence_bias": [[[62], 4.0], [[31, 14], 9.0]]},
    "decay": {"exponential_decay_length_penalty": (5, 1.3)},
    "suppressed": {"begin_suppress_tokens": [52, 14, 51], "suppress_tokens": [31]},
    "a list": {"logits_processor": LogitsProcessorList([NoRepeatNGramLogitsProcessor(1), ForbidMultiples()])},
    "a function": {"prefix_allowed_tokens_fn": allowed_tokens, "eos_token_id": None},
    "several": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "bad_words_ids": [[14]]},
}


@pytest.mark.parametrize("name", PROCESSING)
def test_logits_processors_act_as_in_generate(model, name):
    """Rows are processed one at a time, so a processor that holds something for each row is bound to its own."""
    options, matters = {"eos_token_id": ends(), **PROCESSING[name]}, False
    for ids in (ONE, RAGGED):
        wanted = plain(model, ids, **options)
        matters |= not torch.equal(wanted, plain(model, ids, eos_token_id=options["eos_token_id"]))
        assert torch.equal(own(model, ids, **options), wanted)
    assert matters


class StopAfter(StoppingCriteria):
    """Stop a row when it has `count` tokens of an even id."""

    def __init__(self, count):
        self.count = count

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids.ne(0) & input_ids.remainder(2).eq(0)).sum(1) >= self.count


@pytest.mark.parametrize("count", [3, 6, 9])
def test_stopping_criteria_stop_where_generate_stops(model, count):
    criteria = StoppingCriteriaList([StopAfter(count)])
    assert torch.equal(own(model, stopping_criteria=criteria), plain(model, stopping_criteria=criteria))
    options = {"stopping_criteria": criteria, "eos_token_id": ends()}
    assert torch.equal(own(model, RAGGED, **options), plain(model, RAGGED, **options))


def test_a_callers_own_length_and_eos_criteria_replace_those_of_the_config(model):
    """`generate` drops its own criterion of a kind when the caller brings one; ours were read from the config."""
    token = greedy()[0, 10].item()
    for criterion in (MaxLengthCriteria(9), MaxLengthCriteria(2), EosTokenCriteria(token)):
        criteria = StoppingCriteriaList([criterion])
        wanted = plain(model, stopping_criteria=criteria)
        assert wanted.shape[1] < greedy().shape[1]
        assert torch.equal(own(model, stopping_criteria=criteria), wanted)


def test_criteria_without_an_end_of_sequence_are_refused_for_a_batch(model):
    """`generate` then lets finished rows run on until all are finished, which nobody wants."""
    with pytest.raises(UserError, match="without an end-of-sequence token"):
        own(model, RAGGED, stopping_criteria=StoppingCriteriaList([StopAfter(3)]))


def test_length_may_be_given_as_max_length_or_max_new_tokens_or_not_at_all(model):
    for options in (
        {"max_new_tokens": None, "max_length": 17},
        {"max_new_tokens": None},
        {"max_new_tokens": 1},
    ):
        for ids in (ONE, RAGGED):
            assert torch.equal(own(model, ids, **options), plain(model, ids, **options))


def test_an_inferred_mask_is_that_of_generate(model):
    options = {"max_new_tokens": NEW, "custom_generate": custom_generate, "assistant_early_exit": 2}
    assert torch.equal(model.generate(RAGGED, **options), greedy(padded=True))


def test_a_dictionary_is_returned_when_asked_for(model):
    outcome = own(model, RAGGED, return_dict_in_generate=True)
    assert isinstance(outcome, GenerateDecoderOnlyOutput)
    assert torch.equal(outcome.sequences, greedy(padded=True))


# -- sampling ------------------------------------------------------------------------------------------------


def test_sampling_is_repeatable_under_the_global_seed(model):
    def draw(seed, **options):
        torch.manual_seed(seed)
        return own(model, RAGGED, do_sample=True, **options)

    options = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
    assert torch.equal(draw(1, **options), draw(1, **options))
    assert not torch.equal(draw(1, **options), draw(2, **options))
    assert torch.equal(draw(3, top_k=1), greedy(padded=True)), "the warpers reach both laws"
    torch.manual_seed(5)
    before = torch.get_rng_state()
    own(model)
    assert torch.equal(torch.get_rng_state(), before), "greedy decoding draws nothing"


def test_rows_of_one_prompt_are_drawn_apart_and_obey_the_law_of_generate():
    """Third tokens of 200 rows, the second and third drafted, against the law computed by summing over paths."""
    small = tiny.random_model("llama", vocab_size=8)
    ids = torch.tensor([[3, 5]])
    warper = TemperatureLogitsWarper(3.0)

    @torch.no_grad()
    def law(prefixes):
        return warper(prefixes, small(prefixes).logits[:, -1]).softmax(-1)  # [N, 8]

    paths = torch.cartesian_prod(torch.arange(8), torch.arange(8))  # [64, 2]
    first = law(ids)[0]
    second = law(torch.cat([ids.repeat(8, 1), torch.arange(8)[:, None]], 1))
    third = law(torch.cat([ids.repeat(64, 1), paths], 1))
    exact = ((first[:, None] * second).flatten()[:, None] * third).sum(0)
    torch.manual_seed(0)
    rows = own(small, ids.repeat(200, 1), do_sample=True, temperature=3.0, top_k=0, max_new_tokens=3)
    seen = torch.bincount(rows[:, -1], minlength=8) / len(rows)
    assert (seen - exact).abs().sum() / 2 < 0.12  # 200 draws of 8 values are expected about 0.07 away


def test_several_return_sequences_need_plain_decoding(model):
    """transformers itself refuses `num_return_sequences` with any assistant; without an exit it is honoured."""
    options = {"do_sample": True, "num_return_sequences": 3}
    with pytest.raises(ValueError, match="num_return_sequences"):
        own(model, **options)
    rows = plain(model, custom_generate=custom_generate, **options)
    assert rows.shape == (3, ONE.shape[1] + NEW)
    assert not torch.equal(rows[0], rows[1])


# -- what transformers does not pass on ----------------------------------------------------------------------


class Recorder:
    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, value):
        assert not self.ended
        self.seen.append(value.tolist())

    def end(self):
        self.ended = True


def test_a_streamer_sees_the_prompt_then_every_token_then_the_end(model):
    streamer = Recorder()
    ids = own(model, generate=custom_generate_with(streamer=streamer))
    assert torch.equal(ids, greedy())
    prompt, *rounds = streamer.seen
    assert prompt == ONE.tolist()
    assert [*itertools.chain(*rounds)] == ids[0, 4:].tolist()
    assert max(map(len, rounds)) > 1, "rounds come whole"
    assert streamer.ended


def test_a_streamer_of_transformers_shows_the_text_of_its_own_decoding(texts):
    ids = torch.tensor([texts.encode("hello")])
    streamer = TextIteratorStreamer(texts.tokenizer, skip_prompt=True, skip_special_tokens=True)
    new = own(texts.hf, ids, custom_generate_with(streamer=streamer))[0, 5:]
    assert "".join(streamer) == texts.tokenizer.decode(new, skip_special_tokens=True)


def test_a_streamer_shows_one_row_and_is_left_alone_by_refused_calls(model):
    streamer = Recorder()
    with pytest.raises(UserError, match="one row"):
        own(model, RAGGED, custom_generate_with(streamer=streamer))
    with pytest.raises(UserError, match="out of range"):
        own(model, ONE, custom_generate_with(streamer=streamer), exit_layer=L)
    assert streamer.seen == []


def test_stop_strings_stop_where_those_of_transformers_stop(texts):
    ids = torch.tensor([texts.encode("hello")])
    text = texts.tokenizer.decode(plain(texts.hf, ids)[0, 5:])
    readable = [text[at : at + 2] for at in range(len(text) - 1) if text[at : at + 2].isascii()]
    for stop in (readable[0], readable[len(readable) // 2], readable):
        bound = custom_generate_with(tokenizer=texts.tokenizer, stop_strings=stop)
        wanted = plain(texts.hf, ids, tokenizer=texts.tokenizer, stop_strings=stop)
        assert torch.equal(own(texts.hf, ids, bound), wanted)
        assert wanted.shape[1] < 5 + NEW


def test_stop_strings_need_a_tokenizer(model):
    with pytest.raises(UserError, match="tokenizer"):
        custom_generate_with(stop_strings=["x"])
    with pytest.raises(ValueError, match="tokenizer"):  # given to `generate`, transformers says so
        own(model, stop_strings=["x"])
