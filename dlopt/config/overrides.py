"""Overrides of the command line: the only module that takes them apart, quotes them and puts them together.

An override is passed on as Hydra's parsed `Override` where its value matters, and as its text where it is only kept,
shown or composed again.
"""

import copy
import functools
import itertools
import json
import os
import random
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from dlopt.basics.errors import UserError
from dlopt.basics.secrets import is_secret_name, redact, reference

if TYPE_CHECKING:  # Hydra is imported late: most commands only need the keys
    from hydra.core.override_parser.types import Override, RangeSweep

_CLOSED = re.compile(r"""'[^']*'|"[^"]*"|\([^][(){}]*\)|\[[^][(){}]*\]|\{[^][(){}]*\}""")
_SENTENCES = ("note",)  # keys whose value is one text, commas and brackets included
_MOST_VALUES = 1_000_000  # of a range: more are a typing error, which would take all memory


def key_of(override: "str | Override") -> str:
    """Returns the dotted key of an override: `hydra.launcher` of `hydra/launcher=joblib`, `model.x` of `+model.x=1`."""
    return re.split(r"[=@]", text_of(override).lstrip("+~"), maxsplit=1)[0].replace("/", ".")


def group_of(override: "str | Override") -> str:
    """Returns the group, or the first part of the key: `schedule` of `++schedule.warmup_epochs=1`."""
    return key_of(override).partition(".")[0]


def value_of(override: "str | Override") -> str:
    """Returns the text of the value: `1` of `+model.x=1`."""
    return text_of(override).partition("=")[2]


def parts_of(override: str) -> tuple[str, str]:
    """Returns the key or group as typed, and the text of the value: `hydra/launcher` and `joblib`."""
    key, _, value = override.partition("=")
    return key, value


def text_of(override: "str | Override") -> str:
    """Returns an override as typed."""
    return override if isinstance(override, str) else str(override.input_line)


def is_typed(key: str, overrides: "Iterable[str | Override]") -> bool:
    """Returns whether the command line sets the key or chooses for the group."""
    return any(key_of(override) == key for override in overrides)


def without(overrides: Iterable[str], *keys: str) -> list[str]:
    """Returns the overrides except those of the keys."""
    return [override for override in overrides if key_of(override) not in keys]


def storable(overrides: Iterable[str]) -> list[str]:
    """Returns the overrides as they may be stored: without the secrets of the environment.

    A secret that is typed for the environment (hydra.job.env_set.WANDB_API_KEY=...) becomes `${oc.env:WANDB_API_KEY}`:
    whoever repeats the command sets the variable.
    """
    return [redact(_without_secret(line)) for line in overrides]


def _without_secret(line: str) -> str:
    key, equals, _ = line.partition("=")
    name = re.sub(r"^hydra\.job\.env_set(\.|$)", "", key_of(line)) if equals else key_of(line)
    if name == key_of(line):
        return line
    if name:
        return f"{key}={reference(name)}" if is_secret_name(name) else line
    values = _parse(line).value()  # {WANDB_API_KEY:...}
    if not isinstance(values, Mapping):
        return line
    hidden = {str(each): reference(str(each)) for each in values if is_secret_name(str(each))}
    return f"{key}={quoted_plain({**{str(each): item for each, item in values.items()}, **hidden})}"


def is_hydra(override: "str | Override") -> bool:
    """Returns whether an override sets a key or a choice of Hydra's config."""
    return group_of(override) == "hydra"


def parse_overrides(overrides: "Iterable[str | Override]", choices: Any = None) -> "list[Override]":
    """Parses overrides; keeps those that are parsed. Raises `UserError`.

    `choices`: lists those of a group for glob(*), as Hydra's config loader.
    """
    from hydra.errors import HydraException

    overrides, parsed = list(overrides), []
    for each, following in zip(overrides, [*overrides[1:], ""], strict=False):
        try:
            override = copy.copy(_parse(each) if isinstance(each, str) else each)
        except HydraException:
            raise UserError(explain_grammar(text_of(each), text_of(following))) from None
        override.config_loader = choices
        parsed.append(override)
    return parsed


@functools.lru_cache(maxsize=1000)
def _parse(line: str) -> "Override":
    """Parses a line; every job of a sweep has nearly the same."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import RangeSweep

    [override] = OverridesParser.create().parse_overrides([line])
    value = override.value()
    if isinstance(value, RangeSweep):
        _check_range(line, value)
    return override


def _check_range(line: str, sweep: "RangeSweep") -> None:
    """Raises `UserError` for a range without an end, and for one that Hydra's sort() changes (hydra#3228)."""
    start, stop, step = (Decimal(str(number)) for number in (sweep.start, sweep.stop, sweep.step))
    if not all(number.is_finite() for number in (start, stop, step)) or step == 0:
        raise UserError(f"{line}: a range needs finite numbers and a step other than 0: range(START,STOP,STEP)")
    if (stop - start) / step > _MOST_VALUES:
        raise UserError(f"{line}: more than {_MOST_VALUES} values")
    if "sort(" in value_of(line) and (stop - start) % step != 0:
        reason = "the step does not divide the range, of which Hydra's sort() would therefore change the values"
        raise UserError(f"{line}: {reason}; write the range in the order that you want")


def refuse_several(overrides: "Iterable[Override]", reason: str = "one value is needed") -> None:
    """Raises `UserError` for a key with several values."""
    for override in overrides:
        if override.is_sweep_override():
            raise UserError(f"{override.input_line}: {reason}; write a list as [a,b]")


def single_values(overrides: "Iterable[Override]") -> dict[str, Any]:
    """Returns the values by key. Raises `UserError` for a key with several values."""
    overrides = list(overrides)
    refuse_several(overrides)
    return {override.get_key_element(): override.value() for override in overrides}


def listed_values(override: "Override") -> list[str]:
    """Returns the values of a list, range or glob as on the command line. Raises `UserError` for duplicates.

    The order of shuffle(...) is random but always the same: a sweep lists its values several times, when it is checked,
    run and resumed, and in every task of a job array.
    """
    values = list(override.sweep_string_iterator())
    if len(set(values)) < len(values):
        raise UserError(f"{override.input_line}: duplicate value in the list")
    if getattr(override.value(), "shuffle", False):
        values.sort()
        random.Random(0).shuffle(values)
    return values


def listed(override: "Override") -> str:
    """Returns the override with its values spelled out, in the order of `listed_values`."""
    if not override.is_sweep_override():
        return text_of(override)
    return f"{override.get_key_element()}={','.join(listed_values(override))}"


def grid(overrides: "Iterable[Override]") -> list[list[str]]:
    """Returns the overrides of every combination of the listed values, in the order of Hydra's own sweeper.

    Raises `UserError` for continuous ranges and duplicate values.
    """
    lists: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            lists[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            lists[key] = [f"{key}={value}" for value in listed_values(override)]
        else:
            raise UserError(
                f"{override.input_line}: a grid needs listed values; to sample, add hydra/sweeper=dlopt_optuna"
            )
    return [list(combination) for combination in itertools.product(*lists.values())]


def quoted(line: str) -> str:
    """Quotes what Hydra's grammar rejects or splits: values with non-ASCII letters (name=größe,klein), sentences."""
    key, equals, text = line.partition("=")
    if key in _SENTENCES and equals and not re.fullmatch(r"\w+", text) and text[:1] not in ("'", '"', "$"):
        return f"{key}={quoted_plain(text)}"
    if not equals or text.isascii() or not text.isprintable() or re.search(r"""['"\[\]{}()$\\]""", text):
        return line
    return f"{key}={','.join(value if value.isascii() else repr(value) for value in text.split(','))}"


def explain_grammar(line: str, following: str) -> str:
    """Explains an override that Hydra's grammar rejects; `following`: the next one of the command line, or ""."""
    key, equals, value = line.partition("=")
    if re.fullmatch(r"\w+(\.\w+)*", line) and following and "=" not in following:
        return f"{line} {following}: an override is key=value: {line}={following}"
    if not equals and not key.startswith("~"):
        return f"{line}: an override is key=value or group=choice"
    if not re.fullmatch(r"[+~]{0,2}[\w/-]+([.@][\w/-]+)*", key):
        shown = line if line.isprintable() else repr(line)
        return f"{shown}: {key!r} is not a valid key or group name; an override is key=value or group=choice"
    sign = _unpaired(value)
    if sign in ("[", "(", "{") and following and "=" not in following:
        return f"{line!r}: {sign} is not closed; a list has no spaces, or the whole argument is quoted: {line}..."
    correct = f"{key}={quoted_value(os.path.expanduser(value))}"
    advice = f"the value must be quoted for Hydra, inside the quotes for the shell: {correct!r}"
    fault = f"{sign} is not {'opened' if sign in ')]}' else 'closed'}; as plain text, " if sign else ""
    return f"{line!r}: {fault}{advice}"


def _unpaired(value: str) -> str:
    """Returns the first bracket or quote of `value` without its partner; "" if there is none."""
    removed = 1
    while removed:
        value, removed = _CLOSED.subn("", value)
    unpaired = re.search(r"""[][(){}'"]""", value)
    return unpaired.group() if unpaired else ""


def quoted_plain(value: Any) -> str:
    """Formats a plain value in Hydra's override grammar."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if isinstance(value, str):
        return QuotedString(value, Quote.single).with_quotes()
    if isinstance(value, list):
        return f"[{','.join(map(quoted_plain, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{quoted_plain(item)}' for key, item in value.items())}}}"
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def quoted_value(value: str) -> str:
    """Quotes a value for Hydra's grammar: [a=1,b=[2]] as ['a=1','b=[2]'], because a quoted list would be a string.

    Blocks, too: {a:[b=1],c:2} as {a:['b=1'],c:2}. Their keys cannot be quoted.
    """
    if value.startswith("[") and value.endswith("]"):
        return f"[{','.join(map(_quoted_item, _items(value[1:-1])))}]"
    if value.startswith("{") and value.endswith("}"):
        pairs = [item.partition(":") for item in _items(value[1:-1])]
        if all(colon for _, colon, _ in pairs):
            return f"{{{','.join(f'{key.strip()}:{_quoted_item(each)}' for key, _, each in pairs)}}}"
    return quoted_plain(value)


def _quoted_item(item: str) -> str:
    """Quotes an entry of a list or block, unless it is a list or block itself, or needs no quotes."""
    item = item.strip()
    if item[:1] in ("[", "{"):
        return quoted_value(item)
    return item if re.fullmatch(r"'[^']*'|\"[^\"]*\"", item) else repr(item)


def _items(text: str) -> list[str]:
    """Splits the inside of a list or block at its commas, but not within brackets or quotes."""
    items, depth, quote = [""], 0, ""
    for letter in text:
        if letter == quote:
            quote = ""
        elif not quote and letter in "'\"":
            quote = letter
        elif not quote:
            depth += (letter in "[{(") - (letter in ")}]")
        if letter == "," and depth == 0 and not quote:
            items.append("")
        else:
            items[-1] += letter
    return items if text.strip() else []
