"""`dlopt consolidate`: merges a sharded checkpoint into one file."""

import os
from pathlib import Path
from typing import Annotated, Any

from dlopt.basics.errors import DONE, RunError, UserError
from dlopt.basics.files import reason, write
from dlopt.basics.folders import short_path
from dlopt.commands.shared.command_line import load_torch, on_checkpoint, refuse_folder

USAGE = """\
Merge a sharded checkpoint into one file

Usage: dlopt consolidate RUN [output=FILE]    # RUN: a run, a checkpoint, or a sweep

Use it to copy a sharded checkpoint (parallel=fsdp checkpoint.sharded=true; shards in checkpoints/shards/) elsewhere, or
to read it with torch.load. The other commands and resume=PATH read sharded checkpoints directly, in any parallel mode.
Verifies the checksums of the shards and writes one for the file.

  {consolidate}
"""


@on_checkpoint("consolidate")
def consolidate(
    path: Path,
    _: dict[str, Any],
    *,
    output: Annotated[str | None, "FILE: output file (default: NAME-whole.pt next to the checkpoint NAME.pt)"] = None,
) -> int:
    """Writes the file. Raises `UserError`; `RunError` if writing fails."""
    target = refuse_folder(path.with_name(f"{path.stem}-whole.pt") if output is None else Path(output))
    if target.exists() and os.path.samefile(target, path):
        raise UserError(f"output={target}: is the checkpoint itself; must be another file")
    load_torch()
    import torch

    from dlopt.training.checkpoint import sharded
    from dlopt.training.checkpoint.checkpoints import load

    checkpoint = load(path)
    if not sharded.is_sharded(sharded.load_without_shards(path)):
        raise UserError(f"checkpoint={path}: is not sharded")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(target, lambda file: torch.save(checkpoint.state, file))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise RunError(f"output={target}: cannot write: {reason(error)}") from None
    print(f"{short_path(target)}: {checkpoint.step} updates, {target.stat().st_size / 1e6:.1f} MB")
    return DONE
