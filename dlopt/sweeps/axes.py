"""The axes of a sweep: from its words and the files that they name, in the order that numbers the jobs.

A space gives each optimizer, or each value of another key, its own axes: `space=FILE` names a YAML file,

    optimizer=sgd: {optimizer.lr: "0.03,0.1", optimizer.momentum: "0.8,0.9"}
    optimizer=adamw: {optimizer.lr: "0.001,0.003"}

and a package adds a space by the entry point `dlopt.spaces`: function(composer, optimizer, overrides) -> overrides.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dlopt.basics.errors import FileError, UserError, require_package
from dlopt.basics.plain_values import load_yaml
from dlopt.config.compose import Composer
from dlopt.config.overrides import (
    SPACE,
    SWEEP_WORDS,
    TEXTS,
    TRIALS,
    Axis,
    is_equal,
    is_hydra,
    key_of,
    keys_of,
    parse_axes,
    parts_of,
    quoted,
    quoted_plain,
    refuse_several,
    replaced,
    text_of,
    value_of,
    without,
)
from dlopt.config.packages import entries, function
from dlopt.config.parameters import show
from dlopt.config.resolve import choices_of

_TRIALS = 10  # per optimizer


def is_grid(config: DictConfig) -> bool:
    return str(config.hydra.sweeper._target_).endswith("BasicSweeper")


def read_axes(composer: Composer, words: Sequence[str]) -> tuple[DictConfig, list[Axis], list[Axis]]:
    """Composes the base config of a sweep; returns it, the typed axes, and all. An axis may have a single value.

    All axes: also those of the config file (hydra.sweeper.params), which typed axes replace, and those of the space.
    Raises `UserError`.
    """
    typed = parse_axes(without(words, SPACE, TRIALS), composer)
    config = composer.compose([override for axis in typed for override in axis.overrides], multirun=True)
    of_config: Any = OmegaConf.to_container(OmegaConf.create(config.hydra.sweeper.get("params") or {}), resolve=True)
    params = [_line(key, value) for key, value in of_config.items()]
    of_file = parse_axes(without(params, SPACE, TRIALS), composer)
    _refuse_untyped(composer, of_file, "hydra.sweeper.params")
    axes = replaced(of_file, typed)
    for axis in axes:
        if axis.is_zip and (axis.name in config or axis.name in (*composer.groups(), *SWEEP_WORDS)):
            raise UserError(f"{axis}: {axis.name} is a key of the config; give the axis another name")
    own = {key_of(word): word for word in [*params, *words] if key_of(word) in (SPACE, TRIALS)}  # the last one counts
    if TRIALS in own and (SPACE not in own or not is_grid(config)):
        raise UserError(f"{own[TRIALS]}: for the ranges of {SPACE}= in a grid; a search has hydra.sweeper.n_trials")
    if SPACE in own:
        is_typed = any(key_of(word) == SPACE for word in words)
        axes = _with_space(composer, config, axes, typed if is_typed else axes, own[SPACE], own.get(TRIALS))
    return config, typed, axes


def _refuse_untyped(composer: Composer, axes: Sequence[Axis], place: str) -> None:
    """Raises `UserError` for an axis of a file with a key of Hydra, or one that only the command line may set.

    `place`: of the axes. `dlopt grid` prints the overrides of a job, and whoever pastes them has typed them.
    """
    overrides = [override for axis in axes for override in axis.overrides]
    for override in filter(is_hydra, overrides):
        raise UserError(f"{place}: {text_of(override)}: only keys of the jobs")
    try:
        composer.refuse_untyped(overrides)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _with_space(
    composer: Composer,
    config: DictConfig,
    axes: Sequence[Axis],
    kept: Sequence[Axis],
    space: str,
    trials: str | None,
) -> list[Axis]:
    """Adds the axes of a space, each after the axis that decides its condition. Raises `UserError`.

    Axes in `kept` take precedence over the space, which replaces all other axes.
    """
    chosen = choices_of(config)
    has_section = has_drawn = False
    heads: dict[str, str] = {}  # by the keys below
    sections = _sections(composer, space, axes, chosen)
    keys = {key for words in sections.values() for word in words for key in keys_of(word)}
    result = [axis for axis in axes if axis in kept or not set(axis.keys) <= keys]
    taken = {key for axis in result for key in axis.keys}
    for when, words in sections.items():
        group, choice = parts_of(when)
        deciders = [index for index, axis in enumerate(result) if key_of(when) in axis.keys]
        _check_condition(composer, space, when, result)
        if not (_is_met(when, [result[index] for index in deciders]) if deciders else chosen.get(group) == choice):
            continue
        has_section = True
        own = _of_section(composer, space, when, words, taken)
        for key in (key for axis in own for key in axis.keys):
            if heads.setdefault(key, group) != group:
                raise UserError(f"{space}: {key} has sections of {heads[key]}= and {group}=; an axis has one place")
        if is_grid(config) and any(axis.is_continuous for axis in own):
            own, has_drawn = _drawn(composer, own, space, trials), True
        start = 1 + max(deciders, default=-1)
        while start < len(result) and result[start].when:  # after the sections before
            start += 1
        named = [replace(axis, name=f"{axis.name} [{when}]", when=when) for axis in own]
        result[start:start] = named if deciders else own
    if not has_section:
        raise UserError(f"{space}: no job meets one of its conditions: {', '.join(sections)}")
    if trials is not None and not has_drawn:
        raise UserError(f"{trials}: no section that applies has a range, so that there is nothing to draw")
    return result


def _check_condition(composer: Composer, space: str, when: str, axes: Sequence[Axis]) -> None:
    """Raises `UserError` for a condition that no job can meet, or whose group a swept recipe sets."""
    group, choice = parts_of(when)
    is_typed = any(key_of(when) in axis.keys for axis in axes)
    if group not in composer.groups():
        if not is_typed:
            raise UserError(f"{space}: {when}: no job sets {group}")
        return
    composer.names(group).check(choice, f"{space}: {when}")
    if not is_typed and any(axis.is_swept and "experiment" in axis.keys for axis in axes):
        raise UserError(f"{space}: {when}: each recipe may choose another {group}; type {group}=")


def _is_met(when: str, axes: Sequence[Axis]) -> bool:
    return any(is_equal(line, when) for axis in axes for row in axis.rows() for line in row)


def _sections(
    composer: Composer, space: str, axes: Sequence[Axis], chosen: Mapping[str, str]
) -> Mapping[str, Sequence[str]]:
    """Returns the words of each section of a space by its condition. Raises `UserError`."""
    name = value_of(space).strip("'\"")
    if name in entries("dlopt.spaces"):
        words_of = function(entries("dlopt.spaces")[name])
        lines = [line for axis in axes if "optimizer" in axis.keys for row in axis.rows() for line in row]
        optimizers = dict.fromkeys(line for line in lines if key_of(line) == "optimizer")
        trusted = [line for axis in axes if "allow_packages" in axis.keys for line in axis.rows()[0]]
        whens = list(optimizers) or [f"optimizer={chosen['optimizer']}"]
        return {when: words_of(composer, value_of(when), trusted) for when in whens}
    path = Path(os.path.expanduser(name))
    if not path.is_file():
        raise FileError(f"{space}: no such file; allowed: {', '.join([*entries('dlopt.spaces'), 'a YAML file'])}")
    try:
        content = load_yaml(path, texts=TEXTS)
    except (OSError, ValueError) as error:
        raise UserError(f"{space}: cannot be read: {' '.join(str(error).split())}") from None
    example = 'optimizer=sgd: {optimizer.lr: "0.1,0.3"}'
    if not isinstance(content, dict) or not content:
        raise UserError(f"{space}: must map conditions to keys with values: {example}")
    for when, block in content.items():
        if not isinstance(when, str) or "=" not in when or not isinstance(block, dict) or not block:
            raise UserError(f"{space}: {when}: must be a condition with keys and values: {example}")
        refuse_several(composer.parse([when]), "a condition has one value")
        for key in block:
            if key_of(str(key)).startswith("hydra") or key in SWEEP_WORDS:
                raise UserError(f"{space}: {when}: {key}: only keys of the jobs")
    return {when: [quoted(_line(key, value)) for key, value in block.items()] for when, block in content.items()}


def _line(key: str, value: Any) -> str:
    """Returns the override of a key in a file: a text as typed, with its values; a list or a block is one value."""
    return f"{key}={quoted_plain(value) if isinstance(value, list | dict) else show(value)}"


def _of_section(composer: Composer, space: str, when: str, words: Sequence[str], taken: set[str]) -> list[Axis]:
    """Returns the axes of a section, except for keys that are `taken`. Raises `UserError`."""
    kept = [word for word in words if not set(keys_of(word)) <= taken]
    try:
        own = parse_axes(kept, composer)
    except UserError as error:
        raise UserError(f"{space}: {when}: {error}") from None
    _refuse_untyped(composer, own, f"{space}: {when}")
    for axis in own:
        if shared := set(axis.keys) & taken:
            raise UserError(f"{space}: {when}: {axis}: {min(shared)} is also set outside the space")
    return own


def _drawn(composer: Composer, axes: Sequence[Axis], space: str, trials: str | None) -> list[Axis]:
    """Replaces all axes with ranges by one axis of quasi-random points, like the trials of a benchmark."""
    count = _TRIALS if trials is None else value_of(trials)
    if not str(count).isdecimal() or not 0 < int(count) <= 10_000:
        raise UserError(f"{trials}: must be the number of jobs of each optimizer, from 1 to 10000")
    require_package(f"{space}: its ranges are drawn", "optuna", "sweep")
    from dlopt.sweeps.samplers import draw
    from dlopt.sweeps.space import parse_space

    points = parse_space([axis for axis in axes if axis.is_swept])
    jobs = dict.fromkeys(tuple(points.overrides(draw(points, 0, number))) for number in range(int(count)))
    columns = [(parts_of(lines[0])[0], [value_of(line) for line in lines]) for lines in zip(*jobs, strict=True)]
    drawn = parse_axes([f"{key}=choice({','.join(values)})" for key, values in columns], composer)
    overrides = tuple(override for axis in drawn for override in axis.overrides)
    return [*(axis for axis in axes if not axis.is_swept), Axis("trials", overrides)]
