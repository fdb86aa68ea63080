"""Claims of comparisons: measured values, intervals over paired seeds, verdicts and their sentences."""

import json
import math
from typing import Any

import pytest
from scipy import stats

from dlopt.basics.errors import UserError
from dlopt.lab.comparison.claims import parse
from dlopt.lab.comparison.comparison import Comparison, Results, VariantOutcome, VariantRun
from dlopt.lab.comparison.findings import check, evaluate, judged_again, record
from dlopt.lab.comparison.sentences import sentence


def claim(**keys: Any) -> dict[str, Any]:
    return {"claim": "A is lower", "metric": "train_loss", "lower": "a", "than": "b", "factor": 1.5} | keys


def comparison(*claims: dict[str, Any], **keys: Any) -> Comparison:
    defaults: dict[str, Any] = {
        "title": "T", "see": "S.", "variants": {"a": [], "b": []}, "along": {}, "seeds": [0, 1, 2],
        "metrics": ["train_loss"], "x": "epoch", "choose": None, "only": [],
        "quick": False, "quick_overrides": [],
    }  # fmt: skip
    parsed = [parse(f"comparison.claims.{i}", each) for i, each in enumerate(claims)]
    return Comparison(**{**defaults, **keys}, claims=parsed)


def outcome(*values: float, failed: bool = False, metric: str = "train_loss", **summary: Any) -> VariantOutcome:
    lines = [{"epoch": i + 1, "step": 10 * (i + 1), metric: value} for i, value in enumerate(values)]
    return VariantOutcome(lines, {"status": "failed" if failed else "finished", **summary}, {})


def judged(written: dict[str, Any], a: list[VariantOutcome], b: list[VariantOutcome]) -> Any:
    spec = comparison(written, seeds=[*range(len(a))])
    runs = {VariantRun(v, (), seed): run for v, each in (("a", a), ("b", b)) for seed, run in enumerate(each)}
    [finding] = evaluate(Results(spec, runs), check(spec, overridden=False))
    return finding


@pytest.mark.parametrize(
    ("written", "verdict", "inverted"),
    [
        (claim(), "supported", "contradicted"),
        (claim(factor=4.0), "inconclusive", "contradicted"),
        (claim(factor=None, difference=0.5), "supported", "contradicted"),
        (claim(lower=None, higher="a", factor=1), "contradicted", "supported"),
        (claim(lower=None, than=None, equal=["a", "b"], factor=4.0), "supported", "supported"),
        (claim(lower=None, than=None, equal=["a", "b"], factor=1.2), "contradicted", "contradicted"),
        (claim(lower=None, than=None, equal=["a", "b"], factor=2.0), "inconclusive", "inconclusive"),
    ],
)
def test_verdict_requires_the_whole_interval_and_fails_when_inverted(
    written: dict[str, Any], verdict: str, inverted: str
) -> None:
    a, b = ([outcome(v) for v in (1.0, 1.1, 0.9)], [outcome(v) for v in (2.0, 2.2, 1.9)])  # a ratio of about 2.04
    assert judged(written, a, b).verdict == verdict
    assert judged(written, b, a).verdict == inverted


def test_interval_of_few_seeds_is_students_t() -> None:
    a, b = [1.0, 1.3, 0.8, 1.1], [2.1, 2.2, 2.0, 1.9]
    finding = judged(claim(factor=1.4), [outcome(v) for v in a], [outcome(v) for v in b])
    logs = [math.log(y / x) for x, y in zip(a, b, strict=True)]
    expected = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert (finding.interval.low, finding.interval.high) == pytest.approx((expected.low, expected.high))
    text = sentence(finding)
    start = "Supported: A is lower. Training loss, geometric mean: "
    assert text.startswith(f"{start}{stats.gmean(a):.3g} (a) against {stats.gmean(b):.3g} (b); ratio 1.98x, 95 % ")
    assert f"interval {math.exp(expected.low):.2f}x to {math.exp(expected.high):.1f}x, 4 seeds, margin 1.4x." in text


def test_six_seeds_or_more_have_pseudomedians_and_a_signed_rank_interval() -> None:
    values = [2.0, 2.1, 1.9, 2.3, 1.8, 200.0]  # with an outlier
    text = sentence(judged(claim(), [outcome(1.0)] * 6, [*map(outcome, values)]))
    assert "Training loss, robust mean: 1 (a) against 2.09 (b); ratio 2.1x, " in text
    assert "ratio 2.1x, 95 % interval 1.80x to 200x, 6 seeds, margin 1.5x." in text
    diverged = judged(claim(), [outcome(1.0)] * 10, [*map(outcome, values), *[outcome(failed=True)] * 4])
    assert diverged.verdict == "supported"
    assert "against 2.09 (4 of 10 diverged or not reached) (b); ratio " in sentence(diverged)
    assert "95 % interval from " in sentence(diverged)


@pytest.mark.parametrize("sides", ["ab", "ba"])
def test_a_rounding_error_is_no_difference(sides: str) -> None:
    values = {"a": 0.3, "b": 0.1 + 0.2}
    first, second = ([outcome(values[side])] * 6 for side in sides)
    finding = judged(claim(factor=None, difference=0.0), first, second)
    assert finding.verdict == "inconclusive"
    assert "; difference 0 (whole 95 % interval), 6 seeds, margin 0." in sentence(finding)


def test_one_seed_proves_nothing() -> None:
    finding = judged(claim(), [outcome(1.0)], [outcome(9.0)])
    assert finding.verdict == "inconclusive" and "no interval: one seed" in sentence(finding)


@pytest.mark.parametrize("margin", [{"factor": 1.1}, {"factor": None, "difference": 0.1}])
def test_a_diverged_run_has_an_infinitely_worse_accuracy(margin: dict[str, Any]) -> None:
    written = claim(metric="val_accuracy", lower=None, higher="a", **margin)
    trained, failed = outcome(0.9, metric="val_accuracy"), outcome(failed=True)
    finding = judged(written, [trained] * 3, [failed] * 3)
    assert finding.verdict == "supported" and "unbounded" in sentence(finding)
    assert judged(written, [failed] * 3, [trained] * 3).verdict == "contradicted"
    assert judged(written, [failed] * 3, [failed] * 3).verdict == "inconclusive"


@pytest.mark.parametrize("keys", [{}, {"measure": "step", "target": 0.5}])
def test_runs_that_all_diverged_are_not_equal(keys: dict[str, Any]) -> None:
    written = claim(lower=None, than=None, equal=["a", "b"], factor=2.0, **keys)
    runs = [outcome(1.0, failed=True)] * 3
    assert judged(written, runs, runs).verdict == "inconclusive"


def test_a_diverged_run_is_infinitely_worse() -> None:
    trained, failed = outcome(1.0), outcome(0.1, failed=True)
    assert judged(claim(), [trained] * 3, [failed] * 3).verdict == "supported"
    assert judged(claim(), [failed] * 3, [trained] * 3).verdict == "contradicted"
    assert judged(claim(), [trained] * 3, [failed, failed, outcome(9.0)]).verdict == "supported"
    assert judged(claim(), [trained] * 3, [failed, failed, trained]).verdict == "inconclusive"  # one seed is equal
    assert judged(claim(), [failed] * 3, [failed] * 3).verdict == "inconclusive"
    text = sentence(judged(claim(), [trained] * 3, [failed, failed, outcome(9.0)]))
    assert "against 9 (2 of 3 diverged or not reached) (b)" in text and "ratio >= 9.0x in every seed" in text


def test_parts_of_a_curve_and_times_to_a_target() -> None:
    falls = [outcome(4.0, 1.0, 3.0, 2.0)] * 2
    minimum = claim(lower={"variant": "a", "value": "minimum"}, than={"variant": "b", "value": 3})
    found = judged(minimum, falls, falls)
    assert (found.first.values, found.second.values) == ([1.0, 1.0], [3.0, 3.0])
    fast, slow = [outcome(4.0, 0.5)] * 2, [outcome(4.0, 2.0, 0.5)] * 2
    found = judged(claim(measure="step", target=0.6), fast, slow)
    assert (found.first.values, found.second.values, found.verdict) == ([20.0, 20.0], [30.0, 30.0], "supported")
    assert "Updates to training loss at most 0.6, geometric mean: 20 (a) against 30 (b)" in sentence(found)
    assert judged(claim(measure="step", target=0.1), fast, slow).first.values == [math.inf, math.inf]


@pytest.mark.parametrize(
    ("claimed", "a", "b", "text"),
    [
        # The runs of b have 40 updates: it needs more than 40, twice the 20 of a.
        ({}, [20, 20], [math.inf, math.inf], "20 (a) against not reached within 40 (b); ratio >= 2.0x in every seed"),
        ({}, [10, 20], [math.inf, 30], "30 (1 of 2 diverged or not reached) (b); ratio >= 1.50x in every seed"),
        ({}, [math.inf] * 2, [20, 40], "not reached within 40 (a) against 28.3 (b); ratio <= 1.00x in every seed"),
        ({}, [math.inf] * 2, [math.inf] * 2, "ratio not determined, in some seeds only a bound of both sides is known"),
        ({"lower": None, "higher": "b", "than": "a"}, [10, 10], [math.inf] * 2, "ratio >= 4.0x in every seed"),
    ],
)  # fmt: skip
def test_a_ratio_to_a_missed_target_is_a_bound(
    claimed: dict[str, Any], a: list[float], b: list[float], text: str
) -> None:
    def reaching(updates: float) -> VariantOutcome:
        return outcome(*(0.5 if 10 * i >= updates else 2.0 for i in range(1, 5)))

    written = claim(measure="step", target=0.6, **claimed)
    found = judged(written, list(map(reaching, a)), list(map(reaching, b)))
    assert text in sentence(found)
    assert "inf" not in sentence(found)


def test_a_bound_within_the_margin_supports_no_claim() -> None:
    def reaching(updates: int) -> list[VariantOutcome]:
        return [outcome(*(0.5 if i >= updates else 2.0 for i in range(1, 5)))] * 3

    step = claim(measure="step", target=0.6)
    found = judged(step | {"factor": 3.0}, reaching(2), reaching(9))  # 20 updates against more than 40
    assert found.verdict == "inconclusive" and "ratio >= 2.0x in every seed, 3 seeds, margin 3x" in sentence(found)
    assert judged(step | {"factor": 2.0}, reaching(2), reaching(9)).verdict == "supported"
    assert judged(step, reaching(9), reaching(9)).verdict == "inconclusive"


def test_a_best_point_at_the_end_of_its_grid_is_named() -> None:
    losses = {(v, rate): rate if v == "a" else abs(rate - 1) + 0.1 for v in "ab" for rate in (0.1, 1.0, 10.0)}
    for written, expected in (
        (claim(metric="test_loss"), "(a, learning rate 0.1, the smallest tried) against 0.101 (b, learning rate 1.0)"),
        (claim(metric="test_loss", at={"optimizer.lr": 10}), "(a, learning rate 10.0) against"),
    ):
        spec, runs = grid(losses, written, choose="test_loss")
        [finding] = evaluate(Results(spec, runs), spec.claims)
        assert expected in sentence(finding)
        [entry] = json.loads(record(Results(spec, runs), [finding]))["claims"]
        assert entry["sides"][0].get("edges", {}) == ({} if written.get("at") else {"optimizer.lr": "smallest"})
        assert judged_again(Results(spec, runs), spec.claims[0], entry) == entry


def test_a_metric_that_does_not_depend_on_the_axis_has_no_best_point_at_its_end() -> None:
    losses = {(v, rate): 1.0 if v == "a" else 3 * rate for v in "ab" for rate in (0.1, 1.0, 10.0)}
    spec, runs = grid(losses, claim(metric="test_loss"), choose="test_loss")
    [finding] = evaluate(Results(spec, runs), spec.claims)
    assert (finding.first.edges, finding.second.edges) == ({}, {"optimizer.lr": "smallest"})
    [entry] = json.loads(record(Results(spec, runs), [finding]))["claims"]
    assert judged_again(Results(spec, runs), spec.claims[0], entry) == entry


def test_a_variant_that_sets_the_axis_itself_has_no_best_point_at_its_end() -> None:
    variants = {"a": ["optimizer.lr=3"], "b": []}
    spec, runs = grid({(v, rate): rate for v in "ab" for rate in (0.1, 1.0, 10.0)}, claim(metric="test_loss"),
                      choose="test_loss", variants=variants)  # fmt: skip
    [finding] = evaluate(Results(spec, runs), spec.claims)
    assert (finding.first.edges, finding.second.edges) == ({}, {"optimizer.lr": "smallest"})


def test_a_usable_rate_at_the_end_of_the_grid_is_a_bound() -> None:
    losses = {(v, rate): 0.5 for v in "ab" for rate in (0.1, 1.0, 10.0)} | {("b", 1.0): 2.0, ("b", 10.0): 2.0}
    largest = claim(lower=None, higher="a", measure="largest", metric="test_loss", target=1.1)
    spec, runs = grid(losses, largest)
    [found] = evaluate(Results(spec, runs), spec.claims)
    text = sentence(found)
    assert "geometric mean: >= 10 (a) against 0.1 (b); ratio >= 100x in every seed (limited by the grid)" in text
    spec, runs = grid(losses | {("b", 0.1): 2.0}, largest)
    [found] = evaluate(Results(spec, runs), spec.claims)
    assert found.second.values == [0.0] * 3 and found.verdict == "supported"
    assert "against none, < 0.1 (b); ratio >= 100x in every seed (limited by the grid)" in sentence(found)


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        ([1e-9] * 3, [1.0, 2.0, 3.0], "ratio > 1000x (whole 95 % interval), "),
        ([1.0] * 3, [151.0, 150.9, 151.1], "ratio 150x (whole 95 % interval), "),
        ([1.0] * 3, [238.0, 231.0, 247.0], "ratio 240x, 95 % interval 220x to 260x, "),
        ([1.0] * 3, [1.11, 1.10, 1.12], "ratio 1.11x, 95 % interval 1.09x to 1.14x, "),
        ([1.0] * 3, [0.05, 0.06, 0.07], "ratio 0.059x, 95 % interval 0.039x to 0.09x, "),
        ([0.0] * 3, [1.0] * 3, "ratio unbounded in every seed, "),
    ],
)
def test_ratios_have_two_digits(a: list[float], b: list[float], text: str) -> None:
    assert text in sentence(judged(claim(), list(map(outcome, a)), list(map(outcome, b))))


def test_a_mean_between_two_roundings_has_the_same_text_when_read_from_the_record() -> None:
    written = claim(difference=0.01, factor=None)
    for error in (-4e-11, 0.0, 4e-11):
        text = sentence(judged(written, [outcome(0.9275 + error)] * 3, [outcome(0.95)] * 3))
        assert f": {0.9275:.3g} (a)" in text


def grid(values: dict[tuple[str, float], float], *claims: dict[str, Any], **keys: Any) -> tuple[Comparison, Any]:
    """A comparison along the learning rate; `values`: test loss (NaN: diverged) of (variant, rate)."""
    spec = comparison(*claims, along={"optimizer.lr": [0.1, 1.0, 10.0]}, metrics=["test_loss"], **keys)
    runs = {}
    for cell in spec.cells():
        value = values[cell.variant, cell.point[0]]  # type: ignore[index]
        scale = 1 + 0.01 * cell.seed
        runs[cell] = outcome(1 / value, failed=math.isnan(value), metric="val_loss", test_loss=value * scale)
    return spec, runs


LOSSES = {
    ("a", 0.1): 1.0, ("a", 1.0): 0.5, ("a", 10.0): 2.0, ("b", 0.1): 0.8, ("b", 1.0): math.nan, ("b", 10.0): math.nan
}  # fmt: skip


def test_each_side_is_taken_at_its_own_best_point() -> None:
    spec, runs = grid(LOSSES, claim(metric="test_loss"), choose="val_loss")
    [finding] = evaluate(Results(spec, runs), spec.claims)
    assert (finding.first.point, finding.second.point) == (
        {"optimizer.lr": 10.0},
        {"optimizer.lr": 0.1},
    )  # chosen by validation, as 1 / test
    with pytest.raises(UserError, match=r"comparison\.claims\.0: metric=test_loss: set comparison\.choose"):
        check(grid(LOSSES, claim(metric="test_loss"))[0], overridden=False)
    fixed = claim(metric="test_loss", at={"optimizer.lr": 1})
    spec, runs = grid(LOSSES, fixed)
    [finding] = evaluate(Results(spec, runs), check(spec, overridden=False))
    assert finding.verdict == "supported" and finding.second.values == [math.inf] * 3


def test_the_best_point_is_one_where_the_fewest_seeds_miss_the_target() -> None:
    written = claim(measure="epoch", target=1.0, lower="a", than="b", factor=1)
    spec = comparison(written, along={"optimizer.lr": [0.1, 1.0]})
    losses = {cell: 0.5 if cell.point == (1.0,) and cell.seed < 2 else 2.0 for cell in spec.cells()}
    [finding] = evaluate(Results(spec, {cell: outcome(loss) for cell, loss in losses.items()}), spec.claims)
    assert [side.point["optimizer.lr"] for side in (finding.first, finding.second)] == [1.0, 1.0]
    assert finding.first.values == finding.second.values == [1, 1, math.inf] and finding.verdict == "inconclusive"


def test_largest_usable_value_and_range() -> None:
    largest = claim(lower=None, higher="a", measure="largest", metric="test_loss", target=1.1, factor=10)
    spec, runs = grid(LOSSES, largest, largest | {"measure": "span"})
    found, span = evaluate(Results(spec, runs), check(spec, overridden=False))
    assert (found.first.values, found.second.values, found.verdict) == ([1.0] * 3, [0.1] * 3, "supported")
    text = sentence(found)
    assert "Largest learning rate with test loss at most 1.1, geometric mean: 1 (a) against 0.1 (b)" in text
    assert "ratio 10x in every seed (limited by the grid), 3 seeds" in text
    assert (span.first.values, span.second.values) == ([10.0] * 3, [1.0] * 3)


def test_a_claim_about_several_sides_is_as_strong_as_the_weakest() -> None:
    runs = {VariantRun(v, (), s): outcome(x * (1 + 0.01 * s)) for v, x in zip("abc", (1.0, 4.0, 1.9), strict=True)
            for s in range(3)}  # fmt: skip
    spec = comparison(claim(lower=None, higher=["b", "c"], than="a"), variants={"a": [], "b": [], "c": []})
    [finding] = evaluate(Results(spec, runs), spec.claims)
    assert finding.verdict == "supported" and finding.first.side.variant == "c"


def test_record_is_json_with_rows_and_verdicts() -> None:
    spec, runs = grid(LOSSES, claim(metric="test_loss", at={"optimizer.lr": 1}, when_not="Elsewhere."))
    saved = json.loads(record(Results(spec, runs), evaluate(Results(spec, runs), spec.claims)))
    assert saved["rows"][0] == {"variant": "a", "at": {"optimizer.lr": 0.1}, "test_loss": [1.0, 1.01, 1.02]}
    assert saved["rows"][4]["test_loss"] == [None] * 3
    [entry] = saved["claims"]
    assert entry["verdict"] == "supported" and entry["when_not"] == "Elsewhere."
    assert entry["sides"][1] == {"variant": "b", "at": {"optimizer.lr": 1.0}, "values": ["inf"] * 3}
    spec, runs = grid(LOSSES, claim(measure="largest", metric="test_loss", target=0.01, lower=None, higher="a"))
    saved = json.loads(record(Results(spec, runs), evaluate(Results(spec, runs), spec.claims)))
    assert [side["bounds"] for side in saved["claims"][0]["sides"]] == [[0.1] * 3, [0.1] * 3]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lower": None}, "set exactly one of lower, higher, equal"),
        ({"than": None}, "than: a value is required"),
        ({"factor": None}, "set factor (1.5: at least 1.5x) or difference"),
        ({"factor": 0.5}, "factor=0.5: input should be greater than or equal to 1"),
        ({"target": 1.0}, "target=1.0: set it exactly if measure is not value"),
        ({"metric": "gap"}, "a gap may be negative; set difference instead"),
        ({"lower": {"variant": "a", "when": "last"}}, "lower.when=last: unknown key"),
        ({"value": "end"}, "value=end"),
        ({"lower": "c"}, "unknown variant c; allowed: a, b"),
        ({"at": {"optimizer.lr": 1}}, "at.optimizer.lr: not an axis of the comparison; allowed: none"),
    ],
)
def test_refuses_wrong_claims(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        check(comparison(claim(**keys)), overridden=False)
    assert message in str(error.value) and str(error.value).startswith("comparison.claims.0")
    if "allowed" in message:  # a changed comparison drops the claims that no longer apply
        assert check(comparison(claim(**keys)), overridden=True) == []
