"""What commands besides `dlopt train` share: their line of `train`'s keys and a few of their own, and their folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from dlopt.config.compose import Composer, parse_arguments
from dlopt.config.schema import check_arguments
from dlopt.errors import UserError
from dlopt.folders import make_new

T = TypeVar("T")

_OF_TRAINING = ("cfg", "hydra_help", "info", "package", "resolve", "run", "shell_completion")  # flags of Hydra's


@dataclass(frozen=True)
class Line:
    overrides: list[str]
    config_name: str | None
    config_dir: str | None

    def composer(self, config: str | None = None) -> Composer:
        """`config`: the file in conf/, where it is not train.yaml."""
        return Composer(self.config_name or config, self.config_dir)


def read_line(arguments: list[str], usage: str, *, several: str) -> Line | None:
    """What was typed behind a command; None where its help was asked for, which is printed.

    `several`: what -m is answered with. Raises `UserError`.
    """
    parsed = parse_arguments(arguments)
    if parsed.help:
        print(usage, end="")
        return None
    if parsed.multirun:
        raise UserError(f"-m: {several}")
    for flag in _OF_TRAINING:
        if getattr(parsed, flag):
            raise UserError(f"--{flag.replace('_', '-')}: this is for `dlopt train` alone")
    return Line(parsed.overrides, parsed.config_name, parsed.config_dir)


def own_keys(composer: Composer, overrides: Sequence[str], kind: type[T]) -> tuple[T, list[str]]:
    """The keys of a command alone, as its dataclass `kind`, and the overrides that are left. Raises `UserError`."""
    names: Sequence[str] = [*kind.__dataclass_fields__]  # type: ignore[attr-defined]
    mine = [line for line in overrides if line.partition("=")[0] in names]
    parsed = composer.parse(mine)
    for override in parsed:
        if override.is_sweep_override():
            raise UserError(f"{override.input_line}: one value is needed; a list is written [a,b]")
    values: dict[str, Any] = {override.get_key_element(): override.value() for override in parsed}
    return kind(**check_arguments("", kind, values)), [line for line in overrides if line not in mine]


def refuse_several(composer: Composer, overrides: Sequence[str], why: str) -> None:
    """Raises `UserError` for a key with several values, saying why one is needed."""
    for override in composer.parse(list(overrides)):
        if override.is_sweep_override():
            raise UserError(f"{override.input_line}: {why}; a list is written [a,b]")


def output_folder(output: str | None, command: str) -> Path:
    """The folder `output`, made if need be, or a new one of the command's. Raises `UserError`."""
    if output is None:
        return make_new(Path("outputs") / command / datetime.now().strftime("%Y-%m-%d_%H-%M-%S"), "output")
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output={output}: this is a file; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={output}: the folder cannot be made: {error.strerror}") from None
    return folder


def not_written(folder: Path, error: OSError) -> UserError:
    return UserError(f"output={folder}: nothing can be written there: {error.strerror or error}")
