"""Reads the annotations of dlopt's callables from their source files: importing them would import torch, for seconds.

What cannot be evaluated without an import (a class of torch, or of dlopt) has no annotation here; the signature itself
is checked later (`dlopt.config.schema`).
"""

import ast
import builtins
import functools
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import annotated_types

import dlopt
from dlopt import ranges, roles

_ROOT = Path(dlopt.__file__).parent
_TYPING = {name: getattr(typing, name) for name in ("Annotated", "Any", "Literal")}
_NAMES: Mapping[str, Any] = {**vars(builtins), **_TYPING, **vars(annotated_types), **vars(ranges), **vars(roles)}


@functools.cache
def annotations_of(path: str) -> Mapping[str, Any]:
    """Returns the annotations of the arguments of the dlopt function or class at a dotted path, as far as known here.

    The arguments of a class are those of its `__init__`, or else its annotated fields and the arguments of its bases.
    """
    found = _find(path)
    return {} if found is None else _arguments(*found)


def _arguments(module: str, node: ast.AST) -> dict[str, Any]:
    written: Mapping[str, ast.expr | None] = {}
    parents: list[str] = []  # whose arguments are also those of the node
    if isinstance(node, ast.ClassDef):
        init = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
        if init:
            return _arguments(module, init[0])
        parents = [ast.unparse(base) for base in node.bases]
        fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
        written = {ast.unparse(each.target): each.annotation for each in fields}
    elif isinstance(node, ast.FunctionDef):
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        written = {each.arg: each.annotation for each in arguments}
        match node.args.kwarg:
            case ast.arg(annotation=ast.Subscript(ast.Name("Unpack"), ast.Name(name))):  # keys of a TypedDict
                parents = [name]
    annotations: dict[str, Any] = {}
    for parent in reversed(parents):
        annotations |= annotations_of(f"{module}.{parent}")
    names = _Names(module)
    evaluated = {name: _evaluate(each, names) for name, each in written.items() if each is not None}
    return annotations | {name: annotation for name, annotation in evaluated.items() if annotation is not None}


class _Names(dict[str, Any]):
    """The names of a module that an annotation may use, evaluated when they are looked up."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __missing__(self, name: str) -> Any:
        found = _find(f"{self._module}.{name}")
        if found is None:
            return _NAMES[name]
        module, node = found
        if not isinstance(node, ast.Assign) or (value := _evaluate(node.value, _Names(module))) is None:
            raise KeyError(name)
        self[name] = value
        return value


def _evaluate(expression: ast.expr, names: Mapping[str, Any]) -> Any:
    """Returns the value of an annotation, None if it has a name that is not known here."""
    try:
        return eval(compile(ast.Expression(expression), "<annotation>", "eval"), {"__builtins__": {}}, names)
    except (KeyError, NameError, TypeError, AttributeError):
        return None


def _find(path: str) -> tuple[str, ast.AST] | None:
    """Returns the module of dlopt that defines a name, also one that others import it from, and its definition."""
    module, _, name = path.rpartition(".")
    node = _definitions(module).get(name)
    return _find(node) if isinstance(node, str) else None if node is None else (module, node)


@functools.cache
def _definitions(module: str) -> Mapping[str, ast.AST | str]:
    """Maps the names at the top level of a module of dlopt to their definitions, imported ones to their paths."""
    file = _ROOT.joinpath(*module.split(".")[1:]) if module.split(".")[0] == "dlopt" else None
    sources = [] if file is None else [file.with_suffix(".py"), file / "__init__.py"]
    source = next((each for each in sources if each.is_file()), None)
    definitions: dict[str, ast.AST | str] = {}
    for node in [] if source is None else ast.parse(source.read_bytes()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            definitions[node.name] = node
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            definitions |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            definitions[node.targets[0].id] = node
    return definitions
