"""Continues a text: samples one token after the other from a language model."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dlopt.basics.errors import RunError
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
        top_k: sample from the k most probable tokens; None for all.
        generator: on the CPU, so that all devices draw the same numbers.
        cache: keep the keys and values of a GPT; false: recompute them for each token.
    """
    tokens = prompt[-context:].tolist()
    caches: list[KeyValueCache] = []
    for _ in range(length):
        if len(tokens) > context:
            tokens, caches = tokens[-max(context // 2, 1) :], []
        logits = _logits(model, tokens, prompt.device, caches if cache else None)
        tokens.append(draw(logits, temperature, top_k, generator))
        yield tokens[-1]


def _logits(model: nn.Module, tokens: list[int], device: torch.device, caches: list[KeyValueCache] | None) -> Tensor:
    """Returns the logits [V] after the tokens, on the CPU, float64; reads only the tokens that are not in the caches.

    Fills an empty list of caches with one per block.
    """
    if caches is None or not isinstance(model, GPT):
        outputs: Tensor = model(torch.tensor([tokens], device=device))
        return outputs[0, -1].double().cpu()
    if not caches:
        caches += [KeyValueCache() for _ in range(model.depth)]
    unread = torch.tensor([tokens[len(caches[0]) :]], device=device)
    return model.next_logits(unread, caches)[0].double().cpu()


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
