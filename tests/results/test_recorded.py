"""The report of a sweep in each of its forms, as recorded: what a change of the code changes for readers is a diff.

    REGENERATE_GOLDEN=1 python -m pytest tests/results/test_recorded.py

writes tests/results/recorded; read the difference before you commit it. Functional ANOVA is left out: its numbers
depend on the versions of other packages.
"""

import dataclasses
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dlopt.results import confusion, curves, plots, printing, ranking
from dlopt.results import page as page_module
from dlopt.results import page_data as page_data_module
from dlopt.results.columns import summary_csv
from dlopt.results.exports import ReportContent
from dlopt.results.listing import Query, print_values, show_table
from dlopt.results.page_data import page_data
from dlopt.results.paper import latex, markdown
from dlopt.results.ranking import Importance, Ranking, gather
from dlopt.results.reading import Damaged, RunReader
from dlopt.results.tables import Section, Table
from tests.support.drawn import check_recorded, describe, flat
from tests.support.folders import make_run
from tests.support.folders import table as read_table

FOLDER = Path(__file__).with_name("recorded")
PUBLISHED = [{"error": 25.5, "when": {"optimizer.lr": 0.1, "optimizer.momentum": 0.9}}]


def edit(folder: Path, *, step: float = 1, **summary: Any) -> None:
    """Scales the updates of a run's history and changes its summary."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scaled = [json.dumps(line | {"step": round(line["step"] * step)}) + "\n" for line in lines]
    (folder / "metrics.jsonl").write_text("".join(scaled))
    file = folder / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | summary))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten configurations; failed, open and pruned runs; a repeated seed; slow ones; tags, notes and test metrics."""
    folder = tmp_path_factory.mktemp("sweep")
    tops = {("adamw", 0.001): (0.82, 0.84, 0.83), ("adamw", 0.01): (0.905, 0.915), ("adamw", 0.1): (0.7, 0.64),
            ("sgd", 0.01): (0.61, 0.63), ("sgd", 0.1): (0.8, 0.86), ("sgd", 0.3): (0.805,), ("sgd", 1.0): (0.3, 0.2),
            ("sgd", 10.0): (0.1,)}  # fmt: skip
    for (optimizer, lr), each in tops.items():
        for seed, top in enumerate(each):
            slow = 1 + seed + (optimizer == "adamw") / 2
            config: dict[str, Any] = {"name": "recipe", "published": PUBLISHED if optimizer == "sgd" else None}
            config |= {"tags": ["first", "second"], "note": "as in the paper"} if lr == 0.01 else {}
            config |= {"optimizer.weight_decay": 0.1} if lr == 0.1 else {}
            is_failed = lr == 10 or (lr, seed) == (1.0, 1)
            make_run(
                folder / f"{optimizer}-{lr}-{seed}", optimizer=optimizer, lr=lr, seed=seed, seconds=slow, config=config,
                accuracies=(0.1, 0.5 * top, top, top - 0.02), test=top - 0.03, reason=f"the loss is nan at {lr}",
                status="failed" if is_failed else "finished",
            )  # fmt: skip
    make_run(folder / "repeated", optimizer="adamw", lr=0.01, seed=1, accuracies=(0.1, 0.4575, 0.915, 0.895),
             config={"name": "recipe", "tags": ["third"]}, test=0.885)  # fmt: skip
    make_run(folder / "open", optimizer="adamw", lr=1.0, accuracies=(0.2, 0.85), status=None, config={"name": "recipe"})
    config = {"name": "recipe", "model.widths": [8] * 9, "published": PUBLISHED}
    make_run(folder / "deep", lr=0.1, accuracies=(0.2, 0.88), config=config)
    edit(folder / "deep", step=0.5, parameters=2000, steps=10)
    edit(folder / "adamw-0.1-1", pruned=True)
    return folder


@pytest.fixture
def table(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> Ranking:
    monkeypatch.chdir(sweep)
    found = Importance({"optimizer": 0.125, "optimizer.lr": 0.75}, 0.5)
    for module in (plots, ranking):
        monkeypatch.setattr(module, "importance", lambda _: found)
    records, damaged = RunReader().read([sweep])
    return gather(sorted(records, key=lambda each: each.path), [*damaged, Damaged(sweep / "bad", "no config")])


def losses(folder: Path) -> Ranking:
    """Returns rates at which losses span decades; single seeds, curves with and without markers; one has a key more."""
    for i, loss in enumerate((0.2, 0.21, 30.0, 1e4, 0.3, 0.4, 0.5)):
        falling = tuple(loss * (1 + 1 / (1 + epoch)) for epoch in range((12, 10, 9, 3)[min(i, 3)]))
        config = {"model.widths": [64] * (1 + i % 2 * 30)} | ({"clip.max_norm": 1.0} if i == 1 else {})
        make_run(folder / f"run-{i}", lr=1e-4 * 10**i, losses=falling, accuracies=(0.5,) * len(falling), config=config)
    records, damaged = RunReader().read([folder])
    return gather(sorted(records, key=lambda each: each.path), damaged, "val_loss")


def test_plots(table: Ranking, tmp_path: Path) -> None:
    found = []
    for length in (24, 25):  # characters: labels that fit into two columns, and longer ones
        for lr in (0.1, 2.0):
            make_run(tmp_path / f"short/{length}/{lr}", lr=lr, config={"x": "y" * length if lr == 2.0 else "z"})
        rates = plots.plots(read_table(tmp_path / f"short/{length}"), None, ["learning_curves", "learning_rates"])
        for figure in rates.values():
            found += [line for line in describe(figure) if not line.startswith("  ") or line.startswith("  y")]
    for each, target in ((table, 0.8), (losses(tmp_path / "losses"), 0.45)):
        for name, figure in plots.plots(each, target).items():
            found += [f"{name} by {each.by}", *describe(figure)]
    check_recorded(FOLDER / "plots.txt", found)


def test_confusion_and_curves_of_a_run() -> None:
    found = []
    for count in (3, 20, 21, 60, 61):
        counts = torch.diag(torch.arange(count)) + torch.tensor([[1] + [0] * (count - 1)] * count)
        names = [f"class {i}" if count > 3 else "abc"[: i + 1] for i in range(count)]
        figure = confusion.plot_confusion(counts, names, f"{count} classes")
        found += [line for line in describe(figure) if count == 3 or "  text" not in line]
        found.append(f"{len(figure.axes[0].texts)} numbers")
        found += confusion.confusion_table(counts, names).splitlines() if count == 3 else []
    for epochs, restarts in ((3, [1.0, 1.5]), (40, []), (41, [])):
        history = [
            {"epoch": i, "lr": 0.1 / i, "train_loss": 500.0 / i**2, "val_loss": None if i == 2 else 2.0 / i,
             "val_accuracy": 1 - 0.5 / i, "train_accuracy": 0.5} for i in range(1, epochs + 1)
        ]  # fmt: skip
        summary = {"best_epoch": 3, "test_accuracy": 0.75, "test_loss": 0.5}
        choices = {"model": "mlp", "data": "digits", "optimizer": "sgd"}
        found += describe(curves.draw(history, summary, choices, restarts))
    check_recorded(FOLDER / "run.txt", found)


def page(table: Ranking, target: float, *, test: bool) -> list[str]:
    data = page_data(table, target=target, test=test, refresh=5.0)
    for run in (run for row in data["rows"] for run in row["runs"]):
        run["curves"] = {name: curve for name, curve in run["curves"].items() if name == table.by}
    shared = f"{table.records[0].path.parent}/"
    return [line.replace(shared, "") for line in flat(data)]


def test_data_of_the_page(table: Ranking, tmp_path: Path) -> None:
    found = page(table, 0.8, test=False)
    found += ["with test metrics", *(line for line in page(table, 0.8, test=True) if line not in found)]
    others = [line for line in page(losses(tmp_path), 0.45, test=False) if not line.startswith("rows.")]
    check_recorded(FOLDER / "page.txt", [*found, "losses", *others])


def test_markup_of_the_page(table: Ranking, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without scripts, styles and data; a text with markup is escaped."""
    monkeypatch.setattr(page_module, "importance", lambda _: Importance({"a<b": 0.5}, 0.25))
    monkeypatch.setattr(page_module, "__version__", "0")
    keys: dict[str, Any] = {"title": "<b>", "made": "now", "target": 0.8, "test": False, "refresh": 5.0}
    text = page_module.page(table, **keys, sections=content(table, test=False, top=1).sections)
    assert "sha256-" in text and text.count("<script") == 2
    text = re.sub(r"(<(script|style)[^>]*>).*?(</\2>)", r"\1\3", text, flags=re.DOTALL)
    check_recorded(FOLDER / "page.html", re.sub(r"sha256-[^']*", "sha256", text).splitlines())


def content(table: Ranking, *, test: bool, top: int) -> ReportContent:
    section = Section("of a package", Table(["a"], [["b"]]), ["a line of a package"])
    return ReportContent(table, "title", "made", 0.8, test=test, refresh=None, top=top, sections=[section])


def printed(table: Ranking, width: int | None, *, test: bool = False, top: int = 20, style: Any = None) -> list[str]:
    """Returns the report on a terminal of a width, or in a file."""
    stream = io.StringIO()
    console = Console(file=stream, width=width or 80, force_terminal=width is not None, color_system=style)
    printing.show_report(content(table, test=test, top=top), console)
    return stream.getvalue().replace("\x1b", "~").splitlines()


def test_texts(table: Ranking, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = summary_csv(table, 0.8, test=False) + summary_csv(table, None, test=True)
    found = re.sub(r"\d\.\d{9,}", lambda number: f"{float(number[0]):.6g}", texts).splitlines()
    for form in (latex, markdown):
        found += form(table, made="made", test=False, top=4).splitlines()
        found += form(table, made="made", test=True, top=10).splitlines()  # all of them
    found += printed(table, None) + printed(table, None, test=True, top=2)
    for width in (210, 180, 150, 130, 40):
        found += [f"width {width}", *printed(table, width, top=3, style="standard" if width == 210 else None)]
    for by in ("val_accuracy", "val_loss"):
        stream = io.StringIO()
        printing.show_leaderboard(gather(table.records, [], by), stream=stream)
        found += stream.getvalue().splitlines()
    printing.show_front([("lr=0.123456789", [0.5, 30.0]), ("b", [0.4, 20.0])], ["val_accuracy", "seconds"])
    found += capsys.readouterr().out.splitlines()
    check_recorded(FOLDER / "texts.txt", found)


@pytest.mark.parametrize("width", [60, 100, 200])
def test_list_of_runs(
    table: Ranking, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    queries: Sequence[dict[str, Any]] = (
        {},
        {"sort": "val_loss"},
        {"sort": "val_loss", "limit": 1},
        {"columns": ["seed", "status", "tags"], "limit": 3},
    )
    for query in queries:
        made = Query([Path()], [], **query)
        found = sorted(made.find()[0], key=lambda each: each.path) if not query else made.find()[0]
        show_table(made, found)
        if width == 200:
            print_values(made, found)
    show_table(Query([Path()], []), [])
    check_recorded(FOLDER / f"runs_{width}.txt", capsys.readouterr().out.splitlines())


def test_numbers_in_the_list_of_runs_have_no_colours_of_their_own(
    table: Ranking, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    show_table(query := Query([Path()], [], columns=["seed"]), query.find()[0])
    counts = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"\x1b\[2m\d+ runs: [^\x1b]+\x1b\[0m", counts), counts


def test_many_values_are_thinned_and_many_keys_and_rows_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for i in range(13):
        config = {f"data.key{k}": i if k < 2 else i % 2 for k in range(8)}
        failed = {"status": "failed"} if i > 6 else {}
        make_run(Path(f"{i:02}"), config=config, accuracies=tuple(0.01 * (e + i) for e in range(40)), **failed)  # type: ignore[arg-type]
    ranking_of = read_table(Path())
    monkeypatch.setattr(page_data_module, "_POINTS", 13 * 8 * 12)  # of 13 runs with 7 metrics and their positions
    data = page_data(ranking_of, target=None, test=False, refresh=None)
    [run] = data["rows"][0]["runs"]
    curve = {"x": run["x"], "val_accuracy": run["curves"]["val_accuracy"]}
    assert len(curve["val_accuracy"][1]) == 12, "the fewest"
    found = [*flat({"curve": curve, "parallel": data["parallel"], "expendable": data["expendable"]})]
    for top in (13, 12):
        found += printed(ranking_of, None, top=top)
    for count in (12, 13):
        runs = [record for record in ranking_of.records if record.status == "finished"]
        many = [
            dataclasses.replace(
                runs[i % 7], config={**runs[i % 7].config, "data.key9": i}, overrides=[f"data.key9={i}"]
            )
            for i in range(count)
        ]
        printing.show_leaderboard(gather(many, [], "val_accuracy"))
        found += capsys.readouterr().out.splitlines()[-2:]
    printing.show_leaderboard(gather([], []))
    printing.show_front([], ["val_loss"])
    assert capsys.readouterr().out == ""
    check_recorded(FOLDER / "many.txt", found)
