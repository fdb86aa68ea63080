"""`dlopt runs`: lists runs filtered by config, status and metric, tags and compares them, removes checkpoints."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Interval

from dlopt.basics.errors import DONE, FileError, RunError, UserError
from dlopt.basics.folders import RunFolder, short_path
from dlopt.basics.formats import format_bytes, format_count, format_value, printable
from dlopt.basics.interruption import print_note
from dlopt.basics.ranges import Count
from dlopt.commands import runs_tag
from dlopt.commands.completion import folders
from dlopt.commands.runs_diff import diff
from dlopt.commands.shared.command_line import take_command_keys
from dlopt.commands.shared.document import print_document
from dlopt.results import reading
from dlopt.results.listing import Query, print_values, show_table
from dlopt.results.reading import Condition, Record

USAGE = """\
List, filter, tag, compare and clean up runs

Usage:
  dlopt runs [DIR...] [condition...] [sort=KEY] [columns=[KEY,...]] [limit=N] [--paths] [--json]
  dlopt runs [DIR...] [condition...] curve=METRIC [points=N] [--json]
  dlopt runs tag RUN... [TAG...] [note=TEXT] [--remove]
  dlopt runs diff RUN RUN
  dlopt runs clean [DIR...] [condition...] [--yes]

Examples:
  dlopt runs                                        # all runs in outputs
  dlopt runs optimizer=adamw status=finished
  dlopt runs outputs/night 'val_accuracy>0.9' 'optimizer.lr<=0.01' sort=val_accuracy
  dlopt runs 'model=resnet*' columns=[optimizer.lr,val_loss,seconds] limit=10
  dlopt report $(dlopt runs optimizer=sgd --paths)
  dlopt runs outputs/train/DATE curve=val_loss points=40        # how a metric went, of each run
  dlopt runs tag outputs/train/DATE baseline note="lower lr"
  dlopt runs tags=baseline

Searches the folders DIR (default: outputs) recursively and lists the runs that match all conditions. A terminal shows
one line per run with the columns that fit; a pipe gets all columns and digits as tab-separated values.

  condition :: KEY=VALUE, KEY!=VALUE (with wildcards * and ?), KEY>X, KEY>=X, KEY<X or KEY<=X. KEY is a key of the \
config, a metric (val_accuracy and val_loss of the best epoch, steps, seconds, ...) or status: finished, \
stopped_early, running, interrupted, unfinished (killed), failed. tags=NAME holds for runs that have this tag
  {_list}

dlopt runs tag:
  Adds tags to runs, which `dlopt train tags=[a,b] note=TEXT` sets at the start. Resuming a run keeps them.

  {_tag}

dlopt runs diff:
  Prints the keys of the config and the metrics in which two runs differ, side by side.

dlopt runs clean:
  Lists the checkpoints step-N.pt (and abandoned-*.pt of older versions) and removes them after confirmation. Keeps
  best.pt and last.pt, and all checkpoints of runs that are running or have a damaged last.pt.

  {_clean}
"""


complete = folders
_tag = runs_tag.edit  # declares the keys of `dlopt runs tag`


def runs(arguments: list[str]) -> int:
    """Lists, tags or compares runs, or removes checkpoints. Raises `UserError`."""
    if arguments[:1] in (["tag"], ["diff"]):
        return (runs_tag.tag if arguments[0] == "tag" else diff)(arguments[1:])
    command, rest = (_clean, arguments[1:]) if arguments[:1] == ["clean"] else (_list, arguments)
    folders, conditions, command_values = parse(rest, command, "runs")
    if not folders and not Path("outputs").is_dir():
        raise FileError("outputs: no such folder; name the folders to search")
    return command(folders or [Path("outputs")], conditions, **command_values)


def _list(
    folders: list[Path],
    conditions: list[Condition],
    *,
    sort: Annotated[str | None, "KEY: sort by a metric (best first) or by a key of the config (ascending)"] = None,
    columns: Annotated[
        list[str] | None, "[KEY,...]: keys and metrics to show (default: those that differ between the runs)"
    ] = None,
    limit: Annotated[Count | None, "N: show only the first N runs"] = None,
    curve: Annotated[str | None, "METRIC: how it went in each run", "not with columns or paths"] = None,
    points: Annotated[int, Interval(ge=3), "N: at most; first, last, best, others evenly spaced", "needs curve"] = 40,
    paths: Annotated[bool, "--: print only the folders"] = False,
    json: Annotated[
        bool, "--: print a JSON document with all keys and metrics, or with those of columns", "not with paths"
    ] = False,
) -> int:
    """Lists runs: a table on a terminal, tab-separated values elsewhere. Raises `UserError`."""
    query = Query(folders, conditions, sort, columns, limit)
    records, damaged = query.find()
    if curve is not None:
        from dlopt.results import documents

        (print_document if json else _print_curves)(documents.curves_document(records, damaged, curve, points))
    elif paths:
        for record in records:
            print(short_path(record.path))
    elif json:
        from dlopt.results import documents  # imports NumPy, which the list does not need

        entries = [documents.run_entry(record, columns) for record in records]
        print_document({"runs": entries, "skipped": documents.skipped_entries(damaged)})
    else:
        (show_table if sys.stdout.isatty() else print_values)(query, records)
    if not records:
        where = " ".join(short_path(folder) for folder in folders)
        matching = f"no run matches {' '.join(condition.line for condition in conditions)}" if conditions else "no runs"
        print_note(printable(f"{where}: {matching}"))
    for folder in damaged:
        _print_skipped(folder.path, folder.reason)
    return DONE


def _print_curves(content: Mapping[str, Any]) -> None:
    print("\t".join(["run", "epoch", "step", printable(content["metric"])]))
    for run in content["runs"]:
        for point in run["points"]:
            print("\t".join([printable(short_path(Path(run["folder"]))), *map(format_value, point.values())]))


def _print_skipped(path: Path, reason: str) -> None:
    print_note(printable(f"{short_path(path)}: skipped: {reason}"))


def parse(
    arguments: Sequence[str], target: Callable[..., object], command: str
) -> tuple[list[Path], list[Condition], dict[str, Any]]:
    """Splits arguments into existing folders, conditions, and the keys that `target` declares. Raises `UserError`."""
    folders = [Path(argument) for argument in arguments if Path(argument).is_dir()]
    values, others = take_command_keys(
        target, [argument for argument in arguments if Path(argument) not in folders], command
    )
    conditions: list[Condition] = []
    for argument in others:
        if (parsed := reading.condition(argument)) is None:
            raise FileError(f"{argument}: no such folder")
        conditions.append(parsed)
    return folders, conditions, values


# -- dlopt runs clean


def _clean(
    folders: list[Path],
    conditions: list[Condition],
    *,
    yes: Annotated[bool, "--: do not ask for confirmation"] = False,
) -> int:
    """Lists removable checkpoints and removes them after confirmation. Raises `UserError`, `RunError`."""
    records, damaged = Query(folders, conditions).find()
    sizes = {path: size for record in records for path, size in _removable(record).items()}
    for folder in damaged:
        _print_skipped(folder.path, folder.reason)
    if not sizes:
        print(f"{format_count('runs', len(records))}: nothing to remove")
        return DONE
    for path, size in sizes.items():
        print(f"{format_bytes(size):>9}  {printable(short_path(path))}")
    total = f"{format_count('checkpoints', len(sizes))}, {format_bytes(sum(sizes.values()))}"
    if not yes and not _confirm(f"remove {total}? [y/N] "):
        print("nothing was removed")
        return DONE
    removed = list(_remove(sizes))
    print(f"removed {total}" if len(removed) == len(sizes) else f"removed {len(removed)} of {total}")
    return DONE


def _removable(record: Record) -> dict[Path, int]:
    """Returns removable checkpoints with the bytes freed, if the run is not running and has an intact last.pt."""
    from dlopt.training.checkpoint.checkpoints import freed_bytes, is_intact, removable

    folder = record.path / "checkpoints"
    paths = removable(folder)
    if paths and record.status == "running":
        _print_skipped(record.path, "it is running")
    elif paths and not is_intact(folder / "last.pt"):
        _print_skipped(record.path, "its last.pt is missing or damaged")
    else:
        return {path: freed_bytes(path) for path in paths}
    return {}


def _confirm(question: str) -> bool:
    if not sys.stdin.isatty():
        raise UserError("runs clean: no terminal to confirm; check the list, then use --yes")
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _remove(checkpoints: Iterable[Path]) -> Iterable[Path]:
    """Removes checkpoints with their checksums and shards, except of runs that were resumed meanwhile."""
    from dlopt.training.checkpoint import sharded
    from dlopt.training.checkpoint.checkpoints import remove

    for path in checkpoints:
        if RunFolder(path.parent.parent).is_live():
            _print_skipped(path, "its run was resumed")
            continue
        try:
            remove(path)
            sharded.remove_unused(path.parent)
        except OSError as error:
            raise RunError(f"{path}: cannot remove: {error.strerror}") from None
        yield path
