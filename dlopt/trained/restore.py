"""Restores a trained model from its checkpoint, without the data."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlopt.adapt import has_adapters
from dlopt.augment.pipeline import CentreCrop
from dlopt.basics.errors import UserError
from dlopt.config.parsing import parse
from dlopt.config.resolve import resolve_saved
from dlopt.config.run_config import RunConfig
from dlopt.config.saved import with_changes
from dlopt.data.identity import Identity
from dlopt.data.tables.columns import FeatureColumns
from dlopt.data.texts.tokenizer import Tokenizer
from dlopt.machine.device import choose_device
from dlopt.machine.threads import set_threads
from dlopt.metrics.declaration import predicted_classes
from dlopt.parallel.mode import Mode
from dlopt.tasks.regression import Regression
from dlopt.tasks.task import Task
from dlopt.trained.deciding import obstacle
from dlopt.trained.decision import FILE, Decision
from dlopt.training.builders.model_check import build_module
from dlopt.training.builders.precision import Precision, choose_precision
from dlopt.training.checkpoint.checkpoints import foreign, load
from dlopt.training.checkpoint.content import blamed


@dataclass(frozen=True)
class Trained:
    """A model with its normalization, on its device and in evaluation mode."""

    mode: Mode  # one process, or the processes that each hold the model
    normalize: nn.Module
    module: nn.Module
    loss: nn.Module
    precision: Precision
    classes: tuple[str, ...] | None  # None for regression
    task: Task
    sample: tuple[int, ...]  # shape of a sample
    window: tuple[int, ...]  # shape of the model's input: a centre crop of the sample
    run_config: RunConfig
    config: Mapping[str, Any]  # saved, without the overrides
    epoch: int
    tokenizer: Tokenizer | None = None  # of a text that is not read byte by byte
    columns: FeatureColumns | None = None  # of a table of features
    identity: Identity | None = None  # of the training data; None if not known
    foreign: str | None = None  # that the checkpoint is of another run than its folder
    is_widened: bool = False  # in fp32 instead of bf16_pure
    decision: Decision | None = None

    @property
    def warning(self) -> str | None:
        """How the model differs from the one that the run evaluated."""
        lines = [] if self.foreign is None else [self.foreign]
        if self.config["norm_statistics"] != "running":
            lines.append("norm_statistics=exact: needs the training data; using the running statistics instead")
        if self.is_widened:
            lines.append("precision=bf16_pure: using fp32, because bf16 would round the merged update of the adapters")
        return "; ".join(lines) or None

    @torch.inference_mode()
    def outputs(self, inputs: Tensor) -> Tensor:
        """Computes outputs (fp32 or fp64, on the device) of inputs [B, *window], or samples [B, *sample] of images.

        Both before normalization. Returns [B, K], of tokens [B, T, K].
        """
        inputs = inputs.to(self.precision.device)
        if not self.task.accepts(tuple(inputs.shape[1:]), self.window):
            inputs = CentreCrop(self.window).crop(inputs)
        model: Callable[[Tensor], Tensor] = self.precision.autocast(self.module)
        outputs = self.task.predictions_in(model(self.task.normalized(inputs, self.normalize, self.precision.dtype)))
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))

    def values(self, outputs: Tensor) -> Tensor:
        """Returns what a prediction shows of outputs, float64; the values of a regression in the unit of the label.

        Probabilities are those at the temperature of the decision.
        """
        outputs = outputs if self.decision is None else self.decision.scaled(outputs)
        values = self.task.values(outputs, self.loss).double()
        if self.columns is None or not isinstance(self.task, Regression):
            return values
        return values * self.columns.scale + self.columns.mean

    def predicted(self, outputs: Tensor) -> Tensor:
        """Returns the class of outputs [..., K]: int64 [...]; -1, none, where one is NaN.

        Without a decision it is that of the largest output, as `dlopt eval` counts it: probabilities that are clamped
        may be equal.
        """
        return predicted_classes(outputs) if self.decision is None else self.decision.predicted(outputs)


def restore(
    path: Path,
    overrides: Mapping[str, Any],
    join: Callable[[torch.device], Mode] = Mode,
    decision: Decision | None = None,
) -> Trained:
    """Builds the model of the checkpoint `path`, its config changed by `overrides`. Raises `UserError`.

    Adapters are merged into their layers, and a model with precision=bf16_pure then uses fp32.
    `join`: returns the mode of this process, given the device of the config. `decision`: of the checkpoint (see
    `decision_of`), for predictions.
    """
    checkpoint = load(path)
    run_config = parse(resolve_saved(with_changes(checkpoint.config, overrides, path)))
    settings = run_config.settings
    mode = join(choose_device(settings.device))
    mode.ranks.refuse_other_file("checkpoint", path)
    mode.ranks.refuse_difference(FILE, decision)
    set_threads(settings.threads, mode.ranks.local_processes)
    device = mode.device
    precision = choose_precision(settings.precision, device)
    if is_widened := precision.name == "bf16_pure" and has_adapters(checkpoint.model):
        precision = choose_precision("fp32", device)
    with blamed(f"checkpoint={path}"):
        normalize = run_config.normalize.build_as(nn.Module, input_shape=checkpoint.sample)
        task = checkpoint.task
        module = build_module(run_config.model, task.model_arguments(checkpoint.window))
        loss = run_config.loss.build_as(nn.Module, **task.target_arguments)
        if decision is not None:
            reason = obstacle(task, loss, has_threshold=decision.threshold is not None)
            if reason is not None:
                raise UserError(f"{path.with_name(FILE)}: {reason}; remove the file")
        # Placed first: loading rounds to the present dtype.
        normalize, module = precision.place_data(normalize), precision.place(module)
        normalize.load_state_dict(checkpoint.normalize)
        module.load_state_dict(checkpoint.merged_weights)
        return Trained(
            mode=mode,
            normalize=normalize.eval(),
            module=module.eval(),
            loss=precision.place_data(loss).eval(),
            precision=precision,
            classes=checkpoint.classes,
            task=task,
            sample=checkpoint.sample,
            window=checkpoint.window,
            run_config=run_config,
            config=checkpoint.config,
            epoch=checkpoint.epoch,
            tokenizer=None if (text := checkpoint.tokenizer) is None else Tokenizer(text, f"checkpoint={path}"),
            columns=checkpoint.columns,
            identity=checkpoint.identity,
            foreign=foreign(path, checkpoint),
            is_widened=is_widened,
            decision=decision,
        )


@contextlib.contextmanager
def fitting(checkpoint: Path | str) -> Iterator[None]:
    """Turns a mismatch of the weights and the model in the block into a `UserError` about `checkpoint`."""
    try:
        yield
    except RuntimeError as error:
        first, *details = str(error).splitlines()
        if not details or "loading state_dict" not in first:
            raise
        reason = details[0].strip().rstrip(".")
        raise UserError(f"checkpoint={checkpoint}: does not fit the model for these data and keys: {reason}") from None
