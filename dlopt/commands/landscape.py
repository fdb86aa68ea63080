"""`dlopt trajectory checkpoint=...`: the loss landscape around a trained model, with the training's path on it."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Interval

from dlopt.commands.line import not_written, output_folder
from dlopt.config.schema import check_arguments
from dlopt.errors import UserError
from dlopt.ranges import Count, Positive, Seed

if TYPE_CHECKING:
    from dlopt.analysis.landscape import Plane
    from dlopt.train.build import Setup

_MAY_CHANGE = ("data", "device", "threads", "allow_packages")
_LEAST = 3  # checkpoints of a path: two differences span the plane


@dataclass(frozen=True, kw_only=True)
class _Own:
    """The keys of loss landscapes alone."""

    directions: Literal["auto", "random", "path"] = "auto"
    points: Annotated[int, Interval(ge=3, le=501)] = 21
    samples: Count = 500
    span: Positive = 1.0
    seed: Seed = 0
    output: str | None = None


def draw_landscape(arguments: list[str]) -> int:
    """Draws, and prints where the picture is. Raises `UserError`."""
    from dlopt.analysis.drawing import save
    from dlopt.analysis.landscape import draw, surface
    from dlopt.config.compose import resolve_saved
    from dlopt.config.parsing import parse
    from dlopt.config.saved import refuse_others, take_path, typed_values, with_changes
    from dlopt.train.build import set_up
    from dlopt.train.checkpoint import load

    values = typed_values(arguments)
    path = take_path(values, "trajectory")
    mine = {key: values.pop(key) for key in list(values) if key in _Own.__dataclass_fields__}
    own = _Own(**check_arguments("", _Own, mine))
    refuse_others(values, _MAY_CHANGE, _Own.__dataclass_fields__)
    state = load(path)
    setup = set_up(parse(resolve_saved(with_changes(state["config"], values, path))), state["normalize"])
    setup.module.load_state_dict(state["ema"] or state["model"])
    plane = _plane(setup, path, own)
    folder = output_folder(own.output, "trajectory")
    loss, count = _loss(setup, own.samples)
    heights = surface(setup.module, loss, plane, own.points, _progress(own.points**2))
    title = f"Loss around {path}, epoch {state['progress']['epoch']}"
    subtitle = f"{count} training samples, {own.points} x {own.points} points"
    try:
        for written in save(draw(plane, heights, title=title, subtitle=subtitle), folder, "landscape"):
            print(written)
    except OSError as error:
        raise not_written(folder, error) from None
    return 0


def _plane(setup: "Setup", path: Path, own: _Own) -> "Plane":
    """Through the checkpoints beside `path` where there are enough of them, else random."""
    from dlopt.analysis.landscape import path_plane, random_plane
    from dlopt.analysis.probes import checkpoints
    from dlopt.random import generator

    names = [name for name, _ in setup.module.named_parameters()]
    states: list[Mapping[str, Any]] = [] if own.directions == "random" else list(checkpoints(path.parent.parent))
    if own.directions == "path" and len(states) < _LEAST:
        raise UserError(
            f"directions=path: beside {path} there are {len(states)} checkpoints, and {_LEAST} are needed; "
            "train with checkpoint.keep=100"
        )
    if len(states) >= _LEAST:
        weights = [[state["model"][name].to(setup.device) for name in names] for state in states]
        return path_plane(weights, [state["progress"]["step"] for state in states])
    origin = [p.detach().clone() for p in setup.module.parameters()]
    return random_plane(origin, own.span, generator("cpu", own.seed))


def _loss(setup: "Setup", count: int) -> tuple[Any, int]:
    """The loss over evenly chosen training samples, as a function of the module's weights, and how many these are."""
    import torch

    from dlopt.train.build import evaluation_batches

    samples = setup.dataset.train
    indices = torch.linspace(0, len(samples) - 1, min(count, len(samples))).long()
    batches = list(evaluation_batches(setup, samples.select(indices)).epoch(0))
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    model, loss = setup.precision.autocast(setup.model), setup.precision.autocast(setup.loss)
    return lambda: loss(model(inputs), targets), len(indices)


def _progress(total: int) -> Any:
    """Tells a person at a terminal how far it is."""
    if not sys.stderr.isatty():
        return lambda done: None
    return lambda done: print(
        f"\r{done}/{total} points", end="\n" if done == total else "", file=sys.stderr, flush=True
    )
