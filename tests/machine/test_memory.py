"""Tests of the frozen garbage collector."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import suppress

import pytest

from dlopt.machine.memory import frozen_objects


class Node:
    """An object in a reference cycle."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def unfrozen() -> Iterator[None]:
    """Undoes the freeze of the test session for a test."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_collects_new_objects_and_restores_the_old_ones() -> None:
    old = weakref.ref(Node())
    with frozen_objects(collect_first=False) as collect:
        assert gc.isenabled()
        new = weakref.ref(Node())
        collect()
        assert new() is None and old() is not None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert old() is None


def test_collects_first_what_is_garbage() -> None:
    old = weakref.ref(Node())
    with frozen_objects(collect_first=True):
        assert old() is None


def test_restores_after_an_exception() -> None:
    with suppress(RuntimeError), frozen_objects(collect_first=False):
        raise RuntimeError
    assert gc.get_freeze_count() == 0


def test_leaves_the_frozen_objects_of_a_caller() -> None:
    gc.freeze()
    count = gc.get_freeze_count()
    with frozen_objects(collect_first=False) as collect:
        assert gc.get_freeze_count() == count
        collect()
    assert gc.get_freeze_count() == count
