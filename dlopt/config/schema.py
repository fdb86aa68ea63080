"""Checks configs against the signatures of the callables that they name: the type annotations are the schema.

Values are validated as JSON in pydantic's strict mode: an int is accepted for a float and a list for a tuple, but
neither "0.1" nor true for a number. NaN and infinities are always rejected.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import FunctionType
from typing import Annotated, Any, TypeVar

from annotated_types import Interval
from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticUndefinedAnnotation

from dlopt.basics.calls import can_call
from dlopt.basics.errors import UserError
from dlopt.basics.folders import SUBMITTED
from dlopt.basics.names import Names
from dlopt.basics.plain_values import is_below, join
from dlopt.basics.ranges import Count, Duration, Fraction, NonNegative, OpenFraction, Positive, Probability
from dlopt.config.choices import config_folders, extensions
from dlopt.config.older import moved
from dlopt.config.packages import entries, leave_working_folder
from dlopt.config.parameters import named_parameters, parameters_of, several_values, show
from dlopt.config.synonyms import for_choice, for_key

T = TypeVar("T")

ALLOWED_PACKAGES = ("dlopt", "torch.optim", "torch.nn", "torchvision")
# The modules of dlopt that configs may name; the others act on files, processes and the network.
_CONFIGURABLE = (
    "dlopt.adapt", "dlopt.augment", "dlopt.data", "dlopt.init", "dlopt.losses", "dlopt.models", "dlopt.optim",
    "dlopt.parallel", "dlopt.schedules", "dlopt.tasks", "dlopt.sweeps.samplers",
    "dlopt.training.clipping", "dlopt.training.stopping",
)  # fmt: skip
_NOT_CONFIGURABLE = (
    "dlopt.data.images.unreadable", "dlopt.optim.parameters", "dlopt.parallel.processes",
    "torchvision.datasets.utils", "torchvision.io", "torchvision.utils",
)  # fmt: skip
# Ranges of third-party arguments, by name: torch's own SGD accepts lr=nan and momentum=1.5.
RANGES: dict[str, Any] = {
    "lr": Positive,
    "momentum": Fraction,
    "dampening": Probability,
    "weight_decay": NonNegative,
    "eps": NonNegative,
    "betas": tuple[Fraction, Fraction],
    "alpha": Fraction,
    "rho": Fraction,
    "lambd": NonNegative,
    "lr_decay": NonNegative,
    "initial_accumulator_value": NonNegative,
    "momentum_decay": NonNegative,
    "etas": tuple[OpenFraction, Annotated[float, Interval(gt=1)]],
    "step_sizes": tuple[Positive, Positive],
    "max_iter": Count,
    "max_eval": Count | None,
    "history_size": Count,
    "tolerance_grad": NonNegative,
    "tolerance_change": NonNegative,
    "ns_steps": Count,
    "label_smoothing": Probability,
}
_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
_EMPTY = inspect.Parameter.empty


def trusted_packages(allowed: Iterable[str] = ()) -> tuple[str, ...]:
    """Returns the packages whose callables a config may name: dlopt's own and `allow_packages`.

    Makes `allowed`, if any, importable from the current folder, as with `python -m dlopt`. A job of a submitted sweep
    imports the copy of the code alone.
    """
    allowed = (allowed,) if isinstance(allowed, str) else tuple(allowed)
    others = [name for name in extensions() if not is_below(name, ALLOWED_PACKAGES)]
    if (submitted := os.environ.get(SUBMITTED)) is not None:
        leave_working_folder((*allowed, *others), Path(submitted))
    elif allowed and not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    return (*ALLOWED_PACKAGES, *others, *allowed)


@dataclasses.dataclass(frozen=True)
class Component:
    """A callable with its checked arguments; `build` calls it, adding the arguments that are known only at run time.

    `name`: of the choice, for messages; "" if not known, as in a checkpoint.
    """

    key: str
    target: Callable[..., Any]
    arguments: Mapping[str, Any]
    name: str = ""

    def build(self, **runtime: Any) -> Any:
        """Calls the target with its arguments and with the entries of `runtime` that its signature names."""
        names = parameters_of(self.target).keys() - self.arguments.keys()
        extra = {name: value for name, value in runtime.items() if name in names}
        return self.target(**extra, **{name: _build(value, runtime) for name, value in self.arguments.items()})

    def build_as(self, kind: type[T], **runtime: Any) -> T:
        """Like `build`; raises `UserError` if the result is not of this kind, naming what a protocol's lacks."""
        result = self.build(**runtime)
        if not isinstance(result, kind):
            found, expected = type(result).__name__, f"{kind.__module__.partition('.')[0]} {kind.__name__}"
            if getattr(kind, "_is_protocol", False):
                names = (name for name, value in vars(kind).items() if isinstance(value, property | FunctionType))
                found += f" without {', '.join(name for name in names if not hasattr(result, name))}"
            raise UserError(f"{self.choice}: returns {found}; must return a {expected}")
        return result

    def require_call(self, function: object, signature: str) -> None:
        """Raises `UserError` unless a part can be called with the arguments of `signature`, by position."""
        if not can_call(function, signature.count(",") + 1):
            raise UserError(f"{self.choice}: must be callable as {signature}")

    @property
    def choice(self) -> str:
        """KEY=CHOICE, for messages; the callable's name if it belongs to no choice or to several."""
        return f"{self.key}={self.name or choice_of(self.key, dotted_name(self.target))}"

    def takes(self, name: str) -> bool:
        return name in parameters_of(self.target)

    def is_a(self, *kinds: type) -> bool:
        """Returns whether the target is one of these classes, or derived from one."""
        return isinstance(self.target, type) and issubclass(self.target, kinds)

    def partial(self, **extra: Any) -> "Component":
        return dataclasses.replace(self, arguments={**self.arguments, **extra})


def first_lines_of_data(target: str, *, is_dataset: bool) -> str:
    """Shows how the file of a data set of the user's own begins; `is_dataset`: `target` is one of torch."""
    if is_dataset:
        return f"begin its file with two lines, defaults: [custom, _self_] and train: {{_target_: {target}}}"
    return f"begin its file with two lines, defaults: [_common, _self_] and _target_: {target}"


def dotted_name(target: Callable[..., Any]) -> str:
    return f"{target.__module__}.{target.__qualname__}"


def choice_of(group: str, path: str) -> str:
    """Returns the one choice of dlopt with the callable at a dotted path; the path itself if there is none, or many.

    A class may have several paths: torch.optim.SGD is torch.optim.sgd.SGD.
    """
    (package, *_), name = path.split("."), path.rpartition(".")[2]
    pattern = re.compile(rf"^_target_: {re.escape(package)}\.(.*\.)?{re.escape(name)}$", re.MULTILINE)
    files = sorted(path for folder in config_folders() for path in (folder / group).glob("[!_]*.yaml"))
    names = [file.stem for file in files if pattern.search(file.read_text())]
    return names[0] if len(names) == 1 else path


def _build(value: Any, runtime: Mapping[str, Any]) -> Any:
    """Builds the components in a value; returns other values unchanged."""
    if isinstance(value, Component):
        return value.build(**runtime)
    if isinstance(value, list):
        return [_build(item, runtime) for item in value]
    return value


def component(
    key: str, node: Mapping[str, Any], runtime: Iterable[str], packages: Iterable[str], related: tuple[str, ...] = ()
) -> Component:
    """Checks `node` (`_target_` and arguments, which may be components themselves) and returns it as a `Component`.

    `related`: further valid keys next to the arguments, used for suggestions in error messages.

    Raises `UserError` for a target outside `packages`, and for unknown, missing, mistyped and out-of-range arguments.
    """
    if not isinstance(node.get("_target_"), str):
        raise UserError(f"{key}._target_={show(node.get('_target_'))}: must be the dotted name of a callable")
    packages, runtime = tuple(packages), frozenset(runtime)
    target = resolve_target(f"{key}._target_", node["_target_"], packages)
    values = {name: value for name, value in node.items() if name != "_target_"}
    return Component(key, target, check_arguments(key, target, values, runtime, packages, related))


def resolve_target(key: str, path: str, packages: Iterable[str]) -> Callable[..., Any]:
    """Imports the class or function at a dotted path.

    It must be defined in one of `packages` or its submodules (torch.optim's and torch.nn's classes are), at the top
    level of a module, not merely be importable from it (modules import others, such as `os`). Raises `UserError`.
    """
    packages, path = tuple(packages), moved(path)
    package = path.split(".")[0]
    if package == "__main__":
        raise UserError(
            f"{key}={path}: other processes, and later ones, cannot import what a script or a notebook defines; "
            "put it into a module (mine.py), and set allow_packages=[mine]"
        )
    if not is_below(path, packages):
        hint = f"; to trust another package, set allow_packages=[{package}] on the command line" if package else ""
        raise UserError(f"{key}={path}: only callables of {', '.join(packages)} are allowed{hint}")
    target = _import(key, path)
    if target is None:
        hint = "" if importlib.util.find_spec(package) else f" (the package {package} is not installed)"
        raise UserError(f"{key}={path}: unknown callable{hint}")
    module = getattr(target, "__module__", None) or ""
    if not callable(target) or inspect.ismodule(target) or not is_below(module, packages):
        raise UserError(f"{key}={path}: must be a class or function defined in {', '.join(packages)}")
    is_dataset_helper = is_below(module, ("torchvision.datasets",)) and not inspect.isclass(target)
    configurable = (*_CONFIGURABLE, *entries("dlopt.configurable").values())
    is_internal = is_below(module, ("dlopt",)) and not is_below(module, configurable)
    if is_internal or is_dataset_helper or is_below(module, _NOT_CONFIGURABLE):
        raise UserError(f"{key}={path}: cannot be used in a config")
    if is_below(module, ("torch.optim.lr_scheduler",)):
        raise UserError(f"{key}={path}: schedules of torch are not supported; `dlopt options schedule` lists dlopt's")
    return typing.cast(Callable[..., Any], target)


def _import(key: str, path: str) -> Any:
    """Returns a public name at the top level of a module, or None. Raises `UserError` if the import fails."""
    module, _, name = path.rpartition(".")
    if not module or any(not part.isidentifier() or part.startswith("_") for part in path.split(".")):
        return None
    try:
        return getattr(importlib.import_module(module), name, None)
    except UserError:  # of a module that needs an optional package
        raise
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and is_below(module, (missing,)):
            return None
        kind = "" if missing is not None else f"{type(error).__name__}: "
        raise UserError(f"{key}={path}: importing {module} failed: {kind}{error}") from error


def check_arguments(
    key: str,
    target: Callable[..., Any],
    values: Mapping[str, Any],
    runtime: frozenset[str] = frozenset(),
    packages: tuple[str, ...] = (),
    related: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Validates `values` against the annotations of `target` and returns them converted (lists to tuples, ...).

    `runtime`: arguments that are supplied at run time, which a config may not set. Raises `UserError`.
    """
    parameters = parameters_of(target)
    takes_any_key = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    allowed = [name for name in named_parameters(target) if name not in runtime]
    for name, value in values.items():
        if name not in allowed and not (takes_any_key and name not in runtime):
            raise _unknown_key(join(key, str(name)), str(name), value, (*allowed, *related))
    for name in allowed:
        if name not in values and parameters[name].default is _EMPTY:
            raise UserError(f"{join(key, name)}: a value is required ({describe_type(parameters[name].annotation)})")
    return {
        name: check_value(join(key, name), value, annotation_of(target, name), runtime, packages)
        for name, value in values.items()
    }


def annotation_of(target: Callable[..., Any], name: str) -> Any:
    parameters = parameters_of(target)
    annotation = parameters[name].annotation if name in parameters else _EMPTY
    return annotation if target.__module__.startswith("dlopt") else RANGES.get(name, annotation)


def _unknown_key(key: str, name: str, value: Any, allowed: Collection[str]) -> UserError:
    parents = key.split(".")[:-1]
    groups = ["/".join(parents[:length]) for length in range(len(parents), 0, -1)]  # hydra/launcher before hydra
    group = next((group for group in groups if any(os.path.isdir(each / group) for each in config_folders())), None)
    command = "dlopt train --help" if group is None else f"dlopt options {group}"
    advice = for_key(key, show(value))
    names = Names("key", allowed, command, prefix=key.removesuffix(name), instead=lambda _: advice)
    return names.unknown(name, f"{key}={show(value)}")


def check_value(
    key: str, value: Any, annotation: Any, runtime: frozenset[str] = frozenset(), packages: tuple[str, ...] = ()
) -> Any:
    """Validates a value against an annotation and returns it converted. Raises `UserError`; see `check_arguments`."""
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        if not isinstance(value, Mapping):
            names = ", ".join(field.name for field in dataclasses.fields(annotation))
            raise UserError(f"{key}={show(value)}: this is a block of keys ({names}); set them one by one")
        return annotation(**check_arguments(key, annotation, value, runtime, packages))
    if _is_component(value):
        if value["_target_"] is None:  # an optional component that is not set
            return check_value(key, None, annotation)
        if not _may_be_component(annotation):
            raise UserError(f"{key}={show(value)}: must be a value; allowed: {describe_type(annotation)}")
        # A nested component may have an argument of its own with a runtime argument's name (a dataset's image_size).
        return component(key, value, runtime - value.keys(), packages)
    if isinstance(value, list) and any(map(_is_component, value)):
        if not _may_be_component(annotation):
            raise UserError(f"{key}={show(value)}: must be values; allowed: {describe_type(annotation)}")
        return [check_value(f"{key}.{i}", item, _EMPTY, runtime, packages) for i, item in enumerate(value)]
    adapter = adapter_of(annotation)
    try:
        checked = value if adapter is None else adapter.validate_json(json.dumps(value, default=str))
    except UserError as error:  # of a `dlopt.basics.ranges.Condition`
        raise UserError(f"{key}={show(value)}: {error}", kind="value") from None
    except ValidationError as error:
        if isinstance(value, str | int | float) and _takes_list(annotation):  # tracking=wandb
            with contextlib.suppress(UserError):
                return check_value(key, [value], annotation)
        items = value if isinstance(value, list) else [value]
        hint = "".join(f"; {advice}" for each in items if (advice := for_choice(key, str(each))))
        if _has_number_for_text(error):
            hint = f"; quote a text that looks like a number: \"{key}='...'\""
        if isinstance(value, str) and _is_number(value):
            hint = "; a text is no number: of an environment variable, type ${oc.decode:${oc.env:NAME}}"
        if key == "seed":
            hint = "; several seeds, one run each: dlopt train -m seeds=5"
        if value and isinstance(value, list) and not _takes_list(annotation):
            hint = f"; {several_values(value)}"
        if key == "model.weights":  # an enumeration in torchvision
            hint = "; pretrained weights: model=torchvision model.name=NAME model.pretrained=true"
        message = f"{key}={show(value)}: {_reason(error)}; allowed: {describe_type(annotation)}{hint}"
        raise UserError(message, "value", alternatives(annotation)) from None
    if _exceeds_int64(checked):
        raise UserError(f"{key}={show(value)}: too large for a 64-bit integer", kind="value")
    return checked


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _takes_list(annotation: Any) -> bool:
    """Returns whether lists, which may have a single item, are among the values of a type."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Annotated, typing.Union, types.UnionType):
        return any(map(_takes_list, typing.get_args(annotation)))
    return origin in (list, tuple)


def _has_number_for_text(error: ValidationError) -> bool:
    """Returns whether a number is given for a string: name=2024_11_26 is one for Hydra."""
    details = error.errors(include_url=False, include_context=False)
    return any(each["type"] == "string_type" and type(each["input"]) in (int, float) for each in details)


def _is_component(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def _may_be_component(annotation: Any) -> bool:
    """Returns whether a value of the type, or one of its items, may be an object that a component builds."""
    if typing.get_origin(annotation) is typing.Literal:
        return False
    inner = [each for each in typing.get_args(annotation) if isinstance(each, type) or typing.get_origin(each)]
    if inner and typing.get_origin(annotation) is not Callable:
        return any(map(_may_be_component, inner))
    return annotation not in (int, float, str, bool, Duration, type(None))


def _exceeds_int64(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_exceeds_int64, value))
    return isinstance(value, int) and not -(2**63) <= value < 2**63


def adapter_of(annotation: Any) -> TypeAdapter[Any] | None:
    """Returns the validator of a type; None if there is none."""
    if id(annotation) not in _adapters:  # by identity: annotations need not be hashable
        _adapters[id(annotation)] = annotation, _build_adapter(annotation)
    return _adapters[id(annotation)][1]


_adapters: dict[int, tuple[Any, TypeAdapter[Any] | None]] = {}  # keeps the annotations, which `parameters_of` caches


def _build_adapter(annotation: Any) -> TypeAdapter[Any] | None:
    if annotation is _EMPTY or annotation is Any or isinstance(annotation, str):
        return None
    try:
        return TypeAdapter(annotation, config=_STRICT)
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation):
        return None
    except PydanticUserError:  # a type with its own config
        return TypeAdapter(annotation)


def _reason(error: ValidationError) -> str:
    """Returns the most useful of pydantic's messages: pydantic gives one per member of a union.

    A violated range is more useful than "this is not null".
    """
    details = error.errors(include_url=False, include_input=False, include_context=False)
    ranked = sorted(details, key=lambda detail: detail["type"] in _TYPE_MISMATCH)
    if ranked[0]["type"] == "missing":
        return "too few values"
    if ranked[0]["type"] in ("literal_error", "enum"):  # pydantic's message repeats the allowed values
        return "unknown value"
    message = ranked[0]["msg"].replace("Tuple should", "List should").replace(" after validation", "")
    return message[0].lower() + message[1:].replace("Input should", "should") if message else "not valid"


_TYPE_MISMATCH = {"none_required", "bool_type", "int_type", "float_type", "string_type", "list_type", "literal_error"}


_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_PLAIN = {
    int: "an integer", float: "a number", bool: "true | false", str: "a string", type(None): "null", None: "null",
    _EMPTY: "any value", Any: "any value", Duration: "a time > 0 (90s, 5min, 1.5h)",
}  # fmt: skip


def alternatives(annotation: Any) -> list[str]:
    """Returns the values that an annotation allows as a list: ["batch", "layer", "null"], or ["a number > 0"]."""
    text = describe_type(annotation)
    return [text] if "[" in text or "{" in text else text.split(" | ")


def describe_type(annotation: Any) -> str:
    """Describes the values that an annotation allows: 'a number > 0', 'batch | layer', 'null'."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is typing.Annotated:
        found = [(sign, getattr(extra, name, None)) for extra in arguments[1:] for name, sign in _SIGNS.items()]
        bounds = [
            f"{sign} {bound if isinstance(bound, int) else f'{bound:g}'}" for sign, bound in found if bound is not None
        ]
        return " ".join([describe_type(arguments[0]), " and ".join(bounds)]).strip()
    if origin is typing.Literal:
        return " | ".join(show(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):  # torch annotates lr as float | Tensor; a config has no tensors
        return " | ".join(describe_type(option) for option in arguments if getattr(option, "__name__", "") != "Tensor")
    if origin is list:
        return f"a list [a,b,...], each {describe_type(arguments[0])}"
    if origin is dict:
        return f"a block {{name: {describe_type(arguments[1])}}}"
    if origin is tuple:
        return f"a list [{','.join(describe_type(argument) for argument in arguments if argument is not ...)}]"
    if dataclasses.is_dataclass(annotation):
        return f"a block {{{', '.join(field.name for field in dataclasses.fields(annotation))}}}"
    return _PLAIN.get(annotation, getattr(annotation, "__name__", str(annotation)))
