"""The compiled regions read and write what is theirs, and do nothing that C++ leaves undefined."""

import subprocess
from pathlib import Path

import pytest

from layerskip.model.native import kernels as compiled

PROGRAM = Path(__file__).with_name("sanitized.cpp")


@pytest.mark.slow
@pytest.mark.skipif(compiled.kernels() is None, reason="no C++ compiler")
def test_the_sanitizers_find_nothing(tmp_path):
    flags = [flag for flag in compiled.FLAGS if flag not in ("-O3", "-shared", "-fPIC")]
    checks = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-w"]
    include = f"-I{compiled.SOURCE.parent}"
    built = tmp_path / "sanitized"
    command = [
        *compiled.compiler(),
        *flags,
        *checks,
        "-fopenmp-simd",
        include,
        str(PROGRAM),
        "-o",
        str(built),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in done.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert done.returncode == 0, done.stderr
    run = subprocess.run([built], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "done\n"), run.stderr[:3000]
