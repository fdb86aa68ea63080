"""Import layers: commands import components, never the other way round."""

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "dlopt"
# From top to bottom, one on each floor: a room or module imports only from those after it.
FLOORS = [
    "__main__", "cli",
    "lab",
    "extend",
    "python", "commands",
    "sweeps",
    "run",
    "instruments", "results", "trained",
    "training",
    "parallel", "config", "tracking",
    "augment", "init", "adapt", "data", "models", "tasks", "losses", "schedules", "metrics", "optim",
    "machine", "basics", "_version",
]  # fmt: skip


def room(module: str) -> str:
    """Returns the floor of a module: a floor of its own (`dlopt.metrics.names`), or that of its package."""
    _, *parts = module.split(".")
    return ".".join(parts[:2]) if ".".join(parts[:2]) in FLOORS else parts[0]


def files(name: str) -> list[Path]:
    path = ROOT / name.replace(".", "/")
    inner = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    return sorted(each for each in inner if room(module_of(each)) == name)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


@cache
def imported(path: Path) -> set[str]:
    """Returns the imported modules of dlopt, also imports within functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {f"{node.module}.{each.name}" for each in node.names}
    return {name for name in names if name.startswith("dlopt.") and room(name) in FLOORS}


@pytest.mark.parametrize("name", FLOORS)
def test_imports_only_lower_floors(name: str) -> None:
    paths = files(name)
    assert paths
    lower = FLOORS[FLOORS.index(name) :]
    upwards = {f"{path.relative_to(ROOT)} imports {each}" for path in paths for each in imported(path)
               if room(each) not in lower}  # fmt: skip
    assert not upwards


def test_every_module_has_a_floor() -> None:
    assert {room(module_of(path)) for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"} == {*FLOORS}


def test_no_circles_between_modules() -> None:
    """Not within a package either, nor by imports for type checking: a module can be read after those that it uses."""
    modules = {module_of(path): path for path in ROOT.rglob("*.py")}
    imports = {
        # `from dlopt.a import b`: the module dlopt.a.b, or a name in dlopt.a
        name: {each if each in modules else each.rpartition(".")[0] for each in imported(path)} - {name}
        for name, path in modules.items()
    }
    TopologicalSorter(imports).prepare()  # raises CycleError


def test_no_test_module_imports_another() -> None:
    """What several of them need is in tests/support."""
    tests = Path(__file__).parents[1]
    found = {
        f"{path.relative_to(tests)}: {node.module}"
        for path in tests.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and re.search(r"^tests\.(.*\.)?test_", f"{node.module}.")
    }
    assert not found
