#!/usr/bin/env python
"""Adds the results of a benchmark to those that come with dlopt, in place of earlier ones of the same optimizers.

dlopt benchmark optimizer=adabelief,lamb full=true output=FOLDER    trains all trials to the end
.venv/bin/python scripts/league.py FOLDER                           then docs/generate.py and scripts/gallery

Optimizers whose trials have not all ended are left out. With studies=5, the intervals of an optimizer are narrower.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dlopt.basics.errors import UserError
from dlopt.lab.benchmark.results import REFERENCE, Results, load_reference, read, to_json


def merged(shipped: Results, own: Results) -> Results:
    """Returns the shipped results with the complete optimizers of `own`. Raises ValueError if they do not compare."""
    for key in ("tier", "track", "trials", "workloads"):
        if getattr(shipped, key) != getattr(own, key):
            raise ValueError(f"{key}: {getattr(own, key)}; the shipped results have {getattr(shipped, key)}")
    if own.studies < shipped.studies:
        raise ValueError(f"studies: {own.studies}; the shipped results have at least {shipped.studies}")
    trials = own.studies * own.trials
    names = [name for name in own.optimizers if len(own.records(name)) == trials * len(own.workloads)]
    cells = {key: cell for key, cell in shipped.cells.items() if key[0] not in names}
    spaces = {key: space for key, space in shipped.spaces.items() if key not in names}
    return replace(
        shipped,
        cells=cells | {key: cell for key, cell in own.cells.items() if key[0] in names},
        spaces=spaces | {name: own.spaces[name] for name in names},
        facts=_facts(shipped.facts, own.facts, names),
    )


def _facts(shipped: Any, own: Any, names: Sequence[str]) -> dict[str, Any]:
    """Returns the facts of both: all commands, the hours of all, the date and versions of the last."""
    kept = [(name, rest) for name, rest in _typed(shipped["command"]) if name not in names]
    groups: dict[str, list[str]] = {}
    for name, rest in [*kept, *((name, rest) for name, rest in _typed(own["command"]) if name in names)]:
        groups.setdefault(rest, []).append(name)
    commands = [f"dlopt benchmark optimizer={','.join(dict.fromkeys(each))} {rest}" for rest, each in groups.items()]
    hours = round(shipped["core_hours"] + own["core_hours"], 2)
    return {**shipped, **own, "command": "; ".join(commands), "core_hours": hours}


def _typed(commands: str) -> Iterator[tuple[str, str]]:
    """Yields each optimizer of the commands with the other words, without those of the machine."""
    for command in commands.split("; "):
        words = [word for word in command.split()[2:] if not word.startswith(("output=", "hydra."))]
        rest = " ".join(word for word in words if not word.startswith("optimizer="))
        for word in words:
            if word.startswith("optimizer="):
                yield from ((name, rest) for name in word.removeprefix("optimizer=").split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output of `dlopt benchmark`")
    folder = parser.parse_args().folder
    try:
        own = read(folder / "results.json")
        if own is None:
            sys.exit(f"{folder}: has no results.json")
        shipped = load_reference(own.tier, own.track)
        if shipped is None:
            sys.exit(f"{own.tier}: no results come with dlopt")
        found = merged(shipped, own)
    except (UserError, ValueError) as error:
        sys.exit(str(error))
    name = own.tier if own.track == "external_tuning" else f"{own.tier}_{own.track}"
    (REFERENCE / f"{name}.json").write_text(to_json(found), encoding="utf-8")
    print(f"{len(found.optimizers)} optimizers")


if __name__ == "__main__":
    main()
