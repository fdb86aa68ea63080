"""Runs the GPU benchmarks of gpu_benchmarks.py that fit into the time limit, most important first. See gpu.sh.

    python scripts/bench/gpu.py [--minutes 8] [--data CIFAR] [--nanogpt FOLDER] [--airbench FILE] [--runs 10]
                                [--out OUT] [--resume FILE] [--cache FOLDER] [--only a,b] [--rehearse]

Each benchmark has a process of its own. It writes each result, also preliminary ones, to OUT/gpu.json at once: a
benchmark that is killed at the time limit leaves what it has measured. A second call skips what an earlier one has
finished with the same GPU and code, by FILE (default: OUT/gpu.json). A benchmark starts only if its estimate fits the
time left: seconds of start-up and compilation, times a factor of this host, plus seconds of measurement. The factor
compares imports and a tiny compilation with those on the reference host, and is corrected by the benchmarks that are
done. FOLDER keeps what torch has compiled. A table is printed last, also after SIGTERM.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from dlopt.basics.files import read_json, write_json

REFERENCE_SECONDS = 13.0  # of imports and a tiny compilation with an H100, estimated from the times of commands there
_TELLING_SECONDS = 20.0  # of start-up and compilation: a benchmark with more tells the factor of the host
_SHOW_SECONDS = 10.0  # between two preliminary results
Add = Callable[..., None]
"""Adds, or replaces, a result of a benchmark: (name, value, unit, goal)."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark. `measure` receives the setting of all benchmarks and adds results.

    host: seconds of start-up and compilation on the reference host. device: seconds of measurement.
    needs: the options without which it is skipped.
    """

    name: str
    host: float
    device: float
    measure: Callable[[Any, Add], None]
    needs: tuple[str, ...] = ()

    def seconds(self, factor: float) -> float:
        """Estimates the time on a host that is slower than the reference host by `factor`."""
        return self.host * factor + self.device


class Results:
    """The content of gpu.json: about the machine, and for each benchmark its state and its rows."""

    def __init__(self, path: Path, about: dict[str, Any], previous: dict[str, Any] | None) -> None:
        self.path, self.about = path, about
        known = previous if previous is not None and same_setting(previous, about) else {}
        if previous and not known:
            print("earlier results are not used: they are of another GPU, torch or code")
        self.benchmarks: dict[str, dict[str, Any]] = known.get("benchmarks", {})
        self._shown: dict[str, float] = {}  # result -> time when it was printed

    def is_done(self, benchmark: str) -> bool:
        return self.benchmarks.get(benchmark, {}).get("state") == "done"

    def start(self, benchmark: str) -> None:
        # The rows of an earlier call, which ended it at its limit, stay until they are measured again.
        rows = self.benchmarks.get(benchmark, {}).get("rows", [])
        self.benchmarks[benchmark] = {"state": "partial", "rows": rows}

    def add(self, benchmark: str, name: str, value: Any, unit: str, goal: str = "") -> None:
        row = {"name": name, "value": value, "unit": unit, "goal": goal}
        rows = {each["name"]: each for each in self.benchmarks[benchmark]["rows"]}
        self.benchmarks[benchmark]["rows"] = list({**rows, name: row}.values())
        self.write()
        now = time.monotonic()
        if now - self._shown.get(name, -math.inf) > _SHOW_SECONDS and not isinstance(value, list):
            self._shown[name] = now
            print(line(row), flush=True)

    def end(self, benchmark: str, state: str) -> None:
        self.benchmarks[benchmark]["state"] = state
        self.write()

    def value(self, name: str) -> Any:
        """Returns a result of any benchmark; None: not measured."""
        rows = (row for each in self.benchmarks.values() for row in each["rows"])
        return next((row["value"] for row in rows if row["name"] == name), None)

    def write(self) -> None:
        write_json(self.path, {**self.about, "benchmarks": self.benchmarks})

    def reload(self) -> None:
        """Reads what the process of a benchmark has written."""
        self.benchmarks = (read_json(self.path) or {}).get("benchmarks", self.benchmarks)

    def show(self) -> None:
        print(f"\n{self.about['device']}, torch {self.about['torch']}")
        for benchmark in self.benchmarks:
            self.show_benchmark(benchmark)

    def show_benchmark(self, benchmark: str) -> None:
        content = self.benchmarks[benchmark]
        for row in content["rows"]:
            if not isinstance(row["value"], list) and ", split: " not in row["name"]:
                print(line(row) + ("" if content["state"] == "done" else f" ({content['state']})"))
        if not content["rows"]:
            print(f"{benchmark}: {content['state']}")
        sys.stdout.flush()


def same_setting(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(first.get(key) == second[key] for key in ("device", "torch", "code", "rehearsal"))


def line(row: dict[str, Any]) -> str:
    value = f"{row['value']:,.0f}" if row["value"] >= 1000 else f"{row['value']:.4g}"
    return f"{row['name']:68} {value:>10} {row['unit']:10} {row['goal']}".rstrip()


def code_hash(root: Path) -> str:
    """Hashes the code that is measured: a copy of a checkout on another machine may have no commit."""
    digest = hashlib.sha256()
    for path in sorted(
        [*root.glob("dlopt/**/*.py"), *root.glob("conf/**/*.yaml"), *root.glob("scripts/bench/gpu*.py")]
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run(benchmarks: Sequence[Benchmark], setting: Any, results: Results, deadline: float, factor: float) -> None:
    """Runs the benchmarks that fit before `deadline` (of `time.monotonic`), each in a process that is killed then."""
    for benchmark in benchmarks:
        missing = [f"--{each}" for each in benchmark.needs if getattr(setting.options, each) is None]
        name, estimate, start = benchmark.name, benchmark.seconds(factor), time.monotonic()
        if results.is_done(name):
            print(f"{name}: measured before")
        elif missing:
            print(f"{name}: skipped: needs {' '.join(missing)}")
        elif estimate >= deadline - start:
            print(f"{name}: skipped: takes about {estimate:.0f} s, {deadline - start:.0f} s are left")
        else:
            print(f"{name} (about {estimate:.0f} of {deadline - start:.0f} s) ...", flush=True)
            results.start(name)
            arguments = (benchmark, setting, results, deadline - start)
            process = multiprocessing.get_context("fork").Process(target=measure, args=arguments)
            process.start()
            try:
                process.join(deadline - start)
            finally:
                end(process)
                results.reload()
            seconds = time.monotonic() - start
            print(f"({name}: {results.benchmarks[name]['state']}, {seconds:.0f} s)")
            results.show_benchmark(name)  # the last values: not every preliminary one is printed
            if results.is_done(name) and benchmark.host >= _TELLING_SECONDS:
                # Imports from a cold disk make the first factor too large. One benchmark alone may have found its
                # functions in the cache, or read the images for all.
                factor = (factor + max(seconds - benchmark.device, 0.0) / benchmark.host) / 2


def measure(benchmark: Benchmark, setting: Any, results: Results, limit: float) -> None:
    """Runs a benchmark, as the leader of a process group that ends with it."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends this process
    signal.alarm(int(limit) + 5)  # should the parent have been killed
    results.write()
    try:
        benchmark.measure(setting, functools.partial(results.add, benchmark.name))
        results.end(benchmark.name, "done")
    except Exception as error:  # a failed benchmark does not affect the others
        traceback.print_exc()
        results.end(benchmark.name, f"failed: {type(error).__name__}: {str(error)[:200]}")
        raise SystemExit(1) from None


def end(process: BaseProcess) -> None:
    """Ends a process with its group: a peer's script, torch's compile workers."""
    assert process.pid is not None
    for number, seconds in ((signal.SIGTERM, 3), (signal.SIGKILL, 3)):
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, number)
        process.join(seconds)
    process.kill()  # if it was not yet the leader of a group
    process.join()


def stop(number: int, _: FrameType | None) -> None:
    for each in (signal.SIGTERM, signal.SIGINT):  # a second one must not interrupt what follows
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="CIFAR", help="CIFAR-10: see gpu.sh")
    parser.add_argument("--nanogpt", type=Path, metavar="FOLDER", help="a checkout of nanoGPT")
    parser.add_argument("--airbench", type=Path, metavar="FILE", help="airbench94_muon.py")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument(
        "--resume", type=Path, metavar="FILE", help="gpu.json of an earlier call (default: OUT/gpu.json)"
    )
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="compiled kernels, for the next call")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--runs", type=int, default=10, help="of the speed recipe and of airbench")
    parser.add_argument("--only", default="", metavar="a,b")
    parser.add_argument("--rehearse", action="store_true", help="a small run on generated data, also on a CPU")
    options = parser.parse_args()
    for name in ("nanogpt", "airbench", "resume"):
        path = getattr(options, name)
        if path is not None and not (path / "train.py" if name == "nanogpt" else path).is_file():
            parser.error(f"--{name} {path}: not found")
    if options.rehearse:
        options.data = Path()  # generated
    options.out.mkdir(parents=True, exist_ok=True)
    if options.cache is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(options.cache.resolve() / "inductor")
        os.environ["TRITON_CACHE_DIR"] = str(options.cache.resolve() / "triton")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)

    # The benchmarks are forked from this process, which imports for all of them, and must not use the GPU itself.
    bench = importlib.import_module("gpu_benchmarks")
    benchmarks = {benchmark.name: benchmark for benchmark in bench.BENCHMARKS}
    selected = options.only.split(",") if options.only else list(benchmarks)
    if unknown := set(selected) - set(benchmarks):
        parser.error(f"--only {','.join(sorted(unknown))}: unknown; allowed: {','.join(benchmarks)}")
    imports = time.monotonic() - start
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as process:
        about, seconds = process.submit(bench.calibrate, options.rehearse).result()
    factor = (imports + seconds) / REFERENCE_SECONDS
    print(f"{about['device']}: imports {imports:.1f} s, a tiny compilation {seconds:.1f} s, host factor {factor:.2f}")
    about |= {"code": code_hash(Path(__file__).resolve().parents[2]), "rehearsal": options.rehearse}
    about["command"] = " ".join(sys.argv)
    path = options.out.resolve() / "gpu.json"
    results = Results(path, about, read_json(options.resume or path))
    with tempfile.TemporaryDirectory() as scratch:
        try:
            setting = bench.Bench(options, Path(scratch), results)
            chosen = [benchmarks[name] for name in benchmarks if name in selected]
            if options.rehearse:
                chosen = [replace(each, host=0.0, device=0.0) for each in chosen]
            run(chosen, setting, results, start + 60 * options.minutes, factor)
        finally:
            results.show()
    if any(each["state"].startswith("failed") for each in results.benchmarks.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
