"""Import layers: commands import components, never the other way round."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "dlopt"
FLOORS = [
    ["__main__"],
    ["cli", "completion"],
    ["lab"],  # uses what is below as a user would
    ["commands", "hydra_plugins", "api"],
    ["sweeps"],
    ["command_line"],
    ["job"],
    ["analysis"],
    ["training", "results"],
    ["parallel", "config", "augment", "init", "functions"],
    ["data", "models", "optim", "schedules", "losses", "tracking", "folders", "parameters", "environment"],
    [
        "errors", "files", "graphs", "interruption", "locks", "metric_names", "openmp", "plain", "processor", "random",
        "ranges", "roles", "table",
    ],
]  # fmt: skip
FLOOR = {room: len(FLOORS) - number for number, rooms in enumerate(FLOORS) for room in rooms}


def room(module: str) -> str:
    return module.split(".")[1]


def imported(path: Path) -> set[str]:
    """Returns the imported modules of dlopt, also imports within functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {f"{node.module}.{each.name}" for each in node.names}
    return {name for name in names if name.startswith("dlopt.") and room(name) in FLOOR}


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_imports_only_lower_layers(name: str) -> None:
    paths = [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").exists() else sorted((ROOT / name).rglob("*.py"))
    assert paths
    upwards = {f"{path.relative_to(ROOT)} imports {each}" for path in paths for each in imported(path)
               if FLOOR[room(each)] > FLOOR[name]}  # fmt: skip
    assert not upwards


def test_every_module_has_a_layer() -> None:
    rooms = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or [*path.glob("*.py")]}
    assert rooms - {"__init__"} == set(FLOOR)


def test_no_circles_between_rooms() -> None:
    """Rooms of one floor may use each other, but only in one direction."""
    below: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if name in FLOOR:
            below.setdefault(name, set()).update(room(each) for each in imported(path) if room(each) != name)
    while free := [name for name, rooms in below.items() if not rooms & below.keys()]:
        for name in free:
            del below[name]
    assert not below, {name: rooms & below.keys() for name, rooms in below.items()}


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
