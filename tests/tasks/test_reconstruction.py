"""Targets that are the samples themselves."""

import pytest
import torch

from dlopt.basics.errors import UserError
from dlopt.data.batches import Batches, Delivery
from dlopt.data.samples import Dataset, InMemory
from dlopt.losses import MSE, PixelCrossEntropy
from dlopt.tasks.kinds import chosen
from dlopt.tasks.reconstruction import Reconstruction
from dlopt.tasks.text import NextToken
from tests.support.tasks import CLASSIFICATION


def test_targets_of_a_reconstruction_are_augmented_but_not_normalized() -> None:
    images = torch.randint(256, (5, 1, 2, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def invert(inputs: torch.Tensor, labels: torch.Tensor, **_: object) -> tuple[torch.Tensor, torch.Tensor]:
        return 255 - inputs, labels

    delivery = Delivery(torch.device("cpu"), True, 0, Reconstruction(6), normalize=torch.nn.Flatten(0))
    loop = Batches(InMemory(images, torch.arange(5)), delivery, batch_size=5, augment=invert)
    ((inputs, targets),) = loop.epoch(0)
    assert inputs.shape == (30,)  # normalized
    torch.testing.assert_close(targets, (255 - images).flatten(1) / 255)


@pytest.mark.parametrize(("low", "high", "white"), [(0.0, 1.0, 1.0), (-2.0, 2.0, 1.0), (0.0, 200.0, 255.0)])
def test_floating_point_images_keep_their_unit_in_a_reconstruction(low: float, high: float, white: float) -> None:
    images = torch.linspace(low, high, 12).view(2, 1, 2, 3)
    task = Dataset(InMemory(images, torch.zeros(2)), None, None, None, unlabelled=Reconstruction(6)).task
    assert task.white == white
    torch.testing.assert_close(task.split(images, torch.zeros(2))[1], images.flatten(1) / white)


class Copies:
    reconstructs = True


def test_a_model_that_reconstructs_sets_the_task() -> None:
    images = CLASSIFICATION.of_fields({"outputs": 10, "white": 1.0})
    assert chosen(images, (3, 4, 5), (MSE, "loss=mse"), (Copies, "model=copies")) == Reconstruction(60, 1.0)
    assert chosen(images, (3, 4, 5), (MSE, "loss=mse"), (torch.nn.Linear, "model=linear")) is images
    with pytest.raises(UserError, match=r"^model=copies: reconstructs images, but the samples are vectors$"):
        chosen(images, (60,), (Copies, "model=copies"))
    with pytest.raises(UserError, match=r"^model=copies: reconstructs images, but the samples are a text$"):
        chosen(NextToken(256, predictions=8), (9,), (Copies, "model=copies"))


def test_outputs_are_logits_after_training_with_cross_entropy() -> None:
    outputs = torch.tensor([[-2.0, 0.0, 3.0]])
    assert Reconstruction(3).values(outputs, MSE(classes=None)) is outputs
    torch.testing.assert_close(Reconstruction(3).values(outputs, PixelCrossEntropy(classes=None)), outputs.sigmoid())


def test_pictures_are_no_predictions_to_be_listed() -> None:
    with pytest.raises(UserError, match=r"^checkpoint=runs/a: its model reconstructs .*`dlopt eval checkpoint=runs/a`"):
        Reconstruction(3).check_predicts("checkpoint", "runs/a")
    CLASSIFICATION.check_predicts("checkpoint", "runs/a")
