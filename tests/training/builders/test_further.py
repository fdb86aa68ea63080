"""Further tensors of the samples: what a loss reads beside the targets, and the weights, beside plain loops."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlopt.basics.errors import UserError
from dlopt.parallel.mode import Mode
from dlopt.trained import ensemble
from dlopt.training.builders.batches import training_batches
from dlopt.training.builders.further import names_of
from dlopt.training.builders.trainer import probe_trainer
from dlopt.training.builders.workload import Workload, build_workload, with_validation_sets
from tests.support.further import AGED, PEOPLE, WEIGHTED, AgeLoss, OptionalLoss, people
from tests.support.runs import assert_same_run, at_update, resume, run_config, start, terminate

LOSS = "tests.support.further."
READS = f"loss={LOSS}AgeLoss: reads age"


def workload(*overrides: str) -> Workload:
    return build_workload(run_config(*PEOPLE, *overrides))


def test_names_what_a_loss_requires_by_keyword() -> None:
    assert names_of(AgeLoss()) == ("age",)
    assert names_of(OptionalLoss()) == names_of(nn.CrossEntropyLoss()) == names_of(nn.Module()) == ()


def test_a_loss_that_names_nothing_gets_nothing(tmp_path: Path) -> None:
    """Also of data with further tensors: batches and step are those without them."""
    plain = workload()
    assert plain.network.further is None
    assert next(iter(training_batches(plain).epoch(0))).further == {}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("given", [(), (WEIGHTED,)])
def test_an_update_equals_a_plain_loop(accumulate: int, given: tuple[str, ...]) -> None:
    aged = workload(AGED, *given, f"accumulate={accumulate}")
    step = probe_trainer(aged, Path("unused")).step
    batches = training_batches(aged)
    batch, indices = next(iter(batches.epoch(0))), batches.sampler.order(0)[:19]
    source = people(weights="given").train
    assert torch.equal(batch.further["age"], source.further["age"][indices].double())
    weights = source.further["weight"].double() / source.further["weight"].double().mean()
    outputs, age = aged.module.train()(batch.inputs), source.further["age"][indices].double()
    losses = F.cross_entropy(outputs, batch.targets, reduction="none") * age + (outputs[:, 0] - age) ** 2
    mean = (losses * weights[indices]).mean() if given else losses.mean()
    expected = torch.autograd.grad(mean, [*aged.module.parameters()])
    step.begin(batch, 0, log_norm=False)
    result = step.loss_and_gradients()
    assert result.loss is not None and float(result.loss) == pytest.approx(float(mean), rel=1e-12)
    for parameter, gradient in zip(aged.module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


def test_weights_multiply_a_loss_of_more_outputs(tmp_path: Path) -> None:
    words = [word for word in PEOPLE if not word.startswith("model.")]
    run = [*words, f"loss={LOSS}WideLoss", f"model={LOSS}Wide", "normalize=none", "data.batch_size=full"]
    weighted, repeated = (start(tmp_path / each, *run, f"+data.weights={each}") for each in ("given", "repeated"))
    assert weighted["test_loss"] == pytest.approx(repeated["test_loss"], rel=1e-9)


OPTIMIZERS = {
    "sgd": [],
    "sam": ["optimizer=sam", "accumulate=2"],
    "lbfgs": ["optimizer=lbfgs", "optimizer.max_iter=3"],
    "newton_cg": ["optimizer=newton_cg", "optimizer.lr=0.1"],
}


@pytest.mark.parametrize(("name", "loss"), [*((name, ()) for name in OPTIMIZERS), ("sgd", (AGED,))])
def test_weighted_rows_are_repeated_rows(tmp_path: Path, name: str, loss: tuple[str, ...]) -> None:
    """Of whole batches, to which the weights 0, 1 and 2 are rows that are left out and repeated."""
    words = [*PEOPLE, *OPTIMIZERS[name], *loss, "normalize=none", "data.batch_size=full", "epochs=3"]
    weighted, repeated = (start(tmp_path / each, *words, f"+data.weights={each}") for each in ("given", "repeated"))
    for key in ("best_val_loss", "test_loss"):
        assert weighted[key] == pytest.approx(repeated[key], rel=1e-9)
    assert start(tmp_path / "equal", *words)["test_loss"] != pytest.approx(weighted["test_loss"], rel=1e-6)


@pytest.mark.parametrize("step", [2, 4])
def test_resumes_in_an_epoch(tmp_path: Path, step: int) -> None:
    words = [*PEOPLE, WEIGHTED, AGED, "accumulate=2", "ema=0.9", "validation.other.use=test"]
    start(tmp_path / "whole", *words)
    with at_update(step, terminate):
        assert start(tmp_path / "run", *words)["status"] == "interrupted"
    resume(tmp_path / "run", *words)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_compiled_runs_equal_eager_runs(tmp_path: Path) -> None:
    for case in ([WEIGHTED], [AGED], [WEIGHTED, AGED]):
        name = " ".join(case)
        eager, compiled = (
            start(tmp_path / f"{name}{flag}", *PEOPLE, *case, f"compile={flag}") for flag in ("false", "true")
        )
        assert compiled["test_loss"] == pytest.approx(eager["test_loss"], rel=1e-12)


@pytest.mark.parametrize(("lacks", "which"), [("train", "training"), ("val", "validation"), ("test", "test")])
def test_refuses_data_without_the_tensor(lacks: str, which: str) -> None:
    with pytest.raises(UserError) as error:
        workload(AGED, f"+data.lacks={lacks}")
    assert str(error.value) == f"{READS}, which the {which} set lacks; it has: height"


def test_refuses_a_named_validation_set_without_the_tensor() -> None:
    other = workload(AGED, "+validation.other.lacks=test", "validation.other.use=test")
    with pytest.raises(UserError) as error:
        with_validation_sets(other)
    assert str(error.value) == f"{READS}, which the validation.other set lacks; it has: height"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([AGED, "+data.short=true"], f"{READS}: 69 values for 70 training samples"),
        ([f"loss={LOSS}WeightLoss"], f"loss={LOSS}WeightLoss: reads weight, by which dlopt multiplies the loss; use"),
    ],
)
def test_refuses_other_tensors(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        workload(*words)


IMAGES = "+data.images=true"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"augmentation=mixup {IMAGES}", ", but augmentation: Mixup mixes samples of different age; use another one"),
        ("diagnostics=[gradients] tracking=[tensorboard]", ", but diagnostics measure the loss without age; use"),
        ("sampler=hard_examples", ", but sampler=hard_examples observes losses; use another"),
        (f"evaluate.tta=flip {IMAGES}", ", which evaluate.tta=flip does not pass; use evaluate.tta=none"),
    ],
)
def test_refuses_what_would_not_pass_it(override: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(READS + message)}"):
        probe_trainer(workload(AGED, *override.split()), Path("unused"))


def test_refuses_a_mode_that_computes_losses_of_parts() -> None:
    aged = workload(AGED)
    mode = Mode(aged.device, name="pipeline")
    message = f"^{READS}, but parallel=pipeline does not support it; use parallel=single, ddp, fsdp$"
    with pytest.raises(UserError, match=message):
        training_batches(replace(aged, parallel=mode))


def test_refuses_labels_drawn_from_the_model() -> None:
    """Of a loss whose outputs are class probabilities."""
    aged = workload("loss=tests.support.further.AgedEntropy", "optimizer=sophia", "optimizer.hessian=gnb")
    with pytest.raises(UserError, match=r"^age: labels drawn from the model do not have it; leave it out, or an"):
        probe_trainer(aged, Path("unused"))


def test_refuses_the_average_of_two_models() -> None:
    aged = workload(AGED)
    with pytest.raises(UserError, match=f"^{READS}, so 2 models cannot be averaged; give one checkpoint$"):
        ensemble.test([Path("a"), Path("b")], [aged, aged], None, None, "none")


def test_other_measurements_are_refused_in_one_line() -> None:
    """Such as those of a landscape, which calls the loss with outputs and targets."""
    aged = workload(AGED)
    with pytest.raises(UserError, match=f"^{READS}, which only training and evaluation pass$"):
        aged.loss(torch.zeros(2, 3), torch.zeros(2).long())
