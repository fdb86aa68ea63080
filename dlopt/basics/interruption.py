"""Graceful stop: signals and the time limit end a run after the current update, never within it.

Before a run has started, signals end the command with one line (`end_on_signals`). A closed terminal or a lost
connection (SIGHUP) stops a run like SIGTERM, unless `nohup` has made the process ignore it.
"""

import contextlib
import ctypes
import os
import select
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, NoReturn, TextIO, cast

from dlopt.basics.errors import INTERRUPTED

_PR_SET_PDEATHSIG = 1  # sys/prctl.h
_MAX_ERROR = 2000  # characters
GRACE = 300.0  # seconds for an update and a checkpoint after a stop signal; whoever has sent it then kills the process
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Interruption:
    """Stop flag: true after one of `SIGNALS` or `max_time` minutes. A second SIGINT raises KeyboardInterrupt.

    A context manager that restores the previous handlers. Outside the main thread it does not catch signals.

    Args:
        raises: until `defer` is called, a signal also raises `Interrupted`: for the set-up of a run, which may take
            minutes and has nothing to save.
    """

    def __init__(self, max_time: float | None = None, *, raises: bool = False) -> None:
        self.reason: str | None = None
        self._raises = raises
        self._received: int | None = None
        self._deadline = float("inf") if max_time is None else time.monotonic() + 60 * max_time
        self._max_time = max_time

    def __bool__(self) -> bool:
        if self.reason is None and time.monotonic() >= self._deadline:
            self.reason = f"max_time={self._max_time:g} minutes"
        return self.reason is not None

    def __enter__(self) -> "Interruption":
        self._previous = {}
        with contextlib.suppress(ValueError):  # not the main thread
            for number in _handled():
                self._previous[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """Makes signals wait from now on, until the flag is read."""
        self._raises = False

    def raise_if_received(self) -> None:
        """Raises `Interrupted` if a signal has come that could not: in an import, or in a callback of C code."""
        if self._raises and self._received is not None:
            raise Interrupted(self._received)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        leave_closed_terminal()
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        self.reason, self._received = signal.Signals(number).name, number
        if not _is_importing(frame):
            self.raise_if_received()


class Interrupted(KeyboardInterrupt):
    """A signal that ends a command before the command has set up its own `Interruption`."""

    def __init__(self, number: int) -> None:
        super().__init__(_message(number))
        self.code = _exit_code(number)


_has_files = False
_advice = ""
_at_end: Callable[[int, KeyboardInterrupt], None] | None = None


def note_files(advice: str = "") -> None:
    """Notes that the command has begun to write files: Ctrl-C then exits with 75 instead of 130.

    The message of a signal ends with `advice`.
    """
    global _has_files, _advice
    _has_files, _advice = True, advice


def end_on_signals(at_end: Callable[[int, KeyboardInterrupt], None] | None = None) -> None:
    """Makes signals end this process with one line on stderr; for the start of a command.

    `at_end`: called where the process ends at once, without an exception that could be handled.
    """
    global _has_files, _advice, _at_end
    _has_files, _advice, _at_end = False, "", at_end
    _install(_end)


def end_with(code: int) -> None:
    """Makes signals end this process with `code`; for the end of a command, which has returned `code`."""
    # An exception while the interpreter shuts down would print a traceback.
    _install(lambda *_: _exit(code))


def die_on_signals() -> None:
    """Makes signals kill this process without a message, for ranks: their launcher ends them so, and reports it."""
    _install(signal.SIG_DFL)


@contextlib.contextmanager
def killed_by_signals() -> Iterator[None]:
    """Lets signals kill this process within the context, for blocking calls, where no Python code could handle them."""
    previous = {number: signal.getsignal(number) for number in _handled()}
    _install(signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ignore_hangup() -> None:
    """Ignores SIGHUP in a child process: the terminal sends it to all, and the parent forwards it as SIGTERM."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@contextlib.contextmanager
def block_signals() -> Iterator[None]:
    """Blocks the signals within the context, also in the processes that it starts."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Defers a signal until the end of the block; a second one is not deferred. Does nothing outside the main thread.

    Blocking them would not suffice: another thread receives the signal then, and Python runs the handler in the main
    thread at once.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def restore_handlers() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def catch(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:  # the block takes longer than the user waits
            received.clear()
            restore_handlers()
            signal.raise_signal(number)

    with contextlib.suppress(ValueError):  # not the main thread
        for number in _handled():
            previous[number] = signal.signal(number, catch)
    try:
        yield
    finally:
        restore_handlers()
        for each in received:
            signal.raise_signal(each)


def leave_closed_terminal() -> bool:
    """Redirects stdout and stderr to /dev/null if their reader is gone; returns whether one of them was redirected.

    Writing to a closed terminal or pipe raises an error, which would prevent the checkpoint and change the exit code.
    """
    is_closed = False
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            is_device = stat.S_ISCHR(os.fstat(descriptor).st_mode)
            events = dict(poll.poll(0)).get(descriptor, 0)
            if events & select.POLLERR or (is_device and events & select.POLLHUP):
                _drop(descriptor)
                is_closed = True
    return is_closed


class KeptStream:
    """stdout or stderr that drops output without a reader: a terminal closes some time before its signal arrives.

    Otherwise a `print` of the user's code would end the run with an error, without a checkpoint.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            leave_closed_terminal()
            return self._stream.write(text)  # raises other errors again, such as that of a full disk

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            leave_closed_terminal()
            self._stream.flush()

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def streams_kept() -> Iterator[None]:
    """Within the context, `KeptStream`s replace stdout and stderr. Outside the main thread it does nothing.

    There the main thread may redirect its output at any time, and would put a `KeptStream` back after the context.
    """
    import threading  # every command imports this module

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = sys.stdout, sys.stderr
    kept = [stream and cast(TextIO, KeptStream(stream)) for stream in former]
    sys.stdout, sys.stderr = kept
    try:
        yield
    finally:  # not a stream that other code has put there
        if sys.stdout is kept[0]:
            sys.stdout = former[0]
        if sys.stderr is kept[1]:
            sys.stderr = former[1]


def print_line(text: str) -> None:
    """Prints a line to stderr, if anybody can read it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)
    flush_streams()


def print_message(message: str, prefix: str = "bold red") -> None:
    """Prints an error, a warning or a note to stderr: shortened, without codes that would control a terminal.

    A terminal shows it in lines that break between words, with commands in colour, and "dlopt:" in the style `prefix`.
    """
    from dlopt.basics.emphasis import print_emphasized
    from dlopt.basics.formats import printable, terminal_width, wrap  # most commands print none
    from dlopt.basics.secrets import redact

    message = redact(message)  # first: where stderr is a file, it would not find a secret that is cut or replaced below
    if len(message) > _MAX_ERROR:  # the end of a message says what to do
        message = f"{message[: _MAX_ERROR // 2]} [...] {message[-_MAX_ERROR // 2 :]}"
    width = terminal_width(sys.stderr)
    first, *others = message.split("\n")
    lines = wrap(printable(first), width, first="dlopt: ")
    for line in map(printable, others):
        text = line.lstrip(" ")
        margin = " " * (len(line) - len(text))
        lines += wrap(text, width, first=margin, indent=f"{margin}  ")
    with contextlib.suppress(OSError):
        print_emphasized("\n".join(lines), sys.stderr, prefix)
    flush_streams()


def print_note(message: str) -> None:
    """Prints what is no error, as `print_message` does."""
    print_message(message, "bold")


def flush_streams() -> None:
    """Flushes stdout and stderr; drops output without a reader, for which the interpreter would exit with code 120."""
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            _drop(descriptor)
        except ValueError:  # closed
            pass


def _drop(descriptor: int) -> None:
    """Redirects a descriptor to /dev/null."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, descriptor)
    os.close(devnull)


def _handled() -> list[signal.Signals]:
    """Returns the signals to handle: without SIGHUP where it is ignored, by `nohup` or `ignore_hangup`."""
    return [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


def _install(handler: "signal._HANDLER") -> None:
    with contextlib.suppress(ValueError):  # not the main thread
        for number in _handled():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """Raises `Interrupted`, so that the command cleans up; within an import, ends the process."""
    leave_closed_terminal()
    if _is_importing(frame):
        _end_now(number, frame)
    _install(_end_now)  # a second Ctrl-C does not wait for the clean-up
    raise Interrupted(number)


def _is_importing(frame: FrameType | None) -> bool:
    """Returns whether `frame` runs in an import, where modules catch or replace any exception (RecursionError)."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _end_now(number: int, frame: FrameType | None) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, f"dlopt: {_message(number)}\n".encode())
    with contextlib.suppress(Exception):  # the signal may have come while it was being printed
        if _at_end is not None:
            _at_end(_exit_code(number), KeyboardInterrupt(_message(number)))
    _exit(_exit_code(number))


def _exit(code: int) -> NoReturn:
    with contextlib.suppress(Exception):  # the signal may have come while stdout was being written
        sys.stdout.flush()
    os._exit(code)


def _message(number: int) -> str:
    return f"interrupted by {signal.Signals(number).name}{_advice}"


def _exit_code(number: int) -> int:
    """Returns 130 for Ctrl-C before the command wrote a file; otherwise 75, which makes schedulers restart it."""
    return 128 + number if number == signal.SIGINT and not _has_files else INTERRUPTED


def end_with_parent() -> None:
    """Makes the kernel kill this process when its parent dies (Linux only)."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
