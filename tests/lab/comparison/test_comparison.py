"""Comparisons of runs: metrics, tables, and plots of curves, lines or heat maps per variant."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dlopt.lab.comparison.claims import parse
from dlopt.lab.comparison.comparison import Comparison, Results, VariantOutcome, VariantRun
from dlopt.lab.comparison.findings import evaluate
from dlopt.lab.comparison.plots import draw, restarts
from dlopt.lab.comparison.sentences import numbers

pytestmark = pytest.mark.drawn


def comparison(**keys: Any) -> Comparison:
    defaults: dict[str, Any] = {
        "title": "A & B, 50 %: mini-batches of {2}", "see": "One is lower.", "variants": {"a": [], "b": ["x=1"]},
        "along": {}, "seeds": [0, 1], "metrics": ["train_loss"], "x": "epoch", "choose": None, "only": [],
        "quick": False, "quick_overrides": [], "claims": [],
    }  # fmt: skip
    return Comparison(**{**defaults, **keys})


def outcome(values: list[float], failed: bool = False, **summary: Any) -> VariantOutcome:
    lines = [{"epoch": i + 1, "step": 10 * i, "train_loss": value} for i, value in enumerate(values)]
    return VariantOutcome(lines, {"status": "failed" if failed else "finished", **summary}, {})


def test_gaps_are_positive_when_overfitting() -> None:
    line = {"epoch": 1, "step": 1, "train_loss": 0.25, "val_loss": 1.0, "train_accuracy": 1.0, "val_accuracy": 0.75}
    run = VariantOutcome([line], {"status": "finished"}, {})
    assert (run.final("gap"), run.final("accuracy_gap"), run.final("val_error")) == (0.75, 0.25, 0.25)
    assert math.isnan(VariantOutcome([{"epoch": 1, "train_loss": 1.0}], {}, {}).final("gap"))


def test_cells_form_a_grid_with_variant_overrides_last() -> None:
    result = comparison(along={"optimizer.lr": [0.1, 1], "norm": [None]}, seeds=[3])
    assert list(result.cells()) == [VariantRun(variant, (lr, None), 3) for variant in "ab" for lr in (0.1, 1)]
    assert result.overrides(VariantRun("b", (0.1, None), 3)) == ["optimizer.lr=0.1", "norm=null", "x=1", "seed=3"]


def test_axis_points_may_set_several_keys_and_have_numeric_names() -> None:
    spec = comparison(along={"samples": {"1": ["p=8", "g=1"], "8": ["p=1", "g=8"]}}, seeds=[0])
    assert spec.overrides(VariantRun("b", ("8",), 0)) == ["p=1", "g=8", "x=1", "seed=0"]
    outcomes = {cell: outcome([2.0 if cell.variant == "a" else 2.001]) for cell in spec.cells()}
    [axes] = draw(Results(spec, outcomes)).axes
    assert list(axes.lines[0].get_xdata()) == [1, 8] and axes.get_xlabel() == "samples"
    first, second, *_ = axes.lines
    assert first.get_linewidth() == second.get_linewidth() and first.get_linestyle() != second.get_linestyle()


def test_labels_of_ticks_do_not_collide() -> None:
    rates = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3]
    for metrics in (["train_loss"], ["train_loss", "gap"]):
        spec = comparison(along={"lr": rates}, seeds=[0], metrics=metrics)
        runs = {cell: outcome([0.5], gap=0.1) for cell in spec.cells()}
        axes = (figure := draw(Results(spec, runs))).axes[0]
        FigureCanvasAgg(figure).draw()
        boxes = [text.get_window_extent() for text in axes.get_xticklabels() if text.get_text().strip()]
        assert len(boxes) == 8 and [text.get_text().strip() for text in axes.get_xticklabels()][1] == "0.0003"
        lines = [text.get_text().count("\n") for text in axes.get_xticklabels()]
        assert lines == ([0] * 8 if metrics[1:] == [] else [0, 1] * 4)
        for same in (0, 1):
            row = [box for box, line in zip(boxes, lines, strict=True) if line == same]
            assert all(a.x1 + 4 < b.x0 for a, b in pairwise(row))


def test_no_variant_hides_another_and_rounding_is_no_value() -> None:
    spec = comparison(along={"lr": [1, 2]}, seeds=[0], metrics=["gradient_bias"])
    values = {"a": 0.5, "b": 1e-9}
    outcomes = {
        cell: VariantOutcome([], {"status": "finished", "gradient_bias": values[cell.variant]}, {})
        for cell in spec.cells()
    }
    [axes] = (figure := draw(Results(spec, outcomes))).axes
    figure.canvas.draw()
    a, b = (next(line for line in axes.lines if line.get_label() == name) for name in "ab")
    starts = [line.get_transform().transform((1, 0.5))[0] for line in (a, b)]
    assert starts[0] + 5 < starts[1]
    assert [*a.get_ydata()] == [0.5, 0.5] and [*b.get_ydata()] == [0, 0] and axes.get_ylim()[0] > 0.01
    assert "below 1e-06 (rounding error)" in {text.get_text() for text in figure.legends[0].get_texts()}


def test_the_title_of_a_panel_tells_that_its_curves_coincide() -> None:
    for other, title in ((2.0, "the 2 curves coincide"), (2.1, "")):
        outcomes = {VariantRun("a", (), 0): outcome([3.0, 2.0]), VariantRun("b", (), 0): outcome([3.0, other])}
        assert draw(Results(comparison(seeds=[0]), outcomes)).axes[0].get_title() == title


def test_log_ticks_are_plain_numbers() -> None:
    spec = comparison(along={"lr": [0.1, 0.2]}, seeds=[0])
    [axes] = (figure := draw(Results(spec, {cell: outcome([0.5 + cell.point[0]]) for cell in spec.cells()}))).axes
    figure.canvas.draw()
    assert {"0.6", "0.7"} <= {label.get_text() for label in axes.get_yticklabels(which="both")}


def test_curves_show_mean_and_range_over_seeds() -> None:
    spec = comparison()
    curves = {"a": ([4.0, 2.0], [2.0, 1.0, 9.0]), "b": ([1.0, 1.0], [1.0, 1.0])}
    outcomes = {
        VariantRun(v, (), seed): outcome(values) for v, pair in curves.items() for seed, values in enumerate(pair)
    }
    figure = draw(Results(spec, outcomes))
    [axes] = figure.axes
    first, second = (line for line in axes.lines if line.get_label() in ("a", "b"))
    assert list(first.get_xdata()) == [1, 2] and list(first.get_ydata()) == [3.0, 1.5]
    assert list(second.get_ydata()) == [1.0, 1.0]
    assert axes.get_yscale() == "log" and axes.get_ylabel() == "training loss" and axes.get_xlabel() == "epoch"
    low = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert low.min() == 1.0 and low.max() == 4.0
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert entries == ["a", "b", "mean and range over 2 seeds"]
    figure.canvas.draw()


def test_curves_average_equal_epochs_after_a_value_that_is_not_finite() -> None:
    spec = comparison(variants={"a": []})
    curves = ([4.0, 3.0, 2.0], [4.0, None, 1.0])
    outcomes = {VariantRun("a", (), seed): outcome(values) for seed, values in enumerate(curves)}  # type: ignore[arg-type]
    line = draw(Results(spec, outcomes)).axes[0].lines[0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 3], [4.0, 1.5])


def test_metrics_to_be_maximized_have_linear_axes_and_are_brighter_when_larger() -> None:
    def run(value: float) -> VariantOutcome:
        return VariantOutcome(
            [{"epoch": i, "step": i, "val_r2": value - 1 / i} for i in (1, 2)], {"status": "finished"}, {}
        )

    spec = comparison(metrics=["val_r2"])
    axes = draw(Results(spec, {cell: run(0.5) for cell in spec.cells()})).axes[0]
    assert axes.get_yscale() == "linear" and list(axes.lines[0].get_ydata()) == [-0.5, 0.0]
    spec = comparison(metrics=["val_r2"], along={"lr": [1, 2], "decay": [1, 2]}, seeds=[0])
    image = (
        draw(Results(spec, {cell: run(0.6 + 0.1 * math.prod(cell.point)) for cell in spec.cells()})).axes[0].images[0]
    )  # type: ignore[arg-type]
    brightness = image.norm(image.get_array())
    assert brightness[0, 0] < brightness[0, 1] < brightness[1, 1]


def test_the_calibration_error_is_no_error_rate() -> None:
    run = VariantOutcome([{"epoch": 1, "step": 1, "val_calibration_error": 0.125, "val_accuracy": 0.75}], {}, {})
    assert (run.final("val_calibration_error"), run.final("val_error")) == (0.125, 0.25)


def test_lines_along_a_key_go_from_left_to_right() -> None:
    spec = comparison(along={"lr": [1, 0.1, 10]}, seeds=[0])
    line = draw(Results(spec, {cell: outcome([float(cell.point[0])]) for cell in spec.cells()})).axes[0].lines[0]  # type: ignore[arg-type]
    assert list(line.get_xdata()) == list(line.get_ydata()) == [0.1, 1, 10]


def test_metrics_along_a_key_have_gaps_for_diverged_seeds() -> None:
    spec = comparison(along={"optimizer.lr": [0.1, 1.0, 10.0]})
    outcomes = {
        cell: outcome([1.0], failed=cell == VariantRun("a", (10.0,), 1), test_loss=cell.point[0] + cell.seed)
        for cell in spec.cells()
    }
    spec = comparison(along=spec.along, metrics=["test_loss"])
    [axes] = (figure := draw(Results(spec, outcomes))).axes
    line = next(line for line in axes.lines if line.get_label() == "a")
    assert list(line.get_ydata())[:2] == pytest.approx([0.6, 1.5]) and math.isnan(line.get_ydata()[2])
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "learning rate"
    entries = {text.get_text() for text in figure.legends[0].get_texts()}
    assert entries == {"a", "b", "mean and range over 2 seeds", "a seed", "a seed diverged"}
    assert Results(spec, outcomes).table()[4].split() == ["a", "10.0", "diverged"]
    assert Results(spec, outcomes).table()[0].split() == ["variant", "optimizer.lr", "test_loss"]


def test_tuned_comparisons_draw_the_curves_of_each_variants_best_point() -> None:
    spec = comparison(along={"optimizer.lr": [0.1, 1.0]}, tuned=True)
    best = {"a": 1.0, "b": 0.1}
    outcomes = {
        cell: outcome(
            [3.0, 1.0 + cell.seed if cell.point == (best[cell.variant],) else 5.0],
            failed=cell.point == (0.1,) and cell.variant == "a",
        )
        for cell in spec.cells()
    }
    [axes] = draw(Results(spec, outcomes)).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines[:2]}
    assert lines == {"a (learning rate 1.0)": [3.0, 1.5], "b (learning rate 0.1)": [3.0, 1.5]}
    assert axes.get_xlabel() == "epoch"


def test_categories_are_bars() -> None:
    spec = comparison(along={"schedule": ["cosine", "step"]})
    outcomes = {cell: outcome([1.0 + cell.seed], failed=cell.point == ("step",)) for cell in spec.cells()}
    [axes] = (figure := draw(Results(spec, outcomes))).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cosine", "step"]
    assert [bar.get_height() for bar in axes.patches][::2] == [1.5, 1.5]  # of a and b with cosine
    assert axes.get_xscale() == axes.get_yscale() == "linear" and axes.get_ylim()[0] == 0
    entries = {text.get_text() for text in figure.legends[0].get_texts()}
    assert entries == {"a", "b", "mean and range over 2 seeds", "a seed", "a seed diverged"}


@pytest.mark.parametrize(("margin", "shown"), [({"factor": 1.5}, 32.0), ({"difference": 0.5}, 640.0)])
def test_table_picture_and_sentence_show_the_same_average(margin: dict[str, float], shown: float) -> None:
    """Over seeds, 2^k and one of 10^6: the arithmetic mean would be about 1.7e5."""
    values = [1.0, 4.0, 16.0, 64.0, 256.0, 1e6] if margin.get("factor") else [630.0, 640.0, 650.0, 620.0, 660.0, 640.0]
    written = {"claim": "b is worse", "metric": "test_loss", "higher": "b", "than": "a", **margin}
    spec = comparison(along={"lr": [0.5]}, seeds=[*range(6)], metrics=["test_loss"], claims=[parse("", written)])
    runs = {cell: outcome([9.0], test_loss=values[cell.seed] * (cell.variant == "b") or 1.0) for cell in spec.cells()}
    results = Results(spec, runs)
    average = results.comparison.average("test_loss", values)
    assert average.middle == pytest.approx(shown)
    [finding] = evaluate(results, spec.claims)
    assert f": {average.middle:.3g} (b, learning rate 0.5) against 1 (a, learning rate 0.5)" in numbers(finding)
    assert results.table()[3].split() == ["b", "0.5", f"{average.middle:.4g}"]
    for along in ({"lr": [0.5]}, {"lr": ["p"]}):
        kind = replace(spec, along=along)
        other = {VariantRun(cell.variant, tuple(along["lr"]), cell.seed): run for cell, run in runs.items()}
        [axes] = draw(Results(kind, other)).axes
        heights = [bar.get_height() for bar in axes.patches]
        lines = [list(line.get_ydata()) for line in axes.lines]
        assert average.middle in [*heights, *(y for line in lines for y in line)]
        assert [average.low, average.high] in [list(map(float, line)) for line in lines]
        [legend] = axes.figure.legends
        assert "robust mean and 95 % interval over 6 seeds" in [text.get_text() for text in legend.get_texts()]


def test_restarts_are_marked_but_not_warmup() -> None:
    rates = [0.1, 0.2, 0.1, 0.0, 0.2, 0.1, 0.0]  # warmup, decay, restart, decay
    lines = [{"epoch": i + 1, "step": i + 1, "lr": lr, "train_loss": 1.0} for i, lr in enumerate(rates)]
    assert restarts(VariantOutcome(lines, {}, {}), "epoch") == [4.0]
    assert restarts(VariantOutcome(lines[:4], {}, {}), "epoch") == []


@pytest.mark.parametrize("along", [{}, {"optimizer.lr": [0.1, 1]}, {"x": ["p", "q"]}, {"x": ["p"], "lr": [1, 2]}])
def test_nothing_leaves_the_frame(along: dict[str, Any]) -> None:
    names = {f"variant {i} with a rather long and detailed label": [f"x={i}"] for i in range(4)}
    first, second, *_ = names
    claim = parse("", {"claim": "word " * 40, "metric": "train_loss", "lower": first, "than": second, "factor": 1.5})
    text = "A title that is longer than one line of the figure has characters, so it wraps " * 2
    spec = comparison(title=text, see=text * 2, along=along, variants=names, claims=[claim])
    runs = {cell: outcome([2.0, 1.0], failed=cell == VariantRun(first, cell.point, 1)) for cell in spec.cells()}
    results = Results(spec, runs)
    figure = draw(results)
    assert figure.get_size_inches().tolist() == pytest.approx([9.6, 5.4]) and "word" not in figure._suptitle.get_text()
    assert all(legend._ncols == 2 for legend in figure.legends)  # in smaller type, instead of six rows
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    frame = figure.bbox.padded(1)
    for artist in [*figure.legends, figure._suptitle, *figure.axes]:
        box = artist.get_tightbbox(canvas.get_renderer())
        assert frame.containsx(box.x0) and frame.containsx(box.x1), artist
        assert frame.containsy(box.y0) and frame.containsy(box.y1), artist


def test_two_keys_plot_heat_maps_with_best_cell_framed() -> None:
    spec = comparison(along={"lr": [1, 2], "decay": [0.1, 0.2, 0.3]}, seeds=[0], metrics=["test_accuracy"])
    outcomes = {
        cell: outcome([], failed=cell.point == (2, 0.3), test_accuracy=0.1 * cell.point[0] + cell.point[1])
        for cell in spec.cells()
    }
    maps = draw(Results(spec, outcomes)).axes
    assert [axes.get_title() for axes in maps] == ["a", "b"]
    values = maps[0].images[0].get_array()
    assert values.shape == (2, 3) and bool(values.mask[1, 2]) and float(values[0, 2]) == pytest.approx(0.4)
    assert not maps[0].patches  # choosing by a test metric would select on the test set
    outcomes = {cell: replace(run, history=[{"epoch": 1, "step": 1, "val_loss": -run.summary["test_accuracy"]}])
                for cell, run in outcomes.items()}  # fmt: skip
    maps = draw(Results(replace(spec, choose="val_loss"), outcomes)).axes
    [frame] = maps[0].patches
    assert frame.get_xy() == (1.5, -0.5)  # 0.1 * 1 + 0.3, since the cell beyond it diverged
    assert maps[0].get_xlabel() == "decay" and maps[0].get_ylabel() == "learning rate"
    assert [text.get_text() for text in maps[0].texts] == ["20.0", "30.0", "40.0", "30.0", "40.0", "×"]
    assert "×: diverged; frame: best validation loss" in maps[0].get_figure().get_supxlabel()


def test_heat_maps_of_errors_of_0_are_brightest_where_the_error_is_lowest() -> None:
    spec = comparison(along={"lr": [1, 2], "decay": [0.1, 0.2, 0.3]}, seeds=[0], metrics=["val_error"])
    accuracies = {0.1: 1.0, 0.2: 0.8, 0.3: 0.7}
    outcomes = {
        cell: VariantOutcome(
            [{"epoch": 1, "step": 1, "val_accuracy": accuracies[cell.point[1]]}], {"status": "finished"}, {}
        )  # type: ignore[index]
        for cell in spec.cells()
    }
    figure = draw(Results(spec, outcomes))
    assert "diverged" not in figure.get_supxlabel()  # there is no such mark
    image = figure.axes[0].images[0]
    brightness = image.norm(image.get_array())
    assert not brightness.mask.any() and list(brightness[0]) == pytest.approx([1, 1 / 3, 0])


@pytest.mark.parametrize("along", [{}, {"lr": [0.1, 0.2]}, {"a": ["x", "y"]}, {"lr": [1, 2], "a": ["x", "y"]}])
def test_draws_a_comparison_in_which_all_runs_diverged(along: dict[str, Any]) -> None:
    spec = comparison(along=along)
    figure = draw(Results(spec, {cell: outcome([], failed=True) for cell in spec.cells()}))
    FigureCanvasAgg(figure).draw()


def test_evaluations_count_in_passes_over_the_training_set() -> None:
    """Two full batches per epoch; line searches need 3 evaluations per update at first, and 2 later."""
    lines = [{"epoch": epoch, "lr": 0.1, "seconds": 1.0, "train_loss": 4.0 ** (2 - epoch)} for epoch in (1, 2)]
    searching, once = (
        VariantOutcome([line | more for line, more in zip(lines, counters, strict=True)], {}, {})
        for counters in (
            ({"step": 2, "evaluations": 6}, {"step": 4, "evaluations": 10}),
            ({"step": 45}, {"step": 90}),
        )
    )
    assert searching.curve("train_loss", "evaluation") == ([3.0, 5.0], [4.0, 1.0])
    assert once.curve("train_loss", "evaluation") == ([1.0, 2.0], [4.0, 1.0])
    spec = comparison(seeds=[0], x="step_and_evaluation_and_seconds")
    assert spec.axes == ["step", "evaluation", "seconds"]
    written = {"claim": "c", "metric": "train_loss", "measure": "evaluation", "target": 1.0, "lower": "b", "than": "a"}
    claim = parse("claims.0", {**written, "factor": 2})
    results = Results(spec, {VariantRun("a", (), 0): searching, VariantRun("b", (), 0): once})
    [finding] = evaluate(results, [claim])
    assert (finding.first.values, finding.second.values) == ([2.0], [5.0])
    panels = draw(results).axes
    assert [axes.get_xlabel() for axes in panels] == ["update", "evaluations of the training set", "seconds"]
    assert list(panels[1].lines[0].get_xdata()) == [3.0, 5.0]


def test_plots_error_against_updates_and_seconds() -> None:
    lines = [{"epoch": i + 1, "step": 5 * i, "seconds": 2.0 * i, "val_accuracy": 0.5 + i / 4} for i in range(2)]
    spec = comparison(metrics=["val_error"], x="step_and_seconds", seeds=[0])
    figure = draw(Results(spec, {cell: VariantOutcome(lines, {"status": "finished"}, {}) for cell in spec.cells()}))
    updates, time = figure.axes
    assert (updates.get_xlabel(), time.get_xlabel()) == ("update", "seconds")
    assert list(updates.lines[0].get_xdata()) == [0, 5] and list(time.lines[0].get_xdata()) == [0, 2]
    assert list(updates.lines[0].get_ydata()) == list(time.lines[0].get_ydata()) == [50, 25]
    below, above = updates.lines[:2]  # coincident curves are both visible
    assert below.get_linestyle() != above.get_linestyle() and below.get_linewidth() == above.get_linewidth()
