"""`dlopt sample`: continues a text with a trained language model."""

import functools
import os
from pathlib import Path
from typing import Annotated, Any

from dlopt.basics.errors import DONE, UserError
from dlopt.basics.ranges import Count, NonNegative, Seed
from dlopt.commands.shared.line import on_checkpoint
from dlopt.config.overrides import key_of, value_of, without

_READS = ("device", "precision", "threads", "allow_packages")
USAGE = """\
Continue a text with a language model

Usage: dlopt sample checkpoint=PATH [prompt=TEXT] [key=value]

Examples:
  dlopt sample checkpoint=outputs/train/DATE prompt="def " length=200
  dlopt sample checkpoint=outputs/train/DATE file=start.py temperature=0 samples=3

  checkpoint=PATH :: a checkpoint, or a run folder: its best.pt, or else last.pt
  prompt=TEXT :: the text to continue (default: a line break); token numbers for data=tokens: prompt=[464,1266]
  {_continue}

Bytes that are no valid UTF-8 are shown as the replacement character. When the context of the model is full, sampling
continues from its last half. Computes in fp32, also after a training in bf16. Uses the config saved in the checkpoint.
Keys that can be overridden:
    {_READS}
"""


def sample(arguments: list[str]) -> int:
    """Prints the prompt and its continuations. Raises `UserError`."""
    # A prompt is any text: it is not parsed as a value of an override.
    prompts = [value_of(argument) for argument in arguments if key_of(argument) == "prompt"]
    command = on_checkpoint("sample", _READS)(functools.partial(_continue, prompts))
    return command(without(arguments, "prompt"))


def _continue(
    prompts: list[str],
    path: Path,
    changes: dict[str, Any],
    *,
    file: Annotated[str | None, "PATH: read the prompt from a file"] = None,
    length: Annotated[Count, "N: number of tokens to sample"] = 200,
    temperature: Annotated[NonNegative, "T: divides the logits; 0: always the most probable token"] = 0.8,
    top_k: Annotated[Count | None, "N: sample from the N most probable tokens (default: from all)"] = None,
    seed: Annotated[Seed, "N: seed of the samples"] = 0,
    samples: Annotated[Count, "N: number of continuations"] = 1,
) -> int:
    from dlopt.basics.random import generator
    from dlopt.trained.continuation import decoded, encode
    from dlopt.trained.restore import restore

    if changes.get("precision") in ("bf16", "bf16_pure", "fp16"):
        raise UserError(f"precision={changes['precision']}: samples are computed in fp32; use fp32, tf32 or fp64")
    trained = restore(path, changes)
    if trained.task.vocabulary is None:
        raise UserError(f"checkpoint={path}: its model predicts no text; it was trained with other data")
    text = _text(prompts, file)
    tokens = encode(trained, text)
    for number in range(samples):
        if number:
            print("-" * 40)
        rng = generator("cpu", seed, number)
        for part in decoded(trained, tokens, length, temperature=temperature, top_k=top_k, generator=rng):
            print(part, end="", flush=True)
        print()
    return DONE


def _text(prompts: list[str], file: str | None) -> bytes:
    """Returns the prompt, a line break by default."""
    if prompts and file is not None:
        raise UserError("prompt, file: set one of them")
    if file is None:
        text = os.fsencode(prompts[-1]) if prompts else b"\n"
    else:
        try:
            text = Path(file).read_bytes()
        except OSError as error:
            raise UserError(f"file={file}: cannot be read ({error.strerror})") from None
    if not text:
        raise UserError(f"{'prompt=' if file is None else f'file={file}'}: is empty; give at least one character")
    return text
