"""`dlopt train experiment=...` where the experiment file compares: small runs one after another, and one picture.

In this process, since a lecture's runs take a second or less each, and starting a process as long as several of them.
What a file compares stands under its key `comparison`, which no other command looks at.
"""

import gc
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from dlopt.config.compose import Composer, choices_of, parse_arguments, to_plain, typed_folder
from dlopt.config.resuming import refuse_other_config
from dlopt.config.schema import check_arguments
from dlopt.errors import UserError
from dlopt.folders import RunFolder, make, make_new
from dlopt.parallel.rendezvous import current

if TYPE_CHECKING:
    from dlopt.analysis.comparison import Cell, Comparison, Outcome
    from dlopt.config.experiment import Experiment

PICTURE = "comparison"
_METRICS = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "test_loss", "test_accuracy")


@dataclass(frozen=True)
class _Run:
    cell: "Cell"
    overrides: list[str]
    experiment: "Experiment"
    saved: Mapping[str, Any]
    choices: Mapping[str, str]


def compare(composer: Composer, parsed: Namespace, config: DictConfig) -> int:
    """Runs, draws, prints a table; returns the exit code. Raises `UserError` before anything is made."""
    from dlopt.analysis.comparison import draw, table
    from dlopt.analysis.drawing import save

    if current() is not None:
        raise UserError("a comparison starts its runs itself: not inside torchrun or srun; start it from a shell")
    comparison = comparison_of(composer, config, parsed.overrides)
    runs = _runs(composer, comparison, parsed.overrides)
    if config.dry_run is True:
        return _list(runs)
    folder = _folder(config, parsed.overrides, runs)
    print(f"{comparison.title}: {len(runs)} runs in {folder}", flush=True)
    gc.freeze()  # every run ends with a full collection, which need not look at the libraries' objects again
    try:
        outcomes, code = _execute(runs, folder, comparison)
    finally:
        gc.unfreeze()
    if code:
        return code
    for line in (
        *table(comparison, outcomes),
        comparison.see,
        *map(str, save(draw(comparison, outcomes), folder, PICTURE)),
    ):
        print(line)
    return 0


def _list(runs: list[_Run]) -> int:
    """What would run, and an estimate of the time."""
    from dlopt.sweeps.grid import estimate_line, seconds_of

    for number, run in enumerate(runs):
        print(f"run {number}: {' '.join(run.overrides)}")
    print(estimate_line(seconds_of([run.saved for run in runs], runs[0].choices), len(runs), 1))
    return 0


def comparison_of(composer: Composer, config: DictConfig, overrides: list[str]) -> "Comparison":
    """What the file says; a key that is typed is no axis any more, and a typed seed is the only one."""
    from dlopt.analysis.comparison import Comparison
    from dlopt.analysis.probes import PROBES

    if not OmegaConf.is_dict(config.comparison):
        raise UserError(f"comparison={config.comparison}: allowed: a mapping, or null for the recipe by itself")
    node = OmegaConf.to_container(config.comparison, resolve=True)
    assert isinstance(node, dict)
    comparison = Comparison(**check_arguments("comparison", Comparison, {str(k): v for k, v in node.items()}))
    for name in ("variants", "seeds", "metrics"):
        if not getattr(comparison, name):
            raise UserError(f"comparison.{name}: at least one is needed")
    for metric in comparison.metrics:
        if metric not in (*_METRICS, *PROBES) and not metric.startswith("val_"):
            raise UserError(f"comparison.metrics: a run has no {metric}; allowed: {', '.join((*_METRICS, *PROBES))}")
    if len(comparison.along) > 2:
        raise UserError(f"comparison.along: {len(comparison.along)} keys; a picture has room for two")
    if len(comparison.along) == 2 and len(comparison.metrics) > 1:
        raise UserError("comparison.metrics: heat maps show one metric")
    given: dict[str, Any] = {each.get_key_element(): each.value() for each in composer.parse(overrides)}
    points: dict[str, list[str]] = {}
    for key, values in comparison.along.items():
        if isinstance(values, dict):
            points |= {f"{key} {label}": lines for label, lines in values.items()}
        else:
            _refuse_powers(key, key)
    for variant, lines in {**points, **comparison.variants}.items():
        for line in lines:
            _refuse_powers(line, line.partition("=")[0])
            if line.partition("=")[0] in given:
                raise UserError(f"{line.partition('=')[0]}: this comparison varies it ({variant}: {line})")
    along = {key: values for key, values in comparison.along.items() if key not in given}
    return replace(comparison, along=along, seeds=[given["seed"]] if "seed" in given else comparison.seeds)


def _refuse_powers(line: str, key: str) -> None:
    """What a person has to type, and what is the command's own, is not for a file to say."""
    if key.lstrip("+~").split(".")[0].split("/")[0] in (
        "allow_packages",
        "hydra",
        "comparison",
        "resume",
        "experiment",
    ):
        raise UserError(f"comparison: {line}: a comparison may not set this")


def _runs(composer: Composer, comparison: "Comparison", overrides: list[str]) -> list[_Run]:
    from dlopt.config.parsing import parse

    given = [line for line in overrides if not line.startswith(("seed=", "comparison.", "hydra."))]
    found = []
    for cell in comparison.cells():
        lines = [*given, *parse_arguments(comparison.overrides(cell)).overrides]
        config = composer.compose(lines)
        plain, saved = to_plain(config, overrides)
        found.append(_Run(cell, lines, parse(plain, saved), saved, choices_of(config)))
    return found


def _folder(config: DictConfig, overrides: list[str], runs: list[_Run]) -> Path:
    """The folder of the comparison, made if need be; that of a run is its number in it."""
    wanted, is_typed = typed_folder(config, "hydra.run.dir", overrides)
    if not is_typed:
        return make_new(wanted, "hydra.run.dir")
    if not wanted.is_dir():
        return make(wanted, "hydra.run.dir")
    for number, run in enumerate(runs):
        folder = RunFolder(wanted / str(number))
        if folder.holds_a_run():
            if run.saved["resume"] != "auto":
                raise UserError(f"hydra.run.dir={wanted}: this folder holds runs; resume them with resume=auto")
            refuse_other_config(folder.config() or run.saved, run.saved, str(folder.path), folder.history())
    return wanted


def _execute(runs: list[_Run], folder: Path, comparison: "Comparison") -> "tuple[dict[Cell, Outcome], int]":
    """What the runs leave, and the exit code. One that diverges is a result, too; any other failure is the end."""
    from dlopt.analysis.comparison import read, show, typed
    from dlopt.job import FAILED, INTERRUPTED, USER_ERROR, execute
    from dlopt.training.checkpoint import Checkpoints
    from dlopt.training.trainer import Run

    outcomes: dict[Cell, Outcome] = {}
    for number, each in enumerate(runs):
        place = RunFolder(folder / str(number))
        if not (place.holds_a_run() and place.is_done(each.saved)):
            place.path.mkdir(exist_ok=True)
            state = Checkpoints(place.checkpoints).load_newest() if place.holds_a_run() else None
            code = execute(Run(each.experiment, place.path, state, each.choices), typed=each.overrides, console=False)
            if code in (INTERRUPTED, USER_ERROR) or (code == FAILED and not (place.summary() or {}).get("diverged")):
                return outcomes, code
        outcome = outcomes[each.cell] = read(place.path, comparison.metrics)
        cell = each.cell
        words = [cell.variant, *(f"{k}={typed(v)}" for k, v in zip(comparison.along, cell.point, strict=True))]
        metrics = ", ".join(f"{name} {show(outcome.final(name))}" for name in comparison.metrics)
        print(f"  {number + 1}/{len(runs)} {', '.join(words)}, seed {cell.seed}: {metrics}", flush=True)
    return outcomes, 0
