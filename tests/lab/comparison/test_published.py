"""Comparisons beside published values: the check, the rank correlation, the record and the plot."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from dlopt.basics.errors import UserError
from dlopt.lab.comparison.comparison import Comparison, Results, VariantOutcome
from dlopt.lab.comparison.findings import record
from dlopt.lab.comparison.plots import draw
from dlopt.lab.comparison.published import check_published, describe_published, rank_correlation

SPEC = Comparison(
    title="A table", see="Two columns.", variants={"MLP": []}, along={"schedule": {"a": [], "b": [], "c": []}},
    published={"error\nof the paper": {"a": 0.3, "b": 0.1, "c": 0.2}}, seeds=[0, 1], metrics=["train_loss"], x="epoch",
    choose=None, only=[], quick=False, quick_overrides=[], claims=[],
)  # fmt: skip


def results(*values: float) -> Results:
    """Returns results whose two seeds differ by 0.02 around these means, one per point."""
    means = dict(zip("abc", values, strict=True))
    outcomes = {}
    for cell in SPEC.cells():
        loss = means[str(cell.point[0])] + 0.01 * (2 * cell.seed - 1)
        outcomes[cell] = VariantOutcome([{"epoch": 1, "step": 1, "train_loss": loss}], {"status": "finished"}, {})
    return Results(SPEC, outcomes)


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation_is_that_of_scipy_also_with_ties(seed: int) -> None:
    first, second = np.random.default_rng(seed).integers(0, 5, (2, 9)).astype(float)
    assert rank_correlation(first, second) == pytest.approx(scipy.stats.spearmanr(first, second).statistic)


def test_no_rank_correlation_of_equal_or_diverged_values() -> None:
    assert math.isnan(rank_correlation([1, 1], [1, 2])) and math.isnan(rank_correlation([1, 2], [math.nan, 2]))


def test_record_and_line_have_the_rank_correlation() -> None:
    saved = json.loads(record(results(0.9, 0.5, 0.6), []))["published"]
    assert saved == {
        "label": "error\nof the paper",
        "values": SPEC.published["error\nof the paper"],
        "rank_correlation": 1,
    }
    assert describe_published(results(0.5, 0.9, 0.6)) == [
        "Rank correlation with the published values (Spearman; 1: the same order, 0: unrelated): -1.00"
    ]
    bare = replace(results(0.5, 0.9, 0.6), comparison=replace(SPEC, published={}))
    assert describe_published(bare) == [] and "published" not in json.loads(record(bare, []))


def test_plot_has_a_row_per_point_in_both_columns() -> None:
    published, here = draw(results(0.5, 0.9, 0.6)).axes
    for axes, values in ((published, [0.3, 0.1, 0.2]), (here, [0.5, 0.9, 0.6])):
        assert list(axes.lines[0].get_xdata()) == pytest.approx(values) and list(axes.lines[0].get_ydata()) == [0, 1, 2]
    assert [label.get_text() for label in published.get_yticklabels()] == ["a", "b", "c"]
    assert list(here.lines[1].get_xdata()) == pytest.approx([0.49, 0.51])  # range over seeds


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"published": {"x": {"a": 1.0}}}, "comparison.published.x: must have a value for each of a, b, c"),
        ({"variants": {"a": [], "b": []}}, "comparison.published: needs one label, one variant and one key"),
        ({"along": {}}, "comparison.published: needs one label, one variant and one key"),
    ],
)
def test_values_without_a_point_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_published(replace(SPEC, **keys))
    check_published(SPEC)
