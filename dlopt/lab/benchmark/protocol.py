"""The protocol of a benchmark: workloads with targets, search spaces, and the trials of a budget.

It has the two tracks of AlgoPerf (Dahl et al. 2023). In external tuning, trials draw hyperparameters quasi-randomly
from the search space of each optimizer. A study is one such sample; several studies show the luck of tuning.
In self-tuning, nothing is searched: each study is one trial with fixed keys, and has three times the updates.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval

from dlopt.basics.plain_values import load_yaml
from dlopt.extend import Names, UserError, show

FOLDER = "benchmark"  # in the laboratory and in a --config-dir
Budget = Literal["tiny", "small", "large"]
BUDGETS: Mapping[Budget, tuple[int, int]] = {"tiny": (1, 3), "small": (3, 10), "large": (5, 20)}
"""Name -> (studies, trials per study). `large` is AlgoPerf's."""
BASELINES = ("sgd", "rmsprop", "adamw", "nadam")
"""Optimizers whose results define the targets."""
Track = Literal["external_tuning", "self_tuning"]
SELF_TUNING_LENGTH = 3  # times the updates of external tuning, as in AlgoPerf
TARGET_FRACTION = 0.75  # of a run, at which the baselines define the target


@dataclass(frozen=True, kw_only=True)
class WorkloadSpec:
    """A workload: its experiment, the metric that decides, the target (None: not fixed), the overrides of a variant.

    Training builds the same thing from the experiment: a `Workload` is its data, model and loss, without the target.
    """

    experiment: str
    metric: str
    target: Annotated[float, Interval(ge=-1e30, le=1e30)] | None
    overrides: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Tier:
    """A set of workloads, benchmark/tier/NAME.yaml."""

    name: str
    workloads: Mapping[str, WorkloadSpec]

    def select(self, names: Sequence[str] | None) -> "Tier":
        """Returns the tier with the named workloads (None for all). Raises `UserError` for an unknown name."""
        for name in names or ():
            Names("workload", self.workloads, "dlopt benchmark --help", "workloads=").check(name)
        kept = {key: value for key, value in self.workloads.items() if names is None or key in names}
        return Tier(name=self.name, workloads=kept)


@dataclass(frozen=True)
class Trial:
    """One trial: its place in the table. Its seed is the number of its study."""

    workload: str
    optimizer: str
    study: int
    number: int

    @property
    def subfolder(self) -> str:
        return f"{self.optimizer}/{self.workload}/{self.study}-{self.number}"


@dataclass(frozen=True, kw_only=True)
class _TierFile:
    """`version`: draws the variants of the workloads."""

    workloads: dict[str, dict[str, Any]]
    version: int = 1


@dataclass(frozen=True, kw_only=True)
class _WorkloadFile:
    """`variants`: lists of overrides, one of which is drawn; without them, the experiment itself."""

    experiment: str
    metric: str
    target: float | None
    variants: list[list[str]] = field(default_factory=list)


def load_tier(name: str, config_dir: str | None) -> Tier:
    """Reads a tier from --config-dir or dlopt's folder. Raises `UserError`."""
    from dlopt.extend import check_arguments  # with pydantic, which the help does not need

    path = _find("tier", name, config_dir)
    if path is None:
        raise Names("tier", _names("tier", config_dir), "dlopt benchmark --help", "tier=").unknown(name)
    content = check_arguments(f"{path.name}", _TierFile, _load(path))
    version = content.get("version", 1)
    workloads = {
        key: _workload(key, version, check_arguments(f"{path.name}: workloads.{key}", _WorkloadFile, value))
        for key, value in content["workloads"].items()
    }
    if not workloads:
        raise UserError(f"tier={name}: {path} has no workloads")
    return Tier(name=name, workloads=workloads)


def _workload(name: str, version: int, content: Mapping[str, Any]) -> WorkloadSpec:
    """Returns a workload, with the variant that the tier's version draws."""
    fields = dict(content)
    variants = fields.pop("variants", None)
    return WorkloadSpec(**fields, overrides=random.Random(f"{version} {name}").choice(variants) if variants else [])


def load_space(optimizer: str, config_dir: str | None) -> list[str]:
    """Returns the overrides of an optimizer's search space, some with a range in Hydra's notation.

    An optimizer without its own file gets that of `_default`. Raises `UserError`.
    """
    path = _find("space", optimizer, config_dir) or _find("space", "_default", config_dir)
    assert path is not None
    return _overrides(path)


def _overrides(path: Path) -> list[str]:
    content = _load(path)
    if not isinstance(content, dict) or not all(
        isinstance(value, str | int | float | list) for value in content.values()
    ):
        raise UserError(f"{path}: must map keys to ranges or values: optimizer.lr: tag(log,interval(0.001,0.1))")
    return [f"{key}={show(value)}" for key, value in content.items()]


def load_fixed(optimizer: str, config_dir: str | None) -> list[str]:
    """Returns the overrides of an optimizer in self-tuning; none without its own file. Raises `UserError`."""
    path = _find("space", f"{optimizer}_self_tuning", config_dir)
    return [] if path is None else _overrides(path)


def has_space(optimizer: str, config_dir: str | None) -> bool:
    return _find("space", optimizer, config_dir) is not None


def _find(kind: str, name: str, config_dir: str | None) -> Path | None:
    if "/" in name or name.startswith("."):
        return None
    paths = [folder / FOLDER / kind / f"{name}.yaml" for folder in _folders(config_dir)]
    return next((path for path in paths if path.is_file()), None)


def _names(kind: str, config_dir: str | None) -> list[str]:
    paths = [path for folder in _folders(config_dir) for path in sorted((folder / FOLDER / kind).glob("[!_]*.yaml"))]
    return [path.stem for path in paths]


def _folders(config_dir: str | None) -> list[Path]:
    return [*([] if config_dir is None else [Path(config_dir)]), Path(__file__).parents[1]]


def _load(path: Path) -> Any:
    try:
        return load_yaml(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def trials_of(workloads: Sequence[str], optimizers: Sequence[str], studies: int, trials: int) -> Iterator[Trial]:
    """Yields all trials, the first of each study first: an interrupted benchmark has a smaller budget everywhere."""
    for number, study, workload, optimizer in product(range(trials), range(studies), workloads, optimizers):
        yield Trial(workload, optimizer, study, number)


def target_of(curves: Sequence[Sequence[Sequence[tuple[int, float]]]], updates: int, lower_is_better: bool) -> float:
    """Returns the target of a workload: the median over studies of the best value at three quarters of a full run.

    With an even number of studies, the easier of the two middle values is used.

    Args:
        curves: of the baselines, for each study (of any of them) the (updates, value) curves of its trials.
        updates: of a full run.
    """
    sign = 1.0 if lower_is_better else -1.0
    best = []
    for study in curves:
        points = [point for curve in study for point in curve if point[0] <= TARGET_FRACTION * updates]
        best.append(min((sign * value for _, value in points if math.isfinite(value)), default=math.inf))
    return sign * sorted(best)[len(best) // 2]
