"""Numbers and values as text."""

import math

import pytest

from dlopt.basics import formats


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.0000"), (2.30259, "2.3026"), (123.456, "123.5"), (1e-5, "1.00e-05"), (1e6, "1.00e+06"), (None, "-")],
)
def test_format_number(value: float | None, text: str) -> None:
    assert formats.format_number(value) == text


def test_non_finite_numbers_are_shown() -> None:
    assert formats.format_number(math.nan) == "nan"
    assert formats.format_number(-math.inf) == "-inf"


@pytest.mark.parametrize(("seconds", "text"), [(7, "0:07"), (59.2, "1:00"), (754, "12:34"), (3723, "1:02:03")])
def test_format_clock(seconds: float, text: str) -> None:
    assert formats.format_clock(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1,020 B"), (1010 << 10, "1,010 KiB"), (3 << 19, "1.5 MiB")]
)
def test_format_bytes(count: int, text: str) -> None:
    assert formats.format_bytes(count) == text


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ([704, 296], "a 70.4 %, b 29.6 %"),
        ([1, 0, 1999], "a 0.05 %, b 0.0 %, c 100.0 %"),
        ([10] * 6, "16.7 % each"),
        ([12, 9, 10, 9, 10, 10], "15.0 to 20.0 % each"),
        ([3, 1, 2, 5, 1, 5], "5.9 % (b) to 29.4 % (d)"),
    ],
)
def test_format_shares(counts: list[int], text: str) -> None:
    assert formats.format_shares(counts, "abcdef"[: len(counts)], sum(counts)) == text


def test_round_floats() -> None:
    label = "job 1: lr=0.12369483267621112 eps=1.2345678e-08 x=0.0005,12.5 path=run-1.23456789.pt version=1.2.345678"
    assert formats.round_floats(label) == (
        "job 1: lr=0.1237 eps=1.235e-08 x=0.0005,12.5 path=run-1.23456789.pt version=1.2.345678"
    )


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (43.333, "43.33"), (999.6, "999.6"), (1200, "1,200")])
def test_format_amount(value: float, text: str) -> None:
    assert formats.format_amount(value) == text


def test_formats_of_measurements() -> None:
    assert (formats.format_rate(1234.5), formats.format_rate(math.nan)) == ("1,234", "-")
    assert formats.format_gib(2.96) == "3.0 GiB"


def test_format_count() -> None:
    counts = [formats.format_count(noun, count) for noun in ("steps", "studies") for count in (1, 1200)]
    assert counts == ["1 step", "1,200 steps", "1 study", "1,200 studies"]


def test_wrap_breaks_neither_words_nor_commands() -> None:
    text = "data.augmentation_seed=[1,2]: unknown; `dlopt options data` lists all, or type: dlopt train data=digits"
    lines = ["data.augmentation_seed=[1,2]:", "unknown;", "`dlopt options data`", "lists all, or type:"]
    assert formats.wrap(text, 20) == [*lines, "dlopt train data=digits"]
    assert formats.wrap("data.x=1: dlopt find-lr does not read this key", 20, indent="  ") == [
        "data.x=1: dlopt",
        "  find-lr does not",
        "  read this key",
    ]
    assert formats.wrap(text, None) == [text]
