"""The output that pages show was printed: docs/printed.yaml has the day, and the page has not been edited since."""

import importlib.util
import re
from types import ModuleType

import pytest
import yaml

from tests.support.pages import ROOT

NOTED = yaml.safe_load((ROOT / "docs/printed.yaml").read_text())


@pytest.fixture(scope="module")
def type_pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("type_pages", ROOT / "scripts/type_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", NOTED)
def test_pages_were_not_edited_since_they_were_typed(page: str, type_pages: ModuleType) -> None:
    day, digest = NOTED[page]
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", str(day))
    assert type_pages.digest(ROOT / page) == digest, f"type it again: scripts/type_pages.py .venv/bin {page} --record"


def test_what_differs_between_runs_is_not_compared(type_pages: ModuleType) -> None:
    shown = "sgd      0.0483    98.61 %   0:07\n...finished...best: job 2"
    printed = "sgd  0.1  97.2 %  1:12:01\njob 3 finished | loss 1e-5 | best: job 12 | left"
    assert type_pages.missing(shown, printed) == []
    assert type_pages.missing("verdict: sgd is better\nadamw  0.1", printed) == ["verdict: sgd is better", "adamw  0.1"]
