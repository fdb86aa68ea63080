"""Messages for overrides that Hydra's grammar rejects, and the one module that takes overrides apart."""

import re
from pathlib import Path

import hydra
import pytest

import dlopt
from dlopt.basics.errors import UserError
from dlopt.config.overrides import explain_grammar, parse_overrides, with_folder

HAS_HYDRA_1_4 = hydra.__version__ >= "1.4"  # sorts ranges and reads their steps correctly


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("range(0,3", "( is not closed; as plain text, "),
        ("[64,64", "[ is not closed; as plain text, "),
        ("64,64]", "] is not opened; as plain text, "),
        ("it's", "' is not closed; as plain text, "),
        ("f('(')]", "] is not opened; as plain text, "),
        ("a (b){c}", ""),
    ],
)
def test_names_the_unpaired_bracket_or_quote(value: str, fault: str) -> None:
    message = explain_grammar(f"name={value}", "")
    assert message.startswith(f"{f'name={value}'!r}: {fault}the value must be quoted for Hydra")
    advised = message.rpartition("for the shell: ")[2][1:-1].replace("\\\\", "\\")  # as the shell reads it
    assert [override.value() for override in parse_overrides([advised])] == [value]


def test_blocks_and_lists_are_quoted_entry_by_entry() -> None:
    message = explain_grammar("key={a:[x=1,y=[2,3]],b: ['z=4'],c:{d:e=f}}", "")
    advised = message.rpartition("for the shell: ")[2][1:-1]
    [override] = parse_overrides([advised])
    assert override.value() == {"a": ["x=1", "y=[2,3]"], "b": ["z=4"], "c": {"d": "e=f"}}


def test_one_module_takes_overrides_apart_as_text() -> None:
    apart = re.compile(r"""(partition|split|lstrip)\(["'][=+~]|(startswith|removeprefix)\(["'](?!query)[\w.]+=["']""")
    package = Path(dlopt.__file__).parent
    found = [path for path in package.rglob("*.py") if apart.search(path.read_text())]
    assert found == [package / "config/overrides.py"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("sort(range(1.3,0,-0.5))", "does not divide the range"),  # Hydra: .5, 1.0, 1.5
        ("sort(range(0,10,3),reverse=true)", "" if HAS_HYDRA_1_4 else "does not divide the range"),
        ("range(1,5,0)", "a step other than 0"),
        ("int(range(0,2,0.5))", "" if HAS_HYDRA_1_4 else "a step other than 0"),
        ("range(0,inf,1.0)", "finite numbers"),
        ("range(0,1e9)", "more than 1000000 values"),
        ("sort(range(1,5),reverse=true)", ""),
        ("range(5,1)", ""),
    ],
)
def test_ranges_that_hydra_changes_or_that_never_end_are_refused(value: str, reason: str) -> None:
    if not reason:
        parse_overrides([f"key={value}"])
        return
    with pytest.raises(UserError, match=reason):
        parse_overrides([f"key={value}"])


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("optimizer=sgd epochs=2", "several overrides are separate words: optimizer=sgd epochs=2"),
        ("optimizer.lr=0.1,epochs=2", "several overrides are separate words: optimizer.lr=0.1 epochs=2"),
        ("optimizer.lr==0.1", "one equals sign: optimizer.lr=0.1"),
        ("optimizer.betas=(0.9,0.95)", "lists have square brackets: optimizer.betas=[0.9,0.95]"),
    ],
)
def test_lines_that_nobody_means_as_a_text_get_advice_that_works(line: str, advice: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_overrides([line])
    assert str(caught.value) == f"{line}: {advice}"
    parse_overrides(advice.rpartition(": ")[2].split())


def test_a_folder_with_a_comma_and_an_equals_sign() -> None:
    with pytest.raises(UserError, match="the value must be quoted for Hydra") as caught:
        parse_overrides(["hydra.sweep.dir=q n,m=1"])
    assert str(caught.value).endswith("\"hydra.sweep.dir='q n,m=1'\"")


def test_the_folder_of_a_run_or_a_sweep() -> None:
    assert with_folder(["seed=1", "output=a/b"], multirun=False) == ["seed=1", "hydra.run.dir=a/b"]
    assert with_folder(["output=a/b"], multirun=True) == ["hydra.sweep.dir=a/b"]
    assert with_folder(["seed=1"], multirun=True) == ["seed=1"]
    with pytest.raises(UserError, match=r"output=a hydra\.run\.dir=b: set the folder once"):
        with_folder(["output=a", "hydra.run.dir=b"], multirun=False)
    with pytest.raises(UserError, match=r"^'output=a/b=c': the value must be quoted for Hydra"):
        with_folder(["output=a/b=c"], multirun=False)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("name=2024_11_26", "2024_11_26"),
        ("++name=007", "007"),
        ("output=1e5", "1e5"),
        ("tags=[2024_11, a]", ["2024_11", "a"]),
        ("name='1_0'", "1_0"),
        ("note=null", None),
        ("epochs=1_0", 10),
    ],
)
def test_a_text_that_looks_like_a_number_stays_as_typed(line: str, value: object) -> None:
    [override] = parse_overrides([line])
    assert override.value() == value and type(override.value()) is type(value)
