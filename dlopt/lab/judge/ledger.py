"""The ledger of a base: every proposed change, its error rate, and its outcome.

It is all that keeps the error rate of many proposals. It is therefore replaced as a whole, never started again where it
is damaged or missing, and checked like a file of a stranger.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from dlopt.basics.formats import printable
from dlopt.basics.locks import locked
from dlopt.extend import Stored, UserError, short_path, write_atomically
from dlopt.lab.judge.proposal import Equal
from dlopt.tracking.metrics import to_json

LEDGER = "ledger.jsonl"
_LOCK = ".ledger.lock"
_MAX_BYTES = 1 << 26
_CURE = "restore it, for it holds the error rate that all proposals share, or start another with output=DIR"
_STRICT = {"extra": "forbid", "strict": True}

Verdict = Literal["better", "worse", "equal", "same", "undecided"]  # those of `sequential`, which imports SciPy
_Finite = Annotated[float, Field(allow_inf_nan=False)]
# JSON has no infinity: the gain of a pair of which one run diverged.
_Gain = Annotated[float, BeforeValidator(lambda value: float(value) if value in ("inf", "-inf") else value)]


@dataclass(frozen=True)
class Entry:
    """A proposal.

    Attributes:
        number: 1, 2, ... in the order in which the changes were proposed; names the folder of its runs.
        key: hash of the config that the change computes, of its code, and of the margin.
        change: as typed.
        rate: error rate of its verdict; the rates of all proposals sum to the ledger's.
        verdict: better, worse, or equal, which are final; same (bitwise, so far), or undecided.
        gains: of the pairs, positive for the better run.
        data: hash of the data that its runs read.
        equal: what the change costs as much of as the base; None: its length is the base's, or its own.
        update_cost: of an update of the change, relative to the base's.
        updates: of the change, from these two.
        costs: by side and name of summary.json, medians over the runs of the pairs; None: unknown.
        because: why the change was proposed.
        of: number of the proposal whose change takes the place of the base, of which this one lacks a part; None: the
            base of the ledger.
    """

    __pydantic_config__: ClassVar[Any] = _STRICT

    number: Annotated[int, Field(ge=1)]
    key: Annotated[str, Field(pattern=r"^\w{1,64}$")]
    change: Sequence[str]
    code_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    rate: Annotated[float, Field(gt=0, lt=1)]
    margin: Annotated[_Finite, Field(ge=0)]
    data: Annotated[str, Field(pattern=r"^\w{0,64}$")]
    verdict: Verdict = "undecided"
    metric: str = ""
    estimate: _Finite | None = None
    low: _Finite | None = None
    high: _Finite | None = None
    gains: Sequence[_Gain] = ()
    equal: Equal | None = None
    update_cost: Annotated[_Finite, Field(gt=0)] | None = None
    updates: Annotated[int, Field(ge=1)] | None = None
    costs: Mapping[str, Mapping[str, Annotated[_Finite, Field(ge=0)] | None]] | None = None
    because: str = ""
    of: Annotated[int, Field(ge=1)] | None = None

    @property
    def pairs(self) -> int:
        return len(self.gains)

    def cost(self, side: str, name: str) -> float | None:
        return (self.costs or {}).get(side, {}).get(name)

    def times(self, name: str) -> float | None:
        """Returns the cost of the change relative to the base's; None if it is unknown."""
        base, change = self.cost("base", name), self.cost("change", name)
        return change / base if base and change is not None else None

    @property
    def is_final(self) -> bool:
        """Whether more pairs would change nothing."""
        return self.verdict in ("better", "worse", "equal")

    @property
    def name(self) -> str:
        """The tag of its runs, without which a run in its folder is another's."""
        return f"judge-{self.key}"


@dataclass(frozen=True)
class _Base:
    """The first line."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    base: Sequence[str]
    error_rate: Annotated[float, Field(gt=0, lt=1)]


_Line = Annotated[
    Annotated[_Base, Tag("base")] | Annotated[Entry, Tag("proposal")],
    Discriminator(lambda value: "base" if isinstance(value, dict) and "base" in value else "proposal"),
]


@dataclass(frozen=True)
class Ledger:
    """`ledger.jsonl` in the folder of a base: the base, then a line for each change of an entry; the last one counts.

    Attributes:
        rate: probability of a wrong verdict among all entries.
    """

    folder: Path
    base: Sequence[str]
    rate: float

    def propose(
        self,
        key: str,
        change: Sequence[str],
        code_sha256: str | None,
        margin: float,
        seeds: int,
        data: str,
        **more: Any,
    ) -> Entry:
        """Returns the entry of a change, a new one if it was not proposed before, or with other data.

        `more`: further attributes of a new entry.

        Raises `UserError`, and leaves no file, if `seeds` pairs cannot decide, or the ledger has another error rate or
        is damaged.
        """
        entry = self._entry(key, change, code_sha256, margin, seeds, data, more)
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / _LOCK):  # another process may have proposed a change in the meantime
            entry = self._entry(key, change, code_sha256, margin, seeds, data, more)
            if entry.number > len(self.entries()):
                self._append(entry)
        return entry

    def _entry(
        self,
        key: str,
        change: Sequence[str],
        code_sha256: str | None,
        margin: float,
        seeds: int,
        data: str,
        more: Mapping[str, Any],
    ) -> Entry:
        from dlopt.lab.judge.sequential import fewest_pairs, rate_of  # imports NumPy, which the help does not need

        rate, entries = self._read()
        if rate is not None and rate != self.rate:
            reason = f"the changes in {self.folder} share {rate}; keep it, or start another ledger with output=DIR"
            raise UserError(f"error_rate={self.rate:g}: {reason}")
        number = len(entries) + 1
        new = Entry(number, key, list(change), code_sha256, rate_of(number, self.rate), margin, data=data, **more)
        entry = next((each for each in entries if (each.key, each.data) == (key, data)), new)
        if not entry.is_final and seeds < (least := fewest_pairs(entry.rate)):
            reason = f"proposal {entry.number} against this base takes {least} pairs or more"
            raise UserError(f"seeds={seeds}: {reason}: seeds={max(20, 2 * least)}")
        self._check_verdict(entry)
        return entry

    def record(self, entry: Entry) -> None:
        """Replaces an entry. After a crash, or on a full disk, the ledger is the former one. Raises OSError."""
        with locked(self.folder / _LOCK):
            self._append(entry)

    def entries(self) -> list[Entry]:
        """Returns the entries in the order of their numbers. Raises `UserError` if the ledger is damaged."""
        return self._read()[1]

    def _append(self, entry: Entry) -> None:
        lines = [*(self._file.lines() or [_Base(self.base, self.rate)]), entry]
        write_atomically(self._file.path, "".join(f"{_to_json(line)}\n" for line in lines))

    def _read(self) -> tuple[float | None, list[Entry]]:
        """Returns the error rate and the entries; None and [] if there is no ledger. Raises `UserError`."""
        rate: float | None = None
        entries: list[Entry] = []
        # Before the lines: another process may propose a change between the two, and make its folder.
        numbers = [int(each.name) for each in self.folder.glob("[1-9]*") if each.name.isdecimal() and each.is_dir()]
        for number, line in enumerate(self._file.lines(), 1):
            try:
                if (number == 1) is not isinstance(line, _Base):
                    raise ValueError("the base must be the first line, and no other")
                if isinstance(line, _Base):
                    rate = line.error_rate
                elif rate is not None:
                    _add(entries, line, rate)
            except ValueError as error:
                raise self._file.damaged(f"line {number}: {error}") from None
        if numbers and (last := max(numbers)) > len(entries):
            runs = f"{short_path(self.folder / str(last))} has the runs of proposal {last}"
            raise self._file.damaged(f"{'is missing' if rate is None else f'has {len(entries)} proposals'}, but {runs}")
        return rate, entries

    @property
    def _file(self) -> Stored[_Base | Entry]:
        return Stored(self.folder / LEDGER, _Line, _MAX_BYTES, _CURE)

    def _check_verdict(self, entry: Entry) -> None:
        """Raises `UserError` if the verdict, the estimate or the interval do not follow from the gains."""
        from dlopt.lab.judge.sequential import looks

        for look in looks(entry.gains, entry.rate, entry.margin, max(entry.pairs, 1)):
            named = {each: getattr(look, each) for each in ("estimate", "low", "high")}
            saved = {each: getattr(entry, each) for each in named}
            verdict = "undecided" if entry.verdict == "same" and not any(entry.gains) else entry.verdict
            if verdict == look.verdict and all(_is_saved(value, saved[name]) for name, value in named.items()):
                return
            raise self._file.damaged(f"proposal {entry.number}: its verdict or its interval are not those of its gains")
        if entry.verdict != "undecided":
            raise self._file.damaged(f"proposal {entry.number}: the verdict {entry.verdict} without gains")


def _to_json(line: _Base | Entry) -> str:
    values = asdict(line)
    if isinstance(line, Entry):
        values["gains"] = [gain if math.isfinite(gain) else str(gain) for gain in line.gains]
    return to_json(values)


def _add(entries: list[Entry], entry: Entry, rate: float) -> None:
    """Adds an entry, or replaces the entry with its number. Raises ValueError if it does not continue the ledger."""
    from dlopt.lab.judge.sequential import rate_of

    if entry.number > len(entries) + 1:
        raise ValueError(f"number: {entry.number} follows {len(entries)}")
    if not math.isclose(entry.rate, rate_of(entry.number, rate), rel_tol=1e-9):
        raise ValueError(f"rate: {entry.rate:g} is not that of proposal {entry.number} of {rate:g}")
    if printable(entry.metric) != entry.metric:
        raise ValueError("metric: is not the name of a metric")
    former = entries[entry.number - 1] if entry.number <= len(entries) else entry
    for name in ("key", "data", "margin", "code_sha256", "equal", "update_cost", "updates", "of"):
        if getattr(former, name) != getattr(entry, name):
            raise ValueError(f"{name}: is not that of the former line of proposal {entry.number}")
    entries[entry.number - 1 :] = [replace(entry, gains=tuple(entry.gains)), *entries[entry.number :]]


def _is_saved(value: float, saved: float | None) -> bool:
    return not math.isfinite(value) if saved is None else math.isclose(value, saved, rel_tol=1e-6, abs_tol=1e-12)
