"""What counts as typed."""

from typing import Any

import pytest

from dlopt.basics.errors import UserError
from dlopt.config.typed import CommandLine, is_option, refuse_untyped

WORDS = (
    "allow_packages=[a,b.c]", "+hydra.job.env_set.A=1", "++hydra.job.env_set={B:'x y',C:null}", "hydra/launcher=slurm",
    "hydra.launcher.extra.comment='${oc.env:X}'", "~hydra.launcher.account", "outputs/run", "seeds=3",
    "p=zip(model=[mlp,resnet20],name=[one,two])", "tags=[u],[v]",
)  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "is_typed"),
    [
        ("allow_packages", ["a", "b.c"], True),
        ("allow_packages", ["a"], False),
        ("allow_packages", ["a", "b.c", "d"], False),
        ("hydra.job.env_set.A", "1", True),  # the type of the key has converted it
        ("hydra.job.env_set.A", "2", False),
        ("hydra.job.env_set.B", "x y", True),
        ("hydra.job.env_set.C", None, True),
        ("hydra.job.env_set.D", None, False),
        ("hydra.launcher", "slurm", True),
        ("hydra.launcher", "joblib", False),
        ("hydra.launcher.extra.comment", "${oc.env:X}", True),
        ("hydra.launcher.account", None, False),
        ("model", "resnet20", True),
        ("name", "two", True),
        ("name", "three", False),
        ("tags", ["v"], True),
        ("tags", ["u", "v"], False),
        ("outputs.run", "", False),
    ],
)
def test_values_of_the_command_line(key: str, value: Any, is_typed: bool) -> None:
    assert CommandLine(WORDS).sets(key, value) == is_typed
    assert not CommandLine().sets(key, value)


def test_block_of_the_command_line() -> None:
    line = CommandLine(("hydra.launcher.n_jobs=1", *WORDS, "hydra.launcher.n_jobs=2", "hydra.launcher.extra={a:1}"))
    assert line.values_below("hydra.launcher") == {
        "hydra.launcher.n_jobs": 2, "hydra.launcher": "slurm", "hydra.launcher.extra.comment": "${oc.env:X}",
        "hydra.launcher.extra.a": 1,
    }  # fmt: skip
    assert line.adding("hydra.launcher.chunk=3").values_below("hydra.launcher.chunk") == {"hydra.launcher.chunk": 3}


def test_message() -> None:
    with pytest.raises(UserError) as error:
        refuse_untyped({"hydra.job.env_set.MY_TOKEN": "s3cret-value"}, CommandLine())
    assert "hydra.job.env_set.MY_TOKEN=***: " in str(error.value)
    with pytest.raises(UserError, match=r"^hydra/launcher=slurm: set in .*; to use it, type hydra/launcher=slurm$"):
        refuse_untyped({"hydra.launcher": "slurm"}, CommandLine())
    with pytest.raises(UserError, match=r"^hydra\.launcher\.n_jobs=2: .*; of a launcher, a file may set acc"):
        refuse_untyped({"hydra.launcher.n_jobs": 2}, CommandLine())


def test_options_of_a_launcher() -> None:
    options = ("partition", "extra.qos", "extra.gpus-per-task", "mem_gb", "extra.nodes")
    assert all(is_option(f"hydra.launcher.{name}") for name in options)
    others = ("extra", "extra.wrap", "wrap", "extra.extra.qos", "qos.x", "extra.--qos", "QOS", "n_jobs", "_target_")
    assert not any(is_option(f"hydra.launcher.{name}") for name in others) and not is_option("partition")
