"""What `dlopt diagnose` prints."""

import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from dlopt.basics.formats import format_count, terminal_width, wrap
from dlopt.config.overrides import key_of
from dlopt.lab.diagnosis.measuring import Diagnosis, Snapshot
from dlopt.lab.diagnosis.verdicts import (
    DEAD,
    LARGE,
    SATURATED,
    SMALL,
    Facts,
    Verdict,
    advice,
    clipping_norm,
    healthy,
    remedies,
    typed,
    verdicts,
)
from dlopt.tracking.terminal_text import FittedTable, plain_table, standard_output

if TYPE_CHECKING:
    from torch import Tensor

_MAX_ROWS = 60  # of the table
_CONVERGED = 0.02  # error bound of an eigenvalue, relative to it


def _first_lines(
    diagnosis: Diagnosis,
    layer_verdicts: Sequence[Sequence[Verdict]],
    facts: Facts,
    again: Callable[[str], str] | None,
) -> list[str]:
    """Returns three lines: which layers have a problem, why, and what to type; of the first snapshot with a problem.

    `again`: see `print_diagnosis`.
    """
    cause = facts.cause
    for snapshot, judged in zip(diagnosis.snapshots, layer_verdicts, strict=True):
        found = remedies(judged, facts)
        if not found:
            continue
        label = max(found, key=lambda each: sum(verdict.label == each for verdict in judged))
        layers = [(layer.name, verdict) for layer, verdict in zip(snapshot.layers, judged, strict=True)]
        named = {each: [name for name, verdict in layers if verdict.label == each] for each in found}
        which = [f"{each}: {_names(names)} ({len(names)} of {len(layers)} layers)" for each, names in named.items()]
        name, worst = next((name, verdict) for name, verdict in layers if verdict.label == label)
        why = f"{name} is {label}: {worst.reason}" if cause is None else cause.reason
        return [f"{'; '.join(which)}, {_when(diagnosis, snapshot)}", f"why: {why}", _advice(found[label], again)]
    count = len(diagnosis.before.layers)
    are_healthy = f"all {count} layers, {' and '.join(_when(diagnosis, each) for each in diagnosis.snapshots)}"
    if cause is not None:
        before, after = diagnosis.before.loss, diagnosis.after.loss if diagnosis.after is not None else math.nan
        course = f"starts at {before:.3g}" if after <= before else f"goes from {before:.3g} to {after:.3g}"
        return [f"the loss {course}; healthy: {are_healthy}", f"why: {cause.reason}", _advice([cause.change], again)]
    return [
        f"healthy: {are_healthy}",
        f"why: signals and gradients are {SMALL:g}x to {LARGE:g}x those of the first and the last layer with an "
        f"activation; at most {100 * max(DEAD, SATURATED):.0f} % of a layer is dead or saturated",
        "if it does not learn: type dlopt find-lr with the same keys, for the learning rate",
    ]


def _advice(found: Sequence[str], again: Callable[[str], str] | None) -> str:
    # Not another model, which may lack the keys that were typed.
    changes = (each for each in found if re.match(r"[\w.]+=", each) and key_of(each) != "model")
    change = next(changes, None)
    return f"try: {', '.join(found)}" if change is None or again is None else f"type: {again(change)}"


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{', '.join(names[:2])} and {len(names) - 2} more"


def print_diagnosis(diagnosis: Diagnosis, facts: Facts, label: str, again: Callable[[str], str] | None) -> None:
    """Prints three lines first, then a row per layer, and metrics of the whole model.

    Args:
        label: the title; "" for none.
        again: of an override, the command to measure again with it; None if there is none.
    """
    console = standard_output()
    if label:
        console.print(f"\n{label}", style="bold")
    layer_verdicts = [verdicts(snapshot.layers, snapshot.lags) for snapshot in diagnosis.snapshots]
    for line in [*_first_lines(diagnosis, layer_verdicts, facts, again), ""]:
        _print(line)
    table = FittedTable(_table(diagnosis, layer_verdicts))
    brief = FittedTable(_table(diagnosis, layer_verdicts, is_brief=True))
    console.print(table if table.fits(console, console.width) else brief)
    if diagnosis.before.attention:
        console.print(_attention_table(diagnosis))
    for snapshot, judged in zip(diagnosis.snapshots, layer_verdicts, strict=True):
        metrics = [f"loss {snapshot.loss:.4g}", f"gradient norm {_mean(snapshot.total_norms):.3g}"]
        if math.isfinite(snapshot.noise_scale):
            metrics.append(f"gradient noise scale {snapshot.noise_scale:.3g} samples")
        if snapshot.spectrum is not None:
            metrics.append(_eigenvalues(*snapshot.spectrum[:2]))
        for lag in snapshot.lags:
            first, last = lag.states[0], lag.states[-1]
            metrics.append(f"{lag.name}: gradient {first:.2g} at lag 1, {last:.2g} at lag {len(lag.states)}")
        _print(f"{_when(diagnosis, snapshot)}: {'; '.join(metrics)}")
        for line in advice(judged, facts):
            _print(line, "  ")
    after = diagnosis.after
    if diagnosis.trace.rates and not any(diagnosis.trace.rates):
        _print("the updates changed nothing: the schedule has ended, the learning rate is 0; use updates=0")
    elif after is not None and not after.loss < diagnosis.before.loss:
        _print(f"the loss did not fall: {diagnosis.before.loss:.4g} before, {after.loss:.4g} after the updates")
    norms = diagnosis.trace.norms
    if norms:
        count = format_count("updates", len(norms))
        line = f"gradient norms in {count}: median {_median(norms):.3g}, max {max(norms):.3g}"
        usual = clipping_norm(healthy(norms))
        if usual is not None:
            first = len(healthy(norms))
            which = "the updates" if first == len(norms) else f"the first {first} updates, before the gradient exploded"
            line += f"; to clip half of {which}: clip=norm clip.max_norm={typed(usual)}"
        _print(line)
    if diagnosis.trace.ended:
        _print(f"training stopped early: {diagnosis.trace.ended}")


def _print(line: str, indent: str = "") -> None:
    """Prints a line, on a terminal wrapped between its words."""
    print(*wrap(line, terminal_width(sys.stdout), first=indent, indent=f"{indent}  "), sep="\n")


def _when(diagnosis: Diagnosis, snapshot: Snapshot) -> str:
    return "before" if snapshot is diagnosis.before else f"after {format_count('updates', snapshot.updates)}"


def _eigenvalues(eigenvalues: "Tensor", residuals: "Tensor") -> str:
    """Formats the eigenvalues; Lanczos approaches them from below."""
    text = f"largest Hessian eigenvalues {', '.join(f'{value:.3g}' for value in eigenvalues.tolist())}"
    rough = (residuals > _CONVERGED * eigenvalues.abs()).nonzero()
    if not len(rough):
        return text
    first = int(rough[0]) + 1
    which = "lower bounds" if first == 1 else f"lower bounds from number {first} on"
    return f"{text} ({which}; increase iterations)"


def _table(diagnosis: Diagnosis, layer_verdicts: Sequence[Sequence[Verdict]], *, is_brief: bool = False) -> Any:
    """Returns a row per layer. `is_brief`: for a narrow terminal, without the activation, what concerns the weights'
    gradient, and the reasons of the verdicts; diagnosis.json has all."""
    columns = ["std", "saturated\nor dead", "gradient\nnorm", "weight\ngradient", "noise\nscale", "update /\nweight"]
    left = ["layer"] if is_brief else ["layer", "activation"]
    table = plain_table(left=left, right=[*columns[:3], columns[5]] if is_brief else columns)
    for snapshot in diagnosis.snapshots:
        table.add_column(_when(diagnosis, snapshot), overflow="fold")
    snapshot = diagnosis.before
    for i, layer in enumerate(snapshot.layers[:_MAX_ROWS]):
        judged = [verdicts[i] for verdicts in layer_verdicts if i < len(verdicts)]
        weights = [
            _cell(_mean(snapshot.gradient_norms.get(layer.name, []))),
            _cell(snapshot.noise_scales.get(layer.name, math.nan)),
        ]
        table.add_row(
            layer.name,
            *([] if is_brief else [layer.activation or ""]),
            f"{layer.outputs.std:.2g}",
            "" if layer.inactive is None else f"{100 * layer.inactive:.0f} %",
            _cell(layer.gradient_norm),
            *([] if is_brief else weights),
            _cell(_median(diagnosis.trace.ratios.get(layer.name, []))),
            *(
                Text(each.label if is_brief else str(each), "" if each.label == "healthy" else "bold red")
                for each in judged
            ),
        )
    if len(snapshot.layers) > _MAX_ROWS:
        table.caption = f"the first {_MAX_ROWS} of {len(snapshot.layers)} layers; see diagnosis.json for all"
    return table


def _attention_table(diagnosis: Diagnosis) -> Any:
    """Returns a row per attention layer and snapshot: the entropy of each head."""
    table = plain_table(left=["attention entropy of the heads, in nats"], right=["at most"])
    for snapshot in diagnosis.snapshots:
        table.add_column(_when(diagnosis, snapshot), overflow="fold")
    for layers in list(zip(*(snapshot.attention for snapshot in diagnosis.snapshots), strict=True))[:_MAX_ROWS]:
        heads = [" ".join(f"{entropy:.2f}" for entropy in layer.heads) for layer in layers]
        table.add_row(layers[0].name, f"{layers[0].largest:.2f}", *heads)
    return FittedTable(table)


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2g}"


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan
