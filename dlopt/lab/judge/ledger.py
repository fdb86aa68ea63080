"""The ledger of a base: every change that was proposed, its error rate, and what became of it."""

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dlopt.basics.locks import locked
from dlopt.extend import UserError
from dlopt.tracking.metrics import to_json

LEDGER = "ledger.jsonl"
_LOCK = ".ledger.lock"


@dataclass(frozen=True)
class Entry:
    """A proposal.

    Attributes:
        number: 1, 2, ... in the order in which the changes were proposed; names the folder of its runs.
        key: hash of what the change computes, of its code, and of the margin.
        change: as typed.
        rate: error rate of its verdict; those of all proposals sum to that of the ledger.
        verdict: better, worse, equal, same (bitwise), or undecided.
        gains: of the pairs, positive for the better run.
    """

    number: int
    key: str
    change: Sequence[str]
    code_sha256: str | None
    rate: float
    margin: float
    verdict: str = "undecided"
    metric: str = ""
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    gains: Sequence[float] = ()

    @property
    def pairs(self) -> int:
        return len(self.gains)


@dataclass(frozen=True)
class Ledger:
    """`ledger.jsonl` in the folder of a base: the base, then a line for each change of an entry; the last one counts.

    Attributes:
        rate: probability of a wrong verdict among all entries.
    """

    folder: Path
    base: Sequence[str]
    rate: float

    def propose(self, key: str, change: Sequence[str], code_sha256: str | None, margin: float, seeds: int) -> Entry:
        """Returns the entry of a change, a new one if it was not proposed before.

        Raises `UserError`, and leaves no file, if `seeds` pairs cannot decide, or the ledger has another error rate.
        """
        entry = self._entry(key, change, code_sha256, margin, seeds)
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / _LOCK):  # another process may have proposed a change in the meantime
            entry = self._entry(key, change, code_sha256, margin, seeds)
            if not self._lines():
                self._append({"base": list(self.base), "error_rate": self.rate})
            if entry.number > len(self.entries()):
                self.record(entry)
        return entry

    def _entry(self, key: str, change: Sequence[str], code_sha256: str | None, margin: float, seeds: int) -> Entry:
        from dlopt.lab.judge.sequential import fewest_pairs, rate_of  # imports NumPy, which the help does not need

        lines, entries = self._lines(), self.entries()
        if lines and (rate := lines[0].get("error_rate")) != self.rate:
            reason = f"the changes in {self.folder} share {rate}; keep it, or start another ledger with output=DIR"
            raise UserError(f"error_rate={self.rate:g}: {reason}")
        number = len(entries) + 1
        new = Entry(number, key, list(change), code_sha256, rate_of(number, self.rate), margin)
        entry = next((each for each in entries if each.key == key), new)
        if entry.verdict == "undecided" and seeds < (least := fewest_pairs(entry.rate)):
            reason = f"proposal {entry.number} against this base has the error rate {entry.rate:.2g}"
            raise UserError(f"seeds={seeds}: {reason}, which takes {least} pairs or more: seeds={max(20, 2 * least)}")
        return entry

    def record(self, entry: Entry) -> None:
        # JSON has no infinity: the gain of a pair of which one run diverged.
        gains = [gain if math.isfinite(gain) else str(gain) for gain in entry.gains]
        self._append({**asdict(entry), "gains": gains})

    def entries(self) -> list[Entry]:
        """Returns the entries in the order of their numbers."""
        latest = {line["number"]: Entry(**line) for line in self._lines()[1:]}
        return [replace(latest[number], gains=tuple(map(float, latest[number].gains))) for number in sorted(latest)]

    def _append(self, line: dict[str, Any]) -> None:
        path = self.folder / LEDGER
        is_cut = path.exists() and not path.read_bytes().endswith(b"\n")  # by a crash
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" * is_cut + to_json(line) + "\n")

    def _lines(self) -> list[dict[str, Any]]:
        """Reads the ledger, without a line that a crash has cut off."""
        path, found = self.folder / LEDGER, []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found
