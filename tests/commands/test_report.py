"""`dlopt report`: table, page, plots and errors."""

import contextlib
import csv
import http.client
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

import dlopt as package
from dlopt.commands.report import _Options, _update
from dlopt.results.destination import destination
from dlopt.results.leaderboard import Record
from dlopt.results.page import serve
from dlopt.results.printing import show_front, show_leaderboard
from dlopt.results.ranking import gather
from dlopt.results.reading import RunReader
from tests.support.folders import make_run
from tests.support.line import dlopt, refused
from tests.support.records import record
from tests.support.terminal import in_terminal, plain


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for i, (optimizer, lr) in enumerate((o, lr) for o in ("sgd", "adamw") for lr in (0.01, 0.1)):
        make_run(tmp_path / "night" / str(i), optimizer=optimizer, lr=lr, accuracies=(0.5, 0.5 + 0.1 * i))
    make_run(
        tmp_path / "night/4", lr=9.0, status="failed", reason="step 3: the loss is nan\x1b[31m", accuracies=(0.1, 0.2)
    )
    (tmp_path / "night/0/summary.json").write_text("{")
    return tmp_path


@pytest.mark.drawn
def test_writes_table_page_and_plots(runs: Path) -> None:
    result = dlopt(runs, "report", "night")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[2].split()[:4] == ["1", "a", "adamw", "0.1"] and "80.00 %" in lines[2]
    tried = "best at the end of what was tried, a better value may be beyond it"
    assert f"a: {tried}: optimizer.lr=0.1 (largest)" in lines
    assert "4 configurations, 4 runs: 3 finished, 1 failed" in result.out
    assert "failed: night/4: step 3: the loss is nan�[31m" in result.out
    assert "skipped: night/0: summary.json is damaged" in result.out
    assert lines[-2:] == ["night/report/index.html", "night/report/summary.csv"]
    names = {path.name for path in (runs / "night/report").iterdir()}
    assert names == {"index.html", "summary.csv", "learning_curves.png", "learning_curves_seconds.png",
                     "learning_rates.png", "lr_sensitivity.png", "parallel_coordinates.png",
                     "time_to_target.png"}  # fmt: skip
    options = ("output=elsewhere", "by=val_loss", "test=true", "top=1", "format=html")
    again = dlopt(runs, "report", "night", "night/1", *options)
    assert again.code == 0 and (runs / "elsewhere/index.html").is_file()
    assert "more rows on the HTML page" in again.out
    pdf = dlopt(runs, "report", "night", "output=paper/plots.pdf", "plot=learning_curves")
    assert pdf.code == 0 and pdf.out.splitlines()[-1] == "paper/plots.pdf"
    assert (runs / "paper/plots.pdf").read_bytes().startswith(b"%PDF")
    tables = dlopt(runs, "report", "night", "output=tables", "format=[latex,csv]")
    assert tables.code == 0 and tables.out.splitlines()[-2:] == ["tables/table.tex", "tables/summary.csv"]
    assert {path.name for path in (runs / "tables").iterdir()} == {"table.tex", "summary.csv"}


def test_conditions_select_the_runs(runs: Path) -> None:
    make_run(runs / "night/5", lr=0.5, accuracies=(0.4, 0.55), config={"tags": ["base", "paper"], "note": "a, <b>"})
    result = dlopt(
        runs, "report", "night", "optimizer=sgd", "optimizer.lr>=0.1", "status=finished", "format=[csv,html]"
    )
    assert result.code == 0 and "2 configurations, 2 runs: 2 finished" in result.out
    assert re.search(r"^# +lr +tags +runs ", result.out, re.MULTILINE) and "base, paper" in result.out
    page = (runs / "night/report/index.html").read_text()
    assert "Runs in night: optimizer=sgd optimizer.lr&gt;=0.1 status=finished" in page and "base, paper" in page
    with (runs / "night/report/summary.csv").open() as file:
        assert [row["tags"] for row in csv.DictReader(file)] == ["", "base, paper"]
    assert "1 configuration, 1 run: 1 finished" in dlopt(runs, "report", "night", "tags=paper", "format=csv").out
    assert "night: no run matches tags=none" in dlopt(runs, "report", "night", "tags=none").err
    assert "tags" not in dlopt(runs, "report", "night", "tags!=paper", "format=csv").out


def test_a_configuration_without_tags_shows_a_dash(tmp_path: Path) -> None:
    make_run(tmp_path / "night/0", lr=0.5, accuracies=(0.8,))
    make_run(tmp_path / "night/1", lr=0.1, accuracies=(0.7,), config={"tags": ["base", "paper"]})
    lines = dlopt(tmp_path, "report", "night", "format=csv").out.splitlines()
    cells = [re.split(r"\s{2,}", line.strip()) for line in (lines[0], *lines[2:4])]
    assert [row[:4] for row in cells] == [
        ["#", "lr", "tags", "runs"], ["1 a", "0.5", "-", "1"], ["2", "0.1", "base, paper", "1"],
    ]  # fmt: skip


@pytest.mark.parametrize("failed", [1, 5, 6, 8])
def test_at_most_five_failed_runs_are_listed(tmp_path: Path, failed: int) -> None:
    make_run(tmp_path / "night/0")
    for i in range(failed):
        make_run(tmp_path / f"night/failed-{i}", lr=0.2 + i, status="failed", accuracies=(0.1,))
    lines = dlopt(tmp_path, "report", "night", "format=csv").out.splitlines()
    assert sum(line.startswith("failed: night/failed-") for line in lines) == min(failed, 5)
    rest = [line for line in lines if line.startswith("...")]
    words = {6: ["... and 1 more failed or unfinished run"], 8: ["... and 3 more failed or unfinished runs"]}
    assert rest == words.get(failed, [])


def test_removes_the_plots_of_an_earlier_report(runs: Path) -> None:
    (runs / "night/report").mkdir()
    for name in ("lr_sensitivity.png", "lr_sensitivity.pdf", "mine.png"):
        (runs / "night/report" / name).touch()
    assert dlopt(runs, "report", "night/1", "output=night/report").code == 0  # a single run has no sensitivity
    names = {path.name for path in (runs / "night/report").iterdir()}
    assert "learning_curves.png" in names and names & {"lr_sensitivity.png", "mine.png"} == {"mine.png"}
    assert "lr_sensitivity.pdf" in names  # format=pdf was not requested


def test_differences_of_small_and_huge_losses_have_digits(tmp_path: Path) -> None:
    for lr, scale in ((0.01, 2e-5), (0.1, 3e-5), (1.0, 1e33)):
        for seed in range(3):
            losses = (scale * (1 + 0.1 * seed),)
            make_run(tmp_path / f"night/{lr}-{seed}", lr=lr, seed=seed, accuracies=(0.5,), losses=losses)
    lines = dlopt(tmp_path, "report", "night", "by=val_loss", "format=csv").out.splitlines()
    second, third = lines[3], lines[4]
    assert "+1.10e-05 [+6.05e-06, +1.59e-05]" in second  # t interval of the differences 1.0, 1.1 and 1.2e-5
    assert "+1.10e+33 [" in third and len(third) < 130


def test_a_killed_run_is_not_called_failed(tmp_path: Path) -> None:
    make_run(tmp_path / "night/0")
    make_run(tmp_path / "night/1", seed=1, status=None)
    out = dlopt(tmp_path, "report", "night", "format=csv").out
    assert "1 finished, 1 unfinished" in out and "failed" not in out
    assert "unfinished: night/1: no summary: the process was killed or the machine went down" in out


@pytest.fixture
def paired(tmp_path: Path) -> Path:
    """Three seeds of two initial weights at three learning rates."""
    for lr in (0.01, 0.1, 1.0):
        for seed, weights in ((seed, weights) for seed in range(3) for weights in (None, "base/checkpoints/best.pt")):
            make_run(
                tmp_path / f"night/{lr}-{seed}-{weights is None}", lr=lr, seed=seed, config={"init_from": weights},
                accuracies=(0.5, 0.9 - 0.1 * lr + 0.01 * seed**lr + 0.001 * (weights is None)),
            )  # fmt: skip
    return tmp_path


def test_narrow_terminal_keeps_the_difference_and_names_hidden_columns(paired: Path) -> None:
    code, shown = in_terminal(paired, 80, "report", "night", "format=csv")
    lines = plain(shown).splitlines()
    head = next(line for line in lines if line.startswith("#"))  # after what the command is doing
    assert code == 0 and all(len(line) <= 80 for line in lines if not line.startswith("best: "))
    assert re.fullmatch(r"# +init_from +lr +runs +val accuracy +vs\. best \[95 %\]", head)
    assert sum(bool(re.match(r"[1-6] .*\d+\.\d\d( \[.*\])?$", line)) for line in lines) == 5
    assert "test accuracy of the best: 75.00 ± 0.00 %" in lines
    assert "hidden: val_loss; index.html has all columns" in lines
    wide = plain(in_terminal(paired, 160, "report", "night", "format=csv")[1])
    assert "hidden:" not in wide and re.search(r"val loss +test accuracy +vs\. best", wide)


def test_piped_table_is_complete_without_trailing_spaces(paired: Path) -> None:
    lines = dlopt(paired, "report", "night", "format=csv").out.splitlines()
    assert lines == [line.rstrip() for line in lines]
    assert "hidden:" not in "".join(lines) and re.search(r"val loss +test accuracy +vs\. best", lines[0])


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("nowhere", "nowhere: no such folder"),
        ("night --wach", "--wach: unknown flag"),
        ("night by=test_loss", "by=test_loss: ranking by a test metric"),
        ("night by=speed", "by=speed: unknown metric of these runs; allowed: "),
        ("night top=0", "top=0: "),
        ("night target=high", "target=high: "),
        ("night targt=1", "did you mean target?"),
        ("night watch=true", "did you mean --watch? `dlopt report --help` lists all"),
        ("night what=1", "`dlopt report --help` lists all"),
        ("night optimzer=sgd", "optimzer=sgd: unknown key; did you mean optimizer?"),
        ("night lr>high", "lr>high: > requires a number"),
        ("night optimizer=lion", "night: no run matches optimizer=lion"),
        ("empty", "empty: contains no runs"),
        ("night/0", "1 damaged: night/0: summary.json is damaged"),
        ("night output=night/1/config.yaml", "unknown format; allowed: .html, "),
        ("night output=night/1/config.yaml/", "cannot write: "),
        ("night format=docx", "format=docx: "),
        ("night --open output=paper.pdf", "--open: shows the page"),
    ],
)
def test_refused(runs: Path, typed: str, message: str) -> None:
    (runs / "empty").mkdir()
    assert message in refused(runs, "report", *typed.split())


def request(address: str, path: str, host: str | None = None, method: str = "GET") -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(address.removeprefix("http://").rstrip("/"), timeout=10)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or address.removeprefix("http://").rstrip("/"))
    connection.endheaders()
    return connection.getresponse()


def test_serves_only_the_page_on_loopback(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "index.html").write_text("the page")
    (folder / "secret.txt").write_text("no")
    (tmp_path / "outside.csv").write_text("no")
    (folder / "link.csv").symlink_to(tmp_path / "outside.csv")
    with serve(folder) as address:
        assert address.startswith("http://127.0.0.1:")
        found = request(address, "/?x=1")
        assert found.status == 200 and found.read() == b"the page" and found.getheader("Cache-Control") == "no-store"
        for path in (
            "/secret.txt",
            "/../outside.csv",
            "/%2e%2e/outside.csv",
            "/link.csv",
            "/none.html",
            "//etc/passwd",
        ):
            assert request(address, path).status == 404
        assert request(address, "/", host="evil.example:80").status == 403
        assert request(address, "/", method="POST").status == 501
    with pytest.raises(OSError):
        request(address, "/")


@pytest.mark.slow
def test_watch_updates_until_interrupted(runs: Path) -> None:
    command = [sys.executable, "-m", "dlopt", "report", "night", "--watch", "--open"]
    environment = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1]), "BROWSER": "true"}
    process = subprocess.Popen(command, cwd=runs, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    page = runs / "night/report/index.html"

    def wait(done: str) -> None:
        deadline = time.monotonic() + 90
        while not (page.exists() and done in page.read_text()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.5)

    try:
        wait('"refresh":5.0')
        assert process.stdout is not None
        shown = next(line for line in map(bytes.decode, process.stdout) if line.startswith("http://127.0.0.1:"))
        assert b'"refresh":5.0' in request(shown.split()[0], "/").read()
        before = page.stat().st_mtime_ns
        time.sleep(8)
        assert page.stat().st_mtime_ns == before  # nothing new
        make_run(runs / "night/5", lr=0.77)
        wait("0.77")
    finally:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


# -- what a sweep ends with


def entry(lr: float, seed: int, accuracy: float, test: float) -> Record:
    values = {"status": "finished", "best_val_accuracy": accuracy, "test_accuracy": test}
    config = {"optimizer": {"lr": lr}, "seed": seed}
    return record(Path(f"{lr}/{seed}"), config, values, [f"optimizer.lr={lr}", f"seed={seed}"])


def board() -> str:
    stream = io.StringIO()
    runs = [entry(lr, seed, 0.9 - lr + 0.01 * seed, 0.5 + lr) for lr in (0.1, 0.2) for seed in (0, 1)]
    show_leaderboard(gather(runs, []), stream=stream)
    return stream.getvalue()


def test_every_row_shows_its_failed_runs(tmp_path: Path) -> None:
    for seed in range(3):
        make_run(tmp_path / f"night/{seed}", lr=0.9, seed=seed, status="failed" if seed else "finished")
        status = None if seed == 0 else "failed" if seed == 1 else "finished"
        make_run(tmp_path / f"night/{seed + 3}", lr=0.1, seed=seed, accuracies=(0.5, 0.6, 0.7), status=status)
        make_run(tmp_path / f"night/{seed + 6}", lr=0.2, seed=seed, accuracies=(0.4, 0.5, 0.6))
    result = dlopt(tmp_path, "report", "night", "format=csv")
    assert "#1: 2 of 3 runs failed; its mean is that of the others" in result.out
    shown = [re.split(r"\s{2,}", line.strip()) for line in result.out.splitlines()[2:5]]
    assert [cells[:3] for cells in shown] == [
        ["1 abc", "0.9", "1 of 3, 2 failed"], ["2 ab", "0.1", "1 of 3, 1 failed"], ["3", "0.2", "3"],
    ]  # fmt: skip


def test_watch_waits_for_the_first_metrics(tmp_path: Path) -> None:
    to = destination(tmp_path, None, "csv", None)
    options = _Options(by="val_loss", watch=True)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        _update(RunReader(), [tmp_path], to, options, Console())
        make_run(tmp_path / "0", losses=(0.3,), accuracies=(0.1,))
        _update(RunReader(), [tmp_path], to, options, Console())
    assert "0 configurations, 0 runs" in out.getvalue()
    assert "val_loss" in (tmp_path / "report/summary.csv").read_text()


def test_leaderboard_shows_test_metric_of_first_row_only() -> None:
    lines = board().splitlines()
    first, second = (next(line for line in lines if f"lr={lr}" in line) for lr in (0.1, 0.2))
    assert "80.50 ± 0.71 %" in first and "60.00 %" in first
    assert second.rstrip().endswith(" -10.00") and "70.50 ± 0.71 %" in second
    assert "70.00 %" not in second


def test_leaderboard_shows_failed_runs_of_all_rows() -> None:
    runs = [entry(lr, seed, 0.9 - lr, 0.5) for lr in (0.1, 0.2) for seed in (0, 1)]
    failed = [record(Path("x"), {"optimizer": {"lr": lr}, "seed": 2}, {"status": "failed"}, ()) for lr in (0.1, 0.2)]
    stream = io.StringIO()
    show_leaderboard(gather([*runs, *failed], []), stream=stream)
    assert stream.getvalue().count("2 of 3, 1 failed") == 2


def test_empty_leaderboard_prints_nothing() -> None:
    stream = io.StringIO()
    show_leaderboard(gather([], []), stream=stream)
    assert stream.getvalue() == ""


def test_pareto_front(capsys: pytest.CaptureFixture[str]) -> None:
    show_front([("job 1: lr=0.1", [0.5, 10.0])], ["best_val_accuracy", "seconds"])
    said = capsys.readouterr().out
    assert "50.00 %" in said and "job 1: lr=0.1" in said


def test_the_best_command_names_the_packages_to_trust(tmp_path: Path) -> None:
    typed = ["model=mine.Net", "allow_packages=[mine]"]
    make_run(tmp_path / "runs/a", overrides=typed)
    lines = dlopt(tmp_path, "report", "runs").out.splitlines()
    at = lines.index("command: dlopt train model=mine.Net")
    assert lines[at + 1] == "it needs allow_packages=[mine], if you trust this code"
