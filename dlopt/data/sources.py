"""What the dataset sources share: where data lie, and checks of what was found."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dlopt.errors import UserError

T = TypeVar("T")


def data_root(root: str | None) -> Path:
    """The folder for downloads: `root`, else $DLOPT_DATA, else `data` under the current folder."""
    return Path(root if root is not None else os.environ.get("DLOPT_DATA") or "data").expanduser()


def through_torchvision(key: str, root: Path, download: bool, load: Callable[[], T]) -> T:
    """Calls `load`, torchvision's reading or downloading, and turns its errors into one message.

    Raises:
        UserError: the files are missing or damaged, cannot be downloaded, or the folder cannot be written.
    """
    import pickle
    import urllib.error
    import zipfile

    try:
        return load()
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        raise UserError(
            f"{key}: downloading to {root} failed ({error}); put the files there and set data.download=false, "
            "or set data.root to a folder that has them"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0].removesuffix(" You can use download=True to download it")
        hint = "" if download else "; set data.download=true, or data.root to the folder that has the files"
        raise UserError(f"{key}: {root}: {reason}{hint}") from error
