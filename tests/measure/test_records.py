"""Results that outlive a stop: what is kept is found again, what is of something else is refused."""

import pytest

from layerskip.errors import UserError
from layerskip.measure.records import Records, work_folder


def test_what_was_kept_is_found_again_and_half_a_line_is_cut_off(tmp_path):
    records = Records(tmp_path)
    records.keep({"index": 3, "text": "zwölf\n"})
    records.keep({"index": 1, "text": "\u2028"})
    with records.file.open("a") as file:
        file.write('{"index": 2, "te')
    again = Records(tmp_path)
    assert (
        again.found
        == records.found
        == {3: {"index": 3, "text": "zwölf\n"}, 1: {"index": 1, "text": "\u2028"}}
    )
    again.keep({"index": 2, "text": "x"})
    assert set(Records(tmp_path).found) == {1, 2, 3}


def test_a_key_may_be_several_values_and_the_last_record_of_a_key_counts(tmp_path):
    records = Records(tmp_path, "task", key=("mode", "index"))
    for mode, right in (("ar", False), ("early-exit", False), ("ar", True)):
        records.keep({"mode": mode, "index": 0, "right": right})
    assert {k: v["right"] for k, v in Records(tmp_path, "task", ("mode", "index")).found.items()} == {
        ("ar", 0): True, ("early-exit", 0): False,
    }  # fmt: skip
    assert Records(tmp_path, "other").found == {}


def test_a_damaged_file_is_an_error_that_names_it(tmp_path):
    for content in ("nonsense\n", '{"other": 1}\n', "[]\n"):
        (tmp_path / "records.jsonl").write_text(content)
        with pytest.raises(UserError, match=r"records.jsonl is damaged"):
            Records(tmp_path)


def test_each_setup_has_its_own_folder_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    first, same = (work_folder(None, "text", {"exits": (1, 2), "weights": "a"}) for _ in range(2))
    other = work_folder(None, "text", {"exits": (1, 3), "weights": "a"})
    assert first == same != other
    assert first.parent == tmp_path / "eval"


def test_a_folder_takes_results_of_one_setup_only_and_says_what_differs(tmp_path):
    assert work_folder(tmp_path, "text", {"exits": (1,), "dtype": "float32"}) == tmp_path / "text"
    work_folder(tmp_path, "text", {"exits": (1,), "dtype": "float32"})
    with pytest.raises(UserError, match="results of another run: dtype, exits differ"):
        work_folder(tmp_path, "text", {"exits": (2,), "dtype": "bfloat16"})


def test_a_folder_that_cannot_be_used_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot keep results"):
        work_folder(tmp_path / "file", "text", {})
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "setup.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        work_folder(tmp_path, "text", {})
