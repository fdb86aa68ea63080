"""`dlopt diagnose`: measures activations, gradients and curvature, with plots, a table and advice."""

import contextlib
import math
import os
import re
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.text import Text

from dlopt.basics.formats import format_count
from dlopt.basics.plain_values import without_nan
from dlopt.commands.shared.command_line import Combination, saved_run_config, skipped_keys
from dlopt.config.choices import CONFIG_NAME
from dlopt.config.overrides import key_of
from dlopt.config.reads import LEARNING_RATE, RECIPE, UPDATE, refuse_unread
from dlopt.config.saved import checkpoint_file, typed_values
from dlopt.extend import (
    DONE,
    Count,
    Line,
    Natural,
    UserError,
    on_config,
    output_folder,
    short_path,
    write_json,
    writing,
)
from dlopt.parallel.processes.rendezvous import current
from dlopt.results import drawing
from dlopt.tracking.terminal_text import FittedTable, plain_table, standard_output

if TYPE_CHECKING:
    from torch import Tensor

    from dlopt.extend import Checkpoint, RunConfig
    from dlopt.lab.diagnosis.measuring import Diagnosis, Snapshot
    from dlopt.lab.diagnosis.verdicts import Facts, Verdict

READS = (*UPDATE, *LEARNING_RATE, *RECIPE, "check", "on_divergence")
_INITIAL = dict.fromkeys(("init", "init_seed", "init_from"), "the weights are those of the checkpoint")
_READS_OF_CHECKPOINTS = tuple(key for key in READS if key not in _INITIAL)
USAGE = """\
Measure activations, gradients and curvature of a model, layer by layer

Usage: dlopt diagnose [group=choice] [key=value]

Examples:
  dlopt diagnose model=mlp model.widths=[100,100,100,100,100] model.activation=tanh model.norm=none init=xavier_normal
  dlopt diagnose model=plain56,resnet56 model.norm=none,batch updates=0 eigenvalues=0
  dlopt diagnose model=rnn,lstm data.image_size=64 clip=norm clip.max_norm=0.1
  dlopt diagnose checkpoint=outputs/train/DATE/checkpoints/best.pt

Measures before and after the first training updates: distributions of activations and backpropagated gradients, their
scale vs. depth, saturated and dead units, gradient norms per layer, the gradient noise scale, update-to-weight ratios,
the largest eigenvalues of the Hessian, the curvature along the updates, gradients vs. time lag in recurrent nets, and
the entropy of each attention head in transformers.
Rates each layer and suggests what to change. Keys accept several values: one row or curve per combination.

  {diagnose}
and these keys of `dlopt train`:
    {READS}
"""

_MAX_JOBS = 7  # distinguishable colours
_MAX_ROWS = 60  # of the table
_CONVERGED = 0.02  # error bound of an eigenvalue, relative to it
_GROUPS = ("data", "model", "init", "normalize", "loss", "optimizer", "schedule", "clip")


@dataclass(frozen=True)
class _Subject:
    label: str
    run_config: "RunConfig"
    choices: Mapping[str, str]
    job: Combination | None = None  # of the command line
    checkpoint: "Checkpoint | None" = None


@on_config(
    "diagnose",
    None,  # with a checkpoint, its config decides which keys exist
    several="not needed here; list the values: init=normal,xavier_normal",
)
def diagnose(
    line: Line,
    *,
    updates: Annotated[Natural, "N: training updates between the two measurements; 0: measure only once"] = 20,
    batches: Annotated[Count, "N: mini-batches to measure on"] = 4,
    eigenvalues: Annotated[Natural, "N: largest eigenvalues of the Hessian; 0: no second derivatives"] = 5,
    iterations: Annotated[Count, "N: Hessian-vector products for the eigenvalues, which rise to the exact ones"] = 20,
    checkpoint: Annotated[
        str | None, "PATH: a trained model; uses the config of the checkpoint, whose keys can be overridden"
    ] = None,
    output: Annotated[
        str | None,
        "DIR: folder of plots, diagnosis.json and TensorBoard histograms (default: outputs/diagnose/DATE_TIME)",
    ] = None,
) -> int:
    """Measures, prints the table and the advice, and saves the plots. Raises `UserError`."""
    if checkpoint is None:
        hints = {"resume": "to diagnose a trained model, use checkpoint=PATH"}
        refuse_unread(line.overrides, "dlopt diagnose", READS, command_keys=["output"], hints=hints)
        subjects = [_subject(line, job) for job in line.jobs(_GROUPS, _MAX_JOBS)]
        title = " ".join(line.fixed()) or ("other keys at their defaults" if line.overrides else "default model")
    else:
        line.refuse_config_files("with checkpoint=; a checkpoint contains its config")
        subjects = [_trained(Path(checkpoint), line.overrides)]
        title = " ".join([short_path(Path(checkpoint)), *line.overrides])
    for subject in subjects:
        _check(subject)
    folder = None if output is None else output_folder(output, "diagnose")  # fails before the slow measurements
    keys = {"updates": updates, "batches": batches, "eigenvalues": eigenvalues, "iterations": iterations}
    from dlopt.trained.restore import fitting

    with contextlib.nullcontext() if checkpoint is None else fitting(checkpoint):
        results = [_measure(subject, keys) for subject in subjects]
    folder = folder or output_folder(None, "diagnose")
    for (diagnosis, facts), subject in zip(results, subjects, strict=True):
        again = None if subject.job is None else partial(_command, line, subject.job.overrides)
        _print(diagnosis, facts, subject.label if len(subjects) > 1 else "", again)
    written = _write(folder, results, title)
    skipped = skipped_keys([(subject.label, subject.job) for subject in subjects if subject.job is not None])
    names = ", ".join(path.name for path in written if path.suffix == ".png")
    print(f"{short_path(folder)}: {names} (and .svg), diagnosis.json, tensorboard", *skipped, sep="\n")
    return DONE


def _subject(line: Line, job: Combination) -> _Subject:
    run_config, choices = line.run_config(job.overrides)
    return _Subject(job.label(choices, "model"), run_config, choices, job)


def _trained(path: Path, overrides: Sequence[str]) -> _Subject:
    from dlopt.extend import load_checkpoint

    path = checkpoint_file(path)
    refuse_unread(overrides, "dlopt diagnose", _READS_OF_CHECKPOINTS, command_keys=["output"], hints=_INITIAL)
    values = typed_values(overrides)
    checkpoint = load_checkpoint(path)
    run_config = saved_run_config(checkpoint.config, values, path)
    return _Subject(f"epoch {checkpoint.epoch}", run_config, {}, checkpoint=checkpoint)


def _check(subject: _Subject) -> None:
    processes = subject.run_config.parallel.arguments.get("processes")
    if current() is not None or (processes or 1) > 1:
        raise UserError("parallel: diagnose runs in one process; use parallel=single, without a launcher")


def _measure(subject: _Subject, keys: Mapping[str, int]) -> tuple["Diagnosis", "Facts"]:
    from dlopt.lab.diagnosis import measuring
    from dlopt.lab.diagnosis.measuring import has_skips, prepare
    from dlopt.lab.diagnosis.verdicts import Facts
    from dlopt.models.recurrent import LSTM
    from dlopt.training.clipping import Unclipped

    workload, training = prepare(subject.run_config, Path(os.devnull), subject.checkpoint)
    diagnosis = measuring.diagnose(subject.label, workload, training, **keys)
    model = subject.run_config.model
    layers = diagnosis.before.layers
    activations = [layer.activation for layer in layers if layer.activation is not None]
    facts = Facts(
        init=subject.choices.get("init", subject.run_config.init.target.__name__),
        norm=model.arguments.get("norm"),
        activation=max(activations, key=activations.count) if activations else None,
        has_skips=has_skips(model),
        is_recurrent=bool(diagnosis.before.lags),
        is_gated=model.is_a(LSTM),
        clip="none" if subject.run_config.clip.is_a(Unclipped) else "some",
        gradient_norms=diagnosis.trace.norms or diagnosis.before.total_norms,
    )
    return diagnosis, facts


def _command(line: Line, overrides: Sequence[str], change: str) -> str:
    """Returns the command that measures one combination again with a change, in place of its key and the keys below."""
    own = [each for each in line.typed if key_of(each) in ("updates", "batches", "eigenvalues", "iterations")]
    files = {"--config-dir": line.composer.config_dir, "--config-name": line.composer.config_name}
    flags = [text for flag, value in files.items() if value not in (None, CONFIG_NAME) for text in (flag, str(value))]
    key = key_of(change)
    kept = [each for each in overrides if key_of(each) != key and not key_of(each).startswith(f"{key}.")]
    return shlex.join(["dlopt", "diagnose", *flags, *kept, change, *own])


def _first_lines(
    diagnosis: "Diagnosis",
    layer_verdicts: Sequence[Sequence["Verdict"]],
    facts: "Facts",
    again: Callable[[str], str] | None,
) -> list[str]:
    """Returns three lines: which layers have a problem, why, and what to type; of the first snapshot with a problem.

    `again`: of an override, the command to measure again with it; None if there is none.
    """
    from dlopt.lab.diagnosis.verdicts import DEAD, LARGE, SATURATED, SMALL, remedies

    for snapshot, judged in zip(diagnosis.snapshots, layer_verdicts, strict=True):
        found = remedies(judged, facts)
        if not found:
            continue
        label = max(found, key=lambda each: sum(verdict.label == each for verdict in judged))
        layers = [(layer.name, verdict) for layer, verdict in zip(snapshot.layers, judged, strict=True)]
        named = {each: [name for name, verdict in layers if verdict.label == each] for each in found}
        which = [f"{each}: {_names(names)} ({len(names)} of {len(layers)} layers)" for each, names in named.items()]
        name, worst = next((name, verdict) for name, verdict in layers if verdict.label == label)
        # Not another model, which may lack the keys that were typed.
        changes = (each for each in found[label] if re.match(r"[\w.]+=", each) and key_of(each) != "model")
        change = next(changes, None)
        advice = f"try: {', '.join(found[label])}" if change is None or again is None else f"type: {again(change)}"
        return [f"{'; '.join(which)}, {_when(diagnosis, snapshot)}", f"why: {name} is {label}: {worst.reason}", advice]
    count = len(diagnosis.before.layers)
    return [
        f"healthy: all {count} layers, {' and '.join(_when(diagnosis, each) for each in diagnosis.snapshots)}",
        f"why: signals and gradients are {SMALL:g}x to {LARGE:g}x those of the first and the last layer; at most "
        f"{100 * max(DEAD, SATURATED):.0f} % of a layer is dead or saturated",
        "if it does not learn: type dlopt find-lr with the same keys, for the learning rate",
    ]


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{', '.join(names[:2])} and {len(names) - 2} more"


def _print(diagnosis: "Diagnosis", facts: "Facts", label: str, again: Callable[[str], str] | None) -> None:
    from dlopt.lab.diagnosis.verdicts import advice, clipping_norm, healthy, typed, verdicts

    console = standard_output()
    if label:
        console.print(f"\n{label}", style="bold")
    layer_verdicts = [verdicts(snapshot.layers, snapshot.lags) for snapshot in diagnosis.snapshots]
    for line in [*_first_lines(diagnosis, layer_verdicts, facts, again), ""]:
        console.print(line, soft_wrap=True)
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
        console.print(f"{_when(diagnosis, snapshot)}: {'; '.join(metrics)}", soft_wrap=True)
        for line in advice(judged, facts):
            console.print(f"  {line}", soft_wrap=True)
    after = diagnosis.after
    if diagnosis.trace.rates and not any(diagnosis.trace.rates):
        console.print("the updates changed nothing: the schedule has ended, the learning rate is 0; use updates=0")
    elif after is not None and not after.loss < diagnosis.before.loss:
        console.print(f"the loss did not fall: {diagnosis.before.loss:.4g} before, {after.loss:.4g} after the updates")
    norms = diagnosis.trace.norms
    if norms:
        count = format_count("updates", len(norms))
        line = f"gradient norms in {count}: median {_median(norms):.3g}, max {max(norms):.3g}"
        usual = clipping_norm(healthy(norms))
        if usual is not None:
            first = len(healthy(norms))
            which = "the updates" if first == len(norms) else f"the first {first} updates, before the gradient exploded"
            line += f"; to clip half of {which}: clip=norm clip.max_norm={typed(usual)}"
        console.print(line, soft_wrap=True)
    if diagnosis.trace.ended:
        console.print(f"training stopped early: {diagnosis.trace.ended}", soft_wrap=True)


def _when(diagnosis: "Diagnosis", snapshot: "Snapshot") -> str:
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


def _table(diagnosis: "Diagnosis", layer_verdicts: Sequence[Sequence["Verdict"]], *, is_brief: bool = False) -> Any:
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


def _attention_table(diagnosis: "Diagnosis") -> Any:
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


def _write(folder: Path, results: Sequence[tuple["Diagnosis", "Facts"]], title: str) -> list[Path]:
    """Writes the plots, diagnosis.json (all metrics; null for non-finite values) and TensorBoard histograms."""
    from dlopt.lab.diagnosis.plots import plots

    paths, diagnoses = [], [diagnosis for diagnosis, _ in results]
    with writing(folder):
        for name, figure in plots(diagnoses, title).items():
            paths += drawing.save(figure, folder, name)
        write_json(folder / "diagnosis.json", without_nan([_record(*each) for each in results]), indent=1)
        _histograms(folder, diagnoses)
    return [*paths, folder / "diagnosis.json", folder / "tensorboard"]


def _record(diagnosis: "Diagnosis", facts: "Facts") -> dict[str, Any]:
    path = diagnosis.trace
    return {
        "label": diagnosis.label,
        "snapshots": [_snapshot(each, facts) for each in diagnosis.snapshots],
        "updates": {name: getattr(path, name) for name in ("losses", "norms", "clipped", "ratios", "along", "ended")},
        "curvature_along_updates": {str(update): value for update, value in path.curvatures.items()},
    }


def _snapshot(snapshot: "Snapshot", facts: "Facts") -> dict[str, Any]:
    from dlopt.lab.diagnosis.verdicts import advice, verdicts

    judged = verdicts(snapshot.layers, snapshot.lags)
    layers = [
        {
            "name": layer.name,
            "kind": layer.kind,
            "activation": layer.activation,
            "input_std": layer.inputs.std,
            "output_mean": layer.outputs.mean,
            "output_std": layer.outputs.std,
            "gradient_std": layer.gradients.std,
            "gradient_norm": layer.gradient_norm,
            "weight_gradient_norms": snapshot.gradient_norms.get(layer.name),
            "noise_scale": snapshot.noise_scales.get(layer.name),
            "saturated": layer.saturated,
            "dead": layer.dead,
            "verdict": verdict.label,
            "reason": verdict.reason,
        }
        for layer, verdict in zip(snapshot.layers, judged, strict=True)
    ]
    spectrum = snapshot.spectrum
    return {
        "updates": snapshot.updates,
        "loss": snapshot.loss,
        "advice": advice(judged, facts),
        "gradient_norms": snapshot.total_norms,
        "noise_scale": snapshot.noise_scale,
        "eigenvalues": None if spectrum is None else spectrum.eigenvalues.tolist(),
        "residuals": None if spectrum is None else spectrum.residuals.tolist(),
        "time_lag": [vars(lag) for lag in snapshot.lags],
        "attention": [vars(layer) for layer in snapshot.attention],
        "layers": layers,
    }


def _histograms(folder: Path, diagnoses: Sequence["Diagnosis"]) -> None:
    from dlopt.tracking.tensorboard import TensorBoard

    for number, diagnosis in enumerate(diagnoses):
        label = re.sub(r"[^\w.-]", "_", diagnosis.label)[:60]
        name = "tensorboard" if len(diagnoses) == 1 else f"tensorboard/{number}_{label}"
        board = TensorBoard(folder / name, print)
        for snapshot in diagnosis.snapshots:
            for kind in ("outputs", "gradients"):
                tags = {f"{kind}/{layer.name}": getattr(layer, kind).values for layer in snapshot.layers}
                board.histograms(snapshot.updates, tags)
        board.close()
