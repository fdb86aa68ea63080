"""The folder of a run: a new folder, or the folder of the run to resume, with its newest checkpoint."""

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dlopt.basics.errors import FileError, StateError, UserError
from dlopt.basics.files import write_atomically
from dlopt.basics.folders import FolderSnapshot, RunFolder, make, make_new, new_run_id
from dlopt.basics.plain_values import read_regular
from dlopt.config.compose import typed_folder
from dlopt.config.plan import Plan
from dlopt.config.reads import refuse_untested
from dlopt.config.resuming import newest_finished, newest_unfinished, refuse_longer, refuse_other_config
from dlopt.machine.world import current
from dlopt.tracking.metrics import DIAGNOSTICS, MAX_METRICS, METRICS

if TYPE_CHECKING:
    from dlopt.training.checkpoint.content import Checkpoint
    from dlopt.training.progress import TrainingRun


@dataclass(frozen=True)
class Attempt:
    """A checked run in its folder, before anything is written to it."""

    run: "TrainingRun"
    folder: RunFolder
    before: FolderSnapshot  # the folder as it was, to restore it if the run is refused
    is_new: bool  # no earlier run has left its config in the folder
    is_done: bool  # resume=auto, and the run has ended

    def refuse_other_run(self) -> None:
        """Raises `UserError` if another process has started a run in this new folder since `place`."""
        if self.is_new and (self.folder.config() is not None or self.folder.is_live()):
            raise StateError(f"hydra.run.dir={self.folder.path}: another run is active in this folder")

    def erase_if_new(self) -> None:
        """Removes the folder of a new run that was refused."""
        # Not even if a signal came between the end of a run and its exit code.
        has_saved = (self.folder.checkpoints / "last.pt").exists()
        if self.is_new and not has_saved and not self.folder.is_live():
            self.before.erase(self.folder.path)


def place(plan: Plan) -> Attempt:
    """Finds or creates the folder of a checked run. Raises `UserError`."""
    from dlopt.training.progress import TrainingRun

    config, saved = plan.config, plan.saved
    assert config is not None
    refuse_untested(saved, plan.texts)
    path, is_typed = typed_folder(config, "hydra.run.dir", plan.texts)
    if saved["dry_run"]:
        raise UserError("dry_run=true: only available in `dlopt train`")
    before = FolderSnapshot(path)
    folder, checkpoint, source = _find_folder(plan, path, is_typed)
    # From the checkpoint if config.yaml is damaged; a run that is resumed in another folder is a new one.
    former_id = None if checkpoint is None or source is not None else checkpoint.run_id
    run_id, is_auto = folder.run_id() or former_id or new_run_id(), saved["resume"] == "auto"
    if checkpoint is not None and source is not None:
        copy_history(source, folder, checkpoint.best_epoch, run_id)
    run_config = replace(plan.run_config, config={"run_id": run_id, **plan.run_config.config})
    run = TrainingRun(run_config, folder.path, checkpoint, plan.choices, plan.typed)
    is_new = folder.config() is None and not (is_auto and checkpoint is not None)  # config.yaml may be damaged
    return Attempt(run, folder, before, is_new, is_done=is_auto and folder.is_done(saved))


def _find_folder(plan: Plan, path: Path, is_typed: bool) -> tuple[RunFolder, "Checkpoint | None", RunFolder | None]:
    """Returns the run folder, created if missing, the checkpoint to resume from, and its folder if that is another.

    path: hydra.run.dir; `is_typed`: given on the command line.
    """
    from dlopt.training.checkpoint.checkpoints import Checkpoints, load, load_of_run

    saved, target = plan.saved, RunFolder(path)
    resume = saved["resume"]
    source = earlier = checkpoint = None
    if resume not in (None, "auto"):
        resume = str(RunFolder.to_resume(resume))
        source = RunFolder(Path(resume).absolute().parent.parent)
    if is_typed and target.is_live():
        raise StateError(f"hydra.run.dir={path}: another run is active in this folder")
    if is_typed:
        target.refuse_other_format(f"hydra.run.dir={path}")

    # 1. resume=auto: the newest unfinished run of this config, or a new one.
    if resume == "auto":
        previous = target if is_typed else newest_unfinished(path.parent, saved)
        if previous is not None and previous.has_run():
            previous.refuse_other_format("resume=auto")
            refuse_other_config(previous.config() or saved, saved, f"{previous.path}", previous.typed())
            newest = None if previous.is_done(saved) else load_of_run(previous, saved)
            return previous, newest, None
        if not is_typed and (done := newest_finished(path.parent, saved)) is not None:
            refuse_longer(done, saved, plan.typed)

    # 2. A command that a launcher restarts: the run that it has started from the checkpoint `resume`. Started from it
    #    again, a run that fails now and then would never end.
    if source is not None and (world := current()) is not None and world.restarts:
        begun = target if is_typed else newest_unfinished(path.parent, saved)
        config = None if begun is None else begun.config()
        if begun is not None and config is not None and config.get("resume") == saved["resume"]:
            refuse_other_config(config, saved, f"{begun.path}", begun.typed())
            earlier, newest = begun, load_of_run(begun, saved)
            if newest is not None:
                return begun, newest, None

    # 3. A new run, or one that begins with the checkpoint `resume` of the run `source`.
    if is_typed and target.has_begun(resumed=source is not None) and target not in (source, earlier):
        state = "a finished" if target.has_ended() else "an unfinished"
        raise StateError(
            f"hydra.run.dir={path}: this folder contains {state} run; resume it with: dlopt train ... resume=auto, "
            "or use another folder"
        )
    if source is not None:
        source.refuse_other_format(f"resume={resume}")
        try:
            checkpoint = load(Path(resume))
        except UserError as error:
            _, _, reason = str(error).partition(": ")
            hint = "; resume=auto resumes the newest unfinished run"
            if Path(resume).is_file():
                hint = f"; to load only its weights, use init_from={resume}"
            raise FileError(f"resume={resume}: {reason}{'' if 'init_from' in reason else hint}") from None
        has_identity = checkpoint.identity is not None
        refuse_other_config(checkpoint.config, saved, resume, source.typed(), has_identity=has_identity)
        if is_typed and target == source and Checkpoints(target.checkpoints).has_later(checkpoint.step):
            raise StateError(
                f"resume: the run has a later checkpoint than {Path(resume).name}; use resume=auto, or leave out "
                f"hydra.run.dir={path} to resume from {Path(resume).name} in a new folder"
            )
    if not is_typed:
        target = RunFolder(make_new(path))
    elif not path.is_dir():
        make(path, "hydra.run.dir")
    return target, checkpoint, None if target == source else source


def copy_history(source: RunFolder, target: RunFolder, best_epoch: float | None, run_id: str) -> None:
    """Copies metrics, diagnostics and the best model of a run that is resumed in another folder.

    Tracking removes the lines after the checkpoint. The best model is copied only if it belongs to the checkpoint,
    not one of a later epoch.
    """
    from dlopt.training.checkpoint.checkpoints import Checkpoints, load

    # A crash in between does no harm: with these files only, the folder counts as not begun (`has_begun`), and the next
    # start copies them again.
    for name in (METRICS, DIAGNOSTICS):
        with contextlib.suppress(FileNotFoundError, ValueError):  # of a stranger: not a regular file
            write_atomically(target.path / name, read_regular(source.path / name, MAX_METRICS))
    best = Checkpoints(source.checkpoints).best
    with contextlib.suppress(UserError):
        if best_epoch is not None and load(best).evaluated_epoch == best_epoch:
            Checkpoints(target.checkpoints).adopt(best, run_id, "best")
