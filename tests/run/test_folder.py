"""The folder of a run: a finished run that could be longer."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlopt.basics.errors import UserError
from dlopt.basics.folders import RunFolder
from dlopt.config.resuming import refuse_longer
from dlopt.run.folder import copy_history


def finished(folder: Path, **summary: int) -> RunFolder:
    lines = [{"epoch": epoch, "step": 21 * epoch} for epoch in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({"status": "finished", **summary}))
    (folder / "config.yaml").write_text(yaml.safe_dump({"epochs": 2}))
    return RunFolder(folder)


def test_a_run_that_resumes_in_another_folder_takes_its_history_along(tmp_path: Path) -> None:
    source, target = (RunFolder(tmp_path / name) for name in ("source", "target"))
    for each in (source, target):
        each.path.mkdir()
    finished(source.path, epochs=2, steps=42)
    (source.path / "diagnostics.jsonl").write_text('{"step": 1, "gradients/norm/head": 0.5}\n')
    copy_history(source, target, None, "an id")
    for name in ("metrics.jsonl", "diagnostics.jsonl"):
        assert (target.path / name).read_text() == (source.path / name).read_text()


@pytest.mark.parametrize(
    ("length", "expected"), [("epochs=60", "schedule_epochs=60"), ("steps=105", "schedule_epochs=5")]
)
def test_the_command_that_extends_a_finished_run(
    length: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = finished(tmp_path, epochs=2, steps=42)
    config: dict[str, Any] = {
        "epochs": 2,
        "steps": None,
        "schedule_epochs": None,
        **yaml.safe_load(length.replace("=", ": ")),
    }
    with pytest.raises(UserError) as caught:
        refuse_longer(done, config, ["optimizer=adamw", "note='a b'", length, "resume=auto"])
    command = str(caught.value).partition("type: ")[2].partition(" (for")[0]
    words = ["dlopt", "train", "optimizer=adamw", "note='a b'", length, expected, f"output={tmp_path}", "resume=auto"]
    assert shlex.split(command) == words
    refuse_longer(done, {**config, "epochs": 2, "steps": 42}, [])  # not longer
