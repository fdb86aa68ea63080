"""A JSON schema of experiment files, with which editors complete and check them.

It is generated from the declarations that dlopt checks configs with: the types of `Settings` and of the keys that all
choices of a group share, the signatures of the callables, and the YAML files of the choices, whose comments become
descriptions. An editor does not know which choice a file selects: a key of any choice of the group is accepted, with
the values of any choice that has it.
"""

import dataclasses
import json
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic.errors import PydanticInvalidForJsonSchema

from dlopt.basics.errors import UserError
from dlopt.config.choices import Catalogue, Choice, config_folder
from dlopt.config.packages import entries
from dlopt.config.parameters import named_parameters
from dlopt.config.run_config import GROUPS, ConfigGroup
from dlopt.config.schema import adapter_of, annotation_of, resolve_target, trusted_packages
from dlopt.config.settings import Settings

DRAFT = "https://json-schema.org/draft/2020-12/schema"
# A value that is composed or required later.
_SCALAR = re.compile(r'^(?!.*("\$ref"|"object"|"array")).*"(type|enum|const)"')  # tracking=wandb is [wandb]
_INTERPOLATION = {"type": "string", "pattern": r"\$\{.+\}|^\?\?\?$"}


def schema(config_dir: str | None = None) -> dict[str, Any]:
    """Returns the schema, with the choices of `config_dir` as well. Raises `UserError`."""
    catalogue, definitions = Catalogue(config_dir), dict[str, Any]()
    primary = Choice("", "train", config_folder() / "train.yaml")
    comments = {key.name: key.comment for key in catalogue.keys(primary)}
    properties: dict[str, Any] = {"defaults": _defaults(catalogue)}
    properties |= _fields(Settings, comments, "", definitions)
    for name, group in GROUPS.items():
        properties[name] = _block(catalogue, name, group, definitions)
    # Hydra checks its own block. `dlopt train` checks the block of a series, whose keys refer to other keys.
    properties |= {"hydra": {"type": "object"}} | {key: {"type": ["object", "null"]} for key in entries("dlopt.series")}
    return {
        "$schema": DRAFT,
        "title": "experiment of dlopt",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "$defs": definitions,
    }


def text(config_dir: str | None = None) -> str:
    return json.dumps(schema(config_dir), indent=1) + "\n"


def _defaults(catalogue: Catalogue) -> dict[str, Any]:
    """Describes the defaults list, whose entries `override /GROUP: CHOICE` select the choices."""
    names = {group: [choice.name for choice in catalogue.choices(group)] for group in catalogue.groups()}
    overrides = {f"override /{group}": {"enum": [*choices, None]} for group, choices in names.items()}
    entry = {"type": "object", "properties": overrides, "minProperties": 1, "maxProperties": 1}
    return {"type": "array", "items": {"anyOf": [{"type": "string"}, entry]}}


def _fields(schema: type, comments: Mapping[str, str], prefix: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """Describes the fields of a dataclass; `comments`: by dotted key that begins with `prefix`."""
    found = {}
    for name, hint in typing.get_type_hints(schema, include_extras=True).items():
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            fields = _fields(hint, comments, f"{key}.", definitions)
            found[name] = {"type": "object", "properties": fields, "additionalProperties": False}
        else:
            found[name] = _described([_of_type(hint, definitions)], comments.get(key, ""))
    return found


def _block(catalogue: Catalogue, name: str, group: ConfigGroup, definitions: dict[str, Any]) -> dict[str, Any]:
    """Describes the keys of a group. A block that names its callable (`_target_`) may have any keys."""
    values: dict[str, list[dict[str, Any]]] = {}
    comments: dict[str, str] = {}
    for choice in catalogue.choices(name):
        parameters = _parameters(catalogue.target(choice))
        for parameter, annotation in parameters.items():
            if parameter not in (*group.runtime, *group.common_names):
                values.setdefault(parameter, []).append(_of_type(annotation, definitions))
        for key in catalogue.keys(choice):
            first, _, rest = key.name.removeprefix(f"{name}.").partition(".")
            if key.name.startswith(f"{name}."):
                comments.setdefault(first, "" if rest else key.comment)
                if first not in parameters:  # the callable is not importable, or the key is one of the group
                    values.setdefault(first, []).append({})
    properties = {key: _described(schemas, comments.get(key, "")) for key, schemas in values.items()}
    if group.common is not None:
        properties |= _fields(group.common, comments, "", definitions)
    own = {"_target_": {"type": "string", "description": "dotted name of a callable of your own"}}
    known = {"properties": own | properties, "additionalProperties": False}
    return {"type": "object", "if": {"required": ["_target_"]}, "else": known}


def _parameters(path: str | None) -> dict[str, Any]:
    """Returns the annotations of a callable by name; {} if it cannot be imported, or is not trusted."""
    if path is None:
        return {}
    try:
        target = resolve_target("_target_", path, trusted_packages())
    except UserError:
        return {}
    return {name: annotation_of(target, name) for name in named_parameters(target)}


def _of_type(annotation: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema of a type; {} for one that only Python can check. Adds the types in it to `definitions`."""
    adapter = adapter_of(annotation)
    if adapter is None:
        return {}
    try:
        found = adapter.json_schema()
    except PydanticInvalidForJsonSchema:
        return {}
    definitions |= found.pop("$defs", {})
    found.pop("title", None)
    lists = [each for each in (found, *found.get("anyOf", [])) if each.get("type") == "array"]
    single = [each["items"] for each in lists if _SCALAR.search(json.dumps(each.get("items", {})))]
    return {"anyOf": [found, *single]} if single else found


def _described(schemas: Iterable[dict[str, Any]], comment: str) -> dict[str, Any]:
    """Accepts the values of any of the schemas, and interpolations."""
    unique = list({json.dumps(each, sort_keys=True): each for each in schemas}.values())
    found: dict[str, Any] = {} if {} in unique else {"anyOf": [*unique, _INTERPOLATION]}
    return found | ({"description": comment} if comment else {})
