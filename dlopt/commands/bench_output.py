"""How the benchmarks write what they find."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlopt.commands.line import not_written

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save(figure: "Figure", folder: Path, name: str, figures: Any) -> None:
    """Writes picture and figures, and prints where they are."""
    from dlopt.analysis import drawing

    try:
        (folder / f"{name}.json").write_text(json.dumps(_without_nan(figures), indent=1) + "\n")
        paths = [*drawing.save(figure, folder, name), folder / f"{name}.json"]
    except OSError as error:
        raise not_written(folder, error) from None
    for path in paths:
        print(path)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null stands for what there is no figure of."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
