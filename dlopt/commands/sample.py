"""`dlopt sample`: continues a text with a trained language model."""

import os
from pathlib import Path
from typing import Annotated, Any

from dlopt.basics.errors import DONE, UserError
from dlopt.basics.ranges import Count, NonNegative, Seed
from dlopt.commands.shared.command_line import load_torch, on_checkpoint
from dlopt.config.reads import INFERENCE

_READS = (*INFERENCE, "allow_packages")
USAGE = """\
Continue a text with a language model

Usage: dlopt sample RUN [prompt=TEXT] [key=value]    # RUN: a run, a checkpoint, or a sweep

Examples:
  dlopt sample checkpoint=outputs/train/DATE prompt="def " length=200
  dlopt sample checkpoint=outputs/train/DATE file=start.py temperature=0 samples=3

  {sample}

Bytes that are no valid UTF-8 are shown as the replacement character. When the context of the model is full, sampling
continues from its last half. Computes in fp32, also after a training in bf16. Uses the config saved in the checkpoint.
Keys that can be overridden:
    {_READS}
"""


@on_checkpoint("sample", _READS, as_typed=("prompt",))
def sample(
    path: Path,
    changes: dict[str, Any],
    *,
    prompt: Annotated[
        str | None,
        "TEXT: the text to continue (default: a line break); token numbers for data=tokens: prompt=[464,1266]",
    ] = None,
    file: Annotated[str | None, "PATH: read the prompt from a file", "not with prompt"] = None,
    length: Annotated[Count, "N: number of tokens to sample"] = 200,
    temperature: Annotated[NonNegative, "T: divides the logits; 0: always the most probable token"] = 0.8,
    top_k: Annotated[Count | None, "N: sample from the N most probable tokens (default: from all)"] = None,
    seed: Annotated[Seed, "N: seed of the samples"] = 0,
    samples: Annotated[Count, "N: number of continuations"] = 1,
) -> int:
    """Prints the prompt and its continuations. Raises `UserError`."""
    if changes.get("precision") in ("bf16", "bf16_pure", "fp16"):
        raise UserError(f"precision={changes['precision']}: samples are computed in fp32; use fp32, tf32 or fp64")
    text = _text(prompt, file)
    load_torch()
    from dlopt.basics.random import generator
    from dlopt.tasks.text import NextToken
    from dlopt.trained.continuation import decoded, encode
    from dlopt.trained.restore import restore

    trained = restore(path, changes)
    if not isinstance(trained.task, NextToken):
        raise UserError(f"checkpoint={path}: its model predicts no text; it was trained with other data")
    tokens = encode(trained, text)
    for number in range(samples):
        if number:
            print("-" * 40)
        rng = generator("cpu", seed, number)
        for part in decoded(trained, tokens, length, temperature=temperature, top_k=top_k, generator=rng):
            print(part, end="", flush=True)
        print()
    return DONE


def _text(prompt: str | None, file: str | None) -> bytes:
    """Returns the prompt, a line break by default."""
    if file is None:
        text = b"\n" if prompt is None else os.fsencode(prompt)
    else:
        try:
            text = Path(file).read_bytes()
        except OSError as error:
            raise UserError(f"file={file}: cannot be read ({error.strerror})") from None
    if not text:
        raise UserError(f"{'prompt=' if file is None else f'file={file}'}: is empty; give at least one character")
    return text
