"""Keeps secrets of the environment out of stored files: every writer of texts passes them through `redact`.

Secrets are the values of environment variables that the config refers to (`${oc.env:NAME}`, also within
`${oc.decode:...}`), of those whose name says so (WANDB_API_KEY, HF_TOKEN, DB_PASSWORD), also in hydra.job.env_set, and
the passwords in URLs. `redact` replaces them by `${oc.env:NAME}`, also where they are quoted, escaped or URL-encoded.
Variables that are set later count from then on. A password or token in any other URL, as in one that was typed, is
replaced by `***`.

Short and common values stay, because replacing them would damage other texts: numbers, values of fewer than six
characters, what occurs in dlopt itself (the names of choices, keys, metrics), and lower-case words, unless the name of
the variable says that it is a secret. The name says nothing about the path of an existing file or folder. `forget`
keeps names of the user, such as those of classes.
"""

import contextlib
import functools
import html
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote, quote_plus, unquote, urlsplit

_NAME = re.compile(
    r"(?i)(^|_)(api_?key|key|token|pat|secrets?|passwords?|passwd|pass|pwd|passphrase|credentials?|auth)(_|\d*$)|password"
)
_REFERENCE = re.compile(r"\$\{\s*oc\.env\s*:\s*['\"]?(\w+)")
_PUBLIC = ("HOME", "PWD", "OLDPWD", "TMPDIR", "USER", "LOGNAME")  # parts of many paths
_WORD = re.compile(r"[a-z][a-z_]*")
_NAME_OF_DLOPT = re.compile(r"[\w.-]{6,24}")  # may be one
_MIN_LENGTH = 6
_TEXTS = (".py", ".yaml", ".json", ".html", ".css", ".js")
_LONG_WORD = 12  # letters: longer words are no names of dlopt or of a data set

HIDDEN = "***"
_URL = re.compile(  # what comes before a password, or a token without one, or the value of a parameter; the secret
    r"""(\w\\?://[^\s/@:'"]*:)(?!\$\{|\*{3}@)[^\s/@'"]+(?=@)|(\w\\?://)(?!\$\{)[^\s/@:'"?#]{20,}(?=@)"""
    r"""|([?&](?:[\w-]*[_-])?(?:token|api-?key|key|passw(?:or)?d|pwd|secret|signature|sig|credential|auth)\\?=)"""
    r"""(?!\$\{|\*{3})[^&\s'"#]+""",
    re.IGNORECASE,
)

_seen: Mapping[Any, Any] = {}  # the environment whose secrets are registered
_replacements: dict[str, str] = {}  # secret, in each of its forms -> stored text
_pattern: re.Pattern[str] | None = None


def is_secret_name(name: str) -> bool:
    """Returns whether the name of an environment variable marks its value as a secret."""
    return name not in _PUBLIC and _NAME.search(name) is not None


def references(text: str) -> list[str]:
    """Returns the environment variables to which the interpolations of a text refer."""
    return _REFERENCE.findall(text)


def reference(name: str) -> str:
    """Returns the interpolation of an environment variable."""
    return f"${{oc.env:{name}}}"


def note(value: str, replacement: str, *, is_named: bool = False) -> None:
    """Makes `redact` replace a secret. `is_named`: the name of the variable marks it as a secret."""
    forms = {form for each in _parts(value) if not _is_common(each, is_named) for form in _forms(each)}
    new = {form: replacement for form in forms if form not in _replacements and form not in replacement}
    if new:
        _replacements.update(new)
        _compile()


def forget(texts: Iterable[str]) -> None:
    """Makes `redact` keep texts that are no secrets, although they equal a secret or a part of one."""
    _note_changes()
    kept = "\n".join(texts)
    known = [form for form in _replacements if form in kept]
    for form in known:
        del _replacements[form]
    if known:
        _compile()


def _compile() -> None:
    global _pattern
    longest_first = sorted(_replacements, key=len, reverse=True)
    _pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def note_environment(names: Iterable[str] = (), variables: Mapping[str, str] = os.environ) -> None:
    """Registers the variables `names` as secrets, and all variables with a secret's name or a secret in a URL."""
    names = set(names)
    for name, value in variables.items():
        is_path = os.path.isabs(value) and os.path.exists(value)  # SSH_AUTH_SOCK, HF_TOKEN_PATH
        if (name in names and name not in _PUBLIC) or (is_secret_name(name) and not is_path):
            note(value, reference(name), is_named=is_secret_name(name))
        if password := _password(value):
            note(password, reference(name), is_named=True)


def _note_changes() -> None:
    """Notes the variables that were set since the last call: by your code, or python-dotenv."""
    global _seen
    now = getattr(os.environ, "_data", None) or dict(os.environ)  # the bytes: ten times faster to compare than a copy
    if now != _seen:
        changed = [key for key in now if now[key] != _seen.get(key)]
        _seen = dict(now)
        names = [os.fsdecode(key) for key in changed]
        note_environment(variables={name: os.environ[name] for name in names if name in os.environ})


def redact(text: str) -> str:
    """Returns the text with the interpolations of secrets in place of the secrets."""
    _note_changes()
    return _redact(text)


def _redact(text: str) -> str:
    text = text if _pattern is None else _pattern.sub(lambda match: _replacements[match[0]], text)
    return _URL.sub(lambda match: f"{match[1] or match[2] or match[3]}{HIDDEN}", text) if "//" in text else text


def has_hidden(text: str) -> bool:
    """Returns whether a secret in a URL was replaced in this text."""
    return "//" in text and HIDDEN in text


def redact_bytes(data: bytes) -> bytes:
    """Redacts a text of unknown encoding, such as a diff."""
    return redact(data.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")


def redacted(value: Any) -> Any:
    """Redacts the texts in nested mappings and lists. Writers call it before they quote and wrap texts."""
    _note_changes()
    return _redacted(value)


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return _redact(value)
    if isinstance(value, Mapping):
        return {_redacted(key): _redacted(item) for key, item in value.items()}
    return [_redacted(item) for item in value] if isinstance(value, list | tuple) else value


class RedactedStream:
    """A text stream that redacts its input; for stored output."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _is_common(value: str, is_named: bool) -> bool:
    if len(value) < _MIN_LENGTH:
        return True
    with contextlib.suppress(ValueError):
        float(value)
        return True
    if _NAME_OF_DLOPT.fullmatch(value) and value in _own_text():
        return True
    if is_named:
        return False
    is_long_word = len(value) >= _LONG_WORD and "_" not in value
    return not any(map(str.isalpha, value)) or (_WORD.fullmatch(value) is not None and not is_long_word)


@functools.cache
def _own_text() -> str:
    """Returns the code and the configs of dlopt, with their file names, which are the names of choices."""
    package = Path(__file__).parents[1]
    folders = [package, *([] if (package / "conf").is_dir() else [package.parent / "conf"])]  # next to it in a checkout
    paths = [path for folder in folders for path in folder.rglob("*.*") if path.suffix in _TEXTS]
    return "\n".join([*map(str, (path.name for path in paths)), *(path.read_text("utf-8") for path in paths)])


def _parts(value: str) -> set[str]:
    """Returns the texts that give a secret away: its lines, without the slash that paths lose, and its password."""
    lines = [line.strip() for line in value.splitlines()]
    parts = {value, value.strip(), " ".join(value.split()), value.rstrip("/"), *lines}
    if password := _password(value):
        parts |= {password, unquote(password)}
    return parts


def _password(value: str) -> str | None:
    """Returns the password in a URL; None if there is none."""
    with contextlib.suppress(ValueError):
        return urlsplit(value).password if "://" in value else None
    return None


def _forms(value: str) -> set[str]:
    """Returns a text as messages, JSON, YAML, CSV, HTML, URLs and shells write it."""
    quoted = {value, repr(value)[1:-1], repr(repr(value)[1:-1])[1:-1], ascii(value)[1:-1]}
    escaped = {json.dumps(each, ensure_ascii=is_ascii)[1:-1] for each in quoted for is_ascii in (True, False)}
    urls = {quote(value, safe=""), quote(value), quote_plus(value)}
    urls |= {re.sub("%..", lambda code: code[0].lower(), url) for url in urls}
    pages = {html.escape(value), html.escape(value, quote=False)}
    single, double = value.replace("\\", "\\\\").replace("'", "\\'"), value.replace('"', '""')
    shells = {value.replace("'", "'\"'\"'"), value.replace("'", "''"), single, double}
    return {*quoted, *escaped, *urls, *pages, *shells, *(json.dumps(each)[1:-1] for each in escaped)}


_note_changes()
