"""`dlopt runs` and `dlopt runs clean`."""

import hashlib
import os
from pathlib import Path
from random import Random
from unittest.mock import patch

import pytest

from tests.support.folders import count_calls, make_run
from tests.support.line import HeldByAnotherProcess, dlopt, entries, refused
from tests.support.terminal import in_terminal, plain


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """Runs 0..5: sgd and adamw at three learning rates; one failed run, one killed run."""
    for i, (optimizer, lr) in enumerate((o, lr) for o in ("sgd", "adamw") for lr in (0.01, 0.1, 1.0)):
        make_run(tmp_path / "outputs/night" / str(i), optimizer=optimizer, lr=lr, accuracies=(0.2, 0.1 * (i + 1)))
    make_run(tmp_path / "outputs/failed", status="failed", accuracies=(0.1,))
    make_run(tmp_path / "outputs/killed", status=None)
    return tmp_path


def names(folder: Path, *arguments: str) -> list[str]:
    result = dlopt(folder, "runs", *arguments, "--paths")
    assert result.code == 0, result.err
    return [Path(line).name for line in result.out.splitlines()]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("optimizer=adamw", ["3", "4", "5"]),
        ("optimizer=ada* optimizer.lr=1e-1", ["4"]),
        ("optimizer.lr>=0.1 optimizer.lr<1 status=finished", ["1", "4"]),
        ("val_accuracy>0.35 sort=val_accuracy", ["killed", "5", "4", "3"]),
        ("best_val_accuracy>0.35 sort=val_accuracy limit=2", ["killed", "5"]),
        ("sort=val_loss limit=1 optimizer=sgd status!=unfinished", ["2"]),
        ("sort=optimizer.lr outputs/night limit=2", ["0", "3"]),
        ("status=failed", ["failed"]),
        ("status=unfinished", ["killed"]),
        ("model.widths=[64,64] optimizer.betas!=[0.9,0.999] outputs/night", ["0", "1", "2"]),
        ("steps=null status=finished optimizer.momentum=0.9", []),  # the metric: updates done
        ("steps=20 clip=none optimizer=sgd", ["0", "1", "2"]),
    ],
)
def test_filters_by_config_status_and_metric(outputs: Path, typed: str, expected: list[str]) -> None:
    assert names(outputs, *typed.split()) == expected


def test_piped_output_is_tab_separated(outputs: Path) -> None:
    result = dlopt(outputs, "runs", "outputs/night", "sort=val_accuracy", "limit=1")
    header, line = result.out.splitlines()
    assert header.split("\t") == ["run", "status", "val_accuracy", "val_loss", "epochs", "seconds"]
    assert line.split("\t") == ["outputs/night/5", "finished", "0.6000000000000001", "0.3999999999999999", "2", "2.0"]
    header = dlopt(outputs, "runs", "outputs/night").out.splitlines()[0]
    assert header.split("\t")[2:4] == ["optimizer", "optimizer.lr"]
    chosen = dlopt(outputs, "runs", "optimizer.lr=1.0", "columns=[optimizer.lr,test_accuracy,optimizer.momentum]").out
    assert chosen.splitlines()[1:] == [
        "outputs/night/2\tfinished\t1\t0.75\t0.9",
        "outputs/night/5\tfinished\t1\t0.75\t",
    ]


def test_table_in_a_terminal(outputs: Path) -> None:
    make_run(outputs / "outputs/odd\x1b[31m", status="failed")
    code, shown = in_terminal(outputs, 120, "runs")
    text = plain(shown)
    assert code == 0, text
    assert "9 runs: 6 finished, 2 failed, 1 unfinished" in text and "60.00 %" in text and "outputs/night/5" in text
    assert "odd�[31m" in text and "odd\x1b" not in shown


@pytest.mark.parametrize("width", [60, 80, 120])
def test_terminal_shows_one_line_per_run_with_what_differs(tmp_path: Path, width: int) -> None:
    for i in range(12):
        path = tmp_path / f"outputs/train/2026-01-01_12-00-{i:02}"
        weights = "pretrained/resnet20/2026/best.pt" if i % 2 else None
        make_run(path, lr=0.12345678901234567 / (i + 1), seed=i % 3, config={"init_from": weights, "epochs": 3 + i % 4})
    code, shown = in_terminal(tmp_path, width, "runs")
    lines = plain(shown).splitlines()
    rows = [line for line in lines if line.startswith("outputs/train/")]
    assert code == 0 and len(rows) == 12 and max(map(len, lines)) <= width
    assert lines.index(rows[-1]) - lines.index(rows[0]) == 11  # no line between rows
    assert "0.1235" in rows[0] and "80.00 %" in rows[0] and "finished" not in rows[0] and "sgd" not in rows[0]
    hidden = " ".join(lines[lines.index("12 runs: 12 finished") + 1 :])
    columns = {60: {"seed", "init_from"}, 80: {"init_from"}, 120: set()}[width]
    assert columns <= set(hidden.removeprefix("hidden: ").split(";")[0].split(", ")), hidden
    assert ("columns=[KEY,...]" in hidden) == (width < 120)
    if width == 120:
        assert "pretrained/…2026/best.pt" in rows[1]


def test_terminal_shows_typed_columns_for_every_run(outputs: Path) -> None:
    code, shown = in_terminal(outputs, 80, "runs", "limit=2", "columns=[status,data.batch_size,test_accuracy]")
    lines = [line.split() for line in plain(shown).splitlines()]
    assert code == 0 and lines[0] == ["run", "status", "batch_size", "test", "accuracy"]
    assert lines[-1] == ["2", "runs:", "1", "failed,", "1", "unfinished"]


def test_no_match_is_reported(outputs: Path) -> None:
    for flags in ([], ["--paths"]):
        result = dlopt(outputs, "runs", "outputs/night", "status=unfinished", *flags)
        assert (result.code, result.err) == (0, "dlopt: outputs/night: no run matches status=unfinished\n")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("nowhere", "nowhere: no such folder"),
        ("lr>0.1", "did you mean optimizer.lr?"),
        ("optimzer=sgd", "did you mean optimizer?"),
        ("sort=optimizer.lrr", "sort=optimizer.lrr: unknown key; did you mean optimizer.lr?"),
        ("columns=[foo]", "columns=foo: unknown key; allowed: status, a key of the config, "),
        ("val_accuracy>high", "> requires a number"),
        ("status=unfinishd", "status=unfinishd: unknown status; did you mean status=unfinished? allowed: finished, "),
        ("limit=0", "limit=0: input should be greater than or equal to 1; allowed: an integer >= 1"),
        ("--pahts", "--pahts: unknown flag"),
    ],
)
def test_refused(outputs: Path, typed: str, message: str) -> None:
    assert message in refused(outputs, "runs", *typed.split())


def test_requires_a_folder_without_outputs(tmp_path: Path) -> None:
    assert "outputs: no such folder; name" in refused(tmp_path, "runs")


def test_time_is_linear_in_the_number_of_runs(tmp_path: Path) -> None:
    """Counts calls and opened files: a clock would measure what else the machine does."""
    draw, counts, opened = Random(0), [], []
    listed = ("runs", ".", "sort=val_accuracy", "optimizer=sgd", "val_accuracy>0.1")
    for number in range(40):
        config = {"optimizer.weight_decay": draw.random(), "model.widths": [draw.choice((32, 64))]}
        make_run(tmp_path / "sweep" / str(number), lr=draw.random(), accuracies=(0.5, 0.6), config=config)
        if number + 1 in (1, 10, 20, 40):
            with patch.object(os, "open", side_effect=os.open) as opens:
                counts.append(count_calls(lambda: dlopt(tmp_path, *listed)))
            opened.append(opens.call_count)
    _, ten, twenty, forty = counts  # the first one imports modules
    assert 0 < forty - twenty < 2.2 * (twenty - ten)
    assert opened[3] - opened[2] == 2 * (opened[2] - opened[1]) <= 20 * 6, "each file of a run is opened once"


def test_skips_damaged_folder(outputs: Path) -> None:
    (outputs / "outputs/night/0/summary.json").write_text("{")
    result = dlopt(outputs, "runs", "--paths", "outputs/night")
    assert len(result.out.splitlines()) == 5
    assert result.err == "dlopt: outputs/night/0: skipped: summary.json is damaged\n"


# -- cleaning


def checkpoints(run: Path, *names: str) -> None:
    (run / "checkpoints").mkdir()
    for name in names:
        data = name.encode() * 1000
        (run / "checkpoints" / name).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        (run / "checkpoints" / f"{name}.sha256").write_text(f"{digest}  {name}\n")


@pytest.fixture
def kept(outputs: Path) -> Path:
    for run in ("night/0", "night/3", "killed", "failed"):
        checkpoints(outputs / "outputs" / run, "last.pt", "best.pt", "step-10.pt", "step-9.pt")
    (outputs / "outputs/failed/checkpoints/last.pt").write_bytes(b"torn")
    return outputs


def spare_of(names: set[str]) -> set[str]:
    return {each for each in names if "/step-" in each}


def test_clean_keeps_best_and_last(kept: Path) -> None:
    before = entries(kept)
    result = dlopt(kept, "runs", "clean", "outputs/night", "optimizer=sgd", "--yes")
    assert result.code == 0
    gone = {f"outputs/night/0/checkpoints/step-{n}.pt{end}" for n in (9, 10) for end in ("", ".sha256")}
    assert before - entries(kept) == gone
    assert "outputs/night/0/checkpoints/step-9.pt" in result.out and "removed 2 checkpoints, 18.6 KiB" in result.out
    assert "nothing to remove" in dlopt(kept, "runs", "clean", "outputs/night", "optimizer=sgd", "--yes").out


def test_clean_asks_for_confirmation(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = entries(kept)
    result = dlopt(kept, "runs", "clean")
    assert result.code == 2 and "use --yes" in result.err and "step-9.pt" in result.out
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    for answer in ("", "n", "what"):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        assert dlopt(kept, "runs", "clean", "outputs/night").code == 0
    assert entries(kept) == before
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert dlopt(kept, "runs", "clean", "outputs/night").code == 0
    assert before - entries(kept) == {each for each in spare_of(before) if "night" in each}


def test_clean_skips_running_runs_and_damaged_last(kept: Path) -> None:
    with HeldByAnotherProcess(kept / "outputs/killed"):
        result = dlopt(kept, "runs", "clean", "--yes")
    assert "outputs/killed: skipped: it is running" in result.err
    assert "outputs/failed: skipped: its last.pt is missing or damaged" in result.err
    assert len(spare_of(entries(kept))) == 8 and not any("night" in each for each in spare_of(entries(kept)))


def test_clean_does_not_follow_symlinks(kept: Path) -> None:
    elsewhere = kept / "elsewhere"
    (kept / "outputs/night/0/checkpoints").rename(elsewhere)
    (kept / "outputs/night/0/checkpoints").symlink_to(elsewhere)
    (kept / "outputs/night/3/checkpoints/step-8.pt").symlink_to(elsewhere / "step-9.pt")
    (elsewhere / "thesis").mkdir()
    (kept / "outputs/night/3/checkpoints/shards").symlink_to(elsewhere)
    assert dlopt(kept, "runs", "clean", "outputs/night", "--yes").code == 0
    assert (elsewhere / "thesis").is_dir()
    assert (elsewhere / "step-9.pt").exists() and (kept / "outputs/night/3/checkpoints/step-8.pt").is_symlink()
    assert not (kept / "outputs/night/3/checkpoints/step-9.pt").exists()


def test_clean_reports_freed_bytes(kept: Path) -> None:
    folder = kept / "outputs/night/0/checkpoints"
    (folder / "step-9.pt").unlink()
    os.link(folder / "best.pt", folder / "abandoned-1-best.pt")
    assert "removed 2 checkpoints, 9.77 KiB" in dlopt(kept, "runs", "clean", "outputs/night/0", "--yes").out
    assert (folder / "best.pt").exists() and not (folder / "abandoned-1-best.pt").exists()
