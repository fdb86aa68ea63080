"""`dlopt train -m`: every job is checked before the first one starts, and runs in a process of its own."""

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from dlopt.commands.hydra_main import quoted
from dlopt.config.compose import Composer, choices_of, to_plain
from dlopt.config.resuming import differences, refuse_other_config
from dlopt.errors import UserError
from dlopt.extras import install
from dlopt.files import write_atomically
from dlopt.folders import RunFolder, Trace, make, make_new, newest
from dlopt.sweeps.jobs import SPACE

if TYPE_CHECKING:
    from dlopt.sweeps.pool import Pool
    from dlopt.sweeps.study import Plan


@dataclass(frozen=True)
class Job:
    overrides: list[str]
    subfolder: str
    config: Mapping[str, Any]  # as it is saved

    def folder(self, sweep: Path) -> RunFolder:
        return RunFolder(sweep / self.subfolder)


def sweep(composer: Composer, parsed: Namespace) -> int:
    """Runs the sweep and returns its exit code. Raises `UserError` before anything is made."""
    if any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID")):
        raise UserError(
            "-m: not inside torchrun or srun, where every rank would start the sweep; start it from a shell"
        )
    whole = composer.compose(parsed.overrides, multirun=True)
    path = OmegaConf.select(whole, "hydra.sweep.dir")
    if not path or not str(path).strip():
        raise UserError(f"hydra.sweep.dir={path or ''}: the path of a folder is needed")
    wanted = Path(str(path)).absolute()
    is_typed = any(line.lstrip("+").startswith("hydra.sweep.dir=") for line in parsed.overrides)
    is_search = str(whole.hydra.sweeper._target_).endswith(".dlopt_sweeps.OptunaSweeper")
    places = _check_launcher(composer, whole, is_search)
    if is_search:
        return _search(composer, parsed, whole, wanted, is_typed, places)
    jobs = _jobs(composer, whole, parsed.overrides)
    if whole.dry_run:
        return _list_grid(jobs, whole, places)
    folder = _find_folder(wanted, is_typed, jobs, whole.resume)
    if jobs and all(job.folder(folder).is_done(job.config) for job in jobs):
        print(f"this sweep is finished: {folder}")
        return 0
    with RunFolder(folder).lock():
        write_atomically(folder / SPACE, yaml.safe_dump([job.overrides for job in jobs], allow_unicode=True).encode())
        _mark_dead(folder, jobs)
        try:
            _hand_over(composer, parsed, folder, places)
        except KeyboardInterrupt:
            return 75
    _show(folder, jobs)
    return _outcome(folder, jobs)


def _check_launcher(composer: Composer, whole: DictConfig, is_search: bool) -> "Pool | None":
    """Has the launcher refuse its settings before anything is made; where its jobs run, if it is dlopt's own."""
    context = HydraContext(composer.hydra.config_loader, callbacks=None)  # type: ignore[arg-type]
    launcher: Any = Plugins.instance().instantiate_launcher(context, start_job, whole)
    if hasattr(launcher, "places"):
        return cast("Pool", launcher.places())
    if is_search:
        name = whole.hydra.runtime.choices["hydra/launcher"]
        raise UserError(
            f"hydra/launcher={name}: it starts jobs in batches, a search starts one whenever a place gets free; "
            "allowed: serial, joblib, gpus, slurm"
        )
    return None


def _hand_over(composer: Composer, parsed: Namespace, folder: Path, places: "Pool | None") -> Any:
    """Hydra's sweeper and launcher do the rest; returns what the sweeper returns."""
    overrides = [*parsed.overrides, f"hydra.sweep.dir={quoted(folder)}"]
    if places is not None and places.is_local:
        from dlopt.sweeps.pool import warm_up

        warm_up()
    return composer.hydra.multirun(config_name=composer.config_name, task_function=start_job, overrides=overrides)


# -- grids


def _jobs(composer: Composer, whole: DictConfig, overrides: list[str]) -> list[Job]:
    """The checked jobs of a grid, expanded as Hydra's own sweeper does; other sweepers choose as they go."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.errors import HydraException

    from dlopt.sweeps.jobs import folder_name

    sweeper = whole.hydra.sweeper
    if not str(sweeper._target_).endswith("BasicSweeper"):
        return []
    lines = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    typed = composer.parse([*lines, *overrides])
    swept = [o for o in typed if not o.get_key_element().lstrip("+~").startswith(("hydra.", "hydra/"))]
    hydra = [str(o.input_line) for o in typed if o not in swept]
    try:
        [grid] = BasicSweeper.split_arguments(swept, None)
    except HydraException as error:
        raise UserError(f"{error} hydra/sweeper=dlopt_optuna draws from intervals") from None
    if not grid:
        raise UserError("-m: a list of values is empty, so that there is nothing to run")
    jobs = []
    for number, job in enumerate(grid):
        config, saved = _checked(composer, [*hydra, *job], overrides)
        with open_dict(config):
            config.hydra.job.num = config.hydra.job.id = number
        jobs.append(Job(job, folder_name(str(config.hydra.sweep.subdir)), saved))
    if len({job.subfolder for job in jobs}) < len(jobs):
        raise UserError(f"hydra.sweep.subdir={jobs[0].subfolder}: every job needs a folder of its own")
    return jobs


def _checked(composer: Composer, overrides: list[str], typed: list[str]) -> tuple[DictConfig, dict[str, Any]]:
    """The composed config of a job, and as it is saved. Raises `UserError`."""
    from dlopt.config.parsing import parse

    config = composer.compose(overrides)
    plain, saved = to_plain(config, typed)
    parse(plain, saved)
    if saved["resume"] not in (None, "auto"):
        raise UserError(f"resume={saved['resume']}: a sweep goes on by resume=auto")
    return config, saved


def _find_folder(wanted: Path, is_typed: bool, jobs: Sequence[Job], resume: str | None) -> Path:
    """The folder of the sweep, made if need be."""
    if is_typed and RunFolder(wanted).is_live():
        raise UserError(f"hydra.sweep.dir={wanted}: another sweep is at work in this folder")
    if not is_typed:
        goes_on = resume == "auto" and jobs
        found = newest(wanted.parent, lambda folder: _is_unfinished(folder, jobs)) if goes_on else None
        if found is None:
            return make_new(wanted, "hydra.sweep.dir")
        _refuse_newer(found.path, jobs, "resume=auto")
        return found.path
    if not wanted.is_dir():
        return make(wanted, "hydra.sweep.dir")
    _refuse_newer(wanted, jobs, f"hydra.sweep.dir={wanted}")
    for job in jobs:
        folder = job.folder(wanted)
        if folder.holds_a_run():
            if resume != "auto":
                raise UserError(f"hydra.sweep.dir={wanted}: this folder holds a sweep; go on with it by resume=auto")
            refuse_other_config(folder.config() or job.config, job.config, str(folder.path), folder.history())
    return wanted


def _refuse_newer(sweep: Path, jobs: Sequence[Job], key: str) -> None:
    for job in jobs:
        job.folder(sweep).refuse_newer(key)


def _is_unfinished(sweep: RunFolder, jobs: Sequence[Job]) -> bool:
    """Whether this folder holds the same search space, with something left to do."""
    space = _space(sweep.path)
    if sweep.is_live() or not isinstance(space, list) or len(space) != len(jobs):
        return False
    folders = [job.folder(sweep.path) for job in jobs]
    configs = [folder.config() for folder in folders]
    if all(f.is_done(job.config) for f, job in zip(folders, jobs, strict=True)):
        return False
    pairs = zip(configs, jobs, strict=True)
    return not any(config is not None and differences(config, job.config) for config, job in pairs)


def _space(sweep: Path) -> Any:
    try:
        return yaml.safe_load((sweep / SPACE).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None


def _mark_dead(sweep: Path, jobs: Sequence[Job]) -> None:
    from dlopt.sweeps.jobs import record_dead

    for job in jobs:
        record_dead(job.folder(sweep))


def _outcome(sweep: Path, jobs: Sequence[Job]) -> int:
    folders = [job.folder(sweep) for job in jobs]
    if not jobs:
        folders = [RunFolder(path) for path in sweep.iterdir() if (path / "config.yaml").exists()]
    status = [(folder.summary() or {}).get("status", "failed") for folder in folders]
    if not folders or "failed" in status:
        return 1
    return 75 if "interrupted" in status else 0


def _show(sweep: Path, jobs: Sequence[Job]) -> None:
    from dlopt.analysis.leaderboard import Entry, leaderboard
    from dlopt.commands.standings import show_leaderboard

    entries = [
        Entry(job.subfolder, job.config, job.folder(sweep).summary() or {}, [line for line in job.overrides])
        for job in jobs
    ]
    board = leaderboard(entries)
    show_leaderboard(board, board.figure.replace("best_val_", "test_"))
    print(f"\nthe sweep lies in {sweep}")


def _list_grid(jobs: Sequence[Job], whole: DictConfig, places: "Pool | None") -> int:
    from dlopt.sweeps.jobs import labels

    for number, label in enumerate(labels([job.overrides for job in jobs])):
        print(f"job {number}: {label}")
    return _estimate([job.config for job in jobs], len(jobs), whole, places)


def _estimate(configs: Sequence[Mapping[str, Any]], jobs: int, whole: DictConfig, places: "Pool | None") -> int:
    from dlopt.sweeps.grid import estimate_line, seconds_of

    print(estimate_line(seconds_of(configs, choices_of(whole)), jobs, 1 if places is None else places.slots))
    return 0


# -- searches


def _search(
    composer: Composer, parsed: Namespace, whole: DictConfig, wanted: Path, is_typed: bool, places: "Pool | None"
) -> int:
    try:
        from dlopt.sweeps.search import facts_of, plan_of, probes
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise UserError(f"hydra/sweeper=dlopt_optuna: needs the package optuna: {install('dlopt[sweep]')}") from None

    typed = composer.parse(parsed.overrides)
    lines = [str(o.input_line) for o in typed]
    hydra = [line for line in lines if line.lstrip("+~").startswith(("hydra.", "hydra/"))]
    plan = plan_of(composer.hydra.config_loader, whole, [line for line in lines if line not in hydra])
    checked = [_checked(composer, [*hydra, *probe], parsed.overrides) for probe in probes(plan.space)]
    facts = {**facts_of(plan, checked[0][1]), "space": plan.space.describe()}
    if whole.dry_run:
        return _list_search(plan, [saved for _, saved in checked], whole, places)
    before = Trace(wanted)
    folder = _find_search(wanted, is_typed, plan, facts, whole.resume)
    known = _space(folder)
    if isinstance(known, dict) and known.get("finished", 0) >= plan.total and known.get("facts") == facts:
        print(f"this sweep is finished: {folder}")
        return 0
    try:
        outcome = _hand_over(composer, parsed, folder, places)
    except KeyboardInterrupt:
        return 75
    except UserError:
        if known is None:
            before.erase(folder)
        raise
    if outcome.elsewhere:
        are = "job is" if outcome.elsewhere == 1 else "jobs are"
        print(f"{outcome.elsewhere} {are} at work in other processes")
    _show_search(folder, plan, outcome.rows)
    return int(outcome.code)


def _list_search(plan: "Plan", configs: Sequence[Mapping[str, Any]], whole: DictConfig, places: "Pool | None") -> int:
    for key, values in plan.space.describe().items():
        print(f"{key}: {values}")
    print("every job's values are drawn when it starts")
    return _estimate(configs, plan.total, whole, places)


def _find_search(wanted: Path, is_typed: bool, plan: "Plan", facts: Mapping[str, Any], resume: str | None) -> Path:
    """The folder of the search, made if need be. A folder in which other processes search is joined."""
    from dlopt.sweeps.study import differing, is_worked_on

    def is_unfinished(folder: RunFolder) -> bool:
        known = _space(folder.path)
        return isinstance(known, dict) and known.get("facts") == facts and known.get("finished", 0) < plan.total

    if not is_typed:
        found = newest(wanted.parent, is_unfinished) if resume == "auto" else None
        return make_new(wanted, "hydra.sweep.dir") if found is None else found.path
    known = _space(wanted)
    if known is not None:
        if not isinstance(known, dict):
            raise UserError(f"hydra.sweep.dir={wanted}: this folder holds a sweep of another kind, a grid")
        different = differing(known.get("facts", {}), facts)
        if different:
            raise UserError(
                f"hydra.sweep.dir={wanted}: this folder holds a search of something else ({different}); "
                "take its search space, or another folder"
            )
        if resume != "auto" and not is_worked_on(wanted):
            raise UserError(f"hydra.sweep.dir={wanted}: this folder holds a sweep; go on with it by resume=auto")
    try:
        wanted.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"hydra.sweep.dir={wanted}: the folder cannot be made: {error.strerror}") from None
    return wanted


def _show_search(sweep: Path, plan: "Plan", rows: Sequence[tuple[int, str, Sequence[float]]]) -> None:
    from dlopt.analysis.leaderboard import Entry, front, leaderboard
    from dlopt.commands.standings import show_front, show_leaderboard

    if len(plan.objectives) > 1:
        chosen = front([values for _, _, values in rows], plan.directions)
        named = [(f"job {rows[i][0]}: {rows[i][1]}", rows[i][2]) for i in chosen]
        show_front(sorted(named, key=lambda row: list(row[1])), plan.objectives)
    else:
        figure = plan.objectives[0]
        entries = []
        for number, label, values in rows:
            summary = {**(RunFolder(sweep / str(number)).summary() or {"status": "finished"}), figure: values[0]}
            entries.append(Entry(f"job {number}", {"job": number}, summary, [f"job {number}:", label]))
        board = leaderboard(entries, figure=figure, direction=plan.directions[0])
        show_leaderboard(board, figure.replace("best_val_", "test_"))
    print(f"\nthe sweep lies in {sweep}")


# -- other people's launchers


def start_job(config: DictConfig) -> str:
    """One job that a launcher other than dlopt's own starts; returns its status."""
    from hydra.core.hydra_config import HydraConfig

    from dlopt.config.parsing import parse
    from dlopt.sweeps import jobs
    from dlopt.sweeps.grid import run_jobs
    from dlopt.sweeps.pool import local

    hydra = HydraConfig.get()
    folder = RunFolder(Path(hydra.runtime.output_dir))
    overrides = [str(line) for line in hydra.overrides.task]
    chosen = {str(key): str(value) for key, value in hydra.runtime.choices.items() if value is not None}
    try:
        plain, saved = to_plain(config, overrides)
        parse(plain, saved)
    except UserError as error:
        return jobs.record_failure(folder, str(error)).status
    choices = {key: value for key, value in chosen.items() if not key.startswith("hydra")}
    job = jobs.Job(int(hydra.job.num), folder, saved, overrides, choices, " ".join(overrides))
    return run_jobs([job], 1, local(n_jobs=1))[job.number]
