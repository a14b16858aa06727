"""The script that makes the built-in model, once through at its smallest size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import layerskip
from layerskip.checkpoint import resolve as hub

ROOT = Path(__file__).parent.parent


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a bash script")
def test_the_whole_pipeline_runs_and_goes_on_where_it_was_stopped(tmp_path):
    if hub.cached("smollm2-135m-base") is None:
        pytest.skip("the built-in model is not in the cache folder (`make demo` puts it there)")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "2",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [
        "bash",
        str(ROOT / "scripts" / "make_builtin.sh"),
        "--smoke",
        "--work",
        str(tmp_path),
        "--data",
        "none",
    ]
    for _ in range(2):  # the second time nothing is left to train
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "smollm2-135m.safetensors").stat().st_size <= 12_000_000
    lm = layerskip.load(str(tmp_path / "model"), dtype="float32")
    assert lm.facts.trained
    assert lm.facts.exit_adapter == "exit_adapter.safetensors"
    base = hub.cached("smollm2-135m-base") / "model.safetensors"
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == base.read_bytes()
    plain, drafted = (
        lm.generate("The capital", mode=mode, max_new_tokens=12, **options).tokens
        for mode, options in (("ar", {}), ("self-speculative", {"drafter": "exit"}))
    )
    assert plain == drafted
    sources = json.loads((tmp_path / "prompts" / "sources.json").read_text())
    card = (tmp_path / "smollm2-135m.md").read_text()
    assert all(source["source"] in card and source["licence"] in card for source in sources)
