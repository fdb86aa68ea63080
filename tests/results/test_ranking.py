import base64
import csv
import dataclasses
import gzip
import io
import json
import re
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import pytest
from scipy import stats

from dlopt.basics.errors import UserError
from dlopt.basics.folders import FORMAT
from dlopt.basics.secrets import note
from dlopt.results.columns import difference_text, statistic_text, summary_csv
from dlopt.results.intervals import Difference, Statistic
from dlopt.results.leaderboard import Record
from dlopt.results.page import SCRIPTS, page, read_text
from dlopt.results.page_data import page_data
from dlopt.results.ranking import (
    Ranking,
    band,
    default_spread,
    default_target,
    gather,
    importance,
    sensitivities,
    targets,
)
from tests.support.folders import count_calls, make_run, table


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two optimizers x two rates x three seeds; adamw at 0.1 is best, sgd at 1.0 fails for seed 2."""
    i = 0
    for optimizer, lr, top in (("sgd", 0.1, 0.8), ("sgd", 1.0, 0.6), ("adamw", 0.1, 0.9), ("adamw", 1.0, 0.7)):
        for seed in range(3):
            fails = (optimizer, lr, seed) == ("sgd", 1.0, 2)
            make_run(
                tmp_path / "sweep" / str(i), optimizer=optimizer, lr=lr, seed=seed, test=top - 0.05,
                accuracies=(0.5, top + 0.01 * seed), status="failed" if fails else "finished", reason="the loss is nan",
            )  # fmt: skip
            i += 1
    return tmp_path / "sweep"


def read_csv(result: Ranking, **options: Any) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(summary_csv(result, 0.7, **{"test": False, **options}))))


def test_ranks_configurations_by_mean_over_seeds(sweep: Path) -> None:
    result = table(sweep)
    assert result.by == "val_accuracy" and result.keys == ["optimizer", "optimizer.lr"]
    assert [row.label for row in result.rows] == [
        "optimizer=adamw lr=0.1", "optimizer=sgd lr=0.1", "optimizer=adamw lr=1", "optimizer=sgd lr=1",
    ]  # fmt: skip
    first, second = result.rows[:2]
    assert first.value is not None and (first.value.mean, first.value.count) == (pytest.approx(0.91), 3)
    assert first.value.std == pytest.approx(0.01) and second.difference is not None
    assert second.difference.mean == pytest.approx(-0.1) and second.difference.count == 3
    assert second.difference.low is None  # paired: seeds have the same effect on both, which leaves no spread
    assert result.rows[3].failed == 1 and [run.path.name for run in result.failed] == ["5"]
    assert result.counts() == {"finished": 11, "failed": 1}


@pytest.mark.parametrize(
    ("first", "second", "warned"),
    [
        ({"torch": "2.11"}, {"torch": "2.12"}, "versions of dlopt or torch"),
        ({"data": {"identity": {"train": {"content": "a"}}}}, {"data": {"identity": {"test": {"content": "b"}}}}, None),
        ({"data": {"identity": {"train": {"content": "a"}}}}, {}, None),
        ({"data": []}, {"allow_packages": "mine"}, None),
        (
            {"allow_packages": {"mine": {"folder": "/a", "sha256": "1"}}},
            {"allow_packages": {"mine": {"folder": "/b", "sha256": "2"}}},
            "code of allow_packages",
        ),
        (
            {"allow_packages": {"mine": {"folder": "/a", "sha256": "1"}, "gone": None}},
            {"allow_packages": {"mine": {"folder": "/b", "sha256": "1"}, "gone": None}},
            None,
        ),
    ],
)
def test_warns_of_runs_of_different_data_or_code(
    first: dict[str, Any], second: dict[str, Any], warned: str | None, tmp_path: Path
) -> None:
    for seed, facts in enumerate((first, second)):
        make_run(tmp_path / str(seed), seed=seed)
        (tmp_path / str(seed) / "environment.json").write_text(json.dumps({"folder_format": FORMAT, **facts}))
    expected = [] if warned is None else [f"warning: runs with different {warned} in one mean"]
    assert [remark.text for remark in table(tmp_path).remarks] == expected


def test_runs_of_different_data_are_different_rows_in_every_table(tmp_path: Path) -> None:
    for i, content in enumerate("aba"):
        make_run(tmp_path / str(i), seed=i, config={"data.root": content})
        facts = {"data": {"identity": {"train": {"content": content}}}}
        (tmp_path / str(i) / "environment.json").write_text(json.dumps({"folder_format": FORMAT, **facts}))
    ranking = table(tmp_path)
    assert [[run.path.name for run in row.runs] for row in ranking.rows] == [["0", "2"], ["1"]]
    assert ranking.keys == ["data read"]
    assert [row["data read"] for row in read_csv(ranking)] == ["data.root=a", "data.root=b"]
    [remark] = [each for each in ranking.remarks if "other data than #1" in each.text]
    assert list(remark.ranks) == [2] and [remark.text in row["remarks"] for row in read_csv(ranking)] == [False, True]
    assert ranking.rows[1].difference is None and ranking.verdict == ""


def test_importance_puts_each_value_in_the_middle_of_its_bin(monkeypatch: pytest.MonkeyPatch) -> None:
    optuna = pytest.importorskip("optuna")
    seen: list[Any] = []
    create = optuna.create_trial

    def spied(**keys: Any) -> Any:
        seen.append(keys)
        return create(**keys)

    monkeypatch.setattr(optuna, "create_trial", spied)
    rates = [0.001 * 10 ** (i / 4) for i in range(12)]
    assert importance(gather([record_of(0, (0.1 * i,), rate) for i, rate in enumerate(rates)], [])) is not None
    [distribution] = {each["distributions"]["optimizer.lr"] for each in seen}
    assert (distribution.low, distribution.high) == (-0.5, 11.5)
    assert [each["params"]["optimizer.lr"] for each in seen] == list(range(12))


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_the_page_has_a_half_width_for_every_number_of_runs(seeds: tuple[int, ...]) -> None:
    """Its grouped curves may join the runs of all rows."""
    runs = [record_of(seed, (0.5 + 0.01 * seed,), 0.1 * (i + 1)) for i in range(20) for seed in seeds]
    data = page_data(gather(runs, []), target=None, test=False, refresh=None)
    expected = [stats.t.ppf(0.975, n - 1) / n**0.5 for n in range(2, len(runs) + 1)]
    assert data["half_widths"] == pytest.approx([0, 0, *expected], abs=1e-6)


def test_groups_rates_of_1_whether_saved_as_integer_or_float(tmp_path: Path) -> None:
    for seed, lr in enumerate((1, 1.0, 0.5)):
        make_run(tmp_path / str(seed), lr=lr, seed=seed)
    result = table(tmp_path)
    assert result.keys == ["optimizer.lr"] and sorted(len(row.runs) for row in result.rows) == [1, 2]


def test_ranks_by_validation_metrics_only(sweep: Path) -> None:
    assert table(sweep, "val_loss").lower and not table(sweep).lower
    assert table(sweep, "best_val_loss").by == "val_loss"
    with pytest.raises(UserError, match="by=test_accuracy: ranking by a test metric"):
        table(sweep, "test_accuracy")
    with pytest.raises(UserError, match=r"by=val_f1: unknown metric of these runs; allowed: .*val_accuracy") as caught:
        table(sweep, "val_f1")
    assert not {"parameters", "processes", "epochs", "steps"} & set(re.findall(r"\w+", str(caught.value)))


def test_commands_repeat_rows_and_runs(tmp_path: Path) -> None:
    odd = ["name='it''s'", "hydra.run.dir=x", "resume=auto", "+data.train.x=$(touch x)"]
    for seed in (0, 1):
        make_run(tmp_path / "a" / str(seed), lr=0.1, seed=seed)
        typed = ["optimizer.lr=0.2", f"seed={seed}", f"model.widths=[{seed}]", *odd]
        make_run(tmp_path / "b" / str(seed), lr=0.2, seed=seed, overrides=typed)
    for i, line in enumerate(["optimizer.lr=0.3\x1b[0m", "optimizer.lr=0.3\nrm -r x", "--multirun", "a b"]):
        make_run(tmp_path / f"c{i}", lr=0.3 + i, overrides=[line])
    rows = {row.values["optimizer.lr"]: row for row in table(tmp_path).rows}
    assert rows[0.1].command == "dlopt train -m optimizer=sgd optimizer.lr=0.1 seed=0,1"
    assert shlex.split(rows[0.2].command or "") == [
        "dlopt", "train", "optimizer.lr=0.2", "seed=0", "model.widths=[0]", "+data.train.x=$(touch x)",
    ]  # fmt: skip
    assert [rows[0.3 + i].command for i in range(4)] == [None] * 4


@pytest.mark.parametrize(
    ("typed", "needs"),
    [
        ("allow_packages=[mine,other.lab]", "allow_packages=[mine,other.lab], if you trust this code"),
        ("allow_packages=[mine];rm -r x", ""),
        ("optimizer.lr=0.1", ""),
    ],
)
def test_names_the_packages_that_a_command_leaves_out(typed: str, needs: str, tmp_path: Path) -> None:
    """Whoever pastes the command of a stranger's run does not trust its packages by that."""
    make_run(tmp_path / "a", overrides=["model=mlp", typed])
    ranking = table(tmp_path)
    assert ranking.best is not None
    assert ranking.best.needs == needs and "allow_packages" not in str(ranking.best.command)
    facts = page_data(ranking, target=None, test=False, refresh=None)["rows"][0]["facts"]
    assert (["command needs", needs] in facts) == (needs != "")


def test_summary_csv(sweep: Path) -> None:
    rows = read_csv(table(sweep))
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"]
    first, last = rows[0], rows[-1]
    assert (first["optimizer"], first["optimizer.lr"], first["runs"], first["failed"]) == ("adamw", "0.1", "3", "0")
    assert float(first["val_accuracy"]) == pytest.approx(0.91) and float(first["val_accuracy_std"]) == pytest.approx(
        0.01
    )
    assert (last["ended"], last["failed"]) == ("2", "1")
    assert (first["target"], first["reached"], first["steps_to_target"], first["seconds_to_target"]) == (
        "0.7", "3", "20.0", "2.0"
    )  # fmt: skip
    assert float(rows[1]["difference"]) == pytest.approx(-0.1) and rows[1]["pairs"] == "3"
    assert first["command"].startswith("dlopt train -m optimizer=adamw") and "sweep/8" in first["folders"]


def test_test_metrics_of_the_first_row_only_by_default(sweep: Path) -> None:
    assert [bool(row["test_accuracy"]) for row in read_csv(table(sweep))] == [True, False, False, False]
    assert all(row["test_accuracy"] for row in read_csv(table(sweep), test=True))
    for test in (False, True):
        data = page_data(table(sweep), target=0.7, test=test, refresh=None)
        facts = [[name for name, _ in row["facts"]] for row in data["rows"]]
        assert ["test accuracy" in names for names in facts] == [True, test, test, test]
        assert [row["cells"].get("test_accuracy") is not None for row in data["rows"]] == [test] * 4
        assert "test_accuracy" not in json.dumps([row["runs"] for row in data["rows"]])


def test_csv_escapes_formulas(tmp_path: Path) -> None:
    make_run(tmp_path / "0", config={"optimizer.weight_decay": "=1+1"})
    make_run(tmp_path / "1", config={"optimizer.weight_decay": -0.5})
    assert {row["optimizer.weight_decay"] for row in read_csv(table(tmp_path))} == {"'=1+1", "-0.5"}


def test_table_without_metrics(tmp_path: Path) -> None:
    make_run(tmp_path / "0", accuracies=(), status=None)
    make_run(tmp_path / "1", lr=0.5, accuracies=(), status="failed")
    result = table(tmp_path)
    assert [row.value for row in result.rows] == [None, None]
    assert page(result, title="t", made="now", target=None, test=False, refresh=None)
    assert len(read_csv(result)) == 2


# -- the page


def data_of(text: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert match is not None
    result: dict[str, Any] = json.loads(match[1])
    return result


def test_page_escapes_untrusted_data(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>{{script}}"
    make_run(tmp_path / "0", status="failed", reason=evil, config={"optimizer.weight_decay": evil})
    make_run(tmp_path / "1<b>")
    text = page(table(tmp_path), title=evil, made="now", target=None, test=False, refresh=None)
    assert [evil in failure for failure in data_of(text)["failed"]] == [True]
    assert text.count("<script") == 2 and text.count("</script>") == 2 and "<img" not in text


PAYLOADS = (
    "<script>alert(1)</script>", "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>', "'><b>", "' onmouseover='alert(1)", '" autofocus onfocus="alert(1)',
    "javascript:alert(1)", "<a href=javascript:alert(1)>x</a>", "<!--<script>", "-->", "]]>", "<iframe srcdoc=x>",
    "<base href=//x>", "<meta http-equiv=refresh content=0>", "<style>*{}</style>", "</style><b>", "</title><b>",
    "</template><b>", "&lt;script&gt;", "&#60;b>", "{{7*7}}", "{% raw %}", "${alert(1)}", "`x`", "\u2028x", "<\0b>",
    "\x1b[31m", "<b\n>", "+ADw-script+AD4-", "\u202e<b>",
)  # fmt: skip


class Elements(HTMLParser):
    """Lists the elements of a page with the names of their attributes, and the values that lead elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[Any, ...]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        links = [value for name, value in attrs if name in ("href", "src", "style", "content")]
        self.found.append((tag, *(name for name, _ in attrs), *(links if tag != "meta" or len(links) < 2 else ())))

    def handle_comment(self, data: str) -> None:
        self.found.append(("comment", data))


def run_with(path: Path, text: str, number: int, status: str) -> None:
    """Writes a run that has `text` wherever a stranger may put one."""
    lines = [f"name={text}", f"+optimizer.{text}=1", f"tags=[{text}]"]
    config = {"name": text, "note": text, "tags": [text], f"optimizer.key {text}": text, "model._target_": text,
              "device": text, "monitor": text}  # fmt: skip
    make_run(path, lr=0.1 + number, accuracies=(0.5, 0.5 + number / 100), config=config, status=status, reason=text,
             overrides=lines)  # fmt: skip
    facts = {"folder_format": FORMAT, "git_commit": text, "choices": {"optimizer": text, text: text}}
    (path / "environment.json").write_text(json.dumps(facts))
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    (path / "metrics.jsonl").write_text("".join(json.dumps({**line, f"val_{text}": 0.5}) + "\n" for line in lines))
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps({**summary, f"test_{text}": 0.5, "parallel": text}))


def test_markup_in_runs_adds_no_element_to_the_page(tmp_path: Path) -> None:
    """Whatever texts the files of a run have, the page has the elements that it has for plain words."""
    pages = {}
    for kind, texts in (("plain", [f"word{number}" for number in range(len(PAYLOADS))]), ("evil", PAYLOADS)):
        for number, text in enumerate(texts):
            name = "".join(letter for letter in text if letter not in "/\0")
            run_with(tmp_path / kind / f"{number} {name}", text, number, "failed" if number % 5 == 0 else "finished")
        (tmp_path / kind / f"0 {texts[0].replace('/', '')}" / "config.yaml").write_text("[")
        keys: dict[str, Any] = {"made": texts[2], "target": 0.6, "test": True, "refresh": None}
        pages[kind] = page(table(tmp_path / kind), title=texts[0], **keys)
    assert Elements(pages["evil"]).found == Elements(pages["plain"]).found
    assert not set(re.findall(r"[\0-\x08\x0b-\x1f\x7f\u202e\u2028]", pages["evil"]))
    data = json.dumps(data_of(pages["evil"]), ensure_ascii=False)
    assert all(json.dumps(text, ensure_ascii=False)[1:-1] in data for text in PAYLOADS[1:5]), "shown as they are"


def test_scripts_of_the_page_insert_text_only() -> None:
    scripts = "".join(map(read_text, SCRIPTS))
    assert "textContent" in scripts
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", scripts)


def test_page_needs_no_network(sweep: Path) -> None:
    text = page(table(sweep), title="t", made="now", target=None, test=False, refresh=None)
    assert (
        not re.search(r"(src|href)=\"(?!data:)", text)
        and "@import" not in text
        and "url(" not in text.replace("url(#", "")
    )
    addresses = set(re.findall(r"https?://[^\s\"')]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a namespace
    assert len(text) < 150_000
    assert "default-src 'none'" in text and "unsafe-inline" not in text


@pytest.mark.parametrize("compute", [
    lambda ranking: page_data(ranking, target=0.7, test=True, refresh=None),
    lambda ranking: summary_csv(ranking, 0.7, test=True),
], ids=["page", "csv"])  # fmt: skip
def test_time_is_linear_in_the_number_of_runs(compute: Callable[[Ranking], object], tmp_path: Path) -> None:
    draw, counts = Random(0), []
    for number in range(80):
        keys = {"optimizer.weight_decay": draw.random(), "model.widths": [draw.choice((32, 64))]}
        make_run(tmp_path / str(number), lr=draw.random(), accuracies=(0.5, draw.random(), draw.random()), config=keys)
        if number + 1 in (20, 40, 80):
            counts.append(count_calls(lambda: compute(table(tmp_path))))
    assert 0 < counts[2] - counts[1] < 2.2 * (counts[1] - counts[0])


def test_thins_long_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curve = tuple(0.5 + 0.4 * (i == 71) + 0.3 * (i == 33) for i in range(200))
    make_run(tmp_path / "0", accuracies=curve)
    monkeypatch.setattr("dlopt.results.page_data._POINTS", 300)
    data = page_data(table(tmp_path), target=0.7, test=False, refresh=None)
    [run] = data["rows"][0]["runs"]
    [positions] = run["x"]  # shared by all metrics
    assert len(positions["epoch"]) < 50 and {1, 200} <= set(positions["epoch"])
    assert run["curves"]["val_accuracy"] == [0, [curve[epoch - 1] for epoch in positions["epoch"]]]
    [first, *_] = data["times"]  # the time to the target is that of all epochs
    assert first["target"] == "70.00 %"
    assert first["entries"] == [[0, 1, "1 of 1", False, ["340", 1.0], ["34.0 s", 1.0]]]


@pytest.mark.slow
def test_a_page_of_1000_runs_has_at_most_one_megabyte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random keys and curves, and logs, of a search in which every run is a configuration."""
    monkeypatch.setattr("dlopt.results.page.importance", lambda _: None)
    draw, records = Random(0), []
    names = ("val_accuracy", "val_loss", "train_accuracy", "train_loss", "lr", "samples_per_second")
    for number in range(1000):
        lines = [
            {"epoch": i, "step": 20 * i, "seconds": i + draw.random()}
            | {name: 1 - 0.9**i * draw.random() for name in names}
            for i in range(1, 61)
        ]
        path = tmp_path / str(number)
        path.mkdir()
        (path / "output.log").write_text("".join(" ".join(f"{v:.4g}" for v in line.values()) + "\n" for line in lines))
        keys = {
            "optimizer.lr": draw.random(),
            "optimizer.weight_decay": draw.random(),
            "model.widths": draw.randrange(9),
        }
        config = {"optimizer": "sgd", "seed": 0, **keys, **{f"data.key{i}": i for i in range(100)}}
        metrics = {key: value for key, value in lines[-1].items() if key not in ("epoch", "step")}
        typed = [f"{key}={value}" for key, value in keys.items()]
        records.append(Record(path, "finished", config, metrics, lines, typed))
    text = page(gather(records, []), title="t", made="now", target=0.9, test=False, refresh=None)
    assert len(text.encode()) < 1_000_000 and 'type="application/gzip"' in text


def test_numbers_of_a_cell_have_common_decimals() -> None:
    assert statistic_text("gap", Statistic(-7.19e-4, 0.0364, 3)) == "-0.0007 ± 0.0364"
    assert statistic_text("gap", Statistic(0.0364, 7.19e-4, 3)) == "0.0364 ± 0.0007"
    assert statistic_text("val_loss", Statistic(0.5, 0.0, 3)) == "0.5000 ± 0.0000"
    assert difference_text("val_loss", Difference(-7e-4, -0.04, 3e-4, 3)) == "-0.0007 [-0.0400, +0.0003]"


def test_a_log_of_a_run_is_shown_without_control_characters_and_hidden_test_metrics(tmp_path: Path) -> None:
    for number, name in enumerate(("output.log", "train.log")):
        make_run(tmp_path / str(number), lr=0.1 + number, accuracies=(0.5, 0.9 - number / 10))
        text = f"\x1b[31mred\x07\ntest   0.25  91.25 %\n{'x' * 5000}\nlast: test_accuracy 91.25 %, end\n"
        (tmp_path / str(number) / name).write_text(text * (number + 1))
    for test in (False, True):
        data = page_data(table(tmp_path), target=None, test=test, refresh=None)
        first, second = (row["runs"][0]["log"] for row in data["rows"])
        assert first[-1] == "last: test_accuracy 91.25 %, end" and all(len(line) < 302 for line in first + second)
        assert second[-1] == ("last: test_accuracy 91.25 %, end" if test else "last: (test metrics hidden), end")
    (tmp_path / "1/train.log").write_text("a\nfinished after 3 epochs, 63 steps in 0.4 s\n" + "macro f1 0.9\n" * 500)
    data = page_data(table(tmp_path), target=None, test=False, refresh=None)
    hidden = ["a", "finished after 3 epochs, 63 steps in 0.4 s", "(test metrics hidden)"]
    assert data["rows"][1]["runs"][0]["log"] == hidden, "also those in the lines below the result"
    (tmp_path / "0/output.log").write_text("\x1b[31mred\x07\ntest   0.25  91.25 %\n")
    data = page_data(table(tmp_path), target=None, test=True, refresh=None)
    assert data["rows"][0]["runs"][0]["log"] == ["red�", "test   0.25  91.25 %"]


def test_the_data_of_a_page_has_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is compressed, so that a search in the page does not find it."""
    monkeypatch.setattr("dlopt.basics.secrets._replacements", {})
    note("a secret, 42", "${oc.env:TOKEN}", is_named=True)
    make_run(tmp_path / "0", config={"note": "a secret, 42"})
    for size in (0, 10**6):
        monkeypatch.setattr("dlopt.results.page._LARGEST_PLAIN", size)
        text = page(table(tmp_path), title="t", made="now", target=None, test=False, refresh=None)
        content = re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)[0]
        if size == 0:
            content = gzip.decompress(base64.b64decode(content)).decode()
        assert "a secret, 42" not in content and "${oc.env:TOKEN}" in content


def test_small_losses_are_not_rounded_to_zero() -> None:
    assert statistic_text("val_loss", Statistic(2.18e-5, 4.4e-7, 3)) == "2.18e-05 ± 4.40e-07"
    assert difference_text("val_loss", Difference(-1.9e-6, None, None, 1)) == "-1.90e-06"
    assert statistic_text("val_loss", Statistic(0.5, None, 1)) == "0.5000"
    assert difference_text("val_accuracy", Difference(0.012, 0.0, 0.024, 3)) == "+1.20 [+0.00, +2.40]"
    assert statistic_text("seconds", Statistic(8.8, 0.8, 3)) == "8.8 ± 0.8 s"


def test_runs_on_several_devices_form_one_configuration_without_a_device(tmp_path: Path) -> None:
    for seed, device in enumerate(("cpu", "cuda")):
        make_run(tmp_path / device, seed=seed, config={"device": device})
    result = table(tmp_path)
    assert len(result.rows) == 1 and not result.keys


def test_csv_distinguishes_the_epochs_of_the_config_from_those_that_were_run(tmp_path: Path) -> None:
    for epochs in (5, 7):
        make_run(tmp_path / str(epochs), accuracies=(0.5,) * (epochs - 2), config={"epochs": epochs})
    result = table(tmp_path)
    rows = list(csv.DictReader(io.StringIO(summary_csv(result, None, test=False))))
    assert [(row["config.epochs"], float(row["epochs"])) for row in rows] == [("5", 3), ("7", 5)]


def record_of(seed: int, values: tuple[float, ...], lr: object = 0.1, status: str = "finished") -> Record:
    lines = tuple(
        {"epoch": i + 1, "step": 10 * (i + 1), "seconds": i + 1.0, "val_loss": v} for i, v in enumerate(values)
    )
    metrics = {"val_loss": values[-1]} if values else {}
    return Record(Path(f"{lr}-{seed}"), status, {"seed": seed, "optimizer": "sgd", "optimizer.lr": lr}, metrics, lines)


def test_epochs_that_half_of_the_runs_reach_are_shown() -> None:
    runs = [record_of(seed, (0.5,) * count) for seed, count in enumerate((2, 2, 3, 4))]
    found = band(runs, "val_loss")
    assert found is not None and found.count.tolist() == [4, 4, 2]
    assert default_spread(gather(runs, [])) == "range"
    five = gather([record_of(seed, (0.5 + seed,)) for seed in range(5)], [])
    assert default_spread(five) == "confidence" and default_spread(gather([], [])) == "range"


def test_rates_of_zero_and_texts_have_no_sensitivity() -> None:
    def rates(*lrs: object) -> list[list[float]]:
        found = sensitivities(gather([record_of(0, (0.5 + i,), lr) for i, lr in enumerate(lrs)], []))
        return [[lr for lr, _ in each.best] for each in found]

    assert rates(0.1, 0.2) == [[0.1, 0.2]] and rates(0.1, 0.1) == [] and rates(0.0, 0.1) == []
    assert rates("auto", 0.1, 0.3, 0.0) == [[0.1, 0.3]]
    runs = [record_of(0, (0.5,), lr) for lr in (0.1, 0.2)]
    failed = [record_of(0, (), lr, "failed") for lr in (0.0, 5.0, "auto", 5.0)]
    assert sensitivities(gather([*runs, *failed], []))[0].failed == [5.0]


def test_good_rates_are_next_to_the_best_one() -> None:
    losses = {0.1: 21.2, 0.2: 21.0, 0.3: 20.0, 0.4: 21.0, 0.5: 24.0, 0.6: 20.0}
    [found] = sensitivities(gather([record_of(0, (loss,), lr) for lr, loss in losses.items()], []))
    assert found.good == (0.2, 0.4) and found.tolerance == 1.0
    [found] = sensitivities(gather([record_of(0, (loss,), lr) for lr, loss in ((0.1, 1.0), (0.2, 1.0))], []))
    assert found.good == (0.1, 0.2)


def test_targets_that_fractions_of_the_configurations_reach() -> None:
    ranking = gather([record_of(0, (loss,), loss) for loss in (0.12341, 0.2, 0.3, 0.4)], [])
    assert default_target(ranking) == 0.3 and targets(ranking) == [0.124, 0.2, 0.3, 0.4, 0.4]
    for loss, expected in ((0.0, 0.0), (1e-301, 1e-301), (1.2345e-299, 1.24e-299), (123456.0, 124000.0)):
        assert default_target(gather([record_of(0, (loss,), 0.1)], [])) == pytest.approx(expected, rel=1e-12)
    assert default_target(gather([], [])) is None and targets(gather([], [])) == []


def test_importance_needs_six_configurations_that_differ() -> None:
    for count, losses in ((5, range(5)), (6, [1.0] * 6)):
        rows = [record_of(0, (float(loss),), 0.1 * (i + 1)) for i, loss in zip(range(count), losses, strict=True)]
        assert importance(gather(rows, [])) is None


def test_a_command_repeats_all_seeds_of_a_configuration() -> None:
    def command(*overrides: list[str], seeds: tuple[int, ...]) -> str | None:
        runs = [
            dataclasses.replace(record_of(seed, (0.5,)), overrides=lines)
            for seed, lines in zip(seeds, overrides, strict=True)
        ]
        return gather(runs, []).rows[0].command

    lines = ["optimizer.lr=0.1", "name=x", "hydra.verbose=true"]
    both = [*lines, "seed=1"], [*lines, "seed=2"]
    assert command(*both, seeds=(1, 2)) == "dlopt train -m optimizer.lr=0.1 seed=1,2"
    assert command(*both, seeds=(1, 1)) == "dlopt train optimizer.lr=0.1 seed=1"
    assert command(both[0], seeds=(1,)) == "dlopt train optimizer.lr=0.1 seed=1"
    for seeds, shown in (
        (range(5), "seed=0,1,2,3,4"), (range(300), "'seed=range(0,300)'"), (range(3, 9), "'seed=range(3,9)'"),
        ((0, 1, 2, 3, 4, 6), "seed=0,1,2,3,4,6"), ((5, 4, 3, 2, 1, 0), "'seed=range(0,6)'"),
    ):  # fmt: skip
        typed = [[*lines, f"seed={seed}"] for seed in seeds]
        assert command(*typed, seeds=tuple(seeds)) == f"dlopt train -m optimizer.lr=0.1 {shown}"
    assert command(both[0], ["optimizer.lr=1e-1"], seeds=(1, 2)) == "dlopt train optimizer.lr=0.1 seed=1"
    assert command([], [], seeds=(1, 2)) is None and command(["a b"], seeds=(1,)) is None
