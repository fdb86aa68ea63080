"""Graceful stop: signals and the time limit end a run after the current update, never within it."""

import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interruption:
    """Stop flag: true after SIGTERM, SIGINT, SIGUSR1 or `max_time` minutes. A second SIGINT raises KeyboardInterrupt.

    A context manager that restores the previous handlers. Outside the main thread it does not catch signals.
    """

    def __init__(self, max_time: float | None = None) -> None:
        self.reason: str | None = None
        self._deadline = float("inf") if max_time is None else time.monotonic() + 60 * max_time
        self._max_time = max_time

    def __bool__(self) -> bool:
        if self.reason is None and time.monotonic() >= self._deadline:
            self.reason = f"max_time={self._max_time:g} minutes"
        return self.reason is not None

    def __enter__(self) -> "Interruption":
        self._previous = {}
        try:
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._catch)
        except ValueError:  # not the main thread
            pass
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
