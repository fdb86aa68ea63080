"""The choices of config groups that dlopt ships."""

from pathlib import Path
from typing import Any

import yaml

CONF = Path(__file__).parents[2] / "conf"


def files(group: str) -> list[Path]:
    """Returns the files of a group's choices, except fragments and `custom`, which has no callable of its own."""
    paths = (path for path in (CONF / group).glob("*.yaml") if not path.stem.startswith("_"))
    return sorted(path for path in paths if path.stem != "custom" or group == "data")


def names(group: str) -> list[str]:
    return [path.stem for path in files(group)]


def values(group: str, name: str) -> dict[str, Any]:
    """Returns the keys of a choice, with those of the files of its group that it includes; composes no config."""
    own = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    defaults = own.pop("defaults", [])
    included = [each for each in defaults if isinstance(each, str) and each != "_self_" and "@" not in each]
    return {key: value for each in included for key, value in values(group, each).items()} | own


# Optimizers that precision=bf16_pure refuses, and the class that the message names.
REFUSED_IN_PURE_BF16 = {
    "bfgs": "BFGS", "dfp": "BFGS", "lbfgs": "LBFGS", "newton": "Newton", "newton_cg": "NewtonCG",
    "newton_undamped": "UndampedNewton", "prodigy": "optimizer=prodigy", "sam": "SAM",
    "schedule_free_adamw": "optimizer=schedule_free_adamw", "schedule_free_sgd": "optimizer=schedule_free_sgd",
    "sophia": "Sophia",
}  # fmt: skip
