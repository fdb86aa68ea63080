"""The choices that there are, read from the YAML files alone: without Hydra and torch, listing them is instant.

An installed package adds choices by an entry point that names a module with a folder `conf`:

    [project.entry-points.dlopt]
    mine = "mine"

Its YAML files cannot replace dlopt's own, and `_target_` may name its callables: who installs a package trusts it.
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

config_dir: ContextVar[Path | None] = ContextVar("config_dir", default=None)  # --config-dir, for the plug-in

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SELF = yaml.ScalarNode("tag:yaml.org,2002:str", "_self_")
_COMMENT = re.compile(r"\s*#\s*(.*?)\s*$")


def config_folder() -> Path:
    """The shipped YAML files: inside the installed package, or beside it in a checkout."""
    installed = Path(dlopt.__file__).parent / "conf"
    return installed if installed.is_dir() else installed.parents[1] / "conf"


@dataclass(frozen=True)
class Extension:
    package: str
    folder: Path


@functools.cache
def extensions() -> tuple[Extension, ...]:
    """Lists the installed extensions without importing them. Raises `UserError` where a package has no such folder."""
    found = []
    for entry in sorted(entry_points(group="dlopt"), key=lambda each: each.name):
        package = entry.value.split(":")[0].split(".")[0]
        spec = find_spec(package)
        places = [] if spec is None else list(spec.submodule_search_locations or [])
        folders = [folder for place in places if (folder := Path(place, "conf")).is_dir()]
        if not folders:
            raise UserError(
                f"{entry.name}: this installed package says that it extends dlopt, but {package}/conf is no folder; "
                "update or uninstall it"
            )
        found.append(Extension(package, folders[0]))
    return tuple(found)


@dataclass(frozen=True)
class Key:
    """One key with its default: `name` as it is typed (optimizer.lr), `value` as it stands in the file."""

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
        """The comment lines on top of the file, but for Hydra's directives (`# @package`)."""
        lines = []
        for line in _read(self.path).splitlines():
            if line.strip() and not line.startswith("#"):
                break
            if line.startswith("#") and not re.match(r"#\s*@", line):
                lines.append(line.removeprefix("#").removeprefix(" ").rstrip())
        return lines

    @property
    def description(self) -> str:
        """The first of these lines: what the choice is."""
        return next(iter(self.header), "").removesuffix(".")


class Catalogue:
    """The groups and choices of dlopt's own folder, of installed packages and of --config-dir: the first one wins, as
    in Hydra's search path."""

    def __init__(self, config_dir: str | None = None) -> None:
        if config_dir is not None and not Path(config_dir).is_dir():
            raise UserError(f"--config-dir={config_dir}: there is no such folder")
        typed = [Path(config_dir)] if config_dir is not None else []
        self._folders = [config_folder(), *(extension.folder for extension in extensions()), *typed]
        self._primary = self._find("train") or config_folder() / "train.yaml"

    def groups(self) -> dict[str, str | None]:
        """Each group's default choice (None: none unless one is chosen), in the order of train.yaml's defaults list."""
        listed = {}
        for node in _defaults(_parse(self._primary)):
            entry, value = _entry(node)
            if value is not None and not entry.startswith("override "):
                listed[entry.removeprefix("optional ").split("@")[0].strip("/")] = None if value == "null" else value
        return listed

    def choices(self, group: str) -> list[Choice]:
        """By name, numbers in their order. Files and folders whose names start with `_` are fragments of choices."""
        found: dict[str, Choice] = {}
        for folder in self._folders:
            for path in (folder / group).rglob("*.yaml"):
                parts = path.relative_to(folder / group).with_suffix("").parts
                if not any(part.startswith(("_", ".")) for part in parts):
                    name = "/".join(parts)
                    found.setdefault(name, Choice(group, name, path))
        return sorted(found.values(), key=lambda choice: _natural(choice.name))

    def keys(self, choice: Choice) -> list[Key]:
        """Every key that the choice brings, those of the fragments it pulls in included, and what it sets elsewhere;
        then what train.yaml gives to all choices of the group."""
        package, found = self._composed(choice)
        found.pop(_target_key(choice), None)
        of_all = _own(self._primary, "") if package else {}
        of_all = {key: each for key, each in of_all.items() if key.startswith(f"{package}.")}
        return [*found.values(), *(each for key, each in of_all.items() if key not in found)]

    def target(self, choice: Choice) -> str | None:
        """Returns the dotted name of the callable that the choice configures; None for a recipe."""
        target = self._composed(choice)[1].get(_target_key(choice))
        return None if target is None else target.value

    def _composed(self, choice: Choice) -> tuple[str, dict[str, Key]]:
        """Returns the choice's place in the config and the keys that it sets, including those of its fragments."""
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
            entries = [_SELF, *entries]  # Hydra's rule
        entries = sorted(entries, key=lambda node: not _entry(node)[0].startswith("override "))
        found: dict[str, Key] = {}
        for node in entries:
            if _entry(node)[0] == "_self_":
                found |= _own(path, package)
            else:
                found |= self._pulled_in(node, folder, package, (*parents, path), lines)
        return found

    def _pulled_in(
        self, node: yaml.Node, folder: str, package: str, parents: tuple[Path, ...], lines: list[str]
    ) -> dict[str, Key]:
        """The keys of one entry of a defaults list: `name`, `/group/name@package`, `group: choice`, `override ...`."""
        entry, value = _entry(node)
        place, _, wanted = entry.removeprefix("override ").removeprefix("optional ").partition("@")
        if entry.startswith("override "):
            name = place.strip("/") + (f"@{wanted}" if wanted else "")
            return {name: Key(name, value or "null", _comment(node, lines))}
        whole = place if value is None else f"{place}/{value}"
        whole = whole.strip("/") if place.startswith("/") else f"{folder}/{whole}"
        group = whole.rpartition("/")[0]
        if wanted.split(".")[0] == "_global_":
            inner = wanted.partition(".")[2]
        elif wanted:
            inner = package if wanted == "_here_" else _join(package, wanted)
        else:
            inner = package if group == folder else _join(package, group.removeprefix(f"{folder}/").replace("/", "."))
        found = {}
        if value is not None:
            name = f"{group}@{inner}" if inner != group.replace("/", ".") else group
            found[name] = Key(name, value, _comment(node, lines))
        path = self._find(whole)
        if path is not None and path not in parents:
            found |= self._keys(path, group, inner, parents)
        return found


def _target_key(choice: Choice) -> str:
    return f"{choice.group.replace('/', '.')}._target_"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _parse(path: Path) -> yaml.Node | None:
    try:
        root: yaml.Node | None = yaml.compose(_read(path), Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from None
    return root


def _own(path: Path, package: str) -> dict[str, Key]:
    """The keys that stand in the file itself."""
    root, lines = _parse(path), _read(path).splitlines()
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    return {
        each.name: each
        for key, node in pairs
        if key.value != "defaults"
        for each in _flatten(_join(package, key.value), node, key, lines)
    }


def _defaults(root: yaml.Node | None) -> list[yaml.Node]:
    if not isinstance(root, yaml.MappingNode):
        return []
    return [each for key, node in root.value if key.value == "defaults" for each in node.value]


def _entry(node: yaml.Node) -> tuple[str, str | None]:
    """(name, None) or (group, choice) of an entry of a defaults list."""
    if isinstance(node, yaml.MappingNode):
        key, value = node.value[0]
        return str(key.value), str(value.value)
    return str(node.value), None


def _flatten(name: str, node: yaml.Node, key: yaml.Node, lines: list[str]) -> Iterator[Key]:
    """Dotted keys of a block; items of a list of blocks by their number."""
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
    """What stands behind a node on its last line."""
    if isinstance(node, yaml.MappingNode) and not node.flow_style:
        node = node.value[-1][1]
    line = lines[node.end_mark.line] if node.end_mark.line < len(lines) else ""
    found = _COMMENT.match(line[node.end_mark.column :].removeprefix(":"))
    return found[1] if found else ""


def _join(package: str, name: str) -> str:
    return f"{package}.{name}" if package else name


def _natural(name: str) -> list[tuple[int, str]]:
    """resnet20 before resnet110."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
