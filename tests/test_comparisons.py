"""Comparisons of the lecture: their commands run, and the shipped results support the verdicts on their claims."""

import json
import re
from collections.abc import Callable
from math import prod
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import yaml

from dlopt.config.choices import config_folder
from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain
from dlopt.data.generated import polynomial
from dlopt.data.samples import InMemory
from dlopt.data.splits import prepare
from dlopt.lab.comparison.claims import MeasuredSide, judge
from dlopt.lab.comparison.command import comparison_of
from dlopt.lab.comparison.comparison import Comparison, Results, read
from dlopt.lab.comparison.sentences import numbers
from tests.support.comparisons import GALLERY, SHIPPED
from tests.support.line import dlopt

pytestmark = pytest.mark.drawn

FOLDER = config_folder() / "experiment" / "lecture"

LECTURES = sorted(
    path.stem for path in FOLDER.glob("*.yaml") if path.stem[0] != "_" and "\ncomparison:\n" in path.read_text()
)


def final(results: Results, variant: str, *point: object, metric: str | None = None) -> float:
    """Returns the mean final metric over seeds; NaN if one diverged."""
    return fmean(results.finals(variant, results.comparison.metrics[0] if metric is None else metric)[point])


Run = Callable[..., Results]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs the lecture's command with `more` overrides."""

    def execute(name: str, *more: str) -> Results:
        line = [f"experiment=lecture/{name}", *more]
        folder = tmp_path / f"out-{len([*tmp_path.iterdir()])}"
        result = dlopt(tmp_path, "train", *line, f"hydra.run.dir={folder}")
        assert result.code == 0, result.err
        assert (folder / "comparison.png").stat().st_size > 20_000
        composer = Composer()
        comparison = comparison_of(composer, composer.compose(line), line)
        cells = list(comparison.cells())
        return Results(comparison, {cell: read(folder / str(i), comparison.metrics) for i, cell in enumerate(cells)})

    return execute


def test_headers_list_command_and_number_of_runs() -> None:
    for name in LECTURES:
        text = (FOLDER / f"{name}.yaml").read_text()
        comparison = yaml.safe_load(text)["comparison"]
        directive, *header = text.partition("\ndefaults:")[0].splitlines()
        assert directive == "# @package _global_" and all(line.startswith("#") for line in header), name
        assert f"  dlopt train experiment=lecture/{name}" in "\n".join(header)
        axes = [len(values) for values in comparison.get("along", {}).values()]
        variants = len(comparison["variants"]) * prod(axes) + len(comparison.get("before", {}))
        runs = variants * len(comparison.get("seeds", [0]))
        assert f"{runs} runs, " in "\n".join(header), name
        assert comparison.get("claims") or name == "parallel_comparison"  # too long for several seeds
        assert comparison["see"].endswith((".", ")", "?")) and len(comparison["see"]) < 300, name


@pytest.mark.parametrize("name", LECTURES)
def test_is_valid_and_shipped_numbers_support_the_verdicts(name: str) -> None:
    composer, line = Composer(), [f"experiment=lecture/{name}"]
    config = composer.compose(line)
    spec = comparison_of(composer, config, line)
    if spec.quick_overrides:
        check_quick_form(composer, line, spec)
    if name in SHIPPED:
        parse(*to_plain(config))
        check_shipped(name, spec)


def check_quick_form(composer: Composer, line: list[str], full: Comparison) -> None:
    """It has one seed and no point of its own."""
    quick_line = [*full.quick_overrides, "comparison.quick=true", *line]
    quick = comparison_of(composer, composer.compose(quick_line), quick_line)
    points = {(cell.variant, cell.point) for cell in full.cells()}
    assert quick.quick and len(quick.seeds) == 1
    assert {(cell.variant, cell.point) for cell in quick.cells()} <= points


def check_shipped(name: str, spec: Comparison) -> None:
    """The shipped numbers support the verdict, but not of an inverted claim.

    Fails if the recipe has changed since its plot was drawn; scripts/gallery NAME redraws it.
    """
    saved = json.loads((GALLERY / f"{name}.json").read_text())
    assert [claim.text for claim in spec.claims] == [entry["claim"] for entry in saved["claims"]]
    assert (saved["title"], saved["seeds"]) == (spec.title, spec.seeds) and len(spec.seeds) >= 3
    for claim, entry in zip(spec.claims, saved["claims"], strict=True):
        first, second = entry["sides"]
        sides = next(side for side in claim.first if side.variant == first["variant"]), claim.second
        points = first["at"], second["at"]
        values = [float(value) for value in first["values"]], [float(value) for value in second["values"]]
        bounds = first.get("bounds", ()), second.get("bounds", ())
        edges = first.get("edges", {}), second.get("edges", {})
        finding = judge(claim, *map(MeasuredSide, sides, points, values, bounds, edges))
        assert (finding.verdict, numbers(finding)) == (entry["verdict"], entry["outcome"])
        if entry["verdict"] == "supported" and claim.relation != "equal":
            assert judge(claim, *map(MeasuredSide, sides, points, values[::-1])).verdict == "contradicted"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lecture/batch_size", "has {} updates of single samples"),
        ("lecture/dropout", "on {} digits"),
        ("lecture/dropout_units", "on {} samples"),
        ("lecture/weight_decay_adam", "on {} training samples"),
        ("benchmark/_digits", "{:,} training and 431 validation"),
    ],
)
def test_recipes_state_the_number_of_training_samples(name: str, text: str) -> None:
    line = [f"experiment={name.replace('_digits', 'vit')}"]
    run_config = parse(*to_plain(Composer().compose(line)))
    train = prepare(run_config.data.build(), run_config.data_settings).train
    stated = (config_folder() / f"experiment/{name}.yaml").read_text()
    assert text.format(len(train)) in " ".join(stated.split())


@pytest.mark.parametrize("name", ["regression", "medium/regression"])
def test_the_condition_number_of_the_regression_includes_the_bias(name: str) -> None:
    line = [f"experiment=benchmark/{name}"]
    run_config = parse(*to_plain(Composer().compose(line)))
    train = prepare(run_config.data.build(), run_config.data_settings).train
    assert isinstance(train, InMemory)
    inputs = np.column_stack([train.inputs.double().numpy(), np.ones(len(train))])
    condition = np.linalg.cond(inputs) ** 2  # of the Hessian of the squared error
    header = (config_folder() / f"experiment/benchmark/{name}.yaml").read_text()
    stated = re.search(r"condition number of ([\d,]+)", header)
    assert stated is not None and float(stated[1].replace(",", "")) == pytest.approx(condition, rel=0.03)


@pytest.mark.slow
def test_claims_are_supported_on_this_machine(tmp_path: Path) -> None:
    """For a recipe of a few seconds that does not compare times."""
    name = "positive_weights"
    saved = json.loads((GALLERY / f"{name}.json").read_text())
    result = dlopt(tmp_path, "train", f"experiment=lecture/{name}", "hydra.run.dir=out")
    assert result.code == 0, result.err
    measured = json.loads((tmp_path / "out/comparison.json").read_text())
    for shipped, entry in zip(saved["claims"], measured["claims"], strict=True):
        assert entry["verdict"] == "supported" or shipped["verdict"] != "supported", entry["sentence"]


@pytest.mark.slow
def test_the_linear_model_ends_at_the_least_squares_line(tmp_path: Path) -> None:
    line = ["experiment=lecture/capacity", "comparison=null", "model.widths=[]", "hydra.run.dir=out"]
    assert dlopt(tmp_path, "train", *line).code == 0
    data = polynomial(
        function="sine", interval=(-2.0, 2.0), noise=0.3, train_size=400, val_size=400, test_size=1000, seed=0
    )
    assert isinstance(data.train, InMemory)
    x, y = data.train.inputs[:, 0].double().numpy(), data.train.targets.double().numpy()
    least = np.mean((np.polyval(np.polyfit(x, y, 1), x) - y) ** 2)
    last = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[-1])
    assert last["train_loss"] == pytest.approx(least, rel=1e-3)


@pytest.mark.slow
def test_one_sample_per_device_is_too_few_without_synchronization(run: Run) -> None:
    devices = "1", "2", "8"

    def finals(results: Results) -> list[dict[str, tuple[float, float]]]:
        """Of each variant, by the samples of a device: (accuracy, training loss)."""
        return [
            {
                n: (final(results, v, n, metric="val_accuracy"), final(results, v, n, metric="train_loss"))
                for n in devices
            }
            for v in results.comparison.variants
            if not results.comparison.only or v in results.comparison.only
        ]

    short = run("batch_norm_per_device", "comparison.seeds=[0]", "data.subset=160", "epochs=1")
    own, virtual, sync = finals(short)
    for n in devices:
        assert sync[n] == pytest.approx(own["8"], rel=1e-9)  # over eight samples, wherever they are
        assert virtual[n][1] == pytest.approx(own[n][1], rel=1e-7)  # virtual batches are the batches of devices
    only = "comparison.only=['the same in one process, by virtual batches']"
    [virtual] = finals(run("batch_norm_per_device", "comparison.seeds=[0]", only))
    assert virtual["1"][0] < 0.3 < 0.75 < virtual["2"][0] < virtual["8"][0] - 0.03
    assert virtual["1"][1] > 1.5 * virtual["2"][1] > 2.25 * virtual["8"][1]
