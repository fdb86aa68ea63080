"""Matches the weights of a file to a model by name and shape, for `init_from`."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn

from dlopt.adapt import has_adapters, merged, without_adapters
from dlopt.basics.errors import UserError
from dlopt.models.foreign import differences, fold_biases, translations
from dlopt.training.checkpoint.shared_weights import complete_shared
from dlopt.training.checkpoint.weight_files import read_weights

# Parts of names that wrappers add: torch.compile, FSDP, activation checkpointing; and DistributedDataParallel,
# DataParallel, AveragedModel and DeepSpeed.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "module")
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|avg|averaged?|shadow|polyak)(?![a-z])", re.IGNORECASE)
_SHOWN = 8  # names of one kind in a line

Tensors = Mapping[str, Tensor]


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

    @property
    def shown(self) -> str:
        return f"{self.prefix}*"


def match_weights(path: Path, module: nn.Module) -> Match:
    """Reads a file of weights and matches them to the model by name and shape.

    Removes what wrappers add to names and the prefix of the model in the file, and translates the names of torchvision,
    timm and others where the architecture is the same. Of several sets of weights that fit equally, takes the averaged
    one, as timm does. All names of a shared tensor get the same tensor.

    Raises `UserError` if no parameter matches, if several sets match, if two names of a shared tensor have different
    tensors, or if the file contains another model: see `_refuse_another_model`.
    """
    # 1. The tensors of the model and of the file, by names without wrappers; and these names -> full names. With
    #    `keep_vars`, a parameter with several names is one object.
    state = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    own_names = _without_wrappers(without_adapters(state))
    model = {name: state[full] for name, full in own_names.items()}
    raw, classes = read_weights(path)
    file_names = _without_wrappers(raw)
    file = {name: raw[full] for name, full in file_names.items()}
    is_adapted = has_adapters(file)
    if is_adapted:
        file = merged(file)

    try:
        # 2. The set of weights in the file that fits the model best.
        best, equal, notes = _best_set(file, model)

        # 3. Its tensors: those that fit; those of another shape; those with names that the model lacks. And the rest of
        #    the file.
        fitting, unfit, unused = {}, [], {}
        for name, tensor in best.weights.items():
            if name not in model:
                unused[name] = tensor
            elif tensor.shape == model[name].shape:
                fitting[name] = tensor
            else:
                unfit.append(name)
        prefixes = tuple(each.prefix for each in equal if each.prefix) if best.prefix else ("",)
        outside = {name: tensor for name, tensor in file.items() if not name.startswith(prefixes)}

        # 4. Refuse other models. Give all names of a shared tensor the same tensor.
        if not any(isinstance(model[name], nn.Parameter) for name in fitting):
            raise UserError(
                f"none of its {len(raw)} weights matches this model by name and shape; weights of "
                "torchvision or timm also fit model=torchvision or model=timm with their model.name"
            )
        others = [name for name in fitting if _is_learned(model[name]) and _kind(fitting[name]) != _kind(model[name])]
        if others:
            dtype, like = _dtype_name(fitting[others[0]]), _dtype_name(model[others[0]])
            raise UserError(f"{_listed(others)}: {dtype} tensors, of which a model in {like} cannot be initialized")
        fitting = complete_shared(model, fitting, unfit)
        _refuse_another_model(model, fitting, best, unused, outside)
    except UserError as error:
        raise UserError(f"init_from={path}: {error}") from None
    # PyTorch counts batches since version 0.4.1; older files have no counts, which do not change the outputs.
    missing = [name for name in model if name not in fitting and not name.endswith("num_batches_tracked")]

    # 5. Describe the match.
    notes += _naming_notes(best.prefix, file_names, own_names)
    if outside and best.prefix == "model." and all(name.startswith("normalize.") for name in outside):
        notes.insert(0, "without its normalization: this run has its own")
        outside = {}
    if best.origin:
        notes.append(f"from the names of {best.origin}")
    if is_adapted:
        notes.append("with its adapters merged")
    changes = set()
    for name, tensor in fitting.items():
        if _is_learned(tensor) and tensor.dtype != model[name].dtype:
            changes.add((_dtype_name(tensor), _dtype_name(model[name])))
    notes += [f"{old} converted to {new}" for old, new in sorted(changes)]
    note = f" ({'; '.join(notes)})" if notes else ""
    lines = [f"weights from {path}: {len(fitting)} of {len({*fitting, *missing})} tensors loaded{note}"]
    if missing:
        lines.append(f"  missing or with another shape, newly initialized: {', '.join(_sized(missing, best.weights))}")
    if unused or outside:
        lines.append(f"  not used: {', '.join(_grouped([*unused, *(file_names[name] for name in outside)]))}")
    if best.origin:
        lines += [f"  {line}" for line in differences(module)]

    weights = {own_names[name]: tensor for name, tensor in fitting.items()}
    return Match(weights, [own_names[name] for name in missing], lines, classes)


def other_class(trained: Sequence[str] | None, classes: Sequence[str] | None) -> str | None:
    """Names the first class that differs between the data and the checkpoint; None if there is none."""
    if trained is None or classes is None:
        return None
    for number, (old, new) in enumerate(zip_longest(trained, classes, fillvalue="missing")):
        if old != new:
            return f"class {number} is {old} in the checkpoint, {new} in the data"
    return None


# -- names


def _without_wrappers(names: Iterable[str]) -> dict[str, str]:
    """Returns {name without the parts that wrappers add, its parts joined by dots: name}, in the order of `names`."""
    result: dict[str, str] = {}
    for name in names:
        parts = re.split("[./]", name)
        plain = ".".join(part for part in parts if part not in _WRAPPERS)
        if not plain or plain in result:
            plain = ".".join(parts)
        result[plain] = name
    return result


def _prefixes(name: str) -> list[str]:
    """Returns the prefixes of a name that end at a dot: a. and a.b. for a.b.weight."""
    return [name[: match.end()] for match in re.finditer(r"\.", name)]


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]


def _pattern(name: str) -> str:
    """Returns the name with # for each number: equal for layers of a stack."""
    return re.sub(r"\d+", "#", name)


def _is_learned(tensor: Tensor) -> bool:
    """Whether a model cannot be the same without the tensor: counters and indices are integers."""
    return tensor.is_floating_point() or tensor.is_complex()


def _kind(tensor: Tensor) -> tuple[bool, bool, torch.layout]:
    """Differs for quantized, sparse and complex tensors."""
    return tensor.is_floating_point(), tensor.is_complex(), tensor.layout


# -- the sets of weights in a file


def _best_set(file: Tensors, model: Tensors) -> tuple[_Set, list[_Set], list[str]]:
    """Returns the set that fits the model best, all sets that fit equally, and a note if others were passed over.

    Prefers averaged weights. Raises `UserError` if the remaining sets have different values.
    """
    # 1. The tensors under each prefix that has enough tensors to be this model.
    learned = {name: tensor for name, tensor in model.items() if _is_learned(tensor)}
    shapes = {name: tensor.shape for name, tensor in model.items()}
    counts: Counter[str] = Counter()
    for name in file:
        counts.update(_prefixes(name))
    sets = []
    for prefix in ["", *counts]:
        if prefix and 2 * counts[prefix] < len(learned):
            continue
        weights = {name.removeprefix(prefix): tensor for name, tensor in file.items() if name.startswith(prefix)}
        weights, origin = _translate(weights, shapes)
        fits = sum(name in weights and weights[name].shape == like.shape for name, like in learned.items())
        sets.append(_Set(prefix, weights, origin, fits))

    # 2. The best of them.
    most = max(each.fits for each in sets)
    equal = [each for each in sets if each.fits == most]
    averaged = [each for each in equal if _AVERAGED.search(each.prefix)]
    best, *others = averaged or equal
    if 2 * most >= len(learned):  # sets of fewer are another model, which is refused as such
        for other in others:
            pairs = [(best.weights[name], other.weights.get(name)) for name in model if name in best.weights]
            if not all(its is not None and torch.equal(own, its) for own, its in pairs):
                raise UserError(
                    f"contains several sets of weights for this model: {', '.join(each.shown for each in equal)}; "
                    "save the one to load in a file of its own"
                )
    passed_over = [each.shown for each in equal if averaged and not _AVERAGED.search(each.prefix)]
    notes = [f"the averaged weights {best.shown}, not {', '.join(passed_over)}"] if passed_over else []
    return best, equal, notes


def _translate(weights: dict[str, Tensor], shapes: Mapping[str, torch.Size]) -> tuple[dict[str, Tensor], str]:
    """Returns the weights under the names that fit `shapes` best, and the origin of these names if it is foreign."""

    def count_fitting(named: Tensors) -> int:
        return sum(shapes.get(name) == tensor.shape for name, tensor in named.items())

    candidates = [(weights, "")]
    if count_fitting(weights) < len(shapes):
        for origin, names in translations(weights):
            translated = {}
            for name, tensor in weights.items():
                own, shape = names[name], shapes.get(names[name])
                # A convolution over a whole map [O, I, H, W] as a linear layer [O, I * H * W].
                is_map = shape is not None and len(shape) == 2 and tensor.ndim == 4 and tensor.numel() == shape.numel()
                translated[own] = tensor.flatten(1) if is_map else tensor
            candidates.append((translated, origin))
    best, origin = max(candidates, key=lambda each: count_fitting(each[0]))
    return fold_biases(best, shapes) if origin else best, origin


# -- other models


def _refuse_another_model(model: Tensors, fitting: Tensors, best: _Set, unused: Tensors, outside: Tensors) -> None:
    """Raises `UserError` if the weights belong to another model and only a part would be loaded.

    Allows tensors of another shape, unless these are the majority between the first and the last layer; a missing
    first or last layer; and additional tensors, unless they belong to a layer that the model has, or to another layer
    of the same kind.

    Args:
        fitting: weights by the model's names, of the set `best`.
        unused: those of the set with other names.
        outside: all other tensors of the file.
    """
    saved, learned = best.weights, [name for name, tensor in model.items() if _is_learned(tensor)]
    missing = [name for name in learned if name not in fitting and name not in saved]

    # 1. A tensor is missing between the ends (the first and the last module at the outermost level that has several),
    #    or a part of a layer.
    parts = [name.split(".") for name in model]
    depth = 0
    while all(len(each) > depth + 1 and each[depth] == parts[0][depth] for each in parts):
        depth += 1
    outermost = {parts[0][depth], parts[-1][depth]}
    ends = {name for name, each in zip(model, parts, strict=True) if each[depth] in outermost}
    loaded_modules = {_module_of(name) for name in fitting}
    if lost := [name for name in missing if name not in ends or _module_of(name) in loaded_modules]:
        other = [name for name, tensor in unused.items() if _is_learned(tensor)]
        has = f", and has {_listed(other)}" if other else ""
        raise UserError(
            f"contains another model: lacks {_listed(lost)}{has}; only a whole first or last layer may be missing"
        )

    # 2. A missing matrix may be there under another name.
    for name in missing:
        alike = {other: tensor for other, tensor in {**unused, **outside}.items() if tensor.shape == model[name].shape}
        if same := [other for other, tensor in alike.items() if tensor.ndim > 1 and _is_learned(tensor)]:
            raise UserError(
                f"lacks {best.prefix}{name}, and has {_listed(same)} of the same shape; rename it, or remove it from "
                f"the file to start from a new {name}"
            )

    # 3. Most tensors between the ends have another shape.
    inner = [name for name in learned if name not in ends]
    unfit = [name for name in inner if name not in fitting]
    if 2 * len(unfit) > len(inner):
        raise UserError(f"contains another model: most tensors have another shape: {_listed(_sized(unfit, saved))}")

    # 4. Layers of the model have more tensors in the file, or there are more layers like them.
    modules = {_module_of(name) for name in model}
    patterns = {_pattern(name) for name in model}
    more = []
    for name, tensor in unused.items():
        around = [each.removesuffix(".") for each in _prefixes(name)] or [""]
        is_in_layer = any(each in modules for each in around)
        if _is_learned(tensor) and (is_in_layer or _pattern(name) in patterns):
            more.append(name)
    if more:
        raise UserError(f"contains another model: has {_listed(more)}, which this model lacks")


# -- the description of a match


def _naming_notes(prefix: str, file_names: Mapping[str, str], own_names: Mapping[str, str]) -> list[str]:
    """Returns notes about the dict in the file that holds the weights, and about prefixes removed from their names.

    `prefix`: of the chosen set; the others: names without wrappers -> full names, of the file and of the model.
    """
    inside = [full for name, full in file_names.items() if name.startswith(prefix)]
    containers = {full.rpartition("/")[0] for full in inside}
    if len(containers) > 1:
        return []
    container = containers.pop()
    names = [full.removeprefix(f"{container}/") for full in inside]

    # The parts of the prefix that the container does not have already.
    parts = prefix.split(".")[:-1]
    for part in re.split("[./]", container):
        if part and part not in _WRAPPERS:
            parts = parts[1:]

    # The prefix as it is in the file, with wrappers: it ends where the names differ, or after the last of `parts`.
    removed = ""
    for part in names[0].split(".")[:-1]:
        if part in _WRAPPERS and all(name.startswith(f"{removed}{part}.") for name in names):
            removed += f"{part}."
        elif parts and part == parts[0]:
            removed += f"{part}."
            parts = parts[1:]
        else:
            break

    # Wrappers at other places, which the model does not have itself.
    wrappers = set()
    for name in names:
        wrappers |= {part for part in name.removeprefix(removed).split(".") if part in _WRAPPERS}
    for name in own_names.values():
        wrappers -= {*name.split(".")}

    notes = []
    if container:
        notes.append(f"of its {container}")
    if removed and not all(name.startswith(removed) for name in own_names.values()):
        notes.append(f"without the prefix {removed} of their names")
    if wrappers:
        notes.append(f"without {', '.join(sorted(wrappers))} in their names")
    return notes


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _sized(names: Iterable[str], saved: Tensors) -> list[str]:
    """Returns the names, with the shapes of the tensors in `saved`."""
    texts = []
    for name in names:
        if name in saved:
            size = "x".join(map(str, saved[name].shape)) or "one number"
            texts.append(f"{name} ({size} in the file)")
        else:
            texts.append(name)
    return texts


def _listed(names: Collection[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(list(names)[:_SHOWN]) + more


def _grouped(names: Iterable[str]) -> list[str]:
    """Returns the names; abbreviates a large module or dict to one name."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.split("[./]", name)[0], []).append(name)
    texts = []
    for first, inside in groups.items():
        if len(inside) <= _SHOWN:
            texts += inside
        else:
            texts.append(f"{first}.* ({len(inside)} tensors)")
    return texts
