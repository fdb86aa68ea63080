"""Continues a text: samples one token after the other from a language model."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dlopt.errors import RunError
from dlopt.models.gpt import GPT, KeyValueCache


@torch.inference_mode()
def generate(
    model: nn.Module,
    prompt: Tensor,
    length: int,
    *,
    context: int,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator,
    cache: bool = True,
) -> Iterator[int]:
    """Yields `length` tokens that follow `prompt`, int64 [T] with T >= 1.

    The model reads at most `context` tokens. When the context is full, it reads the last half of it
    again and continues from there: a cache cannot drop its first entries, because the later ones depend on them.

    Args:
        temperature: divides the logits; 0: the most probable token.
        top_k: sample from the k most probable tokens; None: from all.
        generator: on the CPU, so that all devices draw the same numbers.
        cache: keep the keys and values of a GPT; false: recompute them for each token.
    """
    tokens = prompt[-context:].tolist()
    reader = _Reader(model, prompt.device, cache=cache)
    for _ in range(length):
        if len(tokens) > context:
            tokens = tokens[-max(context // 2, 1) :]
            reader = _Reader(model, prompt.device, cache=cache)
        tokens.append(draw(reader.logits(tokens), temperature, top_k, generator))
        yield tokens[-1]


class _Reader:
    """Returns the logits after a growing list of tokens."""

    def __init__(self, model: nn.Module, device: torch.device, *, cache: bool) -> None:
        self._model = model
        self._device = device
        self._caches: list[KeyValueCache] | None = None
        if cache and isinstance(model, GPT):
            self._caches = [KeyValueCache() for _ in range(model.depth)]

    def logits(self, tokens: list[int]) -> Tensor:
        """Returns [V] on the CPU, float64."""
        read = 0 if self._caches is None else len(self._caches[0])
        batch = torch.tensor([tokens[read:]], device=self._device)
        if self._caches is not None and isinstance(self._model, GPT):
            return self._model.next_logits(batch, self._caches)[0].double().cpu()
        outputs: Tensor = self._model(batch)
        return outputs[0, -1].double().cpu()


def draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """Draws a token from softmax(logits / temperature), logits [V], among the `top_k` largest; ties are kept.

    Raises `RunError` for logits that are not finite.
    """
    if not logits.isfinite().all():
        raise RunError("the model's outputs are not finite: its training has diverged; use another checkpoint")
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None:
        smallest = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    # The largest is 0: others may overflow to -inf at a tiny temperature.
    return int(torch.multinomial(((logits - logits.max()) / temperature).softmax(0), 1, generator=generator))
