#!/usr/bin/env python
"""Tests the claims of the lecture recipes with seeds that were not used, and compares their verdicts with docs/gallery.

.venv/bin/python scripts/claims.py --runs FOLDER               run all recipes with seeds 1000, 1001, ..., then compare
.venv/bin/python scripts/claims.py --runs FOLDER --minutes 60  start no recipe after an hour; the next call continues
.venv/bin/python scripts/claims.py --runs FOLDER --offset 2000 momentum   other seeds, named recipes
.venv/bin/python scripts/claims.py --runs FOLDER --table       only compare what has been run
.venv/bin/python scripts/claims.py --runs FOLDER --table --record   also write the verdicts to docs/gallery/fresh

The runs are in FOLDER/OFFSET/NAME; an interrupted recipe resumes. Prints a line per claim whose verdict differs, a
summary and the hours used. The exit code is 1 if a supported claim is contradicted, or fewer than 97 % of the verdicts
are the same.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
GALLERY = ROOT / "docs" / "gallery"
RESULTS = "comparison.json"
FRESH = GALLERY / "fresh"  # OFFSET.json: recipe -> hash of its claims, seeds, verdicts; docs/generate.py counts them
HOURS = "seconds.json"  # recipe -> seconds, in FOLDER/OFFSET
GOAL = 0.97  # of the verdicts are the same


class Pair(NamedTuple):
    """A claim with its verdict in docs/gallery, and with fresh seeds."""

    recipe: str
    claim: str
    old: str
    new: str
    outcome: str

    @property
    def is_reversed(self) -> bool:
        return {self.old, self.new} == {"supported", "contradicted"}


def pairs(name: str, old: dict[str, Any], new: dict[str, Any]) -> Iterator[Pair]:
    """Yields the claims of a recipe that both results have; claims that were changed since do not count."""
    verdicts = {claim["claim"]: claim["verdict"] for claim in old["claims"]}
    for claim in new["claims"] if old.get("claims_hash") == new.get("claims_hash") else []:
        if claim["claim"] in verdicts:
            yield Pair(name, claim["claim"], verdicts[claim["claim"]], claim["verdict"], claim["outcome"])


def report(found: list[Pair]) -> tuple[list[str], bool]:
    """Returns the lines of the comparison, and whether the verdicts are good enough."""
    different = [pair for pair in found if pair.old != pair.new]
    lines = [f"{pair.recipe}: {pair.old} -> {pair.new}: {pair.claim}\n    {pair.outcome}" for pair in different]
    same = len(found) - len(different)
    percent = 100 * same / len(found) if found else 0.0
    reversals = sum(pair.is_reversed for pair in found)
    lines.append(
        f"{same} of {len(found)} verdicts are the same ({percent:.1f} %); supported <-> contradicted: {reversals}"
    )
    return lines, bool(found) and same >= GOAL * len(found) and not reversals


def run(name: str, folder: Path, offset: int) -> int:
    """Runs a recipe with as many fresh seeds as its results have; resumes it if it was interrupted."""
    count = len(read(GALLERY / f"{name}.json")["seeds"])
    seeds = ",".join(str(offset + i) for i in range(count))
    line = [f"experiment=lecture/{name}", f"hydra.run.dir={folder}", "resume=auto", f"comparison.seeds=[{seeds}]"]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    print(f"dlopt train {' '.join(line)}", flush=True)
    command = [sys.executable, "-m", "dlopt", "train", *line]
    return subprocess.run(command, env=os.environ | threads, cwd=ROOT, stdout=subprocess.DEVNULL).returncode


def record(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Writes the verdicts of fresh seeds for docs/claims.md; keeps those of recipes that are not in `results`."""
    path.parent.mkdir(exist_ok=True)
    verdicts = read(path) if path.exists() else {}
    for name, saved in results.items():
        verdicts[name] = {
            "claims_hash": saved["claims_hash"],
            "seeds": len(saved["seeds"]),
            "verdicts": {claim["claim"]: claim["verdict"] for claim in saved["claims"]},
        }
    path.write_text(json.dumps(dict(sorted(verdicts.items())), indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def run_all(names: Iterable[str], folder: Path, offset: int, minutes: float | None) -> int:
    """Runs the recipes without results; returns the exit code."""
    begin = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (folder / name / RESULTS).exists():
            continue
        if minutes is not None and time.monotonic() - begin > 60 * minutes:
            print("out of time; the same command continues")
            return 0
        started = time.monotonic()
        code = run(name, folder / name, offset)
        seconds = read(folder / HOURS) if (folder / HOURS).exists() else {}
        seconds[name] = round(seconds.get(name, 0) + time.monotonic() - started)
        (folder / HOURS).write_text(json.dumps(seconds, indent=1) + "\n")
        if code:
            return code
    return 0


def main() -> int:
    every = sorted(path.stem for path in GALLERY.glob("*.json"))
    parser = argparse.ArgumentParser(description="Test the claims of the lecture recipes with fresh seeds")
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all recipes with results in docs/gallery")
    parser.add_argument(
        "--runs", type=Path, required=True, metavar="FOLDER", help="keep the runs here, and resume them"
    )
    parser.add_argument("--offset", type=int, default=1000, help="the first seed (default: 1000)")
    parser.add_argument("--minutes", type=float, help="start no recipe later than this")
    parser.add_argument("--table", action="store_true", help="only compare what has been run")
    parser.add_argument("--record", action="store_true", help="write the verdicts to docs/gallery/fresh")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(every):
        parser.error(f"no results in docs/gallery: {', '.join(sorted(unknown))}")
    names, folder = arguments.names or every, arguments.runs.resolve() / str(arguments.offset)
    if not arguments.table and (code := run_all(names, folder, arguments.offset, arguments.minutes)):
        return code
    done = [name for name in names if (folder / name / RESULTS).exists()]
    both = [(name, read(GALLERY / f"{name}.json"), read(folder / name / RESULTS)) for name in done]
    lines, is_good = report([pair for each in both for pair in pairs(*each)])
    print("\n".join(lines))
    if arguments.record:
        record({name: new for name, _, new in both}, FRESH / f"{arguments.offset}.json")
    if changed := [name for name, old, new in both if old.get("claims_hash") != new.get("claims_hash")]:
        print(f"claims changed since: {', '.join(changed)}")
    used = sum(read(folder / HOURS).values()) if (folder / HOURS).exists() else 0
    print(f"{len(done)} of {len(names)} recipes with seeds from {arguments.offset}; {used / 3600:.1f} hours")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
