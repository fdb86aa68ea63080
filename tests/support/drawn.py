"""Describes pictures line by line, so that a recorded file shows what a change of the drawing changes."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

_ARTISTS: Mapping[str, Mapping[str, Callable[[Any], Any]]] = {
    "lines": {
        "": lambda each: [each.get_xdata(), each.get_ydata()],
        "colour": lambda each: each.get_color(), "style": lambda each: each._unscaled_dash_pattern,
        "width": lambda each: each.get_linewidth(), "marker": lambda each: each.get_marker(),
        "size": lambda each: each.get_markersize(), "steps": lambda each: each.get_drawstyle(),
        "label": lambda each: each.get_label().partition("_child")[0], "z": lambda each: each.get_zorder(),
        "alpha": lambda each: each.get_alpha(),
    },
    "texts": {
        "": lambda each: each.get_text(), "at": lambda each: getattr(each, "xy", each.get_position()),
        "offset": lambda each: getattr(each, "xyann", None), "colour": lambda each: each.get_color(),
        "size": lambda each: each.get_fontsize(),
        "align": lambda each: [each.get_ha(), each.get_va()],
        "box": lambda each: each.get_bbox_patch() and each.get_bbox_patch().get_facecolor(),
    },
    "patches": {
        "": lambda each: each.get_bbox().bounds, "colour": lambda each: to_hex(each.get_facecolor()),
        "alpha": lambda each: each.get_alpha(),
    },
    "collections": {
        "": lambda each: [sorted({*map(tuple, path.vertices.tolist())}) for path in each.get_paths()],
        "colour": lambda each: [to_hex(colour) for colour in (*each.get_facecolor(), *each.get_edgecolor())],
        "width": lambda each: each.get_linewidth(), "alpha": lambda each: each.get_alpha(),
    },
    "images": {
        "": lambda each: [*each.get_array().shape, each.get_array().filled(np.nan).ravel()],
        "limits": lambda each: each.get_clim(),
        "colours": lambda each: [to_hex(each.cmap(place)) for place in (0.0, 0.4, 0.8, 1.0)],
    },
}  # fmt: skip
_USUAL = {
    "style": "(0 None)", "marker": "None", "size": "6", "steps": "default", "label": "", "z": "2", "alpha": "None",
    "offset": "None", "box": "None",
}  # fmt: skip


def check_recorded(file: Path, described: Iterable[str]) -> None:
    """Compares lines with a file. With REGENERATE_GOLDEN=1, writes the file: read the difference before you commit."""
    lines = "\n".join(described).split("\n")
    if os.environ.get("REGENERATE_GOLDEN"):
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    assert lines == file.read_text(encoding="utf-8").split("\n")[:-1]


def describe(picture: Figure) -> Iterator[str]:
    """Yields the size, titles and legends of a picture, then what its axes show. Numbers have four digits."""
    suptitle = picture._suptitle  # type: ignore[attr-defined]
    title = f"{picture.get_suptitle()!r} {suptitle.get_fontsize():g}" if suptitle else ""
    yield f"picture {_shown(picture.get_size_inches())} {title} {picture.get_supylabel()}".rstrip()
    for legend in (*picture.legends, *(axes.legend_ for axes in picture.axes if axes.legend_)):
        entries = zip(legend.legend_handles, legend.get_texts(), strict=True)
        shown = [f"{text.get_text()!r} {_line(handle)}" for handle, text in entries]
        form = [legend._ncols, legend.get_title().get_text(), legend.get_title().get_fontsize(), legend.handlelength]
        sizes = {text.get_fontsize() for text in legend.get_texts()}
        yield f" legend {_shown([*form, *sizes, legend.get_frame_on()])}: {'; '.join(shown)}"
    for axes in picture.axes:
        yield from _axes(axes)


def _line(handle: Any) -> str:
    get = getattr(handle, "get_color", None)
    return _shown(get()) if get else ""


def _axes(axes: Axes) -> Iterator[str]:
    labels = [axes.title, axes.xaxis.label, axes.yaxis.label]
    shown = [f"{each.get_text()!r} {each.get_fontsize():g}" for each in labels if each.get_text()]
    place = axes.get_subplotspec()
    if place is None:  # of a colour bar
        yield f" colour bar {' | '.join(shown)}"
        return
    spines = [side for side in axes.spines if axes.spines[side].get_visible()]
    at = place.num1, place.num2, place.get_gridspec().get_height_ratios()
    flags = [axes.get_visible(), axes.get_axisbelow(), axes.get_facecolor(), axes.get_aspect(), spines]
    yield f" axes {_shown(at)} {' | '.join(shown)} {_shown(flags)}"
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        limits = axes.get_xlim() if name == "x" else axes.get_ylim()
        parts: list[Any] = [axis.get_scale(), limits, getattr(axis.get_major_locator(), "_integer", False)]
        for which in ("major", "minor"):
            keys = axis.get_tick_params(which=which)
            names = (
                "gridOn",
                "grid_color",
                "grid_linewidth",
                "left",
                "labelleft",
                "labelbottom",
                "labelsize",
                "length",
            )
            parts.append([keys[key] for key in names if key in keys])
            locator = axis.get_major_locator() if which == "major" else axis.get_minor_locator()
            if isinstance(locator, FixedLocator):
                parts.append(locator.locs)
        if isinstance(axis.get_major_locator(), FixedLocator):
            texts = axis.get_ticklabels()
            parts += [[text.get_text() for text in texts], [*{(t.get_fontsize(), t.get_rotation()) for t in texts}]]
        else:
            parts.append(type(axis.get_major_formatter()).__name__)
        yield f"  {name} {_shown(parts)}"
    for name, getters in _ARTISTS.items():
        for artist in getattr(axes, name):
            shown = {key: _shown(get(artist)) for key, get in getters.items()}
            kept = [f"{key} {text}".strip() for key, text in shown.items() if _USUAL.get(key) != text]
            yield f"  {name.rstrip('s')} {' '.join(kept)}"


def _shown(value: Any) -> str:
    """Formats numbers with four digits, and long rows of numbers by their ends and their mean."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, bool | str) or value is None:
        return str(value)
    if isinstance(value, int | float | np.number):
        return f"{float(value):.4g}"
    items = list(value)
    if len(items) > 12 and all(isinstance(each, str) for each in items):
        return f"({items[0]} .. {items[-1]}, {len(items)} texts)"
    if len(items) > 40 and all(isinstance(each, int | float) for each in items):
        return f"({_shown(items[0])} .. {_shown(items[-1])}, {len(items)} of sum {_shown(float(np.nansum(items)))})"
    return f"({' '.join(map(_shown, items))})"


def flat(value: Any, name: str = "") -> Iterator[str]:
    """Yields nested values line by line, each with its path; numbers have six digits."""
    value = _plain(value)
    text = json.dumps(value, ensure_ascii=False)
    if len(text) < 110 or not isinstance(value, dict | list):
        yield f"{name}: {text}"
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from flat(item, f"{name}.{key}" if name else str(key))


def _plain(value: Any) -> Any:
    """Returns dataclasses as mappings, keys as texts and numbers with six digits, for JSON."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {" ".join(key) if isinstance(key, tuple) else str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
