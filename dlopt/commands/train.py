"""`dlopt train`: composes and checks the config, finds or creates the run folder, and runs."""

import contextlib
import json
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.types import RunMode
from omegaconf import DictConfig

from dlopt.command_line.processes import prepare_rank
from dlopt.command_line.reads import COMPOSITION, refuse_unread_hydra, refuse_untested
from dlopt.config.compose import Composer, job_environment, typed_folder
from dlopt.config.flags import parse_arguments, show_info
from dlopt.config.inherit import inherit
from dlopt.config.overrides import is_typed, parse_overrides
from dlopt.config.plan import Plan, checked
from dlopt.config.resolve import resolve_saved, show_config
from dlopt.config.resuming import newest_finished, newest_unfinished, refuse_other_config
from dlopt.errors import DONE, FAILED, USER_ERROR, UserError
from dlopt.folders import FolderSnapshot, RunFolder, make, make_new
from dlopt.interruption import killed_by_signals
from dlopt.job import Outcome, execute, is_quiet, print_error, reported, start
from dlopt.parallel.rendezvous import World, current, end_process, join_store
from dlopt.table import SERIES, function
from dlopt.tracking.layout import short_path, waiting

if TYPE_CHECKING:
    from torch.distributed import Store

    from dlopt.training.progress import Run

_READS_OF_HYDRA = (*COMPOSITION, "hydra.run", "hydra.job", "hydra.job_logging", "hydra.verbose")
# How the ranks of torchrun and srun find each other before rank 0 has sent them the run.
_ADDRESS = ("parallel.master_addr", "parallel.master_port", "parallel.timeout_minutes")
_HINTS = dict.fromkeys(("hydra.sweep", "hydra.sweeper", "hydra.launcher"), "add -m")


def train(arguments: list[str]) -> int:
    """Runs `dlopt train` with the given arguments; returns the exit code. Raises `UserError`."""
    parsed = parse_arguments(arguments)
    if parsed.help:
        from dlopt.commands.options import help_page

        print(help_page(parsed.config_dir))
        return 0
    _check_flags(parsed)
    world = current()
    if world is not None:
        prepare_rank()
        if world.restarts and not is_typed("resume", parsed.overrides):
            parsed.overrides.append("resume=auto")  # torchrun has restarted the run
    if world is not None and not world.is_main:
        return _follow(parsed, world)
    composer = Composer(parsed.config_name, parsed.config_dir)
    typed, parsed.overrides = parsed.overrides, inherit(composer, parsed.overrides)
    if parsed.hydra_help or parsed.cfg or parsed.info:
        shown = composer.compose(parsed.overrides)  # has clearer error messages than Hydra
        if parsed.cfg:
            print(show_config(shown, parsed.cfg, parsed.package, resolve=parsed.resolve), end="")
        else:
            show_info(parsed)
        return 0
    config = None if parsed.multirun else composer.compose(parsed.overrides)
    if config is None or config.hydra.mode == RunMode.MULTIRUN:  # a config file may set the mode
        from dlopt.sweeps.run import sweep

        return sweep(composer, parsed)
    for key, path in SERIES.items():
        if config.get(key) is not None:
            code: int = function(path)(composer, parsed, config)
            return code
    if world is not None:
        return _lead(composer, config, parsed.overrides, typed, world)
    refuse_unread_hydra(parsed.overrides, "dlopt train", _READS_OF_HYDRA, _HINTS)
    with waiting("loading PyTorch ..."):
        plan = checked(config, parsed.overrides, flags=composer.flags)
    if plan.experiment.settings.dry_run:
        return _estimate(plan)
    with attempt(plan) as outcome:
        if outcome.run is not None:
            outcome.code = start(outcome.run, console=not is_quiet())
    return outcome.code


def _check_flags(parsed: Namespace) -> None:
    modes = [f"--{name}" for name in ("run", "multirun", "cfg", "info") if getattr(parsed, name)]
    if len(modes) > 1:
        raise UserError(f"{' '.join(modes)}: only one of these can be used at a time")
    for name in ("resolve", "package"):
        if getattr(parsed, name) and not parsed.cfg:
            raise UserError(f"--{name}: only valid with --cfg")


def _lead(composer: Composer, config: DictConfig, overrides: list[str], typed: list[str], world: World) -> int:
    """Rank 0 of a launcher's processes: checks the run, chooses the folder and sends the run to the other ranks.

    `typed`: the command line, of which `overrides` are made.
    """
    store = _join_store(config.parallel, world)
    code = FAILED
    try:
        refuse_unread_hydra(overrides, "dlopt train", _READS_OF_HYDRA, _HINTS)
        _refuse_address_of_file(config, typed)
        plan = checked(config, overrides, flags=composer.flags)
        if plan.experiment.settings.dry_run:
            code = _estimate(plan)
        else:
            with attempt(plan, send=lambda message: store.set("run", json.dumps(message))) as outcome:
                if outcome.run is not None:
                    outcome.code = start(outcome.run, console=not is_quiet())
            code = outcome.code
    except UserError as error:
        print_error(str(error))
        code = USER_ERROR
    finally:
        # Without a run, send the exit code: the other ranks would wait for a run until their timeout.
        with contextlib.suppress(RuntimeError):  # the launcher that hosts the store may be gone
            store.compare_set("run", "", json.dumps({"exit": code}))
    end_process(code)


def _follow(parsed: Namespace, world: World) -> int:
    """Ranks > 0: receive the run from rank 0, which also composes it and reports config errors."""
    from dlopt.config.parsing import parse
    from dlopt.training.progress import Run

    if parsed.multirun or parsed.hydra_help or parsed.cfg or parsed.info:
        return USER_ERROR if parsed.multirun else 0
    try:
        typed = {override.key_or_group: override.value() for override in parse_overrides(parsed.overrides)}
    except UserError:
        end_process(USER_ERROR)
    store = _join_store({key.partition(".")[2]: value for key, value in typed.items() if key in _ADDRESS}, world)
    with killed_by_signals():
        message = json.loads(store.get("run"))
    if "exit" in message:
        end_process(message["exit"])
    experiment = parse(resolve_saved(message["config"]), message["config"], message["choices"])
    end_process(execute(Run(experiment, Path(message["folder"]), None, message["choices"], parsed.overrides)))


def _refuse_address_of_file(config: DictConfig, overrides: list[str]) -> None:
    """Raises `UserError` for a store that the other ranks, which compose no config, cannot know."""
    for key in _ADDRESS[:2]:
        value = config.parallel.get(key.partition(".")[2])
        if value is not None and not is_typed(key, overrides):
            raise UserError(f"{key}={value}: set in a config file, but accepted from the command line only here")


def _join_store(parallel: Mapping[str, Any] | DictConfig, world: World) -> "Store":
    with killed_by_signals():
        return join_store(
            world,
            minutes=parallel.get("timeout_minutes", 10.0),
            address=parallel.get("master_addr"),
            port=parallel.get("master_port"),
        )


@dataclass(frozen=True)
class Prepared:
    """A checked run and its folder, before anything is written to it."""

    run: "Run"
    folder: RunFolder
    before: FolderSnapshot
    is_new: bool
    is_done: bool


def prepare(plan: Plan) -> Prepared:
    """Finds or creates the folder of a checked run. Raises `UserError`."""
    from dlopt.training.progress import Run

    config, saved = plan.config, plan.saved
    assert config is not None
    refuse_untested(saved, plan.lines)
    path, is_typed = typed_folder(config, "hydra.run.dir", plan.lines)
    if saved["dry_run"]:
        raise UserError("dry_run=true: only available in `dlopt train`")
    before = FolderSnapshot(path)
    folder, state = _find_folder(path, is_typed, saved)
    is_auto = saved["resume"] == "auto"
    run = Run(plan.experiment, folder.path, state, plan.choices, plan.typed)
    is_new = folder.config() is None and not (is_auto and state is not None)  # config.yaml may be damaged
    return Prepared(run, folder, before, is_new, is_done=is_auto and folder.is_done(saved))


def _estimate(plan: Plan) -> int:
    from dlopt.sweeps.estimate import print_estimate

    refuse_untested(plan.saved, plan.lines)
    print_estimate([plan.saved], plan.choices, jobs=1)
    return 0


@dataclass
class Attempt(Outcome):
    """A run to start; None: there is nothing to do."""

    run: "Run | None" = None


@contextlib.contextmanager
def attempt(plan: Plan, send: Callable[[Mapping[str, Any]], None] | None = None) -> Iterator[Attempt]:
    """Context in which a plan is started in its folder; a new folder is removed if the run is refused.

    Args:
        send: sends other ranks the message with which they join the run.
    """
    prepared = prepare(plan)
    run, folder = prepared.run, prepared.folder
    if prepared.is_done:
        from dlopt.tracking.console import ConsoleView

        ConsoleView().finish(folder.summary() or {}, [f"this run is already finished: {folder.path}"])
        yield Attempt(DONE)
        return
    if plan.experiment.settings.resume == "auto" and prepared.is_new:
        done = newest_finished(folder.path.parent, plan.saved)
        hint = "" if done is None else f"; {_how_to_extend(done)}"
        print(f"resume=auto: no unfinished run of this config found; starting a new run{hint}", flush=True)
    if prepared.is_new and (folder.config() is not None or folder.is_live()):
        # Another process has started a run in this folder since `prepare`.
        raise UserError(f"hydra.run.dir={folder.path}: another run is active in this folder")
    tried = Attempt(USER_ERROR, run)
    try:
        assert plan.config is not None
        with job_environment(plan.config, folder.path):
            if send is not None:
                send({"config": plan.saved, "folder": str(folder.path), "choices": plan.choices})
            with reported(run) as outcome:
                yield tried
                outcome.code = tried.code
            tried.code = outcome.code
    finally:
        # A run that has saved is never erased, not even if a signal came between its end and its exit code.
        has_saved = (folder.checkpoints / "last.pt").exists()
        if tried.code == USER_ERROR and prepared.is_new and not has_saved and not folder.is_live():
            prepared.before.erase(folder.path)


def _how_to_extend(done: RunFolder) -> str:
    path = short_path(done.path)
    return f"{path} has finished and differs only in its length: to extend it, add hydra.run.dir={path}"


def _find_folder(path: Path, is_typed: bool, saved: Mapping[str, Any]) -> tuple[RunFolder, Mapping[str, Any] | None]:
    """Returns the run folder, created if missing, and the checkpoint to resume from, if any.

    Args:
        path: hydra.run.dir; `is_typed`: given on the command line.
        saved: the config to save.
    """
    from dlopt.training.checkpoint import Checkpoints

    target, resume = RunFolder(path), saved["resume"]
    if resume not in (None, "auto"):
        resume = str(RunFolder.to_resume(resume))
    if is_typed and target.is_live():
        raise UserError(f"hydra.run.dir={path}: another run is active in this folder")
    if is_typed:
        target.refuse_newer(f"hydra.run.dir={path}")
    if resume == "auto":
        previous = target if is_typed else newest_unfinished(path.parent, saved)
        if previous is not None and previous.has_run():
            previous.refuse_newer("resume=auto")
            config = previous.config()
            refuse_other_config(config or saved, saved, f"{previous.path}", previous.history())
            if previous.is_done(saved):
                return previous, None
            newest = Checkpoints(previous.checkpoints).load_newest()
            if config is None and newest is not None:  # config.yaml is damaged
                refuse_other_config(newest["config"], saved, f"{previous.path}", previous.history())
            return previous, newest
    source = earlier = None
    if resume not in (None, "auto"):
        source, earlier = RunFolder(Path(resume).absolute().parent.parent), _earlier_attempt(path, is_typed, saved)
    if earlier is not None and earlier != source:
        newest = Checkpoints(earlier.checkpoints).load_newest()
        if newest is not None:
            return earlier, newest
    if is_typed and target.has_run() and target not in (source, earlier):
        state = "a finished" if target.is_finished() else "an unfinished"
        raise UserError(
            f"hydra.run.dir={path}: this folder contains {state} run; resume it with: dlopt train ... resume=auto, "
            "or use another folder"
        )
    checkpoint = None
    if source is not None:
        source.refuse_newer(f"resume={resume}")
        checkpoint = _load(resume)
        refuse_other_config(checkpoint["config"], saved, resume, source.history())
    if not is_typed:
        target = RunFolder(make_new(path))
    elif not path.is_dir():
        make(path, "hydra.run.dir")
    if source is not None and checkpoint is not None and target != source:
        _copy_history(source, target, checkpoint["progress"]["best"]["epoch"])
    return target, checkpoint


def _earlier_attempt(path: Path, is_typed: bool, saved: Mapping[str, Any]) -> RunFolder | None:
    """Returns the run that this command has started from the checkpoint `resume`, if a launcher restarts the command.

    Started from that checkpoint again, a run that fails now and then would never end.
    """
    world = current()
    if world is None or not world.restarts:
        return None
    folder = RunFolder(path) if is_typed else newest_unfinished(path.parent, saved)
    config = None if folder is None else folder.config()
    if folder is None or config is None or config.get("resume") != saved["resume"]:
        return None
    refuse_other_config(config, saved, f"{folder.path}", folder.history())
    return folder


def _load(resume: str) -> dict[str, Any]:
    from dlopt.training.checkpoint import load

    try:
        return load(Path(resume))
    except UserError as error:
        _, _, reason = str(error).partition(": ")
        hint = f"; to load only its weights, use init_from={resume}" if Path(resume).is_file() else ""
        raise UserError(f"resume={resume}: {reason}{'' if 'init_from' in reason else hint}") from None


def _copy_history(source: RunFolder, target: RunFolder, best_epoch: int | None) -> None:
    """Copies the metrics and the best model of a run that is resumed in another folder.

    Tracking removes the metrics after the checkpoint. The best model is copied only if it is that of the checkpoint,
    not one of a later epoch.
    """
    from dlopt.training import sharded
    from dlopt.training.checkpoint import Checkpoints, load

    if (source.path / "metrics.jsonl").is_file():
        shutil.copy(source.path / "metrics.jsonl", target.path / "metrics.jsonl")
    best = Checkpoints(source.checkpoints).best
    with contextlib.suppress(UserError):
        if best_epoch is not None and load(best)["progress"]["epoch"] == best_epoch:
            target.checkpoints.mkdir(exist_ok=True)
            sharded.copy(best, target.checkpoints)
            for path in (best.with_name(f"{best.name}.sha256"), best):
                shutil.copy(path, target.checkpoints / path.name)
