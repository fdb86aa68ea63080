"""The tables of a ladder, and the text for the terminal."""

import math

from dlopt.extend import Table, group_of, printable
from dlopt.lab.benchmark.formats import abbreviated, number
from dlopt.lab.ladder.analysis import Analysis
from dlopt.lab.ladder.findings import findings, signed, times
from dlopt.lab.ladder.results import Results
from dlopt.lab.report import WIDTH, rendered, wrapped

_NAME = 24  # of an optimizer


def tables(results: Results) -> list[Table]:
    """Returns the tables of the results: the rungs, the losses, the gains, the laws, the learning rates."""
    found, ladder = [_sizes(results)], results.ladder
    for length, analysis in results.shorter.items():
        of_length = f"{length:g} {ladder.unit} per parameter: "
        found += [_losses(analysis, of_length), *_gains(results, analysis, of_length)]
    if results.analysis is not None:
        of_length = f"{ladder.tokens_per_parameter:g} {ladder.unit} per parameter: " if ladder.shorter else ""
        found += [_losses(results.analysis, of_length), *_gains(results, results.analysis, of_length)]
        found += [_laws(results.analysis), _seconds(results.analysis)]
    found += _arms(results)
    return [*found, _rates(results), *_decays(results)]


def lines(results: Results, width: int = WIDTH) -> list[str]:
    """Returns the summary for a terminal."""
    text = [line for table in tables(results) for line in [*rendered(table, width), ""]]
    return text + wrapped(findings(results), width)


def _sizes(results: Results) -> Table:
    rows = [
        [name, f"{rung.parameters:,}", f"{rung.updates:,}", f"{rung.samples:,}", f"{rung.epochs:.2f}",
         f"{rung.compute:.3g}"]
        for name, rung in results.ladder.rungs.items()
    ]  # fmt: skip
    heads = ["rung", "parameters", "updates", results.ladder.unit, "epochs", "FLOPs"]
    return Table(heads, rows, title="Rungs")


def _losses(analysis: Analysis, of_length: str) -> Table:
    rows = [[_name(name), *(number(each) for each in means)] for name, means in analysis.mean.items()]
    title = _title(of_length, "Loss at the end of training (mean over seeds)")
    return Table(["optimizer", *analysis.measured.rungs], rows, title=title)


def _title(of_length: str, title: str) -> str:
    """`of_length`: "20 bytes per parameter: " where runs have several lengths, else ""."""
    return of_length + title[0].lower() + title[1:] if of_length else title


def _gains(results: Results, analysis: Analysis, of_length: str) -> list[Table]:
    base, rungs = analysis.measured.baseline, analysis.measured.rungs
    if not analysis.gains:
        return []
    compute, interpolated = [], []
    for name, gain in results.stated(analysis).items():
        if not gain.contradicted:
            compute.append([_name(name), *map(times, gain.speed_up), signed(gain.trend)])
        interpolated.append([_name(name), *map(times, gain.interpolated)])
    loss = [[_name(name), *(signed(each, "+.3f") for each in gain.difference)] for name, gain in analysis.gains.items()]
    over = _title(of_length, f"Speed-up over {printable(base)} in compute")
    minus = _title(of_length, f"Loss minus that of {printable(base)}, paired by seed")
    tables = [
        Table(["optimizer", *rungs, "trend"], compute, title=f"{over}, by the laws"),
        Table(["optimizer", *rungs], interpolated, title=f"{over}, between its measured losses (-: beyond them)"),
        Table(["optimizer", *rungs], loss, title=minus),
    ]
    return [each for each in tables if each.rows]


def _arms(results: Results) -> list[Table]:
    """Returns how the optimizers of an arm differ from the first one of the same arm."""
    interpolated, loss = [], []
    for analysis in results.arms.values():
        for name, gain in results.stated(analysis).items():
            interpolated.append([_name(name), *map(times, gain.interpolated), times(gain.change)])
        for name, gain in analysis.gains.items():
            loss.append([_name(name), *(signed(each, "+.3f") for each in gain.difference)])
    if not loss:
        return []
    base, rungs = printable(next(iter(results.ladder.optimizers.values())).choice or ""), [*results.ladder.rungs]
    title = f"Speed-up over {base} of the same arm in compute, between its measured losses (-: beyond them)"
    tables = [
        Table(["optimizer", *rungs, "last / first"], interpolated, title=title),
        Table(["optimizer", *rungs], loss, title=f"Loss minus that of {base} of the same arm, paired by seed"),
    ]
    return [each for each in tables if each.rows]


def _decays(results: Results) -> list[Table]:
    """Returns the weight decays of the arms, and their sums over a run."""
    rungs, tables = [*results.ladder.rungs], []
    names = [name for name, each in results.ladder.optimizers.items() if each.arm is not None]
    values = {"Weight decay": results.decay}
    if not any(group_of(each) == "schedule" for each in results.ladder.overrides):  # those of families fall to 0
        values["Weight decay summed over a run: half the peak rate * weight decay * updates"] = results.summed_decay
    for title, value in values.items():
        rows = [[_name(name), *(number(value(name, rung), ".3g") for rung in rungs)] for name in names]
        tables.append(Table(["optimizer", *rungs], rows, title=title))
    return tables if names else []


def _seconds(analysis: Analysis) -> Table:
    measured = analysis.measured
    rows = [[_name(name), *(number(each, ".3g") for each in measured.seconds[name])] for name in measured.losses]
    title = "Seconds of a training (median over seeds; other processes on the machine lengthen them)"
    return Table(["optimizer", *measured.rungs], rows, title=title)


def _laws(analysis: Analysis) -> Table:
    rows = [
        [_name(name), times(analysis.irreducible), f"{math.exp(curve.log_scale):.3g}", times(analysis.exponents[name])]
        for name, curve in analysis.scaling_laws.curves.items()
    ]
    return Table(["optimizer", "E", "A", "a"], rows, title="Laws L = E + A C^-a (E is shared)")


def _rates(results: Results) -> Table:
    rungs = [*results.ladder.rungs]

    rows = [
        [_name(name), *(number(results.lr(name, rung), ".3g") for rung in rungs)] for name in results.ladder.optimizers
    ]
    searched = results.ladder.searched
    is_searched = any(each.losses for each in results.searches.values())
    title = "Learning rates" + (f", searched up to {searched[-1]}, extrapolated above" if is_searched else "")
    return Table(["optimizer", *rungs], rows, title=title)


def _name(name: str) -> str:
    return abbreviated(name, _NAME)
