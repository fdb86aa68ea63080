"""The class that a prediction names."""

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from dlopt.data.images.decoding import Stored
from dlopt.losses import MSE
from dlopt.metrics.declaration import predicted_classes
from dlopt.tasks.classification import Classification
from dlopt.trained.classify import _classify, changes
from dlopt.trained.restore import Trained


def trained(outputs: torch.Tensor, loss: nn.Module) -> Trained:
    names = [str(number) for number in range(outputs.shape[1])]
    fields: dict[str, Any] = {"outputs": lambda _: outputs, "loss": loss, "classes": names, "columns": None}
    found = SimpleNamespace(task=Classification(len(names)), decision=None, **fields)
    found.values = lambda outputs: Trained.values(cast(Trained, found), outputs)
    found.predicted = lambda outputs: Trained.predicted(cast(Trained, found), outputs)
    return cast(Trained, found)


def test_classes_are_those_that_eval_counts() -> None:
    """After training with MSE also where the clamped outputs are equal; NaN names no class."""
    outputs = torch.tensor([[1.2, 1.5, 0.1], [-0.5, -0.4, -0.1], [0.1, math.nan, 0.3], [0.2, 0.7, 0.1]])
    images: list[Any] = [(torch.zeros(1, 2, 2), Stored(2, 2, True, False, False))] * 4
    for loss in (MSE(classes=3), nn.CrossEntropyLoss()):
        results = _classify(["a", "b", "c", "d"], images, trained(outputs, loss))
        classes = [result.best for _, result in results if not isinstance(result, str)]
        assert classes == [1, 2, -1, 1] == predicted_classes(outputs).tolist()


def test_what_was_done_to_images_is_one_line() -> None:
    digit, photo = Stored(8, 8, True, False, False), Stored(480, 640, False, True, False)
    assert changes(Counter({digit: 9}), (1, 8, 8)) is None
    assert changes(Counter({photo: 2, Stored(16, 16, False, False, True): 1, digit: 3}), (1, 8, 8)) == (
        "of 6 images: 3 resized and cropped to the centre, from 16x16 .. 480x640 to 8x8 (height x width); "
        "3 from colour to grey; 2 transparent, laid on white; 1 from 16 to 8 bits"
    )
    assert changes(Counter({Stored(4, 4, True, False, False): 1}), (3, 8, 8)) == (
        "of 1 image: 1 resized, from 4x4 to 8x8 (height x width); 1 from grey to colour"
    )
