"""Lists config groups, choices and keys from the YAML files alone. Needs neither Hydra nor torch, so it is instant.

A package adds choices through an entry point that names a module with a `conf` folder (`dlopt.config.packages`). Its
YAML files cannot replace dlopt's own. `_target_` may name its callables: installing a package means trusting it.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

import yaml

from dlopt._version import ROOT
from dlopt.basics.errors import FileError, UserError
from dlopt.basics.plain_values import join
from dlopt.config.packages import PACKAGES, entries

CONFIG_NAME = "train"  # the primary config
# While a `Composer` starts Hydra: --config-dir, for the plug-in that completes the search path.
search: ContextVar[Path | None] = ContextVar("search", default=None)

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_OVERRIDE = "override "  # in a defaults list
_FAMILY = "family: "  # of a comment at the top of a choice's file
_COMMENT = re.compile(r"\s*#\s*(.*?)\s*$")


def version_base() -> dict[str, str]:
    """Returns the arguments that select the behaviour of Hydra 1.3. Hydra 1.4 behaves the same, and warns of them."""
    import hydra

    return {"version_base": "1.3"} if hydra.__version__ < "1.4" else {}


def config_folder() -> Path:
    """Returns the folder of dlopt's YAML files: inside the installed package, or next to it in a checkout."""
    installed = ROOT / "conf"
    return installed if installed.is_dir() else installed.parents[1] / "conf"


@functools.cache
def extensions() -> Mapping[str, Path]:
    """Maps installed extensions to their `conf` folders, without importing them. Raises `UserError` without folder."""
    installed = {}
    for name, value in entries("dlopt").items():
        package = value if value in PACKAGES else value.split(":")[0].split(".")[0]
        spec = find_spec(package)
        locations = [] if spec is None else list(spec.submodule_search_locations or [])
        folders = [folder for location in locations if (folder := Path(location, "conf")).is_dir()]
        if not folders:
            raise UserError(
                f"{name}: this installed package registers as a dlopt extension, but the folder {package}/conf "
                "is missing; update or uninstall it"
            )
        installed[package] = folders[0]
    return installed


def config_folders() -> list[Path]:
    """Returns the folders of YAML files of dlopt and of packages."""
    return [config_folder(), *extensions().values()]


@dataclass(frozen=True)
class Key:
    """A config key: `name` as on the command line (optimizer.lr), `value` and `comment` as in the file.

    Or an entry of a defaults list: `name: value`, or only `name`.
    """

    name: str
    value: str = ""
    comment: str = ""


@dataclass(frozen=True)
class Choice:
    group: str
    name: str
    path: Path

    @property
    def header(self) -> list[str]:
        """The comment lines at the top of the file, without Hydra's directives (`# @package`) and the family."""
        return [line for line in self._comments if not line.startswith(_FAMILY)]

    @property
    def family(self) -> str:
        """The choices that `dlopt options` lists it with: adaptive, of the comment `# family: adaptive`; or ""."""
        families = [line for line in self._comments if line.startswith(_FAMILY)]
        return families[0].removeprefix(_FAMILY) if families else ""

    @property
    def _comments(self) -> list[str]:
        top = takewhile(lambda line: not line.strip() or line.startswith("#"), _read(self.path).splitlines())
        comments = [line for line in top if line.startswith("#") and not re.match(r"#\s*@", line)]
        return [line.removeprefix("#").removeprefix(" ").rstrip() for line in comments]

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
            raise FileError(f"--config-dir={config_dir}: no such folder")
        typed = [Path(config_dir)] if config_dir is not None else []
        self._folders = [*config_folders(), *typed]
        self._primary = config_folder() / f"{CONFIG_NAME}.yaml"

    def groups(self) -> dict[str, str | None]:
        """Maps each group to its default choice (or None), in the order of train.yaml's defaults list."""
        return _chosen(self._primary)

    def groups_of_commands(self) -> dict[str, dict[str, str | None]]:
        """Maps commands of packages that have a primary config, COMMAND.yaml, to its groups that train.yaml lacks."""
        files = [path for folder in extensions().values() for path in sorted(folder.glob("*.yaml"))]
        of_runs = self.groups()
        found = {path.stem: {k: v for k, v in _chosen(path).items() if k not in of_runs} for path in files}
        return {name: groups for name, groups in found.items() if groups}

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
        package, _, keys = self._composed(choice)
        common = _parse(self._primary)[1] if package else {}
        return [
            *keys.values(),
            *(key for name, key in common.items() if name.startswith(f"{package}.") and name not in keys),
        ]

    def target(self, choice: Choice) -> str | None:
        """Returns the dotted name of the callable that the choice configures; None for a recipe, and for `custom`."""
        target = self._composed(choice)[1]
        return None if target is None or target.value == "???" else target.value

    def _composed(self, choice: Choice) -> tuple[str, Key | None, dict[str, Key]]:
        """Returns the choice's package (position in the config), its `_target_`, and its other keys by name, including
        those of its fragments."""
        directive = re.search(r"^#\s*@package\s+(\S+)\s*$", _read(choice.path), re.MULTILINE)
        usual = choice.group.replace("/", ".")
        package = directive[1] if directive else usual
        package = "" if package == "_global_" else package
        folder = f"{choice.group}/{choice.name}".rpartition("/")[0]
        keys = self._keys(choice.path, folder, package, ())
        return package, keys.pop(f"{usual}._target_", None), keys

    def _keys(self, path: Path, folder: str, package: str, parents: tuple[Path, ...]) -> dict[str, Key]:
        defaults, own = _parse(path, package)
        if all(entry.name != "_self_" for entry in defaults):
            defaults.insert(0, Key("_self_"))  # Hydra's default: the file itself comes first
        # Overrides of other groups are listed first; a file's later entries replace keys of its earlier ones.
        defaults.sort(key=lambda entry: not entry.name.startswith(_OVERRIDE))
        keys: dict[str, Key] = {}
        for entry in defaults:
            keys |= own if entry.name == "_self_" else self._keys_of(entry, folder, package, (*parents, path))
        return keys

    def _keys_of(self, entry: Key, folder: str, package: str, parents: tuple[Path, ...]) -> dict[str, Key]:
        """Returns the keys of a defaults-list entry: `name`, `/group/name@package`, `group: choice`, `override ...`."""
        file, _, target_package = entry.name.removeprefix(_OVERRIDE).removeprefix("optional ").partition("@")
        if entry.name.startswith(_OVERRIDE):
            group = file.strip("/")
            is_usual = target_package in ("", f"_global_.{group.replace('/', '.')}")
            name = group if is_usual else f"{group}@{target_package}"
            return {name: Key(name, entry.value or "null", entry.comment)}
        config = f"{file}/{entry.value}" if entry.value else file
        config = config.strip("/") if file.startswith("/") else f"{folder}/{config}"
        group = config.rpartition("/")[0]
        if target_package.split(".")[0] == "_global_":
            inner = target_package.partition(".")[2]
        elif target_package:
            inner = package if target_package == "_here_" else join(package, target_package)
        else:
            inner = package if group == folder else join(package, group.removeprefix(f"{folder}/").replace("/", "."))
        keys = {}
        if entry.value:
            name = f"{group}@{inner}" if inner != group.replace("/", ".") else group
            keys[name] = Key(name, entry.value, entry.comment)
        paths = (folder / f"{config}.yaml" for folder in self._folders)
        path = next((path for path in paths if path.is_file()), None)
        if path is not None and path not in parents:  # `parents` ends cycles of fragments
            keys |= self._keys(path, group, inner, parents)
        return keys


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _chosen(path: Path) -> dict[str, str | None]:
    """Maps each group in the defaults list of a primary config to its choice, or None."""
    chosen = [each for each in _parse(path)[0] if each.value and not each.name.startswith(_OVERRIDE)]
    names = [each.name.removeprefix("optional ").split("@")[0].strip("/") for each in chosen]
    return {name: None if each.value == "null" else each.value for name, each in zip(names, chosen, strict=True)}


def _parse(path: Path, package: str = "") -> tuple[list[Key], dict[str, Key]]:
    """Returns the defaults list of a file, and its keys by name, below `package`. Raises `UserError`."""
    defaults, keys = _parsed(_read(path), path, package)
    return [*defaults], {**keys}


@functools.lru_cache(maxsize=1000)
def _parsed(text: str, path: Path, package: str) -> tuple[list[Key], dict[str, Key]]:
    """As `_parse`, of the text of `path`; a message about an unknown key reads train.yaml for every choice."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    lines, defaults, keys = text.splitlines(), list[Key](), dict[str, Key]()
    for key, node in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.value != "defaults":
            keys |= {each.name: each for each in _flatten(join(package, key.value), node, key, lines)}
            continue
        for entry in node.value:
            name, choice = entry.value[0] if isinstance(entry, yaml.MappingNode) else (entry, None)
            defaults.append(Key(name.value, "" if choice is None else choice.value, _comment(entry, lines)))
    return defaults, keys


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
