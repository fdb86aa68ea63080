"""`dlopt runs clean`: removes checkpoints that are neither the best nor the last of their run."""

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlopt.analysis.report.reading import Record, printable
from dlopt.commands.finding import chosen, parse
from dlopt.errors import RunError, UserError
from dlopt.folders import RunFolder
from dlopt.job import DONE, complain
from dlopt.tracking.layout import short_path


@dataclass(frozen=True)
class _Spare:
    path: Path
    frees: int  # bytes; none while another name of the same file stays


def clean(arguments: list[str]) -> int:
    """Shows what can go, asks, and removes it. Raises `UserError`; `RunError` when a file cannot be removed."""
    is_sure = "--yes" in arguments
    asked = parse([each for each in arguments if each != "--yes"], ())
    records, damaged = chosen(asked)
    spare = [each for record in records for each in _spare(record)]
    for broken in damaged:
        complain(printable(f"{short_path(broken.path)}: left alone: {broken.reason}"))
    if not spare:
        print(f"{len(records)} run{'' if len(records) == 1 else 's'}: nothing to remove")
        return DONE
    for each in spare:
        print(f"{_size(each.frees):>9}  {printable(short_path(each.path))}")
    total = f"{len(spare)} checkpoint{'' if len(spare) == 1 else 's'}, {_size(sum(each.frees for each in spare))}"
    if not is_sure and not _agrees(f"remove {total}? [y/N] "):
        print("nothing was removed")
        return DONE
    removed = list(_remove(spare))
    print(f"removed {total}" if len(removed) == len(spare) else f"removed {len(removed)} of {total}")
    return DONE


def _spare(record: Record) -> list[_Spare]:
    """The checkpoints that the run can do without: last.pt must be whole, and nobody at work there."""
    from dlopt.train import sharded
    from dlopt.train.checkpoint import is_whole

    folder = record.path / "checkpoints"
    names = re.compile(r"step-\d+\.pt")
    if folder.is_symlink() or not folder.is_dir():
        return []
    paths = sorted(each for each in folder.iterdir() if names.fullmatch(each.name) and not each.is_symlink())
    if not paths:
        return []
    if record.status == "running" or not is_whole(folder / "last.pt"):
        why = "it is running" if record.status == "running" else "its last.pt is missing or damaged"
        complain(printable(f"{short_path(record.path)}: left alone: {why}"))
        return []
    return [
        _Spare(path, (path.stat().st_size if path.stat().st_nlink == 1 else 0) + sharded.size(path)) for path in paths
    ]


def _agrees(question: str) -> bool:
    if not sys.stdin.isatty():
        raise UserError("runs clean: there is no terminal to ask at; look at the list and type --yes")
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _remove(spare: Sequence[_Spare]) -> Iterable[Path]:
    """Removes each with its checksum and shards, unless its run has begun to work again meanwhile."""
    from dlopt.train import sharded

    for each in spare:
        if RunFolder(each.path.parent.parent).is_live():
            complain(printable(f"{short_path(each.path)}: left alone: its run is at work again"))
            continue
        try:
            each.path.unlink(missing_ok=True)
            each.path.with_name(f"{each.path.name}.sha256").unlink(missing_ok=True)
            sharded.remove_unused(each.path.parent)
        except OSError as error:
            raise RunError(f"{each.path}: cannot be removed: {error.strerror}") from None
        yield each.path


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
