import torch

from dlopt.training.builders.batches import evaluation_batches, training_batches
from tests.support.runs import same, small_workload


def test_order_and_augmentation_have_independent_streams() -> None:
    def first(*overrides: str) -> tuple[torch.Tensor, ...]:
        return tuple(next(training_batches(small_workload("augmentation=crop_flip", *overrides)).epoch(0)))

    reference = first()
    assert same(first(), reference)
    other_order = first("order_seed=5")
    assert not torch.equal(other_order[1], reference[1])
    other_draws = first("augmentation_seed=5")
    assert torch.equal(other_draws[1], reference[1]) and not torch.equal(other_draws[0], reference[0])
    assert same(first("init_seed=5"), reference)


def test_evaluation_batches_are_ordered_plain_and_complete() -> None:
    workload = small_workload("augmentation=crop_flip", "data.drop_last=true")
    assert workload.dataset.val is not None
    batches = list(evaluation_batches(workload, workload.dataset.val).epoch(0))
    assert [len(targets) for _, targets in batches] == [25, 5]
    everything = workload.normalize(workload.dataset.val.fetch(torch.arange(30)))
    assert torch.equal(torch.cat([inputs for inputs, _ in batches]), everything)
    assert torch.equal(torch.cat([targets for _, targets in batches]), workload.dataset.val.targets)
