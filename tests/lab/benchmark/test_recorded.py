"""The figures, texts and tables of synthetic benchmarks, as recorded: what a change of the code changes is a diff.

    REGENERATE_GOLDEN=1 python -m pytest tests/lab/benchmark/test_recorded.py

writes tests/lab/benchmark/recorded; read the difference before you commit it.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlopt.lab.benchmark import figures, page, symptoms, table, tuning
from dlopt.lab.benchmark.results import Results, WorkloadTarget, to_json
from dlopt.lab.benchmark.scores import summarize
from tests.lab.benchmark.synthetic import flipped, healthy, ignores_both, ignores_lr, make
from tests.support.drawn import check_recorded, describe, flat

FOLDER = Path(__file__).with_name("recorded")


def own_and_shipped() -> Results:
    """Two optimizers of this machine and three shipped ones, one of them without costs, on four workloads."""
    workloads = ("mlp", "gpt", "noisy_labels", "vit")
    speeds = {"muon": 2.2, "sam": 0.9, "never": 0.01, "a_package.with.a.very_long_name.of.an.Optimizer": 1.4}
    reference = make({"adamw": 1.4, "soap": 2.0, "sgd": 0.7}, workloads, 3, 4)
    cells = dict(reference.cells)
    cells["soap", "gpt"] = dataclasses.replace(cells["soap", "gpt"], cost=None)
    own = make(speeds, workloads, 3, 4)
    targets = dict(own.workloads)
    targets["vit"] = WorkloadTarget("val_accuracy", math.nan, 400)
    own = dataclasses.replace(own, workloads=targets)
    return own.with_reference(dataclasses.replace(reference, cells=cells))


def many() -> Results:
    """Nine optimizers in one study without costs."""
    speeds = {"schedule_free_adamw": 1.6, "_x": 1.5, "muon": 2.2, "soap": 2.0, "shampoo": 1.8, "adamw": 1.4,
              "nadam": 1.45, "sgd": 0.75, "slow": 0.2}  # fmt: skip
    return make(speeds, ("mlp", "resnet"), 1, 10, costs=False)


def rounded(results: Results) -> Iterator[str]:
    summary = summarize(results)
    for measure in summary.measures:
        scores = {each.optimizer: each.score for each in summary.standings[measure]}
        yield from flat([scores, summary.times[measure]], measure)
    yield from flat([summary.standings["updates"], summary.comparisons["updates"]], "updates")
    found = tuning.tuning(results)
    yield from flat(found, "tuning")


@pytest.mark.parametrize("results", [own_and_shipped(), many()], ids=["own", "many"])
def test_figures(results: Results, request: pytest.FixtureRequest) -> None:
    found = []
    for name, figure in figures.draw(results, summarize(results)).items():
        found += [name, *describe(figure)]
    check_recorded(FOLDER / f"figures_{request.node.callspec.id}.txt", found)


@pytest.mark.parametrize("results", [own_and_shipped(), many()], ids=["own", "many"])
def test_numbers_and_texts(results: Results, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = summarize(results)
    found = [*rounded(results), *table.latex(results, summary).splitlines()]
    for width in (table.WIDTH, 80):
        found += [f"width {width}", *table.lines(results, width)]
    monkeypatch.setattr(page, "__version__", "0")
    stubs = {name: {"source": "data:,", "width": "1"} for name in figures.FIGURES}
    text = re.sub(r"(<(script|style)[^>]*>).*?(</\2>)", r"\1\3", page.page(results, summary, stubs), flags=re.DOTALL)
    found += re.sub(r"sha256-[^']*", "sha256", text).splitlines()
    check_recorded(FOLDER / f"texts_{request.node.callspec.id}.txt", found)


def test_symptoms_and_files() -> None:
    behaviours = {"flipped": flipped, "both": ignores_both, "rate": ignores_lr, "low": healthy, "high": healthy}
    ranges = {"low": (1e-4, 1e-2), "high": (1e-2, 1.0)}
    results = make(dict.fromkeys(behaviours, 1.4), ("mlp", "gpt", "vit"), 2, 6, behaviours, ranges)
    found = []
    for optimizer in results.optimizers:
        for row in symptoms.symptoms(results, optimizer):
            found += flat(row, optimizer)
    found += flat(symptoms.range_rows(results, results.optimizers), "ranges")
    found += [line for line in to_json(make({"sgd": 1.0}, ("mlp",), 1, 2)).splitlines()]
    check_recorded(FOLDER / "symptoms.txt", found)
