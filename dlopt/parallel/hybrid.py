"""Data parallelism outside, model parallelism inside: a mesh of processes, `data_degree` rows of `model_degree` ranks.

The ranks of a row hold one model together, split by filters or by columns; the rows share each batch, and gradients are
summed over rows behind each backward. Four GPUs are a mesh of 2 x 2.
"""

from typing import Literal, Unpack

import torch

from dlopt.errors import UserError
from dlopt.parallel.columns import ColumnParallel
from dlopt.parallel.filter import split_filters
from dlopt.parallel.mode import Mode
from dlopt.parallel.model_parallel import ModelParallel, check_precision
from dlopt.parallel.process_group import ProcessKeys, join
from dlopt.ranges import Count


def hybrid(
    *,
    device: torch.device,
    accumulate: int,
    precision: str,
    data_degree: Count | None,
    model_degree: Count,
    inside: Literal["filter", "columns"],
    sync_batchnorm: bool,
    **keys: Unpack[ProcessKeys],
) -> Mode:
    """Builds the mode of this process, which joins its group. Raises `UserError` where the keys do not fit together."""
    check_precision("hybrid", precision)
    joined = join("hybrid", device, **keys)
    size = 1 if joined is None else joined[0].size
    rows = max(size // model_degree, 1) if data_degree is None else data_degree
    if rows * model_degree != size:
        raise UserError(
            f"parallel=hybrid: data_degree x model_degree = {rows} x {model_degree} = {rows * model_degree}, but there "
            f"{'is 1 process' if size == 1 else f'are {size} processes'}; set parallel.processes={rows * model_degree}"
            ", or other degrees"
        )
    if joined is None:
        return Mode(device, "hybrid")
    group, device = joined
    if inside == "columns":
        return ColumnParallel("hybrid", group, device, accumulate=accumulate, rows=rows, sync=sync_batchnorm)
    return ModelParallel(
        "hybrid", group, device, accumulate=accumulate, split=split_filters, rows=rows, sync=sync_batchnorm
    )
