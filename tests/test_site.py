"""The site builds without a warning, and its pages are all there."""

import subprocess
import sys
from pathlib import Path

import pytest

import layerskip

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("myst_nb")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {path.stem for path in ROOT.glob("docs/*") if path.suffix in (".md", ".ipynb")}
    assert pages <= {path.stem for path in tmp_path.glob("*.html")}
    story = (tmp_path / "story.html").read_text()
    assert story.count("<img") >= 7, "the pictures of the notebook"
    api = (tmp_path / "api.html").read_text()
    for name in layerskip.__all__:
        assert f"layerskip.{name}" in api or f'id="layerskip.{name}' in api, name
