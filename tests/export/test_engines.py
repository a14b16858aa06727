"""Exports in the engines they are for. `benchmarks/peers/environments.sh FOLDER` installs those; then
`LAYERSKIP_ENGINES=FOLDER pytest -m external`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGINES = os.environ.get("LAYERSKIP_ENGINES", "")
NEAR = 0.1  # kept drafts are few here, and an engine may draft once more or less at an end

pytestmark = [pytest.mark.external, pytest.mark.model]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """By artefact: what engines.py prints of each engine that is there."""
    command = [
        sys.executable, ROOT / "benchmarks" / "engines.py", "--model", "smollm2-135m-base", "--exit-layer", "29",
        "--draft-length", "3", "--limit", "3", "--max-new-tokens", "32",
        "--work", tmp_path_factory.mktemp("exports"), "--llama-server", Path(ENGINES) / "llama",
    ]  # fmt: skip
    if (python := Path(ENGINES) / "vllm" / "bin" / "python").exists():
        command += ["--vllm", python]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {row["artefact"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("artefact", ["draft", "custom-generate", "gguf", "gguf, with its draft"])
def test_an_engine_writes_what_ours_writes(rows, artefact):
    equal = rows[artefact]["equal"]
    assert equal["same"] == equal["of"] == 3


@pytest.mark.parametrize("artefact", ["draft", "gguf, with its draft", "vllm, with its draft"])
def test_an_engine_keeps_as_many_drafts_as_ours(rows, artefact):
    if artefact not in rows and artefact.startswith("vllm"):
        pytest.skip("no environment with vLLM")
    assert rows[artefact]["acceptance"] == pytest.approx(rows["the checkpoint"]["acceptance"], abs=NEAR)
