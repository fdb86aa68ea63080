"""The table of verified optimizers, from docs/verify."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from markup import code

MARKS = {"pass": "✓", "fail": "✗", "undecided": "?", "not applicable": "·"}
SHORT = {"missing gradients": "missing", "implementations": "foreach, fused", "unusual input": "unusual"}


def matrix(folder: Path) -> str:
    """Returns the versions, a table per package, and the failures that were confirmed by hand."""
    packages: Mapping[str, Any] = json.loads((folder / "matrix.json").read_text())
    notes: list[dict[str, Any]] = yaml.safe_load((folder / "confirmed.yaml").read_text())
    numbers = {(name, note["check"]): number for number, note in enumerate(notes, 1) for name in note["optimizers"]}
    parts = [_summary(packages, numbers)]
    for package, entry in packages.items():
        parts.append(f"## {package} {entry['version']}\n\n{_table(package, entry['optimizers'], numbers)}")
    parts.append("## Confirmed failures\n\n" + "\n".join(_note(number, note) for number, note in enumerate(notes, 1)))
    return "\n\n".join(parts)


def checks(packages: Mapping[str, Any]) -> list[str]:
    """Returns the names of the checks that pass or fail."""
    found = next(
        each for entry in packages.values() for each in entry["optimizers"].values() if not isinstance(each, str)
    )
    return [name for name in found if name not in ("cost", "defaults")]


def _summary(packages: Mapping[str, Any], numbers: Mapping[tuple[str, str], int]) -> str:
    results = [
        (f"{package}.{name}", check, status)
        for package, entry in packages.items()
        for name, found in entry["optimizers"].items()
        if not isinstance(found, str)
        for check, (status, _) in found.items()
    ]
    optimizers = len({name for name, _, _ in results})
    count = {status: sum(each == status for _, _, each in results) for status in MARKS}
    failed = {name for name, _, status in results if status == "fail"}
    confirmed = sum((name, check) in numbers for name, check, status in results if status == "fail")
    return (
        f"{optimizers} optimizers: {count['pass']:,} checks pass, {count['fail']} fail, {count['undecided']} are "
        f"undecided, {count['not applicable']} do not apply; {optimizers - len(failed)} optimizers fail none. "
        f"{confirmed} of the failures have a number: they were reproduced by hand. A cross without a number is "
        "unconfirmed: the check may be wrong about it."
    )


def _table(package: str, optimizers: Mapping[str, Any], numbers: Mapping[tuple[str, str], int]) -> str:
    names = checks({package: {"optimizers": optimizers}})
    passing = [name for name, found in optimizers.items() if not isinstance(found, str) and _passes(found, names)]
    lines = [f"Every check that applies passes: {', '.join(map(code, passing))}.", ""] if passing else []
    lines += [
        "| optimizer | " + " | ".join(SHORT.get(name, name) for name in names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for optimizer, found in optimizers.items():
        if optimizer in passing:
            continue
        if isinstance(found, str):
            lines.append(f"| `{optimizer}` | {found}" + " |" * len(names))
            continue
        cells = []
        for name in names:
            number = numbers.get((f"{package}.{optimizer}", name))
            status = found[name][0]
            cells.append(MARKS[status] + (f" {number}" if status == "fail" and number else ""))
        lines.append(f"| `{optimizer}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _passes(found: Mapping[str, Any], names: list[str]) -> bool:
    """Returns whether every check passes or does not apply."""
    return {found[name][0] for name in names} <= {"pass", "not applicable"}


def _note(number: int, note: Mapping[str, Any]) -> str:
    names = ", ".join(f"`{name.partition('.')[2]}` ({name.partition('.')[0]})" for name in note["optimizers"][:12])
    if len(note["optimizers"]) > 12:
        names += f" and {len(note['optimizers']) - 12} others"
    return f"{number}. **{note['check']}**: {names}. {note['text'].strip()}"
