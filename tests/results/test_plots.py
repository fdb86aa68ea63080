import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dlopt.results import drawing
from dlopt.results.drawing import metric_label
from dlopt.results.plots import PLOTS, AxisScale, _apart, plots
from dlopt.results.ranking import Ranking
from tests.support.folders import TARGETS, make_run, table

pytestmark = pytest.mark.drawn


def sweep(folder: Path, tops: dict[tuple[str, float], float], seeds: int = 2) -> Ranking:
    for (optimizer, lr), top in tops.items():
        for seed in range(seeds):
            accuracies = (0.5, top + 0.01 * seed)
            make_run(folder / f"{optimizer}-{lr}-{seed}", optimizer=optimizer, lr=lr, seed=seed, accuracies=accuracies)
    return table(folder)


def test_plots_everything_with_data(tmp_path: Path) -> None:
    tops = {(o, lr): 0.5 + 0.1 * (o == "sgd") + 0.05 * i for i, lr in enumerate((0.01, 0.1, 1.0)) for o in TARGETS}
    result = plots(sweep(tmp_path, tops), 0.6)
    assert set(result) == set(PLOTS) - {"learning_curves_updates"}  # epochs have equal lengths
    [axis] = result["learning_curves"].axes
    assert axis.get_xlabel() == "epoch" and axis.get_ylabel() == "validation accuracy (%)"
    best = axis.get_lines()[0]
    assert list(best.get_ydata()) == pytest.approx([50, 70.5]) and best.get_label() == "optimizer=sgd lr=1"
    [legend] = result["learning_curves"].legends
    assert legend.get_title().get_text() == "mean of 2 runs each; band: lowest to highest run"
    for figure in result.values():
        figure.savefig(io.BytesIO(), format="pdf")
    assert set(plots(sweep(tmp_path, {}), 0.6, ["importance"])) == {"importance"}


def test_long_names_stay_inside_the_figure(tmp_path: Path) -> None:
    for i in range(6):
        weights = f"outputs/pretrained_{i}/2026-11-22_10-00-00/checkpoints/best.pt"
        config = {"init_from": weights, "optimizer.weight_decay": 0.001 * i, "model.widths": [8] * (10 + i)}
        make_run(tmp_path / str(i), lr=0.1 * (i + 1), config=config, accuracies=(0.5, 0.8 + 0.01 * i))
    for name, figure in plots(table(tmp_path), 0.7, ["learning_curves", "time_to_target"]).items():
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
        assert box.x0 >= 0 and box.x1 <= figure.get_figwidth(), name
        assert box.y0 >= 0 and box.y1 <= figure.get_figheight() + 0.1, name


def test_tick_labels_do_not_overlap(tmp_path: Path) -> None:
    for i, lr in enumerate((0.1, 0.101, 0.102, 0.5)):
        make_run(tmp_path / str(i), lr=lr, config={"optimizer.weight_decay": 0.1 * i})
    [axis] = plots(table(tmp_path), None, ["parallel_coordinates"])["parallel_coordinates"].axes
    rates = [note for note in axis.texts if note.xy[0] == 0]  # type: ignore[attr-defined]
    assert [note.get_text() for note in rates] == ["0.5", "0.102"]


def test_optimizers_have_the_colours_of_their_configurations(tmp_path: Path) -> None:
    """The eighth row is not among the curves, so its optimizer has a colour that no curve has."""
    tops = {("adamw", 0.01 * i): 0.9 - 0.01 * i for i in range(1, 8)} | {("sgd", 0.1): 0.3, ("sgd", 0.01): 0.2}
    result = plots(sweep(tmp_path, tops), None)
    curves = [line.get_color() for line in result["learning_curves"].axes[0].get_lines()]
    assert "optimizer=adamw" in str(result["learning_curves"].axes[0].get_lines()[0].get_label())
    adamw, sgd = (bars.lines[0].get_color() for bars in result["lr_sensitivity"].axes[0].containers)
    assert set(curves) == {adamw} and sgd not in curves  # as on the page; dashes tell the curves apart


def test_plots_against_updates_where_epochs_differ(tmp_path: Path) -> None:
    make_run(tmp_path / "0")
    folder = make_run(tmp_path / "1", config={"data.batch_size": 128})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    halved = [json.dumps(line | {"step": line["step"] // 2}) + "\n" for line in lines]
    (folder / "metrics.jsonl").write_text("".join(halved))
    assert "learning_curves_updates" in plots(table(tmp_path), None)


def test_pale_bars_of_configurations_that_do_not_always_reach_the_target(tmp_path: Path) -> None:
    for lr, tops in ((0.1, (0.8, 0.8)), (0.2, (0.9, 0.5))):
        for seed, top in enumerate(tops):
            make_run(tmp_path / f"{lr}-{seed}", lr=lr, seed=seed, accuracies=(top,))
    result = plots(table(tmp_path), 0.8)["time_to_target"]
    assert [bar.get_alpha() for bar in result.axes[0].patches] == [0.4, 1.0]  # from the bottom
    assert [label.get_text() for label in result.axes[0].get_yticklabels()] == ["lr=0.2  (1/2)", "lr=0.1  (2/2)"]
    assert "time to validation accuracy ≥ 80 %" in result.get_suptitle()


def test_single_run_has_only_curves(tmp_path: Path) -> None:
    make_run(tmp_path / "0")
    assert set(plots(table(tmp_path), None)) == {"learning_curves", "learning_curves_seconds", "learning_rates"}


def test_metric_labels() -> None:
    assert metric_label("val_accuracy") == "validation accuracy" and metric_label("train_loss") == "training loss"


def test_losses_of_diverging_rates_have_a_logarithmic_axis(tmp_path: Path) -> None:
    for lr, loss in {0.1: 0.2, 1.0: 0.3, 10.0: 1e4}.items():
        make_run(tmp_path / str(lr), lr=lr, accuracies=(1 - loss,), losses=(loss,))
    for by, scale in (("val_loss", "log"), ("val_accuracy", "linear")):
        [figure] = plots(table(tmp_path, by), None, ["lr_sensitivity"]).values()
        assert figure.axes[0].get_yscale() == scale


def test_names_are_no_mathtext(tmp_path: Path) -> None:
    for i in range(8):
        name, config = f"{i}", {"optimizer.variant": f"$^{i % 4}^$", "clip.what": f"_$^{i}^$"}
        make_run(tmp_path / name, lr=0.1 * (i // 4 + 1), accuracies=(0.1 * i, 0.1 * i), config=config)
    for figure in plots(table(tmp_path), 0.3).values():
        drawing.encoded(figure, "png", dpi=20)


def test_settings_of_the_current_folder_are_not_read(tmp_path: Path) -> None:
    """They may be of others, and name programs that matplotlib would run."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    code = "from dlopt.results import drawing; drawing.figure(1, 1); import matplotlib, os; "
    code += "print(matplotlib.rcParams['text.usetex'], os.getcwd())"
    line = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(Path(drawing.__file__).parents[2])}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", str(tmp_path)]


@pytest.mark.parametrize(
    ("losses", "expected"), [([], False), ([1.0, 100.0], False), ([1.0, 100.1], True), ([0.0, 9.0], False)]
)
def test_losses_that_span_decades(losses: list[float], expected: bool) -> None:
    assert drawing.spans_decades(losses) is expected


def test_scales_of_values() -> None:
    """Logarithmic from a factor of 20 on; up to 8 values are all ticks, unless their labels overlap."""
    assert AxisScale([1.0, 20.0]).log and not AxisScale([1.0, 19.9]).log and not AxisScale([0.0, 50.0]).log
    assert AxisScale([1.0, 20.0])(20.0**0.5) == pytest.approx(0.5) and AxisScale([0.0, 50.0])(12.5) == 0.25
    assert [label for _, label, _ in AxisScale(range(8)).ticks] == [*"76543210"]
    assert [value for *_, value in AxisScale(range(9)).ticks] == [8, 6, 4, 2, 0]
    assert AxisScale([1.0, 2.0, None])(None) != AxisScale([1.0, 2.0])(1.0) and math.isnan(AxisScale([1.0, 2.0])(None))
    named = AxisScale(["b", "a", "b", None])
    assert named.positions == {"a": 1 / 6, "b": 0.5, "null": 5 / 6} and named("b") == 0.5
    equal = AxisScale([0.5, 0.5])
    assert not equal.is_number and equal.ticks == [(0.5, "0.5", 0.5)]
    positions = [(0.0, "a", 0), (0.04, "b", 0), (0.05, "c", 0), (0.099, "d", 0), (0.1, "e", 0)]
    assert [label for _, label, _ in _apart(positions)] == ["e", "c", "a"]


def test_a_wide_range_of_rates_has_a_logarithmic_axis(tmp_path: Path) -> None:
    for factor, scale in ((20, "linear"), (20.1, "log")):
        for i, lr in enumerate((0.5, 0.5 * factor)):
            make_run(tmp_path / f"{factor}/{i}", lr=lr)
        [figure] = plots(table(tmp_path / f"{factor}"), None, ["learning_rates"]).values()
        assert figure.axes[0].get_yscale() == scale


def test_titles_labels_and_axes() -> None:
    assert drawing.title_with_subtitle("a", "b " * 50) == "a\n" + "\n".join(["b " * 44 + "b", "b b b b b"])
    assert drawing.label("val_error") == "validation error" and drawing.label("clip.max_norm") == "clip max norm"
    assert drawing.label("data.batch_size") == "batch size" and drawing.label("optimizer.lr") == "learning rate"
    assert drawing.literal("_a$b") == "\u200b_a\\$b" and drawing.literal("a_") == "a_"
    figure = drawing.figure(3, 2, "title", fontsize=9)
    axes = figure.add_subplot()
    axes.plot([1, 2, 4], [1, 2, 3])
    drawing.powers_of_two(axes, [1, 2, 4], fontsize=7)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "4"]
    assert axes.get_xscale() == "log" and [label.get_fontsize() for label in axes.get_xticklabels()] == [7] * 3
    assert list(axes.get_xticks(minor=True)) == [] and figure._suptitle.get_fontsize() == 9  # type: ignore[attr-defined]
    drawing.logarithmic(axes, axis="y")
    assert axes.get_yscale() == "log" and axes.yaxis.get_major_formatter()(0.001) == "0.001"
    empty = drawing.figure(3, 2).add_subplot()
    drawing.logarithmic(empty)
    assert empty.get_yscale() == "linear"


def test_files_of_a_figure(tmp_path: Path) -> None:
    figure = drawing.figure(2, 1)
    figure.add_subplot().plot([1, 2], [3, 4], label="x")
    paths = drawing.save(figure, tmp_path, "a")
    assert [path.name for path in paths] == ["a.png", "a.svg"] and figure.get_layout_engine() is None
    contents = [path.read_bytes() for path in paths]
    assert contents[0][16:24] == (300).to_bytes(4, "big") + (150).to_bytes(4, "big") and b"<dc:date>" not in contents[1]
    assert drawing.encoded(figure, "svg") == contents[1] and drawing.encoded(figure, "pdf").startswith(b"%PDF")
