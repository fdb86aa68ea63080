"""One run as a job: its exit code, what it says when it fails, what it leaves in its folder.

`python -m dlopt.job FOLDER [CHECKPOINT]` runs what FOLDER/config.yaml says, from that checkpoint, or else from the
newest there if it has one: so every job of a sweep is a process of its own, and one that is killed takes nothing
with it. The processes of a parallel run are started in the same way.
"""

import contextlib
import json
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

import dlopt
from dlopt.errors import DONE, FAILED, INTERRUPTED, USER_ERROR, RunError, UserError
from dlopt.files import write_atomically
from dlopt.folders import FORMAT, RunFolder

if TYPE_CHECKING:
    from dlopt.interruption import Interruption
    from dlopt.training.trainer import Run

_STATUS_OF = {"finished": DONE, "stopped_early": DONE, "interrupted": INTERRUPTED}


def execute(run: "Run", *, typed: Sequence[str] | None = None, console: bool = True) -> int:
    """Runs in this process and returns the exit code. A failure is told in one message, and recorded in the folder.

    `typed`: the command line's overrides, where the folder does not say yet what is run in it.
    """
    from dlopt.parallel import rendezvous
    from dlopt.parallel.launch import QUIET, RECORD
    from dlopt.training.nonfinite import Diverged

    world = rendezvous.current()
    console = console and os.environ.get(QUIET) != "1"
    is_main = world is None or world.is_main
    place = "" if world is None or world.is_main else f"rank {world.rank}: "
    record = typed is None if world is None else os.environ.get(RECORD) == "1"  # a user's mistake, too
    try:
        processes, lock = claim(run)
    except UserError as error:
        complain(str(error))
        return USER_ERROR
    with lock:
        try:
            return start(run, processes, typed=typed, console=console)
        except UserError as error:
            if rendezvous.first_to_fail():
                complain(f"{place}{error}")
                if record:
                    _record_failure(run.folder, f"{place}{error}")
            return USER_ERROR
        except RunError as error:
            if rendezvous.first_to_fail():
                complain(f"{place}{error}")
                _record_failure(run.folder, f"{place}{error}", diverged=isinstance(error, Diverged))
            return FAILED
        except KeyboardInterrupt:
            if is_main:
                complain("stopped at once; what was saved last is in the checkpoints folder")
            return INTERRUPTED
        except Exception as error:
            missing = rendezvous.missing_ranks(error)
            if missing and rendezvous.first_to_fail():
                ranks = ", ".join(map(str, missing))
                text = f"rank {ranks} ended, or did not answer within parallel.timeout_minutes (stopped, or busy)"
                complain(text)
                _record_failure(run.folder, text)
            elif rendezvous.first_to_fail():
                text = traceback.format_exc()
                with contextlib.suppress(OSError):
                    (run.folder / "traceback.txt").write_text(text)
                _record_failure(run.folder, f"{place}{type(error).__name__}: {error}")
                complain(f"{place}the run failed: {type(error).__name__}: {error}")
                print(text, file=sys.stderr)
            return FAILED


def claim(run: "Run") -> tuple[int, contextlib.AbstractContextManager[object]]:
    """The number of processes that the run is to start, one for none, and the lock on its folder for the time that it
    takes. Raises `UserError`."""
    from dlopt.parallel.launch import count_processes
    from dlopt.parallel.rendezvous import current

    world, experiment = current(), run.experiment
    processes = 1 if world is not None else count_processes(experiment.parallel.arguments, experiment.settings.device)
    # Where processes are started, the first of them locks.
    is_mine = (world is None or world.is_main) and processes == 1
    return processes, RunFolder(run.folder).lock() if is_mine else contextlib.nullcontext()


def start(run: "Run", processes: int, *, typed: Sequence[str] | None, console: bool) -> int:
    """Runs what was claimed and returns the exit code. Raises `UserError`, `RunError` and whatever else happens."""
    from dlopt.interruption import Interruption
    from dlopt.parallel import rendezvous
    from dlopt.parallel.launch import run_group

    world = rendezvous.current()
    is_main = world is None or world.is_main
    if typed is not None and is_main:
        describe(run.folder, run.experiment.config, typed, run.choices)
    if processes > 1:
        resume = run.experiment.settings.resume
        checkpoint = None if resume == "auto" else resume
        return run_group(run.folder, processes, checkpoint, record=typed is None, console=console)
    with Interruption(run.experiment.settings.max_time) as interruption:
        status = train(run, interruption, console=console and is_main)["status"]
        rendezvous.leave()  # while it waits for the others, too, a signal that comes again has nothing to end
    return _STATUS_OF[status]


def train(run: "Run", interruption: "Interruption | None" = None, *, console: bool = True) -> dict[str, Any]:
    """Trains with what the settings ask of the laboratory: observers of the updates, a learning-rate range test.

    See `dlopt.training.trainer.train`.
    """
    from dlopt.training import trainer

    settings = run.experiment.settings
    laboratory: dict[str, Any] = {}
    if settings.diagnostics or settings.profile:
        from dlopt.analysis.instruments import observers

        laboratory["observe"] = observers
    if run.experiment.auto_lr:
        from dlopt.analysis.lr_range import find_lr

        laboratory["find_lr"] = find_lr
    return trainer.train(run, interruption, console=console, **laboratory)


def complain(message: str) -> None:
    print(f"dlopt: {message}", file=sys.stderr, flush=True)


def describe(folder: Path, config: Mapping[str, Any], overrides: Sequence[str], choices: Mapping[str, str]) -> None:
    """Writes what the run is: config.yaml, overrides.yaml, environment.json. Raises `UserError` when it cannot."""
    environment = {
        "dlopt": dlopt.__version__,
        "folder_format": FORMAT,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "git_commit": _git_commit(),
        "choices": dict(choices),
        **_versions(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
        _write(folder / "overrides.yaml", yaml.safe_dump(list(overrides), allow_unicode=True))
        _write(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"hydra.run.dir={folder}: the folder cannot be written: {error.strerror}") from None


def _write(path: Path, text: str) -> None:
    write_atomically(path, text.encode())


def _versions() -> dict[str, Any]:
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": gpu}


def _git_commit() -> str | None:
    """The commit of the code that runs, where it runs from a checkout."""
    root = Path(dlopt.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return None


def _record_failure(folder: Path, reason: str, *, diverged: bool = False) -> None:
    summary = {"status": "failed", "reason": reason} | ({"diverged": True} if diverged else {})
    with contextlib.suppress(OSError):
        _write(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def main() -> int:
    from dlopt.parallel import launch
    from dlopt.parallel.rendezvous import RANK, current

    if RANK in os.environ:
        launch.end_rank_with_parent()
    from dlopt.config.compose import resolve_saved
    from dlopt.config.parsing import parse
    from dlopt.training.checkpoint import Checkpoints, load
    from dlopt.training.trainer import Run

    world = current()
    folder = RunFolder(Path(sys.argv[1]))
    try:
        folder.refuse_newer("dlopt.job")
        plain = folder.config()
        if plain is None:
            raise UserError(f"{folder.path}: there is no config.yaml to run")
        choices = json.loads((folder.path / "environment.json").read_text())["choices"]
        experiment = parse(resolve_saved(plain), plain)
        state = None
        if world is None or world.is_main:
            given = sys.argv[2:]
            state = load(Path(given[0])) if given else Checkpoints(folder.checkpoints).load_newest()
        run = Run(experiment, folder.path, state, choices)
    except (UserError, RunError) as error:
        if world is None or world.is_main:
            complain(str(error))
            _record_failure(folder.path, str(error))
        return USER_ERROR if isinstance(error, UserError) else FAILED
    return execute(run)


def _end(code: int) -> NoReturn:
    from dlopt.parallel.rendezvous import current, end_process

    if current() is None:
        sys.exit(code)
    end_process(code)


if __name__ == "__main__":
    _end(main())
