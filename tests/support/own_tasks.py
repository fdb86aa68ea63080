"""Tasks of a user's package, right and wrong ones."""

from typing import ClassVar

import torch
from torch.nn import functional as F

from dlopt.extend import UserTask


class Noisy(UserTask):
    """A regression of the label on the image and noise; its parts and values are known functions of the draws."""

    values: ClassVar = {"spread": "min", "accuracy": "max"}

    def __init__(self, *, noise: float = 0.5) -> None:
        self.noise = noise

    def model_arguments(self, shape, classes):
        return {"input_shape": shape, "classes": 1}

    def loss(self, model, batch, draws):
        images, labels = batch
        noisy = images + self.noise * draws.normal(*images.shape[1:])
        kept = draws.uniform(1) < 0.9
        found = (model(noisy) - 0.1 * labels.to(images).unsqueeze(1)) * kept
        shift = draws.integers(3, 1).to(images)
        return {"fit": found.square().mean(), "shift": (0.1 * model(images) * shift).square().mean()}

    def evaluate(self, model, batches, draws, split):
        outputs = torch.cat([model(images) for images, _ in batches])
        return {"spread": outputs.std(), "accuracy": float(len(draws) == len(outputs))}


class Direction(Noisy):
    """Depends on the directions of image and output: their norms are divided by."""

    def loss(self, model, batch, draws):
        images, labels = batch
        units = images / images.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        outputs = model(units)
        return (outputs / outputs.norm(dim=1, keepdim=True) - labels.to(outputs).unsqueeze(1)).square().mean()


class Coupled(Noisy):
    couples_batch = True


class Raises(Noisy):
    def loss(self, model, batch, draws):
        raise KeyError("missing")


class Vector(Noisy):
    def loss(self, model, batch, draws):
        return model(batch[0]).square()


class Detached(Noisy):
    def loss(self, model, batch, draws):
        return model(batch[0]).square().mean().detach()


class Integer(Noisy):
    def loss(self, model, batch, draws):
        return {"fit": batch[1].sum()}


class Infinite(Noisy):
    def loss(self, model, batch, draws):
        return model(batch[0]).square().mean() / 0


class ChangesParts(Noisy):
    calls = 0

    def loss(self, model, batch, draws):
        self.calls += 1
        return {f"part{self.calls // 2}": model(batch[0]).square().mean()}


class NamesLoss(Noisy):
    def loss(self, model, batch, draws):
        return {"loss": model(batch[0]).square().mean(), "other": model(batch[0]).mean()}


class ValueLoss(Noisy):
    values: ClassVar = {"loss": "min"}


class ReturnsText(Noisy):
    def evaluate(self, model, batches, draws, split):
        return {"spread": "wide", "accuracy": 1}


class ForgetsValue(Noisy):
    def evaluate(self, model, batches, draws, split):
        return {"spread": 1.0}


class WrongDirection(Noisy):
    values: ClassVar = {"accuracy": "min"}


class NoLoss(UserTask):
    pass


class Views(Noisy):
    views = 2

    def loss(self, model, batch, draws):
        first, second = batch[0].unbind(1)
        return {"fit": (model(first) - 1).square().mean(), "difference": (first - second).square().mean()}

    def evaluate(self, model, batches, draws, split):
        views = torch.cat([views for views, _ in batches])
        return {"spread": F.mse_loss(views[:, 0], views[:, 1]), "accuracy": 1}


class Items(torch.utils.data.Dataset):
    """Records of four types; large integers, which fp32 would round."""

    def __init__(self, *, size: int = 70, keys: str = "dict") -> None:
        draw = torch.Generator().manual_seed(size)
        self.points = torch.randn(size, 3, generator=draw, dtype=torch.float64)
        self.keys = keys

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index):
        if self.keys == "numbers":
            return index
        if self.keys == "raises":
            raise KeyError("lost")
        point = self.points[index]
        record = {"point": point, "sum": point.sum().item(), "code": 2**40 + index % 2, "is_odd": bool(index % 2)}
        if self.keys == "ragged" and index == 5:
            return record | {"point": point[:2]}
        if self.keys == "texts":
            return record | {"name": "five"}
        return tuple(record.values()) if self.keys == "tuple" else record


class Records(UserTask):
    """Two losses of the records of `Items`."""

    values: ClassVar = {"odd_fraction": "min"}

    def model_arguments(self, shape, classes):
        (shape, *_) = shape.values() if isinstance(shape, dict) else shape
        return {"input_shape": shape, "classes": 2}

    def loss(self, model, batch, draws):
        points, sums, codes, is_odd = batch.values() if isinstance(batch, dict) else batch
        assert torch.equal(codes - 2**40, is_odd.long())
        outputs = model(points)
        return {"sum": F.mse_loss(outputs[:, 0], sums), "odd": F.cross_entropy(outputs, codes - 2**40)}

    def evaluate(self, model, batches, draws, split):
        flags = torch.cat([([*batch.values()] if isinstance(batch, dict) else batch)[3] for batch in batches])
        return {"odd_fraction": flags.double().mean()}
