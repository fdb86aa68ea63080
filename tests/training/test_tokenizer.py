"""Runs on a text with a tokenizer: metrics, resuming, and the commands on their checkpoints."""

import json
import math
from pathlib import Path

import pytest
import torch

from dlopt.basics.errors import UserError
from dlopt.commands.eval import evaluate
from dlopt.commands.export import export
from dlopt.commands.sample import sample
from tests.support.runs import resume, same, start

tokenizers = pytest.importorskip("tokenizers")
TEXT = "\n".join(f"def f{number}(x):\n    return x + {number}  # →" for number in range(300))


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(TEXT)
    return [
        "data=text", f"data.file={path}", "data.tokenizer=bpe", "data.vocabulary=280", "data.sequence_length=8",
        "data.batch_size=40", "model=gpt_nano", "model.width=12", "model.depth=1", "optimizer=adamw",
        "optimizer.lr=0.01", "threads=1", "device=cpu", "tracking=[]", "epochs=2",
    ]  # fmt: skip


def test_commands_use_the_tokenizer_of_the_checkpoint(
    lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = start(tmp_path, *lines)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 280
    assert summary["test_bits_per_byte"] < summary["test_loss"] / math.log(2)
    best = tmp_path / "checkpoints" / "best.pt"
    other = tmp_path / "other.txt"
    other.write_text(TEXT.upper())  # on which another tokenizer would be trained
    assert evaluate([f"checkpoint={best}", f"output={tmp_path / 'same'}"]) == 0
    same_text = json.loads((tmp_path / "same" / "eval.json").read_text())
    assert same_text["test_bits_per_byte"] == pytest.approx(summary["test_bits_per_byte"], rel=1e-6)
    assert evaluate([f"checkpoint={best}", f"data.file={other}", f"output={tmp_path / 'other'}"]) == 0
    other_text = json.loads((tmp_path / "other" / "eval.json").read_text())
    assert other_text["test_bits_per_byte"] > summary["test_bits_per_byte"]
    with pytest.raises(UserError, match=r"data\.tokenizer=bytes: the model reads tokens of data\.tokenizer=bpe"):
        evaluate([f"checkpoint={best}", "data.tokenizer=bytes", "data.vocabulary=null"])
    capsys.readouterr()
    assert sample([f"checkpoint={best}", "prompt=def → f", "length=20", "temperature=0"]) == 0
    assert capsys.readouterr().out.startswith("def → f")
    assert export([f"checkpoint={best}", "format=safetensors", f"output={tmp_path / 'model'}"]) == 0
    assert f"tokenizer: {tmp_path / 'model.tokenizer.json'}" in capsys.readouterr().out
    assert (tmp_path / "model.tokenizer.json").read_text() == (tmp_path / "tokenizer.json").read_text()


def test_a_resumed_run_is_bitwise_identical(lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the tokenizer from its checkpoint, and trains no other one."""
    start(tmp_path / "whole", *lines)
    start(tmp_path / "parts", *lines, "max_time=0.0001")
    monkeypatch.setattr("dlopt.data.texts.text.train_tokenizer", None)
    assert resume(tmp_path / "parts", *lines)["status"] == "finished"
    states = [torch.load(tmp_path / each / "checkpoints" / "last.pt", weights_only=True) for each in ("whole", "parts")]
    assert same(states[0]["model"], states[1]["model"])
    assert states[0]["progress"]["data"]["tokenizer"] == states[1]["progress"]["data"]["tokenizer"]
