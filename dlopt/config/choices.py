"""Lists config groups, choices and keys from the YAML files alone. Needs neither Hydra nor torch, so it is instant.

An installed package adds choices through an entry point that names a module with a `conf` folder:

    [project.entry-points.dlopt]
    mine = "mine"

Its YAML files cannot replace dlopt's own. `_target_` may name its callables: installing a package means trusting it.
"""

import functools
import re
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import yaml

import dlopt
from dlopt.errors import UserError
from dlopt.plain import join

CONFIG_NAME = "train"
VERSION_BASE = "1.3"  # of Hydra: which of its defaults apply

# While a `Composer` starts Hydra: (--config-dir,), for the plug-in that completes the search path.
search: ContextVar[tuple[Path | None] | None] = ContextVar("search", default=None)

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SELF = yaml.ScalarNode("tag:yaml.org,2002:str", "_self_")
_COMMENT = re.compile(r"\s*#\s*(.*?)\s*$")


def config_folder() -> Path:
    """Returns the folder of dlopt's YAML files: inside the installed package, or next to it in a checkout."""
    installed = Path(dlopt.__file__).parent / "conf"
    return installed if installed.is_dir() else installed.parents[1] / "conf"


@dataclass(frozen=True)
class Extension:
    package: str
    folder: Path


@functools.cache
def extensions() -> tuple[Extension, ...]:
    """Lists the installed extensions without importing them. Raises `UserError` for a package without `conf` folder."""
    installed = []
    for entry in sorted(entry_points(group="dlopt"), key=lambda entry: entry.name):
        package = entry.value.split(":")[0].split(".")[0]
        spec = find_spec(package)
        locations = [] if spec is None else list(spec.submodule_search_locations or [])
        folders = [folder for location in locations if (folder := Path(location, "conf")).is_dir()]
        if not folders:
            raise UserError(
                f"{entry.name}: this installed package registers as a dlopt extension, but the folder {package}/conf "
                "is missing; update or uninstall it"
            )
        installed.append(Extension(package, folders[0]))
    return tuple(installed)


@dataclass(frozen=True)
class Key:
    """A config key: `name` as on the command line (optimizer.lr), `value` and `comment` as in the file."""

    name: str
    value: str
    comment: str


@dataclass(frozen=True)
class Choice:
    group: str
    name: str
    path: Path

    @property
    def header(self) -> list[str]:
        """The comment lines at the top of the file, without Hydra's directives (`# @package`)."""
        lines = []
        for line in _read(self.path).splitlines():
            if line.strip() and not line.startswith("#"):
                break
            if line.startswith("#") and not re.match(r"#\s*@", line):
                lines.append(line.removeprefix("#").removeprefix(" ").rstrip())
        return lines

    @property
    def description(self) -> str:
        """The first line of `header`, without its full stop."""
        return next(iter(self.header), "").removesuffix(".")


class Catalogue:
    """The groups and choices in dlopt's own folder, installed packages and --config-dir.

    The first folder that has a file wins, as in Hydra's search path.
    """

    def __init__(self, config_dir: str | None = None) -> None:
        if config_dir is not None and not Path(config_dir).is_dir():
            raise UserError(f"--config-dir={config_dir}: no such folder")
        typed = [Path(config_dir)] if config_dir is not None else []
        self._folders = [config_folder(), *(extension.folder for extension in extensions()), *typed]
        self._primary = self._find("train") or config_folder() / "train.yaml"

    def groups(self) -> dict[str, str | None]:
        """Maps each group to its default choice (None: no choice), in the order of train.yaml's defaults list."""
        listed = {}
        for node in _defaults(_parse(self._primary)):
            entry, value = _entry(node)
            if value is not None and not entry.startswith("override "):
                listed[entry.removeprefix("optional ").split("@")[0].strip("/")] = None if value == "null" else value
        return listed

    def choices(self, group: str) -> list[Choice]:
        """Returns the choices of a group in natural order of their names.

        Files and folders whose names start with `_` are fragments, not choices.
        """
        by_name: dict[str, Choice] = {}
        for folder in self._folders:
            for path in (folder / group).rglob("*.yaml"):
                parts = path.relative_to(folder / group).with_suffix("").parts
                if not any(part.startswith(("_", ".")) for part in parts):
                    name = "/".join(parts)
                    by_name.setdefault(name, Choice(group, name, path))
        return sorted(by_name.values(), key=lambda choice: _natural_order(choice.name))

    def keys(self, choice: Choice) -> list[Key]:
        """Returns every key that the choice sets, also through its fragments and in other groups, followed by the keys
        that train.yaml gives to all choices of the group."""
        package, keys = self._composed(choice)
        keys.pop(_target_key(choice), None)
        common = _keys_in_file(self._primary, "") if package else {}
        return [
            *keys.values(),
            *(key for name, key in common.items() if name.startswith(f"{package}.") and name not in keys),
        ]

    def target(self, choice: Choice) -> str | None:
        """Returns the dotted name of the callable that the choice configures; None for a recipe, and for `custom`."""
        target = self._composed(choice)[1].get(_target_key(choice))
        return None if target is None or target.value == "???" else target.value

    def _composed(self, choice: Choice) -> tuple[str, dict[str, Key]]:
        """Returns the choice's package (position in the config) and its keys by name, including its fragments' keys."""
        directive = re.search(r"^#\s*@package\s+(\S+)\s*$", _read(choice.path), re.MULTILINE)
        package = directive[1] if directive else choice.group.replace("/", ".")
        package = "" if package == "_global_" else package
        folder = f"{choice.group}/{choice.name}".rpartition("/")[0]
        return package, self._keys(choice.path, folder, package, ())

    def _find(self, name: str) -> Path | None:
        paths = (folder / f"{name}.yaml" for folder in self._folders)
        return next((path for path in paths if path.is_file()), None)

    def _keys(self, path: Path, folder: str, package: str, parents: tuple[Path, ...]) -> dict[str, Key]:
        lines = _read(path).splitlines()
        entries = _defaults(_parse(path))
        if not any(_entry(node)[0] == "_self_" for node in entries):
            entries = [_SELF, *entries]  # Hydra's default: the file itself comes first
        # Overrides of other groups are listed first; a file's later entries replace keys of its earlier ones.
        entries = sorted(entries, key=lambda node: not _entry(node)[0].startswith("override "))
        keys: dict[str, Key] = {}
        for node in entries:
            if _entry(node)[0] == "_self_":
                keys |= _keys_in_file(path, package)
            else:
                keys |= self._keys_of_entry(node, folder, package, (*parents, path), lines)
        return keys

    def _keys_of_entry(
        self, node: yaml.Node, folder: str, package: str, parents: tuple[Path, ...], lines: list[str]
    ) -> dict[str, Key]:
        """Returns the keys of a defaults-list entry: `name`, `/group/name@package`, `group: choice`, `override ...`."""
        entry, value = _entry(node)
        file, _, target_package = entry.removeprefix("override ").removeprefix("optional ").partition("@")
        if entry.startswith("override "):
            group = file.strip("/")
            is_usual = target_package in ("", f"_global_.{group.replace('/', '.')}")
            name = group if is_usual else f"{group}@{target_package}"
            return {name: Key(name, value or "null", _comment(node, lines))}
        config = file if value is None else f"{file}/{value}"
        config = config.strip("/") if file.startswith("/") else f"{folder}/{config}"
        group = config.rpartition("/")[0]
        if target_package.split(".")[0] == "_global_":
            inner = target_package.partition(".")[2]
        elif target_package:
            inner = package if target_package == "_here_" else join(package, target_package)
        else:
            inner = package if group == folder else join(package, group.removeprefix(f"{folder}/").replace("/", "."))
        keys = {}
        if value is not None:
            name = f"{group}@{inner}" if inner != group.replace("/", ".") else group
            keys[name] = Key(name, value, _comment(node, lines))
        path = self._find(config)
        if path is not None and path not in parents:  # `parents` ends cycles of fragments
            keys |= self._keys(path, group, inner, parents)
        return keys


def _target_key(choice: Choice) -> str:
    return f"{choice.group.replace('/', '.')}._target_"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _parse(path: Path) -> yaml.Node | None:
    try:
        root: yaml.Node | None = yaml.compose(_read(path), Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    return root


def _keys_in_file(path: Path, package: str) -> dict[str, Key]:
    root, lines = _parse(path), _read(path).splitlines()
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    return {
        key.name: key
        for key_node, node in pairs
        if key_node.value != "defaults"
        for key in _flatten(join(package, key_node.value), node, key_node, lines)
    }


def _defaults(root: yaml.Node | None) -> list[yaml.Node]:
    if not isinstance(root, yaml.MappingNode):
        return []
    return [entry for key, node in root.value if key.value == "defaults" for entry in node.value]


def _entry(node: yaml.Node) -> tuple[str, str | None]:
    """Splits a defaults-list entry into (name, None) or (group, choice)."""
    if isinstance(node, yaml.MappingNode):
        key, value = node.value[0]
        return str(key.value), str(value.value)
    return str(node.value), None


def _flatten(name: str, node: yaml.Node, key: yaml.Node, lines: list[str]) -> Iterator[Key]:
    """Yields the keys of a block by dotted name; blocks in a list by their index."""
    if isinstance(node, yaml.MappingNode) and node.value:
        for inner, value in node.value:
            yield from _flatten(f"{name}.{inner.value}", value, inner, lines)
    elif isinstance(node, yaml.SequenceNode) and any(isinstance(item, yaml.MappingNode) for item in node.value):
        for i, item in enumerate(node.value):
            yield from _flatten(f"{name}.{i}", item, item, lines)
    else:
        is_block = isinstance(node, yaml.SequenceNode) and not node.flow_style
        yield Key(name, _text(node), _comment(key if is_block else node, lines))


def _text(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return f"[{', '.join(_text(item) for item in node.value)}]"
    if isinstance(node, yaml.MappingNode):
        return "{" + ", ".join(f"{_text(key)}: {_text(value)}" for key, value in node.value) + "}"
    is_quoted = isinstance(node, yaml.ScalarNode) and node.style in ("'", '"')
    return " ".join(str(node.value).split()) or ("''" if is_quoted else "null")


def _comment(node: yaml.Node, lines: list[str]) -> str:
    """Returns the comment after a node on its last line, or ''."""
    if isinstance(node, yaml.MappingNode) and not node.flow_style:
        node = node.value[-1][1]  # the end mark of a block is on the line after it
    line = lines[node.end_mark.line] if node.end_mark.line < len(lines) else ""
    match = _COMMENT.match(line[node.end_mark.column :].removeprefix(":"))
    return match[1] if match else ""


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key that puts resnet20 before resnet110."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
