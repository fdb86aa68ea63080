from pathlib import Path

import pytest

from tests.support.runs import start
from tests.support.sizes import RICH


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of an uninterrupted run of RICH, which tests only read."""
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder, *RICH)["status"] == "finished"
    return folder
