"""`dlopt consolidate`: one ordinary file of a checkpoint that every process has written its own shard of."""

import os
from dataclasses import dataclass
from pathlib import Path

from dlopt.config.saved import take_path, typed_values
from dlopt.config.schema import check_arguments
from dlopt.errors import RunError, UserError
from dlopt.job import DONE
from dlopt.tracking.layout import short_path

_USAGE = """\
dlopt consolidate checkpoint=PATH [output=FILE]

Makes one ordinary file of a sharded checkpoint (parallel=fsdp checkpoint.sharded=true), whose shards lie in
checkpoints/shards/: to take it elsewhere, or to read it with torch.load. All commands of dlopt read sharded
checkpoints as they are, and so does resume=PATH in any mode. Checksums are compared, and the file gets its own.

  checkpoint=PATH   RUN/checkpoints/last.pt, best.pt, ...; of a folder (RUN, or RUN/checkpoints) it is best.pt, or else
                    last.pt
  output=FILE       (NAME of the checkpoint with -whole.pt, beside it)"""


@dataclass(frozen=True, kw_only=True)
class _Own:
    """The keys of this command besides the path."""

    output: str | None = None


def consolidate(arguments: list[str]) -> int:
    """Writes the file. Raises `UserError`, and `RunError` when it cannot be written."""
    if {"-h", "--help"} & set(arguments):
        print(_USAGE)
        return DONE
    values = typed_values(arguments)
    path = _file(take_path(values, "consolidate"))
    for key in values:
        if key != "output":
            raise UserError(f"{key}: there is no such key; allowed: checkpoint, output")
    own = _Own(**check_arguments("", _Own, values))
    output = path.with_name(f"{path.stem}-whole.pt") if own.output is None else Path(own.output)
    if output.is_dir():
        raise UserError(f"output={output}: this is a folder; name a file in it")
    if output.exists() and os.path.samefile(output, path):
        raise UserError(f"output={output}: this is the checkpoint itself; name another file")

    import torch

    from dlopt.files import reason, write
    from dlopt.train import sharded
    from dlopt.train.checkpoint import load

    state = load(path)
    if not sharded.is_sharded(sharded.opened(path)):
        raise UserError(f"checkpoint={path}: this is one file already")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write(output, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise RunError(f"output={output}: cannot be written: {reason(error)}") from None
    print(f"{short_path(output)}: {state['progress']['step']} updates, {output.stat().st_size / 1e6:.1f} MB")
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
