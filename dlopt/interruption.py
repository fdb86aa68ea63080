"""Signals and the time limit ask a run to end at the next update; they never tear it."""

import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interruption:
    """True once SIGTERM, SIGINT or SIGUSR1 has come, or `max_time` minutes have passed; a second SIGINT ends at once.

    A context manager: the former handlers are back afterwards. Outside the main thread signals are not caught.
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
        self._former = {}
        try:
            for each in SIGNALS:
                self._former[each] = signal.signal(each, self._catch)
        except ValueError:  # not the main thread
            pass
        return self

    def __exit__(self, *exception: object) -> None:
        for each, handler in self._former.items():
            signal.signal(each, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
