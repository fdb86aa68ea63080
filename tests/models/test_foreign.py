"""What to try with weights that fit by name, but not the model, its inputs or its classes."""

from typing import Any

import pytest
from torch import nn

from dlopt.models.foreign import advice
from dlopt.models.resnet import CifarResNet
from tests.support.norm import NORM

KEYS: dict[str, Any] = {"input_shape": (3, 8, 8), "classes": 10, "depth": 8, "width": 4, "dropout": 0.0, **NORM}


@pytest.mark.parametrize(("padding", "other"), [("end", "both"), ("both", "end")])
def test_a_net_at_chance_names_the_other_padding_of_its_shortcuts(padding: Any, other: str) -> None:
    """akamaster's ResNet-20 has an accuracy of 81 % on CIFAR-10 saved as JPEG, and of 13.6 % with the other padding."""
    model = CifarResNet(**KEYS, residual=True, shortcut_padding=padding)
    [line] = advice(model, 0.136, 10)
    assert "near chance (10 %)" in line and f"try model.shortcut_padding={other}, normalize=fixed with" in line
    assert advice(model, 0.81, 10) == []


@pytest.mark.parametrize(
    ("accuracy", "classes", "is_given"),
    [(0.5, 2, True), (0.54, 2, True), (0.56, 2, False), (0.05, 1000, True), (0.2, 1000, False), (1.0, 1, False)],
)
def test_chance_depends_on_the_number_of_classes(accuracy: float, classes: int, is_given: bool) -> None:
    lines = advice(nn.Linear(2, classes), accuracy, classes)
    assert len(lines) == is_given
    assert not any("shortcut" in line for line in lines)


def test_plain_networks_have_no_shortcuts() -> None:
    [line] = advice(CifarResNet(**KEYS, residual=False, shortcut_padding="end"), 0.1, 10)
    assert "shortcut" not in line and "try normalize=fixed" in line
