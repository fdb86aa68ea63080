"""What to type where an optional package is missing."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def install(what: str) -> str:
    """The line that installs `what` (dlopt[export]) into this environment; the pip on the PATH may be another one's."""
    beside, found = Path(sys.executable).with_name("pip"), shutil.which("pip")
    if found is not None and Path(found).absolute() == beside:
        program = "pip"
    elif beside.exists():
        program = shlex.quote(min(os.path.relpath(beside), str(beside), key=len))
    else:
        program = f"{shlex.quote(sys.executable)} -m pip"
    return f"{program} install {shlex.quote(what)}"
