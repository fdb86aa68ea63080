#!/usr/bin/env python
"""Counts how dlopt distrusts: who reads its own files, where unknown names are answered, and what is refused by hand.

.venv/bin/python scripts/distrust.py [COMMIT ...]    one column per commit, and one for the files as they are
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
READS = {"read_regular", "load_json", "load_yaml", "parse_json", "parse_numbers", "regular_lines", "read_stored"}
DAMAGE = re.compile(
    r"cannot be read|damaged|not an? (valid )?(JSON|YAML|run|sweep|checkpoint|manifest|ledger)|restore it"
)
NAMES = {"suggest", "get_close_matches", "did_you_mean", "closest"}
EXCLUSIVE = re.compile(r"use one of them|leave out one of|only one of|twice|needs? (also )?[a-z_.]+=|together with")
OBJECTS = {"Stored", "Names", "Exclusive", "Needs", "Distinct", "Conflict"}


def files(commit: str | None) -> Iterator[str]:
    """Yields the texts of the package's modules in a commit; in the working tree for None."""
    if commit is None:
        for path in sorted((ROOT / "dlopt").rglob("*.py")):
            yield path.read_text()
        return
    listed = subprocess.check_output(["git", "ls-tree", "-r", "--name-only", commit, "dlopt"], cwd=ROOT, text=True)
    for name in listed.split():
        if name.endswith(".py"):
            yield subprocess.check_output(["git", "show", f"{commit}:{name}"], cwd=ROOT, text=True)


def called(node: ast.AST) -> str:
    if isinstance(node, ast.Subscript):
        node = node.value
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def texts(node: ast.AST) -> str:
    return "".join(
        each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)
    )


def count(commit: str | None) -> Counter[str]:
    found = Counter[str]()
    for text in files(commit):
        inside = set[str]()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                name = called(node.func)
                inside |= {"files that read by hand"} if name in READS else set()
                inside |= {"files that answer unknown names"} if name in NAMES else set()
                found[f"uses of {name}"] += name in OBJECTS
            if isinstance(node, ast.Raise) and node.exc is not None:
                is_refusal = isinstance(node.exc, ast.Call) and called(node.exc.func) in ("UserError", "RunError")
                found["refusals raised by hand"] += is_refusal
                found["  of damaged or strange files"] += is_refusal and bool(DAMAGE.search(texts(node)))
                found["  of two words or settings"] += is_refusal and bool(EXCLUSIVE.search(texts(node)))
        found.update(inside)
    return found


def main() -> int:
    commits = [*sys.argv[1:], None]
    columns = [count(commit) for commit in commits]
    names = sorted({name for column in columns for name, number in column.items() if number})
    print(f"{'':34}", *(f"{commit or 'now':>10}" for commit in commits))
    for name in names:
        print(f"{name:34}", *(f"{column[name]:>10,}" for column in columns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
