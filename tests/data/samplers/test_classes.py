"""Class-balanced and class-interleaved orders against brute force and closed forms."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlopt.basics.errors import UserError
from dlopt.data.samplers import ClassBalanced, ClassInterleaved, ClassSorted, classes


def equal_neighbours(row: list[int]) -> int:
    return sum(a == b for a, b in itertools.pairwise(row))


def interleaved(labels: list[int], epoch: int = 0, seed: int = 0) -> list[int]:
    """Returns the labels in the sampler's order, after checking that it visits each sample once."""
    sampler = ClassInterleaved(targets=torch.tensor(labels), seed=seed)
    order = sampler.order(epoch)
    assert sorted(order.tolist()) == list(range(len(labels))) and len(sampler) == len(labels)
    return [labels[i] for i in order]


@given(labels=st.lists(st.sampled_from([0, 3, 4, 9]), min_size=1, max_size=8), epoch=st.integers(0, 10**6))
def test_no_order_has_fewer_equal_neighbours(labels: list[int], epoch: int) -> None:
    best = min(equal_neighbours(list(row)) for row in set(itertools.permutations(labels)))
    assert equal_neighbours(interleaved(labels, epoch)) == best


@st.composite
def class_sizes(draw: st.DrawFn) -> list[int]:
    """Draws class sizes, including the limit: the largest class has about half of the samples."""
    others = draw(st.lists(st.integers(1, 60), min_size=1, max_size=12))
    return [*others, max(1, sum(others) + draw(st.integers(-3, 30)))] if draw(st.booleans()) else others


@given(sizes=class_sizes(), seed=st.integers(0, 2**62))
def test_equal_neighbours_only_beyond_half(sizes: list[int], seed: int) -> None:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    count, largest = len(labels), max(sizes)
    assert equal_neighbours(interleaved(labels, seed=seed)) == max(0, 2 * largest - count - 1)


@pytest.mark.parametrize(
    "shares", [[1] * 10, [1, 1], [1, 1, 1], [4, 4, 2], [5, 4, 1], [5, 5, 1], [26, 26, 26, 22], [1] * 300]
)
def test_runs_in_linear_time(shares: list[int]) -> None:
    """Cases with no, little and much slack. Quadratic time would take minutes."""
    labels = [label for label, share in enumerate(shares) for _ in range(share * 30_000 // sum(shares))]
    assert equal_neighbours(interleaved(labels)) == 0


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 1, 1, 2, 2]])
def test_every_optimal_arrangement_occurs(labels: list[int]) -> None:
    rows = set(itertools.permutations(labels))
    best = min(equal_neighbours(list(row)) for row in rows)
    seen = {tuple(interleaved(labels, epoch)) for epoch in range(1000)}
    assert seen == {row for row in rows if equal_neighbours(list(row)) == best}


def test_dominating_class_is_separated_evenly() -> None:
    """The few other samples are not all at the start."""
    row = interleaved([0] * 900 + [1] * 100)
    assert all(2 <= sum(row[start : start + 100]) <= 25 for start in range(0, 1000, 100))


@given(
    labels=st.lists(st.sampled_from([0, 0, 0, 0, 2, 2, 5]), min_size=1, max_size=60),
    epochs=st.integers(1, 6),
    seed=st.integers(0, 2**62),
)
def test_classes_and_their_samples_rotate(labels: list[int], epochs: int, seed: int) -> None:
    sampler = ClassBalanced(targets=torch.tensor(labels), seed=seed)
    drawn: Counter[int] = Counter()
    classes = set(labels)
    for epoch in range(epochs):
        order = sampler.order(epoch).tolist()
        assert len(order) == len(labels) == len(sampler)
        by_class = Counter(labels[i] for i in order)
        assert by_class.keys() == classes and max(by_class.values()) - min(by_class.values()) <= 1
        for start in range(0, len(order) - len(classes) + 1, len(classes)):
            assert {labels[i] for i in order[start : start + len(classes)]} == classes
        drawn.update(order)
    for label in classes:
        counts = [drawn[i] for i, own in enumerate(labels) if own == label]
        assert max(counts) - min(counts) <= 1
    totals = Counter(labels[i] for i in drawn.elements())
    assert max(totals.values()) - min(totals.values()) <= 1


def test_each_rotation_has_a_new_order() -> None:
    sampler = ClassBalanced(targets=torch.tensor([0] * 30 + [1] * 30), seed=0)
    orders = [[i for i in sampler.order(epoch).tolist() if i < 30] for epoch in range(5)]
    assert len({tuple(order) for order in orders}) == 5
    first_classes = {int(sampler.order(epoch)[0]) < 30 for epoch in range(20)}
    assert first_classes == {True, False}


def test_sorted_is_class_after_class_and_random_within() -> None:
    labels = torch.tensor([7, 2, 7, 2, 2, 7] * 5)
    sampler = ClassSorted(targets=labels, seed=1)
    orders = [sampler.order(epoch) for epoch in range(3)]
    assert all(sorted(order.tolist()) == list(range(30)) for order in orders)
    assert all(labels[order].tolist() == [2] * 15 + [7] * 15 for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 3


@pytest.mark.parametrize("sampler", [ClassBalanced, ClassInterleaved, ClassSorted])
def test_rejects_regression_targets(sampler: type[ClassBalanced] | type[ClassInterleaved] | type[ClassSorted]) -> None:
    name = {ClassBalanced: "class_balanced", ClassInterleaved: "class_interleaved", ClassSorted: "class_sorted"}[
        sampler
    ]
    with pytest.raises(UserError, match=f"sampler={name}: the targets are numbers, not classes"):
        sampler(targets=torch.rand(5), seed=0)


@pytest.mark.parametrize("labels", [[0] * 7 + [1] * 7, [0] * 9 + [1] * 5 + [2] * 4, [0, 1, 2] * 6])
def test_samples_are_inserted_class_by_class_where_random_gaps_do_not_suffice(
    labels: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classes, "_ROUNDS", 0)
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        order = torch.tensor(labels)[classes._interleave(torch.tensor(labels), rng)]
        assert order.sort().values.tolist() == sorted(labels)
        assert not (order[1:] == order[:-1]).any()
    row = classes._insert_all(torch.tensor([0, 1, 0, 1, 2]), torch.tensor([0, 1]), torch.tensor([2, 3, 4]), rng)
    assert sorted(row.tolist()) == [0, 1, 2, 3, 4]
