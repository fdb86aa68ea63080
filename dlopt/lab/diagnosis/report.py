"""What `dlopt report` shows of `dlopt diagnose`: its result in the folder of a run, and the command to run it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dlopt.basics.plain_values import load_json
from dlopt.extend import Record, Section, Table, printable, short_path
from dlopt.lab.diagnosis.command import READS
from dlopt.metrics.shown import format_metric
from dlopt.results.tables import RunSection

_FOLDER = "diagnosis"  # in the folder of the run
_KEYS = tuple(key for key in READS if key != "parallel")  # diagnose runs in one process
_MAX_LAYERS = 60
_LEARNED = 0.5  # training accuracy from which a run has learned something, even if its first epoch did, too
_RISE, _FALL = 0.01, 0.01  # of the training accuracy, and of the training loss relative to its first value


def section(records: Iterable[Record]) -> Section:
    """Returns the part of each run's view: why to diagnose it, the command, and the result of an earlier one."""
    return Section("Diagnosis", runs={record.path: _of_run(record) for record in records})


def _of_run(record: Record) -> RunSection:
    problem, output = problem_of(record), record.path / _FOLDER
    lines, table = _result(record)
    has_found_rate = record.config.get("optimizer.lr") == "auto"  # by a range test, which only `dlopt train` makes
    model = [f"checkpoint={short_path(record.path)}"] if has_found_rate else []
    arguments, keys = ["diagnose", *model, f"output={short_path(output)}"], () if has_found_rate else _KEYS
    return RunSection([*([problem] if problem else []), *lines], arguments, keys, table, is_urgent=problem is not None)


def problem_of(record: Record) -> str | None:
    """Returns why a run did not train, in one line; None if it did, or if that is unknown."""
    if record.status == "failed":
        return "The run failed."
    if len(record.history) < 2:
        return None
    first, last = record.history[0], record.history[-1]
    for name, has_learned in (
        ("train_loss", lambda before, after: after < before - _FALL * abs(before)),
        ("train_accuracy", lambda before, after: after > min(before + _RISE, _LEARNED)),
    ):
        if name in first and name in last and not has_learned(first[name], last[name]):
            words = "loss did not fall" if name == "train_loss" else "accuracy did not rise"
            values = " to ".join(format_metric(name, line[name]) for line in (first, last))
            return f"The training {words}: {values}."
    return None


def _result(record: Record) -> tuple[list[str], Table | None]:
    """Returns the losses, the advice and the verdicts of diagnosis.json; nothing if there is no valid one."""
    for file in (record.path / _FOLDER / "diagnosis.json", record.path / "diagnosis.json"):
        try:
            snapshots = load_json(file)[0]["snapshots"]
            return _lines(snapshots), _table(snapshots)
        except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError, OverflowError):
            continue
    return [], None


def _lines(snapshots: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    for snapshot in snapshots[:2]:
        loss, advice = snapshot["loss"], snapshot.get("advice") or []
        found.append(f"{_when(snapshot)}: loss {_number(loss)}")
        found += [f"{_when(snapshot)}: {printable(str(line))}" for line in advice[:20]]
    return found


def _table(snapshots: Sequence[Mapping[str, Any]]) -> Table:
    columns = [{layer["name"]: layer for layer in snapshot["layers"]} for snapshot in snapshots[:2]]
    rows = []
    for name, layer in list(columns[0].items())[:_MAX_LAYERS]:
        verdicts = [_verdict(layers[name]) if name in layers else "" for layers in columns]
        inactive = layer["saturated"] if layer["dead"] is None else layer["dead"]
        numbers = _number(layer["output_std"]), "" if inactive is None else f"{100 * inactive:.0f} %"
        rows.append([str(name), str(layer["activation"] or ""), *verdicts, *numbers, _number(layer["gradient_norm"])])
    heads = ["layer", "activation", *map(_when, snapshots[:2]), "std", "saturated or dead", "gradient norm"]
    return Table(heads, rows, texts=2 + len(columns))


def _when(snapshot: Mapping[str, Any]) -> str:
    return f"after {int(snapshot['updates'])} updates" if snapshot["updates"] else "before"


def _verdict(layer: Mapping[str, Any]) -> str:
    return str(layer["verdict"]) if layer["verdict"] == "healthy" else f"{layer['verdict']}: {layer['reason']}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
