"""A warm worker: a process in a Slurm job that runs several short jobs of a sweep, one after another.

`python -m dlopt.sweeps.worker FOLDER SECONDS` forks each job from a server that has imported torch once, as a local
sweep does (see `pool`). The second job and those after it wait neither for imports nor in the queue.

The sweep and the worker communicate through two files in FOLDER, `jobs` and `log`. Each has one writer, which appends
JSON lines. A network file system shows new lines as soon as the file is opened, but a new file only after a delay.
"""

import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from multiprocessing import connection
from pathlib import Path
from typing import Any

from dlopt.basics.errors import DONE, INTERRUPTED
from dlopt.basics.files import NewLines
from dlopt.basics.interruption import Interruption
from dlopt.sweeps.pool import spawn, warm_up

JOBS, LOG = "jobs", "log"
_IDLE_SECONDS = 20.0  # without a job, after which a worker ends
_SHARE = 10  # a worker takes another job if the remaining time is this multiple of its longest job


class Lines:
    """JSON objects in the lines of a file that this process appends to, or reads from."""

    def __init__(self, path: Path) -> None:
        self._path, self._new = path, NewLines(path)

    def append(self, **line: Any) -> None:
        with self._path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")

    def read(self) -> list[dict[str, Any]]:
        """Returns the lines that were added since the last call. Raises OSError."""
        return [json.loads(line) for line in self._new.read().splitlines()]


def create(folder: Path) -> Path:
    """Creates the folder of a worker, and returns it."""
    folder.mkdir(parents=True)
    for name in (JOBS, LOG):
        (folder / name).touch()
    return folder


def has_left(log: Iterable[Mapping[str, Any]]) -> bool:
    """Returns whether the worker takes no more jobs, by the lines of its log."""
    return any(line.keys() & {"left", "moved"} for line in log)


class Worker:
    """Runs the jobs in `folder` until none comes, or until the next one may not fit into the remaining `seconds`.

    Each line of `jobs` is a job (number, folder, environment), a request to stop one, or the end. The lines of `log`
    say which jobs have started and ended, and that the worker takes no more. A worker that Slurm starts again resumes
    the job that has not ended.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self._jobs, self._log = Lines(folder / JOBS), Lines(folder / LOG)
        self._deadline, self._longest = time.monotonic() + seconds, 0.0
        self._pending: deque[Mapping[str, Any]] = deque()
        self._stopped: set[int] = set()
        self._is_closed = False
        self._done = {line["ended"] for line in self._log.read() if "ended" in line}

    def serve(self) -> int:
        """Runs jobs and returns the exit code of the last one."""
        warm_up()
        code = DONE
        with Interruption() as interruption:
            while (job := self._next(interruption)) is not None:
                number = job["job"]
                # Before the job starts: a job that the log of an ended worker does not have was not run, and runs
                # elsewhere.
                self._log.append(started=number)
                begin = time.monotonic()
                code = INTERRUPTED if number in self._stopped else self._run(job, interruption)
                self._longest = max(self._longest, time.monotonic() - begin)
                if interruption and code in (INTERRUPTED, -signal.SIGTERM) and number not in self._stopped:
                    # Slurm starts its first job again. Others get a Slurm job, with time and requeues, of their own.
                    if number > 0 and interruption.reason == "SIGUSR1":
                        self._log.append(moved=number)
                    return INTERRUPTED
                self._log.append(ended=number, code=code)
                # After a crash the next job gets another Slurm job, perhaps on another node.
                is_short = self._deadline - time.monotonic() >= _SHARE * self._longest
                if not is_short or (code < 0 and number not in self._stopped):
                    break
        self._log.append(left=True)
        return code

    def _read(self) -> None:
        for line in self._jobs.read():
            if "job" in line and line["job"] not in self._done:
                self._pending.append(line)
            elif "stop" in line:
                self._stopped.add(line["stop"])
            self._is_closed |= "close" in line

    def _next(self, interruption: Interruption) -> Mapping[str, Any] | None:
        """Waits for a job; returns None if the worker is to end."""
        deadline = time.monotonic() + _IDLE_SECONDS
        while not interruption:
            self._read()
            if self._pending:
                return self._pending.popleft()
            if self._is_closed or time.monotonic() > deadline:
                return None
            time.sleep(0.25)
        return None

    def _run(self, job: Mapping[str, Any], interruption: Interruption) -> int:
        process, is_stopped = spawn(Path(job["folder"]), job["environment"], None), False
        while (code := process.poll()) is None:
            self._read()
            if not is_stopped and (interruption or job["job"] in self._stopped):
                is_stopped = True
                process.stop()
            connection.wait([process.sentinel], 1.0)
        if code == "returned":  # the server was killed: the job resumes from its checkpoint, if it is not done
            return INTERRUPTED if is_stopped else self._run(job, interruption)
        return code


if __name__ == "__main__":
    exit_code = Worker(Path(sys.argv[1]), float(sys.argv[2])).serve()
    sys.stdout.flush()
    os._exit(exit_code if exit_code >= 0 else 128 - exit_code)
