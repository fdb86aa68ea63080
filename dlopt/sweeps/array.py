"""The job array of a submitted grid: its jobs, and which of them an element runs.

FOLDER/workers/jobs.json lists the jobs. Element i of n runs a slice of this list that follows from i and n alone.
What has happened to a job is in its run folder only.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from dlopt.basics.errors import UserError
from dlopt.basics.files import write_json
from dlopt.basics.folders import RunFolder, inside
from dlopt.basics.plain_values import read_regular
from dlopt.basics.stored import Stored

WORKERS = "workers"  # in the folder of a sweep: the files of a submitted one, and the locks of a search's processes
JOBS, SUBMISSION, STOP = "jobs.json", "submission.json", "stop"  # in that folder
STOP_RUN = ".stop"  # in the folder of a run that is to stop
SUBMIT_AGAIN = "restore it, or submit the sweep again with this version of dlopt"
_MAX_BYTES = 1 << 28  # 10,000 jobs have 1 MB
_ELEMENTS_PER_SLOT = 4  # by default: few enough for Slurm, and enough to keep all slots busy until the end
_INDEX_VARIABLES = {  # of a scheduler -> its first index
    "SLURM_ARRAY_TASK_ID": 0,
    "PBS_ARRAY_INDEX": 0,
    "PBS_ARRAYID": 0,  # TORQUE
    "SGE_TASK_ID": 1,
    "LSB_JOBINDEX": 1,  # LSF
    "AWS_BATCH_JOB_ARRAY_INDEX": 0,
    "JOB_COMPLETION_INDEX": 0,  # an indexed job of Kubernetes
}
_NO_INDEX = {"SGE_TASK_ID": "undefined", "LSB_JOBINDEX": "0"}  # their values in a job that is no array


class JobEntry(NamedTuple):
    """A job of the array. `folder`: relative to the sweep's; `length`: its overrides of epochs and steps."""

    folder: str
    label: str
    length: str

    def run(self, sweep: Path) -> RunFolder:
        """Returns the folder of the job. Raises `UserError` for a folder elsewhere."""
        return RunFolder(inside(sweep, self.folder, str(sweep)))


@dataclass(frozen=True)
class JobArray:
    """The jobs of a submitted grid, and the number of elements that share them.

    `counts_diverged`: a diverged run is a result, as in a comparison: it does not run again.
    """

    jobs: tuple[JobEntry, ...]
    elements: int
    counts_diverged: bool = False

    def jobs_of(self, element: int) -> range:
        """Returns the numbers of the jobs that an element runs."""
        return slice_of(len(self.jobs), element, self.elements)

    def element_of(self, job: int) -> int:
        """Returns the element that runs a job."""
        return ((job + 1) * self.elements - 1) // len(self.jobs)

    def has_ended(self, run: RunFolder) -> bool:
        """Returns whether a job has a result."""
        return run.has_ended() or self.has_diverged(run)

    def has_diverged(self, run: RunFolder) -> bool:
        """Returns whether a job has diverged, where this is a result."""
        return self.counts_diverged and run.has_diverged()

    def write(self, sweep: Path) -> None:
        write_json(sweep / WORKERS / JOBS, asdict(self), indent=None)


def is_submitted(sweep: Path) -> bool:
    return (sweep / WORKERS / SUBMISSION).is_file()


def stop_reason(sweep: Path) -> str | None:
    """Returns why the processes of a series must stop; None to continue."""
    try:
        return read_regular(sweep / WORKERS / STOP).decode(errors="replace")[:200]
    except OSError:
        return None
    except ValueError as error:
        return f"{WORKERS}/{STOP} {error}"


def read_array(sweep: Path) -> JobArray | None:
    """Reads the jobs of a submitted grid; None for another sweep. Raises `UserError` for a damaged file."""
    stored = Stored(sweep / WORKERS / JOBS, JobArray, _MAX_BYTES, SUBMIT_AGAIN)
    if (array := stored.read()) is None:
        return None
    if not (0 < array.elements <= len(array.jobs) and all(_is_below(job.folder) for job in array.jobs)):
        raise stored.damaged("it holds no jobs of this sweep")
    return array


def _is_below(folder: str) -> bool:
    parts = folder.split("/")
    return not os.path.isabs(folder) and ".." not in parts and folder not in ("", ".") and "\0" not in folder


def slice_of(count: int, part: int, parts: int) -> range:
    """Returns part `part` (from 0) of `parts` consecutive slices of range(count), whose sizes differ by at most 1."""
    return range(count * part // parts, count * (part + 1) // parts)


def count_elements(jobs: int, chunk: int | None, n_jobs: int, limit: int | None) -> int:
    """Returns the number of elements of an array.

    Args:
        chunk: jobs of an element; None for the default.
        n_jobs: elements at once; 0 for elements that the user starts.
        limit: the largest array that the cluster accepts; None if it is unknown.

    Raises:
        UserError: `chunk` makes a larger array.
    """
    if chunk is None:
        return min(jobs, _ELEMENTS_PER_SLOT * n_jobs or jobs, limit or jobs)
    elements = -(-jobs // chunk)
    if limit is not None and elements > limit:
        raise UserError(
            f"hydra.launcher.chunk={chunk}: {jobs} jobs make an array of {elements} elements, but MaxArraySize of this "
            f"cluster is {limit}; use hydra.launcher.chunk={-(-jobs // limit)}"
        )
    return elements


def format_indices(indices: Iterable[int]) -> str:
    """Formats the indices of an array as sbatch reads them: 0-3,7."""
    ordered = sorted(indices)
    starts = [b for a, b in pairwise([-2, *ordered]) if b != a + 1]
    ends = [a for a, b in pairwise([*ordered, ordered[-1] + 2]) if b != a + 1]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def parse_part(text: str) -> tuple[int, int]:
    """Returns the part (from 0) and the number of parts that `part=3/64` names. Raises `UserError`."""
    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and len(text) < 20):
        raise UserError(f"part={text}: must be two numbers, for example part=3/64 for the third of 64 parts")
    if not 1 <= int(number) <= int(parts):
        raise UserError(f"part={text}: the parts are 1/{parts} to {parts}/{parts}")
    return int(number) - 1, int(parts)


def own_numbers(array: JobArray, part: Sequence[int] | None, variables: Mapping[str, str]) -> range:
    """Returns the numbers of the jobs that this process runs.

    Those of `part`; else of the element whose index the scheduler has set in the environment; else all. Raises
    `UserError` for an index that the array does not have.
    """
    if part is not None:
        return slice_of(len(array.jobs), *part)
    for name, first in _INDEX_VARIABLES.items():
        value = variables.get(name, "")
        if value in ("", _NO_INDEX.get(name)):
            continue
        last = first + array.elements - 1
        if not (value.isdecimal() and len(value) < 10 and first <= int(value) <= last):
            raise UserError(f"{name}={value}: this sweep has the elements {first} to {last}")
        return array.jobs_of(int(value) - first)
    return range(len(array.jobs))
