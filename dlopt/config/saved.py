"""Shared by the commands on checkpoints: parses their arguments and changes keys of a saved config."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dlopt.config.choices import config_folder
from dlopt.config.overrides import parse_overrides, quoted, refuse_several
from dlopt.config.schema import show
from dlopt.config.synonyms import for_flag
from dlopt.errors import UserError, did_you_mean


def typed_values(arguments: Iterable[str]) -> dict[str, Any]:
    """Parses `key=value` arguments. Raises `UserError`."""
    arguments = list(arguments)
    if hint := for_flag(arguments, ()):
        raise UserError(hint)
    for argument in arguments:
        is_override = "=" in argument or argument.startswith("~")
        if not is_override or Path(argument).is_file():  # a path may contain an equals sign
            raise UserError(f"{argument}: an override is key=value; for a checkpoint: checkpoint={argument}")
    parsed = parse_overrides(map(quoted, arguments))
    refuse_several(parsed)
    return {override.get_key_element(): override.value() for override in parsed}


def take_path(values: dict[str, Any], command: str) -> Path:
    """Removes `checkpoint` from `values` and returns its path. Raises `UserError` if there is none."""
    path = values.pop("checkpoint", None)
    if not isinstance(path, str) or not path:
        raise UserError(f"checkpoint: a path is needed: dlopt {command} checkpoint=outputs/.../checkpoints/best.pt")
    return Path(path)


def checkpoint_file(path: Path) -> Path:
    """Returns the checkpoint file for a path to a file, a run folder or its checkpoints folder.

    In a folder: best.pt, or else last.pt. Raises `UserError` for a folder without either.
    """
    if not path.is_dir():
        return path
    for folder in (path, path / "checkpoints"):
        for name in ("best.pt", "last.pt"):
            if (folder / name).is_file():
                return folder / name
    raise UserError(f"checkpoint={path}: this folder contains neither best.pt nor last.pt")


def refuse_others(keys: Iterable[str], may_change: Sequence[str], command_keys: Iterable[str]) -> None:
    """Raises `UserError` for a key of the saved config that may not be changed."""
    names = [*command_keys]
    for key in keys:
        if key.split(".")[0] in may_change:
            continue
        raise UserError(
            f"{key}: {did_you_mean(key, [*names, *may_change])}the config is the checkpoint's; only "
            f"{', '.join(may_change)} may be changed; keys of this command: {', '.join(names)}"
        )


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
    config = OmegaConf.create({**saved, "parallel": single, "allow_packages": trusted})
    OmegaConf.set_struct(config, True)
    for key, value in changes.items():
        if isinstance(saved.get(key), Mapping):
            raise UserError(
                f"{key}={show(value)}: the checkpoint fixes the choices; only their keys can be set: {key}.KEY=VALUE"
            )
        try:
            OmegaConf.update(config, key, value, merge=False)
        except OmegaConfBaseException:
            raise UserError(f"{key}={value}: the checkpoint's config has no such key") from None
    plain: Any = OmegaConf.to_container(config, resolve=False)
    return {str(key): value for key, value in plain.items()}
