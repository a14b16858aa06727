"""Shared by all tests: one thread each (two processes run side by side), the sizes of the matrix, tolerances."""

import functools
import gc
import importlib
import io
import json
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

from layerskip.model.native import load as native_load

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so a shell starts what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

AGREED = native_load._agreed
native_load._agreed = lambda *kind: None  # tests compare anew, and leave nothing in the user's cache folder

FULL = os.environ.get("LAYERSKIP_FULL") == "1"

# Two ways of computing the same numbers (one call or several, whole or sliced) differ by rounding only: a few units
# in the last place of numbers of order ten, through five layers. In float64 too Hugging Face's eager softmax and
# its norms round to float32.
CLOSE = {torch.float32: 2e-4, torch.float64: 1e-6}

# Values of up to 5 mixed with weights that sum to one: float32 rounds scores of up to 10 and their exponentials;
# bfloat16 rounds weights and result, by 2^-9 each.
ATTENTION = {torch.float32: 1e-5, torch.bfloat16: 5 * 2**-8}


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "external" in item.keywords and not os.environ.get("LAYERSKIP_ENGINES"):
            item.add_marker(pytest.mark.skip(reason="LAYERSKIP_ENGINES names no folder with other engines"))
        if {"full", "slow"} & {*item.keywords} and not FULL:
            item.add_marker(
                pytest.mark.skip(reason="LAYERSKIP_FULL=1 runs the whole matrix and what is slow")
            )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep a file on one process: what its tests share is made once."""
    if FULL or config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


def pytest_collection_finish():
    _pass_over_libraries()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    _pass_over_libraries()


def _pass_over_libraries(passed=[0]):  # noqa: B006 - it remembers
    """Every training run ends with a full garbage collection, 0.25 s over the libraries loaded: freeze them."""
    if len(sys.modules) > passed[0] + 100:
        gc.collect()
        gc.freeze()
        passed[0] = len(sys.modules)


@pytest.fixture(autouse=True)
def any_machine(monkeypatch):
    """Make tests see the same machine everywhere: no bfloat16 by default, nobody else on its cores."""
    monkeypatch.setattr("layerskip.decode.load.fast_bfloat16", lambda: False)
    monkeypatch.setattr("layerskip.model.threads.busy_cores", lambda: 0.0)


@pytest.fixture(scope="session", params=["llama", "llama+native"])
def llama(request):
    """A calibrated tiny model and its stack, of either kind."""
    import tiny

    return tiny.calibrated("llama"), tiny.stack(request.param)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A checkpoint with a tokenizer and a chat template, whose second exit agrees about half of the time."""
    import tiny

    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    for part in tiny.speaking():
        part.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def commands():
    """Read the signatures of all verbs once, not at every call of the command line."""
    import typer.main

    return functools.cache(typer.main.get_command)


@pytest.fixture
def run(monkeypatch, capsys, commands):
    """Call the command line; returns exit code, stdout and stderr. `stdin` is a pipe, or None when closed."""

    from layerskip.cli.main import main

    monkeypatch.setattr("typer.main.get_command", commands)

    def call(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["layerskip", *map(str, arguments)])
        data = stdin.encode() if isinstance(stdin, str) else stdin
        pipe = None if data is None else io.TextIOWrapper(io.BytesIO(data), "utf-8")
        monkeypatch.setattr(sys, "stdin", pipe)
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as left:
            main()
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def fails(run):
    """Call the command line with a mistake: two lines on stderr, exit code 2, nothing on stdout."""

    def call(*arguments, stdin=""):
        code, printed, message = run(*arguments, stdin=stdin)
        assert code == 2, message
        assert printed == ""
        assert "Traceback" not in message
        first, *hint = (line for line in message.rstrip("\n").split("\n") if not line.startswith("loading "))
        assert first.startswith("error: ")
        assert len(hint) <= 1
        return message

    return call


@pytest.fixture
def benchmark(monkeypatch):
    """Import a script of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def script(benchmark, monkeypatch):
    """Call a script of benchmarks/ in this process with arguments; returns its module."""

    def call(name, *arguments):
        module = benchmark(name)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        module.main()
        return module

    return call


@pytest.fixture
def results(benchmark, monkeypatch, tmp_path):
    """An empty folder of result files, in place of the committed ones."""
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(benchmark("record"), "HERE", tmp_path)
    return tmp_path / "results"


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Forty short prompts with completions to train on, a .jsonl file."""
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = ({"prompt": f"say {i % 5}", "completion": "abc " * (1 + i % 4)} for i in range(40))
    file.write_text("\n".join(map(json.dumps, lines)))
    return file
