"""A config is checked against the signatures of what it names: the annotations are the schema.

Values are checked as JSON in pydantic's strict mode: an int is accepted for a float and a list for a tuple, but neither
"0.1" nor true passes for a number. NaN and infinities are refused everywhere.
"""

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any

from annotated_types import Ge, Interval
from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticUndefinedAnnotation

from dlopt.config.choices import extensions
from dlopt.errors import UserError
from dlopt.ranges import Count, Fraction, NonNegative, Positive

ALLOWED_PACKAGES = ("dlopt", "torch.optim", "torch.nn", "torchvision")
# Of dlopt itself, what experiments are made of; the rest acts on files, processes and the network.
_PARTS = (
    "dlopt.augment", "dlopt.data", "dlopt.functions", "dlopt.init", "dlopt.losses", "dlopt.models", "dlopt.optim",
    "dlopt.parallel", "dlopt.schedules", "dlopt.sweeps.samplers", "dlopt.training.clipping", "dlopt.training.stopping",
)  # fmt: skip
_NO_PARTS = (
    "dlopt.data.cache", "dlopt.data.verify", "dlopt.parallel.launch", "dlopt.parallel.rendezvous",
    "torchvision.datasets.utils", "torchvision.io", "torchvision.utils",
)  # fmt: skip
# For arguments of callables that are not ours, by name: torch's SGD itself takes lr=nan and momentum=1.5.
_RANGES: dict[str, Any] = {
    "lr": Positive,
    "momentum": Fraction,
    "dampening": Annotated[float, Interval(ge=0, le=1)],
    "weight_decay": NonNegative,
    "eps": NonNegative,
    "betas": tuple[Fraction, Fraction],
    "alpha": Fraction,
    "rho": Fraction,
    "lambd": NonNegative,
    "lr_decay": NonNegative,
    "initial_accumulator_value": NonNegative,
    "momentum_decay": NonNegative,
    "etas": tuple[Annotated[float, Interval(gt=0, lt=1)], Annotated[float, Interval(gt=1)]],
    "step_sizes": tuple[Positive, Positive],
    "max_iter": Count,
    "max_eval": Count | None,
    "history_size": Count,
    "tolerance_grad": NonNegative,
    "tolerance_change": NonNegative,
    "ns_steps": Count,
    "label_smoothing": Annotated[float, Ge(0), Interval(le=1)],
}
_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
_EMPTY = inspect.Parameter.empty


def trusted_packages() -> tuple[str, ...]:
    """The packages whose callables a config may name without being trusted on the command line."""
    return (*ALLOWED_PACKAGES, *(extension.package for extension in extensions()))


@dataclasses.dataclass(frozen=True)
class Component:
    """A callable and its checked arguments, waiting for what is known only at run time."""

    key: str
    target: Callable[..., Any]
    arguments: Mapping[str, Any]

    def build(self, **runtime: Any) -> Any:
        """Calls the target with its arguments and with those of `runtime` that its signature names."""
        names = parameters_of(self.target).keys() - self.arguments.keys()
        known = {name: value for name, value in runtime.items() if name in names}
        return self.target(**known, **{name: _built(value, runtime) for name, value in self.arguments.items()})

    def takes(self, name: str) -> bool:
        return name in parameters_of(self.target)

    def partial(self, **extra: Any) -> "Component":
        return dataclasses.replace(self, arguments={**self.arguments, **extra})


def _built(value: Any, runtime: Mapping[str, Any]) -> Any:
    if isinstance(value, Component):
        return value.build(**runtime)
    if isinstance(value, list):
        return [_built(item, runtime) for item in value]
    return value


def component(
    key: str,
    node: Mapping[str, Any],
    runtime: Iterable[str],
    packages: Iterable[str],
    related: tuple[str, ...] = (),
) -> Component:
    """The checked component that `node` describes: `_target_` and arguments, possibly with components within.

    `related` names keys that stand beside these in the config; they only serve to guess what was meant.

    Raises `UserError` for a target outside `packages`, and for unknown, missing, mistyped and out-of-range arguments.
    """
    if not isinstance(node.get("_target_"), str):
        raise UserError(f"{key}._target_={show(node.get('_target_'))}: the dotted name of a callable is needed")
    packages, runtime = tuple(packages), frozenset(runtime)
    target = resolve_target(f"{key}._target_", node["_target_"], packages)
    values = {name: value for name, value in node.items() if name != "_target_"}
    return Component(key, target, check_arguments(key, target, values, runtime, packages, related))


def resolve_target(key: str, path: str, packages: Iterable[str]) -> Callable[..., Any]:
    """The class or function of that dotted path.

    It must be defined in an allowed package, at the top level of a module, not merely be reachable through one.
    """
    packages = tuple(packages)
    if not _within(path, packages):
        package = path.split(".")[0]
        hint = f"; type allow_packages=[{package}] on the command line to trust another package" if package else ""
        raise UserError(f"{key}={path}: only callables of {', '.join(packages)} may be named{hint}")
    found = _locate(key, path)
    if found is None:
        raise UserError(f"{key}={path}: there is no such callable{_importable(path)}")
    home = getattr(found, "__module__", None) or ""
    if not callable(found) or inspect.ismodule(found) or not _within(home, packages):
        raise UserError(f"{key}={path}: this is not a class or function defined in {', '.join(packages)}")
    is_function_of_datasets = _within(home, ("torchvision.datasets",)) and not inspect.isclass(found)
    is_other = _within(home, ("dlopt",)) and not _within(home, _PARTS)
    if is_other or is_function_of_datasets or _within(home, _NO_PARTS):
        raise UserError(f"{key}={path}: this is no part of an experiment")
    return typing.cast(Callable[..., Any], found)


def _within(path: str, packages: tuple[str, ...]) -> bool:
    # torch.optim's and torch.nn's classes live in submodules of theirs, a few of torch.optim's in torch.optim._x
    return any(path == package or path.startswith(f"{package}.") for package in packages)


def _locate(key: str, path: str) -> Any:
    """What stands at the top level of a module; None where there is nothing. Private names are not looked up."""
    module, _, name = path.rpartition(".")
    if not module or any(not part.isidentifier() or part.startswith("_") for part in path.split(".")):
        return None
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            return None
        raise UserError(f"{key}={path}: importing {module} failed: {error}") from error
    except Exception as error:
        raise UserError(f"{key}={path}: importing {module} failed: {type(error).__name__}: {error}") from error


def _importable(path: str) -> str:
    package = path.split(".")[0]
    return "" if importlib.util.find_spec(package) else f" (the package {package} is not installed)"


def check_arguments(
    key: str,
    target: Callable[..., Any],
    values: Mapping[str, Any],
    runtime: frozenset[str] = frozenset(),
    packages: tuple[str, ...] = (),
    related: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The arguments of `target` as its annotations want them. `runtime` names those that no config gives."""
    parameters = parameters_of(target)
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    own = [name for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    allowed = [name for name in own if name not in runtime]
    for name, value in values.items():
        if name not in allowed and not (open_ended and name not in runtime):
            raise UserError(_unknown(_join(key, name), str(name), value, (*allowed, *related)))
    for name in allowed:
        if name not in values and parameters[name].default is _EMPTY:
            raise UserError(f"{_join(key, name)}: a value is needed ({_describe(parameters[name].annotation)})")
    return {
        name: _checked(_join(key, name), value, _annotation(target, name), runtime, packages)
        for name, value in values.items()
    }


def accepted(target: Callable[..., Any], name: str) -> str:
    """Describes the values that an argument accepts: `a number > 0`."""
    return _describe(_annotation(target, name))


def _annotation(target: Callable[..., Any], name: str) -> Any:
    parameters = parameters_of(target)
    annotation = parameters[name].annotation if name in parameters else _EMPTY
    return annotation if target.__module__.startswith("dlopt") else _RANGES.get(name, annotation)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _unknown(key: str, name: str, value: Any, allowed: Iterable[str]) -> str:
    allowed = list(allowed)
    close = get_close_matches(name, allowed, n=1, cutoff=0.6)
    hint = f"did you mean {key[: len(key) - len(name)]}{close[0]}? " if close else ""
    return f"{key}={show(value)}: there is no such key; {hint}allowed: {', '.join(allowed) or 'none'}"


def _checked(key: str, value: Any, annotation: Any, runtime: frozenset[str], packages: tuple[str, ...]) -> Any:
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        if not isinstance(value, Mapping):
            names = ", ".join(field.name for field in dataclasses.fields(annotation))
            raise UserError(f"{key}={show(value)}: this is a block of keys ({names}); set them one by one")
        return annotation(**check_arguments(key, annotation, value, runtime, packages))
    if isinstance(value, Mapping) and "_target_" in value:
        # what is known at run time may mean another thing here: a dataset's image_size is its own
        return component(key, value, runtime - value.keys(), packages)
    if isinstance(value, list) and any(isinstance(item, Mapping) and "_target_" in item for item in value):
        return [_checked(f"{key}.{i}", item, _EMPTY, runtime, packages) for i, item in enumerate(value)]
    adapter = _adapter(annotation)
    if adapter is None:
        return value
    try:
        return adapter.validate_json(json.dumps(value, default=str))
    except ValidationError as error:
        raise UserError(f"{key}={show(value)}: {_reason(error)}; allowed: {_describe(annotation)}") from None


@functools.cache
def parameters_of(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a callable by name, with their types."""
    signature = inspect.signature(target)
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    except Exception:  # somebody's annotations that do not evaluate: their arguments pass unchecked
        hints = {}
    parameters = [p.replace(annotation=hints.get(n, p.annotation)) for n, p in signature.parameters.items()]
    return {each.name: each for parameter in parameters for each in _unpacked(parameter)}


def _unpacked(parameter: inspect.Parameter) -> list[inspect.Parameter]:
    """Of `**keys: Unpack[SomeTypedDict]` the keys that it stands for (PEP 692); any other parameter as it is."""
    if typing.get_origin(parameter.annotation) is not typing.Unpack:
        return [parameter]
    [keys] = typing.get_args(parameter.annotation)
    hints = typing.get_type_hints(keys, include_extras=True)
    return [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=hint) for name, hint in hints.items()]


def _adapter(annotation: Any) -> TypeAdapter[Any] | None:
    if annotation is _EMPTY or annotation is Any or isinstance(annotation, str):
        return None
    try:
        return TypeAdapter(annotation, config=_STRICT)
    except PydanticUserError as error:
        if isinstance(error, PydanticSchemaGenerationError | PydanticUndefinedAnnotation):
            return None
        return TypeAdapter(annotation)  # the type brings a config of its own


def show(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, float):
        return repr(value)  # nan, which JSON has not
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _reason(error: ValidationError) -> str:
    """The first complaint that speaks of the value itself: pydantic lists one per member of a union."""
    details = error.errors(include_url=False, include_input=False, include_context=False)
    ranked = sorted(details, key=lambda detail: detail["type"] in _TYPE_MISMATCH)
    if ranked[0]["type"] == "missing":
        return "too few values"
    message = ranked[0]["msg"]
    return message[0].lower() + message[1:].replace("Input should", "should") if message else "not valid"


_TYPE_MISMATCH = {"none_required", "bool_type", "int_type", "float_type", "string_type", "list_type", "literal_error"}


def _describe(annotation: Any) -> str:
    """What an annotation allows, in a reader's words: 'a number > 0', 'one of batch, layer', 'null'."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if annotation is _EMPTY or annotation is Any:
        return "any value"
    if annotation is type(None) or annotation is None:
        return "null"
    if origin is typing.Annotated:
        bounds = [bound for extra in arguments[1:] for bound in _bounds(extra)]
        return " ".join([_describe(arguments[0]), " and ".join(bounds)]).strip()
    if origin is typing.Literal:
        return " | ".join(show(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):  # of which a config gives no tensors
        return " | ".join(_describe(each) for each in arguments if getattr(each, "__name__", "") != "Tensor")
    if origin is list:
        return f"a list [a,b,...] of {_describe(arguments[0])}"
    if origin is tuple:
        return f"a list [{','.join(_describe(argument) for argument in arguments if argument is not ...)}]"
    plain = {int: "a whole number", float: "a number", bool: "true | false", str: "a text"}
    return plain.get(annotation, getattr(annotation, "__name__", str(annotation)))


_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def _bounds(extra: Any) -> list[str]:
    bounds = [(sign, getattr(extra, name, None)) for name, sign in _SIGNS.items()]
    return [f"{sign} {each if isinstance(each, int) else f'{each:g}'}" for sign, each in bounds if each is not None]
