"""Parsing, composition and output shared by all commands except `dlopt train`.

The keyword-only parameters of a command function are its own keys, validated against their annotations like the
arguments of every component. The decorators `on_config` and `on_checkpoint` turn the function into
`command(arguments) -> exit code`.

Hydra, OmegaConf and pydantic are imported where they are used: printing the help of a command needs none of them.
"""

import contextlib
import functools
import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from dlopt.basics.errors import FileError, UserError
from dlopt.basics.folders import make, make_new, refuse_url
from dlopt.basics.interruption import print_note
from dlopt.basics.names import Names
from dlopt.basics.plain_values import is_below
from dlopt.basics.status_line import waiting
from dlopt.commands.shared.document import print_document
from dlopt.commands.shared.usage import check_forms, command_key_names, command_keys
from dlopt.config.choices import CONFIG_NAME
from dlopt.config.flags import parse_arguments
from dlopt.config.overrides import (
    Axis,
    grid,
    is_set,
    key_of,
    parse_axes,
    quoted_plain,
    refuse_several,
    single_values,
    text_of,
    value_of,
    without,
)
from dlopt.config.parameters import parameters_of
from dlopt.config.reads import refuse_unread, refuse_unread_hydra, unavailable

if TYPE_CHECKING:
    from dlopt.config.compose import Composer
    from dlopt.config.run_config import RunConfig

Command = Callable[[list[str]], int]
Result = TypeVar("Result")

_Checkpoint = Annotated[
    str, "PATH: a checkpoint, a run folder (its best.pt, or else last.pt), or a sweep (its best run)"
]


@dataclass(frozen=True)
class Combination:
    """Overrides of one combination of values: all, the varied ones, and the skipped ones (no key of its choices)."""

    overrides: list[str]
    varied: list[str]
    skipped: list[str]

    def label(self, choices: Mapping[str, str], subject: str) -> str:
        """Joins the varied choices and overrides; without any, returns the choice of the group `subject`.

        Args:
            choices: group -> choice; these groups are omitted from the label: "resnet20", not "model=resnet20".
        """
        names = [choices[group] for group in choices if is_set(group, self.varied)]
        keys = without(self.varied, *choices)
        for group in choices:
            keys = [line.removeprefix(f"{group}.") for line in keys]
        return ", ".join([*names, *keys]) or choices[subject]


@dataclass(frozen=True)
class Line:
    """The overrides of a command line, with the composer of their configs."""

    composer: "Composer"
    overrides: list[str]

    @property
    def typed(self) -> tuple[str, ...]:
        """The words of the command line, also those that were taken."""
        return self.composer.command_line.words

    def take(self, target: Callable[..., Any]) -> tuple[dict[str, Any], "Line"]:
        """Returns the checked keyword-only arguments of `target` and the line without them. Raises `UserError`."""
        names = command_key_names(target)
        self.composer.more_keys.update(names)
        taken = self.composer.parse(override for override in self.overrides if key_of(override) in names)
        return check_command_keys(target, single_values(taken)), replace(
            self, overrides=without(self.overrides, *names)
        )

    def call(
        self,
        function: Callable[..., Result],
        command: str = "",
        reads: Sequence[str] | None = None,
        *,
        hints: Mapping[str, str] | None = None,
        several: str = "",
    ) -> Result:
        """Calls `function(line, **command_keys)`.

        Args:
            reads, hints: see `refuse_unread`; None if `function` refuses the keys that it does not read.
            several: error message for several values of a key; "": allowed.
        """
        command_values, rest = self.take(function)
        if several:
            refuse_several(self.composer.parse(rest.overrides), several)
        if reads is not None:
            refuse_unread(rest.overrides, command, reads, command_keys=command_key_names(function), hints=hints)
        return function(rest, **command_values)

    def refuse_config_files(self, reason: str) -> None:
        """Raises `UserError` for --config-dir and --config-name, which the command does not read."""
        typed = {"--config-dir": self.composer.config_dir, "--config-name": self.composer.config_name}
        for flag, value in typed.items():
            if value not in (None, CONFIG_NAME):
                raise UserError(f"{flag}={value}: not read {reason}")

    def refuse_rest(self, command: str, *targets: Callable[..., Any]) -> None:
        """Raises `UserError` for an override that none of the `targets` has taken."""
        if self.overrides:
            names = [name for target in targets for name in command_key_names(target)]
            refuse_unread_hydra(self.overrides, command, (), {}, names)
            known = Names(f"key of {command}", names, f"{' '.join(command.split()[:2])} --help")
            raise known.unknown(key_of(self.overrides[0]), self.overrides[0])

    def run_config(self, overrides: list[str] | None = None) -> tuple["RunConfig", Mapping[str, str]]:
        """Returns the checked config of `overrides` (default: all of the line) and its choices: group -> name."""
        from dlopt.config.plan import plan

        with waiting("loading PyTorch ..."):
            run = plan(self.composer, self.overrides if overrides is None else overrides)
        if run.run_config.settings.dry_run:
            raise UserError("dry_run=true: only available in `dlopt train`")
        return run.run_config, run.choices

    def fixed(self) -> list[str]:
        """Returns the overrides with one value."""
        return [text_of(axis.overrides[0]) for axis in self.axes() if not axis.is_swept]

    def axes(self) -> list[Axis]:
        """Returns the keys of the line with their values, including keys with a single value."""
        return parse_axes(self.overrides, self.composer)

    def combinations(self) -> list[list[str]]:
        """Returns the overrides of each combination of values, in the order of `dlopt train -m`."""
        return grid(self.axes())

    def jobs(self, groups: Sequence[str], max_jobs: float = math.inf, what: str = "curves") -> list[Combination]:
        """Returns one job per combination of values.

        A key that only some choices of a group have applies to these; in the other jobs it is skipped, and jobs that
        then are equal are one.
        """
        combinations = self.combinations()
        if len(combinations) > max_jobs:
            overrides = " ".join(self.overrides)
            raise UserError(f"{overrides}: {len(combinations)} {what}; at most {max_jobs} fit in one plot")
        swept = {key for axis in self.axes() if axis.is_swept for key in axis.keys}
        available = [self._available_keys(lines, groups) for lines in combinations]
        known = set[str]().union(*available)
        jobs: list[Combination] = []
        for lines, keys in zip(combinations, available, strict=True):
            skipped = [line for line in lines if _group_key(line, groups) in known - keys]
            kept = [line for line in lines if line not in skipped]
            if all(kept != job.overrides for job in jobs):
                jobs.append(Combination(kept, [line for line in kept if key_of(line) in swept], skipped))
        return jobs

    def _available_keys(self, lines: list[str], groups: Sequence[str]) -> set[str]:
        """Returns the keys (group.key) of the selected choices, for the groups with overridden keys."""
        overridden = {_group_key(line, groups).partition(".")[0] for line in lines} - {""}
        if not overridden:
            return set()
        config = self.composer.compose([line for line in lines if not _group_key(line, groups)])
        return {f"{group}.{key}" for group in overridden for key in config[group]}


def _group_key(line: str, groups: Sequence[str]) -> str:
    """Returns "schedule.x" for schedule.x.y=..., "" for overrides that set no key of the groups."""
    path = key_of(line).split(".")
    return ".".join(path[:2]) if len(path) > 1 and path[0] in groups else ""


def skipped_keys(jobs: Sequence[tuple[str, Combination]]) -> list[str]:
    """Returns one line for each key that some of the labelled jobs do not have."""
    names: dict[str, list[str]] = {}
    for label, job in jobs:
        for line in job.skipped:
            names.setdefault(key_of(line), []).append(label)
    return [f"{key}: ignored for {', '.join(dict.fromkeys(labels))} (no such key)" for key, labels in names.items()]


# -- command lines


def on_config(
    name: str,
    reads: Sequence[str] | None,
    *,
    several: str,
    one: bool = False,
    hints: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., int]], Command]:
    """Turns `function(line, **command_keys)` into a command; the remaining overrides are keys of `dlopt train`.

    Args:
        name: name of the command.
        reads, hints: see `refuse_unread`; None if `function` refuses the keys that it does not read.
        several: error message for -m and, with `one`, for several values of a key.
    """

    def decorate(function: Callable[..., int]) -> Command:
        @functools.wraps(function)
        def command(arguments: list[str]) -> int:
            line = read_line(arguments, several=several)
            line = _from_run(line, name, reads, command_key_names(function))
            return line.call(function, f"dlopt {name}", reads, hints=hints, several=several if one else "")

        return command

    return decorate


def _from_run(line: Line, name: str, reads: Sequence[str] | None, command_keys: Sequence[str]) -> Line:
    """Returns the line with the keys that the command reads of a run's config, if its first word is a run: summary RUN.

    A command that finds out itself what it reads (`reads` None) gets the trained model.
    """
    from dlopt.config.saved import take_paths

    runs, typed = take_paths(line.overrides)
    if not runs or not os.path.exists(runs[0]):
        return line
    if len(runs) > 1:
        raise UserError(f"{' '.join(runs)}: `dlopt {name}` takes one run")
    if reads is None:
        return replace(line, overrides=[f"checkpoint={quoted_plain(runs[0])}", *typed])
    inherited = of_run(line.composer, runs[0], without(typed, *command_keys))
    return replace(line, overrides=[*typed, *(each for each in inherited if _is_new(each, typed, reads))])


def of_run(composer: "Composer", path: str, typed: Sequence[str] = ()) -> list[str]:
    """Returns the overrides that compose the config of a run, those `typed` in their places. Raises `UserError`."""
    from dlopt.config.inherit import inherit

    return inherit(composer, [f"from={quoted_plain(path)}", *typed])


def _is_new(override: str, typed: Sequence[str], reads: Sequence[str]) -> bool:
    return override not in typed and is_below(key_of(override), reads)


def read_line(arguments: list[str], *, several: str) -> Line:
    """Parses the arguments of a command. Raises `UserError`."""
    from dlopt.config.compose import Composer

    parsed = parse_arguments(arguments)
    if parsed.multirun:
        raise UserError(f"-m: {several}")
    for flag, value in vars(parsed).items():
        if value and flag not in ("overrides", "config_dir", "config_name", "json"):
            raise UserError(unavailable(f"--{flag.replace('_', '-')}"))
    return Line(Composer(parsed.config_name, parsed.config_dir, parsed.overrides), parsed.overrides)


def with_document(arguments: Sequence[str], run: Callable[[list[str]], tuple[int, Mapping[str, Any]]]) -> int:
    """Calls `run` with the arguments; with the flag --json, prints its document.

    Returns the exit code, which `run` returns before the document.
    """
    words = without(arguments, "--json")
    code, content = run(words)
    if len(words) < len(arguments):
        print_document(content)
    return code


def on_checkpoint(
    name: str, reads: Sequence[str] = (), *, several: bool = False, as_typed: Sequence[str] = ()
) -> Callable[[Callable[..., int]], Command]:
    """Turns `function(path, changes, **command_keys)` into a command on a checkpoint and the config saved in it.

    The function calls `load_torch` after the checks that need no torch.
    The command has the key `checkpoint` in addition to the keys of the function.

    Args:
        name: name of the command.
        reads: keys and groups of the saved config that matter here; only they may be overridden.
        several: pass a list of paths.
        as_typed: keys of the function whose value is any text, not even valid UTF-8: it is not parsed.
    """

    def decorate(function: Callable[..., int]) -> Command:
        @functools.wraps(function)
        def command(arguments: list[str]) -> int:
            from dlopt.config.saved import refuse_flags, take_checkpoints, take_paths, typed_values

            words = without(arguments, "--json", *as_typed)
            refuse_flags(words)
            positional, rest = take_paths(words)
            values = typed_values(rest)
            if positional and "checkpoint" in values:
                raise UserError(f"{positional[0]}: checkpoint={values['checkpoint']} is set, too; name the run once")
            if len(positional) > 1 and not several:
                raise UserError(f"{' '.join(positional)}: `dlopt {name}` takes one run or checkpoint")
            if positional:
                values["checkpoint"] = positional[0] if len(positional) == 1 else positional
            if "checkpoint" in values:
                values["checkpoint"] = _with_best_runs(values["checkpoint"])
            texts = {key_of(each): value_of(each) for each in arguments if key_of(each) in as_typed}
            paths = take_checkpoints(values, name, several)
            names = command_key_names(function)
            command_values = {key: values.pop(key) for key in names if key in values}
            for key in values:
                if key.split(".")[0] in (*names, *reads):  # tta.crop belongs to tta
                    continue
                if not reads:
                    raise Names("key", ["checkpoint", *names], f"dlopt {name} --help").unknown(key)
                raise UserError(
                    f"{key}: {Names('key', [*names, *reads]).question(key)}the config is the checkpoint's; only "
                    f"{', '.join(reads)} may be changed; keys of this command: {', '.join(names)}"
                )
            check_forms(function, {**command_values, **texts})
            command_values = check_command_keys(function, command_values)
            if missing := [path for path in paths if not os.path.lexists(path)]:
                raise FileError(f"checkpoint={missing[0]}: no such file")
            return function(paths if several else paths[0], values, **command_values, **texts)

        signature = inspect.signature(function)
        parameters = [*signature.parameters.values()]
        checkpoint = inspect.Parameter("checkpoint", inspect.Parameter.KEYWORD_ONLY, annotation=_Checkpoint)
        parameters.insert(len(parameters) - len(command_key_names(function)), checkpoint)
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def load_torch() -> None:
    """Imports torch, which takes seconds."""
    with waiting("loading PyTorch ..."):
        import torch as _  # noqa: F401


def _with_best_runs(checkpoint: Any) -> Any:
    """Returns the value of `checkpoint` with each sweep replaced by the folder of its best run, which is printed."""
    if isinstance(checkpoint, list):
        return [_with_best_runs(each) for each in checkpoint]
    from dlopt.config.saved import has_checkpoint

    if not isinstance(checkpoint, str) or not Path(checkpoint).is_dir() or has_checkpoint(Path(checkpoint)):
        return checkpoint
    from dlopt.results.best_run import best_run  # most checkpoints are no sweeps

    best = best_run(Path(checkpoint), "checkpoint")
    if best is None:
        return checkpoint
    folder, text = best
    print_note(text)
    return str(Path(checkpoint) / folder.relative_to(Path(checkpoint).absolute()))


def check_command_keys(target: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Validates values of keyword-only parameters against their annotations. Raises `UserError`."""
    names, parameters = command_key_names(target), parameters_of(target)
    check_forms(target, values)
    if not values and all(parameters[name].default is not inspect.Parameter.empty for name in names):
        return {}  # nothing to check, without pydantic
    from dlopt.config.schema import check_arguments

    return check_arguments("", target, values, frozenset(parameters.keys() - names))


def take_command_keys(
    function: Callable[..., Any], arguments: Sequence[str], name: str
) -> tuple[dict[str, Any], list[str]]:
    """Splits the arguments of a command into its own keys and flags (checked) and the others. Raises `UserError`."""
    keys = command_keys(function)
    flags = {key.line: key.name for key in keys if key.is_flag}
    names = [key.name for key in keys if not key.is_flag]
    for argument in arguments:
        if argument.startswith("-") and argument not in flags:
            raise UserError(f"{argument}: unknown flag; see `dlopt {name} --help`")
    typed = [each for each in arguments if key_of(each) in names]
    given = dict.fromkeys((flags[each] for each in arguments if each in flags), True)
    rest = [each for each in arguments if each not in typed and each not in flags]
    values: dict[str, Any] = {}
    if typed:
        from dlopt.config.saved import typed_values

        values = typed_values(typed)
    return check_command_keys(function, values | given), rest


# -- data and output


def saved_run_config(config: Mapping[str, Any], changes: Mapping[str, Any], checkpoint: Path) -> "RunConfig":
    """Returns the checked config of the config in `checkpoint`, changed by overrides. Raises `UserError`."""
    from dlopt.config.parsing import parse
    from dlopt.config.resolve import resolve_saved
    from dlopt.config.saved import with_changes

    return parse(resolve_saved(with_changes(config, changes, checkpoint)))


def output_folder(output: str | None, command: str) -> Path:
    """Returns the folder `output`, created if missing; by default a new outputs/COMMAND/DATE. Raises `UserError`."""
    if output is None:
        return make_new(Path("outputs") / command / datetime.now().strftime("%Y-%m-%d_%H-%M-%S"), "output")
    refuse_url(output, "output")
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise FileError(f"output={output}: is a file; must be a folder")
    return make(folder, "output", exist_ok=True)


def refuse_folder(output: Path, hint: str = "") -> Path:
    """Returns the path of an output file. Raises `UserError` if it is a folder."""
    if output.is_dir() or not output.name:
        raise FileError(f"output={output}: is a folder; must be a file{hint}")
    return output


@contextlib.contextmanager
def writing(output: Path) -> Iterator[None]:
    """Turns an OSError in the block into a `UserError` about `output`."""
    try:
        yield
    except OSError as error:
        raise FileError(f"output={output}: cannot write: {error.strerror or error}") from None
