"""Parallel modes: as overrides, and built as a run builds them."""

from collections.abc import Callable
from typing import Any

import torch

from dlopt.parallel.modes.ddp import data_parallel
from dlopt.parallel.modes.fsdp import fully_sharded
from dlopt.parallel.modes.hybrid import hybrid
from dlopt.parallel.modes.pipeline import pipeline

SYNC = "parallel.sync_batchnorm=true"
DDP, FSDP = ["parallel=ddp"], ["parallel=fsdp", "parallel.unit_parameters=100"]
SYNC_DDP, SYNC_FSDP = [*DDP, SYNC], [*FSDP, SYNC]
PIPELINE, FILTER = ["parallel=pipeline"], ["parallel=filter"]
SPATIAL, COLUMNS = ["parallel=spatial"], ["parallel=columns"]
MESH = ["parallel=hybrid", "parallel.model_degree=2"]

_COMMON: dict[str, Any] = {
    "device": torch.device("cpu"), "accumulate": 1, "processes": None, "timeout_minutes": 1.0, "master_addr": None,
    "master_port": None,
}  # fmt: skip
_BUILD: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "ddp": (data_parallel, {"bucket_cap_mb": 25.0, "static_graph": False, "find_unused_parameters": False,
                            "compression": "none", "sync_batchnorm": True}),
    "fsdp": (fully_sharded, {"precision": "fp32", "shards": None, "unit_parameters": 1, "reshard_after_forward": True,
                             "sync_every_micro_batch": False, "cpu_offload": False, "sync_batchnorm": True}),
    "pipeline": (pipeline, {"batch_size": 32, "precision": "fp32", "threads": 1, "micro_batches": None,
                            "schedule": "1f1b", "split": None}),
    "hybrid": (hybrid, {"data_degree": None, "model_degree": 2, "inside": "filter",
                        "sync_batchnorm": True}),
}  # fmt: skip


def build_mode(name: str, **changed: Any) -> Any:
    function, keys = _BUILD[name]
    return function(**{**_COMMON, **keys, **changed})
