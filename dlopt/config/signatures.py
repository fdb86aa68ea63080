"""Reads the annotations of dlopt's callables from their source files: importing them would import torch, for seconds.

What cannot be evaluated without an import (a class of torch, or of dlopt) has no annotation here; the signature itself
is checked later (`dlopt.config.schema`).
"""

import ast
import builtins
import functools
import typing
from collections.abc import Iterator, Mapping
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

    The arguments of a class are those of its `__init__`, or of the nearest base's, or the fields of a dataclass.
    """
    found = _find(path)
    if found is None:
        return {}
    module, node = found
    evaluated = ((name, _evaluate(written, _Names(where))) for name, where, written in _arguments(module, node))
    return {name: annotation for name, annotation in evaluated if annotation is not None}


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


def _arguments(module: str, node: ast.AST) -> Iterator[tuple[str, str, ast.expr]]:
    """Yields the name of each argument, the module of its annotation, and the annotation."""
    if isinstance(node, ast.FunctionDef):
        for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            if each.annotation is not None:
                yield each.arg, module, each.annotation
        match node.args.kwarg:
            case ast.arg(annotation=ast.Subscript(ast.Name("Unpack"), ast.Name(name))):  # keys of a TypedDict
                keys = _find(f"{module}.{name}")
                yield from () if keys is None else _fields(*keys)
    elif isinstance(node, ast.ClassDef):
        own = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
        bases = [_find(f"{module}.{base.id}") for base in node.bases if isinstance(base, ast.Name)]
        if own:
            yield from _arguments(module, own[0])
        elif any("dataclass" in ast.unparse(each) for each in node.decorator_list):
            yield from _fields(module, node)
        elif bases and bases[0] is not None:
            yield from _arguments(*bases[0])


def _fields(module: str, node: ast.AST) -> Iterator[tuple[str, str, ast.expr]]:
    """Yields the annotated fields of a class and those of its bases."""
    for base in node.bases if isinstance(node, ast.ClassDef) else []:
        found = _find(f"{module}.{ast.unparse(base)}")
        if found is not None:
            yield from _fields(*found)
    for each in node.body if isinstance(node, ast.ClassDef) else []:
        if isinstance(each, ast.AnnAssign):
            yield ast.unparse(each.target), module, each.annotation


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
