"""The house keeps its own rules: floors, light imports, short files, nothing machine-specific."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "layerskip"
FILES = sorted(SOURCE.rglob("*.py"))
FLOORS = (  # from the ground up; a room may import the rooms below its floor, and itself
    ("errors", "watch"),
    ("option", "reading"),
    ("checkpoint",),
    ("model",),
    ("decode", "train"),
    ("measure",),
    ("adapt", "serve", "export", "search"),
    ("cli",),
    ("__init__", "__main__"),
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
WINGS = {  # inside a room, from the ground up; "" is what lies in the room itself
    "train": ("data", "objective", "", "job"),
    "measure": ("", "exits", "speed", "proof", "advice", "tasks"),
    "cli": ("show", ""),
}
LONGEST_FILE, MOST_PARAMETERS = 420, 12


def module(path):
    parts = ["layerskip", *path.relative_to(SOURCE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in FILES}


def imported(path):
    """Every module an import statement of a file names, type-checking blocks and function bodies included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


GRAPH = {
    module(path): sorted(
        {name for name in imported(path) if name.split(".")[0] == "layerskip"} - {module(path)}
    )
    for path in FILES
}


def room(name):
    return [*name.split("."), "__init__"][1]


def wing(name):
    return name.split(".")[2] if len(name.split(".")) > 3 else ""


def upward(name, target):
    """Say what is wrong with one import; None for nothing."""
    if target not in MODULES:
        return "names no module of this house"
    here, there = room(name), room(target)
    if here != there:
        return None if FLOOR[there] < FLOOR[here] else f"{there} is not below {here}"
    order = WINGS.get(here)
    if order and wing(name) != wing(target) and target != f"layerskip.{here}":
        ends = [order.index(wing(one)) if wing(one) in order else None for one in (name, target)]
        if None in ends or ends[1] > ends[0]:
            return f"{wing(target) or 'the room itself'} is not below {wing(name) or 'the room itself'}"
    return None


def test_every_room_has_a_floor_and_every_floor_its_rooms():
    assert {room(name) for name in MODULES} == {*FLOOR}
    for name, wings in WINGS.items():
        found = {wing(one) for one in MODULES if room(one) == name and MODULES[one].name != "__init__.py"}
        assert found == {*wings}, name


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_imports_upward(name):
    for target in GRAPH[name]:
        assert not (wrong := upward(name, target)), f"{name} imports {target}: {wrong}"


def test_the_rule_sees_an_upward_and_an_unknown_import():
    assert upward("layerskip.train.trainer", "layerskip.decode.engine")
    assert upward("layerskip.model.step", "layerskip.cli.app")
    assert upward("layerskip.train.objective.loss", "layerskip.train.trainer")
    assert upward("layerskip.cli.app", "layerskip.decode.nothing")
    assert not upward("layerskip.cli.app", "layerskip.decode.engine")


def circle(graph):
    """Find modules that import each other in a loop, those that only annotate included; None for none."""
    state, trail = {}, []

    def visit(name):
        state[name] = "open"
        trail.append(name)
        for target in graph.get(name, ()):
            if state.get(target) == "open":
                return trail[trail.index(target) :]
            if target not in state and (found := visit(target)):
                return found
        state[name] = "done"
        trail.pop()
        return None

    return next((found for name in graph if name not in state and (found := visit(name))), None)


def test_no_files_import_each_other_in_a_circle():
    assert circle({"a": ["b"], "b": ["c"], "c": ["a"]}) == ["a", "b", "c"]
    assert circle({name: targets for name, targets in GRAPH.items() if name != "layerskip"}) is None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_stay_readable(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not text.strip()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            given = node.args
            names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            assert count <= MOST_PARAMETERS, f"{node.name} has {count} parameters"


def silent_raisers(node, told=""):
    """Name public functions that raise a UserError and do not say so; a class speaks for its making."""
    for one in node.body:
        private = one.name.startswith("_") if hasattr(one, "name") else True
        if isinstance(one, ast.ClassDef) and not private:
            yield from silent_raisers(one, ast.get_docstring(one))
        elif isinstance(one, ast.FunctionDef) and (not private or one.name in ("__init__", "__post_init__")):
            said = told if private else ast.get_docstring(one)
            raised = [
                ast.unparse(each.exc) for each in ast.walk(one) if isinstance(each, ast.Raise) and each.exc
            ]
            if any(error.startswith("UserError(") for error in raised) and "Raise" not in (said or ""):
                yield one.name


def test_public_functions_that_raise_a_user_error_say_when():
    silent = ast.parse(
        "class Told:\n 'Raises: x.'\n def __init__(self): raise UserError(1)\ndef f(): raise UserError(1)"
    )
    assert [*silent_raisers(silent)] == ["f"]
    for path in FILES:
        if room(module(path)) != "cli":  # its functions are verbs: their docstrings are help for users
            assert [*silent_raisers(ast.parse(path.read_text()))] == [], path.name


def modules_after(statement, *names):
    code = f"{statement}; import sys; print([n for n in {names!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stdout)


def test_importing_the_package_or_its_command_line_imports_no_torch():
    assert (
        modules_after("import layerskip, layerskip.cli.main", "torch", "transformers", "gguf", "matplotlib")
        == []
    )


def test_model_and_decode_import_without_pydantic_typer_and_gguf():
    """A GPU machine may lack them."""
    blocked = (
        "import sys; sys.modules.update(dict.fromkeys(['pydantic', 'typer', 'gguf', 'rich', 'accelerate']))"
    )
    everything = "import layerskip; [getattr(layerskip, name) for name in layerskip.__all__]"
    assert modules_after(f"{blocked}; {everything}", "layerskip.decode.engine") == ["layerskip.decode.engine"]


def test_documented_modules_that_moved_are_found_under_their_former_names_with_a_warning():
    from layerskip.checkpoint import resolve
    from layerskip.train.objective import schedule

    for former, now in (("layerskip.model.hub", resolve), ("layerskip.train.schedule", schedule)):
        sys.modules.pop(former, None)
        with pytest.warns(DeprecationWarning, match=f"{former} is now {now.__name__}"):
            assert import_module(former) is now


OPTIONAL = {
    "matplotlib": ("measure/exits/canvas.py", "measure/exits/draw.py", "train/job/plot.py"),
    "fastapi": ("serve/app.py", "serve/errors.py", "serve/run.py"),
    "starlette": ("serve/app.py",),
    "uvicorn": ("serve/run.py",),
    "prometheus_client": ("serve/metrics.py",),
    "xgrammar": ("serve/processors.py",),
    "optuna": ("search/study.py", "search/report.py"),
    "lm_eval": ("measure/tasks/harness.py",),
    "datasets": ("train/data/sources.py",),
    "peft": ("train/job/lora.py",),
}


@pytest.mark.slow
def test_training_imports_without_what_its_files_and_verbs_need():
    """Recipes and data sets need pydantic and datasets; a trainer in someone's own script does not."""
    names = ["pydantic", "typer", "gguf", "datasets", "peft"]
    blocked = f"import sys; sys.modules.update(dict.fromkeys({names}))"
    modules = [f"layerskip.train.{name}" for name in ("trainer", "data.packing")]
    assert modules_after(f"{blocked}; import {', '.join(modules)}", *modules) == modules


def test_only_named_libraries_appear_in_core_files():
    """Optional libraries are imported in one place each, when needed."""
    for path in FILES:
        for name in imported(path):
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
