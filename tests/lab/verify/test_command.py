"""`dlopt verify`: input, table, document and exit code."""

import json
from pathlib import Path

import pytest

from dlopt.basics.errors import UserError
from dlopt.lab.verify.command import verify
from tests.support.line import dlopt


def test_prints_a_table_and_reproductions(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(["optimizer=torch.optim.ASGD"]) == 1
    out = capsys.readouterr().out
    assert "from torch.optim.asgd import ASGD" in out and "rate zero" in out
    assert verify(["optimizer=adamw", "optimizer.cautious=true"]) == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "name the optimizer"),
        ("optimizer=adamw,sgd", "one optimizer at a time"),
        ("optimizer=adamw paper=muom", "did you mean paper=muon"),
        ("optimizer=adamw model=mlp", "does not read this key"),
        ("optimizer=adamw optimizer.groups=[]", "makes its own parameters"),
        ("optimizer=mine.Optimizer", r"allow_packages=\[mine\]"),
        ("optimizer=adamw -m", "one optimizer at a time"),
    ],
)
def test_refuses_wrong_input(line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        verify(line.split())


def test_a_class_of_the_user_as_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "verified_package.py").write_text(
        "import torch\n\nclass MyMuon(torch.optim.RMSprop):\n"
        "    def step(self, closure=None):\n        print('noise')\n        return super().step(closure)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    line = ["optimizer=verified_package.MyMuon", "allow_packages=[verified_package]", "optimizer.lr=0.1", "paper=muon"]
    result = dlopt(tmp_path, "verify", *line, "--json")
    document = json.loads(result.out)
    assert result.code == 1 and "noise" in result.err
    assert document["failed"] == ["reference", "weight decay"] and document["keys"] == {"lr": 0.1}
    assert (
        document["format"] == 1 and document["paper"] == "muon" and document["optimizer"] == line[0].partition("=")[2]
    )
    assert [check["name"] for check in document["checks"]][:2] == ["reference", "descent"]
    assert set(document["checks"][0]) == {"name", "meaning", "tolerance", "status", "reason", "reproduction"}
