"""Metrics of the tokens of a text: functions of the mean loss, and the fraction of correct tokens."""

import math

from dlopt.metrics.declaration import Declaration


def perplexity(loss: float) -> float:
    """Returns exp(loss), of a loss in nats per token; infinity above the largest double."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Returns the loss, in nats per token, in bits per byte of the text."""
    return loss / (bytes_per_token * math.log(2))


METRICS = (
    Declaration(
        "token_accuracy", "max", "%", "correct tokens, as a fraction of all tokens; selects no models by default",
        "always",
    ),
    Declaration(
        "perplexity", "min", "", "exponential of the loss, of tokens that are not bytes", "always", header="perplexity"
    ),
    Declaration(
        "bits_per_byte", "min", "bits", "loss per byte of the text, where their number is known", "always",
        header="bits/byte",
    ),
)  # fmt: skip
