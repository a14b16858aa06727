"""What formats cost and gain: measured once, kept where nothing disturbed it, and `auto` chooses by it."""

import json

import pytest

import layerskip
import tiny
from layerskip.decode import load as loading
from layerskip.decode import weight_formats
from layerskip.decode.weight_formats import Worth, as_records, compared, fastest
from layerskip.errors import UserError
from layerskip.model.native.formats import FORMATS


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weight_formats, "busy_cores", lambda seconds: 0.0)
    for part in tiny.speaking():
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_formats_are_compared_once_and_the_model_itself_costs_nothing(folder, monkeypatch):
    asked = []

    def load(name):
        asked.append(name)
        return layerskip.load(folder, dtype="bfloat16", quantize=name, progress=False)

    monkeypatch.setattr(weight_formats, "busy_cores", lambda seconds: 1.5)
    compared(folder, load)  # disturbed: not kept
    monkeypatch.setattr(weight_formats, "busy_cores", lambda seconds: None)
    rows = compared(folder, load)
    assert asked == 2 * [None, *FORMATS]
    assert [row.name for row in rows] == [None, *FORMATS]
    assert rows[0].perplexity_cost == 0.0
    assert all(0 < row.perplexity_cost < 0.5 for row in rows[1:])
    assert all(row.step_bytes < rows[0].step_bytes for row in rows[1:])
    assert compared(folder, None) == rows
    [file] = (folder.parent / "cache" / "formats").glob("worth-*.json")
    file.write_text("[{}]")
    assert [row.name for row in compared(folder, load)] == [None, *FORMATS]


def test_the_fastest_is_chosen_among_those_that_cost_next_to_nothing():
    rows = [Worth(None, 100, 4.0, 0.0), Worth("int8", 50, 2.0, 0.009), Worth("int4", 25, 1.0, 0.011)]
    assert fastest(rows) == "int8"
    assert fastest([rows[0], rows[2]]) is None
    told = as_records(rows, 1e-9)
    assert [row["step_ratio"] for row in told] == [1.0, 2.0, 4.0]
    assert [row["bandwidth_share"] for row in told] == [25.0, 25.0, 25.0]


@pytest.mark.parametrize("chosen", [None, *FORMATS])
def test_auto_loads_what_was_chosen(folder, monkeypatch, chosen):
    monkeypatch.setattr(loading, "compared", lambda path, load: [])
    monkeypatch.setattr(loading, "fastest", lambda rows: chosen)
    assert layerskip.load(folder, quantize="auto", progress=False).stack.quantize == chosen


def test_auto_leaves_alone_what_has_no_formats(folder, monkeypatch):
    monkeypatch.setattr(loading, "compared", None)
    assert layerskip.load(folder, quantize="auto", stack="hf", progress=False).stack.name == "hf"
    exact = layerskip.load(folder, quantize="auto", dtype="float32", progress=False).stack
    assert (str(exact.dtype), exact.quantize) == ("torch.float32", None)
    tiny.random_model("gpt2").save_pretrained(folder.parent / "gpt2")
    assert layerskip.load(folder.parent / "gpt2", quantize="auto", progress=False).stack.name == "hf"


def test_the_verb_tells_all_formats_and_what_auto_takes(run, folder):
    code, printed, _ = run("formats", folder, "--json")
    found = json.loads(printed)
    assert code == 0
    assert [row["name"] for row in found["formats"]] == [None, *FORMATS]
    assert found["auto"] in (None, *FORMATS)
    code, printed, _ = run("formats", folder)
    assert code == 0
    assert f"--quantize auto {'takes int' if found['auto'] else 'leaves'}" in " ".join(printed.split())
    tiny.random_model("gpt2").save_pretrained(folder.parent / "gpt2")
    code, _, message = run("formats", folder.parent / "gpt2")
    assert code == 2
    assert "native stack on the CPU" in message


def test_an_unknown_format_names_those_there_are(folder):
    with pytest.raises(UserError, match="unknown quantisation 'int2'") as error:
        layerskip.load(folder, dtype="bfloat16", quantize="int2", progress=False)
    assert set(FORMATS) <= set(error.value.hint.replace(",", "").split())


def test_doctor_tells_what_was_measured_or_how_to_measure_it(run, folder):
    asked = ("doctor", folder, "--dtype", "bfloat16", "--max-new-tokens", 8, "--limit", 2)
    code, printed, message = run(*asked)
    assert code == 0, message
    assert "layerskip formats MODEL" in " ".join(printed.split())
    assert run("formats", folder)[0] == 0
    code, printed, _ = run(*asked)
    assert "--quantize int4: a plain step" in " ".join(printed.split())
    code, printed, _ = run(
        "bench", folder, "--quantize", "int4", "--limit", 1, "--max-new-tokens", 4, "--json"
    )
    assert code == 0
    assert json.loads(printed)["card"]["perplexity_cost"] > 0
