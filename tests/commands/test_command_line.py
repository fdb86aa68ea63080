"""Code shared by the commands: flags, keys and output folders."""

from pathlib import Path

import pytest

from dlopt.basics.errors import UserError
from dlopt.commands.shared.command_line import output_folder, read_line, writing
from tests.support.line import refused


def test_read_line() -> None:
    line = read_line(["a=1", "--config-name", "trajectory", "b=2"], several="no")
    assert line.overrides == ["a=1", "b=2"]
    assert line.composer.compose(["function=beale"]).steps == 50


def test_values_of_a_key_that_a_choice_lacks_make_no_further_jobs() -> None:
    line = read_line(["init=normal,xavier_normal", "init.std=0.01,1"], several="diagnose")
    jobs = [job.overrides for job in line.jobs(("init",))]
    assert jobs == [["init=normal", "init.std=0.01"], ["init=normal", "init.std=1"], ["init=xavier_normal"]]


@pytest.mark.parametrize("command", ["summary", "diagnose", "find-lr", "show-batch", "trajectory", "scaling"])
@pytest.mark.parametrize(
    ("flag", "message"),
    [("-m", "-m: "), ("--cfg=job", "--cfg: only available in `dlopt train`"), ("--info", "--info: ")],
)
def test_refuses_flags_of_train(tmp_path: Path, command: str, flag: str, message: str) -> None:
    assert message in refused(tmp_path, command, flag)


@pytest.mark.parametrize(
    ("command", "key", "why"),
    [
        ("summary", "model=mlp,resnet20", "summary "),
        ("find-lr", "optimizer=adam,sgd", "find-lr "),
        ("show-batch", "data=digits,mnist", "one value is needed"),
    ],
)
def test_single_run_commands_refuse_several_values(tmp_path: Path, command: str, key: str, why: str) -> None:
    assert f"{key}: {why}" in refused(tmp_path, command, key)


def test_optimizer_path_requires_function(tmp_path: Path) -> None:
    message = refused(tmp_path, "trajectory", "optimizer=momentum,adam", "steps=5")
    assert "optimizer=momentum,adam: add a function (function=quadratic)" in message


def test_suggests_keys_of_checkpoint_commands(tmp_path: Path) -> None:
    (tmp_path / "x.pt").touch()
    message = refused(tmp_path, "trajectory", "checkpoint=x.pt", "direction=random")
    assert "direction: did you mean directions? the config is the checkpoint's" in message and "span" in message


def test_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert output_folder("a/b", "x").is_dir() and output_folder("a/b", "x") == Path("a/b")
    first, second = output_folder(None, "x"), output_folder(None, "x")
    assert first.parent == second.parent == Path("outputs/x") and first != second
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="output=file: is a file; must be a folder"):
        output_folder("file", "x")
    with pytest.raises(UserError, match="output=file/b: cannot create this folder: Not a directory"):
        output_folder("file/b", "x")
    with pytest.raises(UserError, match="output=a: cannot write: No space left"), writing(Path("a")):
        raise OSError(28, "No space left on device")
