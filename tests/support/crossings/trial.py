"""A row under trial: its commands, each in a forked process as from the shell, and what they leave."""

import contextlib
import faulthandler
import io
import json
import os
import random
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlopt import cli
from dlopt.basics.errors import UserError
from dlopt.config.compose import Composer
from dlopt.training.checkpoint.checkpoints import load
from tests.support.crossings.features import DEFAULTS, KIND, Row, overrides
from tests.support.runs import result, same, timeless

DIVERGED = "dlopt: the loss became infinite"
_LIMIT = 120  # seconds of a process: one that hangs fails its law


@dataclass(frozen=True)
class Ended:
    """A process that has ended. `code`: of its exit, or minus the signal that killed it."""

    code: int
    output: str

    @property
    def refusal(self) -> str | None:
        """The message of one line, or of one per conflict, with which a command was refused or diverged; else None."""
        lines = [line for line in self.output.splitlines() if line]
        first = next((place for place, line in enumerate(lines) if line.startswith("dlopt: ")), None)
        if first is not None and self.code == 1 and re.search(r"the loss became (nan|inf)", lines[first]):
            return DIVERGED
        if self.code != 2 or first is None:
            return None
        rest = lines[first + 1 :]
        is_list = "conflicts of settings:" in lines[first] or lines[first].endswith(":")
        return (
            "\n".join(lines[first:]) if not rest or (is_list and all(each.startswith("  ") for each in rest)) else None
        )


def in_process(function: Callable[[], object], folder: Path, variables: Mapping[str, str] | None = None) -> "Process":
    """Forks a process that calls `function` in `folder`; what it prints is the output of its `Process`."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"output-{len([*folder.glob('output-*')])}.txt"
    log.touch()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return Process(child, log)
    code = 1
    try:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.fsync = lambda fd: None  # no power failure is tried here
        faulthandler.dump_traceback_later(_LIMIT, exit=True, file=2)
        os.environ.update(variables or {})
        os.chdir(folder)
        function()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for file in (sys.stdout, sys.stderr):
            file.flush()
        os._exit(code)


@dataclass(frozen=True)
class Process:
    """A forked process."""

    id: int
    log: Path

    def wait(self) -> Ended:
        status = os.waitstatus_to_exitcode(os.waitpid(self.id, 0)[1])
        return Ended(status, self.log.read_text())


def warm_up(folder: Path) -> None:
    """Imports in this process what the commands need, so that forked ones do not each import it."""
    words = [*overrides({KIND: "table"}, folder), f"output={folder / 'first'}"]
    first = str(folder / "first")
    for line in (
        ["train", *words],
        ["eval", first],
        ["predict", first, f"file={folder / 'classes.csv'}", f"output={folder / 'predictions.csv'}"],
        ["report", first],
    ):
        function, arguments = cli.find(line)
        with contextlib.redirect_stdout(io.StringIO()):
            assert function(arguments) == 0, line


def command(words: Iterable[str], around: AbstractContextManager[object] | None = None) -> Callable[[], None]:
    """Returns a function that does what the shell does with `dlopt WORDS`."""

    def call() -> None:
        sys.argv = ["dlopt", *words]
        with nullcontext() if around is None else around:
            cli.main()

    return call


@dataclass
class Trial:
    """A row, the folder of its drawn files, and a folder of its own. `draw`: what laws draw, such as an update."""

    row: Row
    files: Path
    place: Path
    draw: random.Random
    outputs: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.row[KIND]

    @cached_property
    def words(self) -> list[str]:
        return overrides(self.row, self.files)

    def has(self, feature: str, *values: str) -> bool:
        return self.row.get(feature) in values

    def with_words(self, *words: str) -> list[str]:
        """Returns the words of the row with others, which replace those of the same key."""
        keys = {word.partition("=")[0].lstrip("+") for word in words}
        return [*(word for word in self.words if word.partition("=")[0].lstrip("+") not in keys), *words]

    def narrowed(self, allowed: Mapping[str, Sequence[str]], name: str) -> "Trial":
        """Returns a trial of the row with the first value of each feature that has another one than those allowed."""
        row = {f: v if v in allowed.get(f, (v,)) else DEFAULTS[f] for f, v in self.row.items()}
        return Trial(row, self.files, self.place / name, self.draw)

    def dlopt(self, *words: str, around: AbstractContextManager[object] | None = None) -> Ended:
        """Runs a command of dlopt. Fails with a traceback in its output."""
        ended = in_process(command(words, around), self.place).wait()
        assert "Traceback" not in ended.output, ended.output[-1500:]
        return ended

    def train(
        self, name: str, words: Iterable[str] | None = None, around: AbstractContextManager[object] | None = None
    ) -> Path:
        """Trains in the folder `name`. Fails, or raises `Refused`, if that does not work."""
        words = ["train", *(self.words if words is None else words), f"output={self.place / name}"]
        ended = self.dlopt(*words, around=around)
        if ended.refusal is not None:
            raise RefusedError(ended.refusal)
        assert ended.code == 0, f"exit code {ended.code}: {ended.output[-700:]}"
        self.outputs[name] = ended.output
        return self.place / name

    @cached_property
    def run(self) -> Path:
        """The folder of the row's run."""
        with contextlib.suppress(UserError):  # composed here, its choices are read once for all forked commands
            Composer(words=self.words).compose(self.words)
        return self.train("run")

    @cached_property
    def pure(self) -> Path:
        """The folder of the row's run in double precision."""
        return self.run if self.has("precision", "fp64") else self.train("pure", self.with_words("precision=fp64"))

    @cached_property
    def config(self) -> dict[str, Any]:
        return dict(load(self.run / "checkpoints" / "last.pt").config)

    @cached_property
    def summary(self) -> dict[str, Any]:
        return summary(self.run)

    @property
    def output(self) -> str:
        """What the row's run has printed."""
        return self.outputs[self.run.name]


class RefusedError(Exception):
    """A command was refused in one line."""


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


_OF_RUN = ("seconds", "run_id", "peak_memory", "peak_memory_of", "resumed_from", "parallel", "processes")


def results(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl and summary.json, without what differs between equal runs."""
    return [*timeless(folder), {key: value for key, value in summary(folder).items() if key not in _OF_RUN}]


def check_same(one: Path, other: Path, but: Sequence[str] = ()) -> None:
    """Fails unless two runs are bit for bit the same: metrics, summary, last and best checkpoint.

    `but`: facts of their progress that may differ.
    """
    check_close(one, other, tolerance=0)
    for name in ("last.pt", "best.pt"):
        if (one / "checkpoints" / name).exists():
            left, right = result(one, name), result(other, name)
            different = [key for key in left if key != "progress" and not same(left[key], right[key])]
            progress = left["progress"], right["progress"]
            different += [
                f"progress.{key}"
                for key in progress[0]
                if key not in but and not same(*(each.get(key) for each in progress))
            ]
            assert not different, f"{name}: other {', '.join(different)}"


_RANKED = 0.01  # rounding decides which of two samples of nearly equal scores is first


def check_close(one: Path, other: Path, tolerance: float, *, weights: bool = True) -> None:
    """Fails unless two runs have the same metrics and weights, up to `tolerance` relative to 1 and the value."""
    left, right = results(one), results(other)
    assert len(left) == len(right), f"{len(left)} evaluations and {len(right)}"
    for number, (a, b) in enumerate(zip(left, right, strict=True), 1):
        for key in sorted({*a, *b}):
            margin = _RANKED if tolerance and key.endswith(("roc_auc", "average_precision")) else tolerance
            assert is_close(a.get(key), b.get(key), margin), f"line {number}: {key} {a.get(key)} and {b.get(key)}"
    if weights and tolerance:
        states = [load(each / "checkpoints" / "last.pt").state["model"] for each in (one, other)]
        for key, tensor in states[0].items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                distance = float((tensor.double() - states[1][key].double()).abs().max()) if tensor.numel() else 0.0
                size = float(tensor.abs().max()) if tensor.numel() else 0.0
                assert distance <= tolerance * (10 + size), f"last.pt: {key} differs by {distance:.2g}"


def is_close(a: Any, b: Any, tolerance: float) -> bool:
    if (isinstance(a, float) and isinstance(b, float | int)) or (isinstance(b, float) and isinstance(a, int)):
        return a == b or abs(a - b) <= tolerance * (1 + abs(a))
    return type(a) is type(b) and a == b


def weights(folder: Path, name: str = "last.pt") -> dict[str, Tensor]:
    return {k: v for k, v in load(folder / "checkpoints" / name).state["model"].items() if isinstance(v, torch.Tensor)}
