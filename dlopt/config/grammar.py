"""Quotes the values of overrides for Hydra's grammar, and explains the overrides that the grammar rejects."""

import os
import re

from hydra.core.override_parser.types import Quote, QuotedString

_CLOSED = re.compile(r"""'[^']*'|"[^"]*"|\([^][(){}]*\)|\[[^][(){}]*\]|\{[^][(){}]*\}""")


def quoted(line: str) -> str:
    """Quotes plain values that have non-ASCII letters, which Hydra's grammar rejects: name=größe,klein."""
    key, equals, text = line.partition("=")
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
    correct = f"{key}={_quoted_value(os.path.expanduser(value))}"
    advice = f"the value must be quoted for Hydra, inside the quotes for the shell: {correct!r}"
    sign = _unpaired(value)
    fault = f"{sign} is not {'opened' if sign in ')]}' else 'closed'}; as plain text, " if sign else ""
    return f"{line!r}: {fault}{advice}"


def _unpaired(value: str) -> str:
    """Returns the first bracket or quote of `value` without its partner; "" if there is none."""
    removed = 1
    while removed:
        value, removed = _CLOSED.subn("", value)
    unpaired = re.search(r"""[][(){}'"]""", value)
    return unpaired.group() if unpaired else ""


def _quoted_value(value: str) -> str:
    """Quotes a value for Hydra's grammar: [a=1,b=[2]] as ['a=1','b=[2]'], because a quoted list would be a string."""
    if not (value.startswith("[") and value.endswith("]")):
        return QuotedString(value, Quote.single).with_quotes()
    items, depth = [""], 0
    for letter in value[1:-1]:
        depth += (letter in "[{(") - (letter in ")}]")
        if letter == "," and depth == 0:
            items.append("")
        else:
            items[-1] += letter
    return f"[{','.join(repr(item.strip()) for item in items)}]"
