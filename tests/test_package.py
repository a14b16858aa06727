"""The wheel, built and installed into an empty environment: small, complete, quick to import."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    place = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", place, ROOT]
    subprocess.run(command, check=True, capture_output=True, text=True)
    [made] = place.glob("*.whl")
    return made


def test_a_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"layerskip"}
    source = ROOT / "src"
    wanted = {
        path.relative_to(source).as_posix()
        for path in (source / "layerskip").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted <= {*names}
    assert wheel.stat().st_size < 16e6


def test_an_installed_wheel_works_without_the_repository(wheel, folder, tmp_path):
    """Its libraries are those of this environment; the package is the wheel's."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    zipfile.ZipFile(wheel).extractall(site)
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (Path(site) / "zz-libraries.pth").write_text("\n".join(libraries) + "\n")
    command = [python, "-m", "layerskip", "generate", folder, "ab", "--max-new-tokens", "4", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = [python, "-c", "import layerskip; print(layerskip.__file__)"]
    where = subprocess.run(told, capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert where.startswith(site)


def test_importing_is_quick():
    """Not timed here, where others run: what would take the time is not imported."""
    code = "import sys, layerskip, layerskip.cli.main; print([n for n in ('torch', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
