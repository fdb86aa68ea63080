"""Figures of a classification or a regression, from the outputs for a whole test set."""

import torch
from torch import Tensor

BINS = 15  # of confidence, as in Guo et al. 2017


def confusion_matrix(targets: Tensor, predictions: Tensor, classes: int) -> Tensor:
    """int64 [classes, classes]: how many samples of the row's class were labelled with the column's.

    targets, predictions: int64 [N].
    """
    return torch.bincount(targets * classes + predictions, minlength=classes**2).view(classes, classes)


def class_accuracies(confusion: Tensor) -> Tensor:
    """float64 [K]: the share of each class's samples that were labelled right; nan for a class without samples."""
    return confusion.diagonal().double() / confusion.sum(1)


def f1_scores(confusion: Tensor) -> Tensor:
    """float64 [K]: 2 TP / (2 TP + FP + FN) of each class; nan for a class that neither occurs nor is predicted."""
    return 2 * confusion.diagonal().double() / (confusion.sum(0) + confusion.sum(1))


def top_accuracy(outputs: Tensor, targets: Tensor, k: int) -> float:
    """The share of samples whose class is among the `k` largest of their outputs [N, K]."""
    found = outputs.topk(k, dim=1).indices == targets.unsqueeze(1)
    return found.any(1).double().mean().item()


def calibration_error(probabilities: Tensor, targets: Tensor, bins: int = BINS) -> float:
    """Expected calibration error (Guo et al. 2017, equation 5): sum over `bins` equal bins of confidence (the largest
    probability) of the bin's share of samples times |accuracy - mean confidence| within it.

    probabilities: [N, K]; a bin holds its upper border, not its lower one.
    """
    return (calibration_gaps(probabilities, targets, bins).abs().sum() / len(targets)).item()


def calibration_gaps(probabilities: Tensor, targets: Tensor, bins: int = BINS) -> Tensor:
    """float64 [bins]: of each bin of confidence its right answers minus the sum of confidences."""
    confidence, predictions = probabilities.double().max(1)
    right = (predictions == targets).double()
    bin_of = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    return torch.zeros(bins, dtype=torch.float64, device=right.device).index_add_(0, bin_of, right - confidence)


def determination(outputs: Tensor, targets: Tensor) -> float:
    """R^2 of outputs [N, K] for targets [N, K] or [N], a mean over the K numbers; nan where a target is constant."""
    targets = targets.view(len(outputs), -1).double()
    residual = (outputs.double() - targets).square().sum(0)
    return (1 - residual / (targets - targets.mean(0)).square().sum(0)).mean().item()


def absolute_error(outputs: Tensor, targets: Tensor) -> float:
    """Mean absolute error over samples and numbers."""
    return (outputs.double() - targets.view(len(outputs), -1).double()).abs().mean().item()
