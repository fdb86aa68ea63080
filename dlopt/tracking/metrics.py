"""metrics.jsonl (one line per evaluated epoch) and summary.json: what other programs read."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dlopt.errors import RunError
from dlopt.files import read_json, write_atomically
from dlopt.plain import without_nan
from dlopt.tracking.files import AppendFile

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"


def to_json(value: object, indent: int | None = None) -> str:
    """JSON without NaN literals: what is not finite becomes null; 0-dim tensors and NumPy scalars become numbers."""
    return json.dumps(without_nan(value), allow_nan=False, ensure_ascii=False, indent=indent, default=str)


def parse_metrics(data: bytes) -> list[dict[str, Any]]:
    """The objects of the leading intact lines: a crash can tear only the end of the file."""
    lines: list[dict[str, Any]] = []
    for line in data.splitlines():
        try:
            item = json.loads(line)
        except ValueError:
            break
        if not isinstance(item, dict):
            break
        lines.append(item)
    return lines


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `folder`/metrics.jsonl, oldest first; [] where there is none yet. A torn last line is left out."""
    try:
        return parse_metrics((folder / METRICS).read_bytes())
    except FileNotFoundError:
        return []


def read_summary(folder: Path) -> dict[str, Any] | None:
    """`folder`/summary.json, or None where the run has not ended (or the file is not a JSON object)."""
    return read_json(folder / SUMMARY)


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `folder`/summary.json atomically; RunError when that fails, for without it the run counts as unfinished."""
    try:
        write_atomically(folder / SUMMARY, to_json(summary, indent=2).encode() + b"\n")
    except OSError as error:
        raise RunError(f"{folder / SUMMARY}: cannot be written ({error.strerror})") from error


class MetricsFile:
    """Appends to `folder`/metrics.jsonl, one line at once.

    `resume_from`: (evaluated epochs, updates) in the checkpoint from which the run resumes; later lines are cut. None:
    a new run, which starts an empty file.
    """

    def __init__(self, folder: Path, resume_from: tuple[int, int] | None, complain: Callable[[str], None]) -> None:
        self._path = folder / METRICS
        self._file = AppendFile(self._path, complain)
        self._complain = complain
        self._cut(*(resume_from or (0, 0)), "lines beyond the checkpoint")

    def write(self, metrics: Mapping[str, Any]) -> None:
        self._file.write(to_json(metrics).encode() + b"\n")
        self._file.flush()

    def rewind(self, epoch: int, step: int) -> None:
        """Cuts the lines beyond `epoch` evaluated epochs or `step` updates."""
        self._file.close()  # the lines that stay come into a new file
        self._cut(epoch, step, f"lines beyond update {step}")

    def _cut(self, epoch: int, step: int, lines: str) -> None:
        """Also cuts a torn last line."""
        try:
            data = self._path.read_bytes() if self._path.exists() else b""
            kept = [
                each for each in parse_metrics(data) if each.get("epoch", 0) <= epoch and each.get("step", 0) <= step
            ]
            whole = "".join(to_json(each) + "\n" for each in kept).encode()
            if whole != data:
                write_atomically(self._path, whole)
        except OSError as error:
            self._complain(f"{self._path}: {lines} could not be cut ({error.strerror})")

    def close(self) -> None:
        self._file.close()
