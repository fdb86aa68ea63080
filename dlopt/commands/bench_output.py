"""What the benchmarks share: keys of their own, and a folder for what they find."""

import json
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlopt.config.compose import Composer
from dlopt.config.schema import check_arguments
from dlopt.errors import UserError
from dlopt.folders import make_new

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def own_keys(composer: Composer, overrides: Sequence[str], kind: type) -> tuple[dict[str, Any], list[str]]:
    """The checked values of the keys that `kind` names, and the overrides that are left."""
    names = kind.__annotations__
    mine = [line for line in overrides if line.partition("=")[0] in names]
    parsed = composer.parse(mine)
    for override in parsed:
        if override.is_sweep_override():
            raise UserError(f"{override.input_line}: one value is needed; a list is written [a,b]")
    values = {str(override.get_key_element()): override.value() for override in parsed}
    return check_arguments("", kind, values), [line for line in overrides if line not in mine]


def output_folder(output: str | None) -> Path:
    """The folder for pictures and figures, made."""
    try:
        if output is None:
            return make_new(Path("outputs/bench") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S"), "output")
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except OSError as error:
        raise UserError(f"output={output}: the folder cannot be made: {error.strerror}") from None


def save(figure: "Figure", folder: Path, name: str, figures: Any) -> None:
    """Writes picture and figures, and prints where they are."""
    from dlopt.analysis import drawing

    try:
        (folder / f"{name}.json").write_text(json.dumps(_without_nan(figures), indent=1) + "\n")
        paths = [*drawing.save(figure, folder, name), folder / f"{name}.json"]
    except OSError as error:
        raise UserError(f"output={folder}: nothing can be written there: {error.strerror}") from None
    for path in paths:
        print(path)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null stands for what there is no figure of."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
