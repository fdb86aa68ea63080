import os
import signal
import threading
import time

import pytest

from dlopt.interruption import SIGNALS, Interruption


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_sets_the_stop_flag(number: signal.Signals) -> None:
    former = [signal.getsignal(each) for each in SIGNALS]
    with Interruption() as interruption:
        assert not interruption and interruption.reason is None
        send(number)
        assert interruption and interruption.reason == number.name
    assert [signal.getsignal(each) for each in SIGNALS] == former


def test_second_sigint_raises() -> None:
    with Interruption() as interruption:
        send(signal.SIGINT)
        assert interruption
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_repeated_sigterm_is_ignored() -> None:
    with Interruption() as interruption:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            send(number)
        assert interruption


def test_restores_handlers_after_an_error() -> None:
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), Interruption():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is former


def test_max_time_is_in_minutes() -> None:
    with Interruption(max_time=0.05 / 60) as interruption:
        assert not interruption
        time.sleep(0.06)
        assert interruption and interruption.reason is not None and interruption.reason.startswith("max_time=")
    with Interruption(max_time=1.0) as interruption:
        time.sleep(0.06)
        assert not interruption


def test_no_handlers_outside_the_main_thread() -> None:
    flags = []

    def work() -> None:
        with Interruption() as interruption:
            flags.append(bool(interruption))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert flags == [False]
