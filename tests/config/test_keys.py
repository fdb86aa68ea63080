"""Roles of keys: every key declares one, and unknown keys count as part of a run's identity."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from dlopt.basics.plain_values import flatten
from dlopt.basics.roles import Role
from dlopt.config.compose import Composer
from dlopt.config.keys import ROLES, role_of
from dlopt.config.overrides import group_of, key_of
from dlopt.config.resolve import to_plain
from dlopt.config.run_config import GROUPS
from dlopt.data.settings import DataSettings

CONF = Path(__file__).parents[2] / "conf"


def test_every_key_of_a_run_declares_its_role() -> None:
    plain, _ = to_plain(Composer().compose([]))
    of_run = {key for key in flatten(plain) if key.partition(".")[0] not in GROUPS}
    of_data = {f"data.{each.name}" for each in fields(DataSettings)}
    assert not (of_run | of_data | set(GROUPS)) - set(ROLES)


def test_every_declared_key_exists() -> None:
    plain, _ = to_plain(Composer().compose(["data=image_folder", "data.root=x"]))
    others = {"hydra", "experiment", "debug", "from", "run_id", "directions"}  # the last two: dlopt sets them
    others |= {"data.offline", "data.standardize_target", "loss.teacher"}  # of a choice
    others |= {"data.group", "data.order", "data.weight"}
    assert set(ROLES) - others <= {*flatten(plain), *GROUPS}


@pytest.mark.parametrize(
    ("key", "role"),
    [
        ("optimizer.lr", Role.IDENTITY),
        ("model.widths", Role.IDENTITY),
        ("data.batch_size", Role.IDENTITY),
        ("precision", Role.IDENTITY),  # resumed in another precision, a run is another one
        ("deterministic", Role.IDENTITY),
        ("init_from", Role.IDENTITY),
        ("data.split_seed", Role.SEED),
        ("data.folds", Role.IDENTITY),
        ("data.fold", Role.SEED),  # the runs of a configuration differ in it
        ("optimizer.seed", Role.SEED),
        ("monitor", Role.PROTOCOL),
        ("monitor_mode", Role.PROTOCOL),
        ("evaluate", Role.PROTOCOL),
        ("schedule_epochs", Role.LENGTH),
        ("compile", Role.PLACE),
        ("threads", Role.PLACE),
        ("data.root", Role.PLACE),
        ("data.workers", Role.PLACE),
        ("parallel.processes", Role.PLACE),
        ("hydra/launcher", Role.PLACE),
        ("checkpoint.keep", Role.WATCH),
        ("profile", Role.WATCH),
        ("max_time", Role.WATCH),  # interrupts a run, which a later one continues to the same end
        ("tags", Role.WATCH),  # describe a run: may change when it is resumed
        ("note", Role.WATCH),
        ("resume", Role.COMMAND),
        ("experiment", Role.COMMAND),
        ("of.another.version", Role.IDENTITY),
    ],
)
def test_role(key: str, role: Role) -> None:
    assert role_of(key) is role and role_of(f"++{key}=1") is role


def test_key_of_an_override() -> None:
    assert key_of("++hydra/launcher=a/b") == "hydra.launcher" and key_of("model@x=y") == "model"
    assert group_of("+schedule.warmup_epochs=1") == "schedule" and key_of("~seed") == "seed"


def test_roles_are_looked_up_without_torch() -> None:
    code = "import sys, dlopt.config.keys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
