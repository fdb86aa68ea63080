"""The teacher of a distillation: a trained model, frozen, on the device of the run."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.config.teacher import teacher_file
from dlopt.data.batches import Batch
from dlopt.data.identity import difference
from dlopt.data.normalization import ScaleShift
from dlopt.losses import Distillation
from dlopt.tasks.text import OTHER_TOKENIZER
from dlopt.trained.restore import Trained, restore
from dlopt.training.builders.workload import Workload


@dataclass(frozen=True)
class Teacher:
    """A trained model, frozen and in evaluation mode, on the device of the run.

    `normalize`: of its inputs; None for that of the model in training.
    """

    model: Callable[[Tensor], Tensor]
    normalize: nn.Module | None

    @torch.no_grad()  # not inference_mode: the loss keeps these outputs for its backward pass
    def __call__(self, batch: Batch) -> Tensor:
        """Returns the outputs of the same, augmented samples."""
        return self.model(batch.inputs if batch.teacher_inputs is None else batch.teacher_inputs)


def with_teacher(workload: Workload) -> Workload:
    """Returns the workload, whose loss has the teacher that it names, for training; itself without one.

    Every rank loads the whole teacher. Its weights are no part of the model: neither of the optimizer nor of
    checkpoints. Raises `UserError` if it is missing, has changed since the run began, or does not fit the run.
    """
    loss, run_config = workload.loss, workload.run_config
    if not isinstance(loss, Distillation) or loss.trained is not None:
        return workload
    mode, settings = workload.parallel, run_config.settings
    key, (path, _) = f"loss.teacher={loss.teacher}", teacher_file(loss.teacher, loss.teacher_sha256)
    changes = {
        "device": settings.device,
        "precision": settings.precision,
        "threads": torch.get_num_threads(),  # restoring a model changes the number of threads; this is the run's
        "allow_packages": list(settings.allow_packages),
    }
    try:
        trained = restore(path, changes, lambda _: mode)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    if (mismatch := _mismatch(trained, workload)) is not None:
        raise UserError(f"{key}: {mismatch}")
    module, dtype = trained.module.requires_grad_(False), trained.precision.dtype
    model = trained.precision.autocast(
        # Inputs have the precision of the run.
        module if dtype == workload.precision.dtype else lambda inputs: module(_as(inputs, dtype))
    )
    has_same = _are_equal(trained.normalize, workload.normalize)
    note = f"teacher: {path}, epoch {trained.epoch}"
    if trained.warning is not None:
        note = f"{note}; {trained.warning}"
    if (found := difference(trained.identity, workload.dataset.identity)) is not None:
        note = f"{note}; warning: it was trained on other data than this run's: {found}"
    loss.trained = Teacher(model, None if has_same else trained.normalize)
    return replace(workload, notes=(*workload.notes, note))


def _as(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    return inputs.to(dtype) if inputs.is_floating_point() else inputs


def _mismatch(trained: Trained, workload: Workload) -> str | None:
    """Returns why a model cannot teach the model of the run; None if it can."""
    task, dataset = workload.task, workload.dataset
    own = workload.class_names
    if (mismatch := task.mismatch(trained.task)) is not None:
        return mismatch
    if trained.classes != own:
        return f"its classes are {_listed(trained.classes)}, those of the data {_listed(own)}"
    if trained.window != workload.shape:
        return f"its inputs have the shape {list(trained.window)}, those of this run {list(workload.shape)}"
    # Of a table: the same features in the same order. The values that fill gaps may differ.
    columns = [each and each.inputs for each in (trained.columns, dataset.columns)]
    if None not in columns and columns[0] != columns[1]:
        return "reads other features of the table, or in another order; use data.split_seed and the keys of its run"
    tokenizers = [each and each.digest for each in (trained.tokenizer, dataset.tokenizer)]
    if tokenizers[0] != tokenizers[1]:
        return OTHER_TOKENIZER
    return None


def _listed(classes: tuple[str, ...] | None) -> str:
    names = classes or ()
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _are_equal(first: nn.Module, second: nn.Module) -> bool:
    """Returns whether two normalizations surely give the same values."""
    if type(first) is not type(second) or not isinstance(first, ScaleShift):
        return False
    states = first.state_dict(), second.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )
