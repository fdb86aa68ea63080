"""Colours and weights of messages, helps and suggested commands on a terminal."""

import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.text import Text

_STYLES = {  # later ones win
    r"`[^`]*`|(?<=: )dlopt (?:(?!, |; ).)*|\S*\bpip install [^;)]*": "cyan",  # commands within a sentence
    r"(?m)^ {2,}(dlopt|srun|\S+/tensorboard) (.*\\\n)*[^#\n]*": "cyan",  # commands on lines of their own
    r"(?m)^  (?!dlopt|srun)\S.*?(?=  )|^  \S+=\S+$": "cyan",  # the left column of a help
    r"(?m)^(Usage|next):|^[A-Z](?!.*\. )[^`\n]*:$": "bold",  # headings
    r"(?<=did you mean )[^?]+": "bold cyan",
    r"\ballowed:\s[^;]*|(?<=`)\slists all|(?m:(?<=\s)# .*)": "dim",
    r"(?<=^dlopt: )warning:": "bold yellow",
}


def emphasized(text: str, prefix: str = "") -> "Text":
    """Returns a text with its commands, headings, hints and comments in styles; without any if NO_COLOR is set.

    `prefix`: the style of a leading "dlopt:".
    """
    from rich.text import Text  # slow to import, and pipes do not need it

    shown = Text(text)
    if not os.environ.get("NO_COLOR"):
        for pattern, style in {**_STYLES, "^dlopt:": prefix}.items():
            shown.highlight_regex(pattern, style)
    return shown


def print_emphasized(text: str, stream: TextIO | None = None, prefix: str = "") -> None:
    """Prints a text to `stream` (default: stdout); a terminal that has colours shows it `emphasized`."""
    stream = stream or sys.stdout
    if not stream.isatty():
        print(text, file=stream)
        return
    from rich.console import Console

    Console(file=stream, highlight=False).print(emphasized(text, prefix), soft_wrap=True)
