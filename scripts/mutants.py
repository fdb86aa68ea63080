"""Mutation test: changes the code in one place at a time and counts how many changes the tests notice.

    .venv/bin/python scripts/mutants.py cover [--tests tests/parallel]
    .venv/bin/python scripts/mutants.py run [--only dlopt/parallel] [--count 300] [--seed 0] [--workers 2]
        [--json FILE] [--again FILE]

`cover` runs the tests once and records which lines each one runs; `run` needs it.
A mutant is killed when a test that runs the changed line fails, also in a process that the test starts. Those tests run
from the fastest to the slowest, until the first failure, in one copy of the checkout per worker, followed by the test
file of the module, which may run the line where coverage is not recorded. Other tests might kill more, so the share of
killed mutants is a lower bound.
"""

import argparse
import ast
import collections
import functools
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[1]
COVERAGE = ROOT / "outputs" / "mutants"
TARGETS = (
    "dlopt/optim",
    "dlopt/schedules",
    "dlopt/training",
    "dlopt/parallel",
    "dlopt/data/batches.py",
    "dlopt/config/rules.py",
)
TESTS = ("tests/optim", "tests/schedules", "tests/training", "tests/parallel", "tests/data", "tests/config")
ELSEWHERE = {"dlopt/config/rules.py": "tests/config/test_bad_input.py"}  # tests that refuse combinations of settings
PRELOAD = (
    "torch", "torch._dynamo", "tensorboard.plugins.hparams.api_pb2", "scipy.optimize", "scipy.stats", "hypothesis",
    "hydra", "rich.console", "matplotlib.figure", "pandas", "PIL.Image", "jinja2",
)  # fmt: skip
KILLED = ("killed", "timeout")
# At the end of a coverage context: `test|run` in the process of pytest, `test (call)` in one that the test has started
_PHASE = r"(\|(setup|run|teardown)| \((setup|call|teardown)\))$"
MOST_TESTS = 150  # of those that run a line; the fastest
TIMEOUT = 120  # seconds for the tests of one mutant, which may loop forever; a timeout counts as killed

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """`text` replaces what stands between the offsets of `file`."""

    file: str
    line: int
    start: int
    stop: int
    text: str
    change: str


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Yields all mutants of a file: operators, comparisons, conditions, numbers, removed calls and assignments."""
    source = path.read_text()
    offsets = [0]
    for text in source.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(text.encode()))
    encoded = source.encode()
    name = path.relative_to(ROOT).as_posix()

    def mutant(node: ast.expr | ast.stmt, text: str) -> Mutant:
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = offsets[node.lineno - 1] + node.col_offset
        stop = offsets[node.end_lineno - 1] + node.end_col_offset
        before = " ".join(encoded[start:stop].decode().split())
        return Mutant(name, node.lineno, start, stop, text, f"{before[:70]} -> {' '.join(text.split())[:70]}")

    tree = ast.parse(source)
    excluded = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Raise) for inner in ast.walk(node)}
    excluded |= {id(inner) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for inner in ast.walk(node)}
    # zip(..., strict=True) only raises for a mistake of the caller
    excluded |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "strict"}
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue  # what runs at import is not covered by single tests
        for statement in function.body:
            for node in ast.walk(statement):
                if id(node) in excluded:
                    continue
                changed: ast.expr | None = None
                if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
                    operators = [COMPARISONS[type(node.ops[0])](), *node.ops[1:]]
                    changed = ast.Compare(node.left, operators, node.comparators)
                elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
                    changed = ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
                elif isinstance(node, ast.BoolOp):
                    changed = ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
                elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
                    changed = node.operand
                elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
                    changed = ast.Constant(not node.value)
                elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
                    changed = ast.Constant(node.value + 1)
                elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                    yield mutant(node, "pass")
                elif isinstance(node, ast.If):
                    yield mutant(node.test, f"not ({ast.unparse(node.test)})")
                if changed is not None:
                    yield mutant(node, f"({ast.unparse(changed)})")  # type: ignore[arg-type]


def cover(tests: Sequence[str]) -> int:
    """Runs the tests with coverage contexts and writes test -> lines and test -> seconds into `COVERAGE`."""
    COVERAGE.mkdir(parents=True, exist_ok=True)
    config, of_processes = COVERAGE / "coveragerc", COVERAGE / "coveragerc_processes"
    settings = "[run]\nbranch = false\nsource = dlopt\n"
    config.write_text(f"{settings}data_file = {COVERAGE / 'data'}\n")
    of_processes.write_text(f"{settings}data_file = {COVERAGE / 'processes'}\ncontext = ${{PYTEST_CURRENT_TEST-}}\n")
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(os.cpu_count()), "--dist", "worksteal", *tests]
    command += ["--cov", f"--cov-config={config}", "--cov-context=test", "--cov-report=", "--durations=0", "-vv"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COVERAGE_OF_PROCESSES": str(of_processes)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if of_others := [str(path) for path in COVERAGE.glob("processes.*")]:
        combine = [sys.executable, "-m", "coverage", "combine", "-q", "--append", f"--data-file={COVERAGE / 'data'}"]
        subprocess.run([*combine, *of_others], cwd=ROOT, check=True)
    (COVERAGE / "log").write_text(done.stdout + done.stderr)
    seconds: dict[str, float] = collections.defaultdict(float)
    for time_spent, test in re.findall(r"^([\d.]+)s (?:call|setup|teardown) +(\S.*)$", done.stdout, re.MULTILINE):
        seconds[test.strip()] += float(time_spent)
    (COVERAGE / "seconds.json").write_text(json.dumps(seconds))
    failed = re.findall(r"^FAILED (\S.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    (COVERAGE / "failed.json").write_text(json.dumps(failed))
    print(done.stdout[-300:])
    return done.returncode


def tests_by_line() -> dict[tuple[str, int], list[str]]:
    """Returns (file, line) -> tests that run it, the fastest first."""
    from coverage.numbits import numbits_to_nums

    seconds = json.loads((COVERAGE / "seconds.json").read_text())
    failed = set(json.loads((COVERAGE / "failed.json").read_text()))  # they would kill every mutant
    found: dict[tuple[str, int], set[str]] = collections.defaultdict(set)
    with sqlite3.connect(COVERAGE / "data") as data:
        rows = data.execute(
            "select path, context, numbits from line_bits join file on file.id = file_id "
            "join context on context.id = context_id"
        )
        for path, context, bits in rows:
            if (test := re.sub(_PHASE, "", context)) != context and test not in failed:
                for line in numbits_to_nums(bits):
                    found[Path(path).relative_to(ROOT).as_posix(), line].add(test)
    return {key: sorted(tests, key=lambda test: seconds.get(test, 0.0)) for key, tests in found.items()}


def outcome(mutant: Mutant, tests: Sequence[str], copy: Path) -> str:
    """Runs `tests` with the mutant in `copy`: "killed", "timeout" or "survived"."""
    path = copy / mutant.file
    original = path.read_bytes()
    path.write_bytes(original[: mutant.start] + mutant.text.encode() + original[mutant.stop :])
    child = os.fork()
    if child == 0:
        run_tests(tests, copy)
    try:
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return "survived" if status == 0 else "killed"
            time.sleep(0.02)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "timeout"
    finally:
        path.write_bytes(original)


def run_tests(tests: Sequence[str], copy: Path) -> NoReturn:
    """Runs in a fork that has imported torch and pytest, but not dlopt; ends it with pytest's exit code."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    sys.path.insert(0, str(copy))
    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *tests]))


def sample(only: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """Draws `count` of all mutants of these files and folders."""
    targets = [ROOT / target for target in only]
    files = [path for target in targets for path in ([target] if target.is_file() else target.rglob("*.py"))]
    everything = [mutant for path in sorted(files) for mutant in mutants_of(path)]
    chosen = random.Random(seed).sample(everything, min(count, len(everything)))
    print(f"{len(chosen)} of {len(everything)} mutants", flush=True)
    return chosen


def read_alive(report: Path) -> list[Mutant]:
    """Reads the mutants that an earlier run did not kill. The code must not have changed since."""
    entries = [entry for entry in json.loads(report.read_text()) if entry.pop("result") not in KILLED]
    return [Mutant(**entry) for entry in entries]


def run(chosen: Sequence[Mutant], workers: int, report: Path | None) -> int:
    covered = tests_by_line()
    for module in PRELOAD:
        importlib.import_module(module)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("fork").Pool(workers) as pool:
        work = functools.partial(try_mutant, covered=covered, folder=Path(folder))
        results = []
        for mutant, result, seconds in pool.imap_unordered(work, chosen):
            results.append((mutant, result))
            if result != "killed":
                print(f"{result} ({seconds:.0f} s): {mutant.file}:{mutant.line}: {mutant.change}", flush=True)
            if len(results) % 50 == 0:
                print(f"{sum(result in KILLED for _, result in results)} of {len(results)} killed", flush=True)
    counts = collections.Counter(result for _, result in results)
    print(dict(counts), f"killed: {100 * sum(counts[name] for name in KILLED) / len(results):.1f} %")
    if report is not None:
        report.write_text(json.dumps([{**asdict(mutant), "result": result} for mutant, result in results], indent=1))
    return 0


def own_tests(file: str) -> list[str]:
    """Returns the test files of a module: some of its lines may run only in processes whose coverage is unknown."""
    path = Path(file.replace("dlopt/", "tests/", 1))
    found = [str(path.with_name(f"test_{path.name}")), ELSEWHERE.get(file, "")]
    return [name for name in found if (ROOT / name).is_file()]


def try_mutant(
    mutant: Mutant, covered: Mapping[tuple[str, int], Sequence[str]], folder: Path
) -> tuple[Mutant, str, float]:
    """Runs in a worker, which has a copy of the checkout of its own."""
    copy = folder / str(os.getpid())
    if not copy.exists():
        left_out = shutil.ignore_patterns(".git", ".venv", "outputs", "__pycache__", ".*cache")
        shutil.copytree(ROOT, copy, ignore=left_out)
    start = time.monotonic()
    tests = [*covered.get((mutant.file, mutant.line), [])[:MOST_TESTS], *own_tests(mutant.file)]
    result = outcome(mutant, tests, copy) if tests else "not covered"
    return mutant, result, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cover", "run"])
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files and folders of tests")
    parser.add_argument("--only", nargs="+", default=TARGETS, help="files and folders to change")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--again", type=Path, help="a file written by --json: only its mutants that were not killed")
    options = parser.parse_args()
    if options.what == "cover":
        return cover(options.tests)
    chosen = read_alive(options.again) if options.again else sample(options.only, options.count, options.seed)
    return run(chosen, options.workers, options.json)


if __name__ == "__main__":
    sys.exit(main())
