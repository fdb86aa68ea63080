"""Messages about wrong overrides: what is wrong, and what to type instead."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from dlopt.basics.errors import UserError
from dlopt.basics.names import Names
from dlopt.basics.plain_values import flatten, is_below, join
from dlopt.config.choices import CONFIG_NAME, Catalogue, Choice, config_folder
from dlopt.config.overrides import SWEEP_WORDS, text_of, value_of
from dlopt.config.parameters import several_values, show
from dlopt.config.resolve import first_lines
from dlopt.config.synonyms import for_choice, for_key

_NAMED = 8  # choices in a message
_LAUNCHER = "hydra/launcher"
_PRIMARY = Choice("", CONFIG_NAME, config_folder() / f"{CONFIG_NAME}.yaml")
_PACKAGES = ("dlopt", "torch", "torchvision", "None")  # whose choices list all of their keys; None: without a callable


class Known(Protocol):
    """What can be typed: of a `Composer`. `more_keys`: of the command, beside those of the config."""

    config_dir: str | None
    more_keys: set[str]

    def groups(self) -> list[str]: ...

    def choices(self, group: str) -> list[str]: ...

    def names(self, group: str) -> Names: ...


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
        hint = known.names(key).hint("") if is_group else "set a value (null where allowed)"
        raise UserError(f"{line}: keys and groups cannot be deleted; {hint}")
    if is_group and not isinstance(value, str):
        typed = show(value)
        hint = several_values(value) if value and isinstance(value, list) else for_choice(key, typed)
        hint = hint or known.names(key).hint("")
        raise UserError(f"{key}={typed}: must be one of the choices; {hint}")
    if is_group and str(value).split("/")[-1].startswith("_"):  # a fragment
        raise known.names(key).unknown(str(value), line)
    if value == {}:
        raise UserError(f"{line}: an empty block changes nothing; set its keys one by one")


# -- after an error of Hydra or OmegaConf


def explain_override(override: Override, config: DictConfig, error: Exception, known: Known) -> UserError:
    """Describes the error in `override`; `config` is composed without it."""
    key, value, line = override.key_or_group, override.value(), text_of(override)
    has_choices = key in known.groups() or key.startswith("hydra/")
    choices = known.choices(key) if has_choices else []
    if choices and value not in choices:
        if key == "data" and os.path.exists(os.path.expanduser(str(value))):
            return UserError(f"{line}: {_advice_for_path(str(value))}")
        return known.names(key).unknown(str(value), line)
    if key.startswith("hydra/sweeper/"):
        return UserError(f"{line}: only searches have this group; add hydra/sweeper=dlopt_optuna")
    if choices or "/" in key or "@" in key:
        return UserError(f"{line}: {first_lines(error)}")
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


def _explain_key(override: Override, config: DictConfig, error: Exception, known: Known) -> UserError:
    """Describes the error in an override of a key, which is not a choice for a group."""
    key, typed, line = override.key_or_group, value_of(override), text_of(override)
    place = _locate(key, config)
    if not isinstance(place.node, DictConfig) or (place.rest and place.name in place.node):
        holder = place.key if isinstance(place.node, DictConfig) else place.parent
        return UserError(f"{line}: unknown key; {holder} holds a value, not keys", kind="unknown_key")
    is_known = place.name in place.names
    if is_known and override.is_add():
        return UserError(f"{line}: this key exists; set it without the plus sign: {key}={typed}")
    value = OmegaConf.select(config, place.key, throw_on_resolution_failure=False)
    if not place.rest and isinstance(value, DictConfig):
        keys = ", ".join(str(each) for each in value if each != "_target_")
        return UserError(f"{line}: this is a block of keys ({keys}); set them one by one")
    if is_known:  # a key inside its value does not exist
        is_new = "Could not override" in str(error)
        hint = f"; add a new key with a plus sign: +{key}.KEY=VALUE" if is_new else ""
        return UserError(f"{line}: {first_lines(error)}{hint}")
    is_nested = place.rest and place.name.lower() not in place.names and place.parent != "hydra"
    hint = for_key(key.rpartition(".")[2] if is_nested else key, typed)  # trainer.max_epochs
    if not hint and not place.parent:
        hint = _misplaced_hint(place.name, typed, known)
    names = _names(place, config, known)
    names = replace(names, forms={}, instead=lambda _: hint) if hint else names
    return names.error(f"{line}: unknown key; {hint or _key_hint(line, place, names, known)}", place.name)


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


def _key_hint(line: str, place: _Place, names: Names, known: Known) -> str:
    """Says what to type for the override `line`, whose key is none of `names`."""
    group = place.parent.replace(".", "/")
    is_group = group in (*known.groups(), _LAUNCHER)
    target = str(place.node.get("_target_"))
    if is_group and group != _LAUNCHER and not is_below(target, _PACKAGES):
        if question := names.question(place.name):
            return f"{question}if not, add the key to the file of this choice"
        return f"the file of this choice does not list it: add it there, or type +{line}"
    others = _choices_with(place.name, group, names, known) if is_group else ""
    if names.known:
        if others:
            question = names.question(place.name) if group == _LAUNCHER else ""  # gpus: meant for gpus_per_node
            return question + others + names.listed(place.name)
        return names.hint(place.name)
    if target.startswith("dlopt."):
        return f"{others}the chosen {place.parent} has no keys"
    return f"add a new key with a plus sign: +{line}"


def _names(place: _Place, config: DictConfig, known: Known) -> Names:
    """Returns the keys of the block in which a key is unknown, in the order in which users look for them.

    A name without a group may also be meant for a key of any group.
    """
    names, group = place.names, place.parent.replace(".", "/")
    command = f"dlopt options {group}" if group in (*known.groups(), _LAUNCHER) else "dlopt train --help"
    forms: dict[str, str] = {}
    if place.parent:
        of_all = {key.name for key in Catalogue().keys(_PRIMARY)}
        names.sort(key=lambda name: (not OmegaConf.is_missing(place.node, name), join(place.parent, name) in of_all))
    else:
        names += sorted(known.more_keys)
        for key in flatten(OmegaConf.to_container(config, resolve=False)):
            group, _, name = key.partition(".")
            if name and "." not in name and group != "hydra" and name != "_target_":
                forms[name] = key  # optimizer.lr for lrr
    forms |= {name: f"{join(place.parent, name)}{place.rest}" for name in names}
    return Names("key", names, command, forms=forms)


def _choices_with(name: str, group: str, own: Names, known: Known) -> str:
    """Names the choices of a group that have a key, or else one like it, unless the chosen one has; "" if none has."""
    owners = _owners(group, known)
    key = name if name in owners or own.similar(name) else Names("key", owners).similar(name)
    found = owners.get(key, ())
    if not found:
        return ""
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    verb = "has" if len(found) == 1 else "have"
    return f"{group}={','.join(found[:_NAMED])}{more} {verb} {'it' if key == name else key}; "


def _misplaced_hint(name: str, typed: str, known: Known) -> str:
    """Says where to type a key of a launcher that was typed without its block; "" for other keys."""
    choices = _owners(_LAUNCHER, known).get(name)
    if choices is None:
        return ""
    return f"a key of launchers: type -m {_LAUNCHER}={'|'.join(choices)} hydra.launcher.{name}={typed}"


def _owners(group: str, known: Known) -> Mapping[str, Sequence[str]]:
    """Returns the keys of a group, and the choices that have each."""
    catalogue, block = Catalogue(known.config_dir), f"{group.replace('/', '.')}."
    owners: dict[str, list[str]] = defaultdict(list)
    for choice in catalogue.choices(group):
        for key in dict.fromkeys(each.name for each in catalogue.keys(choice) if each.name.startswith(block)):
            owners[key.removeprefix(block)].append(choice.name)
    return owners
