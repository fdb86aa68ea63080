"""`dlopt ladder`: trains models of several sizes with several optimizers; compares their compute at equal loss."""

import math
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from dlopt.basics.formats import format_count, format_duration
from dlopt.basics.locks import locked
from dlopt.basics.status_line import announce_dry_run
from dlopt.commands.shared.command_line import read_line
from dlopt.config.parameters import parameters_of
from dlopt.extend import (
    DONE,
    INTERRUPTED,
    Count,
    Line,
    NotEmpty,
    Positive,
    UserError,
    group_of,
    key_of,
    keys_of_train,
    output_folder,
    short_path,
    value_of,
    without,
)
from dlopt.lab.benchmark.protocol import has_space, load_space
from dlopt.lab.claimed_trials import (
    launcher,
    refuse_protocol,
    results_folder,
    saved_series,
    take_optimizers,
    without_hydra,
)
from dlopt.lab.ladder.arms import KEYS, OVERRIDES, RUNGS, SEARCHED, Arm
from dlopt.lab.ladder.family import Family, Rules, Rung, chosen_rungs, load_family, measure
from dlopt.lab.ladder.ladder import MANIFEST, Contestant, Ladder, LadderRequest, Trial, read_ladder, update_ladder
from dlopt.lab.ladder.rates import GRID, expected_runs
from dlopt.parallel.processes.rendezvous import refuse_ranks

USAGE = """\
Compare optimizers on models of growing size: does the gain last?

Usage:
  dlopt ladder optimizer=a,b model=FAMILY [key=value]   run the missing runs, then print and write the results
  dlopt ladder report FOLDER                            write the results of the runs so far

Examples:
  dlopt ladder optimizer=adamw,muon model=gpt
  dlopt ladder optimizer=adamw,muon model=gpt rungs=3 tokens_per_parameter=5
  dlopt ladder optimizer=adamw,muon model=gpt dry_run=true          # list the runs, without training
  dlopt ladder optimizer=adamw,muon model=gpt arms=[constant,inverse]  # search weight decay; scale it by 1 / width
  dlopt ladder optimizer=adamw,muon model=gpt tokens_per_parameter=[5,10,20] schedule=wsd  # shorter runs branch off
  dlopt ladder optimizer=adamw,mine.MyOptimizer model=gpt allow_packages=[mine]
  dlopt ladder optimizer=adamw,muon model=gpt hydra/launcher=slurm  # on a cluster

The rungs of a family (ladder/NAME.yaml in dlopt's folder or in --config-dir) grow in width and depth by a rule; the
training data grows with the parameters. Each optimizer's learning rate is searched on the smallest rungs and
extrapolated to the others. All rungs then train with several seeds, and count with the loss at the end of the schedule.
The first optimizer is the baseline. Repeat an interrupted command to continue it. Several of these commands with the
same output share the runs.

With arms=[constant,inverse,zero,hyperball], each optimizer trains with a weight decay searched together with its rates
on the smallest two rungs, with one that falls as 1 / model.width, without, and with matrices of fixed norm. Each arm is
a contestant; the report also compares it with the first optimizer of the same arm.

With several tokens_per_parameter and a schedule that is constant before its cooldown (schedule=wsd), the shorter runs
continue from checkpoints of the longest. All have its learning rate.

  optimizer=a,b :: choices of the group optimizer, or dotted names of classes, with allow_packages
  model=FAMILY :: gpt, vit, resnet, gpt_gpu, or one in --config-dir
  {_run}
and the keys of `dlopt train`, for all runs (device=cuda, hydra/launcher=gpus). optimizer.lr=X sets the same learning
rate at all sizes, and nothing is searched.
"""

complete = keys_of_train
_ADVICE = "a family of your own may set it, see `dlopt ladder --help`"
_LOCK = ".results.lock"
_PLAIN = "optimizer.lr"


def ladder(arguments: list[str]) -> int:
    """Runs `dlopt ladder` with the given arguments; returns the exit code. Raises `UserError`."""
    if arguments and arguments[0] == "report":
        return _report(read_line(arguments[1:], several="one folder is needed"))
    line = read_line(arguments, several="list the optimizers")
    refuse_ranks("dlopt ladder", "all runs")
    names, rest = take_optimizers(line, "dlopt ladder model=gpt")
    typed = [each for each in rest.overrides if key_of(each) == "model"]
    if len(typed) != 1:
        raise UserError("model: name one family: dlopt ladder optimizer=adamw,muon model=gpt")
    family = load_family(value_of(typed[0]), line.composer)
    rest = Line(rest.composer, [each for each in rest.overrides if each not in typed])
    command_values, rest = rest.take(_run)
    command = ["dlopt", "ladder", *(shlex.quote(each) for each in without(arguments, "output"))]
    return _run(rest, names, family, " ".join(command), **command_values)


def _run(
    line: Line,
    names: Sequence[str],
    family: Family,
    command: str,
    *,
    rungs: Annotated[Count | NotEmpty[str] | None, "N|[a,b]: the smallest N rungs, or these (default: all)"] = None,
    tokens_per_parameter: Annotated[
        Positive | NotEmpty[Positive] | None,
        "N|[a,b]: training tokens (or images) per parameter, as 5, 20 or 80 (default: the family's)",
    ] = None,
    search: Annotated[Count, "N: smallest rungs on which learning rates are searched"] = 4,
    seeds: Annotated[Count, "N: runs of each rung at its best rate"] = 3,
    arms: Annotated[
        NotEmpty[Arm] | None,
        "[constant,inverse,zero,hyperball]: weight decays of each optimizer (default: its default)",
    ] = None,
    output: Annotated[str | None, "DIR: folder of the runs and results (default: outputs/ladder/FAMILY)"] = None,
    dry_run: Annotated[bool, "BOOL: only list the runs, and their time if some have ended"] = False,
) -> int:
    """Checks the ladder and runs its trials. Raises `UserError`."""
    if dry_run:
        announce_dry_run()
    refuse_protocol([each for each in line.overrides if group_of(each) != "schedule"], _ADVICE)
    overrides = without_hydra(line, "dlopt ladder", _run)
    _refuse_sizes(overrides, family)
    chosen = chosen_rungs(family, rungs)
    folder = results_folder(output, "ladder", family.name)
    shared = [each for each in overrides if group_of(each) != "optimizer"]
    of_optimizer = [each for each in overrides if group_of(each) == "optimizer"]
    if arms is not None:
        _check_arms(arms, of_optimizer, family, chosen)
    contestants: dict[str, Contestant] = {}
    for name in names:
        contestant = _contestant(line, family, name, of_optimizer, shared)
        contestants |= {name: contestant} if arms is None else _with_arms(name, contestant, arms, family)
    per_parameter = family.tokens_per_parameter if tokens_per_parameter is None else tokens_per_parameter
    *shorter, longest = _lengths(per_parameter)
    measured = {name: measure(line, family, name, [*shorter, longest], shared) for name in chosen}
    ladder = Ladder(
        family.name, family.experiment, family.metric, family.unit, _rules(family, shared, measured), longest, measured,
        chosen[:search], seeds, contestants, [each for each in shared if group_of(each) != "allow_packages"], [command],
        tuple(shorter),
    )  # fmt: skip
    request = LadderRequest(folder, ladder, shared)
    for name, contestant in contestants.items():
        lr = contestant.lr or contestant.rates[_PLAIN]
        decay = 0.0 if contestant.arm in SEARCHED else None
        run_config, _ = line.run_config(ladder.line(Trial(name, chosen[0], 0), lr, decay, shared))
        if "monitor" in run_config.schedule.arguments:
            raise UserError("schedule=plateau: follows evaluations, and a ladder evaluates at the end only")
        if shorter and any(rule.horizon is not None for rule in run_config.grouping.groups):
            raise UserError("optimizer.groups: a horizon of a group is a fraction of each length; leave it out")
    if dry_run:
        return _list(request)
    output_folder(str(folder), "ladder")
    merged = update_ladder(folder, ladder)
    runs, ended = request.expected(), len(request.known())
    ended_before = f", {ended} of which have ended" if ended else ""
    print(f"{_sizes(ladder)}\nabout {runs} runs{ended_before}; folder: {short_path(folder)}", flush=True)
    try:
        if request.waiting() and not _launch(line, request):
            return DONE
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return INTERRUPTED
    return _finish(folder, merged)


def _lengths(tokens_per_parameter: float | Sequence[float]) -> list[float]:
    """Returns the lengths of the runs in tokens per parameter, ascending. Raises `UserError`."""
    if not isinstance(tokens_per_parameter, Sequence):
        return [float(tokens_per_parameter)]
    if len(set(tokens_per_parameter)) < len(tokens_per_parameter):
        listed = ",".join(f"{each:g}" for each in tokens_per_parameter)
        raise UserError(f"tokens_per_parameter=[{listed}]: a length is listed twice")
    return sorted(map(float, tokens_per_parameter))


def _rules(family: Family, shared: Sequence[str], rungs: Mapping[str, Rung]) -> Rules:
    """Returns the rules of the family, with the schedule of the command line."""
    typed = [each for each in shared if group_of(each) == "schedule"]
    words = [", ".join(typed) or family.rules.schedule]
    if any(rung.warmup is not None for rung in rungs.values()):
        words.append("all lengths of a rung have the warmup of the shortest")
    return replace(family.rules, schedule="; ".join(words))


def _refuse_sizes(overrides: Sequence[str], family: Family) -> None:
    """Raises `UserError` for an override of a key that the rungs set."""
    keys = {key_of(each) for lines in family.rungs.values() for each in lines}
    for override in overrides:
        if key_of(override) in keys or key_of(override) == "scale_lr":
            raise UserError(f"{override}: set by the rungs of model={family.name}; {_ADVICE}")


def _check_arms(arms: Sequence[Arm], overrides: Sequence[str], family: Family, rungs: Sequence[str]) -> None:
    """Raises `UserError` for arms that contradict the overrides of the optimizer or the family."""
    for override in overrides:
        if key_of(override) in (*KEYS, _PLAIN):
            raise UserError(f"{override}: the arms set weight decays and search the rates; leave it out")
    if "inverse" in arms and any("model.width" not in map(key_of, family.rungs[rung]) for rung in rungs):
        raise UserError(f"arms=inverse: the rungs of model={family.name} have no model.width; choose other arms")


def _with_arms(name: str, contestant: Contestant, arms: Sequence[Arm], family: Family) -> dict[str, Contestant]:
    """Returns the arms of an optimizer, by name."""
    others = [each for each in contestant.overrides if key_of(each) not in KEYS]
    lines = {arm: [*others, *OVERRIDES.get(arm, ()), *family.arms.get(arm, ())] for arm in arms}
    return {f"{name}.{arm}": replace(contestant, overrides=lines[arm], choice=name, arm=arm) for arm in arms}


def _contestant(line: Line, family: Family, name: str, overrides: Sequence[str], shared: Sequence[str]) -> Contestant:
    """Returns an optimizer with the centres of its learning rates. The keys of the family yield to `overrides`.

    Raises `UserError`.
    """
    from hydra.core.override_parser.types import IntervalSweep

    from dlopt.config.resolve import to_plain

    lines = [f"experiment={family.experiment}", f"optimizer={name}", *overrides, *shared]
    plain, _ = to_plain(line.composer.compose(lines))
    typed = [key_of(each) for each in overrides]
    overrides = [*(each for each in family.optimizers.get(name, ()) if key_of(each) not in typed), *overrides]
    if _PLAIN in typed:
        lr = plain["optimizer"]["lr"]
        if not isinstance(lr, int | float):
            raise UserError(f"optimizer.lr={lr}: a ladder needs a number, or leave it out: rates are searched")
        return Contestant({}, float(lr), list(overrides))
    centres: dict[str, float] = {}
    fixed: list[str] = []
    if has_space(name, line.composer.config_dir):
        for override in line.composer.parse(load_space(name, line.composer.config_dir)):
            key, value = override.get_key_element(), override.value()
            if key in typed:
                continue
            if key.endswith("lr") and isinstance(value, IntervalSweep) and value.start and value.end:
                centres[key] = float(f"{math.sqrt(float(value.start) * float(value.end)):.4g}")
            elif not override.is_sweep_override():
                fixed.append(f"{key}={override.get_value_element_as_str()}")
    elif (default := _default_rate(plain)) is not None:
        centres[_PLAIN] = default
    if _PLAIN not in centres:
        raise UserError(f"optimizer={name}: has no learning rate to search; set one for all sizes: optimizer.lr=1")
    return Contestant(centres, None, [*fixed, *overrides])


def _default_rate(plain: Mapping[str, Any]) -> float | None:
    """Returns the learning rate of a composed choice, or the default of the signature of its class."""
    lr = plain["optimizer"].get("lr")
    if lr is None:
        from dlopt.config.schema import resolve_target, trusted_packages

        packages = trusted_packages(plain["allow_packages"])
        target = resolve_target("optimizer._target_", str(plain["optimizer"]["_target_"]), packages)
        lr = getattr(parameters_of(target).get("lr"), "default", None)
    return float(lr) if isinstance(lr, int | float) else None


def _launch(line: Line, request: LadderRequest) -> bool:
    """Runs all trials, also those that wait for others; returns whether they have ended: False if they were submitted.

    On a signal, raises KeyboardInterrupt.
    """
    from dlopt.lab.ladder.running import run

    waiting = request.waiting()
    launched = launcher(line, request.line(waiting[0]), "ladder", request.folder, len(waiting), request.expected())
    if launched is not None:
        run(request, launched[1], launched[0])
    return launched is not None


def _sizes(ladder: Ladder) -> str:
    lines = []
    for name, rung in ladder.rungs.items():
        epochs = f", {rung.epochs:.1f} epochs" if rung.epochs > 1 else ""
        lines.append(
            f"{name}: {format_count('parameters', rung.parameters)}, {format_count('updates', rung.updates)}, "
            f"{rung.samples:,} {ladder.unit}{epochs}, {rung.compute:.3g} FLOPs"
        )
    if ladder.shorter:
        lines.append(_branches(ladder))
    return "\n".join(lines)


def _branches(ladder: Ladder) -> str:
    """Returns what the shorter runs add to the updates of the longest."""
    shorter = ", ".join(f"{each:g}" for each in ladder.shorter)
    rungs = ladder.rungs.values()
    longest = sum(rung.updates for rung in rungs)
    alone = sum(branch.updates for rung in rungs for branch in rung.branches)
    added = sum(map(ladder.added, ladder.rungs))
    return (
        f"branches with {shorter} {ladder.unit} per parameter: {added:,} updates instead of {alone:,}\n"
        f"all lengths: {1 + added / longest:.2f} times the updates of the longest runs"
    )


def _list(request: LadderRequest) -> int:
    """Prints the sizes and the runs, and their time by those that have ended."""
    ladder, expected = request.ladder, request.expected()
    print(_sizes(ladder))
    total = 0.0  # seconds; NaN if unknown
    joint = ladder.joint
    for optimizer, contestant in ladder.optimizers.items():
        is_joint = contestant.arm in SEARCHED and contestant.choice in joint
        joint = [each for each in joint if each != contestant.choice or not is_joint]  # arms share the search
        for place, rung in enumerate(ladder.rungs):
            is_searched = contestant.lr is None and rung in ladder.searched
            searches = expected_runs(place) if is_searched else 0
            decays = searches * len(GRID) if is_joint and place < RUNGS else 0
            branched = ladder.added(rung) / ladder.rungs[rung].updates
            count = decays + searches + ladder.seeds * (1 + branched)
            parts = {"to search the weight decay": decays, "to search the rate": searches, "seeds": ladder.seeds}
            parts["branches"] = ladder.seeds * len(ladder.shorter)
            runs = " + ".join(f"{number} {text}" for text, number in parts.items() if number)
            ended = request.seconds(optimizer, rung)
            mean = fmean(ended) if ended else math.nan
            total += count * mean
            time = f"; {format_duration(mean)} a run, as on average in {len(ended)} that ended" if ended else ""
            print(f"{optimizer}, {rung}: {runs}{time}")
    hours = f"about {total / 3600:.2g} hours, one run at a time" if math.isfinite(total) else "time unknown"
    print(f"{expected} runs: {hours}")
    return DONE


def _report(line: Line) -> int:
    return _finish(*saved_series(line, "dlopt ladder report", read_ladder, MANIFEST))


def _finish(folder: Path, ladder: Ladder) -> int:
    """Collects the results, prints them, and writes results.json, the page and the figures."""
    from dlopt.lab.ladder.page import write
    from dlopt.lab.ladder.results import collect
    from dlopt.lab.ladder.table import WIDTH, lines

    with locked(folder / _LOCK):  # processes that share the runs finish at about the same time
        results = collect(LadderRequest(folder, ladder))
        paths = write(results, folder)
    print("\n".join(lines(results, min(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH))))
    print(*map(short_path, paths), sep="\n")
    return DONE
