from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from dlopt.basics.errors import UserError
from dlopt.data.rows.custom import custom
from dlopt.tasks.labels import MultiLabel


class Points(Dataset[tuple[torch.Tensor, Any]]):
    """Vectors with the given labels."""

    def __init__(self, labels: list[Any]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        return torch.full((3,), float(index)), self.labels[index]


def load(**changed: Any) -> Any:
    return custom(
        **{"train": Points([0, 1, 2, 1]), "val": None, "test": None, "classes": None, "image_size": None} | changed
    )


def test_custom_datasets() -> None:
    data = load(val=Points([2, 0]), test=TensorDataset(torch.rand(5, 3), torch.arange(5) % 3))
    assert data.classes == ("0", "1", "2") and data.train.shape == (3,)
    assert data.train.targets.tolist() == [0, 1, 2, 1] and data.test.targets.tolist() == [0, 1, 2, 0, 1]
    assert data.train.fetch(torch.tensor([2])).tolist() == [[2.0] * 3]


def test_classes_may_be_named_or_counted() -> None:
    assert load(classes=["a", "b", "c"]).classes == ("a", "b", "c")
    assert len(load(classes=5).classes) == 5


def test_zeros_and_ones_with_classes_are_several_labels_per_sample() -> None:
    flags = [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    data = load(train=Points(list(map(torch.tensor, flags))), classes=["red", "round"])
    assert data.classes == ("red", "round") and data.has_several_labels
    assert data.train.targets.tolist() == flags and data.task == MultiLabel(2)


def test_floating_point_labels_mean_regression() -> None:
    data = load(train=Points([0.5, 1.5]))
    assert data.classes is None and data.train.targets.tolist() == [0.5, 1.5]


def test_a_loader_or_a_pair_of_them_gives_its_dataset() -> None:
    train, val = Points([0, 1, 1]), Points([1, 0])
    loaders = DataLoader(train, 2, shuffle=True, num_workers=1), DataLoader(val, collate_fn=list)
    for given in ({"train": loaders}, {"train": loaders[0], "val": loaders[1]}):
        data = load(**given)
        assert data.train.targets.tolist() == [0, 1, 1]
        assert data.val is not None and data.val.targets.tolist() == [1, 0]
        lines = [line for line in data.notes if "DataLoader" in line]
        assert [line.partition(" replace its ")[2] for line in lines] == [
            "batch_size=2, RandomSampler, num_workers=1",
            "batch_size=1, SequentialSampler, num_workers=0, collate_fn list, which is not called",
        ]


class Waves(Points):
    """Sequences with two channels."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        wave = torch.linspace(0, index + 1, 5, dtype=torch.float64)
        return torch.stack([wave, -wave]), index


def test_items_are_sequences_or_grey_images() -> None:
    sequences, images = (load(train=Waves([0, 1, 2]), sequences=each).train for each in (True, False))
    assert sequences.shape == (2, 5) and images.shape == (1, 2, 5)
    inputs = sequences.fetch(torch.arange(3))
    assert inputs.dtype == torch.float32 and torch.equal(inputs, images.fetch(torch.arange(3))[:, 0])


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"train": None}, "data.train=null: a dataset is required"),
        (
            {"train": (DataLoader(Points([0, 1])),) * 3},
            r"data\.train: is 3 DataLoaders; must be one, or .* train and val",
        ),
        ({"sequences": True}, r"data\.sequences=true: data\.train .*\[0\] has the shape .*, not \[C, L\]"),
        ({"sequences": True, "train": [{"a": 1.0}]}, "data\\.sequences=true: the items are no pairs"),
        ({"sequences": True, "image_size": 8}, r"data\.image_size=\[8, 8\]: data\.sequences=true has no images"),
        ({"train": 3}, r"data.train \(builtins.int\): has no __getitem__"),
        ({"classes": 2}, "data.train: has labels from 0 to 2; with 2 classes 0 to 1 are allowed"),
        ({"classes": ["a"]}, "with 1 classes"),
        ({"test": Points([0, 3])}, "data.test: has labels from 0 to 3; with 3 classes"),
        ({"val": Points([0, -1])}, "data.val: has labels from -1"),
        ({"train": Points([1, 2, 3])}, "labels must be 0 to 3 without a gap, lacks 0"),
        ({"train": Points([0, 2])}, "labels must be 0 to 2 without a gap, lacks 1"),
        ({"train": Points([0, -1])}, "without a gap, has -1"),
        ({"val": Points([0.5])}, "data.val: labels must have the same type"),
        ({"train": Points([0.5, float("nan")])}, "labels that are not finite"),
        ({"train": Points([0.5]), "classes": 2}, "data.classes=2: the labels are floating-point"),
        ({"train": Points([torch.tensor([0.0, 0.5])]), "classes": 2}, "but not 2 zeros and ones per sample"),
        ({"train": Points([torch.tensor([0, 1])]), "classes": 2}, "several labels per sample must be float zeros and"),
        (
            {"train": Points([torch.ones(2)]), "test": Points([torch.ones(3)]), "classes": 2},
            "data.test: labels must be 2 zeros and ones per sample",
        ),
    ],
)
def test_rejects_invalid_settings(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(**changed)


class Rows(Dataset[tuple[Any, Any]]):
    """Items (input, label) of two sequences."""

    def __init__(self, inputs: Any, labels: Any) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.inputs[index], self.labels[index]


def test_what_looks_wrong() -> None:
    time = 1.7e9 + np.arange(200.0)
    vectors = np.stack([time, np.arange(200) % 7], 1)
    dataset = load(train=Rows(vectors, [i % 3 for i in range(199)] + [3]), test=Rows(vectors[:3], [0, 1, 2]))
    assert dataset.source == "203 items"
    assert [note[:53] for note in dataset.notes] == [
        "warning: feature 1 counts the rows; leave it out if i",
        "warning: float32 rounds feature 1 by up to 64, its va",
        "warning: the label has 1 class with one sample: 3",
    ]
    assert load(train=Rows(vectors[:, 1:], [i % 30 for i in range(200)])).notes == ()
    [target] = load(train=Rows(vectors[:, 1:], time)).notes
    assert target.startswith("warning: float32 rounds the label by up to 64, ")


@pytest.mark.parametrize("mode", ["F", "I"])
def test_images_without_a_white_are_refused(mode: str) -> None:
    images = [Image.fromarray(np.full((4, 4), 1, np.float32 if mode == "F" else np.int32))]
    with pytest.raises(
        UserError, match=r"^data\.train \(.*Rows\)\[0\]: .* pixels from 1 to 1; convert them to 8 or 16"
    ):
        load(train=Rows(images, [0]))


class Named(Points):
    """Items that name their classes, as those of torchvision do."""

    def __init__(self, words: list[str], classes: list[str]) -> None:
        self.class_to_idx = {name: number for number, name in enumerate(classes)}
        self.words = words
        super().__init__([self.class_to_idx[word] for word in words])


def test_classes_have_the_numbers_of_the_training_set() -> None:
    """A test folder without a class numbers all later classes differently."""
    train, words = Named(["ant", "bee", "cat", "dog"], ["ant", "bee", "cat", "dog"]), ["dog", "ant", "cat"]
    test = Named(words, ["ant", "cat", "dog"])
    for split in (test, Subset(test, [0, 1, 2]), ConcatDataset([test])):
        data = load(train=train, val=split, test=split)
        expected = [train.class_to_idx[word] for word in words]
        assert data.test.targets.tolist() == data.val.targets.tolist() == expected
    with pytest.raises(UserError, match=r"^data\.test: has classes that data\.train lacks: eel, fox$"):
        load(train=train, test=Named(["ant", "eel", "fox"], ["ant", "eel", "fox", "gnu"]))
    with pytest.raises(
        UserError, match=r"^data\.train: its parts number the classes differently: ant=0, .*, and ant=0"
    ):
        load(train=ConcatDataset([train, test]))
    with pytest.raises(UserError, match=r"^data\.classes=.*: data\.train has the classes in another order"):
        load(train=train, classes=["bee", "ant", "cat", "dog"])
