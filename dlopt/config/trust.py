"""Checks a composed config before its values are resolved: what its interpolations expand to, and its `hydra` node.

Through that node a config file could run code before dlopt checks anything else: callbacks, sweeper, launcher, logging,
environment variables. Hydra's own blocklist lets `torch.load` pass, and `logging.config` calls anything under the key
`()`. The composed node is checked, so it does not matter whether a value comes from the command line, a file or an
interpolation. What only the command line may set is checked in `dlopt.config.typed`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dlopt.basics.errors import UserError
from dlopt.basics.plain_values import flatten
from dlopt.config.parameters import show

_PLUGINS = ("hydra._internal.core_plugins.", "hydra_plugins.")  # installed packages that Hydra discovers itself
_SEARCH_COMPONENTS = (
    "hydra.sweeper.sampler._target_",
    "hydra.sweeper.pruner._target_",
)  # of hydra/sweeper=dlopt_optuna
_HANDLERS = ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler")
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
_MAX_VALUES = 10_000
_REFERENCE = re.compile(r"\$\{\s*(\.*)([\w./-]+)\s*\}")  # ${a.b}, ${.a}; references inside resolvers count as well


def check_hydra(config: DictConfig, hydra: Mapping[str, Any]) -> None:
    """Raises `UserError` if Hydra's node names code. `hydra`: the node as plain values, not resolved."""
    for key, value in leaves(hydra, "hydra"):
        name = key.rsplit(".", 1)[-1]
        if name == "_target_":
            is_plugin = key in ("hydra.sweeper._target_", "hydra.launcher._target_") and str(value).startswith(_PLUGINS)
            # `build_study_spec` checks the arguments of samplers and pruners.
            is_sampler = key in _SEARCH_COMPONENTS and re.fullmatch(r"dlopt\.sweeps\.samplers\.[a-z]\w*", str(value))
            if not is_plugin and not is_sampler:
                raise UserError(f"{key}={show(value)}: only Hydra plug-ins are allowed here")
        if key.startswith(("hydra.job_logging.", "hydra.hydra_logging.")):
            _check_logging(key, name, str(value))
        # Only a value that is one interpolation can resolve to a block; with other text around it, it is a string.
        if isinstance(value, str) and value.startswith("${") and value.endswith("}") and _is_block(config, key):
            raise UserError(f"{key}={value}: a block of Hydra's config must not be an interpolation")


def _check_logging(key: str, name: str, text: str) -> None:
    if name == "()" or (name == "class" and text not in _HANDLERS):
        raise UserError(f"{key}={text}: logging must not name callables; allowed classes: {', '.join(_HANDLERS)}")
    is_object = text.startswith(("ext://", "cfg://")) or ("${" in text and name != "filename")
    if is_object and text not in _STREAMS:
        raise UserError(f"{key}={text}: logging must not name objects; allowed: {', '.join(_STREAMS)}")


def _is_block(config: DictConfig, key: str) -> bool:
    """Returns whether an interpolation resolves to a block, which could contain a `_target_`."""
    try:
        return OmegaConf.is_config(OmegaConf.select(config, key))
    except OmegaConfBaseException:
        return False  # resolvable only inside a job (${hydra.job.num}): a scalar


def check_expansion(config: Mapping[str, Any]) -> None:
    """Raises `UserError` for a value whose interpolations expand to very many values.

    `a: ${b}${b}`, `b: ${c}${c}`, ... doubles with every line.
    """
    texts = {key: value for key, value in leaves(config) if isinstance(value, str) and "${" in value}
    sizes: dict[str, int] = {}

    def size(key: str) -> int:
        """Counts the values that the text of `key`, or the texts below it, expand to."""
        if key not in sizes:
            sizes[key] = 1  # met again: a cycle, which OmegaConf reports
            below = [key] if key in texts else [other for other in texts if other.startswith(f"{key}.")]
            references = [_referred_key(each, *match) for each in below for match in _REFERENCE.findall(texts[each])]
            sizes[key] = min(1 + sum(map(size, references)), _MAX_VALUES + 1)
        return sizes[key]

    for key, text in texts.items():
        try:
            total = size(key)
        except RecursionError:  # a chain of thousands of references
            total = _MAX_VALUES + 1
        if total > _MAX_VALUES:
            shown = text if len(text) <= 60 else f"{text[:60]}..."
            raise UserError(f"{key}={shown}: its interpolations expand to more than {_MAX_VALUES} values")


def _referred_key(key: str, dots: str, path: str) -> str:
    """Returns the absolute key of a reference in `key`: ${.x} is a sibling, ${..x} one level higher."""
    parents = key.split(".")[: -len(dots)] if dots else []
    return ".".join([*parents, path])


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of nested dicts and lists by dotted key; items of lists by their index."""
    for key, value in flatten(node, prefix).items():
        if isinstance(value, list):
            for i, item in enumerate(value):
                yield from leaves(item, f"{key}.{i}")
        else:
            yield key, value
