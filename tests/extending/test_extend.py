"""`dlopt.extend`: its names exist, its docstring has a word on each, and importing it is cheap."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

from dlopt import extend

TREE = ast.parse(Path(str(extend.__file__)).read_text())
NAMES = {
    each.asname or each.name: (node.module, each.name)
    for node in ast.walk(TREE)
    if isinstance(node, ast.ImportFrom) and str(node.module).startswith("dlopt.")
    for each in node.names
}


def test_every_name_is_that_of_its_import() -> None:
    for name, (module, inner) in NAMES.items():
        assert getattr(extend, name) is getattr(importlib.import_module(str(module)), inner), name
    assert extend._LATER.keys() <= NAMES.keys()


def test_the_docstring_has_every_name() -> None:
    assert not NAMES.keys() - {*re.findall(r"\w+", str(extend.__doc__))}


def test_importing_it_imports_nothing_slow() -> None:
    code = "import dlopt.extend, sys; print({'torch', 'hydra', 'pydantic', 'matplotlib'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
