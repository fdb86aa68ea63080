"""What a model predicts from a sample: the labels of the dataset, the next tokens of a text, or the sample itself."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["classification", "multi-label", "regression", "next_token", "reconstruction"]


@dataclass(frozen=True)
class Task:
    """Splits samples into inputs and targets, and defines their metrics.

    kind            model inputs             targets
    classification  sample                   label: int64 [B]
    multi-label     sample                   whether it has each label: float [B, K], 0 or 1
    regression      sample                   label: float [B] or [B, K]
    next_token      tokens 0..T-1: [B, T]    tokens 1..T: int64 [B, T]
    reconstruction  sample                   sample: float [B, K], before the normalization; 0..255 becomes 0..1

    Args:
        outputs: size of a prediction: the number of classes, of labels, of values, or of tokens in the vocabulary.
        predictions: per sample; T for a text.
        unit: of a token; bytes are measured in bits.
        bytes_per_token: mean number of bytes of the predicted tokens; None: unknown.
        white: value of a white pixel; 1 for floating-point images whose values are not in 0..255.
    """

    kind: Kind
    outputs: int
    predictions: int = 1
    unit: Literal["byte", "token"] = "token"
    white: float = 255.0
    bytes_per_token: float | None = None

    @property
    def shown_kind(self) -> str:
        return self.kind.replace("_", " ")

    @property
    def classes(self) -> int | None:
        """Number of classes of a prediction, of which one is correct; None: it consists of numbers."""
        return self.outputs if self.kind in ("classification", "next_token") else None

    @property
    def labels(self) -> int | None:
        """Number of labels, of which a sample may have several; None: of another task."""
        return self.outputs if self.kind == "multi-label" else None

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens that the model reads; None: it reads numbers."""
        return self.outputs if self.kind == "next_token" else None

    @property
    def has_labels(self) -> bool:
        """Whether the targets are labels of the dataset; otherwise they are taken from the samples."""
        return self.kind in ("classification", "multi-label", "regression")

    @property
    def accuracy(self) -> str:
        """Name of the fraction of correct predictions. `monitor=auto` does not select models by that of tokens."""
        return "token_accuracy" if self.kind == "next_token" else "accuracy"

    def input_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the model's input for samples of `shape`."""
        return (shape[0] - 1,) if self.kind == "next_token" else shape

    def split(self, samples: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (inputs, targets) of samples [B, *shape], augmented but not normalized, and their labels."""
        if self.kind == "next_token":
            tokens = samples.long()
            return tokens[:, :-1], tokens[:, 1:]
        if self.kind == "reconstruction":
            targets = samples.flatten(1).to(torch.promote_types(samples.dtype, torch.float32))
            return samples, targets / self.white
        return samples, labels

    def normalized(self, inputs: Tensor, normalize: nn.Module | None, dtype: torch.dtype) -> Tensor:
        """Returns inputs for the model: tokens as they are, all others normalized, of `dtype`."""
        if self.kind == "next_token":
            return inputs
        return (inputs if normalize is None else normalize(inputs)).to(dtype)

    def loss_metrics(self, loss: float) -> dict[str, float]:
        """Returns metrics that are functions of the mean loss, which for a text is in nats per token."""
        if self.kind != "next_token":
            return {}
        if self.unit == "byte":
            return {"bits_per_byte": loss / math.log(2)}
        metrics = {"perplexity": math.exp(loss) if loss < 700 else math.inf}
        if self.bytes_per_token is not None:
            metrics["bits_per_byte"] = loss / (self.bytes_per_token * math.log(2))
        return metrics
