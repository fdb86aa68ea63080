"""Columns that are no features: they divide or weigh the rows. Imports no torch."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import numpy as np

from dlopt.basics.errors import UserError
from dlopt.data.checks import number
from dlopt.data.tables.columns import as_dates


class FurtherKeys(TypedDict, total=False):
    """Config keys of every data set with named columns: see `conf/data/table.yaml`. Older runs lack them."""

    group: str | None
    order: str | None
    weight: str | None


def columns_of(keys: Mapping[str, Any], **others: str | None) -> dict[str, str]:
    """Returns the columns of `FurtherKeys`, by key.

    Raises `UserError` if one is also that of one of the `others` or named twice, or if group and order are both given.
    """
    found: dict[str, str] = {}
    for key in ("group", "order", "weight"):
        if (name := keys.get(key)) is None:
            continue
        if other := next((each for each, column in (others | found).items() if column == name), None):
            raise UserError(f"data.{key}={name}: is also data.{other}; give another column")
        found[key] = name
    if {"group", "order"} <= found.keys():
        raise UserError(
            f"data.order={found['order']}: data.group={found['group']} may keep an earlier row with a later one; use "
            "one of them"
        )
    return found


def further_of(
    keys: Mapping[str, str], fields: Callable[[str], list[str]], place: Callable[[int], str]
) -> dict[str, np.ndarray]:
    """Returns the columns of `keys`: a group int64 [N], equal for equal texts; an order, numbers or dates, and a
    weight, float64 [N].

    Raises `UserError` for a missing value, an order or a weight of another kind, and a weight below 0. `place`: names a
    row.
    """
    found: dict[str, np.ndarray] = {}
    for key, name in keys.items():
        texts = fields(name)
        if key == "group":
            codes = {text: hashlib.blake2b(text.encode(), digest_size=8).digest() for text in set(texts)}
            found[key] = np.frombuffer(b"".join(codes[text] for text in texts), dtype=np.int64).copy()
            continue
        values = np.array([number(text) for text in texts])
        if key == "order" and not np.isfinite(values).all():
            dates = as_dates(name, texts)
            values = values if dates is None else dates.values
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            kinds = "numbers or of dates" if key == "order" else "finite numbers"
            raise UserError(f"{place(row)}: {name} is {texts[row]!r}; data.{key} needs a column of {kinds}")
        if key == "weight" and (values < 0).any():
            row = int(np.flatnonzero(values < 0)[0])
            raise UserError(f"{place(row)}: {name} is {texts[row]}; data.weight needs numbers of 0 or more")
        found[key] = values
    return found
