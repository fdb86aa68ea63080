"""Data parallelism outside, model parallelism inside: a mesh of `data_degree` x `model_degree` processes.

The `model_degree` ranks of a model group hold one model, split by filters or by columns. Each batch is sharded over the
`data_degree` groups, and gradients are summed over them.
"""

from functools import partial
from typing import Literal, Unpack

import torch

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Count
from dlopt.parallel.mode import Mode
from dlopt.parallel.modes.columns import ColumnParallel
from dlopt.parallel.modes.filter import split_filters
from dlopt.parallel.modes.model_parallel import ModelParallel
from dlopt.parallel.processes.process_group import ProcessKeys, join


def hybrid(
    *,
    device: torch.device,
    accumulate: int,
    data_degree: Count | None,
    model_degree: Count,
    inside: Literal["filter", "columns"],
    sync_batchnorm: bool,
    **keys: Unpack[ProcessKeys],
) -> Mode:
    """Joins the process group and builds the mode. Raises `UserError` for keys that contradict each other."""
    joined = join("hybrid", device, **keys)
    size = 1 if joined is None else joined[0].size
    groups = data_groups(size, data_degree, model_degree)
    if joined is None:
        return Mode(device, "hybrid")
    build = ColumnParallel if inside == "columns" else partial(ModelParallel, split=split_filters)
    return build(*joined, name="hybrid", accumulate=accumulate, data_degree=groups, sync_batchnorm=sync_batchnorm)


def data_groups(size: int, data_degree: int | None, model_degree: int) -> int:
    """Returns the number of groups that share a batch. Raises `UserError` if they need other processes than `size`."""
    groups = max(size // model_degree, 1) if data_degree is None else data_degree
    needed = groups * model_degree
    if needed != size:
        raise UserError(
            f"parallel=hybrid: data_degree x model_degree = {groups} x {model_degree} = {needed}, but there "
            f"{'is 1 process' if size == 1 else f'are {size} processes'}; set parallel.processes={needed}, or change "
            "the degrees"
        )
    return groups
