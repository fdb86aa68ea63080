"""Fault injection: kills a small training run, damages its files and fills its disk, and checks that no data is lost.

    python scripts/chaos.py [--short] [--only kills,damage,...] [--seed 0] [--json FILE]

The run: an MLP with dropout, augmentation, momentum and a weight average, 200 updates on one thread. A fault counts as
lost if the resumed run is not bitwise identical to an uninterrupted one (weights, optimizer state, averages, metrics),
if a damaged file loads, or if an error message is missing. Negative controls restore only a part of the state when
resuming and must therefore be lost. Exits with 1 on any other result.
"""

import argparse
import contextlib
import dataclasses
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
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

from dlopt.basics.errors import RunError, UserError  # noqa: E402
from dlopt.basics.folders import RunFolder  # noqa: E402
from dlopt.data.batches import Batch  # noqa: E402
from dlopt.run import runner  # noqa: E402
from dlopt.training import run  # noqa: E402
from dlopt.training.checkpoint.checkpoints import Checkpoints  # noqa: E402
from dlopt.training.loop import Trainer  # noqa: E402
from dlopt.training.progress import TrainingRun  # noqa: E402
from dlopt.training.step import Step  # noqa: E402
from tests.support import faults  # noqa: E402
from tests.support.runs import RICH, result, resume, run_config, same, start, timeless  # noqa: E402

OVERRIDES = [*RICH, "epochs=50", "checkpoint.every_steps=7", "checkpoint.keep=3"]  # 200 updates
STREAMED = ["data.memory=false", "data.workers=2"]
PARTS = ("model", "optimizer", "ema", "schedule", "normalize", "progress")


@dataclass
class FaultResult:
    what: str
    times: int  # injected faults
    lost: int
    note: str = ""
    expected: bool = False  # a negative control: all must be lost


class Campaign:
    def __init__(self, work: Path, seed: int, short: bool) -> None:
        self.work = work
        self.draws = random.Random(seed)
        self.short = short
        self.reference = work / "reference"
        started = time.perf_counter()
        start(self.reference, *OVERRIDES)
        self.seconds = time.perf_counter() - started
        self._folders = 0

    def new_folder(self) -> Path:
        self._folders += 1
        folder = self.work / f"run{self._folders}"
        folder.mkdir()
        return folder

    def is_same(self, folder: Path) -> bool:
        """Whether the run is bitwise identical to the uninterrupted one."""
        try:
            ends = [(result(folder, name), result(self.reference, name)) for name in ("last.pt", "best.pt")]
        except UserError:
            return False
        return timeless(folder) == timeless(self.reference) and all(
            same(a[key], b[key]) for a, b in ends for key in PARTS
        )

    # -- kills

    def kill_until_finished(
        self,
        kills: int,
        wait: Callable[[int], None],
        fault: Callable[[int], AbstractContextManager[Any]],
        *overrides: str,
    ) -> tuple[int, int]:
        """Kills and resumes runs, each at most 8 times, until `kills` kills; returns (kills, lost runs).

        `wait` returns when it is time to kill; it can read bytes that `fault` writes to a pipe in the child.
        """
        done = lost = 0
        while done < kills:
            folder, run_kills = self.new_folder(), 0
            while True:
                reading, writing = os.pipe()

                def work(folder: Path = folder, writing: int = writing) -> None:
                    with fault(writing):
                        resume(folder, *OVERRIDES, *overrides)

                child = faults.fork(work)
                os.close(writing)
                if done < kills and run_kills < 8:
                    wait(reading)
                    was_killed = faults.kill_group(child)
                    done, run_kills = done + was_killed, run_kills + was_killed
                    is_finished = not was_killed
                    if is_finished:  # it ended before the kill: shorten the waits
                        self.seconds = max(0.3, 0.7 * self.seconds)
                else:
                    is_finished = os.waitpid(child, 0)[1] == 0
                    if not is_finished:
                        break  # it failed without a kill: lost
                os.close(reading)
                if is_finished:
                    break
            lost += not self.is_same(folder)
            shutil.rmtree(folder, ignore_errors=True)
        return done, lost

    def at_random_time(self, reading: int) -> None:
        time.sleep(self.draws.uniform(0, self.seconds * 0.5))

    def kills(self) -> Iterator[FaultResult]:
        count = 6 if self.short else 80
        done, lost = self.kill_until_finished(count, self.at_random_time, lambda writing: nullcontext())
        yield FaultResult("kill -9 at a random time", done, lost)
        count = 2 if self.short else 20
        done, lost = self.kill_until_finished(count, self.at_random_time, lambda writing: nullcontext(), *STREAMED)
        yield FaultResult("kill -9 at a random time, with two loader workers", done, lost)

        slow = 0.08

        def inside_a_save(reading: int) -> None:
            saves = self.draws.randrange(1, 9)
            for _ in range(saves):
                if not os.read(reading, 1):
                    return
            time.sleep(self.draws.uniform(0, slow))

        kinds: dict[str, tuple[str, ...]] = {
            "": (),
            ", asynchronous": ("checkpoint.asynchronous=true",),
        }
        for label, overrides in kinds.items():
            count = 4 if self.short else 25
            done, lost = self.kill_until_finished(
                count, inside_a_save, lambda writing: faults.slow_saves(slow, writing), *overrides
            )
            yield FaultResult(f"kill -9 inside a save{label}", done, lost)

    def controls(self) -> Iterator[FaultResult]:
        for what, control in (
            ("position in the epoch not restored", faults.no_position_restored),
            ("random generators not restored", faults.no_generator_restored),
        ):
            folders = [self.new_folder() for _ in range(2 if self.short else 5)]
            lost = 0
            for folder in folders:
                reference = self.new_folder()
                with random_inputs() if control is faults.no_generator_restored else nullcontext():
                    start(reference, *OVERRIDES, "epochs=6")
                    stop = self.draws.choice([step for step in range(2, 22) if step % 4])
                    with stop_at(stop):
                        start(folder, *OVERRIDES, "epochs=6")
                    with control():
                        resume(folder, *OVERRIDES, "epochs=6")
                lost += timeless(folder) != timeless(reference)
            yield FaultResult(f"negative control: {what}", len(folders), lost, expected=True)

    # -- damage

    def damage(self) -> Iterator[FaultResult]:
        counts = {"one bit flipped": 100, "truncated": 50}
        for what, damage in faults.DAMAGES.items():
            count = 5 if self.short else counts.get(what, 10)
            lost = resumed = 0
            for number in range(count):
                folder = self.new_folder()
                shutil.copytree(self.reference / "checkpoints", folder / "checkpoints")
                damage(folder / "checkpoints/last.pt", self.draws)
                found = Checkpoints(folder / "checkpoints").load_newest()
                lost += found is None or found.step != 196
                if number == 0:  # resume one to the end, too
                    shutil.copy(self.reference / "metrics.jsonl", folder / "metrics.jsonl")
                    resume(folder, *OVERRIDES)
                    lost += not self.is_same(folder)
                    resumed += 1
                shutil.rmtree(folder)
            yield FaultResult(f"newest checkpoint: {what}", count, lost, "the previous checkpoint is loaded")
        folder = self.new_folder()
        shutil.copytree(self.reference / "checkpoints", folder / "checkpoints")
        for path in (folder / "checkpoints").glob("*.pt"):
            faults.flip_bit(path, self.draws)
        try:
            resume(folder, *OVERRIDES)
            lost = 1
        except RunError:
            lost = 0
        yield FaultResult("every checkpoint damaged", 1, lost, "an error, no restart from scratch")

    # -- signals

    def signals(self) -> Iterator[FaultResult]:
        stages = {
            "while building": (run, "training_batches"),
            "during training": (Step, "update"),
            "during an evaluation": (Trainer, "_evaluate"),
            "during a save": (Checkpoints, "save"),
        }
        for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
            lost, slowest = 0, 0.0
            for owner, function in stages.values():
                folder = self.new_folder()
                reading, writing = os.pipe()

                announcement = announce_call(owner, function, writing, 1 if function == "training_batches" else 3)
                child = faults.fork(partial(self.run_for_long, folder, announcement))
                os.close(writing)
                os.read(reading, 1)
                started = time.monotonic()
                os.kill(child, getattr(signal, name))
                status = faults.ended(child, 30)
                slowest = max(slowest, time.monotonic() - started)
                os.close(reading)
                if status is None:
                    faults.kill_group(child)
                summary = RunFolder(folder).summary() or {}
                lost += status is None or os.waitstatus_to_exitcode(status) != 75
                # Nothing is built yet, and nothing to save: the folder is as before the start.
                lost += summary.get("status") != (None if function == "training_batches" else "interrupted")
            yield FaultResult(f"{name} at four stages", len(stages), lost, f"exit code 75 within {slowest:.1f} s")
        yield self.second_interrupt()

    def run_for_long(self, folder: Path, announcement: AbstractContextManager[Any]) -> None:
        with announcement:
            run = TrainingRun(run_config(*OVERRIDES, "epochs=5000"), folder, overrides=OVERRIDES)
            os._exit(runner.exit_code(run, console=False))

    def second_interrupt(self) -> FaultResult:
        folder = self.new_folder()
        reading, writing = os.pipe()

        def work() -> None:
            with faults.slow_saves(20.0, writing):
                os._exit(
                    runner.exit_code(TrainingRun(run_config(*OVERRIDES), folder, overrides=OVERRIDES), console=False)
                )

        child = faults.fork(work)
        os.close(writing)
        os.read(reading, 1)
        started = time.monotonic()
        for _ in range(2):
            os.kill(child, signal.SIGINT)
            time.sleep(0.2)
        status = faults.ended(child, 10)
        seconds = time.monotonic() - started
        if status is None:
            faults.kill_group(child)
        return FaultResult("second SIGINT during a save", 1, int(status is None), f"exits after {seconds:.1f} s")

    # -- one folder, one run

    def folders(self) -> Iterator[FaultResult]:
        folder = self.new_folder()
        reading, writing = os.pipe()

        child = faults.fork(lambda: self.run_for_long(folder, announce_call(Step, "update", writing, 3)))
        os.close(writing)
        os.read(reading, 1)
        try:
            RunFolder(folder).lock()
            lost = 1
        except UserError:
            lost = 0
        faults.kill_group(child)
        yield FaultResult("second run in a live folder", 1, lost, "refused")
        lost = int(RunFolder(folder).is_live())
        RunFolder(folder).lock().close()
        yield FaultResult("lock of a killed run", 1, lost, "released")

    # -- faults that the tests inject, and the order of system calls

    def tests(self) -> Iterator[FaultResult]:
        files = {
            "full, read-only and limited disks": ["tests/reliability/test_disk.py"],
            "non-finite losses and gradients, out of memory": ["tests/training/test_nonfinite.py"],
            "corrupt and malicious images": ["tests/data/images/test_hard_images.py"],
            "killed, stopped and interrupted ranks": ["tests/reliability/test_ranks.py", "-m", "slow or not slow"],
        }
        for what, arguments in files.items():
            report = self.work / "report.xml"
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", f"--junit-xml={report}", *arguments]
            subprocess.run(command, cwd=ROOT, capture_output=True)
            text = report.read_text()
            numbers = {key: int(text.split(f'{key}="')[1].split('"')[0]) for key in ("tests", "failures", "errors")}
            yield FaultResult(what, numbers["tests"], numbers["failures"] + numbers["errors"], "tests")

    def calls(self) -> Iterator[FaultResult]:
        """Traces the system calls of a save: fsync of the file, rename, fsync of the folder."""
        if shutil.which("strace") is None:
            return
        trace = self.work / "trace"
        code = (
            "import sys; from pathlib import Path; from dlopt.training.checkpoint.checkpoints import Checkpoints; "
            "from tests.support.checkpoints import state; Checkpoints(Path(sys.argv[1])).save(state(1), best=False)"
        )
        only = ["-f", "-y", "-e", "trace=fsync,rename,renameat,renameat2", "-o", str(trace)]
        command = ["strace", *only, sys.executable, "-c", code, str(self.work / "traced")]
        subprocess.run(command, cwd=ROOT, check=True)
        lines = [line.split(maxsplit=1)[1] for line in trace.read_text().splitlines() if "traced" in line]
        synced = next(i for i, line in enumerate(lines) if line.startswith("fsync") and ".last.pt." in line)
        renamed = next(i for i, line in enumerate(lines) if line.startswith("rename") and '/last.pt"' in line)
        folder = [i for i, line in enumerate(lines) if line.startswith("fsync") and "traced>" in line]
        in_order = synced < renamed < max(folder)
        yield FaultResult("order of fsync, rename and fsync of the folder in a save", 1, int(not in_order))


@contextlib.contextmanager
def announce_call(owner: Any, name: str, writing: int, calls: int) -> Iterator[None]:
    """Writes a byte to the descriptor `writing` at call number `calls` of `owner.name`."""
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
def random_inputs() -> Iterator[None]:
    """Makes the model draw from Python's generator, as a custom model may."""
    original = Step.update

    def update(self: Step, batch: Batch, *arguments: Any, **named: Any) -> Any:
        inputs = batch.inputs * (1 + 0.1 * random.random())
        return original(self, dataclasses.replace(batch, inputs=inputs), *arguments, **named)

    with patch.object(Step, "update", update):
        yield


def stop_at(step: int) -> AbstractContextManager[Any]:
    from tests.support.runs import at_update, terminate

    return at_update(step, terminate)


def print_table(rows: list[FaultResult], seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{sum(row.times for row in rows)} faults in {seconds:.0f} s")
    for name in ("fault", "count", "lost", ""):
        table.add_column(name, justify="right" if name in ("count", "lost") else "left")
    for row in rows:
        table.add_row(row.what, str(row.times), f"{row.lost}{' (expected)' if row.expected else ''}", row.note)
    Console(width=110).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = ("kills", "controls", "damage", "signals", "folders", "calls", "tests")
    parser.add_argument("--short", action="store_true", help="inject few faults of each kind")
    parser.add_argument("--only", default=",".join(groups), help=f"comma-separated, of: {', '.join(groups)}")
    parser.add_argument("--seed", type=int, default=0, help="of the kill times and damages")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    started, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="dlopt-chaos-") as folder:
        campaign = Campaign(Path(folder), arguments.seed, arguments.short)
        for group in arguments.only.split(","):
            for row in getattr(campaign, group)():
                print(f"{row.what}: {row.lost} of {row.times} lost  {row.note}".rstrip(), flush=True)
                rows.append(row)
    print_table(rows, time.monotonic() - started)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return int(any((row.lost == row.times) is not row.expected if row.expected else row.lost for row in rows))


if __name__ == "__main__":
    sys.exit(main())
