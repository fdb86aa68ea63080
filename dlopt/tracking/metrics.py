"""metrics.jsonl (one line per evaluated epoch) and summary.json: what other programs read."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dlopt.errors import RunError
from dlopt.files import write_atomically
from dlopt.tracking.files import AppendFile

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"


def to_json(value: object) -> str:
    """JSON without NaN literals: what is not finite becomes null; 0-dim tensors and NumPy scalars become numbers."""
    return json.dumps(_plain(value), allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item"):
        return _plain(value.item())
    return str(value)


def parse_metrics(data: bytes) -> list[dict[str, Any]]:
    """The objects of the leading intact lines: a crash can tear only the end of the file."""
    lines = []
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
    try:
        summary = json.loads((folder / SUMMARY).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `folder`/summary.json atomically; RunError when that fails, for without it the run counts as unfinished."""
    try:
        text = json.dumps(_plain(summary), allow_nan=False, ensure_ascii=False, indent=2)
        write_atomically(folder / SUMMARY, text.encode() + b"\n")
    except OSError as error:
        raise RunError(f"{folder / SUMMARY}: cannot be written ({error.strerror})") from error


def cut_metrics(folder: Path, epoch: int, step: int) -> None:
    """Drop what lies beyond `epoch` evaluated epochs or `step` updates, and a torn last line. Raises OSError."""
    path = folder / METRICS
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    kept = [line for line in parse_metrics(data) if line.get("epoch", 0) <= epoch and line.get("step", 0) <= step]
    wanted = "".join(to_json(line) + "\n" for line in kept).encode()
    if wanted != data:
        write_atomically(path, wanted)


class MetricsFile:
    """Appends to `folder`/metrics.jsonl, one line at once.

    `resume_from`: (evaluated epochs, updates) contained in the checkpoint that the run goes on from; later lines are
    cut. None: a new run, which starts an empty file.
    """

    def __init__(self, folder: Path, resume_from: tuple[int, int] | None, complain: Callable[[str], None]) -> None:
        self._file = AppendFile(folder / METRICS, complain)
        self._complain = complain
        try:
            cut_metrics(folder, *(resume_from or (0, 0)))
        except OSError as error:
            complain(f"{folder / METRICS}: lines beyond the checkpoint could not be cut ({error.strerror})")

    def write(self, metrics: Mapping[str, Any]) -> None:
        self._file.write(to_json(metrics).encode() + b"\n")
        self._file.flush()

    def rewind(self, epoch: int, step: int) -> None:
        """Cuts the lines beyond `epoch` evaluated epochs or `step` updates."""
        self._file.close()  # the lines that stay come into a new file
        try:
            cut_metrics(self._file.path.parent, epoch, step)
        except OSError as error:
            self._complain(f"{self._file.path}: lines beyond update {step} could not be cut ({error.strerror})")

    def close(self) -> None:
        self._file.close()
