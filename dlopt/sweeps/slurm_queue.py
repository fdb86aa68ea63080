"""What Slurm says about the arrays of a sweep: one call of squeue, and one of sacct where there is accounting.

FOLDER/workers/slurm lists the ids of the arrays, one a line.
"""

import contextlib
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dlopt.basics.files import open_to_append
from dlopt.basics.plain_values import read_regular
from dlopt.sweeps.array import WORKERS

_IDS = "slurm"  # in the folder `WORKERS`
_COMMAND_SECONDS = 60.0  # maximum for a Slurm command
# Of squeue, with their widths.
_COLUMNS = {"ArrayJobID": 24, "ArrayTaskID": 12, "State": 24, "Reason": 96, "StdOut": 1024}


@dataclass(frozen=True)
class Elements:
    """The elements of the arrays of a sweep that Slurm has not ended: id of the array -> index -> state.

    Attributes:
        answers: False if Slurm was asked and does not answer.
        reasons: Slurm's reason -> the number of elements that are pending for it.
    """

    states: Mapping[str, Mapping[int, str]]
    answers: bool = True
    reasons: Mapping[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(self.states.values())

    @property
    def by_index(self) -> dict[int, str]:
        """Returns the states by index; if two arrays have an element, that of the later array."""
        return {index: state for states in self.states.values() for index, state in states.items()}

    @property
    def running(self) -> list[str]:
        """Returns the names of the elements that are not pending: 21_3."""
        return [
            f"{array}_{index}"
            for array, states in self.states.items()
            for index, state in states.items()
            if state != "PENDING"
        ]

    @property
    def pending(self) -> int:
        """Returns how many elements wait for an allocation."""
        return sum(state == "PENDING" for states in self.states.values() for state in states.values())


def describe_counts(running: int, pending: int) -> str:
    """Formats the numbers of elements or workers: 2 running, 3 pending; "" if there are none."""
    return ", ".join(f"{count} {name}" for count, name in ((running, "running"), (pending, "pending")) if count)


def is_job_id(text: str) -> bool:
    """Returns whether this is the id of a job, not an option of a command."""
    return re.fullmatch(r"[0-9]{1,20}", text) is not None


def note_array(sweep: Path, job_id: str) -> None:
    """Adds the id of an array to the file of a sweep."""
    descriptor = open_to_append(sweep / WORKERS / _IDS)
    try:
        os.write(descriptor, f"{job_id}\n".encode())
    finally:
        os.close(descriptor)


def array_ids(sweep: Path) -> list[str]:
    """Returns the ids of the arrays of a sweep."""
    try:
        lines = read_regular(sweep / WORKERS / _IDS).decode(errors="replace").splitlines()
    except (OSError, ValueError):
        return []
    return [line for line in dict.fromkeys(lines) if is_job_id(line)]


def queued_elements(sweep: Path) -> Elements:
    """Asks squeue for the elements of a sweep: pending, configuring, running, requeued or completing ones."""
    ids = array_ids(sweep)
    if not ids or shutil.which("squeue") is None:
        return Elements({})
    form = ",".join(f"{name}:{width}" for name, width in _COLUMNS.items())
    done = run_tool("squeue", "--noheader", "--array", f"--jobs={','.join(ids)}", f"--Format={form}")
    if done is None or (done.returncode and "Invalid job id" not in done.stderr):  # of arrays that Slurm has forgotten
        return Elements({}, answers=False)
    found: dict[str, dict[int, str]] = {}
    reasons: Counter[str] = Counter()
    log = os.path.realpath(sweep / WORKERS)
    for line in done.stdout.splitlines():
        array, index, state, reason, output = _cells(line)
        # Others may have written ids into the file: only elements with output in this folder belong to the sweep.
        is_own = os.path.realpath(os.path.dirname(output.replace("%%", "%"))) == log
        if is_own and index.isdecimal():
            found.setdefault(array, {})[int(index)] = state
            reasons.update([reason] if state == "PENDING" else [])
    return Elements(found, reasons=reasons)


def _cells(line: str) -> list[str]:
    cells, start = [], 0
    for width in _COLUMNS.values():
        cells.append(line[start : start + width].strip())
        start += width
    return cells


def cancel(elements: Elements, *, pending_only: bool = False) -> int:
    """Cancels elements; returns how many there were."""
    count = elements.pending + (0 if pending_only else len(elements.running))
    if count:
        ids = [array for array in elements.states if is_job_id(array)]
        run_tool("scancel", *(["--state=PENDING"] if pending_only else []), "--", *ids)
    return count


def ended_early(sweep: Path) -> dict[str, str]:
    """Asks sacct for elements that Slurm has ended otherwise than as completed; {} without accounting."""
    ids = array_ids(sweep)
    if not ids or shutil.which("sacct") is None:
        return {}
    form = ("--noheader", "--parsable2", "--allocations", "--format=JobID,State")
    done = run_tool("sacct", *form, f"--jobs={','.join(ids)}")
    if done is None or done.returncode:
        return {}
    states = dict(line.split("|", 1) for line in done.stdout.splitlines() if line.count("|") == 1)
    # CANCELLED is followed by "by" and the number of the user.
    early = {"BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
    return {element: state.split()[0] for element, state in states.items() if early & {*state.split()[:1]}}


def max_array_size() -> int | None:
    """Returns the largest array that this cluster accepts; None if it is unknown."""
    done = run_tool("scontrol", "show", "config")
    found = None if done is None else re.search(r"^MaxArraySize\s*=\s*(\d+)$", done.stdout, re.MULTILINE)
    return int(found[1]) if found and int(found[1]) else None


def run_tool(*command: str, text: str | None = None) -> "subprocess.CompletedProcess[str] | None":
    """Runs a command of Slurm; None if it cannot be started or does not answer."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=_COMMAND_SECONDS)
    return None
