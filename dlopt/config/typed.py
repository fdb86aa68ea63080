"""What only the command line may set: whom to trust, what to start, and with which environment.

The axes of `space=FILE` and `hydra.sweeper.params`, the points of `hydra.sweeper.enqueue`, the run of `from=`, the
variants of a comparison, the workloads and spaces of a benchmark, the rungs of a ladder, the trials of a study: all of
them become overrides, which are composed like those of the command line, but nobody has typed them. So every override
is compared with the words of the command line before it is composed, and every composed config with them as well.
"""

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dlopt.basics.errors import UserError
from dlopt.basics.formats import printable
from dlopt.basics.plain_values import flatten, is_below
from dlopt.basics.secrets import is_secret_name, redact
from dlopt.config.overrides import group_of, key_of, keys_of, listed_values, parse_axes, parse_overrides
from dlopt.config.parameters import show
from dlopt.config.resolve import explain_interpolation

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

COMMAND_LINE_ONLY = ("allow_packages", "hydra.callbacks", "hydra.job.env_set", "hydra.launcher", "hydra.searchpath")
"""Keys and blocks by which a file could run code."""
IN_PART = ("hydra.hydra_logging", "hydra.job_logging", "hydra.sweeper")
"""Blocks of which a config file may set all but the files of a log, and the sweepers of other packages."""
LAUNCHER_OPTIONS = (
    "account", "constraint", "cpus_per_task", "gpus", "gpus_per_node", "gpus_per_task", "mem", "mem_gb", "nodes",
    "partition", "qos", "time",
)  # fmt: skip
"""What a file may set of a launcher, also below `extra`: the resources of a site. All else must be typed."""
_OPTION = re.compile(r"(?!-)[A-Za-z0-9_.:,/+-]+")  # a value of these, which no program takes for another option
_DEFAULT_LAUNCHERS = ("serial", "basic")  # of conf/train.yaml, and of Hydra
_OWN_SWEEPERS = ("hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "hydra_plugins.dlopt_sweeps.OptunaSweeper")
# Of a log: a line that it appends to ~/.bashrc is a command. Not only `filename` names a file: `.` sets any attribute.
_HANDLER_KEYS = ("class", "delay", "encoding", "filters", "formatter", "level", "mode", "stream")
_LOG_FILES = ("${hydra.runtime.output_dir}/${hydra.job.name}.log", "hydra-${hydra.job.name}.log")  # Hydra's own
Installed = Callable[[str, str], Iterable[Mapping[str, Any]]]
"""(block, choice) -> the settings, by full key, of the installed choices that the choice may be or include."""


@dataclass(frozen=True)
class CommandLine:
    """The words of a command line, or the overrides that a program passes to the Python API."""

    words: tuple[str, ...] = ()

    def adding(self, *words: str) -> "CommandLine":
        return CommandLine((*self.words, *words))

    def sets(self, key: str, value: Any) -> bool:
        """Returns whether a word gives the key this value: alone, in a list of values, or in a block of keys.

        `key`: in full; of a block, one of the keys in it. `value`: not resolved.
        """
        return any(key in typed and _is_same(value, typed[key]) for typed in self._settings(key))

    def values_below(self, block: str) -> dict[str, Any]:
        """Returns the typed values of a block, by full key; of a list of values, the last."""
        found: dict[str, Any] = {}
        for typed in self._settings(block):
            found |= {key: value for key, value in typed.items() if is_below(key, (block,))}
        return found

    def _settings(self, key: str) -> Iterator[dict[str, Any]]:
        """Yields what the words about `key` set, by full key. Raises `UserError`."""
        for word in self.words:
            keys = keys_of(word) if "=" in word and not word.startswith("~") else ()
            if any(is_below(key, (each,)) or is_below(each, (key,)) for each in keys):
                for override in (override for axis in parse_axes([word]) for override in axis.overrides):
                    yield from _settings_of(override)


def _settings_of(override: "Override") -> Iterator[dict[str, Any]]:
    """Yields what an override sets, by full key; of several values, what each sets."""
    values = [override]
    if override.is_sweep_override():
        values = parse_overrides(f"{override.get_key_element()}={value}" for value in listed_values(override))
    for each in values:
        yield flatten(each.value(), key_of(each))


def _is_same(value: Any, typed: Any) -> bool:
    """Returns whether a composed value is the typed one, which the type of its key may have converted: 1 to "1"."""
    return bool(value == typed) or str(value) == str(typed)


def refuse_untyped(values: Mapping[str, Any], command_line: CommandLine) -> None:
    """Raises `UserError` for a value that the command line does not set. `values`: by full key, of guarded keys."""
    for key, value in values.items():
        if not command_line.sets(key, value):
            name, more = key, ""
            if key == "hydra.launcher":
                name, more = "hydra/launcher", f"; to use it, type hydra/launcher={printable(show(value))}"
            elif _is_of_launcher(key):
                more = f"; of a launcher, a file may set {', '.join(LAUNCHER_OPTIONS)}"
            shown = "***" if is_secret_name(key.rpartition(".")[2]) else printable(show(value))
            raise UserError(f"{name}={shown}: set in a config file, but accepted from the command line only{more}")


def guarded_of_override(override: "Override") -> Iterator[dict[str, Any]]:
    """Yields the values of an override that must be typed, by full key; of several values, those of each."""
    blocks = (*COMMAND_LINE_ONLY, *IN_PART)
    if group_of(override) in {each.partition(".")[0] for each in blocks}:
        for values in _settings_of(override):  # also of a block above them: hydra.job={env_set:{A:1}}
            yield {key: value for key, value in values.items() if is_below(key, blocks)}


def guarded(raw: Mapping[str, Any], installed: Installed) -> dict[str, Any]:
    """Returns the values of a composed config that must be typed, by full key.

    What dlopt, Hydra and installed packages define for a choice is no setting of a file.

    Args:
        raw: the config as plain values, not resolved.
    """
    hydra = raw["hydra"]
    choices = hydra["runtime"]["choices"]
    found = flatten(raw.get("allow_packages"), "allow_packages")
    found |= flatten(hydra["searchpath"], "hydra.searchpath") | flatten(hydra["callbacks"], "hydra.callbacks")
    found |= flatten(hydra["job"]["env_set"], "hydra.job.env_set")
    if (launcher := choices.get("hydra/launcher")) not in _DEFAULT_LAUNCHERS:
        found["hydra.launcher"] = launcher
    settings = _not_installed(hydra["launcher"], "hydra.launcher", str(launcher), installed)
    found |= {key: value for key, value in settings.items() if not is_option(key)}
    if _mapping(hydra["sweeper"]).get("_target_") not in _OWN_SWEEPERS:
        settings = _not_installed(hydra["sweeper"], "hydra.sweeper", str(choices.get("hydra/sweeper")), installed)
        # Its axes are overrides of jobs, which are checked one by one.
        found |= {key: value for key, value in settings.items() if not is_below(key, ("hydra.sweeper.params",))}
    for name in ("hydra_logging", "job_logging"):
        block = f"hydra.{name}.handlers"
        handlers = flatten(_mapping(hydra[name]).get("handlers"), block)
        for key, value in handlers.items():
            if key.removeprefix(f"{block}.").partition(".")[2] not in _HANDLER_KEYS and value not in _LOG_FILES:
                found[key] = value
    return {key: value for key, value in found.items() if value not in (None, [], {})}


def describe_launcher(config: DictConfig, command_line: CommandLine, installed: Installed) -> str:
    """Returns what was typed of the launcher, and what files set; "" if there is nothing but the choice."""
    typed = command_line.values_below("hydra.launcher")
    choice = typed.pop("hydra.launcher", None)
    found = {"typed": typed, "from config files": file_options(config, command_line, installed)}
    parts = []
    for title, values in found.items():
        words = [f"{key.removeprefix('hydra.launcher.')}={show(value)}" for key, value in values.items()]
        parts += [f"{title} {shlex.join(words)}"] if words else []
    return printable(redact(f"hydra/launcher={choice}: {'; '.join(parts)}")) if parts else ""


def file_options(config: DictConfig, command_line: CommandLine, installed: Installed) -> dict[str, Any]:
    """Returns the options of the launcher that files set, by full key, resolved.

    Raises `UserError` for a value that a program, such as sbatch, may take for another option.
    """
    hydra: Any = OmegaConf.to_container(config.hydra, resolve=False, enum_to_str=True)
    choice = str(hydra["runtime"]["choices"].get("hydra/launcher"))
    found = {}
    for key, value in _not_installed(hydra["launcher"], "hydra.launcher", choice, installed).items():
        if not is_option(key) or value is None or command_line.sets(key, value):
            continue
        try:
            found[key] = resolved = OmegaConf.select(config, key)
        except OmegaConfBaseException as error:
            reason = explain_interpolation(error)
            raise UserError(f"{key}={printable(show(value))}: {reason}; type the value on the command line") from None
        if not all(map(_is_safe, resolved if OmegaConf.is_list(resolved) else [resolved])):
            raise UserError(
                f"{key}={printable(show(value))}: set in a config file, where a value of a launcher has only letters, "
                "digits and _.:,/+-, and does not begin with a dash; type it on the command line"
            )
    return found


def _is_safe(value: Any) -> bool:
    """Returns whether a program takes the value as a value. true would be an option that takes the next word as its."""
    is_scalar = isinstance(value, str | int | float) and not isinstance(value, bool)
    return is_scalar and _OPTION.fullmatch(str(value)) is not None


def is_option(key: str) -> bool:
    """Returns whether the key of a launcher, or of its `extra`, is an option that a file may set."""
    name = key.removeprefix("hydra.launcher.").removeprefix("extra.")
    return _is_of_launcher(key) and name.replace("-", "_") in LAUNCHER_OPTIONS


def _is_of_launcher(key: str) -> bool:
    return is_below(key, ("hydra.launcher",))


def _mapping(node: Any) -> Mapping[str, Any]:
    """Returns a block; an empty one for null, and for one that is missing."""
    return node if isinstance(node, Mapping) else {}


def _not_installed(node: Any, block: str, choice: str, installed: Installed) -> dict[str, Any]:
    """Returns the settings of a block, by full key, in which it differs from every installed choice that it may be."""
    found: dict[str, Any] = flatten(_mapping(node), block)
    target = found.get(f"{block}._target_")
    for settings in installed(block, choice):
        if settings.get(f"{block}._target_") == target:
            found = {key: value for key, value in found.items() if key not in settings or settings[key] != value}
    return found
