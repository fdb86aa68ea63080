"""Reads the annotations of dlopt's callables from their source files: importing them would import torch, for seconds.

What cannot be evaluated without an import (a class of torch, or of dlopt) has no annotation here; the signature itself
is checked later (`dlopt.config.schema`).
"""

import ast
import builtins
import contextlib
import functools
import typing
from collections.abc import Mapping
from typing import Any

import annotated_types

from dlopt._version import ROOT
from dlopt.basics import ranges, roles

_TYPING = {name: getattr(typing, name) for name in ("Annotated", "Any", "Literal")}
_NAMES: Mapping[str, Any] = {**vars(builtins), **_TYPING, **vars(annotated_types), **vars(ranges), **vars(roles)}


def annotations_of(path: str) -> Mapping[str, Any]:
    """Returns the annotations of the arguments of a function or class of dlopt at a dotted path, as known here.

    A class has the arguments of its `__init__`, or else its annotated fields and the arguments of its bases.
    """
    module, _, name = path.rpartition(".")
    return _read(module)[1].get(name, {})


@functools.cache
def _read(module: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Returns the types that a module of dlopt names, and the annotations of its functions and classes, by name."""
    types, callables = dict(_NAMES), dict[str, dict[str, Any]]()
    file = ROOT.joinpath(*module.split(".")[1:])
    sources = [file.with_suffix(".py"), file / "__init__.py"] if module.split(".")[0] == "dlopt" else []
    source = next((each.read_bytes() for each in sources if each.is_file()), b"")
    for node in ast.parse(source).body:
        match node:
            case ast.ImportFrom(module=str(other), names=names, level=0) if other != ranges.__name__:  # all known
                for known, imported in zip((types, callables), _read(other), strict=True):
                    known |= {each.asname or each.name: imported[each.name] for each in names if each.name in imported}
            case ast.Assign(targets=[ast.Name(name)], value=value):
                types |= _evaluated({name: value}, types)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                callables[name] = _arguments(node, types, callables)
    return types, callables


def _arguments(
    node: ast.FunctionDef | ast.ClassDef, types: dict[str, Any], callables: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    if isinstance(node, ast.ClassDef):
        init = next((each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"), None)
        if init is not None:
            return _arguments(init, types, callables)
        parents = [ast.unparse(base) for base in reversed(node.bases)]  # the node inherits their arguments
        written = {ast.unparse(each.target): each.annotation for each in node.body if isinstance(each, ast.AnnAssign)}
    else:
        parents, arguments = [], (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        written = {each.arg: each.annotation for each in arguments if each.annotation is not None}
        match node.args.kwarg:
            case ast.arg(annotation=ast.Subscript(ast.Name("Unpack"), ast.Name(name))):  # keys of a TypedDict
                parents = [name]
    inherited = {name: each for parent in parents for name, each in callables.get(parent, {}).items()}
    return inherited | _evaluated(written, types)


def _evaluated(written: Mapping[str, ast.expr], types: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of expressions by name, without expressions that contain an unknown name."""
    found = {}
    for name, expression in written.items():
        with contextlib.suppress(NameError, TypeError, AttributeError):
            code = compile(ast.Expression(expression), "<annotation>", "eval")
            found[name] = eval(code, {}, types)  # {}: Python adds its builtins, with which 3.14 imports for a `|`
    return found
