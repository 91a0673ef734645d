"""The rules of the house: who may import whom, what is never imported, how long files and functions are."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "stablevsr"

# Each room may import those in the set, itself, and nothing else of ours. `runtime` knows no network and no
# configuration: it is the floor that everything which touches a device stands on.
BASE = {"errors", "atomic", "runtime", "fields", "config"}
MODEL = BASE | {"architectures", "nn", "sampling", "prompt", "weights", "model"}
ROOMS = {
    "errors": set(),
    "atomic": {"errors"},
    "runtime": {"errors"},
    "fields": {"errors"},
    "config": {"fields"},
    "architectures": {"config"},
    "nn": BASE,
    "sampling": BASE | {"nn"},
    "prompt": BASE,
    "weights": BASE | {"prompt", "sampling"},
    "model": BASE | {"nn", "sampling", "prompt", "weights"},
    "media": BASE,
    "engine": MODEL | {"__init__", "media"},
    "cluster": MODEL | {"__init__", "engine", "media"},
    "convert": MODEL,
    "hub": MODEL | {"convert"},
    "training": MODEL | {"media", "engine"},
    "metrics": MODEL | {"media"},
    "compare": MODEL | {"media", "metrics"},
    "app": MODEL | {"media", "engine"},
    "__init__": {"engine", "errors", "model", "sampling"},
    "cli": MODEL
    | {"__init__", "engine", "cluster", "media", "convert", "hub", "training", "metrics", "compare", "app"},
    "__main__": {"cli"},
}
FORBIDDEN = {"diffusers", "transformers", "accelerate"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """The full names of the modules that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str:
    """The room of ours that a module `stablevsr...` lies in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module in imported(path):
        top = module.split(".")[0]
        assert top not in FORBIDDEN, f"{path} imports {module}"
        if top == "stablevsr":
            assert room_of(module) in ROOMS[room] | {room}, f"{path}: {room} may not import {module}"


def test_the_package_loads_none_of_the_reference_libraries() -> None:
    code = "import sys, stablevsr.cli.upscale, stablevsr.cli.convert, stablevsr.cli.train; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "stablevsr.convert.assemble" in loaded
    assert not {name.split(".")[0] for name in loaded} & FORBIDDEN


def test_public_names_are_there_and_errors_need_no_torch() -> None:
    code = (
        "import sys, stablevsr; stablevsr.ResourceError; early = 'torch' in sys.modules; "
        "print(early, [name for name in stablevsr.__all__ if getattr(stablevsr, name, None) is None])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "False []"


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    for function in functions(ast.parse(text)):
        first = function.body[1 if ast.get_docstring(function) and len(function.body) > 1 else 0]
        assert function.end_lineno - first.lineno < 60, f"{function.name} is too long, its docstring not counted"
        arguments = function.args
        names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        assert len([name for name in names if name not in ("self", "cls")]) <= 10, function.name


def test_no_blanket_ignores() -> None:
    """Each of them names the error; mypy itself reports those that ignore nothing."""
    for path in FILES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if "type: ignore" in line:
                assert re.search(r"# type: ignore\[[a-z-]+\]  # \w", line), f"{path}:{number}: which error, and why?"
