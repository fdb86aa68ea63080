"""What the benchmarks share: the key of their folder, and the files in it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from dlopt.basics.plain_values import without_nan
from dlopt.extend import write_json, writing
from dlopt.results import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Output = Annotated[str | None, "DIR: folder of the plot and the results (default: outputs/scaling/DATE_TIME)"]


def save(figure: "Figure", folder: Path, name: str, records: Any) -> None:
    """Saves the plot and the records as NAME.png, .svg and .json, and prints the paths."""
    path = folder / f"{name}.json"
    with writing(folder):
        write_json(path, without_nan(records), indent=1)
        written = [*drawing.save(figure, folder, name), path]
    print(*written, sep="\n")
