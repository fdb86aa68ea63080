"""Counter-based random numbers: each draw depends on a seed and on counters (epoch, step), not on previous draws.

Resumed runs, and runs with other numbers of loader workers or ranks, therefore draw the same numbers.
"""

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def stream(seed: int, *counters: int) -> int:
    """Hashes a seed and counters (epoch, step, purpose) to a seed of 63 bits.

    Applies the finalizer of SplitMix64 (Steele, Lea & Flood 2014) once per counter: neighbouring counters give
    unrelated seeds.
    """
    state = seed & _MASK
    for counter in (0, *counters):
        state = (state + 0x9E3779B97F4A7C15 * (counter + 1)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def generator(device: torch.device | str, seed: int, *counters: int) -> torch.Generator:
    """Returns a new generator on `device` for the stream (seed, *counters)."""
    return torch.Generator(device=device).manual_seed(stream(seed, *counters))


def hashed(words: Tensor) -> Tensor:
    """Hashes int32 words in place: each bit depends on all bits (Wellons, hash-prospector, two rounds)."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        words = _xor_shifted(words, shift).mul_(factor)
    return _xor_shifted(words, 15)


def _xor_shifted(words: Tensor, shift: int) -> Tensor:
    # torch shifts signed words only, and fills them with the sign; the mask makes the shift a logical one.
    return words.bitwise_xor_((words >> shift).bitwise_and_((1 << (32 - shift)) - 1))
