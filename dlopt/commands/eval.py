"""`dlopt eval`: tests a checkpoint with the config that it holds."""

import json
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dlopt.config.compose import explain_grammar, resolve_saved
from dlopt.errors import RunError, UserError
from dlopt.job import DONE, FAILED, complain

_MAY_CHANGE = (
    "data", "device", "precision", "threads", "channels_last", "compile", "deterministic", "norm_statistics",
    "allow_packages",
)  # fmt: skip
_USAGE = f"""\
dlopt eval checkpoint=PATH [key=value]

Tests the weights in a checkpoint (outputs/NAME/DATE/checkpoints/best.pt) with the config that stands in it.
Keys that may be changed: {", ".join(f"{key}.*" if key == "data" else key for key in _MAY_CHANGE)}"""


def evaluate(arguments: list[str]) -> int:
    """Tests the best weights of `checkpoint=PATH` once; prints the figures and writes eval.json beside the run."""
    if {"-h", "--help"} & set(arguments):
        print(_USAGE)
        return DONE
    from dlopt import build
    from dlopt.config.experiment import parse
    from dlopt.engine.checkpoint import load
    from dlopt.run import test_figures
    from dlopt.tracking.console import ConsoleView

    path, overrides = _parse(arguments)
    state = load(path)
    config = _with(state["config"], overrides, path)
    experiment = parse(resolve_saved(config))
    try:
        setup = build.set_up(experiment, state["normalize"])
        if setup.dataset.test is None:
            raise UserError(f"data={experiment.data.target.__name__}: this dataset has no test set")
        setup.module.load_state_dict(state["ema"] or state["model"])
        figures = {"checkpoint": str(path), "epoch": state["progress"]["epoch"], **test_figures(setup)}
    except RunError as error:
        complain(str(error))
        return FAILED
    lines = [f"checkpoint: {path}"]
    run = path.absolute().parent.parent
    if (run / "config.yaml").is_file():
        (run / "eval.json").write_text(json.dumps(figures, indent=2) + "\n")
        lines.append(f"figures: {run / 'eval.json'}")
    ConsoleView().finish({"status": "tested", "best_epoch": figures["epoch"], **figures}, lines)
    return DONE


def _parse(arguments: list[str]) -> tuple[Path, dict[str, Any]]:
    """The checkpoint, and the keys to change with their values."""
    values = {}
    for line in arguments:
        try:
            [override] = OverridesParser.create().parse_overrides([line])
        except HydraException:
            raise UserError(explain_grammar(line)) from None
        if override.is_sweep_override():
            raise UserError(f"{line}: one value is needed; a list is written [a,b]")
        values[override.get_key_element()] = override.value()
    checkpoint = values.pop("checkpoint", None)
    if not isinstance(checkpoint, str) or not checkpoint:
        raise UserError("checkpoint: a path is needed: dlopt eval checkpoint=outputs/.../checkpoints/best.pt")
    for key in values:
        if key.split(".")[0] not in _MAY_CHANGE:
            raise UserError(f"{key}: the config is the checkpoint's; only {', '.join(_MAY_CHANGE)} may be changed")
    return Path(checkpoint), values


def _with(saved: dict[str, Any], overrides: dict[str, Any], path: Path) -> dict[str, Any]:
    """The saved config with the typed keys changed. Trust in packages is not taken from the file."""
    trusted = overrides.pop("allow_packages", [])
    if saved.get("allow_packages") and not trusted:
        names = ",".join(saved["allow_packages"])
        raise UserError(f"checkpoint={path}: it names callables of {names}; trust them by allow_packages=[{names}]")
    config = OmegaConf.create({**saved, "allow_packages": trusted})
    OmegaConf.set_struct(config, True)
    for key, value in overrides.items():
        try:
            OmegaConf.update(config, key, value, merge=False)
        except OmegaConfBaseException:
            raise UserError(f"{key}={value}: the checkpoint's config has no such key") from None
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
