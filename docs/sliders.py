"""Writes docs/_static/sliders/paths.js: gradient descent with momentum on quadratics, for the page with sliders.

    .venv/bin/python docs/sliders.py

The paths are those of `dlopt trajectory function=quadratic optimizer=sgd`, for every combination of the condition
numbers, momenta and learning rates below. The page needs no server: it loads the paths as a script.
"""

import json
import sys
from itertools import chain, product
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dlopt.basics.plain_values import load_yaml  # noqa: E402
from dlopt.lab.trajectory.functions import Quadratic, Window  # noqa: E402
from dlopt.lab.trajectory.paths import TOLERANCE, Trajectory, follow  # noqa: E402

PATH = ROOT / "docs/_static/sliders/paths.js"
CONDITIONS = (1, 5, 10, 30, 100)
MOMENTA = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
RATES = (0.002, 0.005, 0.01, 0.018, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
UPDATES = 60
_FAR = 50.0  # coordinates beyond this are far outside of the picture: the path ends there
_FLOOR = 1e-6  # smaller coordinates count as 0


def path(condition: float, momentum: float, rate: float) -> list[list[float]]:
    """Returns the points [x, y] before the first update and after each one; fewer than UPDATES + 1 if it diverges."""
    points = trajectory(condition, momentum, rate).points.tolist()
    end = next((i for i, point in enumerate(points) if max(map(abs, point)) > _FAR), len(points))
    return [[_rounded(each) for each in point] for point in points[:end]]


def trajectory(condition: float, momentum: float, rate: float) -> Trajectory:
    (left, right, bottom, top), (x, y) = _window(), _keys()["start"]
    function = Quadratic(
        condition=condition, angle=0.0, noise=0.0, batch_size=1, start=(x, y), window=(left, right, bottom, top)
    )
    return follow(
        function,
        lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=momentum),
        steps=UPDATES,
        seed=0,
        factor=lambda step: 1.0,
    )


def _keys() -> dict[str, list[float]]:
    keys: dict[str, list[float]] = load_yaml(ROOT / "dlopt/lab/conf/function/quadratic.yaml")
    return keys


def _window() -> Window:
    left, right, bottom, top = _keys()["window"]
    return left, right, bottom, top


def _rounded(value: float) -> float:
    return 0 if abs(value) < _FLOOR else float(f"{value:.4g}")


def script() -> str:
    """Returns the contents of paths.js; paths[i] is of the ith combination, the learning rate varying fastest."""
    content = {
        "conditions": CONDITIONS,
        "momenta": MOMENTA,
        "rates": RATES,
        "updates": UPDATES,
        "tolerance": TOLERANCE,
        "window": _window(),
        "paths": [list(chain.from_iterable(path(*each))) for each in product(CONDITIONS, MOMENTA, RATES)],
    }
    return f"const DATA = {json.dumps(content, separators=(',', ':'))};\n"


if __name__ == "__main__":
    PATH.write_text(script(), encoding="utf-8")
    print(f"{PATH.relative_to(ROOT)}, {PATH.stat().st_size / 1000:.0f} kB")
