"""llama.cpp's own server on the file that the built-in model was made of, as a process beside ours.

    with llama_server(folder, rows=8, threads=2) as url:     # puts xllamacpp there by name
        ...

It is measured against, never imported by the package, and no test needs it. As a script this file is that process:
`python llama_server.py FOLDER MODEL.gguf ROWS THREADS` prints the server's address and serves until its stdin ends.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "xllamacpp==2026.10.11549"
CONTEXT = 2048  # tokens of a row


@contextlib.contextmanager
def llama_server(folder: Path, rows: int, threads: int) -> Iterator[str]:
    """A server of so many rows; its address."""
    from peers.llama_cpp import builtin_file

    from layerskip.errors import UserError

    folder.mkdir(parents=True, exist_ok=True)
    packages = folder / "python"
    if not (packages / "xllamacpp").is_dir():
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            packages,
            PACKAGE,
        ]
        subprocess.run(install, check=True)
    command = [sys.executable, __file__, packages, builtin_file(folder), str(rows), str(threads)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address = next((line.split()[1] for line in process.stdout if line.startswith("address ")), None)
        if address is None:
            raise UserError("llama.cpp's server did not start", f"try `python {Path(__file__).name}` by hand")
        yield address
    finally:
        process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def main() -> None:
    packages, model, rows, threads = sys.argv[1:]
    sys.path.insert(0, packages)
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path = model
    asked.n_parallel, asked.n_ctx = int(rows), CONTEXT * int(rows)
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = int(threads)
    server = xllamacpp.Server(asked)
    print("address", server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
