"""The key of the folder, which the plots of `dlopt trajectory` share."""

from typing import Annotated

Output = Annotated[str | None, "DIR: folder of the plots, PNG and SVG (default: outputs/trajectory/DATE_TIME)"]
