"""Shared by all commands except `dlopt train`: reading a command line, composing it, and writing results.

A command is a function whose keyword-only parameters are the keys that only it has; they are checked against their
annotations like the arguments of every component. `on_experiment` and `on_checkpoint` turn such a function into one of
the arguments, which returns the exit code.
"""

import contextlib
import functools
import glob
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlopt.config.compose import Composer, choices_of, grid, parse_arguments, to_plain
from dlopt.config.saved import refuse_others, take_path, typed_values
from dlopt.config.schema import check_arguments, parameters_of, show
from dlopt.errors import DONE, UserError
from dlopt.folders import make_new

if TYPE_CHECKING:
    from dlopt.config.experiment import Experiment
    from dlopt.data.samples import Dataset

Command = Callable[[list[str]], int]

_OF_TRAINING = ("cfg", "hydra_help", "info", "package", "resolve", "run", "shell_completion")  # flags of Hydra's


@dataclass(frozen=True)
class Job:
    """Overrides of one of several combinations: all, the swept ones, and those that its choices have no key for."""

    overrides: list[str]
    varied: list[str]
    skipped: list[str]

    def label(self, choices: Mapping[str, str], subject: str) -> str:
        """What varies, names of `choices` (group -> choice) without their group; where nothing does, the subject's."""
        words = [choices[group] for group in choices if any(line.startswith(f"{group}=") for line in self.varied)]
        keys = [line for line in self.varied if line.partition("=")[0] not in choices]
        for group in choices:
            keys = [line.removeprefix(f"{group}.") for line in keys]
        return ", ".join([*words, *keys]) or choices[subject]


@dataclass(frozen=True)
class Line:
    """Overrides of the keys of `dlopt train`, and what composes them."""

    composer: Composer
    overrides: list[str]

    def take(self, target: Callable[..., Any], **defaults: Any) -> tuple[dict[str, Any], "Line"]:
        """Returns the checked keyword-only arguments of `target` and the line without them. Raises `UserError`."""
        names = own_names(target)
        mine = [each for each in self.overrides if each.partition("=")[0] in names]
        parsed = self.composer.parse(mine)
        for override in parsed:
            if override.is_sweep_override():
                raise UserError(f"{override.input_line}: one value is needed; a list is written [a,b]")
        values = defaults | {override.get_key_element(): override.value() for override in parsed}
        rest = replace(self, overrides=[each for each in self.overrides if each not in mine])
        return check_own(target, values), rest

    def call(self, function: Callable[..., int]) -> int:
        """Calls `function(line, **own keys)`."""
        own, rest = self.take(function)
        return function(rest, **own)

    def refuse_several(self, why: str) -> None:
        """Raises `UserError` for a key with several values, saying why one is needed."""
        for override in self.composer.parse(self.overrides):
            if override.is_sweep_override():
                raise UserError(f"{override.input_line}: {why}; a list is written [a,b]")

    def refuse_rest(self, command: str, *targets: Callable[..., Any]) -> None:
        """Raises `UserError` where anything is left of the line: all keys are those of the `targets`."""
        if self.overrides:
            names = ", ".join(name for target in targets for name in own_names(target))
            raise UserError(f"{self.overrides[0]}: {command} has no such key; allowed: {names}")

    def experiment(self, overrides: list[str] | None = None) -> tuple["Experiment", dict[str, str]]:
        """The checked experiment of these overrides (the line's), and its choices: group -> name."""
        from dlopt.config.parsing import parse

        overrides = self.overrides if overrides is None else overrides
        config = self.composer.compose(overrides)
        return parse(*to_plain(config, overrides)), choices_of(config)

    def fixed(self) -> list[str]:
        """The overrides with one value."""
        return [str(each.input_line) for each in self.composer.parse(self.overrides) if not each.is_sweep_override()]

    def combinations(self) -> list[list[str]]:
        """The overrides of each combination of values, in the order of `dlopt train -m`."""
        return grid(self.composer.parse(self.overrides))

    def jobs(self, groups: Sequence[str], most: float = math.inf) -> list[Job]:
        """One job per combination of values. A key that only some of the choices of a group have is left to these."""
        fragments = tuple(f"{group}=_" for group in groups)
        combinations = self.combinations()
        whole = [lines for lines in combinations if not any(line.startswith(fragments) for line in lines)]
        combinations = whole or combinations  # glob(*) finds fragments too
        if len(combinations) > most:
            typed = " ".join(self.overrides)
            raise UserError(f"{typed}: {len(combinations)} curves; {most} at most are drawn in one picture")
        swept = {each.get_key_element() for each in self.composer.parse(self.overrides) if each.is_sweep_override()}
        offered = [self._offered(lines, groups) for lines in combinations]
        known = set[str]().union(*offered)
        found = []
        for lines, keys in zip(combinations, offered, strict=True):
            skipped = [line for line in lines if _group_key(line, groups) in known - keys]
            kept = [line for line in lines if line not in skipped]
            found.append(Job(kept, [line for line in kept if line.split("=")[0] in swept], skipped))
        return found

    def _offered(self, lines: list[str], groups: Sequence[str]) -> set[str]:
        """The keys of the chosen choices of those groups of which a key is typed."""
        typed = {_group_key(line, groups).partition(".")[0] for line in lines} - {""}
        if not typed:
            return set()
        config = self.composer.compose([line for line in lines if not _group_key(line, groups)])
        return {f"{group}.{key}" for group in typed for key in config[group]}


def _group_key(line: str, groups: Sequence[str]) -> str:
    """schedule.x of schedule.x.y=...; nothing of other overrides."""
    parts = line.lstrip("+").partition("=")[0].split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[0] in groups else ""


def skipped_keys(jobs: Sequence[tuple[str, Job]]) -> list[str]:
    """A line for each key that some of the labelled jobs do not have."""
    names: dict[str, list[str]] = {}
    for label, job in jobs:
        for line in job.skipped:
            names.setdefault(line.split("=")[0], []).append(label)
    return [
        f"{key}: unknown key in {', '.join(dict.fromkeys(labels))}, drawn without it"
        for key, labels in names.items()
    ]


# -- reading command lines


def on_experiment(usage: str, *, several: str, one: bool = False) -> Callable[[Callable[..., int]], Command]:
    """Makes a command of `function(line, **own keys)`: the rest of the line are keys of `dlopt train`.

    Args:
        several: the answer to -m, and where the command takes `one` value of every key, to several values.
    """

    def decorate(function: Callable[..., int]) -> Command:
        @functools.wraps(function)
        def command(arguments: list[str]) -> int:
            line = read_line(arguments, usage, several=several)
            if line is None:
                return DONE
            own, rest = line.take(function)
            if one:
                rest.refuse_several(several)
            return function(rest, **own)

        return command

    return decorate


def read_line(arguments: list[str], usage: str, *, several: str) -> Line | None:
    """Parses what was typed after a command's name; None for --help, which is printed. Raises `UserError`."""
    parsed = parse_arguments(arguments)
    if parsed.help:
        print(usage, end="")
        return None
    if parsed.multirun:
        raise UserError(f"-m: {several}")
    for flag in _OF_TRAINING:
        if getattr(parsed, flag):
            raise UserError(f"--{flag.replace('_', '-')}: this is for `dlopt train` alone")
    return Line(Composer(parsed.config_name, parsed.config_dir), parsed.overrides)


def on_checkpoint(
    name: str, usage: str, may_change: Sequence[str] = (), *, several: bool = False
) -> Callable[[Callable[..., int]], Command]:
    """Makes a command of `function(path, changes, **own keys)`: it works on a checkpoint, with the config in it.

    Args:
        name: of the command.
        may_change: the keys and groups of the checkpoint's config that may be changed.
        several: the function takes a list of paths.
    """

    def decorate(function: Callable[..., int]) -> Command:
        @functools.wraps(function)
        def command(arguments: list[str]) -> int:
            if {"-h", "--help"} & set(arguments):
                print(usage, end="")
                return DONE
            values = typed_values(arguments)
            paths = _take_paths(values, name) if several else take_path(values, name)
            names = own_names(function)
            own = check_own(function, {key: values.pop(key) for key in names if key in values})
            others = [key for key in values if key.split(".")[0] not in names]  # tta.crop belongs to tta
            if others and not may_change:
                raise UserError(f"{others[0]}: unknown key; allowed: checkpoint, {', '.join(names)}")
            refuse_others(others, may_change, names)
            return function(paths, values, **own)

        return command

    return decorate


def _take_paths(values: dict[str, Any], command: str) -> list[Path]:
    """The checkpoints, a path, a list or a pattern, which leave `values`."""
    typed = values.get("checkpoint")
    if not isinstance(typed, list):
        path = take_path(values, command)
        found = sorted(glob.glob(str(path))) if "*" in path.name and not path.exists() else []
        return [Path(each) for each in found] or [path]
    del values["checkpoint"]
    if not typed or not all(isinstance(each, str) and each for each in typed):
        raise UserError(f"checkpoint={show(typed)}: a list of paths is needed: checkpoint=[a/best.pt,b/best.pt]")
    return [Path(each) for each in typed]


def own_names(target: Callable[..., Any]) -> list[str]:
    """The names of the keyword-only parameters."""
    return [name for name, each in parameters_of(target).items() if each.kind is each.KEYWORD_ONLY]


def check_own(target: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Checks values of keyword-only parameters against their annotations. Raises `UserError`."""
    return check_arguments("", target, values, frozenset(parameters_of(target).keys() - own_names(target)))


def refuse_empty(**lists: Sequence[Any]) -> None:
    """Raises `UserError` for a list without values."""
    for name, values in lists.items():
        if not values:
            raise UserError(f"{name}=[]: at least one value is needed")


# -- data and output


def read_dataset(experiment: "Experiment") -> "Dataset":
    """The experiment's data as training prepares them, but decoded when they are used."""
    from dlopt.data.splits import prepare

    settings = experiment.data_settings
    return prepare(experiment.data.build(**vars(settings)), replace(settings, memory=False))


def output_folder(output: str | None, command: str) -> Path:
    """The folder `output`, made if need be, or a new one of the command's. Raises `UserError`."""
    if output is None:
        return make_new(Path("outputs") / command / datetime.now().strftime("%Y-%m-%d_%H-%M-%S"), "output")
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output={output}: this is a file; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={output}: cannot create this folder: {error.strerror}") from None
    return folder


def refuse_folder(output: Path, hint: str = "") -> Path:
    """Returns the path of a file to write. Raises `UserError` where it is a folder."""
    if output.is_dir() or not output.name:
        raise UserError(f"output={output}: this is a folder; name a file in it{hint}")
    return output


@contextlib.contextmanager
def writing(output: Path, what: str = "nothing can be written there") -> Iterator[None]:
    """Turns an OSError of the block into a `UserError` that names `output`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"output={output}: {what}: {error.strerror or error}") from None
