"""Products give the same bits on every vector unit: this machine's, none, and that of ARM where it can be run."""

import shutil
import subprocess
from pathlib import Path

import pytest

from layerskip.model.native import kernels as compiled

PROGRAM = Path(__file__).with_name("bits.cpp")
FLAGS = ["-O2", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
ARM, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(compiled.kernels() is None, reason="no C++ compiler")]


def told(folder, command, *run):
    """What the program prints, compiled by `command`; by name of the product."""
    built = folder / "bits"
    include = f"-I{compiled.SOURCE.parent}"
    subprocess.run([*command, *FLAGS, include, str(PROGRAM), "-o", str(built)], check=True)
    lines = subprocess.run([*run, str(built)], capture_output=True, text=True, check=True).stdout.split("\n")
    return dict(line.split() for line in lines if line)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return told(tmp_path_factory.mktemp("native"), [*compiled.compiler(), "-march=native"])


def test_no_vector_unit_for_integers_gives_the_same_bits(here, tmp_path):
    other = told(tmp_path, [*compiled.compiler(), "-march=native", "-DLAYERSKIP_PLAIN"])
    assert len(other) >= 2
    assert other == {name: here[name] for name in other}


@pytest.mark.skipif(not (ARM and EMULATOR), reason="needs aarch64-linux-gnu-g++ and qemu-aarch64")
@pytest.mark.parametrize("march", ["armv8.2-a+dotprod", "armv8-a"])
def test_arm_gives_the_same_bits(here, march, tmp_path):
    other = told(tmp_path, [ARM, "-static", f"-march={march}"], EMULATOR)
    assert {name: other[name] for name in here} == here
