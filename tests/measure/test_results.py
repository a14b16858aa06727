"""Result files: no path gets in, a row stays a line, a folder that cannot be written is an error."""

import json
from pathlib import Path

import pytest
import torch

from layerskip.errors import UserError
from layerskip.measure.results import configuration, named, save

MADE = {"configuration": {"date": "2026-01-01"}}


def test_files_and_folders_appear_by_their_last_name_and_other_text_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"data": tmp_path / "a.jsonl", "models": [f"{tmp_path}/", "org/name"], "text": "a/b" * 2000}
    told = configuration(given, torch.device("cpu"))
    assert (told["data"], told["models"], told["text"]) == (
        "a.jsonl",
        [tmp_path.name, "org/name"],
        given["text"],
    )
    assert named({"here": Path()}) == {"here": tmp_path.name}
    assert told["device"] == "cpu"
    assert json.dumps(told)


def test_a_row_of_plain_values_is_a_line_and_text_keeps_its_brackets(tmp_path):
    result = {"rows": [[1, None, "x"], ["[a,\n b]", '"]']], "of": [{"n": 1}], **MADE}
    file = save(result, tmp_path, "bench", "org/model")
    assert file.name == "bench_org-model_2026-01-01.json"
    written = file.read_text()
    assert json.loads(written) == result
    assert '[1, null, "x"],\n' in written
    assert '["[a,\\n b]", "\\"]"]\n' in written


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        save(MADE, tmp_path / "none", "bench")
