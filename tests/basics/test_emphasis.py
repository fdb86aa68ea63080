import io

import pytest

from dlopt.basics.emphasis import emphasized, print_emphasized
from dlopt.basics.interruption import print_message, print_note

TEXT = """\
dlopt: lr: unknown key; did you mean optimizer.lr? allowed: seed,
name; `dlopt options` lists all"""
HELP = """\
Usage: dlopt eval RUN
  dlopt eval a \\
      tta=flip  # four crops
  tta=NAME  which crops, see:
two words"""


def styles(text: str, prefix: str = "") -> dict[str, str]:
    shown = emphasized(text, prefix)
    return {shown.plain[span.start : span.end]: str(span.style) for span in shown.spans}


def test_parts_of_a_message_and_of_a_help_have_their_styles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert styles(TEXT, "bold red") == {
        "dlopt:": "bold red", "optimizer.lr": "bold cyan", "allowed: seed,\nname": "dim", "`dlopt options`": "cyan",
        " lists all": "dim",
    }  # fmt: skip
    assert styles(HELP) == {
        "Usage:": "bold", "dlopt eval RUN": "cyan", "  dlopt eval a \\\n      tta=flip  ": "cyan",
        "# four crops": "dim", "  tta=NAME": "cyan",
    }  # fmt: skip
    assert styles("dlopt: warning: x", "bold")["warning:"] == "bold yellow"
    assert styles("with: dlopt train resume=auto, or another") == {"dlopt train resume=auto": "cyan"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "changes", "expected"),
    [
        (Terminal(), {}, "\x1b[1;31mdlopt:\x1b[0m a\n\x1b[1mdlopt:\x1b[0m b\n\x1b[1mnext:\x1b[0m\n"),
        (Terminal(), {"NO_COLOR": "1"}, "dlopt: a\ndlopt: b\nnext:\n"),
        (Terminal(), {"TERM": "dumb"}, "dlopt: a\ndlopt: b\nnext:\n"),
        (io.StringIO(), {}, "dlopt: a\ndlopt: b\nnext:\n"),
    ],
)
def test_only_terminals_with_colours_get_codes(
    stream: io.StringIO, changes: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm-256color"} | changes).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr", stream)
    print_message("a")
    print_note("b")
    print_emphasized("next:", stream)
    assert stream.getvalue() == expected
