import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dlopt.basics.errors import UserError
from dlopt.training.batch_norm import LaggingStatistics, _smallest_micro_batch, check_norm_batches, norm_statistics
from dlopt.training.builders.batches import evaluation_batches, training_batches
from dlopt.training.builders.workload import build_workload
from tests.support.runs import run_config, same, small_workload
from tests.support.sizes import SMALL, without


@given(count=st.integers(1, 60), size=st.integers(1, 60), accumulate=st.integers(1, 12), drop_last=st.booleans())
def test_smallest_micro_batch(count: int, size: int, accumulate: int, drop_last: bool) -> None:
    size = min(size, count)
    parts = torch.zeros(count).split(size)
    if drop_last:
        parts = tuple(part for part in parts if len(part) == size)
    sizes = [len(micro) for part in parts for micro in part.tensor_split(min(accumulate, len(part)))]
    assert _smallest_micro_batch(sum(map(len, parts)), size, accumulate) == min(sizes)


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        (["data.batch_size=1"], True),
        (["data.batch_size=1", "model.norm=none"], False),
        (["data.batch_size=1", "model.norm=layer"], False),
        (["data.batch_size=89"], True),  # 90 samples: one is left over
        (["data.batch_size=89", "data.drop_last=true"], False),
        (["data.batch_size=30"], False),
        (["data.batch_size=30", "accumulate=30"], True),
        (["data.batch_size=31", "accumulate=10"], False),  # the last batch of 28 is cut into parts of 3 and 2
        (["data.batch_size=31", "accumulate=15"], True),  # and here of 2 and 1
        (["sampler.epoch_size=31"], False),  # an epoch of batches of 25 and 6
        (["sampler.epoch_size=26"], True),
        (["sampler.epoch_size=50", "data.batch_size=89"], False),  # one batch of 50
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_rejects_one_value_per_channel(overrides: list[str], refused: bool) -> None:
    workload = small_workload("model.norm=batch", *overrides)
    before = {name: value.clone() for name, value in workload.module.state_dict().items()}
    if refused:
        with pytest.raises(UserError, match=r"one value per channel"):
            check_norm_batches(workload, training_batches(workload))
    else:
        check_norm_batches(workload, training_batches(workload))
    assert same(dict(workload.module.state_dict()), before)
    assert workload.module.training


def test_rejects_ghost_batches_of_one_value() -> None:
    workload = small_workload("model.norm=batch", "model.norm_ghost_batch=1")
    with pytest.raises(UserError, match=r"model\.norm_ghost_batch=1: .*one value per channel"):
        check_norm_batches(workload, training_batches(workload))


def test_allows_one_image_for_convolutions() -> None:
    lines = without(SMALL, "model")
    workload = build_workload(run_config(*lines, "model=resnet20", "data.batch_size=1"))
    check_norm_batches(workload, training_batches(workload))


@pytest.mark.parametrize("size", [89, 44])
def test_exact_statistics_of_a_set_that_leaves_one_sample(size: int) -> None:
    """With 90 training samples and data.drop_last=true, the single sample is in no training batch."""
    overrides = ["model.norm=batch", "norm_statistics=exact", "data.drop_last=true", f"data.batch_size={size}"]
    workload = small_workload(*overrides)
    with norm_statistics(workload):
        first = next(m for m in workload.module.modules() if isinstance(m, torch.nn.BatchNorm1d))
        mean = first.running_mean.clone()  # type: ignore[union-attr]
    (inputs, _), *others = evaluation_batches(workload, workload.dataset.train, batch_size="full").epoch(0)
    linear = next(m for m in workload.module.modules() if isinstance(m, torch.nn.Linear))
    torch.testing.assert_close(mean, linear(inputs.flatten(1)).mean(0).detach())
    assert not others


def test_explains_a_high_validation_loss_once() -> None:
    shown: list[str] = []
    lagging = LaggingStatistics(nn.BatchNorm1d(2, momentum=0.1))
    lagging.explain({"step": 20, "train_loss": 1.0, "val_loss": 1.9}, shown.append)
    assert shown == []
    for step in (40, 60):
        lagging.explain({"step": step, "train_loss": 0.1, "val_loss": 2.1}, shown.append)
    assert len(shown) == 2 and "norm_statistics=exact" in shown[1] and max(map(len, shown)) < 80


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)])
def test_explains_nothing_without_running_statistics(module: nn.Module) -> None:
    LaggingStatistics(module).explain({"step": 1, "train_loss": 1.0, "val_loss": 9.0}, pytest.fail)


def test_explains_nothing_after_the_first_updates() -> None:
    lagging = LaggingStatistics(nn.BatchNorm1d(2, momentum=0.1))
    lagging.explain({"step": 101, "train_loss": 1.0, "val_loss": 9.0}, pytest.fail)
