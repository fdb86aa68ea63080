"""`python -m dlopt.commands.grid`: the arguments of one task of a job array."""

from pathlib import Path

import pytest

from dlopt.commands.grid import overrides_of
from dlopt.errors import UserError


def test_order_of_the_jobs() -> None:
    line = ["optimizer=sgd,adamw", "epochs=3", "optimizer.lr=0.1,0.2"]
    jobs = [overrides_of(number, line) for number in range(4)]
    assert jobs[1] == ["optimizer=sgd", "epochs=3", "optimizer.lr=0.2"]
    assert jobs[2] == ["optimizer=adamw", "epochs=3", "optimizer.lr=0.1"]
    with pytest.raises(UserError, match="job 4: the sweep has jobs 0 to 3"):
        overrides_of(4, line)


def test_keeps_the_flags_that_name_config_files(tmp_path: Path) -> None:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer/mine.yaml").write_text("_target_: torch.optim.SGD\nlr: 0.1\n")
    (tmp_path / "short.yaml").write_text("defaults: [train, _self_]\nepochs: 1\n")
    folder = str(tmp_path)
    job = overrides_of(1, ["-cd", folder, "optimizer=sgd,mine", "--config-name", "short"])
    assert job == [f"--config-dir={folder}", "--config-name=short", "optimizer=mine"]
