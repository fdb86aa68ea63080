"""`dlopt train -m`: every job is checked before the first one starts, and runs in a process of its own."""

import os
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, open_dict

from dlopt.config.compose import Composer, choices_of, grid, to_plain, typed_folder
from dlopt.config.resuming import differences, refuse_other_config
from dlopt.errors import DONE, FAILED, INTERRUPTED, UserError, install
from dlopt.files import write_atomically
from dlopt.folders import FolderSnapshot, RunFolder, make_new, newest
from dlopt.sweeps.jobs import SPACE

if TYPE_CHECKING:
    from dlopt.sweeps.pool import Pool
    from dlopt.sweeps.study import StudySpec


@dataclass(frozen=True)
class Job:
    overrides: list[str]
    subfolder: str
    config: Mapping[str, Any]  # as it is saved

    def folder(self, sweep: Path) -> RunFolder:
        return RunFolder(sweep / self.subfolder)


@dataclass(frozen=True)
class Request:
    """A composed sweep. `wanted`: its folder; `places`: the worker pool of one of dlopt's own launchers."""

    composer: Composer
    typed: list[str]
    config: DictConfig
    wanted: Path
    is_typed: bool
    places: "Pool | None"

    def find_folder(self, is_unfinished: Callable[[RunFolder], bool], check: Callable[[Path, str], None]) -> Path:
        """The folder to work in, made if need be. `check` refuses one, naming the key that led to it."""
        if not self.is_typed:
            found = newest(self.wanted.parent, is_unfinished) if self.config.resume == "auto" else None
            if found is None:
                return make_new(self.wanted, "hydra.sweep.dir")
            check(found.path, "resume=auto")
            return found.path
        check(self.wanted, f"hydra.sweep.dir={self.wanted}")
        try:
            self.wanted.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"hydra.sweep.dir={self.wanted}: cannot create this folder: {error.strerror}") from None
        return self.wanted

    def checked(self, overrides: list[str]) -> tuple[DictConfig, dict[str, Any]]:
        """The composed config of a job, and as it is saved. Raises `UserError`."""
        from dlopt.config.parsing import parse

        config = self.composer.compose(overrides)
        plain, saved = to_plain(config, self.typed)
        parse(plain, saved)
        if saved["resume"] not in (None, "auto"):
            raise UserError(f"resume={saved['resume']}: a sweep goes on by resume=auto")
        return config, saved

    def run(self, folder: Path) -> Any:
        """Has the sweeper and the launcher do the rest; returns what the sweeper returns."""
        if self.places is not None and self.places.is_local:
            from dlopt.sweeps.pool import warm_up

            warm_up()
        return self.composer.sweep(self.config, folder, start_job)

    def estimate(self, configs: Sequence[Mapping[str, Any]], jobs: int) -> int:
        from dlopt.sweeps.grid import estimate_job_seconds, estimate_line

        places = 1 if self.places is None else self.places.slots
        print(estimate_line(estimate_job_seconds(configs, choices_of(self.config)), jobs, places))
        return 0


def sweep(composer: Composer, parsed: Namespace) -> int:
    """Runs the sweep and returns its exit code. Raises `UserError` before anything is made."""
    if any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID")):
        raise UserError(
            "-m: cannot run inside torchrun or srun, because every rank would start the sweep; start it from a shell"
        )
    config = composer.compose(parsed.overrides, multirun=True)
    wanted, is_typed = typed_folder(config, "hydra.sweep.dir", parsed.overrides)
    is_search = str(config.hydra.sweeper._target_).endswith(".dlopt_sweeps.OptunaSweeper")
    places = _check_launcher(composer, config, is_search)
    request = Request(composer, parsed.overrides, config, wanted, is_typed, places)
    return _search(request) if is_search else _grid(request)


def _check_launcher(composer: Composer, config: DictConfig, is_search: bool) -> "Pool | None":
    """Has the launcher refuse its settings before anything is made; where its jobs run, if it is dlopt's own."""
    launcher = composer.launcher(config, start_job)
    if hasattr(launcher, "build_pool"):
        return cast("Pool", launcher.build_pool())
    if is_search:
        name = config.hydra.runtime.choices["hydra/launcher"]
        raise UserError(
            f"hydra/launcher={name}: it starts jobs in batches, a search starts one whenever a place gets free; "
            "allowed: serial, joblib, gpus, slurm"
        )
    return None


def _space(sweep: Path) -> Any:
    """What the folder's sweep.yaml says; None where there is none."""
    try:
        return yaml.safe_load((sweep / SPACE).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None


# -- grids


def _grid(request: Request) -> int:
    from dlopt.sweeps.jobs import labels, record_dead

    jobs = _jobs(request)
    if request.config.dry_run:
        for number, label in enumerate(labels([job.overrides for job in jobs])):
            print(f"job {number}: {label}")
        return request.estimate([job.config for job in jobs], len(jobs))
    folder = request.find_folder(
        lambda found: bool(jobs) and _is_unfinished(found, jobs),
        lambda path, key: _check_folder(path, key, jobs, request.config.resume),
    )
    if jobs and all(job.folder(folder).is_done(job.config) for job in jobs):
        print(f"this sweep is finished: {folder}")
        return 0
    with RunFolder(folder).lock():
        write_atomically(folder / SPACE, yaml.safe_dump([job.overrides for job in jobs], allow_unicode=True).encode())
        for job in jobs:
            record_dead(job.folder(folder))
        try:
            request.run(folder)
        except KeyboardInterrupt:
            return INTERRUPTED
    _show(folder, jobs)
    return _outcome(folder, jobs)


def _jobs(request: Request) -> list[Job]:
    """The checked jobs of a grid, expanded as Hydra's own sweeper does; other sweepers choose as they go."""
    from dlopt.sweeps.jobs import folder_name

    sweeper = request.config.hydra.sweeper
    if not str(sweeper._target_).endswith("BasicSweeper"):
        return []
    lines = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    hydra, swept = _apart(request.composer.parse([*lines, *request.typed]))
    combinations = grid(swept)
    if not combinations:
        raise UserError("-m: a list of values is empty, so that there is nothing to run")
    jobs = []
    for number, job in enumerate(combinations):
        config, saved = request.checked([*hydra, *job])
        with open_dict(config):
            config.hydra.job.num = config.hydra.job.id = number
        jobs.append(Job(job, folder_name(str(config.hydra.sweep.subdir)), saved))
    if len({job.subfolder for job in jobs}) < len(jobs):
        raise UserError(f"hydra.sweep.subdir={jobs[0].subfolder}: every job needs a folder of its own")
    return jobs


def _apart(typed: Sequence[Override]) -> tuple[list[str], list[Override]]:
    """The lines that set up Hydra, and the overrides of the jobs."""
    own = [each for each in typed if each.get_key_element().lstrip("+~").startswith(("hydra.", "hydra/"))]
    return [str(each.input_line) for each in own], [each for each in typed if each not in own]


def _check_folder(sweep: Path, key: str, jobs: Sequence[Job], resume: str | None) -> None:
    if RunFolder(sweep).is_live():
        raise UserError(f"{key}: another sweep is active in this folder")
    for job in jobs:
        job.folder(sweep).refuse_newer(key)
    for job in jobs:
        folder = job.folder(sweep)
        if folder.holds_a_run():
            if resume != "auto":
                raise UserError(f"{key}: this folder holds a sweep; resume it with resume=auto")
            refuse_other_config(folder.config() or job.config, job.config, str(folder.path), folder.history())


def _is_unfinished(sweep: RunFolder, jobs: Sequence[Job]) -> bool:
    """Whether this folder holds the same search space, with something left to do."""
    space = _space(sweep.path)
    if sweep.is_live() or not isinstance(space, list) or len(space) != len(jobs):
        return False
    folders = [(job.folder(sweep.path), job.config) for job in jobs]
    if all(folder.is_done(config) for folder, config in folders):
        return False
    saved = [(folder.config(), config) for folder, config in folders]
    return not any(old is not None and differences(old, config) for old, config in saved)


def _outcome(sweep: Path, jobs: Sequence[Job]) -> int:
    folders = [job.folder(sweep) for job in jobs]
    if not jobs:
        folders = [RunFolder(path) for path in sweep.iterdir() if (path / "config.yaml").exists()]
    status = [(folder.summary() or {}).get("status", "failed") for folder in folders]
    if not folders or "failed" in status:
        return FAILED
    return INTERRUPTED if "interrupted" in status else DONE


def _show(sweep: Path, jobs: Sequence[Job]) -> None:
    from dlopt.analysis.leaderboard import Entry, leaderboard
    from dlopt.commands.report import show_leaderboard

    entries = [Entry(job.subfolder, job.config, job.folder(sweep).summary() or {}, job.overrides) for job in jobs]
    board = leaderboard(entries)
    show_leaderboard(board, board.metric.replace("best_val_", "test_"))
    print(f"\nthe sweep lies in {sweep}")


# -- searches


def _search(request: Request) -> int:
    try:
        from dlopt.sweeps.search import build_study_spec, probes, study_facts
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise UserError(f"hydra/sweeper=dlopt_optuna: needs the package optuna: {install('dlopt[sweep]')}") from None

    hydra, searched = _apart(request.composer.parse(request.typed))
    plan = build_study_spec(request.composer.loader, request.config, [str(each.input_line) for each in searched])
    configs = [request.checked([*hydra, *probe])[1] for probe in probes(plan.space)]
    space = plan.space.describe()
    facts = {**study_facts(plan, configs[0]), "space": space}
    if request.config.dry_run:
        for key, values in space.items():
            print(f"{key}: {values}")
        print("every job's values are drawn when it starts")
        return request.estimate(configs, plan.total)
    before = FolderSnapshot(request.wanted)
    folder = request.find_folder(
        lambda found: _left_of_search(_space(found.path), facts, plan.total),
        lambda path, key: _check_search(path, key, facts, request.config.resume),
    )
    known = _space(folder)
    if isinstance(known, dict) and known.get("facts") == facts and not _left_of_search(known, facts, plan.total):
        print(f"this sweep is finished: {folder}")
        return 0
    try:
        outcome = request.run(folder)
    except KeyboardInterrupt:
        return INTERRUPTED
    except UserError:
        if known is None:
            before.erase(folder)
        raise
    if outcome.elsewhere:
        are = "job is" if outcome.elsewhere == 1 else "jobs are"
        print(f"{outcome.elsewhere} {are} at work in other processes")
    _show_search(folder, plan, outcome.rows)
    return int(outcome.code)


def _left_of_search(known: Any, facts: Mapping[str, Any], total: int) -> bool:
    """Whether a folder's sweep.yaml is of this search, with something left to do."""
    return isinstance(known, dict) and known.get("facts") == facts and known.get("finished", 0) < total


def _check_search(sweep: Path, key: str, facts: Mapping[str, Any], resume: str | None) -> None:
    """Refuses a folder with another search. One in which other processes search is joined."""
    from dlopt.sweeps.study import describe_differences, has_live_worker

    known = _space(sweep)
    if known is None:
        return
    if not isinstance(known, dict):
        raise UserError(f"{key}: this folder holds a sweep of another kind, a grid")
    different = describe_differences(known.get("facts", {}), facts)
    if different:
        raise UserError(
            f"{key}: this folder holds a search of something else ({different}); "
            "take its search space, or another folder"
        )
    if resume != "auto" and not has_live_worker(sweep):
        raise UserError(f"{key}: this folder holds a sweep; resume it with resume=auto")


def _show_search(sweep: Path, plan: "StudySpec", rows: Sequence[tuple[int, str, Sequence[float]]]) -> None:
    from dlopt.analysis.leaderboard import Entry, front, leaderboard
    from dlopt.commands.report import show_front, show_leaderboard

    if len(plan.objectives) > 1:
        chosen = front([values for _, _, values in rows], plan.directions)
        named = [(f"job {rows[i][0]}: {rows[i][1]}", rows[i][2]) for i in chosen]
        show_front(sorted(named, key=lambda row: list(row[1])), plan.objectives)
    else:
        metric = plan.objectives[0]
        entries = []
        for number, label, values in rows:
            summary = {**(RunFolder(sweep / str(number)).summary() or {"status": "finished"}), metric: values[0]}
            entries.append(Entry(f"job {number}", {"job": number}, summary, [f"job {number}:", label]))
        board = leaderboard(entries, metric=metric, direction=plan.directions[0])
        show_leaderboard(board, metric.replace("best_val_", "test_"))
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
