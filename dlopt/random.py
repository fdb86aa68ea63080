"""Counter-based randomness: every draw is a function of a seed and of where it is used, never of what came before.

A resumed run, a run with more loader workers and a run on more ranks therefore see the same numbers.
"""

import torch

_MASK = (1 << 64) - 1


def stream(seed: int, *counters: int) -> int:
    """Mixes a seed and counters (epoch, step, purpose) into one seed of 63 bits.

    The finalizer of SplitMix64 (Steele, Lea & Flood 2014) is applied once per counter, so that neighbouring
    counters give unrelated seeds.
    """
    state = seed & _MASK
    for counter in (0, *counters):
        state = (state + 0x9E3779B97F4A7C15 * (counter + 1)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def generator(device: torch.device | str, seed: int, *counters: int) -> torch.Generator:
    """A fresh generator on `device` for the stream (seed, *counters)."""
    return torch.Generator(device=device).manual_seed(stream(seed, *counters))
