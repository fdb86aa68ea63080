"""A user's own config folder: broken files are explained; own components need a file and a callable, and no fork."""

import textwrap
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import yaml

from dlopt.basics.errors import UserError
from dlopt.config.choices import config_folder
from dlopt.config.compose import Composer
from dlopt.config.plan import plan
from tests.support.line import SMALL, dlopt, only, refused
from tests.sweeps.processes import InProcess


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


SGD = "_target_: torch.optim.SGD\n"
BROKEN: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "a tab": (SGD + "\tlr: 0.1\n", ("mine.yaml", "not valid YAML")),
    "a duplicate key": (SGD + "lr: 0.1\nlr: 0.2\n", ("mine.yaml", "the key 'lr' twice")),
    "an open bracket": (SGD + "lr: [0.1\n", ("mine.yaml", "not valid YAML")),
    "a list": ("- 1\n- 2\n", ("optimizer=mine",)),
    "a text": ("hello\n", ("optimizer._target_",)),
    "nothing": ("", ("optimizer._target_",)),
    "cyclic interpolations": (SGD + "lr: ${.momentum}\nmomentum: ${.lr}\n", ("optimizer", "ecursive")),
    "a missing interpolation": (SGD + "lr: ${learning_rate}\n", ("optimizer.lr=${learning_rate}", "not found")),
    "a missing value": (SGD + "lr: ???\n", ("optimizer.lr", "a value is required")),
    "a missing fragment": ("defaults: [_nope]\n" + SGD, ("optimizer=mine", "_nope")),
    "no target": ("lr: 0.1\n", ("optimizer",)),
    "an unknown key": (SGD + "lrr: 0.1\n", ("optimizer.lrr=0.1", "did you mean optimizer.lr?")),
    "a wrong type": (SGD + "lr: fast\n", ("optimizer.lr=fast", "a number > 0")),
    "a wrong range": (SGD + "lr: 0.1\nmomentum: 2\n", ("optimizer.momentum=2", "< 1")),
    "a number as key": (SGD + "1: 2\n", ("optimizer.1=2",)),
    "a blank group": ("defaults: [{' ': x}]\n" + SGD, ("mine",)),
    "a target that is not there": ("_target_: torch.optim.SDG\n", ("torch.optim.SDG", "unknown callable")),
    "a date": (SGD + "lr: 2026-01-01\n", ("optimizer.lr=2026-01-01", "a number > 0")),
    "control characters": (b"\x00\x01\xff\xfe\x80", ("mine.yaml",)),
    "UTF-16": (b"\xff\xfel\x00r\x00", ("mine.yaml",)),
    "Latin-1": (b"lr: \xe9\n", ("mine.yaml",)),
    "a program": (b"\x7fELF" + bytes(100), ("mine.yaml",)),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_file(kind: str, tmp_path: Path) -> None:
    text, parts = BROKEN[kind]
    path = tmp_path / "conf/optimizer/mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused(tmp_path, "train", "--config-dir", "conf", "optimizer=mine", *SMALL)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("path", "text", "typed", "message"),
    [
        ("mine.yaml", "defaults: [nope]\n", "--config-name mine", "nope"),
        ("experiment/mine.yaml", "# @package _global_\ntrue: 1\n", "experiment=mine model=mlp", "True=1: unknown key"),
        ("experiment/mine.yaml", "epochs: 3\n", "experiment=mine model=mlp", "`# @package _global_`"),
        (
            "data/mine.yaml",
            "_target_: dlopt.data.rows.custom.custom\ntrain: null\nbatch_size: 8\n",
            "data=mine model=mlp",
            "dlopt: data=mine: lacks subset, split_seed, memory, workers, drop_last; begin its file with "
            "two lines, defaults: [_common, _self_] and _target_: dlopt.data.rows.custom.custom\n",
        ),
        (
            "data/mine.yaml", "defaults: [_common, _self_]\n_target_: torch.nn.Identity\n", "data=mine model=mlp",
            "dlopt: data=mine: returns Identity; must return a dlopt Dataset\n",
        ),
        (
            "data/mine.yaml", "train: {_target_: torch.nn.ModuleList}\n", "data=mine model=mlp",
            "begin its file with two lines, defaults: [custom, _self_] and train: {_target_: torch.nn.ModuleList}\n",
        ),
        (
            "data/mine.yaml", "defaults: [_common, _self_]\n_target_: torch.nn.ModuleList\n", "data=mine model=mlp",
            "data=mine: returns ModuleList; must return a dlopt Dataset, or, for a dataset of torch, begin its "
            "file with two lines, defaults: [custom, _self_] and train: {_target_: "
            "torch.nn.modules.container.ModuleList}\n",
        ),
        (
            "data/mine.yaml", "defaults: [custom, _self_]\ntrain: mine.Dataset\n", "data=mine model=mlp",
            "data.train=mine.Dataset: names no dataset; a file has train: {_target_: mine.Dataset}\n",
        ),
    ],
)  # fmt: skip
def test_broken_file_of_another_group(path: str, text: str, typed: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "conf" / path, text)
    assert message in refused(tmp_path, "train", "--config-dir", "conf", *typed.split(), "hydra.run.dir=run")


def test_a_recipe_chooses_sweeper_and_logging(tmp_path: Path) -> None:
    """The choices in dlopt's own file do not win over it, those of the command line do."""
    write(tmp_path / "conf/experiment/mine.yaml", """\
        # @package _global_
        defaults:
          - override /hydra/sweeper: dlopt_optuna
          - override /hydra/job_logging: stdout
          - override /model: mlp
        """)  # fmt: skip
    composer = Composer(config_dir=str(tmp_path / "conf"), words=["hydra/sweeper=basic"])
    config = composer.compose(["experiment=mine"])
    assert config.hydra.sweeper.n_trials == 20 and config.hydra.job_logging.handlers
    assert "n_trials" not in composer.compose(["experiment=mine", "hydra/sweeper=basic"]).hydra.sweeper
    assert "n_trials" not in composer.compose([]).hydra.sweeper


def test_custom_primary_config(tmp_path: Path) -> None:
    write(tmp_path / "conf/mine.yaml", """\
        defaults: [train, _self_]
        epochs: 1
        seed: 7
        """)  # fmt: skip
    small = [each for each in SMALL if not each.startswith("epochs")]
    result = dlopt(tmp_path, "train", "--config-dir", "conf", "--config-name", "mine", *small)
    assert result.code == 0, result.err
    config = yaml.safe_load(only(tmp_path, "outputs/train/*/config.yaml").read_text())
    assert (config["epochs"], config["seed"]) == (1, 7)


PACKAGE = """\
    from typing import Annotated

    import torch
    from annotated_types import Ge


    class SignSGD(torch.optim.Optimizer):
        def __init__(self, params, *, lr: Annotated[float, Ge(0)], flip: bool) -> None:
            super().__init__(params, {"lr": lr, "flip": flip})

        @torch.no_grad()
        def step(self, closure=None):
            loss = None if closure is None else torch.enable_grad()(closure)()
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.add_(p.grad.sign(), alpha=-group["lr"])
            return loss
    """


@pytest.fixture
def own(tmp_path: Path) -> list[str]:
    """A package in the current folder, a config folder, and the line that uses both."""
    name = f"package_of_{tmp_path.name}"  # modules stay imported: another name for each test
    write(tmp_path / name / "optim.py", PACKAGE)
    write(tmp_path / "conf/optimizer/sign_sgd.yaml", f"""\
        # Sign SGD
        _target_: {name}.optim.SignSGD
        lr: 0.01 # learning rate
        flip: false # of no use
        """)  # fmt: skip
    return ["--config-dir", "conf", "optimizer=sign_sgd", f"allow_packages=[{name}]"]


def test_custom_component(tmp_path: Path, own: list[str]) -> None:
    result = dlopt(tmp_path, "train", *SMALL, *own, "optimizer.lr=0.02")
    assert result.code == 0, result.err
    run = only(tmp_path, "outputs/train/*/")
    assert yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["lr"] == 0.02
    refused(tmp_path, "eval", f"checkpoint={run}/checkpoints/best.pt")  # trust is not taken from a file
    evaluated = dlopt(tmp_path, "eval", f"checkpoint={run}/checkpoints/best.pt", own[-1])
    assert evaluated.code == 0, evaluated.err


def test_custom_component_in_a_sweep(tmp_path: Path, own: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own: see test_failed_job_does_not_stop_others of tests/sweeps."""
    monkeypatch.setattr("dlopt.sweeps.pool.spawn", InProcess)
    monkeypatch.setattr("dlopt.sweeps.pool.warm_up", lambda: None)
    result = dlopt(tmp_path, "train", "-m", *SMALL, *own, "optimizer.lr=0.01,0.02")
    assert result.code == 0, result.err
    assert len(list(tmp_path.glob("outputs/train/*/[01]/summary.json"))) == 2


def test_custom_component_requires_trust(tmp_path: Path, own: list[str]) -> None:
    message = refused(tmp_path, "train", *SMALL, *own[:-1])
    assert own[-1] in message


def test_custom_component_is_checked(tmp_path: Path, own: list[str]) -> None:
    assert "optimizer.lr=-1" in refused(tmp_path, "train", *SMALL, *own, "optimizer.lr=-1")
    assert "optimizer.flip=2" in refused(tmp_path, "train", *SMALL, *own, "optimizer.flip=2")
    advice = "did you mean optimizer.flip? if not, add the key to the file of this choice"
    assert advice in refused(tmp_path, "train", *SMALL, *own, "optimizer.flop=true")
    advice = "the file of this choice does not list it: add it there, or type +optimizer.rho=0.1"
    assert advice in refused(tmp_path, "train", *SMALL, *own, "optimizer.rho=0.1")


def test_custom_choice_is_listed(tmp_path: Path, own: list[str]) -> None:
    assert "sign_sgd" in dlopt(tmp_path, "train", "--config-dir", "conf", "--help").out
    assert "sign_sgd" in refused(tmp_path, "train", "--config-dir", "conf", "optimizer=sign_sg")


def test_custom_choice_of_a_shipped_callable(tmp_path: Path) -> None:
    write(tmp_path / "conf/optimizer/heavy.yaml", "defaults: [sgd, _self_]\nmomentum: 0.99\n")
    result = dlopt(tmp_path, "train", "--config-dir", "conf", "optimizer=heavy", *SMALL)
    assert result.code == 0, result.err
    config = yaml.safe_load(only(tmp_path, "outputs/train/*/config.yaml").read_text())
    assert (config["optimizer"]["momentum"], config["optimizer"]["lr"]) == (0.99, 0.1)


def test_a_file_that_dlopt_would_hide_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "conf/optimizer/sgd.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("_target_: torch.optim.SGD\nlr: 0.5\n")
    message = refused(tmp_path, "train", "--config-dir", "conf", "optimizer=sgd", *SMALL)
    assert "--config-dir=conf: optimizer/sgd.yaml is also a file of dlopt; rename it" in message
    path.write_bytes((config_folder() / "optimizer/sgd.yaml").read_bytes())  # a copy of dlopt's folder is harmless
    assert dlopt(tmp_path, "train", "--config-dir", "conf", "optimizer=sgd", *SMALL).code == 0


@pytest.mark.parametrize(
    ("entry", "typed", "message"),
    [
        ("'/sub/bomb'", "experiment=mine", "--config-dir=conf: sub/bomb.yaml has aliases that expand"),
        ("override /sub: bomb", "experiment=mine", "--config-dir=conf: sub/bomb.yaml has aliases that expand"),
        (
            "'/../bomb'",
            "experiment=mine",
            "--config-dir=conf: experiment/mine.yaml has '/../bomb' in its defaults list",
        ),
        ("_self_", "+sub=bomb", "--config-dir=conf: sub/bomb.yaml has aliases that expand"),
        ("_self_", "experiment=../../bomb", "--config-dir=conf: ../bomb.yaml has aliases that expand"),
    ],
)
def test_files_are_checked_wherever_the_choices_lead(entry: str, typed: str, message: str, tmp_path: Path) -> None:
    """Aliases that expand to 9^8 values would keep the composition busy for hours."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{n}: &{n} [{', '.join([f'*{former}'] * 9)}]" for former, n in zip("abcdefg", "bcdefgh", strict=True)]
    for path in ("conf/sub/bomb.yaml", "bomb.yaml"):
        write(tmp_path / path, "\n".join(lines))
    write(tmp_path / "conf/experiment/mine.yaml", f"# @package _global_\ndefaults: [{entry}]\nseed: 1\n")
    assert message in refused(tmp_path, "train", "--config-dir", "conf", typed, *SMALL)


# -- files with random mistakes: accepted or refused, never another exception

PARTS = (
    "\t", "\n", "  ", ":", ": ", "- ", "[", "]", "{", "}", "&a ", "*a", "!!python/object/apply:os.system [x]\n", "!x ",
    "? ", "|", ">", "'", '"', "#", "%", "@", "`", "---\n", "...\n", "<<: *a\n", "${seed}", "${", "???", "~", ".nan",
    "2026-13-45", "1:30", "9" * 30, "9" * 5000, "\0", "\x85", "\ufeff", "é", "\u202e", "# @package _global_\n",
    "# @package a.b\n", "# @package ${x}\n", "defaults:\n", "defaults: 3\n", "defaults: [' ']\n", "defaults: [null]\n",
    "defaults: [[x]]\n", "defaults: [{' ': x}]\n", "defaults: [{'': x}]\n", "defaults: [{a: b, c: d}]\n",
    "defaults: [{override /optimizer: adam}]\n", "defaults: [{optimizer: null}]\n", "defaults: ['${seed}']\n",
    "_target_: os.system\n", "_target_: null\n", "_target_: [1]\n", "hydra: 3\n", "hydra: {run: {dir: x}}\n", "1: 2\n",
    "null: 1\n", "true: 1\n", "[1]: 2\n", "{a: b}: c\n", "a.b: 1\n", "=: 1\n", "'': 1\n", "optimizer: 3\n", "seed: x\n",
)  # fmt: skip


def with_mistakes(text: str, draw: Random) -> str:
    for _ in range(draw.choice([1, 1, 2, 4])):
        at = draw.randrange(len(text) + 1)
        line = text.rfind("\n", 0, at) + 1
        text = draw.choice([
            text[:line] + draw.choice(PARTS) + text[line:], text[:at] + draw.choice(PARTS) + text[at:],
            text[:at], text[:at] + text[at + draw.randrange(20) :],
        ])  # fmt: skip
    return text


def test_random_files(tmp_path: Path) -> None:
    """Each is checked before its composition, which takes long; some are composed as well."""
    draw, ends = Random(0), Counter[str]()
    texts = [(group, (config_folder() / f"{group}/{name}.yaml").read_text()) for group, name in (
        ("optimizer", "adam"), ("schedule", "cosine"), ("model", "mlp"), ("experiment", "study/schedules"),
    )]  # fmt: skip
    for number in range(120):
        group, text = draw.choice(texts)
        path = tmp_path / str(number) / group / "mine.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(changed := with_mistakes(text, draw), encoding="utf-8", newline="")
        try:
            composer = Composer(config_dir=str(tmp_path / str(number)))
            if number % 15 == 0:
                plan(composer, [f"{group}=mine"])
            ends["accepted"] += 1
        except UserError:
            ends["refused"] += 1
        except Exception as error:
            pytest.fail(f"{type(error).__name__} for {changed[:2000]!r}: {error!s:.200}")
    assert ends["accepted"] > 50 and ends["refused"] > 5
