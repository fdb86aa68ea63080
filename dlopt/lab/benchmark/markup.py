"""Builds HTML in which all text is escaped: names of optimizers, messages and facts come from users."""

import html
from collections.abc import Iterable, Sequence

from dlopt.results.reading import printable


class Html(str):
    """Text that is HTML already. All other text is escaped."""

    __slots__ = ()


def escaped(text: str) -> Html:
    return text if isinstance(text, Html) else Html(html.escape(printable(text)))


def joined(parts: Iterable[str], separator: str = "") -> Html:
    return Html(separator.join(map(escaped, parts)))


def tag(name: str, *parts: str, **attributes: str) -> Html:
    """Returns an element. Write attributes that are Python's keywords with an underscore: class_."""
    written = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items() if value)
    return Html(f"<{name}{written}>{joined(parts)}</{name}>")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 1) -> Html:
    """Returns a table that scrolls sideways; the first `texts` columns are aligned to the left, the others right."""

    def cells(name: str, row: Sequence[str]) -> Html:
        return joined(
            tag(name, cell, class_="number" if i >= texts else "", scope="col" if name == "th" else "")
            for i, cell in enumerate(row)
        )

    head = tag("thead", tag("tr", cells("th", heads)))
    body = tag("tbody", *(tag("tr", cells("td", row)) for row in rows))
    return tag("div", tag("table", head, body), class_="scroll wide", tabindex="0")


def definitions(items: Iterable[tuple[str, str]]) -> Html:
    """Returns a list of terms with their explanations."""
    return tag("dl", *(tag("div", tag("dt", term), tag("dd", text)) for term, text in items))


def section(title: str, *parts: str) -> Html:
    return tag("section", tag("h2", title), *parts)


def note(text: str) -> Html:
    return tag("p", text, class_="note")
