"""Hostile YAML: alias bombs, deep nesting, huge integers, files that are not regular."""

import json
import os
import re
import time
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from dlopt.basics.files import read_json
from dlopt.basics.folders import RunFolder
from dlopt.basics.plain_values import check_yaml, expanded_size, load_yaml, parse_json, read_regular, regular_tail
from dlopt.config.choices import config_folder
from dlopt.config.overrides import TEXTS
from tests.support.line import refused
from tests.support.sizes import TINY


def bomb(levels: int = 12) -> str:
    lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]")
    return "\n".join(lines) + "\n"


def test_expanded_size() -> None:
    assert expanded_size("a: [1, 2]") == 5  # the mapping, its key, the list, two numbers
    assert expanded_size("a: &x [1, 2]\nb: *x\n") == 9
    assert expanded_size(bomb(4)) > 9**4
    assert expanded_size("a: &x [*x]") > 100_000
    assert expanded_size("a: [") == 0


@pytest.mark.parametrize("name", ["train2.yaml", "optimizer/evil.yaml"])
def test_refuses_bomb_in_config_dir(tmp_path: Path, name: str) -> None:
    path = tmp_path / "conf" / name
    path.parent.mkdir(parents=True)
    path.write_text(bomb())
    begin = time.process_time()
    message = refused(tmp_path, "train", "--config-dir", "conf", "optimizer=evil", *TINY)
    assert name in message and "aliases" in message
    assert time.process_time() - begin < 5


def test_accepts_few_aliases(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("a: &x [1, 2]\nb: *x\n")
    check_yaml(path)
    path.write_text("x" * 1_000_001)
    with pytest.raises(ValueError, match="bytes"):
        check_yaml(path)
    with pytest.raises(ValueError, match="regular"):
        check_yaml(tmp_path)


def test_long_words_are_no_integers(tmp_path: Path) -> None:
    """A digest or a run of letters may be a note of a run."""
    path = tmp_path / "mine.yaml"
    for word in ("deadbeef" * 16, "a" * 128, "0123456789abcdef" * 8):
        path.write_text(f"note: {word}\n")
        check_yaml(path)
    for integer in ("1" * 101, "-" + "1_0" * 40, "0x" + "f" * 100, "0b" + "10" * 60, "1" + ":59" * 40):
        path.write_text(f"note: {integer}\n")
        with pytest.raises(ValueError, match="an integer of more than 100 digits"):
            check_yaml(path)


def test_bomb_in_a_run_folder_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(bomb())
    assert RunFolder(tmp_path).config() is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[" * 500_000, "nested"),
        ("- " * 100_000 + "1", "nested"),
        ("a: " + "9" * 5_000, "integer"),
        ("a: 0x" + "f" * 50_000, "integer"),
        ("a: " + ":".join(["59"] * 100_000), "integer"),
        ("[" + "1," * 200_000 + "]", "too large"),
        (bomb(), "aliases"),
    ],
)
def test_refuses_content_that_is_slow_or_crashes_the_loader(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=reason):
        load_yaml(path)


def test_reads_no_fifo_and_no_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(ValueError, match="regular"):
            load_yaml(path)
    with pytest.raises(ValueError, match="more than 3 bytes"):
        read_regular(Path(__file__), 3)
    assert read_json(tmp_path / "fifo") is None


def test_reads_the_end_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("abc")
    assert [regular_tail(tmp_path / "text", count) for count in (0, 2, 9)] == [b"", b"bc", b"abc"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a: 1\nb: {c: 1, c: 2}\n", "has the key 'c' twice"),
        ("a: &x [*x]", "aliases"),
        ("a: !!int ''", "is not valid YAML"),
        ("a: !!timestamp x", "is not valid YAML"),
        ("a: !!set {x}", "type set"),
        ("a: 1" + ":00" * 1000 + ".5", "integer of more than 100 digits"),
    ],
)
def test_refuses_yaml_that_dlopt_does_not_write(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=reason):
        load_yaml(path)


def test_accepts_dates_and_merge_keys(tmp_path: Path) -> None:
    """As OmegaConf reads them: a date is a text."""
    path = tmp_path / "mine.yaml"
    path.write_text("a: &a {x: 1, y: 2024-11-26}\nb: {<<: *a, x: 2}\n")
    assert load_yaml(path)["b"] == {"x": 2, "y": "2024-11-26"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 20_000 + "]" * 20_000, "nested more than 100"),
        ("[" * 200 + "]" * 200, "nested more than 100"),
        ('{"a": Infinity}', "not finite"),
        ('{"a": 1e999}', "not finite"),
        (f'{{"a": {"9" * 101}}}', "more than 100 digits"),
        ('{"a": 1, "a": 2}', "has a key twice"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"a": "\xff"}', "utf-8"),
        ("{", "Expecting"),
    ],
)
def test_refuses_json_that_dlopt_does_not_write(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_accepts_what_json_dumps_writes() -> None:
    """Bytes of a file name that are not UTF-8 are surrogates in Python; many brackets side by side are not deep."""
    value = {"folder": "a\udcff", "text": "\U0001f600", "number": 1e300, "lists": [[]] * 500}
    assert parse_json(json.dumps(value)) == value


def test_text_and_numbers_of_any_length_below_the_limit_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"a: '{'9' * 500}'\nb: {'word ' * 500}\nc: 18446744073709551616\n")
    assert load_yaml(path)["c"] == 2**64


SCALARS = (
    "0", "00", "010", "08", "-010", "+1", "-1", "1_000", "1__0", "1_", "0_1", "0x1F", "0o10", "0b11", "1:30",
    "190:20:30", "1:30.5", "2024-01-01", "2024_11_26", "1.10", "01.5", "1.", "0.5_", "-.0", "1e5", "1E-05",
    "01e5", "1.0e-05", "09.e9", "1.e5", "yes", "no", "on", "off", "Yes", "NO", "On", "y", "n", "true", "True",
    "FALSE", "null", "NULL", "1.2.3", "adamw", "${x}", "a:b",
)  # fmt: skip


@pytest.mark.parametrize("text", SCALARS)
def test_values_of_a_file_are_those_of_the_command_line(tmp_path: Path, text: str) -> None:
    """Hydra's two readers: of overrides, and of files (YAML 1.1, where 010 is 8, 1:30 is 90 and no is false)."""
    typed = OverridesParser.create().parse_override(f"key={text}").value()
    [read] = OmegaConf.to_container(OmegaConf.create(f"key: {text}"), resolve=False).values()  # type: ignore[union-attr]
    path = tmp_path / "mine.yaml"
    for content in (f"block:\n  key: {text}\n", f"block: {{key: [{text}]}}\n"):
        path.write_text(content)
        if repr(read) in (repr(typed), repr(text)):
            check_yaml(path, texts=("name",))
        else:
            line = content.count("\n", 0, content.index(text)) + 1
            with pytest.raises(ValueError, match=rf"^line {line}: block\.key: {re.escape(text)} is .* in YAML; write"):
                check_yaml(path, texts=("name",))
    path.write_text(f"key: '{text}'\nother: !!str {text}\n")
    check_yaml(path)


@pytest.mark.parametrize("content", ["010: 1", "key: !!int '010'", "key: !!bool off", "- 1:30", "key: &x 0x10"])
def test_misread_values_elsewhere(tmp_path: Path, content: str) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(ValueError, match="in YAML; write"):
        load_yaml(tmp_path / "mine.yaml")


@pytest.mark.parametrize(("text", "is_read"), [("2024_11_26", False), ("1.10", False), ("007", False), ("12", True)])
def test_texts_are_not_read_as_numbers(tmp_path: Path, text: str, is_read: bool) -> None:
    path = tmp_path / "mine.yaml"
    for key in ("name", "tags", "hydra.run.dir", "root"):
        path.write_text(f"{key}: {text}")
        if is_read:
            check_yaml(path, texts=TEXTS)
        else:
            with pytest.raises(ValueError, match=rf"{key}: {text} is .*; write a text in quotes: '{text}'"):
                check_yaml(path, texts=TEXTS)


def test_shipped_and_written_files_are_read(tmp_path: Path) -> None:
    for path in config_folder().rglob("*.yaml"):
        check_yaml(path, texts=TEXTS)
    values = [*SCALARS, 1e-5, 1e22, float("inf"), -0.0, True, None, 10**20]
    (tmp_path / "dumped.yaml").write_text(yaml.safe_dump(values))
    assert load_yaml(tmp_path / "dumped.yaml") == values
    OmegaConf.save({"key": values}, tmp_path / "saved.yaml")
    check_yaml(tmp_path / "saved.yaml")
