"""Comparison of recipes with published results in the table, the CSV file and the page."""

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest

from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain
from dlopt.results.columns import published_table, summary_csv
from dlopt.results.page import page
from dlopt.results.published import against_published, published_error, recipe_label
from dlopt.tracking.terminal_text import settings
from tests.support.folders import make_run, table
from tests.support.line import dlopt

RECIPE: dict[str, Any] = {"published": [{"error": 24.0, "when": {"epochs": 3}}], "name": "recipe"}


CHANGES = (
    "epochs=2", "data.subset=4500", "optimizer=adam", "optimizer.weight_decay=0", "augmentation=none", "model.width=8",
)  # fmt: skip


def config(*typed: str) -> dict[str, Any]:
    plain, saved = to_plain(Composer().compose(list(typed)))
    parse(plain)
    return settings(saved)


@pytest.mark.parametrize(
    ("typed", "error"),
    [
        ("experiment=resnet20_cifar10", 8.75),
        ("experiment=resnet110_cifar10", 6.43),
        ("experiment=resnet20_cifar10 epochs=100", None),
        ("experiment=resnet20_cifar10 model=resnet32", None),
        ("experiment=resnet20_cifar10_short", None),
        ("experiment=wrn_28_10_cifar100", 19.25),
        ("experiment=resnet20_fashion_mnist", 4.82),
        ("experiment=resnet20_fashion_mnist_erasing", 4.45),
        ("experiment=cifar10_speed", 5.99),
        ("experiment=sgdr_cifar10 schedule.T_0_epochs=10 schedule.T_mult=2 epochs=150", 4.03),
        ("experiment=sgdr_cifar10 schedule.T_0_epochs=200 schedule.T_mult=1", 3.86),
        ("experiment=sgdr_cifar10 schedule.T_0_epochs=7", None),
        ("experiment=sgdr_cifar100 model.widen=20 schedule.T_0_epochs=1 schedule.T_mult=2 epochs=127", 18.9),
        (
            "experiment=sgdr_cifar10 schedule=multistep schedule.gamma=0.2 schedule.milestones_epochs=[60,120,160] "
            "optimizer.lr=0.05",
            4.13,
        ),
        ("experiment=sgdr_code_cifar10 schedule.T_0_steps=7810 schedule.T_mult=2 steps=117150", 4.03),
        ("optimizer=sgd", None),
    ],
)
def test_published_errors_of_recipes(typed: str, error: float | None) -> None:
    overrides = typed.split()
    assert published_error(config(*overrides), overrides) == error


def test_no_published_error_beside_a_run_that_differs_from_the_paper() -> None:
    recipe = config("experiment=resnet20_cifar10")
    assert published_error(recipe, ["experiment=resnet20_cifar10", "seed=3", "device=cuda", "parallel=ddp"]) == 8.75
    assert published_error(recipe, ["experiment=resnet20_cifar10", "epochs=200", "model=resnet20"]) == 8.75
    for line in CHANGES[1:]:
        assert published_error(recipe, ["experiment=resnet20_cifar10", line]) is None, line
    typed = ["experiment=resnet20_cifar10", CHANGES[0]]
    assert published_error(config(*typed), typed) is None


@pytest.mark.parametrize(
    "damaged", [None, "8.75", [8.75], [{"error": "x", "when": {}}], [{"error": 1.0}], [{"when": {}}]]
)
def test_ignores_malformed_published_entries(damaged: Any) -> None:
    assert published_error({"published": damaged}, []) is None


def test_groups_seeds_and_omits_runs_without_published_result(tmp_path: Path) -> None:
    for seed, test in enumerate((0.75, 0.77)):
        make_run(tmp_path / str(seed), seed=seed, test=test, config=RECIPE, overrides=["experiment=recipe"])
    make_run(tmp_path / "2", lr=0.5, test=0.7, config=RECIPE | {"published": []})
    result = table(tmp_path)
    assert result.keys == ["optimizer.lr"]  # published results do not distinguish runs
    [published] = against_published(result)
    assert published.published == 24.0 and published.measured is not None and published.measured.count == 2
    assert published.median == pytest.approx(24.0)
    assert published.measured.mean == pytest.approx(24.0) and published.measured.std == pytest.approx(
        100 * 0.02 / 2**0.5
    )
    assert recipe_label(published, result) == "recipe lr=0.1"
    rows = list(csv.DictReader(io.StringIO(summary_csv(result, None, test=False))))
    assert {row["published_error_percent"] for row in rows} == {"24.0", ""}
    assert published_table(result).rows == [["recipe lr=0.1", "2", "24.00 ± 1.41", "24.00", "24.00", "+0.00"]]
    text = page(result, title="t", made="m", target=None, test=False, refresh=None)
    assert "24.00 ± 1.41</td>" in text


def test_csv_has_no_published_columns_without_published_results(tmp_path: Path) -> None:
    make_run(tmp_path / "0")
    assert "published" not in summary_csv(table(tmp_path), None, test=False).splitlines()[0]


def test_command_shows_published_results(tmp_path: Path) -> None:
    make_run(tmp_path / "runs/0", test=0.77, config=RECIPE, overrides=["experiment=recipe"])
    make_run(tmp_path / "runs/1", lr=0.5, status=None, config=RECIPE)
    result = dlopt(tmp_path, "report", "runs", "format=csv")
    assert result.code == 0, result.err
    lines = [re.split(r"\s{2,}", line.strip()) for line in result.out.splitlines()]
    assert ["recipe", "runs", "test error %", "median", "published", "difference"] in lines
    assert ["recipe lr=0.1", "1", "23.00", "23.00", "24.00", "-1.00"] in lines
    assert not any(line[0] == "recipe lr=0.5" for line in lines)  # the paper fixed the learning rate


def test_modified_recipe_has_no_published_result(tmp_path: Path) -> None:
    typed = ("experiment=cifar10_speed", "data=digits", "model.widths=[4,4,8]", "data.batch_size=200", "steps=2")
    result = dlopt(tmp_path, "train", *typed, "threads=1", "tracking=[]", "device=cpu", "hydra.run.dir=run")
    assert result.code == 0, result.err
    result = dlopt(tmp_path, "report", "run", "format=csv")
    assert result.code == 0 and "published" not in result.out  # batches of 200 differ from the recipe
