"""Comparisons of the lecture: their commands run, and their results show what the titles claim."""

from collections.abc import Callable
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import yaml

from dlopt.analysis.comparison import Cell, Comparison, Outcome, finals, mean, read
from dlopt.commands.compare import comparison_of
from dlopt.config.choices import config_folder
from dlopt.config.compose import Composer
from tests.commands.line import dlopt

FOLDER = config_folder() / "experiment" / "lecture"
LECTURES = sorted(
    path.stem for path in FOLDER.glob("*.yaml") if path.stem[0] != "_" and "\ncomparison:\n" in path.read_text()
)


class Results:
    """Results of the runs of a comparison."""

    def __init__(self, comparison: Comparison, outcomes: dict[Cell, Outcome]) -> None:
        self.comparison = comparison
        self.outcomes = outcomes

    def final(self, variant: str, *point: object, metric: str | None = None) -> float:
        """Returns the mean final metric over seeds; NaN if one diverged."""
        name = self.comparison.metrics[0] if metric is None else metric
        return mean(finals(self.comparison, self.outcomes, variant, name)[point])

    def curve(self, variant: str, metric: str) -> list[float]:
        """Returns the mean over seeds, epoch by epoch."""
        runs = [self.outcomes[Cell(variant, (), seed)] for seed in self.comparison.seeds]
        return [mean(column) for column in zip(*(run.curve(metric, "epoch")[1] for run in runs), strict=True)]


Run = Callable[..., Results]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs the lecture's command with `more` overrides."""

    def execute(name: str, *more: str) -> Results:
        line = [f"experiment=lecture/{name}", *more]
        result = dlopt(tmp_path, "train", *line, "hydra.run.dir=out")
        assert result.code == 0, result.err
        assert (tmp_path / "out/comparison.png").stat().st_size > 20_000
        composer = Composer()
        comparison = comparison_of(composer, composer.compose(line), line)
        cells = list(comparison.cells())
        return Results(
            comparison, {cell: read(tmp_path / f"out/{i}", comparison.metrics) for i, cell in enumerate(cells)}
        )

    return execute


@pytest.mark.parametrize("name", LECTURES)
def test_header_lists_command_and_number_of_runs(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    comparison = yaml.safe_load(text)["comparison"]
    directive, *header = text.partition("\ndefaults:")[0].splitlines()
    assert directive == "# @package _global_" and all(line.startswith("#") for line in header)
    assert f"  dlopt train experiment=lecture/{name}" in "\n".join(header)
    axes = [len(values) for values in comparison.get("along", {}).values()]
    runs = len(comparison["variants"]) * len(comparison.get("seeds", [0])) * prod(axes)
    assert f"{runs} runs, " in "\n".join(header)
    assert comparison["see"].endswith((".", ")")) and len(comparison["see"]) < 300


@pytest.mark.slow
def test_batch_norm_allows_larger_learning_rates(run: Run) -> None:
    results = run("batch_norm_learning_rate", "comparison.seeds=[0]")
    assert all(results.final("with batch norm", lr) > 0.9 for lr in (0.003, 0.01, 0.03, 0.1, 0.3))
    assert not any(results.final("without batch norm", lr) > 0.85 for lr in (0.001, 0.003, 0.01, 0.03, 0.3, 1.0, 3.0))


@pytest.mark.slow
def test_batch_norm_depends_less_on_the_scale(run: Run) -> None:
    results = run("batch_norm_initialization", "comparison.seeds=[0]")
    assert results.final("without batch norm", 0.2) > 0.9
    assert not any(results.final("without batch norm", std) > 0.3 for std in (0.01, 0.03, 0.5, 1.0, 3.0))
    assert all(results.final("with batch norm", std) > 0.85 for std in (0.01, 0.03, 0.1, 0.2, 0.5))


@pytest.mark.slow
def test_batch_norm_rescues_sigmoids(run: Run) -> None:
    results = run("batch_norm_sigmoid", "comparison.seeds=[0]")
    assert results.final("sigmoid, without batch norm", metric="val_accuracy") < 0.2
    assert results.final("sigmoid, with batch norm", metric="val_accuracy") > 0.9


@pytest.mark.slow
def test_gamma_and_beta_matter_little(run: Run) -> None:
    results = run("batch_norm_affine", "comparison.seeds=[0]", "epochs=5")
    plain, bare, whole = (results.final(variant, metric="val_accuracy") for variant in results.comparison.variants)
    assert plain < 0.8 < 0.9 < min(bare, whole) and abs(bare - whole) < 0.04


@pytest.mark.slow
def test_inputs_of_layers_drift_less_with_batch_norm(run: Run) -> None:
    results = run("covariate_shift", "epochs=10")
    without, with_norm = (results.curve(variant, "input_drift") for variant in results.comparison.variants)
    assert len(without) == 9 and min(without) > 5 * max(with_norm)


@pytest.mark.slow
def test_batch_norm_suffers_from_tiny_batches_and_layer_norm_does_not(run: Run) -> None:
    results = run("normalization_batch_size", "comparison.along={data.batch_size:[2,16]}")
    assert results.final("batch norm", 2) < 0.7 < 0.85 < results.final("batch norm", 16)
    for variant in ("layer norm", "group norm"):
        assert results.final(variant, 2) > 0.85 < results.final(variant, 16)


@pytest.mark.slow
def test_one_sample_per_device_is_too_few_without_synchronization(run: Run) -> None:
    results = run("batch_norm_per_device")
    own, virtual, sync = (
        {
            n: (results.final(v, n, metric="val_accuracy"), results.final(v, n, metric="train_loss"))
            for n in ("1", "2", "8")
        }
        for v in results.comparison.variants
    )
    assert own["1"][0] < 0.3 < 0.75 < own["2"][0] < own["8"][0] - 0.03
    assert own["1"][1] > 1.5 * own["2"][1] > 2.25 * own["8"][1]
    for n in ("1", "2", "8"):
        assert sync[n] == pytest.approx(own["8"], rel=1e-9)  # over eight samples, wherever they are
        assert virtual[n][1] == pytest.approx(own[n][1], rel=1e-7)  # virtual batches are the batches of devices


@pytest.mark.slow
def test_batch_norm_needs_less_regularization(run: Run) -> None:
    results = run("batch_norm_regularization", "comparison.along={model.dropout:[0.0,0.4]}")
    without, with_norm = ((results.final(v, 0.0), results.final(v, 0.4)) for v in results.comparison.variants)
    assert without[1] - without[0] > with_norm[1] - with_norm[0]
    assert with_norm[0] > with_norm[1] and with_norm[0] > without[0]


@pytest.mark.slow
def test_dropout_narrows_the_gap(run: Run) -> None:
    results = run("dropout", "comparison.seeds=[0]")
    for figure, order in (("train_loss", 1), ("val_loss", -1)):
        assert order * results.final("dropout 0.5", metric=figure) > order * results.final("no dropout", metric=figure)
    assert results.curve("no dropout", "val_loss")[-1] > 1.05 * min(results.curve("no dropout", "val_loss"))


@pytest.mark.slow
def test_centring_and_whitening_help_but_scaling_does_not(run: Run) -> None:
    results = run("feature_scaling")
    raw, scaled, centred, white = (results.final(variant) for variant in results.comparison.variants)
    assert 1 / 5 < raw / scaled < 5
    assert min(raw, scaled) > 10 * centred > 20 * white


@pytest.mark.slow
def test_the_mean_bounds_the_learning_rate(run: Run) -> None:
    results = run("mean_image")
    nothing, pixel, image = ([results.final(v, lr) for lr in (1e-4, 1e-3)] for v in results.comparison.variants)
    assert nothing[0] > 1.5 * pixel[0] and nothing[1] > 2 * pixel[1] > 4 * image[1]


@pytest.mark.slow
def test_smaller_batches_make_more_updates(run: Run) -> None:
    results = run("batch_size", "epochs=6")
    whole, mini, single = (results.curve(variant, "train_loss") for variant in results.comparison.variants)
    assert whole[-1] > 4 * mini[-1] and single[0] < 0.5 * mini[0]
    rises = [sum(b > a for a, b in pairwise(c)) for c in (whole, mini)]
    assert rises == [0, 0]


@pytest.mark.slow
def test_adamw_tolerates_larger_weight_decay_than_adam_with_l2(run: Run) -> None:
    grid = "comparison.along={optimizer.lr:[0.003,0.01],optimizer.weight_decay:[0.01,1.0]}"
    results = run("weight_decay_adam", grid)
    for lr in (0.003, 0.01):
        assert results.final("Adam, L2 in the loss", lr, 1.0) < 0.5
        assert results.final("AdamW, decoupled", lr, 1.0) > 0.9 < results.final("Adam, L2 in the loss", lr, 0.01)


@pytest.mark.slow
def test_l2_and_decoupled_decay_are_equivalent_for_sgd(run: Run) -> None:
    results = run("weight_decay_sgd", "comparison.along={optimizer.lr:[0.1,0.3],optimizer.weight_decay:[0.001,0.1]}")
    for cell in results.comparison.cells():
        if cell.variant.startswith("SGDW"):
            other = results.final("SGD with momentum, L2 in the loss", *cell.point)
            assert abs(results.final(cell.variant, *cell.point) - other) < 0.05


@pytest.mark.slow
def test_effective_rate_decreases_for_adagrad_and_increases_for_others(run: Run) -> None:
    results = run("effective_rate", "epochs=15")
    adagrad, adadelta, adam = (results.curve(variant, "effective_rate") for variant in results.comparison.variants)
    assert all(later < earlier for earlier, later in pairwise(adagrad))
    assert adagrad[-1] < 0.5 * adagrad[0]
    assert adadelta[-1] > 1.2 * adadelta[1] and adam[-1] > 1.1 * adam[1]


@pytest.mark.slow
def test_adaptive_methods_need_schedules_too(run: Run) -> None:
    results = run("adaptive_schedules", "comparison.along={schedule:[constant,cosine]}")
    for variant in ("Adam", "RMSprop"):
        assert results.final(variant, "constant") > 2 * results.final(variant, "cosine")
    assert results.final("Adagrad", "constant") < 1.1 * results.final("Adagrad", "cosine")


@pytest.mark.slow
def test_decaying_schedules_reach_lower_loss_than_constant(run: Run) -> None:
    results = run("schedules", "comparison.seeds=[0]")
    ends = {variant: results.final(variant) for variant in results.comparison.variants}
    constant = ends.pop("constant")
    assert all(end < 0.9 * constant for end in ends.values()), (constant, ends)


@pytest.mark.slow
def test_warm_restarts_raise_the_loss_and_cycles_end_lower(run: Run) -> None:
    results = run("warm_restarts", "comparison.seeds=[0]")
    loss = results.curve("cosine with warm restarts", "train_loss")
    ends = [loss[2], loss[8], loss[20]]  # cycles of 3, 6 and 12 epochs
    assert loss[3] > 1.2 * ends[0] and max(loss[9:11]) > 1.2 * ends[1]
    assert ends[0] > 1.5 * ends[1] > 2.25 * ends[2]
    assert ends[2] < 0.8 * results.final("constant")


@pytest.mark.slow
def test_the_transformer_needs_warmup(run: Run) -> None:
    results = run("transformer_warmup")
    without, warmed = (results.final(variant, metric="val_accuracy") for variant in results.comparison.variants)
    assert without < 0.3 < 0.7 < warmed


@pytest.mark.slow
def test_hard_examples_help(run: Run) -> None:
    results = run("sampling", "comparison.seeds=[0,1,2]")
    at_random, hard = (results.curve(variant, "val_accuracy") for variant in results.comparison.variants)
    assert mean(hard[3:7]) > mean(at_random[3:7]) + 0.005


@pytest.mark.slow
def test_class_order_changes_gradient_variance(run: Run) -> None:
    results = run("class_interleaving", "comparison.seeds=[0]")
    ordered, at_random, interleaved, stratified = (
        results.curve(variant, "gradient_variance") for variant in results.comparison.variants
    )
    assert min(ordered) > 3 and all(0.95 < each < 1.05 for each in at_random)
    assert stratified[0] < 0.6 < 0.8 < interleaved[0] < 0.93 and mean(stratified) < mean(interleaved) < mean(at_random)
    ends = [results.final(variant, metric="val_accuracy") for variant in results.comparison.variants]
    assert ends[0] < 0.5 < 0.94 < min(ends[1:]) and max(ends[1:]) - min(ends[1:]) < 0.02


@pytest.mark.slow
def test_augmentation_helps_with_little_data(run: Run) -> None:
    results = run("augmentation", "comparison.seeds=[0]")
    known, moved = results.comparison.variants
    assert results.final(known, metric="train_accuracy") > 0.99 > 0.97 > results.final(moved, metric="train_accuracy")
    assert results.final(moved, metric="val_accuracy") > results.final(known, metric="val_accuracy") + 0.015
