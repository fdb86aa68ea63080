"""`dlopt diagnose`: measures activations, gradients and curvature, with plots, a table and advice."""

import contextlib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from dlopt.basics.plain_values import without_nan
from dlopt.commands.shared.command_line import Combination, saved_run_config, skipped_keys
from dlopt.config.choices import CONFIG_NAME
from dlopt.config.overrides import key_of
from dlopt.config.reads import LEARNING_RATE, RECIPE, UPDATE, refuse_unread
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
from dlopt.machine.world import current
from dlopt.results import drawing

if TYPE_CHECKING:
    from dlopt.extend import Checkpoint, RunConfig
    from dlopt.lab.diagnosis.measuring import Diagnosis, Snapshot
    from dlopt.lab.diagnosis.verdicts import Facts

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
    from dlopt.lab.diagnosis.printing import print_diagnosis
    from dlopt.trained.restore import fitting

    with contextlib.nullcontext() if checkpoint is None else fitting(checkpoint):
        results = [_measure(subject, keys) for subject in subjects]
    folder = folder or output_folder(None, "diagnose")
    for (diagnosis, facts), subject in zip(results, subjects, strict=True):
        again = None if subject.job is None else partial(_command, line, subject.job.overrides)
        print_diagnosis(diagnosis, facts, subject.label if len(subjects) > 1 else "", again)
    written = _write(folder, results, title)
    skipped = skipped_keys([(subject.label, subject.job) for subject in subjects if subject.job is not None])
    names = ", ".join(path.name for path in written if path.suffix == ".png")
    print(f"{short_path(folder)}: {names} (and .svg), diagnosis.json, tensorboard", *skipped, sep="\n")
    return DONE


def _subject(line: Line, job: Combination) -> _Subject:
    run_config, choices = line.run_config(job.overrides)
    return _Subject(job.label(choices, "model"), run_config, choices, job)


def _trained(path: Path, overrides: Sequence[str]) -> _Subject:
    from dlopt.config.saved import checkpoint_file, typed_values  # imports OmegaConf
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
    from dlopt.lab.diagnosis.causes import Recipe, find_cause
    from dlopt.lab.diagnosis.measuring import has_skips, prepare
    from dlopt.lab.diagnosis.verdicts import Facts, verdicts
    from dlopt.models.recurrent import LSTM
    from dlopt.training.clipping import Unclipped

    workload, training = prepare(subject.run_config, Path(os.devnull), subject.checkpoint)
    diagnosis = measuring.diagnose(subject.label, workload, training, **keys)
    model = subject.run_config.model
    layers = diagnosis.before.layers
    activations = [layer.activation for layer in layers if layer.activation is not None]
    activation = max(activations, key=activations.count) if activations else None
    run_config = subject.run_config
    recipe = Recipe(
        init=subject.choices.get("init", run_config.init.target.__name__),
        normalize=subject.choices.get("normalize", run_config.normalize.target.__name__),
        lr=run_config.optimizer.arguments.get("lr"),
        activation=activation,
    )
    judged = [verdicts(each.layers, each.lags) for each in diagnosis.snapshots]
    facts = Facts(
        init=recipe.init,
        norm=model.arguments.get("norm"),
        activation=activation,
        has_skips=has_skips(model),
        is_recurrent=bool(diagnosis.before.lags),
        is_gated=model.is_a(LSTM),
        clip="none" if subject.run_config.clip.is_a(Unclipped) else "some",
        gradient_norms=diagnosis.trace.norms or diagnosis.before.total_norms,
        cause=find_cause(diagnosis, judged, recipe, partial(_found_lr, subject)),
    )
    return diagnosis, facts


def _found_lr(subject: _Subject) -> float | None:
    """Returns the learning rate that `dlopt find-lr` finds; None for a checkpoint, whose weights it does not load."""
    from dlopt.instruments.lr_range import steepest_rate

    return steepest_rate(subject.run_config) if subject.checkpoint is None else None


def _command(line: Line, overrides: Sequence[str], change: str) -> str:
    """Returns the command that measures one combination again with a change, in place of its key and the keys below."""
    own = [each for each in line.typed if key_of(each) in ("updates", "batches", "eigenvalues", "iterations")]
    files = {"--config-dir": line.composer.config_dir, "--config-name": line.composer.config_name}
    flags = [text for flag, value in files.items() if value not in (None, CONFIG_NAME) for text in (flag, str(value))]
    key = key_of(change)
    kept = [each for each in overrides if key_of(each) != key and not key_of(each).startswith(f"{key}.")]
    return shlex.join(["dlopt", "diagnose", *flags, *kept, change, *own])


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
