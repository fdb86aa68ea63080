"""The model predicts the next token of a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.metrics import text as text_metrics
from dlopt.metrics.declaration import Declaration
from dlopt.metrics.text import bits_per_byte, perplexity
from dlopt.tasks.task import Names, OfClasses, Task

OTHER_TOKENIZER = "reads the tokens of another tokenizer; use data.tokenizer of the teacher"


@dataclass(frozen=True)
class NextToken(OfClasses):
    """Inputs: tokens 0..T-1, int64 [B, T]; targets: tokens 1..T. `outputs`: number of tokens in the vocabulary."""

    predictions: int = 1  # T
    unit: Literal["byte", "token"] = "token"  # bytes are measured in bits
    bytes_per_token: float | None = None  # mean of the predicted tokens; None if unknown

    kind: ClassVar = "next_token"
    title: ClassVar = "Text"
    purpose: ClassVar = "tokens"
    metrics: ClassVar[Sequence[Declaration]] = text_metrics.METRICS
    accuracy: ClassVar = "token_accuracy"
    reads_labels: ClassVar = False
    keeps_outputs: ClassVar = False
    measures_train_accuracy: ClassVar = False  # the outputs are too large to be read again

    @property
    def tokens(self) -> int:
        return self.predictions

    @property
    def normalizes(self) -> bool:
        return False

    def input_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0] - 1,)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape, self.outputs)

    def model_arguments(self, shape: tuple[int, ...]) -> dict[str, Any]:
        return {**super().model_arguments(shape), "vocabulary": self.outputs}

    def check_model(self, choice: str, module: nn.Module) -> None:
        if getattr(module, "vocabulary", None) is None:
            raise UserError(f"{choice}: does not read text; use model=gpt, lstm or rnn")

    def check_inputs(self, *, normalize: str | None, augments: bool) -> None:
        if normalize is not None:
            raise UserError(f"{normalize}: tokens have no mean; use normalize=none")
        if augments:
            raise UserError("augmentation: its operations change images, not text; use augmentation=none")

    def check_measured(self, init: str) -> None:
        raise UserError(f"{init}: measures images or features, not text; use init=gpt2 or init=default")

    def split(self, samples: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        tokens = samples.long()
        return tokens[:, :-1], tokens[:, 1:]

    def accepts(self, shape: tuple[int, ...], window: tuple[int, ...]) -> bool:
        return True  # of any number of tokens

    def random_inputs(self, size: Sequence[int]) -> Tensor:
        return torch.randint(self.outputs, tuple(size))

    def input_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.int64

    def random_samples(self, size: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.randint(self.outputs, tuple(size), generator=generator)

    def counted_as(self, shape: tuple[int, ...]) -> str:
        return f"{self.unit}s"

    def describe(self, window: tuple[int, ...], targets: Tensor, classes: Names) -> str:
        return f"{window[0]} {self.unit}s at once, vocabulary {self.outputs:,}"

    def loss_metrics(self, loss: float) -> dict[str, float]:
        if self.unit == "byte":
            return {"bits_per_byte": bits_per_byte(loss, 1)}
        known = {} if self.bytes_per_token is None else {"bits_per_byte": bits_per_byte(loss, self.bytes_per_token)}
        return {"perplexity": perplexity(loss), **known}

    def mismatch(self, other: Task) -> str | None:
        found = super().mismatch(other)
        return OTHER_TOKENIZER if found is None and isinstance(other, NextToken) and other.unit != self.unit else found
