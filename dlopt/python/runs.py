"""Runs of earlier commands from Python: `dlopt.runs` lists them, `dlopt.open_run` opens one. Imports no torch."""

import functools
import warnings
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlopt.basics.errors import FileError, UserError, require_package
from dlopt.basics.files import read_json
from dlopt.basics.folders import short_path
from dlopt.basics.formats import format_value
from dlopt.metrics.names import FINAL_TAGS, split_of
from dlopt.metrics.shown import format_metric, shown_in
from dlopt.results import reading
from dlopt.results.listing import Query
from dlopt.results.reading import Condition, Damaged, Record
from dlopt.tracking.metrics import SUMMARY

if TYPE_CHECKING:
    from dlopt.python.model import Model

_PICTURES = (".png", ".svg", ".pdf")
_SHOWN = [each.name for each in shown_in("python")]


class Run(Record):
    """A run as its folder tells it.

    Attributes:
        path: the folder.
        status: finished, stopped_early, pruned, running, interrupted, unfinished (killed) or failed.
        config: values by dotted key (`config["optimizer.lr"]`); a group's name maps to its choice
            (`config["optimizer"]` is `"sgd"`). Lists are tuples.
        overrides: what was typed.
        commit: of the Git repository that the run started in; None without one.
        metrics: those of the best epoch (`val_loss`, `val_accuracy`, `train_loss`), of the run (`epochs`, `steps`,
            `seconds`, `parameters`) and of the final test (`test_loss`). Missing and non-finite values are left out.
        history: the evaluated epochs, as in metrics.jsonl, with the generalization gaps. `pandas.DataFrame(history)`
            has a row per epoch.
        reason: why a failed run failed.
    """

    def __repr__(self) -> str:
        return _line(self)

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags set by `dlopt train tags=[...]` or `dlopt runs tag`."""
        return reading.tags_of(self)

    @property
    def note(self) -> str | None:
        """The note set by `dlopt train note=...` or `dlopt runs tag`."""
        return None if (note := self.config.get("note")) is None else str(note)

    @property
    def best(self) -> dict[str, float]:
        """Validation metrics of the best epoch, and its number (`best_epoch`)."""
        return {key: value for key, value in self.metrics.items() if split_of(key) == "val" or key == "best_epoch"}

    @property
    def test(self) -> dict[str, float]:
        """Test metrics of the best model. Compare runs by `best`: to choose by `test` is selection on the test set."""
        return {key: value for key, value in self.metrics.items() if split_of(key) == "test"}

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json; {} while there is none."""
        return read_json(self.path / SUMMARY) or {}

    @functools.cached_property
    def steps(self) -> list[dict[str, float]]:
        """What was logged per update, by TensorBoard tag (`train/loss`, `lr`, ...), with `step`, from 1.

        [] without TensorBoard files (`tracking=[]`). Raises `UserError` for unreadable ones.
        """
        from dlopt.tracking.tensorboard import read_scalars

        lines = [
            {tag: value for tag, value in line.items() if not tag.startswith(FINAL_TAGS)}
            for line in read_scalars(self.path / "tensorboard")
        ]
        return [line for line in lines if line.keys() != {"step"}]

    @property
    def pictures(self) -> list[Path]:
        """Pictures in the folder: curves.png, find_lr.png, ..."""
        return sorted(path for path in self.path.iterdir() if path.suffix in _PICTURES and path.is_file())

    @functools.cached_property
    def model(self) -> "Model":
        """The best model by the validation metric: `dlopt.load(path)`."""
        from dlopt.python.model import load

        return load(self.path)


def _line(run: Run, keys: Sequence[str] = ()) -> str:
    """Describes a run in one line, with the values of some keys of its config."""
    values = [f"{key} {format_value(run.config[key])}" for key in keys if run.config.get(key) is not None]
    texts = [f"{key} {format_metric(key, run.metrics[key])}" for key in _SHOWN if key in run.metrics]
    return f"<{run.status}: {', '.join([*values, *(texts or [run.reason or 'no metrics'])])}; {short_path(run.path)}>"


class Runs(list[Run]):
    """A list of runs that pandas can tabulate."""

    def __repr__(self) -> str:
        """One line per run, with what varies between them."""
        varying = reading.varying_keys([run.config for run in self]) if len(self) > 1 else []
        varying = [key for key in varying if key not in _SHOWN]
        varying += ["seed"] if len({run.config.get("seed") for run in self}) > 1 else []
        return "\n".join(_line(run, varying) for run in self) or "no runs"

    def to_pandas(self) -> Any:
        """Returns a `pandas.DataFrame` with a row per run: path, status, keys of the config, metrics.

        A key with the name of a metric is `config.KEY`: `epochs` are the epochs trained, `config.epochs` those of the
        config. Raises `UserError` without pandas.
        """
        require_package("to_pandas()", "pandas")
        import pandas

        metrics = {name for run in self for name in run.metrics}
        rows = [
            {
                "path": str(run.path),
                "status": run.status,
                **{f"config.{key}" if key in metrics else key: value for key, value in run.config.items()},
                **run.metrics,
            }
            for run in self
        ]
        return pandas.DataFrame(rows)


def runs(
    folder: str | PathLike[str] | Sequence[str | PathLike[str]] = "outputs",
    where: Sequence[str] = (),
    *,
    sort: str | None = None,
) -> Runs:
    """Lists the runs in and below a folder, or several, like `dlopt runs`. Warns of damaged folders.

    Args:
        folder: a folder, or a list of folders.
        where: conditions that all hold: `["optimizer=adamw", "val_accuracy>0.9", "status=finished"]`.
        sort: a metric (best first) or a key of the config (ascending); by default, runs are sorted by path.

    Raises:
        UserError: no such folder, or a key that no run has.
    """
    if isinstance(where, str):  # would be read letter by letter
        raise UserError(f"runs(where={where!r}): must be a list: where={where.split()}")
    folders = [Path(each) for each in ([folder] if isinstance(folder, str | PathLike) else folder)]
    for each in folders:
        if not each.is_dir():
            raise FileError(f"runs({str(each)!r}): no such folder")
    records, damaged = Query(folders, [_condition(line) for line in where], sort).find()
    for found in damaged:
        warnings.warn(f"{short_path(found.path)}: skipped: {found.reason}", stacklevel=2)
    return Runs(Run(**vars(each)) for each in records)


def open_run(path: str | PathLike[str]) -> Run:
    """Opens one run folder. Raises `UserError` for a folder that is not one, or is damaged."""
    folder = Path(fspath(path)).absolute()
    if not folder.is_dir():
        raise FileError(f"open_run({fspath(path)!r}): no such folder")
    found = reading.read(folder)
    if isinstance(found, Damaged):
        is_parent = not (folder / "config.yaml").exists() and next(reading.find(folder), None) is not None
        hint = "; it contains runs, which dlopt.runs lists" if is_parent else ""
        raise UserError(f"open_run({fspath(path)!r}): not a readable run: {found.reason}{hint}")
    return Run(**vars(found))


def _condition(line: str) -> Condition:
    parsed = reading.condition(line)
    if parsed is None:
        raise UserError(f"runs(where=[{line!r}]): must be a condition: optimizer=adamw, val_accuracy>0.9, ...")
    return parsed
