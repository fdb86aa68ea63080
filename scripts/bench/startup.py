"""From the command to the first update on digits, against importing torch and torchvision alone.

    python scripts/bench/startup.py [--rounds 5] [--json FILE] [--imports] [further words of dlopt train]

Both are measured in turn, each in a process of its own; CPU seconds (user and system) count, since other work on the
machine changes them least, and wall-clock seconds stand beside them. The process ends behind the first update. Unless
other words are typed it is that of `dlopt train device=cpu threads=1`: several threads would wait for each other by
computing, which CPU seconds would show.
--imports lists the modules on the way that take longest and are not torch's or torchvision's.
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

# Each prints its seconds of CPU and of wall-clock, counted from the start of its process, as its last line.
TOLD = """
def tell():
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
IMPORTS = TOLD + "import torch, torchvision\ntell()\n"
FIRST_UPDATE = (
    TOLD
    + """
import importlib.util, sys

class AfterFirstUpdate:
    "Ends the process behind the first update; it changes the module once that is imported, and imports nothing."
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
                tell()
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
    """CPU seconds, wall-clock seconds, and what it wrote on stderr."""
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
    """Modules that torch and torchvision do not bring, with the seconds of all that each brings, the longest first."""

    def read(code: str, *arguments: str) -> dict[str, float]:
        _, _, told = run(code, *arguments, options=("-X", "importtime"))
        lines = re.findall(r"import time:\s+(\d+) \|\s+(\d+) \| +(\S+)", told)
        return {name: int(own) / 1e6 for own, _, name in lines}

    alone, first = read(IMPORTS), read(FIRST_UPDATE, "train", *words)
    packages: dict[str, float] = {}
    for name, seconds in first.items():
        if name not in alone:
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
    figures: dict[str, list[tuple[float, float]]] = {"imports": [], "first update": []}
    for number in range(options.rounds + 1):
        for name, code in {"imports": IMPORTS, "first update": FIRST_UPDATE}.items():
            cpu, wall, _ = run(code, *(["train", *words] if name == "first update" else []))
            if number:  # the first round fills the caches of files
                figures[name].append((cpu, wall))
    results: dict[str, Any] = {"command": " ".join(["dlopt train", *words]), "rounds": figures}
    for place, kind in enumerate(("cpu", "wall")):
        columns = {name: [each[place] for each in rounds] for name, rounds in figures.items()}
        ratio = statistics.median(b / a for a, b in zip(*columns.values(), strict=True))
        medians = {name: statistics.median(values) for name, values in columns.items()}
        results[kind] = {**medians, "ratio": ratio}
        print(
            f"{kind:5} import torch, torchvision: {medians['imports']:.2f} s   "
            f"to the first update: {medians['first update']:.2f} s   {ratio:.2f} x   (goal: <= 1.3)"
        )
    if options.imports:
        for name, seconds in imports(words)[:30]:
            print(f"{1000 * seconds:8.0f} ms  {name}")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
