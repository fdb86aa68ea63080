"""train.log: what was said to the user, and what libraries log, as plain text with times."""

import contextlib
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"
_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")


class _Plain(logging.Formatter):
    """Without the codes for colours and cursors that some libraries put into their lines."""

    def format(self, record: logging.LogRecord) -> str:
        return _CODES.sub("", super().format(record))


class _File(logging.FileHandler):
    def __init__(self, path: Path, complain: Callable[[str], None]) -> None:
        super().__init__(path, encoding="utf-8", delay=True)
        self.setFormatter(_Plain(_FORMAT))
        self._complain: Callable[[str], None] | None = complain

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # from opening the file, which logging does not catch
            self.handleError(record)

    def close(self) -> None:
        """What a full disk did not take before, it does not take now either."""
        with contextlib.suppress(OSError):
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif self._complain is not None:
            complain, self._complain = self._complain, None
            complain(f"{self.baseFilename}: cannot be written ({error.strerror}); training goes on without it")


class _Terminal(logging.Handler):
    """Stands in for logging's last resort, which a handler on the root logger switches off."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(_Plain())
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        self._show(self.format(record))


class TrainLog:
    """Everything that reaches the root logger goes to `folder`/train.log; warnings are shown to the user too.

    `show` displays a line, `complain` tells once that the file cannot be written.
    """

    def __init__(self, folder: Path, show: Callable[[str], None], complain: Callable[[str], None]) -> None:
        self._file = _File(folder / "train.log", complain)
        # A logger outside the hierarchy: our own lines are already on the screen.
        self._own = logging.Logger("dlopt")
        self._own.addHandler(self._file)
        root = logging.getLogger()
        self._handlers: list[logging.Handler] = [self._file]
        if not root.handlers:
            self._handlers.append(_Terminal(show))
        for handler in self._handlers:
            root.addHandler(handler)

    def write(self, text: str) -> None:
        self._own.info(text)

    def error(self, text: str, error: BaseException) -> None:
        """`text` with the traceback of `error`."""
        self._own.error(text, exc_info=error)

    def close(self) -> None:
        for handler in self._handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()
