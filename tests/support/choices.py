"""The choices of config groups that dlopt ships."""

from pathlib import Path

CONF = Path(__file__).parents[2] / "conf"


def files(group: str) -> list[Path]:
    """Returns the files of a group's choices, except fragments and `custom`, which has no callable of its own."""
    paths = (path for path in (CONF / group).glob("*.yaml") if not path.stem.startswith("_"))
    return sorted(path for path in paths if path.stem != "custom" or group == "data")


def names(group: str) -> list[str]:
    return [path.stem for path in files(group)]


# Optimizers that precision=bf16_pure refuses, and the class that the message names.
REFUSED_IN_PURE_BF16 = {
    "bfgs": "BFGS", "dfp": "BFGS", "lbfgs": "LBFGS", "newton": "Newton", "newton_cg": "NewtonCG",
    "newton_undamped": "UndampedNewton", "prodigy": "Prodigy", "sam": "SAM", "schedule_free_adamw": "ScheduleFreeAdamW",
    "schedule_free_sgd": "ScheduleFreeSGD", "sophia": "Sophia",
}  # fmt: skip
