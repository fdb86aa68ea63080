"""The loss curve of a run: an observer that records it, and its reader."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlopt.basics.plain_values import read_regular
from dlopt.extend import write_atomically
from dlopt.results.leaderboard import is_number
from dlopt.tracking.metrics import AppendFile, parse_metrics, to_json

if TYPE_CHECKING:  # the help of the command needs no torch
    from torch import Tensor, nn

log = logging.getLogger(__name__)

POINTS = 50
"""Points of a curve, at most."""
_FILE = "curve.jsonl"  # in the folder of a run
_MAX_BYTES = 1 << 20


def interval(updates: int) -> int:
    """Returns the updates per point of a run."""
    return math.ceil(updates / POINTS)


class LossCurve:
    """Observer that records the mean training loss of each `every` updates in `folder`/curve.jsonl.

    The loss of an update is that of its batch, which the run computes anyway. A run that resumes continues the curve.
    """

    def __init__(self, *, folder: str, every: int) -> None:
        self.path, self.every = Path(folder) / _FILE, every
        self._sum: Tensor | float = 0.0
        self._first: int | None = None  # updates before the current point; None before the first update
        self._step = 0

    def after_update(self, step: int, loss: "Tensor", model: "nn.Module") -> None:
        if self._first is None:
            self._first = self._resume(step - 1)
        self._sum = self._sum + loss.detach()  # on the device: no transfer before the point is complete
        self._step = step
        if step % self.every == 0:
            self._write(self._first)
            self._first, self._sum = step, 0.0

    def at_end(self, summary: Mapping[str, Any]) -> None:
        """Writes the point that the last update, or an interruption, leaves incomplete."""
        if self._first is not None and self._step > self._first:
            self._write(self._first)

    def _resume(self, step: int) -> int:
        """Removes the points after `step` updates; returns the updates before the current one, which may have begun."""
        lines = [line for line in _lines(self.path) if line["step"] <= step]
        first = step
        if lines and lines[-1]["step"] == step and step % self.every:
            last = lines.pop()
            first, self._sum = step - last["updates"], last["sum"]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        return first

    def _write(self, first: int) -> None:
        line = to_json({"step": self._step, "updates": self._step - first, "sum": float(self._sum)})
        file = AppendFile(self.path, log.warning)
        file.write(f"{line}\n".encode())
        file.close()


def _lines(path: Path) -> list[dict[str, Any]]:
    return parse_metrics(read_regular(path, _MAX_BYTES)) if path.exists() else []


def read_curve(folder: Path, updates: int) -> list[float]:
    """Reads the points of a run of so many updates, to six digits; [] if one is missing or not finite."""
    lines, every = _lines(folder / _FILE), interval(updates)
    known = [line["step"] for line in lines if all(is_number(line.get(key)) for key in ("step", "updates", "sum"))]
    if known != [min(end, updates) for end in range(every, updates + every, every)]:
        return []
    return [float(f"{line['sum'] / max(line['updates'], 1):.6g}") for line in lines]
