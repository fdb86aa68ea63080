"""`dlopt benchmark`: tunes optimizers on several workloads and compares the times to their targets."""

import random
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dlopt.commands.command import Line, output_folder, read_line, refuse_empty
from dlopt.config.compose import parse_overrides
from dlopt.config.saved import typed_values
from dlopt.errors import DONE, FAILED, INTERRUPTED, UserError, install
from dlopt.folders import RunFolder, refuse_url
from dlopt.locks import locked
from dlopt.ranges import Count
from dlopt.tracking.layout import format_duration, short_path

if TYPE_CHECKING:
    from dlopt.analysis.benchmark.protocol import Tier, Trial, WorkloadSpec
    from dlopt.analysis.benchmark.reading import Manifest
    from dlopt.analysis.benchmark.results import Record, Results
    from dlopt.sweeps.benchmark import Request

USAGE = """\
Tune optimizers on several workloads and compare the times to their targets

Usage:
  dlopt benchmark optimizer=a,b [key=value]   run the trials that are missing, then print and write the results
  dlopt benchmark report FOLDER               write the results of the trials so far
  dlopt benchmark targets FOLDER              print targets, from trials of baselines with full=true

Examples:
  dlopt benchmark optimizer=mine.MyOptimizer allow_packages=[mine]   # against the results that come with dlopt
  dlopt benchmark optimizer=adamw,muon budget=tiny workloads=[mlp,gpt]
  dlopt benchmark optimizer=adamw dry_run=true                       # list the trials and estimate their time
  dlopt benchmark optimizer=adamw hydra/launcher=slurm               # on a cluster
  dlopt benchmark --check                                            # repeat two of the shipped trials

Each optimizer is tuned like the others: by the same number of trials, whose hyperparameters are drawn quasi-randomly
from its search space (benchmark/space/NAME.yaml in dlopt's folder or in --config-dir; otherwise learning rates from
0.0001 to 1, and weight decay). The result of a study is its fastest trial; that of an optimizer on a workload is the
median over the studies, which differ in their draws and initial weights. Repeat an interrupted command to continue it.
Several of these commands with the same output share the trials.

  optimizer=a,b     choices of the group optimizer, or dotted names of classes, with allow_packages
  tier=small        set of workloads: small | medium | large
  workloads=[a,b]   some of them (default: all)
  budget=small      tiny (1 study of 3 trials), small (3 of 10) or large (5 of 20)
  studies=N         number of studies, instead of the budget's
  trials=N          trials per study, instead of the budget's
  reference=true    compare with the shipped results
  full=false        true: train every trial to the end, also after its target
  output=DIR        folder of the trials and the results (default: outputs/benchmark/TIER)
  dry_run=false     true: only list the trials and estimate their time
  and the keys of `dlopt train`, for all trials (device=cuda, hydra/launcher=gpus)
"""

_FIXED = (
    "experiment",
    "seed",
    "epochs",
    "steps",
    "stopping",
    "evaluate",
    "monitor",
    "resume",
    "tracking",
    "comparison",
)
_MACHINE = (
    "allow_packages", "device", "precision", "threads", "compile", "cuda_graphs", "channels_last", "deterministic",
    "hydra",
)  # fmt: skip
Budget = Literal["tiny", "small", "large"]
_LOCK = ".results.lock"
_CHECKED = 2  # trials that --check repeats
_TOLERANCE = 0.05  # of a full run: other processors round differently, and training amplifies that


@dataclass(frozen=True)
class _Plan:
    """A checked benchmark."""

    line: Line
    tier: "Tier"
    request: "Request"
    studies: int
    trials: int
    reference: "Results | None"
    note: str  # about the reference
    command: str

    def manifest(self) -> "Manifest":
        from dlopt.analysis.benchmark.reading import Manifest

        spaces = {name: each.describe() for name, each in self.request.candidates.items()}
        workloads = dict(self.request.workloads)
        if self.request.full:  # the trials do not depend on targets, which may be set later
            workloads = {name: replace(spec, target=None) for name, spec in workloads.items()}
        return Manifest(
            self.tier.name, self.studies, self.trials, workloads, spaces, list(self.request.overrides),
            self.request.full, [self.command],
        )  # fmt: skip


def benchmark(arguments: list[str]) -> int:
    """Runs `dlopt benchmark` with the given arguments; returns the exit code. Raises `UserError`."""
    if arguments and arguments[0] in ("report", "targets"):
        return _on_folder(arguments[0], arguments[1:])
    checks = "--check" in arguments
    line = read_line([each for each in arguments if each != "--check"], USAGE, several="list the optimizers")
    if line is None:
        return DONE
    try:
        import optuna as _  # noqa: F401
    except ModuleNotFoundError:
        raise UserError(f"dlopt benchmark: requires optuna; {install('dlopt[sweep]')}") from None
    if checks:
        return line.call(_check)
    names, rest = _optimizers(line)
    own, rest = rest.take(_plan)
    typed = [shlex.quote(each) for each in arguments if not each.startswith("output=")]
    return _run(_plan(rest, names, " ".join(["dlopt benchmark", *typed]), **own), rest)


def _optimizers(line: Line) -> tuple[list[str], Line]:
    """Takes `optimizer=a,b` from the line. Raises `UserError`."""
    typed = [each for each in line.overrides if each.startswith("optimizer=")]
    if not typed:
        raise UserError("optimizer: name the optimizers to compare: dlopt benchmark optimizer=adamw,muon")
    [override] = parse_overrides(typed[-1:], line.composer.loader)
    names = list(override.sweep_string_iterator()) if override.is_sweep_override() else [str(override.value())]
    if len(set(names)) < len(names):
        raise UserError(f"{typed[-1]}: an optimizer is listed twice")
    rest = [each for each in line.overrides if each not in typed]
    return names, Line(line.composer, rest)


def _plan(
    line: Line,
    names: Sequence[str],
    command: str,
    *,
    tier: str = "small",
    workloads: list[str] | None = None,
    budget: Budget = "small",
    studies: Count | None = None,
    trials: Count | None = None,
    reference: bool = True,
    full: bool = False,
    output: str | None = None,
) -> _Plan:
    """Checks the benchmark. Raises `UserError`."""
    from dlopt.analysis.benchmark.protocol import budget_of, load_tier, trials_of
    from dlopt.sweeps.benchmark import Request, candidate

    if workloads is not None:
        refuse_empty(workloads=workloads)
    _refuse_fixed(line.overrides)
    overrides = [each for each in line.overrides if not _is_hydra(each) and not each.startswith("dry_run=")]
    chosen = load_tier(tier, line.composer.config_dir).select(workloads)
    unset = [name for name, spec in chosen.workloads.items() if spec.target is None]
    if unset and not full:
        raise UserError(
            f"tier={tier}: no target is set for {', '.join(unset)}; run the baselines with full=true, and take the "
            "targets from `dlopt benchmark targets FOLDER`"
        )
    own_studies, own_trials = budget_of(budget, studies, trials)
    candidates = {name: candidate(line.composer, name, overrides) for name in names}
    shipped, note = (None, "") if not reference or full else _reference(tier, overrides, own_studies, own_trials)
    folder = Path("outputs") / "benchmark" / tier if output is None else Path(output)
    refuse_url(str(folder), "output")
    request = Request(
        folder.absolute(),
        chosen.workloads,
        candidates,
        list(trials_of(list(chosen.workloads), list(candidates), own_studies, own_trials)),
        overrides,
        full,
    )
    _check_lines(line, request)
    return _Plan(line, chosen, request, own_studies, own_trials, shipped, note, command)


def _is_hydra(override: str) -> bool:
    return override.lstrip("+~").startswith(("hydra.", "hydra/"))


def _refuse_fixed(overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key.split(".")[0] in _FIXED:
            raise UserError(f"{override}: part of the protocol, and cannot be changed; write a tier of your own")


def _reference(tier: str, overrides: Sequence[str], studies: int, trials: int) -> "tuple[Results | None, str]":
    """Returns the shipped results and a note on them; None if they do not apply."""
    from dlopt.analysis.benchmark.reference import load_reference

    shipped = load_reference(tier)
    if shipped is None:
        return None, ""
    keys = {each.lstrip("+~").partition("=")[0].split(".")[0].split("/")[0] for each in overrides}
    changing = sorted(keys - {*_MACHINE, "optimizer"})
    if changing:
        return None, f"not compared with the shipped results, because {', '.join(changing)} changes the workloads"
    if studies > shipped.studies or trials > shipped.trials:
        return shipped, f"the shipped results have {shipped.studies} studies of {shipped.trials} trials each"
    return shipped, ""


def _check_lines(line: Line, request: "Request") -> None:
    """Composes both ends of every search range, and each optimizer on each workload. Raises `UserError`."""
    from dlopt.sweeps.search import probes

    for chosen in request.candidates.values():
        for number, workload in enumerate(request.workloads):
            points = probes(chosen.space) if number == 0 else probes(chosen.space)[:1]
            for drawn in points:
                line.experiment(request.compose_line(workload, chosen, drawn, 0))


# -- the run


def _run(plan: _Plan, line: Line) -> int:
    from dlopt.analysis.benchmark.reading import update_manifest

    request = plan.request
    waiting = request.waiting()
    if any(each.startswith("dry_run=") and each != "dry_run=false" for each in line.overrides):
        return _list(plan, waiting)
    output_folder(str(request.folder), "benchmark")
    update_manifest(request.folder, plan.manifest())
    done = len(request.trials) - len(waiting)
    print(f"{len(request.trials)} trials, of which {done} are done; folder: {short_path(request.folder)}", flush=True)
    try:
        elsewhere = _run_trials(line, request) if waiting else 0
        if elsewhere:
            print(f"{elsewhere} trials are running in other processes; they report the complete results")
        with locked(request.folder / _LOCK):  # processes that share the trials finish at about the same time
            _measure(plan)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return INTERRUPTED
    return _finish(request.folder, plan.reference, plan.note)


def _run_trials(line: Line, request: "Request") -> int:
    """Runs the trials with the launcher of the command line, by default one process per core."""
    from dlopt.commands.sweep import start_job
    from dlopt.sweeps.benchmark import run_trials
    from dlopt.sweeps.pool import warm_up

    hydra = [each for each in line.overrides if _is_hydra(each)]
    if not any(each.startswith("hydra/launcher=") for each in hydra):
        hydra = ["hydra/launcher=joblib", *hydra]
    folder = str(request.folder).replace("\\", "\\\\").replace("'", "\\'")
    composed = line.composer.compose([*hydra, *request.overrides, f"hydra.sweep.dir='{folder}'"], multirun=True)
    launcher = line.composer.launcher(composed, start_job)
    if not hasattr(launcher, "build_pool"):
        name = composed.hydra.runtime.choices["hydra/launcher"]
        raise UserError(f"hydra/launcher={name}: not supported here; allowed: serial, joblib, gpus, slurm")
    pool: Any = launcher.build_pool()
    if pool.is_local:
        warm_up()
    return run_trials(request, line.composer.loader, composed, pool)


def _list(plan: _Plan, waiting: "Sequence[Trial]") -> int:
    """Prints the trials and an estimate of their time."""
    from dlopt.config.resolve import choices_of, to_plain
    from dlopt.sweeps.grid import estimate_job_seconds

    request = plan.request
    for trial in waiting:
        values = request.candidates[trial.optimizer].values(trial.study, trial.number)
        print(trial.subfolder, *(f"{key}={value}" for key, value in values.items()))
    seconds: dict[tuple[str, str], float | None] = {}
    for trial in waiting:
        if (trial.workload, trial.optimizer) not in seconds:
            lines = request.line(trial)
            config = plan.line.composer.compose(lines)
            saved = to_plain(config, lines)[1]
            estimate = estimate_job_seconds([saved], choices_of(config))
            seconds[trial.workload, trial.optimizer] = estimate
            shown = "unknown" if estimate is None else format_duration(estimate)
            print(f"{trial.optimizer} on {trial.workload}: about {shown} a trial without early end", flush=True)
    total = sum(seconds[trial.workload, trial.optimizer] or 0.0 for trial in waiting)
    print(f"{len(waiting)} trials: about {format_duration(total)} of one core")
    return DONE


def _measure(plan: _Plan) -> None:
    """Measures the cost of updates and tests the best trials, where that is still missing."""
    import json

    from dlopt.analysis.benchmark import costs
    from dlopt.analysis.benchmark.reading import COST, best_trials, collect
    from dlopt.files import write_atomically
    from dlopt.sweeps.benchmark import candidate
    from dlopt.sweeps.search import probes

    request = plan.request
    results = collect(request.folder, replace(plan.manifest(), workloads=request.workloads), {})
    baseline = candidate(plan.line.composer, "sgd", request.overrides)
    for (optimizer, workload), cell in results.cells.items():
        path = request.folder / optimizer / workload / COST
        chosen = request.candidates[optimizer]
        if not path.exists() and cell.records:
            # At the low ends of the ranges no run diverges.
            of_sgd, own = (
                plan.line.experiment(request.compose_line(workload, each, probes(each.space)[0], 0))[0]
                for each in (baseline, chosen)
            )
            with tempfile.TemporaryDirectory(prefix="dlopt-") as scratch:
                cost = costs.measure(of_sgd, own, Path(scratch))
            write_atomically(path, (json.dumps(asdict(cost)) + "\n").encode())
        for study, record in best_trials(cell.records, request.workloads[workload].metric).items():
            costs.test_trial(request.folder / optimizer / workload / f"{study}-{record.trial}")


def _finish(folder: Path, reference: "Results | None", note: str) -> int:
    """Collects the results, prints them, and writes results.json and the page."""
    from dlopt.analysis.benchmark.page import write
    from dlopt.analysis.benchmark.reading import collect, read_manifest
    from dlopt.analysis.benchmark.results import to_json
    from dlopt.analysis.benchmark.table import WIDTH, lines
    from dlopt.files import write_atomically

    manifest = read_manifest(folder)
    assert manifest is not None
    if manifest.full:  # the trials do not depend on targets, which may have been set since
        manifest = replace(manifest, workloads=_with_targets(manifest))
    with locked(folder / _LOCK):
        results = collect(folder, manifest, _facts(folder, manifest))
        write_atomically(folder / "results.json", to_json(results).encode())
        shown = results if reference is None else results.with_reference(reference)
        paths = write(shown, folder)
    print("\n".join(lines(shown, min(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH))))
    print(*([note] if note else []), *map(short_path, paths), sep="\n")
    return DONE


def _with_targets(manifest: "Manifest") -> "dict[str, WorkloadSpec]":
    """Returns the workloads with the targets of their tier, where the trials were run without."""
    from dlopt.analysis.benchmark.protocol import load_tier

    try:
        tier = load_tier(manifest.tier, None).workloads
    except UserError:  # of a --config-dir
        tier = {}
    return {
        name: replace(spec, target=tier[name].target) if spec.target is None and name in tier else spec
        for name, spec in manifest.workloads.items()
    }


def _facts(folder: Path, manifest: "Manifest") -> dict[str, Any]:
    """Returns how the results were made, without what identifies the user or the host."""
    from dlopt import environment

    versions, machine = environment.versions(), environment.machine()
    summaries = [RunFolder(path.parent).summary() or {} for path in folder.glob("*/*/*/summary.json")]
    return {
        "command": "; ".join(manifest.commands),
        "date": date.today().isoformat(),
        "core_hours": round(sum(summary.get("seconds") or 0.0 for summary in summaries) / 3600, 2),
        **{name: versions[name] for name in ("dlopt", "python", "torch")},
        **{name: machine[name] for name in ("processor", "cpu_count", "gpu") if machine[name]},
    }


# -- commands on folders


def _on_folder(action: str, arguments: list[str]) -> int:
    """`report` and `targets`."""
    from dlopt.analysis.benchmark.protocol import BASELINES
    from dlopt.analysis.benchmark.reading import read_manifest
    from dlopt.analysis.benchmark.targets import targets

    folders = [each for each in arguments if "=" not in each]
    typed_values([each for each in arguments if "=" in each])
    if len(folders) != 1 or len(arguments) != 1:
        raise UserError(
            f"dlopt benchmark {action}: one folder is needed: dlopt benchmark {action} outputs/benchmark/small"
        )
    folder = Path(folders[0]).absolute()
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None:
        raise UserError(f"{folders[0]}: not the folder of a benchmark (it has no benchmark.json)")
    if action == "targets":
        missing = [name for name in BASELINES if name not in manifest.optimizers]
        if missing or not manifest.full:
            raise UserError(
                f"{folders[0]}: targets need trials of {', '.join(BASELINES)} with full=true"
                + (f"; missing: {', '.join(missing)}" if missing else "")
            )
        for name, target in targets(folder, manifest).items():
            print(f"{name}: {target:.4g}")
        return DONE
    reference, note = (
        (None, "")
        if manifest.full
        else _reference(manifest.tier, manifest.overrides, manifest.studies, manifest.trials)
    )
    return _finish(folder, reference, note)


# -- check of the shipped results


def _check(line: Line, *, tier: str = "small", seed: int | None = None, output: str | None = None) -> int:
    """Repeats two random trials of the shipped results; returns `FAILED` if one of them differs."""
    from dlopt.analysis.benchmark.protocol import Trial, load_tier
    from dlopt.analysis.benchmark.reading import Manifest, collect
    from dlopt.analysis.benchmark.reference import load_reference
    from dlopt.sweeps.benchmark import Request, candidate

    _refuse_fixed(line.overrides)
    shipped = load_reference(tier)
    if shipped is None:
        raise UserError(f"tier={tier}: has no shipped results to check")
    # Only trials that reach the target: others would agree without saying much.
    reached = {
        Trial(workload, name, record.study, record.trial): record
        for (name, workload), cell in sorted(shipped.cells.items())
        for record in cell.records
        if record.reached
    }
    chosen = {trial: reached[trial] for trial in random.Random(seed).sample(list(reached), _CHECKED)}
    overrides = [each for each in line.overrides if not _is_hydra(each)]
    candidates = {trial.optimizer: candidate(line.composer, trial.optimizer, overrides) for trial in chosen}
    workloads = load_tier(tier, None).select([trial.workload for trial in chosen]).workloads
    folder = output_folder(output, "benchmark-check").absolute()
    request = Request(folder, workloads, candidates, list(chosen), overrides, full=True)
    try:
        _run_trials(line, request)
    except KeyboardInterrupt:
        return INTERRUPTED
    spaces = {name: each.describe() for name, each in candidates.items()}
    manifest = Manifest(tier, shipped.studies, shipped.trials, workloads, spaces, overrides, full=True)
    measured = collect(folder, manifest, {})
    agree = True
    for trial, expected in chosen.items():
        [record] = [each for each in measured.cell(trial.optimizer, trial.workload).study(trial.study)
                    if each.trial == trial.number]  # fmt: skip
        difference = abs(record.updates - expected.updates) if record.reached and expected.reached else 0.0
        same = (
            record.reached == expected.reached and difference <= _TOLERANCE * shipped.workloads[trial.workload].updates
        )
        agree = agree and same
        print(
            f"{trial.optimizer} on {trial.workload}, study {trial.study}, trial {trial.number}: "
            f"{_to_target(record)}; shipped: {_to_target(expected)}: {'agrees' if same else 'differs'}"
        )
    return DONE if agree else FAILED


def _to_target(record: "Record") -> str:
    updates = f"{record.updates:.0f} updates to the target" if record.reached else "target not reached"
    return updates if record.best is None else f"{updates}, best {record.best:.4g}"
