"""A mode that breaks its promise is refused; tests/support/equality.py checks those of dlopt in every update."""

from pathlib import Path
from unittest.mock import patch

import pytest
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.parallel.mode import GroupMode, Placed
from dlopt.parallel.modes import ddp
from dlopt.parallel.modes.ddp import DataParallel
from dlopt.parallel.processes import rendezvous
from dlopt.training.builders.trainer import probe_trainer
from dlopt.training.builders.workload import build_mode, build_workload
from tests.support.ranks import run_ranks
from tests.support.runs import run_config
from tests.support.sizes import RESNET


class Local(GroupMode):
    """Local SGD that never averages: every rank trains on its own gradients."""

    def finish_backward(self, loss: Tensor) -> Tensor:
        return self.ranks.sum_loss(loss)


class Unsynchronized(DataParallel):
    """Averages the gradients, and leaves every rank its own running statistics."""

    def place(self, model: nn.Module, input_shape: tuple[int, ...]) -> Placed:
        return Placed(super().place(model, input_shape).model)


def refused(folder: str) -> None:
    """Called on all ranks."""

    def local(group, device, **_):  # type: ignore[no-untyped-def]
        return Local(group, device, "local")

    for kind, match in (
        (
            local,
            r"^parallel=local: the gradient of stem\.0\.weight on rank 1 differs from that on rank 0; ",
        ),
        (Unsynchronized, r"^parallel=ddp: after update 1, \S+running_mean on rank 1 differs from that on rank 0; "),
    ):
        with patch.object(ddp, "DataParallel", kind):
            config = run_config(*RESNET, "data.batch_size=16", "check=step", "parallel=ddp")
            trainer = probe_trainer(build_workload(config, parallel=build_mode(config)), Path(folder))
            batch = next(iter(trainer.batches.epoch(0)))
            with pytest.raises(UserError, match=match):
                trainer.run_update(batch, 0)
        rendezvous.leave()


def test_refuses_a_mode_that_leaves_ranks_different(tmp_path: Path) -> None:
    run_ranks("tests.parallel.test_replicas:refused", 2, tmp_path, str(tmp_path))
