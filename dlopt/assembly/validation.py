"""The model of a set-up on its validation set, during a training."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dlopt.assembly.batches import evaluation_batches
from dlopt.assembly.norms import norm_statistics
from dlopt.assembly.setup import Setup
from dlopt.engine.averaging import ExponentialAverage, at_evaluation_point
from dlopt.engine.evaluate import evaluate
from dlopt.engine.metrics import Reduce
from dlopt.errors import UserError
from dlopt.evaluation.validation import further_figures
from dlopt.interruption import Interruption

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
