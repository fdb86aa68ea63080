from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlopt.basics.errors import UserError
from dlopt.data import splits
from dlopt.data.division import stratified
from dlopt.data.identity import identify
from dlopt.data.images.files import Files, ImageList
from dlopt.data.samples import Dataset, InMemory, Samples
from dlopt.data.splits import DataSettings, evaluation_subset, prepare
from dlopt.data.texts.windows import Windows
from tests.support.data import data_settings

Make = Callable[..., DataSettings]


def hashes(samples: Samples) -> set[bytes]:
    return {row.numpy().tobytes() for row in samples.fetch(torch.arange(len(samples)))}


def random_dataset(counts: list[int], test: int = 0) -> Dataset:
    """Returns distinct random images, which can be identified by their hashes."""
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (len(targets) + test, 1, 8, 8), dtype=torch.uint8, generator=draw)
    train = InMemory(inputs[: len(targets)], targets)
    tested = InMemory(inputs[len(targets) :], torch.zeros(test, dtype=torch.int64)) if test else None
    return Dataset(train, None, tested, tuple(map(str, range(len(counts)))))


class_counts = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@given(counts=class_counts, share=st.floats(0, 1), seed=st.integers(0, 2**62))
def test_stratified_partitions_in_proportion(counts: list[int], share: float, seed: int) -> None:
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    targets = targets[torch.randperm(len(targets))]
    count = max(len(counts), round(share * len(targets)))
    chosen, rest = stratified(targets, count, seed)
    assert torch.cat([chosen, rest]).sort().values.tolist() == list(range(len(targets)))
    assert len(chosen) == min(count, len(targets))
    got = Counter(targets[chosen].tolist())
    for label, total in enumerate(counts):
        assert got[label] >= 1
        # one to make up for classes that got their only sample although their share was smaller, per such class
        assert abs(got[label] - count * total / len(targets)) < 1 + len(counts)


@pytest.mark.parametrize(
    "counts, count, expected",
    [([50, 30, 20], 10, [5, 3, 2]), ([5, 3, 2], 5, [3, 1, 1]), ([97, 2, 1], 10, [8, 1, 1]), ([3, 3], 0, [0, 0])],
)
def test_stratified_counts(counts: list[int], count: int, expected: list[int]) -> None:
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    chosen, _ = stratified(targets, count, 0)
    assert torch.bincount(targets[chosen], minlength=len(counts)).tolist() == expected


@given(counts=class_counts, share=st.floats(0.01, 0.99))
def test_every_class_with_two_samples_is_in_both_splits(counts: list[int], share: float) -> None:
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    held_out, kept = stratified(targets, max(1, round(share * len(targets))), 0, keep_one=True)
    for label, total in enumerate(counts):
        assert label in targets[kept]
        assert (label in targets[held_out]) == (total >= 2)


def test_seed_determines_the_selection() -> None:
    targets = torch.arange(200) % 4
    a, b, c = (stratified(targets, 40, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@given(
    val_split=st.floats(0, 0.9), subset=st.none() | st.integers(4, 100) | st.floats(0.1, 1.0), seed=st.integers(0, 99)
)
def test_splits_are_disjoint(val_split: float, subset: int | float | None, seed: int) -> None:
    dataset = random_dataset([40, 30, 20, 10], test=20)
    settings = data_settings(val_split=val_split, subset=subset, split_seed=seed)
    parts = prepare(dataset, settings)
    assert parts.test is not None
    train, test = hashes(parts.train), hashes(parts.test)
    val = hashes(parts.val) if parts.val is not None else set()
    assert not train & val and not train & test and not val & test
    assert len(test) == 20 and train | val <= hashes(dataset.train)
    expected_count = 100 if subset is None else subset if isinstance(subset, int) else max(1, round(subset * 100))
    assert len(train) + len(val) == len(parts.train) + (len(parts.val) if parts.val else 0) == expected_count


def test_label_noise_changes_a_fraction_of_the_training_labels_only(settings: Make) -> None:
    dataset = random_dataset([400, 300, 200, 100])
    clean, noisy = (prepare(dataset, settings(val_split=0.1, label_noise=noise)) for noise in (0.0, 0.3))
    changed = noisy.train.targets != clean.train.targets
    assert changed.sum() == 270 and noisy.train.targets.unique().tolist() == [0, 1, 2, 3]
    wrong = noisy.train.targets[changed & (clean.train.targets == 0)].bincount(minlength=4)
    assert wrong[0] == 0 and wrong[1:].min() > 20  # the other classes, with equal probability
    assert noisy.val is not None and clean.val is not None and torch.equal(noisy.val.targets, clean.val.targets)
    again = prepare(dataset, settings(val_split=0.1, label_noise=0.3))
    assert torch.equal(again.train.targets, noisy.train.targets)


class Theirs(Samples):
    """Samples of a kind that a package adds."""

    def __init__(self, inputs: torch.Tensor) -> None:
        super().__init__(torch.arange(len(inputs)) % 2, tuple(inputs.shape[1:]), {"age": torch.arange(len(inputs))})
        self.inputs = inputs

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        return self.inputs[rows]


@pytest.mark.parametrize("memory", [True, False])
def test_another_kind_of_samples_has_what_those_in_memory_have(settings: Make, memory: bool) -> None:
    inputs = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8)
    inputs[7] = inputs[2]
    found = []
    for samples in (Theirs(inputs), InMemory(inputs, torch.arange(20) % 2, None, {"age": torch.arange(20)})):
        dataset = Dataset(samples, None, None, ("a", "b"))
        dataset.identity = identify(dataset)
        found.append(prepare(dataset, settings(memory=memory, val_split=0.2, image_size=8, label_noise=0.5)))
    for one, other in zip(*([each.train, each.val] for each in found), strict=True):
        assert one is not None and other is not None and one.shape == (1, 8, 8) and len(one) == len(other) > 0
        assert torch.equal(one.targets, other.targets) and torch.equal(one.further["age"], other.further["age"])
        everything = [each.fetch_range(0, len(each)) for each in (one, other)]
        assert torch.equal(*everything)
    assert found[0].identity == found[1].identity and found[0].notes == found[1].notes
    assert any("equal to" in note for note in found[0].notes)


def test_what_another_kind_returns_may_be_an_array_of_numpy() -> None:
    """Also a mirrored one, which torch does not take, with values that are no numbers, and labels of other types."""
    inputs = np.random.default_rng(0).normal(size=(20, 1, 5, 4))
    inputs[3, 0, 0, 0] = np.nan

    class Mirrored(Samples):
        def read(self, rows: torch.Tensor) -> np.ndarray:
            return inputs[rows.numpy()][..., ::-1]

    samples = Mirrored(np.arange(20, dtype=np.int32) % 2, list(inputs.shape[1:]))  # type: ignore[arg-type]
    expected = torch.from_numpy(inputs).flip(-1)
    assert samples.targets.dtype == torch.int64 and samples.shape == (1, 5, 4)
    torch.testing.assert_close(samples.fetch(torch.arange(20)), expected, rtol=0, atol=0, equal_nan=True)
    whole = samples.resized((2, 2)).fetch_boxes(torch.tensor([7]), lambda h, w: torch.tensor([[0.0, 0, 4, 5]]), (5, 4))
    torch.testing.assert_close(whole, expected[[7]])
    content, in_memory = samples.content(), InMemory(expected.contiguous(), samples.targets).content()
    assert content is not None and content.size == inputs.nbytes and content.digest() == in_memory.digest()


def test_vectors_of_another_kind_are_not_resized(settings: Make) -> None:
    dataset = Dataset(Theirs(torch.rand(20, 3)), None, None, ("a", "b"))
    with pytest.raises(UserError, match=r"data\.image_size=\[8, 8\]: the samples are vectors, not images"):
        prepare(dataset, settings(memory=False, image_size=8))


def test_label_noise_needs_classes(settings: Make) -> None:
    dataset = random_dataset([10, 10])
    dataset.classes, dataset.train.targets = None, torch.rand(20)
    with pytest.raises(UserError, match=r"data\.label_noise=0\.3: the targets are not classes"):
        prepare(dataset, settings(label_noise=0.3))


def test_existing_validation_set_is_kept(settings: Make) -> None:
    dataset = random_dataset([10, 10])
    dataset.val = random_dataset([3, 2], test=0).train
    parts = prepare(dataset, settings(val_split=0.5))
    assert parts.val is not None and len(parts.val) == 5 and len(parts.train) == 20


def test_no_validation_set_with_one_sample_per_class(settings: Make) -> None:
    parts = prepare(random_dataset([1, 1, 1]), settings(val_split=0.5))
    assert len(parts.train) == 3 and parts.val is None


def test_smallest_val_split_has_at_least_one_sample(settings: Make) -> None:
    parts = prepare(random_dataset([2, 2]), settings(val_split=0.01))
    assert parts.val is not None and torch.bincount(parts.val.targets).tolist() == [1, 1]


def test_subset_and_validation_split_are_drawn_independently(settings: Make) -> None:
    dataset = random_dataset([400])
    half = hashes(prepare(dataset, settings(subset=0.5)).train)
    held_out = prepare(dataset, settings(val_split=0.5)).val
    assert held_out is not None and 60 < len(half & hashes(held_out)) < 140


@pytest.mark.parametrize(
    "subset, message",
    [(2, "one of each of the 3 classes; use at least 3"), (0.001, "at least 3"), (100, "only 9 samples")],
)
def test_rejects_impossible_subsets(settings: Make, subset: int | float, message: str) -> None:
    with pytest.raises(UserError, match=f"data.subset={subset}: .*{message}"):
        prepare(random_dataset([3, 3, 3]), settings(subset=subset))


def test_regression_split_ignores_values(settings: Make) -> None:
    samples = InMemory(torch.rand(50, 4), torch.rand(50, 2))
    parts = prepare(Dataset(samples, None, None, None), settings(val_split=0.2, subset=0.5))
    assert parts.val is not None and (len(parts.train), len(parts.val)) == (20, 5)


@pytest.mark.parametrize("size, expected", [(4, (4, 4)), ((6, 5), (6, 5)), (8, (8, 8))])
def test_samples_in_memory_are_resized(settings: Make, size: int | tuple[int, int], expected: tuple[int, int]) -> None:
    parts = prepare(random_dataset([5], test=3), settings(image_size=size, val_split=0.2))
    assert parts.val is not None and parts.test is not None
    for part in (parts.train, parts.val, parts.test):
        assert part.shape == (1, *expected) and part.fetch(torch.tensor([0])).dtype == torch.uint8


def test_vectors_have_no_image_size(settings: Make) -> None:
    dataset = Dataset(InMemory(torch.rand(4, 3), torch.zeros(4, dtype=torch.int64)), None, None, ("a",))
    with pytest.raises(UserError, match=r"data.image_size.*vectors"):
        prepare(dataset, settings(image_size=8))


def test_rejects_splits_of_different_shapes(settings: Make) -> None:
    dataset = random_dataset([4])
    dataset.test = InMemory(torch.zeros(2, 1, 9, 9, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UserError, match=r"test samples have the shape \[1, 9, 9\].*image_size"):
        prepare(dataset, settings())


@pytest.fixture
def files(tmp_path: Path, write_images: Callable[..., list[Path]]) -> Dataset:
    paths = [str(path) for path in write_images(tmp_path, 12)]
    train, test = (Files(ImageList.of(part, torch.arange(len(part)) % 2), None, 3) for part in (paths[:8], paths[8:]))
    return Dataset(train, None, test, ("a", "b"))


def test_files_that_fit_are_decoded_except_the_test_set(settings: Make, files: Dataset) -> None:
    parts = prepare(files, settings(val_split=0.25))
    assert parts.in_memory and isinstance(parts.train, InMemory) and isinstance(parts.val, InMemory)
    assert isinstance(parts.test, Files)
    assert hashes(parts.train) | hashes(parts.val) == hashes(files.train)


def test_files_are_streamed_if_requested_or_too_large(
    settings: Make, files: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 12 * 3 * 6 * 5
    assert not prepare(files, settings(memory=False)).in_memory
    monkeypatch.setattr("dlopt.data.splits.available_memory", lambda: 4 * needed - 4)
    parts = prepare(files, settings())
    assert not parts.in_memory and isinstance(parts.train, Files)
    monkeypatch.setattr("dlopt.data.splits.available_memory", lambda: 4 * needed)
    assert prepare(files, settings()).in_memory
    assert not prepare(files, settings(), processes=2).in_memory
    monkeypatch.setattr("dlopt.data.splits.available_memory", lambda: needed - 1)
    with pytest.raises(UserError, match=r"data.memory=true: the samples need"):
        prepare(files, settings(memory=True))


@pytest.mark.parametrize(("count", "split", "expected"), [(10, 0.17, 2), (10, 0.14, 1), (9, 0.4, 4), (3, 0.01, 1)])
def test_size_of_the_validation_set_is_rounded(count: int, split: float, expected: int, settings: Make) -> None:
    dataset = prepare(random_dataset([count]), settings(val_split=split))
    assert dataset.val is not None and (len(dataset.val), len(dataset.train)) == (expected, count - expected)


def test_images_that_are_cropped_at_random_are_not_kept_as_their_centres(
    settings: Make, tmp_path: Path, write_images: Callable[..., list[Path]]
) -> None:
    paths = [str(path) for path in write_images(tmp_path, 4)]
    cut, whole = (
        Dataset(Files(ImageList.of(paths, torch.arange(4)), size, 3), None, None, None) for size in ((4, 4), None)
    )
    parts = prepare(cut, settings(), random_crops=True)
    assert not parts.in_memory and isinstance(parts.train, Files)
    with pytest.raises(UserError, match=r"data\.memory=true: keeps the centre of each image only"):
        prepare(cut, settings(memory=True), random_crops=True)
    for dataset, random_crops in ((whole, True), (cut, False)):
        parts = prepare(dataset, settings(memory=True), random_crops=random_crops)
        assert parts.in_memory and isinstance(parts.train, InMemory)


def test_a_subset_of_the_validation_set() -> None:
    val = random_dataset([6, 3, 1]).train
    assert evaluation_subset(val, None, 0) is val and len(evaluation_subset(val, 10, 0)) == 10
    assert torch.bincount(evaluation_subset(val, 3, 0).targets).tolist() == [1, 1, 1]
    for count, message in ((11, "has only 10 samples"), (2, "of each of the 3 classes; use at least 3")):
        with pytest.raises(UserError, match=rf"evaluate\.samples={count}: .*{message}"):
            evaluation_subset(val, count, 0)
    assert len(evaluation_subset(InMemory(val.inputs, torch.rand(10)), 1, 0)) == 1


def test_resized_images_must_fit_into_memory(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 5 * 9 * 7
    for free in (needed, needed - 1):
        monkeypatch.setattr("dlopt.data.samples.available_memory", lambda free=free: free)
        if free == needed:
            assert prepare(random_dataset([5]), settings(image_size=(9, 7), memory=False)).train.shape == (1, 9, 7)
        else:
            with pytest.raises(UserError, match=r"image_size=\[9, 7\]: 5 images of this size need"):
                prepare(random_dataset([5]), settings(image_size=(9, 7)))
    assert prepare(random_dataset([5]), settings(image_size=8)).train.shape == (1, 8, 8), "they have this size"


def test_bytes_of_samples() -> None:
    labels = torch.zeros(6)
    for samples, expected in (
        (InMemory(torch.zeros(6, 2, 3, 4, dtype=torch.uint8), labels), 6 * 24),
        (InMemory(torch.zeros(6, 5), labels), 6 * 5 * 4),
        (Windows(np.zeros(100, dtype=np.uint16), 7), 200),
    ):
        assert samples.nbytes == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_bytes_of_images_of_another_kind(settings: Make, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    samples = Theirs(torch.zeros(20, 3, 4, 4, dtype=dtype))
    needed = 20 * 48 * dtype.itemsize
    state = torch.get_rng_state()
    assert samples.nbytes == needed and samples.resized((2, 2)).nbytes == needed / 4
    assert torch.equal(state, torch.get_rng_state())
    for free in (4 * needed, 4 * needed - 1):
        monkeypatch.setattr(splits, "available_memory", lambda free=free: free)
        assert prepare(Dataset(samples, None, None, ("a", "b")), settings()).in_memory == (free == 4 * needed)
    samples.dtype, samples.inputs = dtype, torch.empty(0)
    assert samples.nbytes == needed, "no image is read if the type is known"


def test_samples_of_a_run_share_the_memory_of_a_gpu(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "available_memory", lambda: 100)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 1000))
    images = [InMemory(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.zeros(n)) for n in (15, 16, 26)]
    found = {
        (device, len(each)): splits._load_into_memory([each], settings(), torch.device(device), 1)
        for each in images
        for device in ("cpu", "cuda")
    }
    assert found == {
        ("cpu", 15): True, ("cuda", 15): True, ("cpu", 16): True, ("cuda", 16): False, ("cpu", 26): False,
        ("cuda", 26): False,
    }  # fmt: skip
    assert splits._load_into_memory(images, settings(memory=True), torch.device("cuda"), 9)
    assert not splits._load_into_memory(images, settings(memory=False), torch.device("cpu"), 1)
