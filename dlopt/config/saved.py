"""Shared by the commands on checkpoints: parses their arguments and changes keys of a saved config."""

import glob
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dlopt.basics.errors import UserError
from dlopt.config.choices import config_folder
from dlopt.config.flags import flags
from dlopt.config.overrides import parse_overrides, parts_of, quoted, single_values
from dlopt.config.parameters import show
from dlopt.config.reads import unavailable
from dlopt.config.synonyms import for_flag
from dlopt.config.validation_sets import KEY


def typed_values(arguments: Iterable[str]) -> dict[str, Any]:
    """Parses `key=value` arguments. Raises `UserError`."""
    arguments = list(arguments)
    refuse_flags(arguments)
    for argument in arguments:
        if "=" not in argument and not argument.startswith("~"):
            raise UserError(f"{argument}: an override is key=value")
    return single_values(parse_overrides(map(quoted, arguments)))


def refuse_flags(arguments: Sequence[str]) -> None:
    """Raises `UserError` for a flag: flags of other commands, and `--tta flip` for tta=flip."""
    for argument in arguments:
        if (flag := parts_of(argument)[0]) in flags():
            raise UserError(unavailable(flag))
    if hint := for_flag(arguments, ()):
        raise UserError(hint)


def take_paths(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """Splits arguments into paths and the others: `dlopt eval RUN` needs no `checkpoint=`.

    A path may contain an equals sign, if it exists.
    """
    arguments = list(arguments)
    paths = [each for each in arguments if each[:1] not in ("-", "~") and ("=" not in each or os.path.exists(each))]
    return paths, [each for each in arguments if each not in paths]


def take_checkpoints(values: dict[str, Any], command: str, several: bool) -> list[Path]:
    """Removes `checkpoint` from `values` and returns its file, or with `several` the files of a list or glob pattern.

    Raises `UserError` if there is none.
    """
    typed = values.pop("checkpoint", None)
    if several and isinstance(typed, list):
        if not typed or not all(isinstance(path, str) and path for path in typed):
            raise UserError(f"checkpoint={show(typed)}: must be paths: checkpoint=[a/best.pt,b/best.pt]")
        return [checkpoint_file(Path(path)) for path in typed]
    if not isinstance(typed, str) or not typed:
        raise UserError(f"checkpoint: a path is needed: dlopt {command} outputs/train/DATE")
    path = Path(typed)
    is_pattern = several and "*" in path.name and not path.exists()
    return [checkpoint_file(Path(match)) for match in (sorted(glob.glob(typed)) if is_pattern else []) or [typed]]


def checkpoint_file(path: Path, key: str = "checkpoint") -> Path:
    """Returns the checkpoint file for a path to a file, a run folder or its checkpoints folder.

    In a folder: best.pt, or else last.pt. Raises `UserError` for a folder without either.
    """
    if not path.is_dir():
        return path
    if (found := _checkpoint_in(path)) is None:
        raise UserError(f"{key}={path}: this folder contains neither best.pt nor last.pt")
    return found


def has_checkpoint(folder: Path) -> bool:
    """Returns whether a folder is a run with a checkpoint, or its checkpoints folder."""
    return _checkpoint_in(folder) is not None


def _checkpoint_in(path: Path) -> Path | None:
    files = (folder / name for folder in (path, path / "checkpoints") for name in ("best.pt", "last.pt"))
    return next((file for file in files if file.is_file()), None)


def unwatched(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a saved config without the services and observers of its training, which this machine may not have."""
    return {**saved, "tracking": [], "observers": [], "diagnostics": []}


def with_changes(saved: Mapping[str, Any], overrides: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Returns the saved config with `overrides` applied and with parallel=single, whatever the run was trained with.

    Does not trust the packages that the file names: `allow_packages` must be in `overrides`. Raises `UserError`.
    """
    changes = dict(overrides)
    trusted = changes.pop("allow_packages", [])
    if saved.get("allow_packages") and not trusted:
        names = ",".join(saved["allow_packages"])
        raise UserError(f"checkpoint={path}: names callables of {names}; to trust them, set allow_packages=[{names}]")
    single = OmegaConf.to_container(OmegaConf.load(config_folder() / "parallel" / "single.yaml"))
    config = OmegaConf.create({**unwatched(saved), "parallel": single, "allow_packages": trusted})
    OmegaConf.set_struct(config, True)
    for key, value in changes.items():
        if isinstance(saved.get(key), Mapping) and (key, value) != (KEY, None):  # null: without the validation sets
            raise UserError(
                f"{key}={show(value)}: the checkpoint fixes the choices; only their keys can be set: {key}.KEY=VALUE"
            )
        try:
            OmegaConf.update(config, key, value, merge=False)
        except OmegaConfBaseException:
            raise UserError(f"{key}={value}: the checkpoint's config has no such key") from None
    plain: Any = OmegaConf.to_container(config, resolve=False)
    return {str(key): value for key, value in plain.items()}
