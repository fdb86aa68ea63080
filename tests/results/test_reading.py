import json
import os
import sys
from pathlib import Path
from subprocess import run

import pytest

from dlopt.basics.folders import FORMAT
from dlopt.basics.formats import format_value as text
from dlopt.basics.formats import printable
from dlopt.results import reading
from dlopt.results.reading import (
    Damaged,
    Record,
    RunReader,
    condition,
    find,
    read,
    short_key,
    varying_keys,
)
from dlopt.training.stopping import Best
from tests.support.folders import make_run, table
from tests.support.line import HeldByAnotherProcess


def record(path: Path) -> Record:
    result = read(path)
    assert isinstance(result, Record), result
    return result


def test_reads_config_metrics_and_history(tmp_path: Path) -> None:
    result = record(make_run(tmp_path / "run", optimizer="adamw", lr=0.01, accuracies=(0.5, 0.9, 0.8)))
    assert (result.status, result.reason, result.commit) == ("finished", None, "c" * 40)
    assert result.config["optimizer"] == "adamw" and result.config["optimizer.betas"] == (0.9, 0.999)
    assert result.config["clip"] == "none" and result.config["model.widths"] == (64, 64)
    assert "optimizer._target_" not in result.config
    assert result.overrides == ("optimizer=adamw", "optimizer.lr=0.01", "seed=0")
    expected = {"val_accuracy": 0.9, "val_loss": 0.1, "train_accuracy": 0.9, "epochs": 3, "steps": 30, "best_epoch": 2}
    assert {key: result.metrics[key] for key in expected} == pytest.approx(expected)
    assert result.metrics["gap"] == result.metrics["accuracy_gap"] == 0  # of the best epoch
    assert result.metrics["test_accuracy"] == 0.75 and result.metrics["seconds"] == 3
    assert [line["step"] for line in result.history] == [10, 20, 30]


def test_run_without_summary_has_metrics_of_best_epoch(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", accuracies=(0.5, 0.9, 0.8), status=None)
    result = record(path)
    assert result.status == "unfinished" and result.metrics["val_accuracy"] == 0.9 and result.metrics["epochs"] == 3
    with HeldByAnotherProcess(path):
        assert record(path).status == "running"


def test_resumed_run_is_running_despite_old_summary(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", status="interrupted")
    assert record(path).status == "interrupted"
    with HeldByAnotherProcess(path):
        assert record(path).status == "running"


def test_best_epoch_follows_monitor_and_ignores_non_finite_values(tmp_path: Path) -> None:
    path = make_run(
        tmp_path / "run", status=None, accuracies=(0.9, 0.5), losses=(2.0, 1.0), config={"monitor": "val_loss"}
    )
    assert record(path).metrics["val_accuracy"] == 0.5
    line = {"epoch": 3, "step": 30, "val_loss": None, "val_accuracy": float("nan"), "note": "<b>", "odd": True}
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert record(path).history[-1] == {"epoch": 3, "step": 30}


def test_rates_and_training_metrics_of_the_last_epoch_are_no_metrics_of_the_run(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    line = {"epoch": 9, "step": 90, "lr": 0.1, "weight_decay": 0.2, "train_top5": 0.3}
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    result = record(path)
    assert result.history[-1] == line
    assert not {"lr", "weight_decay", "train_top5"} & result.metrics.keys()


def test_all_metrics_are_of_the_best_epoch_and_costs_of_the_whole_run(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", status=None)
    lines = [
        {"epoch": i, "step": 10 * i, "seconds": 2.5 * i, "evaluations": 20 * i, "train_loss": 4.0 / i, "val_loss": loss}
        | {"train_accuracy": 0.25 * i, "val_accuracy": accuracy}
        for i, (loss, accuracy) in enumerate([(3.5, 0.5), (1.25, 0.875), (1.5, 0.625)], 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = {"train_loss": 2.0, "val_loss": 1.25, "gap": -0.75, "train_accuracy": 0.5, "val_accuracy": 0.875}
    expected |= {"accuracy_gap": -0.375, "best_epoch": 2, "epochs": 3, "steps": 30, "seconds": 7.5, "evaluations": 60}
    assert record(path).metrics == expected
    lines[1].pop("train_loss")  # it was not finite
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert record(path).metrics == {k: v for k, v in expected.items() if k not in ("train_loss", "gap")}
    for line in lines:
        del line["val_accuracy"], line["val_loss"]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert record(path).metrics["train_accuracy"] == 0.75, "without a validation, the last epoch"


def test_ties_of_the_best_epoch_are_broken_by_the_loss_as_in_training(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", accuracies=(0.5, 0.9, 0.9, 0.9), losses=(2.0, 0.4, 0.3, 0.35))
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    best = Best("val_accuracy")
    for i, line in enumerate(lines):
        line |= {"train_loss": 0.1 * i, "val_macro_f1": 0.1 * i}
        best.update(line)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = json.loads((path / "summary.json").read_text())
    summary |= {"best_epoch": best.epoch, "best_val_loss": best.val_loss}
    (path / "summary.json").write_text(json.dumps(summary))
    metrics = record(path).metrics
    assert (metrics["best_epoch"], metrics["val_loss"], metrics["val_macro_f1"]) == (3, 0.3, 0.2)
    assert metrics["gap"] == pytest.approx(0.3 - 0.2)
    (path / "summary.json").unlink()
    assert record(path).metrics["best_epoch"] == 3


def test_the_best_epoch_is_that_of_the_summary(tmp_path: Path) -> None:
    """A run may have selected it by another rule before it was resumed and killed."""
    path = make_run(tmp_path / "run", accuracies=(0.5, 0.6, 0.9))
    lines = [{**json.loads(line), "val_macro_f1": 0.1} for line in (path / "metrics.jsonl").read_text().splitlines()]
    lines[1]["val_macro_f1"] = 0.2
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for best_epoch, expected in (2, 0.2), (None, 0.1), ([7], 0.1):
        summary = json.loads((path / "summary.json").read_text()) | {"best_epoch": best_epoch}
        (path / "summary.json").write_text(json.dumps(summary))
        assert record(path).metrics["val_macro_f1"] == expected


def test_ignores_incomplete_last_line_of_a_killed_run(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", status=None)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "st')
    assert len(record(path).history) == 3


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.yaml", b"a: [1", "config.yaml is damaged"),
        ("config.yaml", b"- a", "holds no keys"),
        ("config.yaml", b"\xff\xfe\x00", "config.yaml is damaged"),
        ("config.yaml", b"a: !!python/object/apply:os.system ['touch x']", "config.yaml is damaged"),
        ("config.yaml", None, "config.yaml is missing"),
        ("config.yaml", b"[" * 100_000, "config.yaml is damaged: is nested"),
        ("config.yaml", b"seed: " + b"9" * 1000, "config.yaml is damaged: has an integer"),
        ("config.yaml", b"a: &a [*a]", "config.yaml is damaged: has aliases"),
        ("environment.json", b"[" * 100_000, "environment.json is damaged"),
        ("summary.json", b"{", "summary.json is damaged"),
        ("summary.json", b"[]", "summary.json is damaged"),
        ("summary.json", b'{"status": "wonderful"}', "status is 'wonderful'"),
        ("metrics.jsonl", b'{"epoch": 1}\n', "line 1: no epoch and step"),
        ("metrics.jsonl", b'\0\0\0\n{"epoch": 1, "step": 1}\n', "damaged in line 1"),
        ("metrics.jsonl", b"[" * 100_000 + b"\n\n", "damaged in line 1"),
    ],
)
def test_reports_damaged_files(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    path = make_run(tmp_path / "run")
    (path / name).unlink() if content is None else (path / name).write_bytes(content)
    result = read(path)
    assert isinstance(result, Damaged) and reason in result.reason


def test_finds_run_folders_recursively_without_duplicates(tmp_path: Path) -> None:
    for number in (0, 2, 10):
        make_run(tmp_path / "sweep" / str(number))
    make_run(tmp_path / "single")
    (tmp_path / "sweep/report").mkdir()
    make_run(tmp_path / "sweep/0/tensorboard/0")  # subfolders of a run contain no runs
    make_run(tmp_path / "report/tensorboard/7")  # elsewhere, any folder name is allowed
    (tmp_path / "sweep/2/metrics.jsonl").write_text("?\n?\n")
    (tmp_path / "sweep/loop").symlink_to(tmp_path, target_is_directory=True)
    assert [path.name for path in find(tmp_path)] == ["7", "single", "0", "2", "10"]
    records, damaged = RunReader().read([tmp_path / "sweep", tmp_path, tmp_path / "sweep/0"])
    assert [each.path.name for each in records] == ["0", "10", "7", "single"]
    assert [each.path.name for each in damaged] == ["2"]


def test_rereads_only_changed_runs(tmp_path: Path) -> None:
    for number in range(3):
        make_run(tmp_path / str(number), status=None)
    reader = RunReader()
    before, _ = reader.read([tmp_path])
    with (tmp_path / "1/metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "step": 40}\n')
    after, _ = reader.read([tmp_path])
    assert [old is new for old, new in zip(before, after, strict=True)] == [True, False, True]
    assert len(after[1].history) == 4


def test_varying_keys_exclude_seeds_and_keys_implied_by_choices() -> None:
    sgd = {"seed": 0, "optimizer": "sgd", "optimizer.lr": 0.1, "optimizer.momentum": 0.9, "name": "a"}
    configs = [
        sgd,
        {**sgd, "optimizer.lr": 0.2, "seed": 1},
        {"seed": 0, "optimizer": "adamw", "optimizer.lr": 0.1, "optimizer.betas": (0.9, 0.99), "name": "b"},
    ]
    assert varying_keys(configs) == ["optimizer", "optimizer.lr"]
    assert varying_keys([*configs, {**sgd, "optimizer.momentum": 0.5}]) == [
        "optimizer",
        "optimizer.lr",
        "optimizer.momentum",
    ]
    assert varying_keys(configs[:1]) == []


def test_a_key_that_only_some_runs_of_a_choice_have_varies() -> None:
    plain = {"model": "mlp", "optimizer": "lion", "optimizer.lr": 0.3, "epochs": 4}
    more = {**plain, "optimizer.foo": 7, "model.extra": "on"}
    assert varying_keys([plain, more]) == varying_keys([more, plain]) == ["optimizer.foo", "model.extra"]
    other = {"model": "cnn", "optimizer": "rprop", "optimizer.lr": 0.3, "epochs": 4, "optimizer.etas": (0.5, 1.2)}
    assert varying_keys([plain, other]) == ["model", "optimizer"], "etas follow from the optimizer"
    assert varying_keys([plain, other, {**more, "model.extra": None}]) == ["model", "optimizer", "optimizer.foo"]
    known = {"optimizer.foo": 7, "model.extra": "on"}
    keys = ["model", "optimizer", "optimizer.foo"]
    assert varying_keys([{**more, "model": "cnn"}, plain, {**other, **known}]) == keys, "extra follows from the model"


def test_formats_values_as_in_overrides() -> None:
    assert [text(value) for value in (True, None, 0.1, 3, (64, 64), "a")] == [
        "true",
        "null",
        "0.1",
        "3",
        "[64,64]",
        "a",
    ]
    assert printable("a\x1b[31m\nb\tgröße") == "a�[31m�b�größe"


def test_does_not_import_torch() -> None:
    code = "import sys, dlopt.results.reading, dlopt.commands.runs; sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"count": 144, "unit": "images", "more": 1}, {"count": 144, "unit": "images"}),
        ({"count": 144}, None), ({"count": "144", "unit": "images"}, None), ({"count": True, "unit": "images"}, None),
        ({"count": 0, "unit": "images"}, None), ({"count": 144.0, "unit": "images"}, None),
        ({"count": 144, "unit": ["images"]}, None), ([144], None), (None, None),
    ],
)  # fmt: skip
def test_what_a_validation_counts_is_checked(written: object, expected: object, tmp_path: Path) -> None:
    path = make_run(tmp_path / "0")
    facts = {"folder_format": FORMAT, "data": {"validation": written}}
    (path / "environment.json").write_text(json.dumps(facts))
    assert record(path).origin["validation"] == expected
    assert len(table(tmp_path).rows) == 1


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "environment.json", "metrics.jsonl", "overrides.yaml"])
def test_does_not_wait_for_a_fifo(tmp_path: Path, name: str) -> None:
    path = make_run(tmp_path / "run")
    (path / name).unlink()
    os.mkfifo(path / name)
    result = read(path)
    assert isinstance(result, Record) if name == "overrides.yaml" else isinstance(result, Damaged)


def test_metrics_beyond_the_range_of_floats(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    summary = json.loads((path / "summary.json").read_text())
    for number, reason in {
        "9" * 4000: "has an integer of more than 100 digits",
        "1e999": "has the number 1e999, which is not finite",
        "NaN": "has the number NaN, which is not finite",
    }.items():
        (path / "summary.json").write_text(
            json.dumps({**summary, "seconds": 0}).replace('"seconds": 0', f'"seconds": {number}')
        )
        assert read(path) == Damaged(path, f"summary.json is damaged: {reason}")
    (path / "summary.json").write_text(json.dumps(summary))
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "step": 40, "val_loss": 1e999, "train_loss": ' + "9" * 4000 + "}\n")
    assert record(path).history[-1] == {"epoch": 4, "step": 40}


def test_finds_runs_in_a_deep_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deeper than Python's calls, and than the system's paths, below which nothing can be read."""
    make_run(tmp_path / "10")
    make_run(tmp_path / "9" / "run")
    monkeypatch.chdir(tmp_path / "9")
    for _ in range(2500):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(tmp_path)
    assert [path.relative_to(tmp_path) for path in find(tmp_path)] == [Path("9/run"), Path("10")]
    run(["rm", "-r", tmp_path / "9"], check=True)  # shutil.rmtree calls itself for each folder


def test_folders_of_other_tools_are_no_runs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "wandb/offline-run-1/files").mkdir(parents=True)
    (run / "wandb/offline-run-1/files/config.yaml").write_text("optimizer.lr: {value: 0.1}")
    other = tmp_path / "lightning_logs"
    other.mkdir()
    (other / "config.yaml").write_text("seed_everything: true")
    records, damaged = RunReader().read([tmp_path])
    assert [each.path for each in records] == [run]
    assert [each.path for each in damaged] == [other] and "another tool" in damaged[0].reason


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("optimizer=sgd", True),
        ("optimizer!=sgd", False),
        ("optimizer=adamw", False),
        ("optimizer!=adamw", True),
        ("optimizer=s*", True),
        ("optimizer!=s*", False),
        ("optimizer.lr=1e-1", True),
        ("optimizer.lr!=1e-1", False),
        ("optimizer.lr=0.2", False),
        ("optimizer.lr!=0.2", True),
        ("optimizer.lr>0.1", False),
        ("optimizer.lr>=0.1", True),
        ("optimizer.lr<0.1", False),
        ("optimizer.lr<=0.1", True),
        ("optimizer>0", False),  # a text is not above a number
        ("optimizer<0", False),
        ("optimizer.lr=0.*", True),
        ("optimizer.lr=none", False),  # nor is a number equal to a text
        ("optimizer.lr!=none", True),
        ("tags=base", True),
        ("tags!=base", False),
        ("tags=paper", False),
        ("tags!=paper", True),
        ("tags=b*", True),
        ("tags=[base,late]", True),
        ("tags!=[base,late]", False),
        ("tags=[base]", False),
        ("tags!=[base]", True),
    ],
)
def test_conditions_on_a_run(tmp_path: Path, line: str, expected: bool) -> None:
    parsed = condition(line)
    assert parsed is not None
    assert parsed.holds(record(make_run(tmp_path / "run", config={"tags": ["base", "late"]}))) == expected


def test_runs_are_found_in_natural_order_and_not_in_hidden_or_own_folders(tmp_path: Path) -> None:
    for name in ("10", "9", "b", "a/2", "a", ".hidden/1", "a/checkpoints/x", "a/wandb/y", "checkpoints/z"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "config.yaml").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    found = [path.relative_to(tmp_path).as_posix() for path in find(tmp_path)]
    assert found == ["a", "a/2", "b", "checkpoints/z", "9", "10"] and list(find(tmp_path / "none")) == []


def test_runs_are_read_again_only_if_their_files_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "0")
    killed = make_run(tmp_path / "1", status=None)
    reads: list[str] = []
    original = reading.read
    monkeypatch.setattr(reading, "read", lambda path: reads.append(path.name) or original(path))
    reader = RunReader()
    for _ in range(2):
        reader.read([tmp_path, tmp_path / "0"])
    assert reads == ["0", "1"]
    (killed / "overrides.yaml").unlink()
    reader.read([tmp_path])
    with HeldByAnotherProcess(killed):
        records, _ = reader.read([tmp_path])
        assert [each.status for each in records] == ["finished", "running"]
    reader.read([tmp_path])
    assert reads == ["0", "1", "1", "1", "1"]


def test_a_pruned_run_and_lines_of_a_history(tmp_path: Path) -> None:
    path = make_run(tmp_path / "0", accuracies=(0.5, 0.7))
    summary = json.loads((path / "summary.json").read_text())
    for pruned, status in ((True, "pruned"), (1, "finished"), (None, "finished")):
        (path / "summary.json").write_text(json.dumps(summary | {"pruned": pruned}))
        assert record(path).status == status
    lines = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(lines + '{"epoch": 3}\n')
    assert "damaged in line 3: no epoch and step" in str(read(path))
    (path / "metrics.jsonl").write_text(lines + "\n")
    assert "damaged in line 3" in str(read(path))


def test_keys_that_the_choice_of_a_group_determines_do_not_vary() -> None:
    configs = [
        {"optimizer": "sgd", "optimizer.lr": 0.1, "optimizer.momentum": 0.9, "seed": 0, "device": "cpu", "model.lr": 1},
        {"optimizer": "adamw", "optimizer.lr": 0.2, "optimizer.betas": (0.9, 0.99), "seed": 1, "device": "cuda"},
        {"optimizer": "sgd", "optimizer.lr": 0.3, "optimizer.momentum": 0.9, "seed": 2, "device": "cpu", "model.lr": 2},
    ]
    assert varying_keys(configs) == ["optimizer", "optimizer.lr", "device", "model.lr"]
    assert varying_keys(configs[:1]) == [] == varying_keys([])
    assert short_key("optimizer.lr", ["optimizer.lr", "model.lr"]) == "optimizer.lr"
    assert short_key("optimizer.lr", ["optimizer.lr", "seed"]) == "lr" and short_key("seed", ["seed"]) == "seed"
