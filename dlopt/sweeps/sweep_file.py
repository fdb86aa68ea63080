"""sweep.yaml, the file of a sweep: read and checked, as it may be a stranger's."""

from pathlib import Path
from typing import Any

from dlopt.basics.errors import FileError, UserError
from dlopt.basics.folders import SPACE, short_path
from dlopt.basics.plain_values import load_yaml

_MAX_BYTES, _MAX_NODES = 1 << 25, 500_000  # 10,000 jobs have 1 MB


def read_space(sweep: Path) -> Any:
    """Reads sweep.yaml: a list of overrides per job, or the mapping of a search; None if it is missing.

    Raises `UserError` for a damaged one.
    """
    try:
        space = load_yaml(sweep / SPACE, _MAX_BYTES, _MAX_NODES)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise FileError(
            f"{short_path(sweep)}: {SPACE} is damaged: {getattr(error, 'strerror', None) or error}"
        ) from None
    if isinstance(space, list):
        is_valid = all(isinstance(job, list) and all(isinstance(line, str) for line in job) for job in space)
    else:
        is_valid = isinstance(space, dict) and isinstance(space.get("facts"), dict)
        is_valid = is_valid and all(type(space.get(name, 0)) is int for name in ("finished", "total", "jobs"))
    if not is_valid:
        raise FileError(f"{short_path(sweep)}: {SPACE} is damaged: it holds no jobs")
    return space


def find_space(sweep: Path) -> Any:
    """Reads sweep.yaml; None if it is missing or damaged."""
    try:
        return read_space(sweep)
    except UserError:
        return None
