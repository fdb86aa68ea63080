"""Value errors that are reported before torch is imported."""

import pydoc
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from dlopt.basics.errors import UserError
from dlopt.basics.plain_values import load_yaml
from dlopt.config import early_checks
from dlopt.config.choices import config_folder
from dlopt.config.early_checks import check_early
from dlopt.config.parameters import parameters_of
from dlopt.config.run_config import GROUPS, RunConfig
from dlopt.config.schema import Component, resolve_target
from dlopt.config.signatures import annotations_of
from tests.support.folders import make_run
from tests.support.line import refused

_RUN = """
import sys
from dlopt.basics.errors import UserError
from dlopt.cli import find
for line in sys.stdin.read().splitlines():
    command, arguments = find(line.split())
    try:
        command(arguments)
    except UserError as error:
        print("torch" in sys.modules, error)
"""


def targets() -> list[str]:
    files = [path for path in sorted(config_folder().rglob("*.yaml")) if path.parent.name in GROUPS]
    nodes = [load_yaml(path) or {} for path in files]
    return sorted({node["_target_"] for node in nodes if str(node.get("_target_")).startswith("dlopt.")})


def test_errors_of_values_come_before_torch() -> None:
    lines = {
        "train epochs=abc": "epochs=abc: input should be a valid integer; allowed: an integer >= 1 | a time > 0 "
        "(90s, 5min, 1.5h)",
        "train data.batch_size=0": "data.batch_size=0: input should be greater than or equal to 1; allowed: an integer "
        ">= 1 and <= 16777216 | full",
        "train optimizer.lr=-1": "optimizer.lr=-1: input should be greater than 0; allowed: a number > 0",  # of torch
        "train optimizer=lion optimizer.lr=0": "optimizer.lr=0: input should be greater than 0; allowed: a number > 0",
        "train optimizer=sam optimizer.base.lr=-1": "optimizer.base.lr=-1: input should be greater than 0; allowed: a "
        "number > 0",
        "train schedule.warmup_fraction=2": "schedule.warmup_fraction=2: input should be less than or equal to 1; "
        "allowed: a number >= 0 and <= 1",
        "train model.norm=batsch": "model.norm=batsch: unknown value; allowed: batch | layer | group | instance | none",
        "train clip=norm clip.max_norm=0": "clip.max_norm=0: input should be greater than 0; allowed: a number > 0",
        "train stopping=early stopping.patience=x": "stopping.patience=x: input should be a valid integer; allowed: an "
        "integer >= 1",
        "train -m optimizer.lr=-1,0.1": "optimizer.lr=-1: input should be greater than 0; allowed: a number > 0",
        "summary model=mlp model.widths=x": "model.widths=x: input should be a valid array; allowed: a list [an "
        "integer >= 1]",
        "train evaluate.every_steps=3 evaluate.every_epochs=2": "evaluate.every_steps=3 with evaluate.every_epochs=2: "
        "only one of them may be set; use evaluate.every_epochs=1 or evaluate.every_steps=null",
        "train loss.class_weights=balanced sampler=hard_examples": "loss.class_weights=balanced with "
        "sampler=hard_examples: the sampler draws by the losses: no fixed weights balance its draws; "
        "use loss.class_weights=null or a list, or another sampler",
        "train data.folds=5": "data.fold=null: data.folds=5 needs one of 0 to 4, or several with -m",
        "train data.folds=5 data.fold=5": "data.fold=5: data.folds=5 needs one of 0 to 4, or several with -m",
        "train data.fold=1": "data.fold=1: is a part of data.folds, which is null; use for example data.folds=5",
        "train data.folds=5 data.fold=1 data.split_seed=3": "data.split_seed=3: data.folds=5 divides alike for all "
        "seeds; leave it out",
        "train data.folds=5 data.fold=1 data.val_split=0.2": "data.val_split=0.2: data.folds=5 validates; leave it out",
        "train data=table data.file=a data.order=day data.folds=5 data.fold=1": "data.folds=5: data.order=day would "
        "train on what comes after the validation set; use one of them",
        "train model=resnet20 model.depth=9": "model.depth=9: must be 6n+2, for example 8, 14, 20, 26, 38, 56, 110",
        "train model=wrn_16_4 model.depth=4": "model.depth=4: must be 6n+4, for example 10, 16, 22, 28, 40, 58, 112",
        "train model=lstm model.norm=batch": "model.norm=batch: unknown value; allowed: layer | none",
        "train model=locally_connected model.kernel=4": "model.kernel=4: must be odd",
        "train schedule=multistep schedule.milestones_epochs=[7,7]": "schedule.milestones_epochs=[7, 7]: must increase",
        "train data=polynomial data.interval=[1,-1]": "data.interval=[1, -1]: must increase",
        "train data=linear data.intervals=[[1,2],[2,2]]": "data.intervals=[[1, 2], [2, 2]]: must increase",
        "train data=linear data.intervals=[]": "data.intervals=[]: list should have at least 1 item, not 0; allowed: a "
        "list [a list [a number,a number]]",
        "train data=text data.file=[]": "data.file=[]: list should have at least 1 item, not 0; allowed: a string | a "
        "list [a,b,...], each a string",
        "train data=webdataset data.file=a data.input=[]": "data.input=[]: list should have at least 1 item, "
        "not 0; allowed: a string | a list [a,b,...], each a string",
        "train data=csv data.file=a data.label_separator=": "data.label_separator=: string should have at least 1 "
        "character; allowed: a string",
        "train compile=reduce-overhead cuda_graphs=true": "cuda_graphs=true with compile=reduce-overhead: "
        "torch.compile then records CUDA graphs of its own; use compile=max-autotune-no-cudagraphs",
        "train parallel=filter adapt=lora": "adapt=lora with parallel=filter: the mode splits the layers themselves; "
        "use parallel=single, ddp or fsdp",
    }
    printed = subprocess.run(
        [sys.executable, "-c", _RUN], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    assert printed.stdout.splitlines() == [f"False {message}" for message in lines.values()]


def test_errors_of_commands_come_before_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", overrides=["model=mlp"])
    (run / "checkpoints").mkdir()
    (run / "checkpoints/best.pt").touch()
    lines = {
        "eval nowhere": "checkpoint=nowhere: no such file",
        "export nowhere format=safetensors": "checkpoint=nowhere: no such file",
        "export run format=safetensors output=run": "output=run: is a folder; must be a file",
        "predict nowhere images=run": "checkpoint=nowhere: no such file",
        "predict run": "images=PATH or file=FILE: one of them is required",
        "summary classes=3": "classes: needs input_shape=[C,H,W]",
        "predict run images=nowhere": "images=nowhere: no such file or folder",
        "predict run file=a.csv": "file=a.csv: cannot be read (No such file or directory)",
        "predict run file=run": "file=run: is a folder; must be a file",
        "sample run file=nowhere": "file=nowhere: cannot be read (No such file or directory)",
        "sample run prompt=": "prompt=: is empty; give at least one character",
        "consolidate run output=run": "output=run: is a folder; must be a file",
        "trajectory checkpoint=nowhere": "checkpoint=nowhere: no such file",
        "train resume=nowhere": "resume=nowhere: no such file; resume=auto resumes the newest unfinished run",
        "train from=nowhere": "from=nowhere: not a run folder: nowhere has no readable config.yaml",
        "train data=table": "data.file: a value is required; set data.file=VALUE: ",
        "train tracking=[nope]": 'tracking=["nope"]: unknown value; allowed: a list [a,b,...], each tensorboard | ',
        "train --config-dir=conf experiment=octal": "--config-dir=conf: experiment/octal.yaml line 2: epochs: 010 is 8",
        "judge model=mlp optimizer.lr=x": "optimizer.lr=x: input should be a valid number; allowed: a number > 0",
        "judge model=mlp optimizer.lrr=1": "optimizer.lrr=1: unknown key; did you mean optimizer.lr? ",
        "judge model=mlp data.batch_size=0": "data.batch_size=0: input should be greater than or equal to 1; ",
        "judge model=mlp data=nope": "data=nope: unknown choice; ",
        "judge model=mlp seed=1": "seed=1: `dlopt judge` sets the seeds: every pair of runs has its own",
        "judge model=mlp code=nowhere": "code=nowhere: must be a folder with Python files",
        "judge model=mlpp optimizer.lr=1": "model=mlpp: unknown choice; ",
    }
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/octal.yaml").write_text("# @package _global_\nepochs: 010\n")
    printed = subprocess.run(
        [sys.executable, "-c", f"{_RUN}    sys.stdout.flush()"], input="\n".join(lines), cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    for shown, (line, message) in zip(printed.stdout.splitlines(), lines.items(), strict=True):
        assert shown.startswith(f"False {message}"), (line, shown)


def test_a_missing_extra_is_reported_before_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "checkpoints").mkdir()
    (run / "checkpoints/best.pt").touch()
    lines = {
        "export run format=onnx": ("format=onnx", "onnx", "export"),
        "train tracking=[tensorboard,wandb]": ("tracking=[tensorboard,wandb]", "wandb", "wandb"),
        "train model=timm model.name=resnet18": ("model.name=resnet18", "timm", "timm"),
        "train data=huggingface data.name=mnist": ("data.name=mnist", "datasets", "hub"),
        "train data=parquet data.file=[a,b]": ('data.file=["a", "b"]', "pyarrow", "hub"),
        "train data=parquet data.file=a": ("data.file=a", "pyarrow", "hub"),
    }
    hide = f"import importlib.util as u\nreal = u.find_spec\nHIDDEN = {[package for _, package, _ in lines.values()]}\n"
    hide += "u.find_spec = lambda name, *more: None if name in HIDDEN else real(name, *more)\n"
    hide += "import sys\nsys.modules.update(dict.fromkeys(HIDDEN))\n"
    printed = subprocess.run(
        [sys.executable, "-c", hide + _RUN], input="\n".join(lines), cwd=tmp_path, capture_output=True, text=True
    )
    for shown, (line, (place, package, extra)) in zip(printed.stdout.splitlines(), lines.items(), strict=True):
        assert shown.startswith(f"False {place}: the package {package} is not installed; "), (line, shown)
        assert shown.endswith(f"[{extra}]'"), (line, shown)


def test_annotations_are_those_of_the_signatures() -> None:
    known = total = 0
    for path in targets():
        target, early = resolve_target("x", path, ("dlopt",)), annotations_of(path)
        real = {name: parameter.annotation for name, parameter in parameters_of(target).items()}
        assert early == {name: real[name] for name in early}, path
        group = {name for each in GROUPS.values() for name in each.runtime}
        known += len(early.keys() - group)
        total += len(real.keys() - group)
    assert known > 0.95 * total, (known, total)


def test_what_is_not_known_without_imports_passes() -> None:
    assert annotations_of("torch.optim.SGD") == annotations_of("dlopt.optim.Nothing") == annotations_of("") == {}
    assert annotations_of("dlopt.optim.SAM").keys() < {"params", "base", "rho", "adaptive", "lr"}


def test_components_and_the_range_test_pass(composed_config: dict[str, object]) -> None:
    optimizer = {"_target_": "torch.optim.SGD", "lr": "auto", "groups": []}
    loss = {"_target_": "dlopt.losses.CrossEntropy", "label_smoothing": {"_target_": "mine.Loss"}}
    overrides = ["optimizer.lr=auto", "loss.label_smoothing={_target_:mine.Loss}", "optimizer=sgd", "+a.b=1"]
    check_early({**composed_config, "optimizer": optimizer, "loss": loss}, overrides)
    with pytest.raises(UserError, match=r"optimizer\.lr=now: input should be a valid number"):
        check_early({**composed_config, "optimizer": {**optimizer, "lr": "now"}}, overrides)


def test_the_groups_are_those_of_a_config() -> None:
    assert [each.name for each in fields(RunConfig) if each.type is Component] == [*GROUPS]


@pytest.fixture
def composed_config() -> dict[str, object]:
    from dlopt.config.compose import Composer
    from dlopt.config.resolve import to_plain

    return to_plain(Composer().compose([]))[0]


def test_the_id_of_a_run_is_not_typed(tmp_path: Path) -> None:
    """Typed, it would tie the files of two runs to each other."""
    assert "run_id=mine: dlopt gives every run its id" in refused(tmp_path, "train", "+run_id=mine", "model=mlp")


def test_the_common_keys_are_those_of_a_config() -> None:
    """They stand twice because the early checks import no torch."""
    common = {name: group.common for name, group in GROUPS.items() if group.common is not None}
    assert common == {name: pydoc.locate(path) for name, path in early_checks._COMMON.items()}


def test_a_task_that_is_no_choice(tmp_path: Path) -> None:
    assert "task" in refused(tmp_path, "train", "task=null")
