"""The role of each key (`dlopt.basics.roles`), by its dotted name. Imports no torch.

Keys declare their roles with their types: those of a run in `dlopt.config.settings`, those of every data set in
`dlopt.data.settings`. All keys of a group have the role of the group, except the data's. A key that nobody declares,
such as one of another package, is part of the run's identity: the careful answer.
"""

import dataclasses
import functools
import typing
from collections.abc import Mapping

from dlopt.basics.plain_values import join
from dlopt.basics.roles import Role
from dlopt.config.overrides import key_of
from dlopt.config.packages import entries
from dlopt.config.settings import GROUPS, Settings
from dlopt.data.settings import DataSettings


def _declared(schema: type, prefix: str = "") -> dict[str, Role]:
    """Returns the roles of the fields of a dataclass and of the dataclasses in it, by dotted key."""
    roles: dict[str, Role] = {}
    for name, hint in typing.get_type_hints(schema, include_extras=True).items():
        key = join(prefix, name)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            roles |= _declared(hint, key)
        else:
            roles.update((key, extra) for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Role))
    return roles


LABELS = ("tags", "note")
"""Keys that describe a run for its readers, and change nothing that it computes."""
ROUNDING = ("precision", "deterministic")
"""Keys of a run's identity that decide how its numbers are rounded, but not what it computes in exact arithmetic."""
ROLES: Mapping[str, Role] = {
    **dict.fromkeys(GROUPS, Role.IDENTITY),  # of all keys of a group that have no role of their own
    "parallel": Role.PLACE,
    "hydra": Role.PLACE,
    "experiment": Role.COMMAND,  # a run's config has the effects of its recipe, key by key
    "debug": Role.COMMAND,
    "from": Role.COMMAND,
    **_declared(Settings),
    **_declared(DataSettings, "data"),
    "data.root": Role.PLACE,  # an argument of the data sets that are read from a folder
    "loss.teacher": Role.PLACE,  # loss.teacher_sha256 identifies the teacher
    "data.offline": Role.PLACE,  # where data=huggingface looks for the data
}
"""Roles by dotted key; a key without an entry has the role of its parent. Those of packages: see `role_of`."""


@functools.cache
def role_of(key: str) -> Role:
    """Returns the role of a dotted key, with or without the signs of an override: `data.root`, `+model.width`."""
    key = key_of(key)
    if is_seed(key):  # also the seeds of a data set or an optimizer
        return Role.SEED
    if key.partition(".")[0] in entries("dlopt.series"):
        return Role.COMMAND
    while key:
        if key in ROLES:
            return ROLES[key]
        # A block such as `checkpoint` has the role that its keys have in common.
        below = {role for name, role in ROLES.items() if name.startswith(f"{key}.")}
        if len(below) == 1:
            return below.pop()
        key = key.rpartition(".")[0]
    return Role.IDENTITY


def is_seed(key: str) -> bool:
    """Returns whether the key is a seed: `seed`, `init_seed`, `data.seed`, ..."""
    name = key.rpartition(".")[2]
    return name == "seed" or name.endswith("_seed")
