"""The choices of config groups that dlopt ships."""

from pathlib import Path

CONF = Path(__file__).parents[2] / "conf"


def files(group: str) -> list[Path]:
    """Returns the files of a group's choices, except fragments and `custom`, which has no callable of its own."""
    paths = (path for path in (CONF / group).glob("*.yaml") if not path.stem.startswith("_"))
    return sorted(path for path in paths if path.stem != "custom" or group == "data")


def names(group: str) -> list[str]:
    return [path.stem for path in files(group)]
