"""What each task says of itself, and that of a checkpoint."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.data.samples import Dataset, InMemory
from dlopt.losses import MSE
from dlopt.metrics.declared import named
from dlopt.tasks.classification import Classification
from dlopt.tasks.kinds import chosen, of_labels, restored
from dlopt.tasks.labels import MultiLabel
from dlopt.tasks.reconstruction import Reconstruction
from dlopt.tasks.regression import Regression
from dlopt.tasks.task import Task
from dlopt.tasks.text import NextToken
from dlopt.training.checkpoint.content import blamed

TASKS: dict[str, Task] = {
    "classification": Classification(10),
    "floating-point images": Classification(10, 1.0),
    "multi-label": MultiLabel(3),
    "regression": Regression(2),
    "bytes": NextToken(256, predictions=8, unit="byte"),
    "tokens": NextToken(50257, predictions=8),
    "tokens of known length": NextToken(300, predictions=8, bytes_per_token=2.5),
    "reconstruction": Reconstruction(12, 1.0),
}
CROSS_ENTROPY = nn.CrossEntropyLoss()
CLASSES = ("cat", "dog", "emu")
IMAGE = (3, 8, 8)


# -- of a checkpoint


@pytest.mark.parametrize("name", TASKS)
def test_a_checkpoint_has_the_task(name: str) -> None:
    task = TASKS[name]
    assert restored(task.saved) == task and type(restored(task.saved)) is type(task)
    assert all(value is None or isinstance(value, str | int | float) for value in task.saved.values())


def test_an_unknown_task_is_refused() -> None:
    """By an error that `blamed` turns into one of the file."""
    with pytest.raises(UserError, match=r"^checkpoint=a\.pt: "), blamed("checkpoint=a.pt"):
        restored({"kind": "segmentation", "outputs": 2})


# -- of data


@pytest.mark.parametrize(
    ("classes", "targets", "expected"),
    [
        (CLASSES, torch.tensor([0, 2, 1]), Classification(3)),
        (CLASSES, torch.tensor([[0.0, 1, 1]] * 3), MultiLabel(3)),
        (None, torch.tensor([0.5, 2.0, 1.0]), Regression(1)),
        (None, torch.zeros(3, 4), Regression(4)),
    ],
)
@pytest.mark.parametrize("white", [255.0, 1.0])
def test_labels_define_the_task(classes: tuple[str, ...] | None, targets: Tensor, expected: Task, white: float) -> None:
    assert of_labels(None if classes is None else len(classes), targets, white) == replace(expected, white=white)
    images = torch.full((3, 1, 2, 2), 200.0) if white == 255 else torch.full((3, 1, 2, 2), -0.5)
    dataset = Dataset(InMemory(images, targets), None, None, classes)
    assert dataset.task == replace(expected, white=white)


# -- inputs and outputs of the model


@pytest.mark.parametrize("name", TASKS)
def test_the_model_reads_samples_or_all_tokens_but_the_last(name: str) -> None:
    task = TASKS[name]
    if isinstance(task, NextToken):
        assert task.input_shape((9,)) == (8,) and task.output_shape((8,)) == (8, task.outputs)
        expected = {"input_shape": (8,), "classes": task.outputs, "vocabulary": task.outputs}
        assert task.model_arguments((8,)) == expected
        assert task.tokens == task.predictions == 8
    else:
        assert task.input_shape(IMAGE) == IMAGE and task.output_shape(IMAGE) == (task.outputs,)
        assert task.model_arguments(IMAGE) == {"input_shape": IMAGE, "classes": task.outputs, "vocabulary": None}
        assert task.tokens is None and task.predictions == 1


@pytest.mark.parametrize("name", TASKS)
def test_random_inputs_are_those_of_a_model(name: str) -> None:
    task = TASKS[name]
    with torch.random.fork_rng():
        inputs = task.random_inputs((4, 8))
    assert inputs.shape == (4, 8) and inputs.device.type == "cpu"
    with torch.device("meta"):
        assert task.random_inputs((4, 8)).device.type == "meta"
    if isinstance(task, NextToken):
        assert inputs.dtype == torch.int64 == task.input_dtype(torch.bfloat16)
        assert inputs.min() >= 0 and inputs.max() < task.outputs
    else:
        assert inputs.dtype == torch.float32 and task.input_dtype(torch.bfloat16) == torch.bfloat16
        assert (inputs < 0).any() and (inputs > 0).any()


@pytest.mark.parametrize(
    ("task", "size", "dtype", "largest"),
    [
        (Classification(10), (5, *IMAGE), torch.uint8, 255),
        (Reconstruction(192), (5, *IMAGE), torch.uint8, 255),
        (Classification(10, 1.0), (5, *IMAGE), torch.float32, 1),
        (Regression(1), (5, 40), torch.float32, 1),
        (NextToken(300, predictions=8), (20, 9), torch.int64, 299),
    ],
)
def test_random_samples_are_those_of_the_data(
    task: Task, size: tuple[int, ...], dtype: torch.dtype, largest: int
) -> None:
    first, again = (task.random_samples(size, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.shape == size and first.dtype == dtype and torch.equal(first, again)
    assert first.min() >= 0 and largest / 2 < first.max() <= largest


@pytest.mark.parametrize("name", TASKS)
def test_inputs_are_normalized_except_for_tokens(name: str) -> None:
    task, normalize = TASKS[name], nn.Hardtanh(0, 2)
    if isinstance(task, NextToken):
        tokens = torch.arange(9, dtype=torch.uint8).expand(2, 9)
        inputs, targets = task.split(tokens, torch.zeros(2))
        assert inputs.tolist() == [list(range(8))] * 2 and targets.tolist() == [list(range(1, 9))] * 2
        assert task.normalized(inputs, normalize, torch.float64) is inputs
        assert isinstance(task.normalization(normalize), nn.Identity)
        assert task.accepts((3,), (8,))
        return
    images, labels = torch.arange(12.0).view(1, 3, 2, 2), torch.zeros(1)
    inputs, targets = task.split(images, labels)
    assert inputs is images and (targets is labels) == task.reads_labels
    found = task.normalized(inputs, normalize, torch.float64, torch.channels_last)
    assert found.dtype == torch.float64 and found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, images.clamp(0, 2).double())
    assert torch.equal(task.normalized(inputs, None, torch.float32), images)
    assert task.normalization(normalize) is normalize
    assert task.accepts(IMAGE, IMAGE) and not task.accepts((3, 9, 9), IMAGE)


@pytest.mark.parametrize(
    ("name", "targets", "text", "counted"),
    [
        ("classification", [0, *range(9), 9, 9], "3x8x8, 10 classes: 8.3 % (b) to 16.7 % (a)", "images"),
        ("multi-label", [[1, 0, 0], [1, 1, 0]], "3x8x8, 3 labels: a 100.0 %, b 50.0 %, c 0.0 %", "images"),
        (
            "regression",
            [[1, 10], [2, 20], [6, 30]],
            "3x8x8, 2 values: mean 3, 20, standard deviation 2.16, 8.165",
            "images",
        ),
        ("reconstruction", [0], "3x8x8", "images"),
        ("bytes", [0], "8 bytes at once, vocabulary 256", "bytes"),
        ("tokens", [0], "8 tokens at once, vocabulary 50,257", "tokens"),
    ],
)
def test_the_header_describes_inputs_and_outputs(name: str, targets: list[Any], text: str, counted: str) -> None:
    task = TASKS[name]
    shape = (8,) if isinstance(task, NextToken) else IMAGE
    names = "abcdefghij"[: task.outputs]
    assert task.describe(shape, torch.tensor(targets), names) == text
    if shape is IMAGE:
        assert task.describe((15,), torch.tensor(targets), names) == text.replace("3x8x8", "15 features")
    assert task.counted_as(task.input_shape((9,)) if isinstance(task, NextToken) else IMAGE) == counted
    assert isinstance(task, NextToken) or task.counted_as((12,)) == "samples"
    assert task.name == {"bytes": "next token", "tokens": "next token"}.get(name, name)


# -- losses and evaluations


@pytest.mark.parametrize("name", TASKS)
def test_the_loss_is_given_the_classes_or_the_labels(name: str) -> None:
    task = TASKS[name]
    classes = task.outputs if isinstance(task, Classification | NextToken) else None
    labels = task.outputs if isinstance(task, MultiLabel) else None
    assert task.target_arguments == {"classes": classes, "labels": labels}


def test_a_balanced_loss_is_given_the_training_targets() -> None:
    balanced, targets = {"class_weights": "balanced"}, torch.tensor([0, 2, 2, 0, 0])
    assert Classification(4).balance(balanced, targets) == {"class_counts": [3, 0, 2, 0]}
    flags = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    assert MultiLabel(2).balance({"pos_weight": "balanced"}, flags) == {"label_fractions": [0.75, 0.25]}
    for task in TASKS.values():
        for plain in ({}, {"class_weights": None, "pos_weight": None}, {"class_weights": (1.0, 2.0)}):
            assert task.balance(plain, flags) == {}
        if not isinstance(task, Classification):
            with pytest.raises(UserError) as error:
                task.balance(balanced, flags)
            message = "loss.class_weights=balanced: needs labels, which a {} task has not; use null"
            assert str(error.value) == message.format(task.name)
        if not isinstance(task, MultiLabel):
            assert task.balance({"pos_weight": "balanced"}, targets) == {}


def test_metrics_that_are_functions_of_the_loss() -> None:
    found = {name: task.loss_metrics(2.0) for name, task in TASKS.items() if task.loss_metrics(2.0)}
    assert found == {
        "bytes": {"bits_per_byte": pytest.approx(2 / math.log(2))},
        "tokens": {"perplexity": pytest.approx(math.exp(2))},
        "tokens of known length": {
            "perplexity": pytest.approx(math.exp(2)),
            "bits_per_byte": pytest.approx(2 / math.log(2) / 2.5),
        },
    }


@pytest.mark.parametrize(
    ("name", "monitor", "accuracy", "always", "by_eval"),
    [
        (
            "classification",
            "val_accuracy",
            "accuracy",
            [],
            [
                "top5_accuracy",
                "macro_f1",
                "balanced_accuracy",
                "roc_auc",
                "average_precision",
                "log_loss",
                "brier_score",
                "calibration_error",
            ],
        ),
        (
            "regression",
            "val_loss",
            None,
            [],
            [
                "r2",
                "mae",
                "median_absolute_error",
                "absolute_error_p90",
                "error_p05",
                "error_p95",
            ],
        ),
        (
            "multi-label",
            "val_loss",
            None,
            ["mean_average_precision", "macro_f1", "micro_f1"],
            [
                "roc_auc",
                "log_loss",
                "brier_score",
            ],
        ),
        ("bytes", "val_loss", "token_accuracy", [], []),
        ("reconstruction", "val_loss", None, [], []),
    ],
)
def test_metrics_of_an_evaluation(
    name: str, monitor: str, accuracy: str | None, always: list[str], by_eval: list[str]
) -> None:
    task = TASKS[name]
    assert task.monitor == monitor and task.accuracy == accuracy
    assert [metric.name for metric in task.computed(())] == always
    assert [metric.name for metric in task.computed((), tests=True)] == [*always, *by_eval]
    for requested in named(["matthews_correlation", "mae"], task.metrics):
        found = [metric.name for metric in task.computed([requested])]
        assert sorted(found) == sorted([*always, requested.name])


def test_few_classes_have_no_top5_accuracy() -> None:
    [top5] = named(["top5_accuracy"], Classification.metrics)
    assert top5 not in Classification(5).computed((), tests=True)
    assert top5 in Classification(6).computed((), tests=True)
    Classification(6).check_metric("evaluate.metrics=top5_accuracy", top5)
    with pytest.raises(UserError, match=r"^monitor=val_top5_accuracy: needs more than 5 classes; the data have 5$"):
        Classification(5).check_metric("monitor=val_top5_accuracy", top5)


def test_what_outputs_mean_depends_on_the_loss() -> None:
    outputs = torch.tensor([[-0.5, 0.25, 1.5]], dtype=torch.float64)
    clamped, softmax, sigmoid = outputs.clamp(0, 1), outputs.softmax(1), outputs.sigmoid()
    expected: dict[str, tuple[Tensor, Tensor]] = {
        "classification": (softmax, clamped),
        "bytes": (softmax, clamped),
        "multi-label": (sigmoid, clamped),
        "regression": (outputs, outputs),
    }
    for name, (after_entropy, after_mse) in expected.items():
        assert torch.equal(TASKS[name].values(outputs, CROSS_ENTROPY), after_entropy), name
        assert torch.equal(TASKS[name].values(outputs, MSE(classes=None)), after_mse), name
        task = Regression(3) if name == "regression" else TASKS[name]
        part = task.evaluated(outputs, outputs, CROSS_ENTROPY, origin=outputs[:1])
        assert torch.equal(part.probabilities, after_entropy) and part.predictions.tolist() == [2], name
        assert part.origin is not None


SQUARED = "average=probabilities: a model trained with a squared error has none; use average=logits"
OF_LABELS = "average=probabilities: the labels of a sample have no common distribution; use average=logits"


@pytest.mark.parametrize(
    ("name", "loss", "default", "refusal"),
    [
        ("classification", CROSS_ENTROPY, "probabilities", None),
        ("classification", MSE(classes=10), "logits", SQUARED),
        ("bytes", CROSS_ENTROPY, "probabilities", None),
        ("multi-label", CROSS_ENTROPY, "logits", OF_LABELS),
        ("multi-label", MSE(classes=None), "logits", OF_LABELS),
        ("regression", MSE(classes=None), "logits", SQUARED),
        ("reconstruction", MSE(classes=None), "logits", SQUARED),
    ],
)
def test_what_is_averaged_over_crops_and_models(name: str, loss: nn.Module, default: str, refusal: str | None) -> None:
    task = TASKS[name]
    assert task.choose_average(None, loss, "average") == default
    assert task.choose_average("logits", loss, "average") == "logits"
    if refusal is None:
        assert task.choose_average("probabilities", loss, "average") == "probabilities"
        return
    with pytest.raises(UserError) as error:
        task.choose_average("probabilities", loss, "average")
    assert str(error.value) == refusal


def test_only_what_predicts_labels_has_names_and_keeps_outputs() -> None:
    """The outputs of texts and pictures are large."""
    for name, task in TASKS.items():
        keeps = isinstance(task, Classification | MultiLabel | Regression)
        assert (task.keeps_outputs, task.reads_labels) == (keeps, keeps), name
        assert task.class_names(list(CLASSES)) == (CLASSES if keeps else None), name
        assert task.class_names(None) is None, name
        assert task.draws_outputs == (name == "reconstruction"), name
        assert task.measures_train_accuracy == (not isinstance(task, NextToken)), name
    purposes = {task.purpose for task in TASKS.values()}
    assert purposes == {"classes", "labels", "values per target", "tokens"}


def test_the_report_of_a_test_shows_classes_or_labels() -> None:
    outputs = torch.tensor([[2.0, 1, 0], [0, 3, 1], [5, 4, 0], [math.nan, 0, 0]])
    targets = torch.tensor([0, 1, 1, 1])
    tested = Classification(3).report({"test_loss": 1.0}, Classification(3).evaluated(outputs, targets, CROSS_ENTROPY))
    assert tested.metrics == {"test_loss": 1.0} and tested.confusion is not None
    assert tested.confusion.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert [row["recall"] for row in tested.per_class(CLASSES)] == [1, pytest.approx(1 / 3), None]
    flags = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    tested = MultiLabel(3).report({}, MultiLabel(3).evaluated(4 * flags - 2, flags, nn.BCEWithLogitsLoss()))
    assert tested.confusion is None
    rows = [(row["class"], row["samples"], row["average_precision"]) for row in tested.per_class(CLASSES)]
    assert rows == [("cat", 1, 1), ("dog", 1, 1), ("emu", 0, None)]
    tested = Regression(3).report({"test_r2": 0.5}, Regression(3).evaluated(outputs, outputs, MSE(classes=None)))
    assert (tested.metrics, tested.confusion, tested.by_class) == ({"test_r2": 0.5}, None, None)
    assert tested.per_class(CLASSES) == []


@pytest.mark.parametrize(
    ("task", "outputs", "targets", "training", "unit", "expected"),
    [
        (Classification(2), [[1.0, 0], [0, 1], [1, 0], [1, 0]], [0, 1, 1, 0], [0, 0, 1], (1.0, 0.0),
         "25.0 points above guessing (always cat: 50.0 %)"),
        (Classification(3), [[0.0, 1, 0], [math.nan, 0, 1]], [0, 0], [0, 0, 1], (1.0, 0.0),
         "100.0 points below guessing (always cat: 100.0 %)"),
        (Regression(1), [[1.0], [2]], [0.0, 4], [1.0, 3], (1.0, 0.0),
         "mae 1.5, 25 % below that of always predicting the mean 2"),
        (Regression(1), [[1.0], [2]], [0.0, 4], [1.0, 3], (10.0, 100.0),
         "mae 15 in the unit of the data, 25 % below that of always predicting the mean 120"),
        (Regression(2), [[1.0, 5], [2, 6]], [[0.0, 1], [4, 1]], [[1.0, 1], [3, 1]], (1.0, 0.0),
         "mae 3, 200 % above that of always predicting the mean"),
        (Regression(1), [[1.0], [math.nan]], [0.0, 4], [1.0, 3], (1.0, 0.0), ""),
        (Regression(1), [[1.0], [2]], [3.0, 3], [3.0, 3], (1.0, 0.0), ""),
        (MultiLabel(1), [[1.0], [2]], [[1.0], [0]], [[1.0]], (1.0, 0.0), ""),
    ],
)  # fmt: skip
def test_beside_a_constant_prediction(
    task: Task, outputs: list[Any], targets: list[Any], training: list[Any], unit: tuple[float, float], expected: str
) -> None:
    split = task.evaluated(torch.tensor(outputs), torch.tensor(targets), CROSS_ENTROPY)
    assert task.beside_guessing(split, torch.tensor(training), CLASSES, unit) == expected


# -- predictions

NAN = math.nan


@pytest.mark.parametrize(
    ("task", "classes", "values", "best", "columns", "cells", "label", "labels"),
    [
        (
            Classification(3), CLASSES, (0.125, 0.75, 0.125), 1,
            ["class", "probability", "p(cat)", "p(dog)", "p(emu)"], ["dog", "0.75", "0.125", "0.75", "0.125"],
            "dog", (),
        ),
        (  # the class of the largest output, not of the largest value: these were clamped
            Classification(3), CLASSES, (1.0, 1.0, 0.0), 1,
            ["class", "probability", "p(cat)", "p(dog)", "p(emu)"], ["dog", "1", "1", "1", "0"], "dog", (),
        ),
        (
            Classification(3), CLASSES, (NAN, NAN, NAN), -1,
            ["class", "probability", "p(cat)", "p(dog)", "p(emu)"], ["", "nan", "nan", "nan", "nan"], None, (),
        ),
        (
            MultiLabel(3), CLASSES, (0.5, 0.4999, 0.9), 2,
            ["labels", "p(cat)", "p(dog)", "p(emu)"], ["cat;emu", "0.5", "0.4999", "0.9"], None, ("cat", "emu"),
        ),
        (
            MultiLabel(3), CLASSES, (0.1, NAN, 0.2), -1,
            ["labels", "p(cat)", "p(dog)", "p(emu)"], ["", "0.1", "nan", "0.2"], None, (),
        ),
        (Regression(1), None, (1234567.0,), 0, ["value"], ["1.23457e+06"], None, ()),
        (Regression(2), None, (0.1, NAN), -1, ["value_0", "value_1"], ["0.1", "nan"], None, ()),
    ],
)  # fmt: skip
def test_predictions_are_listed(
    task: Task, classes: tuple[str, ...] | None, values: tuple[float, ...], best: int, columns: list[str],
    cells: list[str], label: str | None, labels: tuple[str, ...],
) -> None:  # fmt: skip
    found = task.cells(values, best, classes)
    assert task.columns(classes) == columns
    assert [each if isinstance(each, str) else f"{each:.6g}" for each in found] == cells
    assert len(columns) == len(cells)
    assert task.label(best, classes) == label and task.labels_of(values, classes) == labels
    task.check_predicts("checkpoint", "runs/a")


# -- teachers

OTHER_TOKENS = "reads the tokens of another tokenizer; use data.tokenizer of the teacher"


@pytest.mark.parametrize(
    ("own", "other", "message"),
    [
        (Classification(10), NextToken(10), "its task is next token, that of this run is classification"),
        (NextToken(10), MultiLabel(10), "its task is multi-label, that of this run is next token"),
        (Classification(3), Classification(10), "has 10 classes, the data 3; use a teacher of the same classes"),
        (NextToken(50257), NextToken(300), "has 300 classes, the data 50257; use a teacher of the same classes"),
        (NextToken(256, unit="byte"), NextToken(256), OTHER_TOKENS),
        (NextToken(256), NextToken(256, unit="byte"), OTHER_TOKENS),
        (
            Classification(3), Classification(3, 1.0),
            "its images have values up to 1, those of this run up to 255",
        ),
    ],
)  # fmt: skip
def test_a_teacher_of_another_task_is_refused(own: Task, other: Task, message: str) -> None:
    assert own.mismatch(other) == message


@pytest.mark.parametrize("name", TASKS)
def test_a_teacher_of_the_same_task(name: str) -> None:
    task = TASKS[name]
    assert task.mismatch(restored(task.saved)) is None
    longer = replace(task, predictions=16, bytes_per_token=3.0) if isinstance(task, NextToken) else task
    assert task.mismatch(longer) is None  # the windows, and the texts, may differ


# -- that a model or a loss sets


class _Ranked(Classification):
    """The task of another package."""


def test_a_class_sets_its_task_by_an_attribute() -> None:
    own = Classification(10, 1.0)
    loss, model = type("Loss", (), {"task": _Ranked}), type("Model", (), {"reconstructs": True})
    other = type("Other", (), {"task": "classification"})  # an attribute of the user's that means something else
    assert chosen(own, IMAGE, (other, "loss=x"), (nn.Linear, "model=y")) is own
    assert chosen(own, IMAGE, (loss, "loss=x"), (nn.Linear, "model=y")) == _Ranked(10, 1.0)
    assert chosen(own, IMAGE, (nn.Linear, "loss=x"), (model, "model=y")) == Reconstruction(3 * 8 * 8, 1.0)
