"""The verb export: folders that appear whole, and that their engines open."""

import json
import os
import shutil
import subprocess

import pytest
import torch
import transformers

import layerskip
from layerskip.export import targets
from layerskip.export.names import TARGETS


@pytest.fixture(scope="module")
def drafting(folder, tmp_path_factory):
    """A checkpoint that names its exit."""
    made = tmp_path_factory.mktemp("named") / "talker"
    shutil.copytree(folder, made)
    config = json.loads((made / "config.json").read_text())
    entry = {"exits": [2], "exit_layer": 2, "draft_length": 3}
    (made / "config.json").write_text(json.dumps(config | {"layerskip": entry}))
    return made


def exported(run, model, to, output, *more):
    code, out, err = run("export", model, "--to", to, "--output", output, "--json", *more)
    assert code == 0, err
    return json.loads(out)


def test_names_and_writers_are_the_same():
    assert {*TARGETS} == {*targets.WRITERS}


def test_hf_is_the_folder_byte_for_byte(run, drafting, tmp_path):
    beside = ("optimizer.pt", "run.json", "notes.txt", "credentials.json")
    for name in beside:
        (drafting / name).write_bytes(b"no part of a model")
    told = exported(run, drafting, "hf", tmp_path / "out")
    assert not {*beside} & {*told["files"]}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {*told["files"]}
    for name in told["files"]:
        assert (tmp_path / "out" / name).read_bytes() == (drafting / name).read_bytes()


def test_a_draft_helps_transformers_and_changes_nothing(run, drafting, tmp_path):
    told = exported(run, drafting, "draft", tmp_path / "draft")
    assert told["exit_layer"] == 2
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, draft = load(drafting).eval(), load(tmp_path / "draft").eval()
    ids = torch.tensor([[5, 9, 20, 33]])
    plain = model.generate(ids, max_new_tokens=24, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=24, do_sample=False, assistant_model=draft), plain)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "draft").chat_template


def test_gguf_has_both_models(run, drafting, tmp_path):
    told = exported(run, drafting, "gguf", tmp_path / "out", "--type", "q8_0")
    assert [*told["files"]] == ["talker-first-2-q8_0.gguf", "talker-q8_0.gguf"]
    assert "--draft-max 3" in told["use"][1]


def test_vllm_has_both_folders_and_the_command(run, drafting, folder, tmp_path):
    told = exported(run, drafting, "vllm", tmp_path / "out")
    assert {"model/config.json", "draft/config.json", "serve.sh"} <= {*told["files"]}
    how = json.loads(told["serves"].split("'")[1])
    assert how == {"method": "draft_model", "model": "draft", "num_speculative_tokens": 3}
    assert (tmp_path / "out" / "draft").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out" / "serve.sh").stat().st_mode & 0o111
    told = exported(run, folder, "vllm", tmp_path / "other")
    assert json.loads(told["serves"].split("'")[1])["method"] == "ngram"
    assert "--exit-layer E (1 to 4)" in told["note"]


def test_transformers_generates_with_the_exported_code(run, drafting, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    exported(run, drafting, "custom-generate", tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[5, 9, 20, 33]])
    plain = model.generate(ids, max_new_tokens=24, do_sample=False)
    seen, real = [], layerskip.custom_generate_with
    monkeypatch.setattr(
        layerskip, "custom_generate_with", lambda **how: seen.append(how) or real(**how), raising=False
    )
    given = {"custom_generate": str(tmp_path / "out"), "trust_remote_code": True, "drafter": "exit"}
    found = model.generate(ids, max_new_tokens=24, do_sample=False, **given)
    assert torch.equal(found, plain)
    assert seen == [{"streamer": None, "draft_length": None, "drafter": "exit"}]


def test_names_are_quoted_and_commands_run_from_anywhere(run, drafting, tmp_path):
    place = tmp_path / "it's; touch bad"
    told = exported(run, drafting, "vllm", place)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vllm").write_text('#!/bin/sh\npwd; printf "%s\\n" "$@"\n')
    (tmp_path / "bin" / "vllm").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        told["use"][0], shell=True, cwd="/", env={"PATH": path}, capture_output=True, text=True
    )
    where, *words = done.stdout.strip().split("\n")
    assert where == str(place)
    assert words[:3] == ["serve", "model", "--speculative-config"]
    assert json.loads(words[3])["model"] == "draft"
    assert not (tmp_path / "bad").exists()
    told = exported(run, drafting, "draft", tmp_path / "a 'b'")
    assert eval(told["use"][0].split("from_pretrained")[1]) == str(tmp_path / "a 'b'")


def test_wishes_that_a_target_does_not_know_are_refused(run, drafting, tmp_path):
    for more, says in (
        (("--to", "hf", "--exit-layer", "2"), "no draft"),
        (("--to", "vllm", "--type", "f32"), "--type"),
    ):
        code, _, err = run("export", drafting, "--output", tmp_path / "out", *more)
        assert code == 2
        assert says in err


def test_nothing_half_written_is_left(run, drafting, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", broken)
    code, _, err = run("export", drafting, "--to", "hf", "--output", tmp_path / "out")
    assert code == 2
    assert "disk is full" in err
    assert [*tmp_path.iterdir()] == []


def test_what_is_there_already_stays(run, drafting, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    code, _, err = run("export", drafting, "--to", "hf", "--output", tmp_path / "out")
    assert code == 2
    assert "is there already" in err
    assert (tmp_path / "out" / "mine").read_text() == "mine"
