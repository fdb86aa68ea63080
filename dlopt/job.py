"""One run as a job: its exit code, what it says when it fails, what it leaves in its folder.

`python -m dlopt.job FOLDER` runs what FOLDER/config.yaml says, from the checkpoint there if it has one: so every job of
a sweep is a process of its own, and one that is killed takes nothing with it.
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
from typing import TYPE_CHECKING, Any

import yaml

import dlopt
from dlopt.errors import RunError, UserError
from dlopt.folders import RunFolder
from dlopt.tracking.files import write_atomically

if TYPE_CHECKING:
    from dlopt.run import Run

DONE, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 75
_STATUS_OF = {"finished": DONE, "stopped_early": DONE, "interrupted": INTERRUPTED}


def execute(run: "Run", *, typed: Sequence[str] | None = None, console: bool = True) -> int:
    """Runs in this process and returns the exit code. A failure is told in one message, and recorded in the folder.

    `typed`: the command line's overrides, where the folder does not say yet what is run in it.
    """
    from dlopt.run import train

    try:
        lock = RunFolder(run.folder).lock()
    except UserError as error:
        complain(str(error))
        return USER_ERROR
    with lock:
        try:
            if typed is not None:
                describe(run.folder, run.experiment.config, typed, run.choices)
            return _STATUS_OF[train(run, console=console)["status"]]
        except UserError as error:
            complain(str(error))
            if typed is None:
                _record_failure(run.folder, str(error))
            return USER_ERROR
        except RunError as error:
            complain(str(error))
            _record_failure(run.folder, str(error))
            return FAILED
        except KeyboardInterrupt:
            complain("stopped at once; what was saved last is in the checkpoints folder")
            return INTERRUPTED
        except Exception as error:
            text = traceback.format_exc()
            with contextlib.suppress(OSError):
                (run.folder / "traceback.txt").write_text(text)
            _record_failure(run.folder, f"{type(error).__name__}: {error}")
            complain(f"the run failed: {type(error).__name__}: {error}")
            print(text, file=sys.stderr)
            return FAILED


def complain(message: str) -> None:
    print(f"dlopt: {message}", file=sys.stderr, flush=True)


def describe(folder: Path, config: Mapping[str, Any], overrides: Sequence[str], choices: Mapping[str, str]) -> None:
    """Writes what the run is: config.yaml, overrides.yaml, environment.json. Raises `UserError` when it cannot."""
    environment = {
        "dlopt": dlopt.__version__,
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


def _record_failure(folder: Path, reason: str) -> None:
    summary = {"status": "failed", "reason": reason}
    with contextlib.suppress(OSError):
        _write(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def main() -> int:
    from dlopt.config.compose import resolve_saved
    from dlopt.config.experiment import parse
    from dlopt.engine.checkpoint import Checkpoints
    from dlopt.run import Run

    folder = RunFolder(Path(sys.argv[1]))
    try:
        plain = folder.config()
        if plain is None:
            raise UserError(f"{folder.path}: there is no config.yaml to run")
        choices = json.loads((folder.path / "environment.json").read_text())["choices"]
        run = Run(
            parse(resolve_saved(plain), plain), folder.path, Checkpoints(folder.checkpoints).load_newest(), choices
        )
    except (UserError, RunError) as error:
        complain(str(error))
        _record_failure(folder.path, str(error))
        return USER_ERROR if isinstance(error, UserError) else FAILED
    return execute(run)


if __name__ == "__main__":
    sys.exit(main())
