"""Products give the same bits on every vector unit: this machine's, simpler ones, and ARM's where that can be run.

bfloat16 is left out where pairs are multiplied by an instruction (Zen 4 and later), which gives bits of its own.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from layerskip.model.native import kernels as compiled

PROGRAM = Path(__file__).with_name("bits.cpp")
FLAGS = [flag for flag in compiled.FLAGS if flag not in ("-march=native", "-fPIC", "-shared")]
ARM, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(compiled.kernels() is None, reason="no C++ compiler")]


def told(folder, command, *run):
    """What the program prints, compiled by `command`; by name of the product."""
    built = folder / "bits"
    include = f"-I{compiled.SOURCE.parent}"
    subprocess.run([*command, *FLAGS, "-fopenmp-simd", include, str(PROGRAM), "-o", str(built)], check=True)
    done = subprocess.run([*run, str(built)], capture_output=True, text=True, check=False)
    if done.returncode < 0 and not run:
        pytest.skip("this processor does not run it")
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.split("\n") if line)


def agree(one, other):
    both = {*one} & {*other}
    assert {"int8", "int4"} <= both
    assert {name: one[name] for name in both} == {name: other[name] for name in both}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return told(tmp_path_factory.mktemp("native"), [*compiled.compiler(), "-march=native"])


@pytest.mark.parametrize(
    "form",
    [("-march=native", "-DLAYERSKIP_PLAIN"), ("-march=native", "-DLAYERSKIP_AVX2"), ("-march=haswell",)],
    ids=str,
)
def test_simpler_vector_units_give_the_same_bits(here, form, tmp_path):
    known = subprocess.run(
        [*compiled.compiler(), form[0], "-x", "c++", "-fsyntax-only", "/dev/null"],
        capture_output=True, check=False,
    )  # fmt: skip
    if known.returncode:
        pytest.skip("another kind of processor")
    agree(here, told(tmp_path, [*compiled.compiler(), *form]))


@pytest.mark.skipif(not (ARM and EMULATOR), reason="needs aarch64-linux-gnu-g++ and qemu-aarch64")
@pytest.mark.parametrize("march", ["armv8.2-a+dotprod", "armv8-a"])
def test_arm_gives_the_same_bits(here, march, tmp_path):
    agree(here, told(tmp_path, [ARM, "-static", f"-march={march}"], EMULATOR))
