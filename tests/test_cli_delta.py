"""The verb pack-delta, in process: what it prints, carries along, refuses."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from layerskip.checkpoint.delta import read_delta


@pytest.fixture
def tuned(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "tuned")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name] + weights[name].mean(1, keepdim=True)
    save_file(weights, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    return tmp_path / "tuned"


def test_what_was_kept_is_shown_for_people_and_for_machines(run, folder, tuned, tmp_path):
    (tmp_path / "about.json").write_text('{"data": "counting"}')
    file = tmp_path / "d.safetensors"
    words = ("pack-delta", folder, tuned, "--output", file, "--about", tmp_path / "about.json")
    code, printed, message = run(*words, "--size-mb", 0.1)
    assert code == 0, message
    assert "layers.*.mlp.up_proj" in printed
    assert "100% of the squared change" in printed
    head, _ = read_delta(file)
    assert (head["base"], head["about"]["data"]) == (folder.name, "counting")
    code, printed, _ = run(*words, "--json")
    report = json.loads(printed)
    assert (code, report["file"], report["bytes"]) == (0, "d.safetensors", file.stat().st_size)
    assert report["kept"] > 0.999
    assert str(tmp_path) not in printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--output", "d.bin"), "is not named .safetensors"),
        (("--output", "none/d.safetensors"), "no folder none"),
        (("--output", "d.safetensors", "--size-mb", 0), "size-mb is 0"),
        (("--output", "d.safetensors", "--about", "none.json"), "cannot read none.json"),
        (("--output", "d.safetensors", "--about", "list.json"), "not a JSON object"),
    ],
)
def test_slips_are_refused_before_anything_is_fetched(run, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[]")
    code, _, message = run("pack-delta", "no-model", "no-other", *words)
    assert code == 2
    assert expected in message
