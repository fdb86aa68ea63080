"""Jobs without processes of their own, for tests that are about something else."""

import sys
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

from dlopt.run import job


class InProcess:
    """Replaces a forked process: runs the job immediately, in this process."""

    def __init__(self, folder: Path, environment: Mapping[str, str], cores: set[int] | None) -> None:
        with mock.patch.object(sys, "argv", ["dlopt.run.job", str(folder)]):
            self.code = job.main()

    def poll(self) -> int:
        return self.code
