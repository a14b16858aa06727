"""llama.cpp's own server as a process beside ours: on the file the built-in model was made of, or any other.

    with llama_server(folder, builtin_file(folder), rows=8, threads=2) as url:     # puts xllamacpp there by name
        ...

It is measured against, never imported by the package, and no test needs it. As a script this file is that process:
`python llama_server.py PACKAGES '{"model": "it.gguf", "rows": 1, "threads": 2}'` prints the server's address and
serves until its stdin ends.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "xllamacpp==2026.10.11549"
CONTEXT = 2048  # tokens of a row


@contextlib.contextmanager
def llama_server(
    folder: Path, model: Path, rows: int = 1, threads: int = 2, draft: Path | None = None, drafts: int = 4
) -> Iterator[str]:
    """A server of so many rows, by itself or with a draft model; its address. Raises: UserError."""
    from layerskip.errors import UserError

    folder.mkdir(parents=True, exist_ok=True)
    packages = folder / "python"
    if not (packages / "xllamacpp").is_dir():
        install = [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), PACKAGE,
        ]  # fmt: skip
        subprocess.run(install, check=True)
    asked = {"model": str(model), "rows": rows, "threads": threads, "drafts": drafts}
    asked["draft"] = None if draft is None else str(draft)
    process = subprocess.Popen(
        [sys.executable, __file__, str(packages), json.dumps(asked)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
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
    packages, told = sys.argv[1], json.loads(sys.argv[2])
    sys.path.insert(0, packages)
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path = told["model"]
    asked.n_parallel, asked.n_ctx = told["rows"], CONTEXT * told["rows"]
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = told["threads"]
    if told.get("draft"):
        speculative = asked.speculative
        kind = xllamacpp.common_speculative_type
        speculative.types = [kind.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        speculative.draft.mparams.path = told["draft"]
        speculative.draft.n_max, speculative.draft.n_min, speculative.draft.p_min = told["drafts"], 1, 0.0
        speculative.draft.cpuparams.n_threads = speculative.draft.cpuparams_batch.n_threads = told["threads"]
    server = xllamacpp.Server(asked)
    print("address", server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
