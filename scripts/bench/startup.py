"""Benchmarks start-up: from the command to the first update on digits, against importing torch and torchvision.

    python scripts/bench/startup.py [--rounds 5] [--json FILE] [--imports] [arguments of dlopt train]

Measures both in turn, each in a new process that ends after the first update. Reports CPU seconds (user and system),
which depend least on other load, and wall-clock seconds. The default is `dlopt train device=cpu threads=1`, because
several threads spin while they wait, which counts as CPU time.
--imports lists the slowest modules that torch and torchvision do not import.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# Prints the CPU and wall-clock seconds since the start of the process as the last line, and exits.
REPORT = """
def report():
    import os, resource, sys, time
    used = resource.getrusage(resource.RUSAGE_SELF)
    with open("/proc/self/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    with open("/proc/uptime") as file:
        wall = float(file.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    sys.__stdout__.write(f"\\n{used.ru_utime + used.ru_stime} {wall}\\n")
    sys.__stdout__.flush()
    os._exit(0)
"""
IMPORTS = REPORT + "import torch, torchvision\nreport()\n"
FIRST_UPDATE = (
    REPORT
    + """
import importlib.util, sys

class AfterFirstUpdate:
    "Import hook that patches the step module to exit after the first update, without importing anything itself."
    def find_spec(self, name, path=None, target=None):
        if name != "dlopt.training.step":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            update = module.Step.update
            def first(self, *arguments, **keys):
                update(self, *arguments, **keys)
                report()
            module.Step.update = first
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, AfterFirstUpdate())
from dlopt.cli import main
sys.argv = ["dlopt", *sys.argv[1:]]
main()
"""
)


def run(code: str, *arguments: str, options: tuple[str, ...] = ()) -> tuple[float, float, str]:
    """Runs code in a new process; returns CPU seconds, wall-clock seconds and stderr."""
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [sys.executable, *options, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    if result.returncode:
        raise SystemExit(f"startup.py: {result.stderr.strip().splitlines()[-1:]}")
    cpu, wall = result.stdout.strip().splitlines()[-1].split()
    return float(cpu), float(wall), result.stderr


def imports(words: list[str]) -> list[tuple[str, float]]:
    """Returns packages that torch and torchvision do not import, with their import seconds, slowest first."""

    def read(code: str, *arguments: str) -> dict[str, float]:
        _, _, stderr = run(code, *arguments, options=("-X", "importtime"))
        lines = re.findall(r"import time:\s+(\d+) \|\s+(\d+) \| +(\S+)", stderr)
        return {name: int(self_time) / 1e6 for self_time, _, name in lines}

    baseline, first = read(IMPORTS), read(FIRST_UPDATE, "train", *words)
    packages: dict[str, float] = {}
    for name, seconds in first.items():
        if name not in baseline:
            package = name if name.startswith(("dlopt.", "torch.")) else name.partition(".")[0]
            packages[package] = packages.get(package, 0.0) + seconds
    return sorted(packages.items(), key=lambda item: -item[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--imports", action="store_true")
    options, words = parser.parse_known_args()
    words = words or ["device=cpu", "threads=1"]
    times: dict[str, list[tuple[float, float]]] = {"imports": [], "first update": []}
    for number in range(options.rounds + 1):
        for name, code in {"imports": IMPORTS, "first update": FIRST_UPDATE}.items():
            cpu, wall, _ = run(code, *(["train", *words] if name == "first update" else []))
            if number:  # the first round warms the file cache
                times[name].append((cpu, wall))
    results: dict[str, Any] = {"command": " ".join(["dlopt train", *words]), "rounds": times}
    for index, kind in enumerate(("cpu", "wall")):
        columns = {name: [measurement[index] for measurement in rounds] for name, rounds in times.items()}
        ratio = statistics.median(b / a for a, b in zip(*columns.values(), strict=True))
        medians = {name: statistics.median(values) for name, values in columns.items()}
        results[kind] = {**medians, "ratio": ratio}
        print(
            f"{kind:5} import torch, torchvision: {medians['imports']:.2f} s   "
            f"first update: {medians['first update']:.2f} s   {ratio:.2f}x   (goal: <= 1.3)"
        )
    if options.imports:
        for name, seconds in imports(words)[:30]:
            print(f"{1000 * seconds:8.0f} ms  {name}")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
