"""What tests need that pip does not install: `requires("srun")` skips a test where it is missing, and names it.

`pytest -m requires` selects these tests.
"""

import functools
import os
import shutil
from pathlib import Path

import pytest

# Programs, by the Debian package that installs them.
_PACKAGES = {
    "chromedriver": "chromium-driver", "chromium": "chromium", "g++": "g++", "git": "git", "initdb": "postgresql",
    "munged": "munge", "node": "nodejs", "nohup": "coreutils", "pdflatex": "texlive-latex-recommended",
    "sbatch": "slurm-wlm", "shellcheck": "shellcheck", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "tmux": "tmux",
}  # fmt: skip


def requires(*needs: str) -> pytest.MarkDecorator:
    """Skips tests where one of these programs, a GPU ("gpu") or Debian's Fashion-MNIST ("fashion-mnist") is missing."""
    return pytest.mark.requires(*needs)


def skip_without_needs(item: pytest.Item) -> None:
    """Skips a collected test where something that it requires is missing."""
    needs = [need for mark in item.iter_markers("requires") for need in mark.args]
    if missing := [name for need in dict.fromkeys(needs) if (name := _missing(need)) is not None]:
        item.add_marker(pytest.mark.skip(f"needs {', '.join(missing)}"))


def find(program: str) -> str | None:
    """Returns the path of a program, also of those outside an ordinary user's PATH."""
    folders = [os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]
    if program == "initdb" and shutil.which("psql"):  # Debian keeps the server's programs out of the PATH
        folders[:0] = map(str, Path("/usr/lib/postgresql").glob("*/bin"))
    return shutil.which(program, path=os.pathsep.join(folders))


@functools.cache
def _missing(need: str) -> str | None:
    """Returns what to install, or None if it is there."""
    if need == "gpu":
        import torch  # only by tests that need a GPU

        return None if torch.cuda.is_available() else "a CUDA device"
    if need == "fashion-mnist":
        from dlopt.data.images.downloads import DEBIAN_FASHION_MNIST

        return None if DEBIAN_FASHION_MNIST.is_dir() else "Fashion-MNIST (Debian package dataset-fashion-mnist)"
    return None if find(need) else f"{need} (Debian package {_PACKAGES[need]})"
