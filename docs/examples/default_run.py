"""`dlopt train` without arguments as a plain PyTorch script: its losses are equal, bit for bit.

    python docs/examples/default_run.py

From dlopt it imports only what a script would take from a library: the data set, the model and the random streams. The
comments name the keys and choices of conf/ that the lines implement.
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dlopt.basics.random import generator, stream  # seeds and generators that depend on a seed and on counters only
from dlopt.data.division import stratified
from dlopt.data.images.digits import digits
from dlopt.models.resnet import CifarResNet

EPOCHS = 20  # epochs
BATCH_SIZE = 64  # data.batch_size
SEED = 0  # seed
WEIGHTS, ORDER = 11, 13  # streams of random numbers: initial weights, order of the samples
VALIDATION = 2  # stream of the validation split

Split = tuple[Tensor, Tensor]  # images [N, 1, 8, 8], uint8; labels [N], int64


def load() -> tuple[Split, Split, Split]:
    """Returns the training, the validation and the test set."""
    dataset = digits()  # data=digits: 1,438 images, and a test set that is the same for every seed
    # data.val_split=0.1, with the class proportions of all images.
    count = round(0.1 * len(dataset.train))
    held_out, kept = stratified(dataset.train.targets, count, SEED, VALIDATION, keep_one=True)
    train, val = dataset.train.select(kept), dataset.train.select(held_out)
    return (train.inputs, train.targets), (val.inputs, val.targets), (dataset.test.inputs, dataset.test.targets)


def standardization(images: Tensor) -> tuple[Tensor, Tensor]:
    """normalize=standardize: returns the factor and the shift that give the images mean 0 and standard deviation 1."""
    values = images.double()
    mean, deviation = values.mean(), values.std(correction=0)
    return (1 / deviation).float(), (-mean / deviation).float()


def build_model() -> nn.Module:
    """model=resnet20, init=default: torch's default initialization."""
    torch.manual_seed(stream(SEED, WEIGHTS))
    keys = {"norm": "batch", "norm_affine": True, "norm_groups": 8, "norm_ghost_batch": None}
    model = CifarResNet(
        input_shape=(1, 8, 8), classes=10, depth=20, width=16, residual=True, shortcut_padding="end", dropout=0.0,
        norm_eps=1e-5, norm_momentum=0.1, **keys,
    )  # fmt: skip
    return model.to(memory_format=torch.channels_last)  # channels_last=auto: the model has convolutions


def warmup_and_cosine(steps: int):
    """schedule=cosine_warmup: returns the factor of the learning rate for update t, counted from 0."""
    warmup = int(0.1 * steps)  # schedule.warmup_fraction

    def factor(t: int) -> float:
        if t < warmup:
            return 1 / (warmup + 1) * (t + 1)  # starts above 0: the first update would be wasted
        return 0.5 * (1 + math.cos(math.pi * (t - warmup) / (steps - warmup)))

    return factor


class Mean:
    """Mean loss and accuracy over samples: the batches of an epoch differ in size."""

    def __init__(self) -> None:
        self.loss, self.correct, self.count = 0.0, 0, 0

    def add(self, loss: Tensor, outputs: Tensor, labels: Tensor) -> None:
        self.loss += loss.item() * len(labels)
        self.correct += int((outputs.argmax(1) == labels).sum())
        self.count += len(labels)

    def metrics(self, prefix: str) -> dict[str, float]:
        return {f"{prefix}_loss": self.loss / self.count, f"{prefix}_accuracy": self.correct / self.count}


def run(epochs: int = EPOCHS) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Trains; returns the metrics of each epoch, and the test metrics of the best epoch."""
    (images, labels), validation, test = load()
    scale, shift = standardization(images)  # of the training set, also for validation and test
    model = build_model()

    def batch(indices: Tensor, split: Split) -> Split:
        inputs = split[0][indices] * scale + shift
        return inputs.to(memory_format=torch.channels_last), split[1][indices]

    def evaluate(split: Split, prefix: str) -> dict[str, float]:
        model.eval()  # batch norm uses its running statistics
        mean = Mean()
        with torch.inference_mode():
            for indices in torch.arange(len(split[1])).split(BATCH_SIZE):
                inputs, targets = batch(indices, split)
                outputs = model(inputs)
                mean.add(cross_entropy(outputs, targets), outputs, targets)
        return mean.metrics(prefix)

    # optimizer=sgd: heavy-ball momentum. The fused kernel rounds once where separate operations round several times.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    steps = epochs * math.ceil(len(labels) / BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_and_cosine(steps))
    history, best, best_key = [], copy.deepcopy(model.state_dict()), (math.inf, math.inf)
    for epoch in range(epochs):
        model.train()
        mean = Mean()
        # sampler=random: the order depends on the seed and the epoch only, not on the epochs before it.
        order = torch.randperm(len(labels), generator=generator("cpu", stream(SEED, ORDER), epoch))
        for indices in order.split(BATCH_SIZE):
            inputs, targets = batch(indices, (images, labels))
            outputs = model(inputs)
            loss = cross_entropy(outputs, targets)  # loss=cross_entropy
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            mean.add(loss.detach(), outputs.detach(), targets)
        metrics = {"epoch": epoch + 1, **mean.metrics("train"), **evaluate(validation, "val")}
        history.append(metrics)
        print("  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        # monitor=auto: the best epoch has the largest val_accuracy, among equal ones the smallest val_loss.
        key = -metrics["val_accuracy"], metrics["val_loss"]
        if key < best_key:
            best, best_key = copy.deepcopy(model.state_dict()), key
    model.load_state_dict(best)
    tested = evaluate(test, "test")  # once: whoever selects by the test set overestimates the model
    print("  ".join(f"{name} {value:.4g}" for name, value in tested.items()))
    return history, tested


if __name__ == "__main__":
    run()
