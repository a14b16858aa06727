"""The notebook of the documents has been run, is small, and says the same when it is run again."""

import json
import re
from pathlib import Path

import pytest

from layerskip.checkpoint import resolve as hub

ROOT = Path(__file__).parent.parent
STORY = ROOT / "docs" / "story.ipynb"
LARGEST = 500_000  # bytes: GitHub shows it, and a clone stays small


def cells():
    return [cell for cell in json.loads(STORY.read_text())["cells"] if cell["cell_type"] == "code"]


def test_every_cell_of_the_story_has_been_run_in_order_and_none_failed():
    assert [cell["execution_count"] for cell in cells()] == list(range(1, len(cells()) + 1))
    outputs = [output for cell in cells() for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 7
    said = "".join("".join(output.get("text", "")) for output in outputs)
    assert said.count(": equal, ") == 5
    assert "DIFFERS" not in said


def test_the_story_is_small_and_has_no_path_or_warning_of_a_machine():
    assert STORY.stat().st_size < LARGEST
    for cell in cells():
        assert "execution" not in cell["metadata"], "times of day change with every run"
        for output in cell["outputs"]:
            assert output.get("name") != "stderr"
            output.get("data", {}).pop("image/png", None)
            assert not re.search(r"/(home|root|work|tmp|Users)/\w+|Warning", json.dumps(output))


@pytest.mark.model
@pytest.mark.slow
def test_the_story_runs_and_prints_the_same_again(monkeypatch):
    """Token texts and equality; on another kind of machine roundings differ, so there equality alone."""
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    if hub.cached("smollm2-135m") is None:
        pytest.skip("the built-in model is not in the cache folder (`make demo` puts it there)")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import story

    kept, again = nbformat.read(STORY, as_version=4), story.executed()
    before, now = story.printed(kept, "same"), story.printed(again, "same")
    assert len(now) == 4
    if story.machine() == kept.metadata["layerskip"]:
        assert now == before
    for said in (before, now):
        whole = "".join(said.values())
        assert "byte for byte: True" in whole
        assert whole.count(": equal, ") == 5
        assert "DIFFERS" not in whole
        assert "the same seed again, equal: True" in whole
