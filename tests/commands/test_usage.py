import importlib
import io
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import pytest

from dlopt import cli
from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Count
from dlopt.commands.command_table import every_command
from dlopt.commands.shared.command_line import take_command_keys
from dlopt.commands.shared.text_columns import fitted
from dlopt.commands.shared.usage import command_keys, declaring, reads_of, two_columns, typed_words, usage

MODULES = {
    name: importlib.import_module(path.partition(":")[0]) for name, path in every_command().items() if name != "train"
}


@dataclass(frozen=True, kw_only=True)
class Keys:
    size: Annotated[Count, "N: a size"] = 3
    rate: Annotated[float, "X: a rate"] = 1e-6
    names: Annotated[list[str] | None, "[a,b]: some names (default: all)"] = None
    fast: Annotated[bool, "--: hurry"] = False


def command(text: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType("command")
    module.__dict__.update(USAGE=text, **attributes)
    return module


def test_table_joins_declared_keys_and_written_rows() -> None:
    text = "Title\n\n  path=PATH :: a path\n  {Keys}\nand:\n    {_READS}\n  a | b\n"
    assert usage(command(text, Keys=Keys, _READS=("data", "model"))).splitlines() == [
        "Title",
        "",
        "  path=PATH    a path",
        "  size=N       a size (default: 3)",
        "  rate=X       a rate (default: 1e-6)",
        "  names=[a,b]  some names (default: all)",
        "  --fast       hurry",
        "and:",
        "    data, model",
        "  a | b",
    ]
    assert [*typed_words(command(text, Keys=Keys, _READS=()))] == ["size=", "rate=", "names=", "--fast", "path="]
    assert reads_of(command(text, Keys=Keys, _READS=("data", "model"))) == ["data", "model"]


def test_long_left_column_has_a_line_of_its_own() -> None:
    assert two_columns([("a", "one two"), ("b" * 40, "three")], limit=4, width=14) == [
        "  a     one", "        two", "  " + "b" * 40, "        three",
    ]  # fmt: skip


def test_key_without_help() -> None:
    def undeclared(*, size: int = 3) -> None: ...

    with pytest.raises(TypeError, match="size: declare its help"):
        command_keys(undeclared)


def test_takes_own_keys_and_flags() -> None:
    assert take_command_keys(Keys, ["size=4", "--fast", "size>=3", "folder"], "x") == (
        {"size": 4, "fast": True}, ["size>=3", "folder"],
    )  # fmt: skip
    for typed, message in (("--slow", "unknown flag; see `dlopt x --help`"), ("size=0", "an integer >= 1")):
        with pytest.raises(UserError, match=message):
            take_command_keys(Keys, [typed], "x")


@pytest.mark.parametrize("name", MODULES)
def test_help_lists_every_key_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = usage(MODULES[name])
    assert "{" not in re.sub(r"\{name", "", text) and " :: " not in text
    for target in declaring(MODULES[name]):
        for key in command_keys(target):
            assert re.search(rf"^ +{re.escape(key.line)}( |$)", text, re.MULTILINE), key


def functions_of(module: types.ModuleType) -> list[Callable[..., Any]]:
    return [
        each for each in vars(module).values() if callable(each) and getattr(each, "__module__", "") == module.__name__
    ]


@pytest.mark.parametrize("name", MODULES)
def test_every_declared_key_is_in_the_help(name: str) -> None:
    """A function that declares help for its keys is named in the help: else nobody learns of them."""
    module = MODULES[name]
    shown = {key.name for target in declaring(module) for key in command_keys(target)}
    for function in functions_of(module):
        try:
            keys = command_keys(function)
        except (TypeError, ValueError):  # a helper without keys of a command
            continue
        assert {key.name for key in keys} <= shown, function


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("name", ["", *every_command()])
def test_help_fits_the_terminal(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is longer than 80 characters, or than a narrower terminal but for a long word; and no word is lost."""
    monkeypatch.setenv("COLUMNS", str(width))
    shown = io.StringIO()
    monkeypatch.setattr("sys.stdout", shown)
    command, arguments = cli.find([name, "--help"] if name else ["--help"])
    assert isinstance(command, partial)
    command(arguments)
    text = shown.getvalue()
    longer = [line for line in text.splitlines() if len(line) > width]
    assert [line for line in longer if width >= 80 or len(line.split()) > 3] == []
    assert text.replace(" \\\n", "\n").split() == command.args[0].split()


def test_a_broken_command_can_be_pasted() -> None:
    text = "  dlopt train model=resnet20 optimizer=adamw optimizer.lr=0.1 # slow\n"
    assert fitted(text, 40) == ("  dlopt train model=resnet20 \\\n      optimizer=adamw optimizer.lr=0.1\n      # slow")
    assert fitted(text, 80) == text.rstrip()
    assert fitted("One two three\nfour.\n\n  key=N   a key\n", 10) == (
        "One two\nthree\nfour.\n\n  key=N   a\n          key"
    )
    assert fitted("In those of\nsrun or of torchrun.\n", 18) == "In those of srun\nor of torchrun."
