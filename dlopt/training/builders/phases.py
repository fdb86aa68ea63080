"""The phases of building a workload, each with what the one before it has built: no phase can run too early."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dlopt.augment import Pipeline
from dlopt.config.run_config import RunConfig
from dlopt.data.samples import Dataset
from dlopt.parallel.mode import Mode
from dlopt.tasks.task import Task
from dlopt.training.builders.precision import Precision


@dataclass(kw_only=True)
class Inputs:
    """What the model is built for: the machine, prepared, and the data with their normalization."""

    run_config: RunConfig
    parallel: Mode
    precision: Precision
    dataset: Dataset
    augment: Pipeline | None
    normalize: nn.Module

    @property
    def device(self) -> torch.device:
        return self.precision.device

    @property
    def task(self) -> Task:
        return self.dataset.task

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the predicted classes or values; None for numbers, tokens or images."""
        return self.task.class_names(self.dataset.classes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the model's input."""
        return self.task.input_shape(self.dataset.train.shape if self.augment is None else self.augment.output_shape)


@dataclass(kw_only=True)
class CpuModel(Inputs):
    """The model on the CPU, initialized: with the same initial weights on every device. In fp32."""

    module: nn.Module
    uses: Sequence[str] | None = None  # execution order of the layers, if the config needs it; None: registration


@dataclass(kw_only=True)
class WholeModel(CpuModel):
    """The model on its device, whole: its layers are frozen and recomputed as configured, and not yet sharded."""

    loss: nn.Module
    memory_format: torch.memory_format
    already_frozen: Sequence[str] = ()  # rules that freeze nothing else
    flops: float | None = None  # of a training sample; None if unknown
    compile_obstacle: str = ""  # why the model is not compiled; empty if it is
