"""The campaign: a small training is killed, its files are damaged, its disk is filled, and nothing may be lost.

    python scripts/chaos.py [--short] [--only kills,damage,...] [--seed 0] [--json FILE]

An MLP with dropout, augmentation, momentum and a weight average, 200 updates on one thread. What counts as lost: a run
that, once resumed, ends with other weights, optimizer state, averages or metric lines than the uninterrupted one (bit
for bit), a damaged file that loads, a silent restart, a message that is missing. The negative controls leave out a part
of what resuming brings back; there the campaign must find losses. Exit code 1 where it finds anything else.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

from dlopt import job  # noqa: E402
from dlopt.errors import RunError, UserError  # noqa: E402
from dlopt.folders import RunFolder  # noqa: E402
from dlopt.training import trainer  # noqa: E402
from dlopt.training.checkpoint import Checkpoints  # noqa: E402
from dlopt.training.step import Step  # noqa: E402
from dlopt.training.trainer import Run, Trainer  # noqa: E402
from tests.reliability import faults  # noqa: E402
from tests.training.runs import RICH, experiment, result, resume, same, start, timeless  # noqa: E402

LINES = [*RICH, "epochs=50", "checkpoint.every_steps=7", "checkpoint.keep=3"]  # 200 updates
STREAMED = ["data.memory=false", "data.workers=2"]
PARTS = ("model", "optimizer", "ema", "schedule", "normalize", "progress")


@dataclass
class Row:
    what: str
    times: int
    lost: int
    note: str = ""
    expected: bool = False  # a negative control, in which something has to be lost


class Campaign:
    def __init__(self, work: Path, seed: int, short: bool) -> None:
        self.work = work
        self.draws = random.Random(seed)
        self.short = short
        self.whole = work / "whole"
        began = time.perf_counter()
        start(self.whole, *LINES)
        self.seconds = time.perf_counter() - began
        self._folders = 0

    def fresh(self) -> Path:
        self._folders += 1
        folder = self.work / f"run{self._folders}"
        folder.mkdir()
        return folder

    def is_same(self, folder: Path) -> bool:
        """Whether the run ended as the uninterrupted one did."""
        try:
            ends = [(result(folder, name), result(self.whole, name)) for name in ("last.pt", "best.pt")]
        except UserError:
            return False
        return timeless(folder) == timeless(self.whole) and all(same(a[key], b[key]) for a, b in ends for key in PARTS)

    # -- kills

    def killed_until_finished(
        self, kills: int, wait: Callable[[int], None], how: Callable[[int], AbstractContextManager[Any]], *more: str
    ) -> tuple[int, int]:
        """Runs that are killed again and again, each at most 8 times, until so many kills: (kills, runs lost)."""
        done = lost = 0
        while done < kills:
            folder, mine = self.fresh(), 0
            while True:
                reading, writing = os.pipe()

                def work(folder: Path = folder, writing: int = writing) -> None:
                    with how(writing):
                        resume(folder, *LINES, *more)

                child = faults.fork(work)
                os.close(writing)
                if done < kills and mine < 8:
                    wait(reading)
                    was_killed = faults.kill_group(child)
                    done, mine = done + was_killed, mine + was_killed
                    is_over = not was_killed
                    if is_over:  # it was faster than thought
                        self.seconds = max(0.3, 0.7 * self.seconds)
                else:
                    is_over = os.waitpid(child, 0)[1] == 0
                    if not is_over:
                        break  # it failed by itself: lost
                os.close(reading)
                if is_over:
                    break
            lost += not self.is_same(folder)
            shutil.rmtree(folder, ignore_errors=True)
        return done, lost

    def at_random(self, reading: int) -> None:
        time.sleep(self.draws.uniform(0, self.seconds * 0.5))

    def kills(self) -> Iterator[Row]:
        count = 6 if self.short else 80
        done, lost = self.killed_until_finished(count, self.at_random, lambda tell: nullcontext())
        yield Row("kill -9 at a random moment", done, lost)
        count = 2 if self.short else 20
        done, lost = self.killed_until_finished(count, self.at_random, lambda tell: nullcontext(), *STREAMED)
        yield Row("the same, of the process group with two loader workers", done, lost)

        slow = 0.08

        def inside(reading: int) -> None:
            saves = self.draws.randrange(1, 9)
            for _ in range(saves):
                if not os.read(reading, 1):
                    return
            time.sleep(self.draws.uniform(0, slow))

        kinds: dict[str, tuple[str, ...]] = {
            "": (),
            ", written behind the training": ("checkpoint.asynchronous=true",),
        }
        for label, more in kinds.items():
            count = 4 if self.short else 25
            done, lost = self.killed_until_finished(count, inside, lambda tell: faults.slow_saves(slow, tell), *more)
            yield Row(f"kill -9 inside a save{label}", done, lost)

    def controls(self) -> Iterator[Row]:
        for what, control in (
            ("the place in the epoch is not restored", faults.no_position_restored),
            ("the random generators are not restored", faults.no_generator_restored),
        ):
            folders = [self.fresh() for _ in range(2 if self.short else 5)]
            lost = 0
            for folder in folders:
                reference = self.fresh()
                with drawing() if control is faults.no_generator_restored else nullcontext():
                    start(reference, *LINES, "epochs=6")
                    stop = self.draws.choice([step for step in range(2, 22) if step % 4])
                    with stopping_at(stop):
                        start(folder, *LINES, "epochs=6")
                    with control():
                        resume(folder, *LINES, "epochs=6")
                lost += timeless(folder) != timeless(reference)
            yield Row(f"negative control: {what}", len(folders), lost, expected=True)

    # -- damage

    def damage(self) -> Iterator[Row]:
        counts = {"one bit flipped": 100, "truncated": 50}
        for what, spoil in faults.DAMAGES.items():
            count = 5 if self.short else counts.get(what, 10)
            lost = resumed = 0
            for number in range(count):
                folder = self.fresh()
                shutil.copytree(self.whole / "checkpoints", folder / "checkpoints")
                spoil(folder / "checkpoints/last.pt", self.draws)
                found = Checkpoints(folder / "checkpoints").load_newest()
                lost += found is None or found["progress"]["step"] != 196
                if number == 0:  # and to the end
                    shutil.copy(self.whole / "metrics.jsonl", folder / "metrics.jsonl")
                    resume(folder, *LINES)
                    lost += not self.is_same(folder)
                    resumed += 1
                shutil.rmtree(folder)
            yield Row(f"newest checkpoint: {what}", count, lost, "the one before is taken")
        folder = self.fresh()
        shutil.copytree(self.whole / "checkpoints", folder / "checkpoints")
        for path in (folder / "checkpoints").glob("*.pt"):
            faults.flip_bit(path, self.draws)
        try:
            resume(folder, *LINES)
            lost = 1
        except RunError:
            lost = 0
        yield Row("every checkpoint damaged", 1, lost, "it stops, and does not start again")

    # -- signals

    def signals(self) -> Iterator[Row]:
        stages = {
            "while it is set up": (trainer, "training_batches"),
            "in training": (Step, "begin"),
            "in an evaluation": (Trainer, "_end_epoch"),
            "in a save": (Checkpoints, "save"),
        }
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            lost, slowest = 0, 0.0
            for owner, function in stages.values():
                folder = self.fresh()
                reading, writing = os.pipe()

                told = telling(owner, function, writing, 1 if function == "training_batches" else 3)
                child = faults.fork(lambda folder=folder, told=told: self.run_for_long(folder, told))  # type: ignore[misc]
                os.close(writing)
                os.read(reading, 1)
                began = time.monotonic()
                os.kill(child, getattr(signal, name))
                status = faults.ended(child, 30)
                slowest = max(slowest, time.monotonic() - began)
                os.close(reading)
                if status is None:
                    faults.kill_group(child)
                summary = RunFolder(folder).summary() or {}
                lost += status is None or os.waitstatus_to_exitcode(status) != 75
                lost += summary.get("status") != "interrupted"
            yield Row(f"{name} at four stages", len(stages), lost, f"exit code 75 within {slowest:.1f} s")
        yield self.second_interrupt()

    def run_for_long(self, folder: Path, told: AbstractContextManager[Any]) -> None:
        with told:
            run = Run(experiment(*LINES, "epochs=5000"), folder)
            os._exit(job.execute(run, typed=LINES, console=False))

    def second_interrupt(self) -> Row:
        folder = self.fresh()
        reading, writing = os.pipe()

        def work() -> None:
            with faults.slow_saves(20.0, writing):
                os._exit(job.execute(Run(experiment(*LINES), folder), typed=LINES, console=False))

        child = faults.fork(work)
        os.close(writing)
        os.read(reading, 1)
        began = time.monotonic()
        for _ in range(2):
            os.kill(child, signal.SIGINT)
            time.sleep(0.2)
        status = faults.ended(child, 10)
        seconds = time.monotonic() - began
        if status is None:
            faults.kill_group(child)
        return Row("a second SIGINT, within a save", 1, int(status is None), f"it stops after {seconds:.1f} s")

    # -- one folder, one run

    def folders(self) -> Iterator[Row]:
        folder = self.fresh()
        reading, writing = os.pipe()

        child = faults.fork(lambda: self.run_for_long(folder, telling(Step, "begin", writing, 3)))
        os.close(writing)
        os.read(reading, 1)
        try:
            RunFolder(folder).lock()
            lost = 1
        except UserError:
            lost = 0
        faults.kill_group(child)
        yield Row("a second run at a live folder", 1, lost, "refused")
        lost = int(RunFolder(folder).is_live())
        RunFolder(folder).lock().close()
        yield Row("the lock of a killed run", 1, lost, "does not count")

    # -- disks, numbers, images, the order of system calls: the tests, counted

    def tests(self) -> Iterator[Row]:
        files = {
            "full, read-only and limited disks": ["tests/reliability/test_disk.py"],
            "not finite: losses, gradients, ranks; memory": ["tests/training/test_nonfinite.py"],
            "odd and hostile images": ["tests/data/test_hard_images.py"],
            "ranks killed, stopped, interrupted": ["tests/reliability/test_ranks.py", "-m", "slow or not slow"],
        }
        for what, arguments in files.items():
            report = self.work / "report.xml"
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", f"--junit-xml={report}", *arguments]
            subprocess.run(command, cwd=ROOT, capture_output=True)
            text = report.read_text()
            numbers = {key: int(text.split(f'{key}="')[1].split('"')[0]) for key in ("tests", "failures", "errors")}
            yield Row(what, numbers["tests"], numbers["failures"] + numbers["errors"], "tests")

    def calls(self) -> Iterator[Row]:
        """fsync, rename, fsync: as the kernel sees a save."""
        if shutil.which("strace") is None:
            return
        trace = self.work / "trace"
        code = (
            "import sys; from pathlib import Path; from dlopt.training.checkpoint import Checkpoints; "
            "Checkpoints(Path(sys.argv[1])).save({'progress': {'step': 1, 'epoch': 1}}, best=False)"
        )
        only = ["-f", "-y", "-e", "trace=fsync,rename,renameat,renameat2", "-o", str(trace)]
        command = ["strace", *only, sys.executable, "-c", code, str(self.work / "traced")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True)
        lines = [line.split(maxsplit=1)[1] for line in trace.read_text().splitlines() if "traced" in line]
        synced = next(i for i, line in enumerate(lines) if line.startswith("fsync") and ".last.pt.tmp" in line)
        renamed = next(i for i, line in enumerate(lines) if line.startswith("rename") and '/last.pt"' in line)
        folder = [i for i, line in enumerate(lines) if line.startswith("fsync") and "traced>" in line]
        fine = done.returncode == 0 and synced < renamed < max(folder)
        yield Row("strace of a save: fsync, rename, fsync of the folder", 1, int(not fine))


@contextlib.contextmanager
def telling(owner: Any, name: str, writing: int, calls: int) -> Iterator[None]:
    """A byte goes to `writing` at the n-th call of a function."""
    original, left = getattr(owner, name), [calls]

    def call(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.write(writing, b"x")
            time.sleep(0.05)
        return original(*arguments, **named)

    with patch.object(owner, name, call):
        yield


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """A model that draws from Python's own generator, as a user's may."""
    original = Step.micro_batch

    def micro_batch(self: Step, inputs: Any, *arguments: Any) -> Any:
        return original(self, inputs * (1 + 0.1 * random.random()), *arguments)

    with patch.object(Step, "micro_batch", micro_batch):
        yield


def stopping_at(step: int) -> AbstractContextManager[Any]:
    from tests.training.runs import at_update, terminate

    return at_update(step, terminate)


def show(rows: list[Row], seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{sum(row.times for row in rows)} faults in {seconds:.0f} s")
    for name in ("what was done", "times", "lost", ""):
        table.add_column(name, justify="right" if name in ("times", "lost") else "left")
    for row in rows:
        table.add_row(row.what, str(row.times), f"{row.lost}{' (wanted)' if row.expected else ''}", row.note)
    Console(width=110).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = ("kills", "controls", "damage", "signals", "folders", "calls", "tests")
    parser.add_argument("--short", action="store_true", help="few of each")
    parser.add_argument("--only", default=",".join(groups), help=f"of {', '.join(groups)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    began, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="dlopt-chaos-") as folder:
        campaign = Campaign(Path(folder), asked.seed, asked.short)
        for group in asked.only.split(","):
            for row in getattr(campaign, group)():
                print(f"{row.what}: {row.times}, lost {row.lost} {row.note}", flush=True)
                rows.append(row)
    show(rows, time.monotonic() - began)
    if asked.json is not None:
        asked.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return int(any((row.lost == row.times) is not row.expected if row.expected else row.lost for row in rows))


if __name__ == "__main__":
    sys.exit(main())
