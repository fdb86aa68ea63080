"""Reads and writes metrics.jsonl, diagnostics.jsonl and summary.json, the files for other programs."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dlopt.basics.errors import RunError
from dlopt.basics.files import is_at, open_to_append, read_json, write_atomically
from dlopt.basics.plain_values import parse_json, read_regular, without_nan
from dlopt.basics.secrets import redact, redacted

METRICS = "metrics.jsonl"  # one line per evaluated epoch
DIAGNOSTICS = "diagnostics.jsonl"  # one line per update that diagnostics observe
SUMMARY = "summary.json"
MAX_METRICS = 1 << 28  # bytes of metrics.jsonl: a million epochs


def to_json(value: object, indent: int | None = None) -> str:
    """Returns strict JSON: non-finite numbers become null; 0-dim tensors and NumPy scalars become numbers.

    Bytes of file names that are not UTF-8, as in the name of a class, are escaped.
    """
    text = json.dumps(without_nan(value), allow_nan=False, ensure_ascii=False, indent=indent, default=str)
    return text.encode(errors="backslashreplace").decode()


def parse_metrics(data: bytes) -> list[dict[str, Any]]:
    """Parses lines up to the first invalid one: after a crash only the end of the file can be incomplete."""
    metrics: list[dict[str, Any]] = []
    for line in data.splitlines():
        try:
            item = parse_json(line)
        except ValueError:
            break
        if not isinstance(item, dict):
            break
        metrics.append(item)
    return metrics


def read_metrics(folder: Path, name: str = METRICS) -> list[dict[str, Any]]:
    """Reads `folder`/metrics.jsonl, or another file by `name`; [] if there is no regular file of at most 256 MiB.

    An incomplete last line is ignored. Raises OSError.
    """
    try:
        return parse_metrics(read_regular(folder / name, MAX_METRICS))
    except (FileNotFoundError, ValueError):
        return []


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Reads `folder`/summary.json; None if the run has not ended (or the file is not a JSON object)."""
    return read_json(folder / SUMMARY)


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Writes `folder`/summary.json atomically. Raises `RunError`: without the file the run counts as unfinished."""
    try:
        write_atomically(folder / SUMMARY, to_json(redacted(summary), indent=2) + "\n")
    except OSError as error:
        raise RunError(f"{folder / SUMMARY}: cannot be written ({error.strerror})") from error


class AppendFile:
    """Appends complete records to a file and never raises.

    `write` only buffers; `flush` does the I/O. If the I/O fails (full disk, read-only folder), `warn` receives one
    message, partly written records are truncated, and the buffer is kept for the next `flush`. So the file is complete
    again once there is space. A buffer of more than `limit` bytes is dropped.
    """

    def __init__(self, path: Path, warn: Callable[[str], None], *, limit: int = 4 << 20) -> None:
        self.path = path
        self.pending = bytearray()
        self._warn: Callable[[str], None] | None = warn
        self._limit = limit
        self._file: int | None = None
        self._folder: os.stat_result | None = None  # of the open file
        # Only at the start: a folder that is removed during a run must not come back with this file only.
        with contextlib.suppress(OSError):  # reported by `flush`
            path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, record: bytes) -> None:
        self.pending += record

    def flush(self) -> None:
        if not self.pending:
            return
        try:
            if self._is_removed():
                self._close()
            if self._file is None:
                self._folder = os.stat(self.path.parent)
                self._file = open_to_append(self.path)
            size = os.fstat(self._file).st_size
            written = 0
            try:
                while written < len(self.pending):
                    written += os.write(self._file, memoryview(self.pending)[written:])
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, size)
                raise
            self.pending = bytearray()
        except OSError as error:
            if len(self.pending) > self._limit:
                self.pending = bytearray()
            warn, self._warn = self._warn, None
            if warn is not None:
                warn(f"{self.path}: cannot be written ({error.strerror}); training continues without it")

    def _is_removed(self) -> bool:
        """Returns whether the open file has left its folder; false if the folder itself was renamed."""
        if self._file is None or self._folder is None or not is_at(self.path.parent, self._folder):
            return False
        return not is_at(self.path, os.fstat(self._file))

    def close(self) -> None:
        self.flush()
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None


class MetricsFile:
    """Appends lines to `folder`/metrics.jsonl, or to another file by `name`, and flushes each.

    `resume_from`: (evaluated epochs, updates) of the checkpoint from which the run resumes; later lines are removed.
    None for a new run, which starts with an empty file.
    """

    def __init__(
        self, folder: Path, resume_from: tuple[float, int] | None, warn: Callable[[str], None], name: str = METRICS
    ) -> None:
        self._path = folder / name
        self._file = AppendFile(self._path, warn)
        self._warn = warn
        epoch, step = resume_from or (0, 0)
        self._truncate(epoch, step)

    def write(self, metrics: Mapping[str, Any]) -> None:
        self._file.write(redact(to_json(metrics)).encode() + b"\n")
        self._file.flush()

    def _truncate(self, epoch: float, step: int) -> None:
        """Removes the lines after `epoch` evaluated epochs or `step` updates, and an incomplete last line."""
        try:
            data = read_regular(self._path, sys.maxsize) if self._path.exists() else b""
            kept = [
                line for line in parse_metrics(data) if line.get("epoch", 0) <= epoch and line.get("step", 0) <= step
            ]
            content = "".join(to_json(line) + "\n" for line in kept).encode()
            if content != data:
                write_atomically(self._path, content)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", error)
            self._warn(f"{self._path}: lines after the checkpoint could not be removed ({reason})")

    def close(self) -> None:
        self._file.close()
