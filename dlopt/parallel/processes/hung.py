"""Ends a rank that hangs after a stop signal, because another rank neither ends nor responds."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

from dlopt.basics.errors import FAILED
from dlopt.basics.files import is_disk_in_use
from dlopt.basics.interruption import SIGNALS

HUNG_SECONDS = 20.0  # in one call; srun waits another minute for the other ranks, then kills them
_POLL_SECONDS = 0.5


@contextlib.contextmanager
def end_if_hung(end: Callable[[], None] | None = None) -> Iterator[None]:
    """Within the context, ends this process if it hangs for `HUNG_SECONDS` after a stop signal.

    If a rank is stopped (SIGSTOP) or its node fails, the others wait in a collective, where Python's signal handlers do
    not run. So a thread receives the signals, too, and watches the main thread. `end`: called instead of ending the
    process. Does nothing outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Python runs handlers between two bytecodes of the main thread; a hung collective has none. But the interpreter
    # writes the number of a signal into this socket at once.
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reader, end or _end), name="dlopt-hung", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        writer.close()  # ends the thread
        thread.join()
        reader.close()


def _watch(signals: socket.socket, end: Callable[[], None]) -> None:
    while (received := signals.recv(1)) and received[0] not in SIGNALS:
        pass
    signals.settimeout(_POLL_SECONDS)
    position, since = None, time.monotonic()
    while received:
        with contextlib.suppress(TimeoutError):
            received = signals.recv(1)
            continue
        # The position includes the instruction: a long loop moves between instructions, a call that hangs stays at one.
        if (current := _main_position()) is None or current != position:
            position, since = current, time.monotonic()
        elif time.monotonic() - since > HUNG_SECONDS:
            return end()


def _main_position() -> tuple[int, int] | None:
    """Returns an identifier of the main thread's current call; None while it reads or writes files."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return None if frame is None or is_disk_in_use() else (id(frame), frame.f_lasti)


def _end() -> None:
    message = f"hangs {HUNG_SECONDS:g} s after a stop signal: another rank does not respond; continue with resume=auto"
    with contextlib.suppress(OSError):
        os.write(2, f"dlopt: {message}\n".encode())
    os._exit(FAILED)
