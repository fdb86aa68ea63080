"""Messages about wrong overrides: what is wrong, and what to type instead."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Protocol

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from dlopt.basics.errors import UserError, shorten, suggest
from dlopt.basics.plain_values import flatten, is_below, join
from dlopt.config.choices import CONFIG_NAME, Catalogue, Choice, Key, config_folder
from dlopt.config.overrides import SWEEP_WORDS, text_of, value_of
from dlopt.config.parameters import several_values, show
from dlopt.config.resolve import first_lines
from dlopt.config.synonyms import for_choice, for_key

_NAMED = 8  # choices in a message
_LAUNCHER, _LAUNCHER_GROUP = "hydra.launcher", "hydra/launcher"
_PACKAGES = ("dlopt", "torch", "torchvision", "None")  # whose choices list all of their keys; None: without a callable


class Known(Protocol):
    """What can be typed: of a `Composer`. `more_keys`: of the command, beside those of the config."""

    config_dir: str | None
    more_keys: set[str]

    def groups(self) -> list[str]: ...

    def choices(self, group: str) -> list[str]: ...


# -- before composing


def check_overrides(overrides: Iterable[Override], known: Known, multirun: bool) -> None:
    """Raises `UserError` for overrides that Hydra accepts but that are certainly mistakes."""
    groups = known.groups()
    for override in overrides:
        line, key = text_of(override), override.key_or_group
        if not key:
            raise UserError(f"{line}: an override is key=value or group=choice")
        if key in SWEEP_WORDS:
            raise UserError(f"{line}: only sweeps have this word; add -m to `dlopt train`")
        if override.is_sweep_override():
            _check_several(override, multirun)
        else:
            _check_single(override, key in groups, known)


def _check_several(override: Override, multirun: bool) -> None:
    """Checks an override with several values."""
    line = text_of(override)
    if override.key_or_group.startswith(("hydra.", "hydra/")):
        raise UserError(f"{line}: one value is needed, for all jobs; write a list as [a,b]")
    if not multirun:
        raise UserError(f"{line}: several values need `dlopt train -m` (one run each); for a list, write [a,b]")


def _check_single(override: Override, is_group: bool, known: Known) -> None:
    """Checks an override with one value; `is_group`: whether it chooses for a group."""
    line, key, value = text_of(override), override.key_or_group, override.value()
    if key == "hydra":
        raise UserError(f"{line}: a block of keys; set them one by one: hydra.run.dir=FOLDER")
    if key == "hydra.job.env_copy":
        raise UserError(f"{line}: not needed, because jobs inherit the environment")
    if override.is_delete() and not key.startswith("hydra"):
        hint = _choice_hint(key, "", known) if is_group else "set a value (null where allowed)"
        raise UserError(f"{line}: keys and groups cannot be deleted; {hint}")
    if is_group and not isinstance(value, str):
        typed = show(value)
        hint = several_values(value) if value and isinstance(value, list) else for_choice(key, typed)
        hint = hint or _choice_hint(key, "", known)
        raise UserError(f"{key}={typed}: must be one of the choices; {hint}")
    if is_group and str(value).split("/")[-1].startswith("_"):  # a fragment
        raise UserError(f"{line}: unknown choice; {_choice_hint(key, str(value), known)}")
    if value == {}:
        raise UserError(f"{line}: an empty block changes nothing; set its keys one by one")


# -- after an error of Hydra or OmegaConf


def explain_override(override: Override, config: DictConfig, error: Exception, known: Known) -> str:
    """Describes the error in `override`; `config` is composed without it."""
    key, value = override.key_or_group, override.value()
    has_choices = key in known.groups() or key.startswith("hydra/")
    choices = known.choices(key) if has_choices else []
    if choices and value not in choices:
        if key == "data" and os.path.exists(os.path.expanduser(str(value))):
            return _advice_for_path(str(value))
        return f"unknown choice; {_choice_hint(key, str(value), known)}"
    if key.startswith("hydra/sweeper/"):
        return "only searches have this group; add hydra/sweeper=dlopt_optuna"
    if choices or "/" in key or "@" in key:
        return first_lines(error)
    return _explain_key(override, config, error, known)


@dataclass(frozen=True)
class _Place:
    """The first part of a dotted key that does not exist: `x` of `model.x.y`.

    Attributes:
        parent: the part before it: model; "" for a key of the run.
        node: the value of `parent`; a `DictConfig` if it is a block.
        name: x.
        rest: the part after it: .y.
    """

    parent: str
    node: Any
    name: str
    rest: str

    @property
    def key(self) -> str:
        return join(self.parent, self.name)

    @property
    def names(self) -> list[str]:
        """The keys of the block, without those that users do not set."""
        return [str(each) for each in self.node if each not in ("_target_", "hydra")]


def _locate(key: str, config: DictConfig) -> _Place:
    """Finds the first part of a key that does not exist, or is null; if all parts exist, its last part."""
    parent, name = key, ""
    node = None
    while node is None:
        parent, _, name = parent.rpartition(".")
        node = OmegaConf.select(config, parent, throw_on_resolution_failure=False) if parent else config
    rest = key.removeprefix(join(parent, name))
    return _Place(parent, node, name, rest)


def _explain_key(override: Override, config: DictConfig, error: Exception, known: Known) -> str:
    """Describes the error in an override of a key, which is not a choice for a group."""
    key, typed = override.key_or_group, value_of(override)
    place = _locate(key, config)
    if not isinstance(place.node, DictConfig):
        return f"unknown key; {place.parent} holds a value, not keys"
    if place.rest and place.name in place.node:
        return f"unknown key; {place.key} holds a value, not keys"
    is_known = place.name in place.names
    if is_known and override.is_add():
        return f"this key exists; set it without the plus sign: {key}={typed}"
    value = OmegaConf.select(config, place.key, throw_on_resolution_failure=False)
    if not place.rest and isinstance(value, DictConfig):
        keys = ", ".join(str(each) for each in value if each != "_target_")
        return f"this is a block of keys ({keys}); set them one by one"
    if is_known:  # a key inside its value does not exist
        is_new = "Could not override" in str(error)
        hint = f"; add a new key with a plus sign: +{key}.KEY=VALUE" if is_new else ""
        return f"{first_lines(error)}{hint}"
    if place.parent == _LAUNCHER:
        return f"unknown key; {_launcher_hint(place, config, known)}"
    is_nested = place.rest and place.name.lower() not in place.names and place.parent != "hydra"
    hint = for_key(key.rpartition(".")[2] if is_nested else key, typed)  # trainer.max_epochs
    if not hint and not place.parent:
        hint = _misplaced_hint(place.name, typed, known)
    if not hint:
        hint = _key_hint(text_of(override), place, config, known)
    return f"unknown key; {hint}"


# -- what to type instead

_DATA_OF_FILES = {  # suffix -> what such a file usually holds, and the choice that reads it
    ".csv": ("its rows", "data=table"),
    ".tsv": ("its rows", "data=table 'data.delimiter=\\t'"),
    ".parquet": ("its rows", "data=parquet"),
    ".txt": ("its text", "data=text"),
}


def _advice_for_path(path: str) -> str:
    """Says how to read an existing file or folder, which was typed as a choice of data."""
    if os.path.isdir(os.path.expanduser(path)):
        return f"a folder is not a choice; for its images: data=image_folder data.root={path}"
    content, choice = _DATA_OF_FILES.get(os.path.splitext(path)[1].lower(), ("", ""))
    if not choice:
        return "a file is not a choice; `dlopt options data` lists what reads files"
    return f"a file is not a choice; for {content}: {choice} data.file={path}"


def _choice_hint(group: str, choice: str, known: Known) -> str:
    """Says what to type for an unknown choice; for "" lists the choices of the group."""
    names = known.choices(group)
    if group.startswith("hydra/"):
        names = [name for name in names if "/" not in name]  # hydra/sweeper/sampler is a separate group
    inside = [name for name in names if choice and name.startswith(f"{choice}/")]
    if inside:
        example = f"{group}={inside[0]}"
        return f"a folder of choices, such as {example}; `dlopt options '{group}={choice}/*'` lists them"
    hint = for_choice(group, choice)
    return hint or suggest(choice, names, f"dlopt options {group}", prefix=f"{group}=", title="choices")


def _key_hint(line: str, place: _Place, config: DictConfig, known: Known) -> str:
    """Says what to type for the override `line`, whose key is unknown."""
    names = place.names
    if not place.parent:
        names += sorted(known.more_keys)
    similar = _similar_key(place, names, config)
    choices = ""
    hint = f"did you mean {similar}? " if similar else ""
    is_group = place.parent in known.groups()
    target = str(place.node.get("_target_"))
    if is_group and not is_below(target, _PACKAGES):
        if hint:
            return f"{hint}if not, add the key to the file of this choice"
        return f"the file of this choice does not list it: add it there, or type +{line}"
    if is_group:
        choices = _choices_with(place, known.config_dir)
        hint = choices or hint
        names = sorted(_own_first(place.parent, names), key=lambda name: not OmegaConf.is_missing(place.node, name))
    if names:
        command = f"dlopt options {place.parent}" if is_group else "dlopt train --help"
        has_similar = bool(similar) and not choices
        return hint + shorten(place.name, names, command, title="allowed", has_hint=has_similar)
    if target.startswith("dlopt."):
        return f"{hint}the chosen {place.parent} has no keys"
    return f"add a new key with a plus sign: +{line}"


def _launcher_hint(place: _Place, config: DictConfig, known: Known) -> str:
    """Describes the keys of the chosen launcher that are like an unknown one, or else those of other launchers."""
    chosen = config.hydra.runtime.choices[_LAUNCHER_GROUP]
    similar: dict[str, list[str]] = {}
    for choice, keys in _keys_of_launchers(known).items():
        inside = [name for name in keys if place.name.lower() in name]
        names = inside or get_close_matches(place.name.lower(), keys, n=1, cutoff=0.6)
        similar[choice] = [_described(keys[name]) for name in names]
    own = similar.get(chosen)
    if own:
        return f"similar: {'; '.join(own)}"
    others = [f"{_LAUNCHER_GROUP}={choice} has {'; '.join(found)}" for choice, found in similar.items() if found]
    return "; ".join(others) or f"allowed: {', '.join(place.names)}; `dlopt options launcher` lists the launchers"


def _misplaced_hint(name: str, typed: str, known: Known) -> str:
    """Says where to type a key of a launcher that was typed without its block; "" for other keys."""
    choices = [choice for choice, keys in _keys_of_launchers(known).items() if name in keys]
    if not choices:
        return ""
    return f"a key of launchers: type -m {_LAUNCHER_GROUP}={'|'.join(choices)} {_LAUNCHER}.{name}={typed}"


def _keys_of_launchers(known: Known) -> dict[str, dict[str, Key]]:
    """Returns the keys of each launcher by name."""
    catalogue = Catalogue(known.config_dir)
    return {
        choice.name: {key.name.removeprefix(f"{_LAUNCHER}."): key for key in catalogue.keys(choice)}
        for choice in catalogue.choices(_LAUNCHER_GROUP)
    }


def _described(key: Key) -> str:
    """Returns a key with its default and its comment."""
    return f"{key.name}={key.value}" + (f" ({key.comment})" if key.comment else "")


def _similar_key(place: _Place, names: Sequence[str], config: DictConfig) -> str | None:
    """Returns the most similar key, in dotted form; None if none is similar.

    `names`: the keys beside it. A name without a group is also compared with the keys of all groups.
    """
    keys: dict[str, str] = {}  # the dotted key of each name
    if not place.parent:  # optimizer.lr for lrr
        for key in flatten(OmegaConf.to_container(config, resolve=False)):
            parts = key.split(".")
            if len(parts) == 2 and parts[0] != "hydra" and parts[1] != "_target_":
                keys[parts[1]] = key
    for name in names:
        keys[name] = f"{join(place.parent, name)}{place.rest}"
    close = get_close_matches(place.name.lower(), keys, n=1, cutoff=0.6)
    return keys[close[0]] if close else None


def _own_first(group: str, names: Sequence[str]) -> list[str]:
    """Sorts the keys of a choice before those that train.yaml gives to all choices of the group."""
    primary = Choice("", CONFIG_NAME, config_folder() / f"{CONFIG_NAME}.yaml")
    of_all = {key.name for key in Catalogue().keys(primary)}
    return sorted(names, key=lambda name: join(group, name) in of_all)


def _choices_with(place: _Place, config_dir: str | None) -> str:
    """Names the choices of a group that have the key; "" if none has."""
    catalogue = Catalogue(config_dir)
    group = place.parent
    key = f"{group.replace('/', '.')}.{place.name}"
    found = []
    for choice in catalogue.choices(group):
        if any(each.name == key for each in catalogue.keys(choice)):
            found.append(choice.name)
    if not found:
        return ""
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    verb = "has" if len(found) == 1 else "have"
    return f"{group}={','.join(found[:_NAMED])}{more} {verb} it; "
