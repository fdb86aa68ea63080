"""Figures to a service of experiments, from a thread of its own: training waits for no network and dies of none."""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

_PATIENCE = 30.0  # seconds that the end of a run waits for what is still to be delivered

Point = tuple[int, float, Mapping[str, float]]
"""Update, time (seconds since 1970), values by tag."""


class Service(Protocol):
    """What one service does; each call may take its time, and may raise."""

    def begin(self, hparams: Mapping[str, str | bool | float]) -> None: ...
    def send(self, points: list[Point]) -> None: ...
    def end(self, status: str) -> None:
        """`status` as in summary.json."""
        ...


class Remote:
    """Hands everything to `service` in order. The first failure is told once, through `complain` and in the thread that
    trains, and ends it; nothing here raises."""

    def __init__(self, name: str, service: Service, complain: Callable[[str], None], *, patience: float = _PATIENCE):
        self._name, self._service, self._complain, self._patience = name, service, complain, patience
        self._waiting: queue.SimpleQueue[Point | str | Mapping[str, str | bool | float]] = queue.SimpleQueue()
        self._failure: str | None = None
        self._is_told = False
        self._status: str | None = None  # how the run ended
        self._thread = threading.Thread(target=self._work, name=f"dlopt-{name}", daemon=True)

    def config(self, config: Mapping[str, object], hparams: Mapping[str, str | bool | float]) -> None:
        self._waiting.put(dict(hparams))
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._failure is None and self._thread.ident is not None:
            self._waiting.put((step, time.time(), dict(values)))
        self._tell()

    def flush(self) -> None:
        self._tell()

    def end(self, status: str) -> None:
        self._status = status

    def close(self) -> None:
        """Waits for the deliveries. A run that is closed without an end has failed."""
        if self._thread.is_alive():
            self._waiting.put(self._status or "failed")
            self._thread.join(self._patience)
            if self._thread.is_alive() and self._failure is None:
                self._failure = f"it did not take all figures within {self._patience:.0f} s"
        self._tell()

    def _tell(self) -> None:
        if self._failure is not None and not self._is_told:
            self._is_told = True
            self._complain(f"tracking={self._name}: {self._failure}; training goes on without it")

    def _work(self) -> None:
        try:
            while True:
                taken = [self._waiting.get()]
                while not self._waiting.empty():
                    taken.append(self._waiting.get())
                points = [each for each in taken if isinstance(each, tuple)]
                for each in taken:
                    if isinstance(each, dict):
                        self._service.begin(each)
                if points:
                    self._service.send(points)
                for each in taken:
                    if isinstance(each, str):
                        self._service.end(each)
                        return
        except BaseException as error:  # a library that calls sys.exit takes nothing with it either
            self._failure = " ".join(f"{type(error).__name__}: {error}".split())[:300]
