"""Who opens a file: a folder of a run or a sweep may be a stranger's, and what is in it is read with limits.

`dlopt.basics.plain_values` opens no pipe and no device, and reads no more than a limit. Every other function that reads
a file, or parses a text, is listed here with the reason.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "dlopt"

METHODS = {"read_text", "read_bytes", "open", "fromfile", "loadtxt", "genfromtxt", "memmap"}
FUNCTIONS = {
    "open",
    "json.load", "json.loads", "yaml.load", "yaml.safe_load", "yaml.full_load", "yaml.parse", "yaml.compose", 
    "OmegaConf.load", "np.load", "torch.load", "pickle.load", "pickle.loads", "safe_open", "load_file", "tomllib.load",
    "shutil.copy", "shutil.copy2", "shutil.copyfile", "shutil.copytree", "ZipFile", "zipfile.ZipFile",
}  # fmt: skip

OWN = "a file of dlopt's package, or of a folder of configs that the user has typed"
DATA = "the user's data, typed by the user and checked by `refuse_special`"
KERNEL = "/proc, /sys"
SCRATCH = "written by another process of this command, into a folder that the command has made"
CHECKED = "after a check of the same file: `sha256`, `open_regular` or `refuse_special`"
WRITES = "writes, or opens a folder"
MEMORY = "parses a text that this process has made or typed, or one of its user's data"
READER = "is the reader with the checks"
CODE = "the code of a sweep, whose SHA-256 the user has submitted or typed"

# By file, or by file and function.
EXCEPTIONS = {
    "basics/files.py:synced": WRITES,
    "basics/files.py:sync_folder": WRITES,
    "basics/files.py:open_to_append": WRITES,
    "basics/files.py:refuse_compressed": CHECKED,
    "basics/interruption.py:_drop": WRITES,
    "basics/locks.py:locked_folder": WRITES,
    "basics/locks.py:is_held": READER,
    "basics/locks.py:_open": READER,
    "basics/plain_values.py": READER,
    "basics/scratch.py:_create": WRITES,
    "basics/scratch.py:_remove": WRITES,
    "basics/secrets.py": OWN,
    "cli.py": WRITES,
    "commands/listing.py": OWN,
    "commands/report.py": "opens a browser",
    "commands/sample.py": DATA,
    "commands/shared/processes.py": OWN,
    "commands/sweep_worker.py": MEMORY,
    "commands/template.py": OWN,
    "config/choices.py": OWN,
    "config/config_dir.py": OWN,
    "config/recall.py": OWN,
    "config/resolve.py": MEMORY,
    "config/saved.py": OWN,
    "config/schema.py": OWN,
    "config/signatures.py": OWN,
    "data": DATA,
    "basics/cache.py": DATA,
    "instruments/lr_range.py": SCRATCH,
    "instruments/measuring_ranks.py": SCRATCH,
    "lab/benchmark/page.py": OWN,
    "lab/judge/running.py": WRITES,
    "lab/report.py": OWN,
    "lab/scaling": SCRATCH,
    "lab/verify/cases.py": SCRATCH,
    "machine": KERNEL,
    "parallel/processes/rendezvous.py:failure_of_peers": "what a rank of this run has posted",
    "parallel/shard_files.py:read": CHECKED,
    "results/page.py:read_text": OWN,
    "results/page_tests.py:_sheet": "opens a picture in memory, whose pixels are counted first",
    "run/environment.py:_processor": KERNEL,
    "run/runner.py": MEMORY,
    "sweeps/code_copy.py": CODE,
    "sweeps/slurm.py:Slurm.submit": OWN,
    "sweeps/study.py:_JournalLock.acquire": CHECKED,
    "sweeps/submission.py:trusted": "in the user's home",
    "sweeps/submission.py:trust": "in the user's home",
    "tracking/console.py": WRITES,
    "trained/exporting.py": SCRATCH,
    "trained/portable.py:predict": "is copied beside an ONNX file, whose metadata it reads",
    "trained/predict_output.py:_csv": WRITES,
    "training/checkpoint/checkpoints.py:load": CHECKED,
    "training/checkpoint/sharded.py:copy": CHECKED,
    "training/checkpoint/sharded.py:load_without_shards": CHECKED,
    "training/checkpoint/weight_files.py:read_weights": CHECKED,
}


def readers(source: str) -> Iterator[str]:
    """Yields the functions in whose body a file is opened, or a text of a file is parsed."""

    def visit(node: ast.AST, name: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            inner = child.name if isinstance(child, ast.FunctionDef | ast.ClassDef) else ""
            if is_method(child) or called(child) in FUNCTIONS:
                yield name
            yield from visit(child, ".".join(filter(None, [name, inner])))

    yield from visit(ast.parse(source), "")


def is_method(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS


def called(node: ast.AST) -> str:
    """Returns the name of a function, also where it is passed on: map(json.loads, lines)."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr not in METHODS:
        return f"{node.value.id}.{node.attr}"
    return node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) else ""


@pytest.fixture(scope="module")
def found() -> set[str]:
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}
    words = re.compile("|".join({rf"\b{name.rpartition('.')[2]}\b" for name in METHODS | FUNCTIONS}))
    return {
        f"{path.relative_to(ROOT)}:{name}"
        for path, source in sources.items()
        if words.search(source) is not None  # parsing takes longer
        for name in readers(source)
    }


def test_only_the_listed_functions_open_a_file(found: set[str]) -> None:
    unlisted = {each for each in found if not any(covers(entry, each) for entry in EXCEPTIONS)}
    assert not unlisted, "read files by dlopt.basics.plain_values or dlopt.basics.files.read_json, or say why not"


def test_every_exception_is_needed(found: set[str]) -> None:
    assert not {entry for entry in EXCEPTIONS if not any(covers(entry, each) for each in found)}


def covers(entry: str, function: str) -> bool:
    return function == entry or function.startswith((f"{entry}:", f"{entry}/"))


@pytest.mark.parametrize(
    "source",
    [
        "open(x)",
        "path.open()",
        "json.loads(path)",
        "map(json.loads, x)",
        "def f():\n  Path(x).read_text()",
        "np.load(x)",
    ],
)
def test_what_counts_as_reading(source: str) -> None:
    assert len([*readers(source)]) == 1
