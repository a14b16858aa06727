"""The house keeps its own rules: floors, light imports, short files, nothing machine-specific."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "layerskip"
FILES = sorted(SOURCE.rglob("*.py"))
FLOORS = {
    "model": 0,
    "decode": 1,
    "train": 2,
    "measure": 2,
    "export": 2,
    "serve": 3,
    "demo": 3,
    "display": 3,
    "cli": 4,
    "cli_app": 4,
    "cli_measure": 4,
    "cli_distill": 4,
    "cli_train": 4,
    "cli_results": 4,
    "cli_eval": 4,
    "cli_tune": 4,
    "cli_inspect": 4,
    "cli_delta": 4,
    "display_train": 3,
    "display_eval": 3,
    "display_tune": 3,
    "display_inspect": 3,
}


def imports(path):
    """Every layerskip module a file imports, at any depth, with type-checking blocks left out."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_imports_upward(path):
    floor = FLOORS.get(path.relative_to(SOURCE).parts[0].removesuffix(".py"), -1)
    if floor < 0:
        return  # errors, config and the lazy package root stand beside the floors
    for name in imports(path):
        if name.startswith("layerskip."):
            assert FLOORS.get(name.split(".")[1], -1) <= floor, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 420
    assert ast.get_docstring(ast.parse(path.read_text())) or not path.read_text().strip()


def modules_after(statement, *names):
    code = f"{statement}; import sys; print([n for n in {names!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stdout)


def test_importing_the_package_or_its_command_line_imports_no_torch():
    assert (
        modules_after("import layerskip, layerskip.cli", "torch", "transformers", "gguf", "matplotlib") == []
    )


def test_model_and_decode_import_without_pydantic_typer_and_gguf():
    """A GPU machine may lack them."""
    blocked = (
        "import sys; sys.modules.update(dict.fromkeys(['pydantic', 'typer', 'gguf', 'rich', 'accelerate']))"
    )
    everything = "import layerskip; [getattr(layerskip, name) for name in layerskip.__all__]"
    assert modules_after(f"{blocked}; {everything}", "layerskip.decode.engine") == ["layerskip.decode.engine"]


OPTIONAL = {
    "matplotlib": ("measure/draw.py", "train/plot.py"),
    "fastapi": (),
    "datasets": ("train/sources.py",),
    "peft": ("train/lora.py",),
}


def test_training_imports_without_what_its_files_and_verbs_need():
    """Recipes and data sets need pydantic and datasets; a trainer in someone's own script does not."""
    names = ["pydantic", "typer", "gguf", "datasets", "peft"]
    blocked = f"import sys; sys.modules.update(dict.fromkeys({names}))"
    modules = [f"layerskip.train.{name}" for name in ("trainer", "data")]
    assert modules_after(f"{blocked}; import {', '.join(modules)}", *modules) == modules


def test_only_named_libraries_appear_in_core_files():
    """Optional libraries are imported in one place each, when needed."""
    for path in FILES:
        for name in imports(path):
            allowed = OPTIONAL.get(name.split(".")[0])
            assert allowed is None or str(path.relative_to(SOURCE)) in allowed, f"{path.name} imports {name}"


def test_no_path_of_a_machine_and_no_todo_is_committed():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"/(home|root|work|Users)/\w+|\bTODO\b|\bFIXME\b")
    for name in tracked.stdout.split():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".json"} and path != Path(
            __file__
        ):
            assert not pattern.search(path.read_text()), name
