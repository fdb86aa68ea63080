"""Evaluating the model of a set-up: on the validation set during a training, on the test set after it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dlopt.assembly.batches import evaluation_batches
from dlopt.assembly.norms import norm_statistics
from dlopt.assembly.setup import Setup
from dlopt.engine.averaging import ExponentialAverage, at_evaluation_point
from dlopt.engine.evaluate import evaluate
from dlopt.engine.interruption import Interruption
from dlopt.engine.metrics import Reduce
from dlopt.errors import UserError
from dlopt.evaluation.validation import further_figures

Validate = Callable[[Interruption], dict[str, float] | None]
"""The figures of the validation set; None where it was interrupted."""


def reduction(setup: Setup) -> Reduce | None:
    """How sums over a batch become those over all processes' parts of it."""
    return setup.parallel.total if setup.parallel.processes > 1 else None


def validation(
    setup: Setup,
    optimizer: torch.optim.Optimizer,
    average: ExponentialAverage | None,
    evaluating: Callable[[int, int], None],
) -> Validate | None:
    """The validation of the model, or of its average; None where there is no validation set.

    `evaluating` is told the batches done and all of them.
    """
    samples, early = setup.dataset.val, "monitor" in setup.experiment.stopping.arguments
    if samples is None:
        if early:
            raise UserError("stopping=early: there is no validation set; set data.val_split=0.1 or stopping=none")
        return None
    further = further_figures(setup.experiment, setup.dataset, setup.loss)
    module, model = setup.module, setup.precision.autocast(setup.model)
    batches = evaluation_batches(setup, samples)

    def shown() -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(batches.epoch(0), 1):
            yield batch
            evaluating(number, len(batches))

    def validate(interruption: Interruption) -> dict[str, float] | None:
        with at_evaluation_point(optimizer, average), norm_statistics(setup, module, model, interruption):
            return evaluate(
                module,
                model,
                shown(),
                setup.loss,
                classify=setup.classify,
                prefix="val",
                interruption=setup.parallel.polled(interruption),
                reduce=reduction(setup),
                more=further and further(),
            )

    return validate


def test_figures(setup: Setup) -> dict[str, Any]:
    """test_loss and, in a classification, test_accuracy of the model as it stands; {} where there is no test set."""
    if setup.dataset.test is None:
        return {}
    if setup.experiment.settings.evaluate.tta != "none":
        return _figures_over_views(setup)
    batches = evaluation_batches(setup, setup.dataset.test)
    model = setup.precision.autocast(setup.model)
    with norm_statistics(setup, setup.module, model):
        figures = evaluate(
            setup.module,
            model,
            batches.epoch(0),
            setup.loss,
            classify=setup.classify,
            prefix="test",
            reduce=reduction(setup),
        )
    assert figures is not None
    return figures


def check_views(setup: Setup) -> None:
    """Raises `UserError` where the final test cannot average over the views that `evaluate.tta` asks for."""
    from dlopt.evaluation.testing import plan_of
    from dlopt.evaluation.tta import CHOICES

    wanted = setup.experiment.settings.evaluate.tta
    if wanted == "none" or setup.dataset.test is None:
        return
    if setup.parallel.processes > 1:
        raise UserError(
            f"evaluate.tta={wanted}: the final test of {setup.parallel.processes} processes takes the images as they "
            f"are; use evaluate.tta=none, and then dlopt eval tta={wanted}"
        )
    plan_of(setup, CHOICES[wanted](), setup.dataset.test)


def _figures_over_views(setup: Setup) -> dict[str, Any]:
    from dlopt.evaluation.testing import choose_average, outputs_on_test_set, report
    from dlopt.evaluation.tta import CHOICES

    settings = setup.experiment.settings.evaluate
    average = choose_average(settings.average if setup.classify else None, setup)
    outputs = outputs_on_test_set(setup, CHOICES[settings.tta](), average)
    figures = report(outputs, setup.loss, setup.dataset.outputs if setup.classify else None).figures
    return {name: figures[name] for name in ("test_loss", "test_accuracy") if name in figures}
