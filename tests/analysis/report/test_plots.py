import io
from pathlib import Path

from dlopt.analysis.drawing import metric_label
from dlopt.analysis.report.plots import plots
from dlopt.analysis.report.reading import Reader
from dlopt.analysis.report.table import gather
from tests.analysis.report.folders import make_run


def test_plots_everything_with_data(tmp_path: Path) -> None:
    for i, (optimizer, lr) in enumerate((o, lr) for o in ("sgd", "adamw") for lr in (0.01, 0.1, 1.0)):
        for seed in range(2):
            make_run(tmp_path / f"{i}-{seed}", optimizer=optimizer, lr=lr, seed=seed, accuracies=(0.5, 0.5 + 0.05 * i))
    table = gather(*Reader().read([tmp_path]))
    result = plots(table, 0.6)
    assert set(result) == {
        "learning_curves.png", "learning_rates.png", "importance.png", "parallel_coordinates.png", "lr_sensitivity.png",
        "time_to_target.png",
    }  # fmt: skip
    curves = result["learning_curves.png"].axes
    assert [axis.get_xlabel() for axis in curves] == ["epoch", "update", "seconds of training"]
    assert len(curves[0].get_lines()) == 6 and curves[0].get_ylabel() == "validation accuracy"
    best = curves[0].get_lines()[0]
    assert list(best.get_ydata()) == [0.5, 0.75] and "optimizer=adamw lr=1" in str(best.get_label())
    result["lr_sensitivity.png"].savefig(io.BytesIO(), format="png")


def test_single_run_has_only_curves(tmp_path: Path) -> None:
    make_run(tmp_path / "0")
    assert set(plots(gather(*Reader().read([tmp_path])), None)) == {"learning_curves.png", "learning_rates.png"}


def test_metric_labels() -> None:
    assert metric_label("val_accuracy") == "validation accuracy" and metric_label("train_loss") == "training loss"
