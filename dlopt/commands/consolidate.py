"""`dlopt consolidate`: one ordinary file of a checkpoint that every process has written its own shard of."""

import os
from pathlib import Path
from typing import Any

from dlopt.commands.command import on_checkpoint, refuse_folder
from dlopt.errors import DONE, RunError, UserError
from dlopt.tracking.layout import short_path

_USAGE = """\
dlopt consolidate checkpoint=PATH [output=FILE]

Makes one ordinary file of a sharded checkpoint (parallel=fsdp checkpoint.sharded=true), whose shards lie in
checkpoints/shards/: to take it elsewhere, or to read it with torch.load. All commands of dlopt read sharded
checkpoints as they are, and so does resume=PATH in any mode. Checksums are compared, and the file gets its own.

  checkpoint=PATH   RUN/checkpoints/last.pt, best.pt, ...; of a folder (RUN, or RUN/checkpoints) it is best.pt, or else
                    last.pt
  output=FILE       (NAME of the checkpoint with -whole.pt, beside it)
"""


@on_checkpoint("consolidate", _USAGE)
def consolidate(path: Path, _: dict[str, Any], *, output: str | None = None) -> int:
    """Writes the file. Raises `UserError`, and `RunError` when it cannot be written."""
    path = _file(path)
    target = refuse_folder(path.with_name(f"{path.stem}-whole.pt") if output is None else Path(output))
    if target.exists() and os.path.samefile(target, path):
        raise UserError(f"output={target}: this is the checkpoint itself; name another file")

    import torch

    from dlopt.files import reason, write
    from dlopt.training import sharded
    from dlopt.training.checkpoint import load

    state = load(path)
    if not sharded.is_sharded(sharded.opened(path)):
        raise UserError(f"checkpoint={path}: this is one file already")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(target, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise RunError(f"output={target}: cannot be written: {reason(error)}") from None
    print(f"{short_path(target)}: {state['progress']['step']} updates, {target.stat().st_size / 1e6:.1f} MB")
    return DONE


def _file(path: Path) -> Path:
    """The checkpoint that a path means. A folder of shards is no checkpoint by itself."""
    if not path.is_dir():
        return path
    for folder in (path, path / "checkpoints"):
        for name in ("best.pt", "last.pt"):
            if (folder / name).is_file():
                return folder / name
    raise UserError(f"checkpoint={path}: there is neither best.pt nor last.pt in this folder")
