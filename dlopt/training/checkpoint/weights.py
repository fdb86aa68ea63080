"""Reads the weights for `init_from`, from checkpoints and from files of other tools."""

import argparse
import contextlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlopt.adapt import has_adapters, merged, without_adapters
from dlopt.basics.errors import UserError
from dlopt.basics.files import reason, refuse_compressed, refuse_special
from dlopt.models.foreign import differences, fold_biases, translations
from dlopt.training.checkpoint.checkpoints import load
from dlopt.training.checkpoint.content import is_checkpoint
from dlopt.training.checkpoint.shared_weights import complete_shared

# Parts of names that wrappers add, at any place: torch.compile, FSDP, activation checkpointing, and
# DistributedDataParallel, DataParallel, AveragedModel and DeepSpeed.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "module")
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|avg|averaged?|shadow|polyak)(?![a-z])", re.IGNORECASE)
_SHOWN = 8  # names of one kind in a line
_UNSUPPORTED = re.compile(r"GLOBAL (\S+) was not an allowed global|Unsupported (?:class|global)[: ]+(?:GLOBAL )?(\S+)")


def read_weights(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """Reads weights by name, and the names of the classes of a checkpoint; None if unknown.

    The file is a checkpoint (reads the EMA, if any), a safetensors file, or a file of torch.save. Joins the names of
    nested dicts by slashes: "state_dict/model.head.weight". Unpickles only tensors and plain values. Raises `UserError`
    if there are no tensors.
    """
    try:
        refuse_special(path)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            refuse_compressed(path)
            # timm's training script saves its arguments as a Namespace, which only holds attributes.
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"init_from={path}: no such file") from None
    except Exception as error:
        if (match := _UNSUPPORTED.search(str(error))) is not None:
            raise UserError(
                f"init_from={path}: cannot be loaded as weights: it contains {match[1] or match[2]}, and only tensors "
                "and plain values are read; save its state dict in a file of its own"
            ) from None
        raise UserError(f"init_from={path}: cannot be loaded as weights: {reason(error)}") from None
    if is_checkpoint(state):
        checkpoint = load(path)  # again, to verify the checksum and to load shards
        return checkpoint.merged_weights, checkpoint.classes if "classes" in checkpoint.data else None
    if weights := dict(_flattened(state)):
        return weights, None
    keys = f" (its keys: {', '.join(map(str, list(state)[:5]))})" if isinstance(state, Mapping) else ""
    raise UserError(f"init_from={path}: contains no weights by name (a dict of tensors){keys}")


def _flattened(state: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors in nested dicts, in their order. Yields a dict that occurs several times only once."""
    seen: set[int] = set()
    pending: list[tuple[str, Any]] = [("", state)]
    while pending:
        name, value = pending.pop()
        if isinstance(value, Tensor) and name:
            yield name, value
        elif isinstance(value, Mapping) and id(value) not in seen:
            seen.add(id(value))
            if _is_raw_beside_average(name, state):
                continue
            # Other keys number the parameters of an optimizer.
            named = [(key, inner) for key, inner in value.items() if isinstance(key, str)]
            pending += [(f"{name}/{key}" if name else key, inner) for key, inner in reversed(named)]


def _is_raw_beside_average(name: str, state: Mapping[str, Any]) -> bool:
    """Returns whether `name` holds the last weights in a file whose `state_dict` holds their average.

    Lightning's `WeightAveraging` and MMEngine's `EMAHook` (which swaps the two) save such files.
    """
    meta = state.get("meta")
    is_mmengine = isinstance(meta, Mapping) and "mmengine_version" in meta
    return "state_dict" in state and (name == "current_model_state" or (name == "ema_state_dict" and is_mmengine))


@dataclass(frozen=True)
class Match:
    """The weights of a file that fit a model, by the model's names, and lines that describe the match.

    `classes`: names of the classes in the checkpoint; None if the file is no checkpoint, or has no names.
    """

    weights: dict[str, Tensor]
    missing: list[str]  # parameters and buffers of the model that the file lacks, except batch norm's counters
    lines: list[str]
    classes: tuple[str, ...] | None


@dataclass(frozen=True)
class _Set:
    """Tensors of a file under one prefix, by the names that they would have in the model."""

    prefix: str  # without wrappers
    weights: dict[str, Tensor]
    origin: str  # of translated names; empty for the model's own names
    fits: int  # learned tensors of the model with this name and shape
    prefixes: tuple[str, ...] = ()  # of all sets that fit equally

    @property
    def shown(self) -> str:
        return f"{self.prefix}*"

    @property
    def is_averaged(self) -> bool:
        return _AVERAGED.search(self.prefix) is not None


def match_weights(path: Path, module: nn.Module) -> Match:
    """Reads a file of weights and matches them to the model by name and shape.

    Removes what wrappers add to names and the prefix of the model in the file, and translates the names of torchvision,
    timm and others where the architecture is the same. Of several sets of weights that fit equally, takes the averaged
    one, as timm does. All names of a shared tensor get the same tensor.

    Raises `UserError` if no parameter matches, if several sets match, if two names of a shared tensor have different
    tensors, or if the file contains another model: see `_refuse_another_model`.
    """
    # With `keep_vars`, a parameter with several names is one object.
    state = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    own = _without_wrappers(without_adapters(state))
    current = {name: state[full] for name, full in own.items()}
    raw, classes = read_weights(path)
    full_names = _without_wrappers(raw)
    named = {name: raw[full] for name, full in full_names.items()}
    is_adapted = has_adapters(named)
    named = merged(named) if is_adapted else named
    with _about(path):
        chosen, notes = _choose(named, current)
        saved = chosen.weights
        fitting = {name: tensor for name, tensor in saved.items() if _fits(tensor, current.get(name))}
        if not any(isinstance(current[name], nn.Parameter) for name in fitting):
            raise UserError(
                f"none of its {len(raw)} weights matches this model by name and shape; weights of "
                "torchvision or timm also fit model=torchvision or model=timm with their model.name"
            )
        _refuse_other_kinds(fitting, current)
        unfit = [name for name in saved if name in current and name not in fitting]
        fitting = complete_shared(current, fitting, unfit)
        unused = {name: tensor for name, tensor in saved.items() if name not in current}
        outside = {name: tensor for name, tensor in named.items() if not name.startswith(chosen.prefixes)}
        _refuse_another_model(current, fitting, saved, unused, outside, chosen.prefix)
    # PyTorch counts batches since version 0.4.1; older files have no counts, which do not change the outputs.
    missing = [name for name in current if name not in fitting and not name.endswith("num_batches_tracked")]
    notes += _naming(chosen, full_names, own)
    if outside and chosen.prefix == "model." and all(name.startswith("normalize.") for name in outside):
        notes.insert(0, "without its normalization: this run has its own")
        outside = {}
    notes += [f"from the names of {chosen.origin}"] if chosen.origin else []
    notes += ["with its adapters merged"] if is_adapted else []
    notes += _rounding(fitting, current)
    note = f" ({'; '.join(notes)})" if notes else ""
    lines = [f"weights from {path}: {len(fitting)} of {len({*fitting, *missing})} tensors loaded{note}"]
    if missing:
        lines.append(f"  missing or with another shape, newly initialized: {', '.join(_sized(missing, saved))}")
    if unused or outside:
        lines.append(f"  not used: {', '.join(_grouped([*unused, *(full_names[name] for name in outside)]))}")
    if chosen.origin:
        lines += [f"  {line}" for line in differences(module)]
    return Match(
        {own[name]: tensor for name, tensor in fitting.items()}, [own[name] for name in missing], lines, classes
    )


def other_class(trained: Sequence[str] | None, classes: Sequence[str] | None) -> str | None:
    """Names the first class that differs between the data and the checkpoint; None if there is none."""
    if trained is None or classes is None:
        return None
    for number, (old, new) in enumerate(zip_longest(trained, classes, fillvalue="missing")):
        if old != new:
            return f"class {number} is {old} in the checkpoint, {new} in the data"
    return None


@contextlib.contextmanager
def _about(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"init_from={path}: {error}") from None


def _without_wrappers(names: Iterable[str]) -> dict[str, str]:
    """Returns {name without the parts that wrappers add, its parts joined by dots: name}, in the order of `names`."""
    result: dict[str, str] = {}
    for name in names:
        parts = re.split("[./]", name)
        plain = ".".join(part for part in parts if part not in _WRAPPERS)
        result[plain if plain and plain not in result else ".".join(parts)] = name
    return result


def _fits(tensor: Tensor, like: Tensor | None) -> bool:
    return like is not None and tensor.shape == like.shape


def _choose(named: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> tuple[_Set, list[str]]:
    """Returns the set of weights that fits the model best, and a note if it is one of several that fit equally.

    Prefers averaged weights. Raises `UserError` if the remaining sets have different values.
    """
    sets = list(_sets(named, current))
    most = max(each.fits for each in sets)
    equal = [each for each in sets if each.fits == most]
    first, *others = [each for each in equal if each.is_averaged] or equal
    if 2 * most >= sum(map(_is_learned, current.values())):
        for other in others:
            if not all(torch.equal(first.weights[n], other.weights[n]) for n in current if n in first.weights):
                raise UserError(
                    f"contains several sets of weights for this model: {', '.join(each.shown for each in equal)}; "
                    "save the one to load in a file of its own"
                )
    prefixes = tuple(each.prefix for each in equal if each.prefix) if first.prefix else ("",)
    chosen = replace(first, prefixes=prefixes)
    rest = [each.shown for each in equal if each is not first and each not in others]
    return chosen, [f"the averaged weights {first.shown}, not {', '.join(rest)}"] if rest else []


def _sets(named: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> Iterator[_Set]:
    """Yields the tensors under each prefix that has enough tensors to be this model."""
    learned = {name: tensor for name, tensor in current.items() if _is_learned(tensor)}
    counts = Counter(prefix for name in named for prefix in _prefixes(name))
    for prefix in ["", *(prefix for prefix, count in counts.items() if 2 * count >= len(learned))]:
        weights = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
        translated, origin = _translate(weights, {name: tensor.shape for name, tensor in current.items()})
        fits = sum(_fits(translated[name], like) for name, like in learned.items() if name in translated)
        yield _Set(prefix, translated, origin, fits)


def _prefixes(name: str) -> Iterator[str]:
    return (name[: match.end()] for match in re.finditer(r"\.", name))


def _translate(weights: dict[str, Tensor], shapes: Mapping[str, torch.Size]) -> tuple[dict[str, Tensor], str]:
    """Returns the weights under the names that fit `shapes` best, and the origin of these names if it is foreign."""

    def fitting(named: Mapping[str, Tensor]) -> int:
        return sum(shapes.get(name) == value.shape for name, value in named.items())

    best, best_origin = weights, ""
    if fitting(weights) == len(shapes):
        return best, best_origin
    for origin, names in translations(weights):
        translated = {names[name]: _flattened_map(value, shapes.get(names[name])) for name, value in weights.items()}
        if fitting(translated) > fitting(best):
            best, best_origin = translated, origin
    return (fold_biases(best, shapes) if best_origin else best), best_origin


def _flattened_map(weight: Tensor, shape: torch.Size | None) -> Tensor:
    """Returns a convolution over a whole map [O, I, H, W] as the linear layer [O, I * H * W] of `shape`."""
    is_linear = shape is not None and len(shape) == 2 and weight.ndim == 4 and weight.numel() == shape.numel()
    return weight.flatten(1) if is_linear else weight


def _refuse_other_kinds(fitting: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
    """Raises `UserError` for quantized, sparse and complex tensors."""

    def kind(tensor: Tensor) -> tuple[bool, bool, torch.layout]:
        return tensor.is_floating_point(), tensor.is_complex(), tensor.layout

    names = [n for n, tensor in fitting.items() if _is_learned(current[n]) and kind(tensor) != kind(current[n])]
    if names:
        dtype = str(fitting[names[0]].dtype).removeprefix("torch.")
        like = str(current[names[0]].dtype).removeprefix("torch.")
        raise UserError(f"{_listed(names)}: {dtype} tensors, of which a model in {like} cannot be initialized")


def _refuse_another_model(
    current: Mapping[str, Tensor],
    fitting: Mapping[str, Tensor],
    saved: Mapping[str, Tensor],
    unused: Mapping[str, Tensor],
    outside: Mapping[str, Tensor],
    prefix: str,
) -> None:
    """Raises `UserError` if the weights belong to another model than `current` and only a part would be loaded.

    Allows tensors of another shape, unless these are the majority between the first and the last layer; a missing
    first or last layer; and additional tensors, unless they belong to a layer that the model has, or to another layer
    of the same kind.

    Args:
        fitting: weights by the model's names.
        saved: all weights of the model in the file.
        unused: weights with other names.
        outside: all other tensors of the file.
        prefix: prefix of the model's names in the file.
    """
    layers = {name.rpartition(".")[0] for name in fitting}
    ends = _ends(list(current))
    learned = [name for name, tensor in current.items() if _is_learned(tensor)]
    lacking = [name for name in learned if name not in fitting and name not in saved]
    if lost := [name for name in lacking if name not in ends or name.rpartition(".")[0] in layers]:
        other = [name for name, tensor in unused.items() if _is_learned(tensor)]
        has = f", and has {_listed(other)}" if other else ""
        raise UserError(
            f"contains another model: lacks {_listed(lost)}{has}; only a whole first or last layer may be missing"
        )
    matrices = [(n, t) for n, t in {**unused, **outside}.items() if t.ndim > 1 and _is_learned(t)]
    for name in lacking:
        same = [other for other, tensor in matrices if _fits(tensor, current[name]) and current[name].ndim > 1]
        if same:
            raise UserError(
                f"lacks {prefix}{name}, and has {_listed(same)} of the same shape; rename it, or remove it from the "
                f"file to start from a new {name}"
            )
    inner = [name for name in learned if name not in ends]
    unfit = [name for name in inner if name not in fitting]
    if 2 * len(unfit) > len(inner):
        raise UserError(f"contains another model: most tensors have another shape: {_listed(_sized(unfit, saved))}")
    modules = {name.rpartition(".")[0] for name in current}
    kinds = {re.sub(r"\d+", "#", name) for name in current}
    more = [
        name
        for name, tensor in unused.items()
        if _is_learned(tensor)
        and (
            not modules.isdisjoint({"" if "." not in name else None, *(each[:-1] for each in _prefixes(name))})
            or re.sub(r"\d+", "#", name) in kinds
        )
    ]
    if more:
        raise UserError(f"contains another model: has {_listed(more)}, which this model lacks")


def _is_learned(tensor: Tensor) -> bool:
    """Whether a model cannot be the same without the tensor: counters and indices are integers."""
    return tensor.is_floating_point() or tensor.is_complex()


def _ends(names: Sequence[str]) -> set[str]:
    """Returns the names in the first and in the last module, at the outermost level with several modules."""
    parts = [name.split(".") for name in names]
    depth = 0
    while all(len(each) > depth + 1 and each[depth] == parts[0][depth] for each in parts):
        depth += 1
    ends = {parts[0][depth], parts[-1][depth]}
    return {name for name, each in zip(names, parts, strict=True) if each[depth] in ends}


def _naming(chosen: _Set, full_names: Mapping[str, str], own: Mapping[str, str]) -> list[str]:
    """Returns notes about the dict in the file that holds the weights, and about prefixes removed from their names."""
    inside = [full for name, full in full_names.items() if name.startswith(chosen.prefix)]
    containers = {full.rpartition("/")[0] for full in inside}
    if len(containers) > 1:
        return []
    container, prefix = containers.pop(), ""
    names = [full.removeprefix(f"{container}/") for full in inside]
    parts = chosen.prefix.split(".")[:-1]
    parts = parts[sum(part not in _WRAPPERS for part in re.split("[./]", container) if part) :]
    for part in names[0].split(".")[:-1]:
        is_wrapper = part in _WRAPPERS and all(name.startswith(f"{prefix}{part}.") for name in names)
        if not is_wrapper and not (parts and part == parts[0]):
            break
        parts = parts if is_wrapper else parts[1:]
        prefix += f"{part}."
    added = {part for name in names for part in name.removeprefix(prefix).split(".")} & set(_WRAPPERS)
    added -= {part for name in own.values() for part in name.split(".")}
    notes = [f"of its {container}"] if container else []
    if prefix and not all(name.startswith(prefix) for name in own.values()):
        notes.append(f"without the prefix {prefix} of their names")
    return notes + ([f"without {', '.join(sorted(added))} in their names"] if added else [])


def _rounding(fitting: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> list[str]:
    """Returns a note about each change of the floating-point type."""
    changes = {(tensor.dtype, current[name].dtype) for name, tensor in fitting.items() if _is_learned(tensor)}
    names = ((str(a).removeprefix("torch."), str(b).removeprefix("torch.")) for a, b in changes if a != b)
    return [f"{a} converted to {b}" for a, b in sorted(names)]


def _sized(names: Iterable[str], saved: Mapping[str, Tensor]) -> list[str]:
    """Returns the names, with the shapes of the tensors in `saved`."""
    sizes = {name: "x".join(map(str, tensor.shape)) or "one number" for name, tensor in saved.items()}
    return [f"{name} ({sizes[name]} in the file)" if name in sizes else name for name in names]


def _listed(names: Collection[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(list(names)[:_SHOWN]) + more


def _grouped(names: Iterable[str]) -> list[str]:
    """Returns the names; abbreviates a large module or dict to one name."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.split("[./]", name)[0], []).append(name)
    return [
        text
        for first, inside in groups.items()
        for text in (inside if len(inside) <= _SHOWN else [f"{first}.* ({len(inside)} tensors)"])
    ]
