"""What a checkpoint may say about its exits, and what is refused."""

import json

import pytest

import tiny
from layerskip.errors import UserError
from layerskip.model.checkpoint import Facts, facts_of, ranked_vocabulary
from layerskip.model.head import draft_ids


def config(entry):
    made = tiny.config_of("llama")
    made.layerskip = entry
    return made


def test_an_absent_entry_means_untrained_exits_and_published_names_are_known():
    assert not facts_of(tiny.config_of("llama")).trained
    assert facts_of(tiny.config_of("llama"), "facebook/layerskip-llama2-7B") == Facts((8,), 8, 12)


def test_an_entry_sets_the_defaults():
    facts = facts_of(config({"exits": [1, 2], "exit_layer": 2, "draft_length": 6}))
    assert facts.trained
    assert (facts.exit_layer, facts.draft_length) == (2, 6)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"exit": [1]}, "unknown key layerskip.exit"),
        ({"exits": 9}, "names exit 9"),
        ({"exits": [True]}, "names exit True"),
        ({"exit_layer": tiny.NUM_LAYERS}, f"names exit {tiny.NUM_LAYERS}"),
        ({"draft_length": "4"}, "draft_length is '4'"),
        ({"draft_vocab": 7}, "draft_vocab is 7"),
        ("yes", "not an object"),
    ],
)
def test_an_entry_that_cannot_be_right_is_refused(entry, message):
    with pytest.raises(UserError, match=message):
        facts_of(config(entry))


def test_the_draft_vocabulary_is_ranked_by_its_file_and_keeps_the_end_of_sequence(tmp_path):
    facts = Facts(draft_vocab="draft.json")
    (tmp_path / "draft.json").write_text(json.dumps([40, 7, 9, 3]))
    ranked = ranked_vocabulary(tmp_path, facts)
    assert draft_ids(3, 64, ranked, [2]) == [2, 7, 40]
    assert draft_ids(3, 64, None, [2]) == [0, 1, 2]
    (tmp_path / "draft.json").write_text("{}")
    with pytest.raises(UserError, match="not a JSON list"):
        ranked_vocabulary(tmp_path, facts)
    with pytest.raises(UserError, match="the model has 64"):
        draft_ids(65, 64, None, [])
