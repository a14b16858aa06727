"""What a checkpoint may say about its exits, and what is refused."""

import json

import pytest

import tiny
from layerskip.checkpoint.facts import Facts, facts_of, ranked_vocabulary, write_draft_vocabulary
from layerskip.checkpoint.files import write_json
from layerskip.errors import UserError
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


def test_a_draft_vocabulary_shorter_than_asked_goes_on_with_the_lowest_ids():
    assert draft_ids(5, 64, [40, 7], [2]) == [0, 1, 2, 7, 40]
    with pytest.raises(UserError, match="names token 64"):
        draft_ids(3, 64, [1, 64], [])


def test_an_entry_written_into_a_published_checkpoint_keeps_its_default_exit(tmp_path):
    """The table of published checkpoints is read only while there is no entry: a new one must not hide it."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    published = facts_of(tiny.config_of("llama", num_hidden_layers=32), "facebook/layerskip-llama2-7B")
    write_draft_vocabulary(tmp_path, [3, 1], published)
    entry = json.loads((tmp_path / "config.json").read_text())["layerskip"]
    assert entry == {"exits": [8], "exit_layer": 8, "draft_length": 12, "draft_vocab": "draft_vocab.json"}
    assert ranked_vocabulary(tmp_path, Facts(draft_vocab="draft_vocab.json")) == [3, 1]


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(UserError, match="cannot write into"):
        write_draft_vocabulary(tmp_path / "none", [1], Facts())
