"""`dlopt benchmark`: tunes optimizers on several workloads and compares the times to their targets."""

import math
import random
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

from dlopt.basics.errors import require_package
from dlopt.basics.formats import format_count, format_duration
from dlopt.basics.locks import locked
from dlopt.basics.scratch import scratch
from dlopt.basics.status_line import announce_dry_run
from dlopt.commands.shared.command_line import read_line
from dlopt.config.keys import ROUNDING
from dlopt.extend import (
    DONE,
    FAILED,
    INTERRUPTED,
    Count,
    Line,
    NotEmpty,
    Role,
    RunFolder,
    UserError,
    group_of,
    key_of,
    keys_of_train,
    output_folder,
    role_of,
    short_path,
    value_of,
    without,
    write_atomically,
    write_json,
)
from dlopt.lab.benchmark import reading
from dlopt.lab.benchmark.protocol import (
    BASELINES,
    BUDGETS,
    FOLDER,
    Budget,
    Track,
    Trial,
    WorkloadSpec,
    has_space,
    load_tier,
    trials_of,
)
from dlopt.lab.benchmark.reading import COST, Manifest, targets
from dlopt.lab.benchmark.results import Results, TrialRecord, load_reference, to_json
from dlopt.lab.claimed_trials import (
    is_fixed,
    launcher,
    refuse_protocol,
    results_folder,
    saved_series,
    take_optimizers,
    without_hydra,
)
from dlopt.parallel.processes.rendezvous import refuse_ranks
from dlopt.results.leaderboard import distinguishes, is_number
from dlopt.run import environment
from dlopt.sweeps.jobs import seconds_of_ended

if TYPE_CHECKING:
    from dlopt.lab.benchmark.trials import Candidate, TrialRequest

USAGE = """\
Tune optimizers on several workloads and compare the times to their targets

Usage:
  dlopt benchmark optimizer=a,b [key=value]   run the trials that are missing, then print and write the results
  dlopt benchmark report FOLDER               write the results of the trials so far
  dlopt benchmark targets FOLDER              print targets, from trials of baselines with full=true

Examples:
  dlopt benchmark optimizer=mine.MyOptimizer allow_packages=[mine]   # against the results that come with dlopt
  dlopt benchmark optimizer=adamw,muon budget=tiny workloads=[mlp,gpt]
  dlopt benchmark optimizer=adamw dry_run=true                       # list the trials, without training
  dlopt benchmark optimizer=adamw hydra/launcher=slurm               # on a cluster
  dlopt benchmark optimizer=mine.MyOptimizer track=self_tuning       # its defaults, without tuning
  dlopt benchmark --check                                            # repeat two of the shipped trials

Each optimizer is tuned like the others: by the same number of trials, whose hyperparameters are drawn quasi-randomly
from its search space (benchmark/space/NAME.yaml in dlopt's folder or in --config-dir; otherwise learning rates from
0.0001 to 1, and weight decay). The result of a study is its fastest trial; that of an optimizer on a workload is the
median over the studies, which differ in their draws and initial weights. Repeat an interrupted command to continue it.
Several of these commands with the same output share the trials.
With track=self_tuning, nothing is searched: a study is one trial of three times the length, with the defaults of the
optimizer or the keys of benchmark/space/NAME_self_tuning.yaml.

  optimizer=a,b :: choices of the group optimizer, or dotted names of classes, with allow_packages
  {_run}
and the keys of `dlopt train`, for all trials (device=cuda, hydra/launcher=gpus). With --check:
  {check}
"""

complete = keys_of_train
_Tier = Annotated[str, "NAME: set of workloads: small, small_held_out, medium or large, or one in --config-dir"]
_Track = Annotated[Track, "NAME: external_tuning, or self_tuning (fixed keys, three times the updates)"]
_ADVICE = "a tier or a search space of your own may set it, see `dlopt benchmark --help`"
_LOCK = ".results.lock"
_CHECKED = 2  # trials that --check repeats
_UPDATES_TOLERANCE = 0.05  # of its updates to the target, as a fraction of a full run
_FIRST_TOLERANCE = 0.1  # relative, of its first validation: later, training amplifies how a processor rounds


def benchmark(arguments: list[str]) -> int:
    """Runs `dlopt benchmark` with the given arguments; returns the exit code. Raises `UserError`."""
    action = arguments[0] if arguments and arguments[0] in ("report", "targets") else None
    if action is not None:
        return _on_folder(action, read_line(arguments[1:], several="one folder is needed"))
    checks = "--check" in arguments
    line = read_line([each for each in arguments if each != "--check"], several="list the optimizers")
    refuse_ranks("dlopt benchmark", "all trials")
    require_package("dlopt benchmark", "optuna", "sweep")
    if checks:
        return line.call(check)
    names, rest = take_optimizers(line, "dlopt benchmark")
    command_values, rest = rest.take(_run)
    typed = [shlex.quote(each) for each in without(arguments, "output")]
    return _run(rest, names, " ".join(["dlopt benchmark", *typed]), **command_values)


# -- the overrides


def _is_of_machine(override: str) -> bool:
    """Returns whether an override changes only where and how a trial is computed and watched."""
    key = key_of(override)
    # How numbers are rounded is not what a benchmark compares; trust in packages changes nothing.
    return key in ("allow_packages", *ROUNDING) or (role_of(key) in (Role.PLACE, Role.WATCH) and not distinguishes(key))


def _refuse_drawn(overrides: Iterable[str], candidates: "Mapping[str, Candidate]") -> None:
    """Raises `UserError` for an override of a key that a search space sets."""
    for override in overrides:
        key = key_of(override)
        if key == "optimizer._target_":
            raise UserError(f"{override}: name the class by optimizer={value_of(override)}")
        for name, chosen in candidates.items():
            if key in chosen.describe():
                place = "in a folder given by --config-dir"
                if has_space(name, None):  # a file of the same name would be refused
                    advice = f"search another one under another name: optimizer/NAME.yaml and {FOLDER}/space/NAME.yaml"
                else:
                    advice = f"to replace it, write {FOLDER}/space/{name}.yaml"
                raise UserError(f"{override}: set by the search space of {name}; {advice} {place}")


# -- the run


def _launch(line: Line, request: "TrialRequest") -> int | None:
    """Runs the waiting trials; returns how many of them other processes are running; None: submitted workers run them.

    On a signal, raises KeyboardInterrupt.
    """
    from dlopt.lab.benchmark.trials import run_trials

    waiting, total = len(request.waiting()), len(request.trials)
    launched = launcher(line, request.overrides, "benchmark", request.folder, waiting, total)
    return None if launched is None else run_trials(request, launched[1], launched[0])


def _run(
    line: Line,
    names: Sequence[str],
    command: str,
    *,
    tier: _Tier = "small",
    track: _Track = "external_tuning",
    workloads: Annotated[NotEmpty[str] | None, "[a,b]: some of its workloads (default: all)"] = None,
    budget: Annotated[Budget, "NAME: tiny (1 study of 3 trials), small (3 of 10) or large (5 of 20)"] = "small",
    studies: Annotated[Count | None, "N: number of studies, instead of the budget's"] = None,
    trials: Annotated[Count | None, "N: trials per study, instead of the budget's"] = None,
    reference: Annotated[bool, "BOOL: compare with the shipped results"] = True,
    full: Annotated[bool, "BOOL: train every trial to the end, also after its target"] = False,
    output: Annotated[
        str | None, "DIR: folder of the trials and results (default: outputs/benchmark/TIER[_self_tuning])"
    ] = None,
    dry_run: Annotated[bool, "BOOL: only list the trials, and their time if some have ended"] = False,
) -> int:
    """Checks the benchmark and runs its trials. Raises `UserError`."""
    if dry_run:
        announce_dry_run()
    from dlopt.lab.benchmark.trials import TrialRequest, candidate, lengths_of

    is_tuned = track == "external_tuning"
    if not is_tuned and trials not in (None, 1):
        raise UserError(f"trials={trials}: track=self_tuning has one trial per study; for more seeds, set studies=N")
    refuse_protocol(line.overrides, _ADVICE)
    overrides = without_hydra(line, "dlopt benchmark", _run)
    chosen = load_tier(tier, line.composer.config_dir).select(workloads)
    unset = [name for name, spec in chosen.workloads.items() if spec.target is None]
    if unset and not full:
        raise UserError(
            f"tier={tier}: no target is set for {', '.join(unset)}; run the baselines with full=true, and take the "
            "targets from `dlopt benchmark targets FOLDER`"
        )
    counts = studies or BUDGETS[budget][0], trials or (BUDGETS[budget][1] if is_tuned else 1)
    candidates = {name: candidate(line.composer, name, overrides, track) for name in names}
    _refuse_drawn(overrides, candidates)
    shipped, note = _reference(tier, track, overrides) if reference and not full else (None, "")
    request = TrialRequest(
        results_folder(output, "benchmark", tier if is_tuned else f"{tier}_{track}"),
        chosen.workloads,
        candidates,
        list(trials_of(list(chosen.workloads), list(candidates), *counts)),
        overrides,
        full,
        lengths_of(line.composer, chosen.workloads, track),
    )
    _check_lines(line, request)
    waiting = request.waiting()
    if dry_run:
        return _list(request, waiting, shipped)
    if reading.read_manifest(request.folder) is None:
        request.refuse_foreign()
    output_folder(str(request.folder), "benchmark")
    manifest = replace(_manifest(chosen.name, request, *counts, command), track=track)
    reading.update_manifest(request.folder, manifest)
    done = len(request.trials) - len(waiting)
    print(f"{len(request.trials)} trials, of which {done} are done; folder: {short_path(request.folder)}", flush=True)
    try:
        elsewhere = _launch(line, request) if waiting else 0
        if elsewhere is None:
            return DONE
        if elsewhere:
            print(f"{elsewhere} trials are running in other processes; they report the complete results")
        with locked(request.folder / _LOCK):  # processes that share the trials finish at about the same time
            _measure(line, request, manifest)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return INTERRUPTED
    return _finish(request.folder, shipped, note, line.composer.config_dir)


def _manifest(tier: str, request: "TrialRequest", studies: int, trials: int, command: str) -> Manifest:
    spaces = {name: each.describe() for name, each in request.candidates.items()}
    workloads = dict(request.workloads)
    if request.full:  # the trials do not depend on targets, which may be set later
        workloads = {name: replace(spec, target=None) for name, spec in workloads.items()}
    overrides = [each for each in request.overrides if group_of(each) != "allow_packages"]
    return Manifest(tier, studies, trials, workloads, spaces, overrides, request.full, [command])


def _reference(tier: str, track: Track, overrides: Sequence[str]) -> tuple[Results | None, str]:
    """Returns the shipped results; or None, and a note on why they do not apply."""
    shipped = load_reference(tier, track)
    changing = sorted({group_of(each) for each in overrides if not _is_of_machine(each)} - {"optimizer"})
    if shipped is not None and changing:
        return None, f"not compared with the shipped results, because {', '.join(changing)} changes the workloads"
    return shipped, ""


def _check_lines(line: Line, request: "TrialRequest") -> None:
    """Composes both ends of every search range, and each optimizer on each workload. Raises `UserError`."""
    from dlopt.sweeps.search import probes

    for chosen in request.candidates.values():
        points = probes(chosen.space)
        for number, workload in enumerate(request.workloads):
            for drawn in points if number == 0 else points[:1]:
                line.run_config(request.compose_line(workload, chosen, drawn, 0))


def _list(request: "TrialRequest", waiting: Sequence[Trial], shipped: Results | None) -> int:
    """Prints the trials, and their time by those that have ended, or else by the shipped ones."""
    for trial in waiting:
        values = request.candidates[trial.optimizer].values(trial.study, trial.number)
        print(trial.subfolder, *(f"{key}={value}" for key, value in values.items()))
    total = 0.0  # seconds; NaN if unknown
    for (optimizer, workload), count in Counter((trial.optimizer, trial.workload) for trial in waiting).items():
        ended = seconds_of_ended(request.folder / optimizer / workload)
        mean = fmean(ended) if ended else math.nan
        total += count * mean
        time = f" of about {format_duration(mean)}, as on average in {len(ended)} that ended" if ended else ""
        print(f"{optimizer} on {workload}: {format_count('trials', count)}{time}")
    trials = format_count("trials", len(waiting))
    if math.isfinite(total):
        print(f"{trials}: about {format_duration(total)} of one core")
    elif shipped is not None and (hours := shipped.facts.get("core_hours")):
        records = sum(len(cell.records) for cell in shipped.cells.values())
        average, processor = format_duration(3600 * hours / records), shipped.facts.get("processor", "any processor")
        print(f"{trials}; the {records:,} shipped ones took {average} of a core on average ({processor})")
    else:
        print(f"{trials}; their time is known once some have ended")
    return DONE


def _measure(line: Line, request: "TrialRequest", manifest: Manifest) -> None:
    """Measures the cost of updates and tests the best trials, where that is still missing."""
    from dlopt.lab.benchmark import costs

    results = reading.collect(request.folder, replace(manifest, workloads=request.workloads), {})
    for (optimizer, workload), cell in results.cells.items():
        folder = request.folder / optimizer / workload
        best = reading.best_trials(cell.records, request.workloads[workload].metric)
        if best and not (folder / COST).exists():
            print(f"measuring the time of an update: {optimizer} on {workload}", flush=True)
            try:
                _measure_cost(line, request, optimizer, workload, folder / COST)
            except Exception as error:  # of the optimizer, which is the user's
                reason = f"{type(error).__name__}: {error}"
                message = f"dlopt: {optimizer} on {workload}: cannot measure the time of an update: {reason}"
                print(message, file=sys.stderr)
        for study, record in best.items():
            costs.test_trial(folder / f"{study}-{record.trial}")


def _measure_cost(line: Line, request: "TrialRequest", optimizer: str, workload: str, path: Path) -> None:
    from dlopt.lab.benchmark import costs
    from dlopt.lab.benchmark.trials import candidate
    from dlopt.sweeps.search import probes

    sgd = candidate(line.composer, "sgd", request.overrides)
    # At the low ends of the ranges no run diverges.
    baseline, own = (
        line.run_config(request.compose_line(workload, each, probes(each.space)[0], 0))[0]
        for each in (sgd, request.candidates[optimizer])
    )
    with scratch() as workdir:
        cost = costs.measure(baseline, own, workdir)
    write_json(path, asdict(cost), indent=None)


def _finish(folder: Path, reference: Results | None, note: str, config_dir: str | None) -> int:
    """Collects the results, prints them, and writes results.json and the page."""
    from dlopt.lab.benchmark.page import write
    from dlopt.lab.benchmark.table import WIDTH, lines

    manifest = reading.read_manifest(folder)
    assert manifest is not None
    if manifest.full:  # the trials do not depend on targets, which may have been set since
        manifest = replace(manifest, workloads=_with_targets(manifest, config_dir))
    with locked(folder / _LOCK):
        results = reading.collect(folder, manifest, _facts(folder, manifest))
        write_atomically(folder / "results.json", to_json(results))
        shown = results if reference is None else results.with_reference(reference)
        paths = write(shown, folder)
    print("\n".join(lines(shown, min(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH))))
    print(*([note] if note else []), *map(short_path, paths), sep="\n")
    return DONE


def _with_targets(manifest: Manifest, config_dir: str | None) -> dict[str, WorkloadSpec]:
    """Returns the workloads with the targets of their tier, where the trials were run without."""
    try:
        tier = load_tier(manifest.tier, config_dir).workloads
    except UserError:  # of a --config-dir that is not given
        tier = {}
    return {
        name: replace(spec, target=tier[name].target) if spec.target is None and name in tier else spec
        for name, spec in manifest.workloads.items()
    }


def _facts(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Returns how the results were made, without what identifies the user or the host."""
    versions, machine = environment.versions(), environment.machine()
    summaries = [RunFolder(path.parent).summary() or {} for path in folder.glob("*/*/*/summary.json")]
    return {
        "command": "; ".join(manifest.commands),
        "date": date.today().isoformat(),
        "core_hours": round(sum(filter(is_number, (summary.get("seconds") for summary in summaries))) / 3600, 2),
        **{name: versions[name] for name in ("dlopt", "python", "torch")},
        **{name: machine[name] for name in ("processor", "cpu_count", "gpu") if machine[name]},
    }


# -- commands on folders


def _on_folder(action: str, line: Line) -> int:
    """`report` and `targets`."""
    folder, manifest = saved_series(line, f"dlopt benchmark {action}", reading.read_manifest, "benchmark.json")
    if action == "targets":
        typed = short_path(folder)
        missing = [name for name in BASELINES if name not in manifest.optimizers]
        if manifest.track == "self_tuning":
            raise UserError(f"{typed}: targets need track=external_tuning; this folder has track=self_tuning")
        if missing or not manifest.full:
            which = f"; missing: {', '.join(missing)}" if missing else ""
            raise UserError(f"{typed}: targets need trials of {', '.join(BASELINES)} with full=true{which}")
        trials = trials_of([*manifest.workloads], BASELINES, manifest.studies, manifest.trials)
        waiting = [not RunFolder(folder / trial.subfolder).has_ended(or_failed=True) for trial in trials]
        if any(waiting):
            message = f"{sum(waiting)} of {len(waiting)} trials have not ended: the targets are preliminary"
            print(f"dlopt: warning: {message}", file=sys.stderr)
        none = "none, because most studies have no finite value in time"
        for name, target in targets(folder, manifest).items():
            print(f"{name}: {f'{target:.4g}' if math.isfinite(target) else none}")
        return DONE
    reference, note = (None, "") if manifest.full else _reference(manifest.tier, manifest.track, manifest.overrides)
    return _finish(folder, reference, note, line.composer.config_dir)


# -- dlopt benchmark --check


def check(
    line: Line,
    *,
    tier: _Tier = "small",
    track: _Track = "external_tuning",
    seed: Annotated[int | None, "N: which trials are repeated (default: others every time)"] = None,
    output: Annotated[str | None, "DIR: folder of the trials (default: outputs/benchmark-check/DATE_TIME)"] = None,
) -> int:
    """Repeats two random trials of the shipped results; returns `FAILED` if one of them differs."""
    from dlopt.lab.benchmark.trials import TrialRequest, candidate, lengths_of

    overrides = without_hydra(line, "dlopt benchmark", check)
    for override in line.overrides:
        if is_fixed(override) or not _is_of_machine(override):
            reason = "--check repeats shipped trials, of which only the machine may differ (device, precision, ...)"
            raise UserError(f"{override}: {reason}")
    shipped = load_reference(tier, track)
    if shipped is None:
        raise UserError(f"tier={tier}: has no shipped results of track={track} to check")
    # Only trials that reach the target: others would agree without saying much.
    reached = {
        Trial(workload, name, record.study, record.trial): record
        for (name, workload), cell in sorted(shipped.cells.items())
        for record in cell.records
        if record.reached
    }
    chosen = {trial: reached[trial] for trial in random.Random(seed).sample(list(reached), min(_CHECKED, len(reached)))}
    candidates = {trial.optimizer: candidate(line.composer, trial.optimizer, overrides, track) for trial in chosen}
    workloads = load_tier(tier, None).select([trial.workload for trial in chosen]).workloads
    folder = output_folder(output, "benchmark-check").absolute()
    lengths = lengths_of(line.composer, workloads, track)
    request = TrialRequest(folder, workloads, candidates, list(chosen), overrides, full=True, lengths=lengths)
    try:
        _launch(line, request)
    except KeyboardInterrupt:
        return INTERRUPTED
    spaces = {name: each.describe() for name, each in candidates.items()}
    studies = max(map(shipped.studies_of, shipped.optimizers))
    manifest = Manifest(tier, studies, shipped.trials, workloads, spaces, overrides, full=True, track=track)
    measured = reading.collect(folder, manifest, {})
    agree = True
    for trial, expected in chosen.items():
        records = measured.cell(trial.optimizer, trial.workload).study(trial.study)
        record = next((each for each in records if each.trial == trial.number), None)
        name = f"{trial.optimizer} on {trial.workload}, study {trial.study}, trial {trial.number}"
        verdict = "differs" if record is None else compare(record, expected, shipped.workloads[trial.workload].updates)
        agree = agree and verdict != "differs"
        reached_now = "has not ended" if record is None else _to_target(record)
        print(f"{name}: {reached_now}; shipped: {_to_target(expected)}: {verdict}")
    return DONE if agree else FAILED


def compare(record: TrialRecord, expected: TrialRecord, full: int) -> str:
    """Compares the repetition of a trial with the shipped record; `full`: updates of a full run."""
    if record.reached and abs(record.updates - expected.updates) <= _UPDATES_TOLERANCE * full:
        return "agrees"
    if (
        record.first is None
        or expected.first is None
        or not math.isclose(record.first, expected.first, rel_tol=_FIRST_TOLERANCE)
    ):
        return "differs"
    return f"agrees at first ({record.first:.4g}; shipped: {expected.first:.4g}), then rounding separates the runs"


def _to_target(record: TrialRecord) -> str:
    updates = f"{record.updates:.0f} updates to the target" if record.reached else "target not reached"
    return updates if record.best is None else f"{updates}, best {record.best:.4g}"
