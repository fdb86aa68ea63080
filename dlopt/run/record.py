"""What a run leaves in addition to its results: the files that describe it, and why it ended."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlopt.basics.errors import FAILED, INTERRUPTED, USER_ERROR, ReportedError, RunError, UserError, disk_failure
from dlopt.basics.files import read_json, write_atomically, write_json, write_yaml
from dlopt.basics.folders import FORMAT, RunFolder, new_run_id, refuse_links
from dlopt.basics.interruption import print_line, print_message, print_note
from dlopt.basics.plain_values import read_regular
from dlopt.basics.secrets import redact_bytes
from dlopt.config.keys import LABELS
from dlopt.config.overrides import is_set, storable
from dlopt.config.resuming import how_to_resume, with_smaller_lr
from dlopt.machine.world import current
from dlopt.parallel.processes import launch, rendezvous
from dlopt.run import environment

if TYPE_CHECKING:
    from dlopt.training.progress import TrainingRun


class NotStartedError(UserError):
    """A run that cannot start, for example because another process is running it: its folder stays unchanged."""

    kind = "state"


def report(
    run: "TrainingRun", error: Exception | KeyboardInterrupt, *, prints: bool = True, may_diverge: bool = False
) -> int:
    """Writes to the run's folder why it has ended, prints it in one line, and returns the exit code.

    Of several ranks, only the first to fail reports. `may_diverge`: divergence is only recorded.
    """
    from dlopt.training.nonfinite import Diverged

    if isinstance(error, KeyboardInterrupt):
        if prints and rendezvous.is_main():
            print_note(f"interrupted; {how_to_resume(RunFolder(run.folder), rendezvous.is_launched())}")
        return INTERRUPTED
    if isinstance(error, NotStartedError):
        if prints:
            print_message(str(error))
        return error.code
    code, reason = failure(error)
    if not rendezvous.first_to_fail(code, reason):
        return code
    folder, diverged = RunFolder(run.folder), isinstance(error, Diverged)
    ids = {folder.run_id(), run.run_config.config.get("run_id")}
    is_own = None in ids or len(ids) == 1  # the folder may now be another run's, if this run's was renamed
    message, frames = reason, None
    if reason is None:
        frames, cause = traceback.format_exc(), f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            if is_own:
                write_atomically(run.folder / "traceback.txt", frames)
        reason, message = f"{_rank_prefix()}{cause}", f"{_rank_prefix()}the run failed: {cause}"
    if prints and not (may_diverge and diverged):
        print_message(f"{message}{with_smaller_lr(folder) if diverged else ''}")
    # A folder that existed before keeps the reason of a UserError; a new one is removed.
    if is_own and (code == FAILED or is_job_of_sweep(run)):
        record_failure(run.folder, reason, diverged=diverged)
    if prints and frames is not None:
        print_line(frames)
    return code


def failure(error: Exception) -> tuple[int, str | None]:
    """Returns the exit code of a rank for an error, and its message; None for a bug, which needs a traceback.

    All ranks that the error reaches call this together.
    """
    if isinstance(error, UserError | RunError):
        return error.code, f"{_rank_prefix()}{error}"
    if (reason := disk_failure(error)) is not None:
        return FAILED, f"{_rank_prefix()}{reason}"
    return rendezvous.failure_of_peers(error) or (FAILED, None)


def _rank_prefix() -> str:
    world = current()
    return "" if world is None or world.is_main else f"rank {world.rank}: "


def is_job_of_sweep(run: "TrainingRun") -> bool:
    """Returns whether a sweep described the run that this process (or one of several ranks) executes."""
    return run.overrides is None if current() is None else os.environ.get(launch.RECORD) == "1"


@contextlib.contextmanager
def described(run: "TrainingRun") -> Iterator[None]:
    """Writes the files that describe a run; a refused run that was resumed gets its former ones back."""
    former: dict[Path, bytes | None] = {}
    try:
        if rendezvous.is_main() and run.overrides is None:
            _record_machine(run.folder)
        elif rendezvous.is_main() and run.overrides is not None:
            if run.checkpoint is not None:
                names = ("config.yaml", "overrides.yaml", "environment.json", environment.DIFF)
                paths = [run.folder / name for name in names]
                former = {path: read_regular(path, sys.maxsize) if path.is_file() else None for path in paths}
                if changed := _changed_versions(run):
                    print_note(f"warning: resumes with {changed}; the result may differ from that of one version")
            describe(run.folder, run.run_config.config, run.overrides, run.choices)
        yield
    except (UserError, ReportedError) as error:
        if error.code == USER_ERROR:  # here, or in child processes
            for path, data in former.items():
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True) if data is None else write_atomically(path, data)
        raise


def describe(folder: Path, config: Mapping[str, Any], overrides: Sequence[str], choices: Mapping[str, str]) -> None:
    """Writes config.yaml, overrides.yaml, environment.json and, for uncommitted changes of the user's code, code.diff.

    A resumed run keeps its id, and its tags and its note, which `dlopt runs tag` may have changed, unless others are
    typed. Raises `UserError` if the folder is not writable.
    """
    refuse_links(folder, f"hydra.run.dir={folder}")
    overrides, started = storable(overrides), RunFolder(folder)
    former, before = started.config() or {}, started.typed()
    typed = [line for line in overrides if line not in before]
    labels = {key: former[key] for key in LABELS if key in former and not is_set(key, typed)}
    config = {"run_id": started.run_id() or new_run_id(), **config, **labels}
    code, diff = environment.repository()
    submitted = environment.submitted()
    facts = {
        "folder_format": FORMAT,
        "choices": dict(choices),
        **environment.versions(),
        **environment.machine(),
        "code": code,
        **({} if submitted is None else {"submitted_code": str(submitted.get("submitted_code"))}),
        "allow_packages": environment.packages(config.get("allow_packages") or ()),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A crash in between does no harm: every start of the run, also a resumed one, writes all of these files again.
        write_yaml(folder / "config.yaml", config)
        write_yaml(folder / "overrides.yaml", overrides)
        write_json(folder / "environment.json", facts)
        if diff:
            write_atomically(folder / environment.DIFF, redact_bytes(diff))
        else:
            (folder / environment.DIFF).unlink(missing_ok=True)  # of the run that is resumed
    except OSError as error:
        raise UserError(f"hydra.run.dir={folder}: cannot write to this folder: {error.strerror}") from None


def _changed_versions(run: "TrainingRun") -> str:
    """Returns the versions and packages that differ from the run's previous start: "dlopt 0.2.0 (was 0.1.0)"."""
    resume = Path(run.run_config.settings.resume or "")  # another run, or its checkpoint; or auto
    folders = (run.folder, resume, *resume.parents[:2])
    before = next((found for folder in folders if (found := read_json(folder / "environment.json"))), {})
    former = before.get("allow_packages")
    former = former if isinstance(former, dict) else {}
    others = [
        f"other code of {name}"
        for name, package in environment.packages(former).items()
        if package and isinstance(known := former[name], dict)
        and any(package.get(fact) != known.get(fact) for fact in ("version", "sha256"))  # the folder may have moved
    ]  # fmt: skip
    return ", ".join([*environment.changed_versions(before), *others])


def _record_machine(folder: Path) -> None:
    """Updates the machine in environment.json, which the sweep of this job may have written on another one."""
    saved = read_json(path := folder / "environment.json")
    if saved is not None and saved != (facts := saved | environment.machine()):
        with contextlib.suppress(OSError):
            write_json(path, facts)


def record_failure(folder: Path, reason: str, *, diverged: bool = False, died: bool = False) -> dict[str, Any]:
    """Writes the summary of a failed run, and returns it. `died`: its process ended without a word."""
    summary: dict[str, Any] = {"status": "failed", "run_id": RunFolder(folder).run_id(), "reason": reason}
    summary |= {name: True for name, is_so in (("diverged", diverged), ("died", died)) if is_so}
    with contextlib.suppress(OSError):
        write_json(folder / "summary.json", summary)
    return summary
