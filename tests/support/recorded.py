"""A CUDA graph's recorder on the CPU: what is recorded are the operations, with the tensors on which they worked.

As with a real one the recording itself leaves no trace, a replay runs no Python of the work, numbers in it stay what
they were, results lie where they lay, and random draws follow the generators' states at the time of the replay.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from dlopt.machine.cuda_graphs import Recorder
from dlopt.training import graphed_update
from dlopt.training.builders import speed, step
from dlopt.training.step import Step

T = TypeVar("T")
Operation = tuple[Any, tuple[Any, ...], dict[str, Any], Any]

WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero", "aten.masked_select")


class _Recording(TorchDispatchMode):
    """Logs every operation, and puts back afterwards what they changed."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Operation] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.own: set[int] = set()  # storages that came to be within

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(func).startswith(WAITING):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for place, argument in enumerate(func._schema.arguments):
            undeclared = "batch_norm" in str(func) and argument.name in ("running_mean", "running_var")
            if undeclared or (argument.alias_info is not None and argument.alias_info.is_write):
                value = kwargs.get(argument.name, args[place] if place < len(args) else None)
                for tensor in tree_iter(value):
                    if isinstance(tensor, Tensor):
                        self._keep(tensor)
        result = func(*args, **kwargs)
        given = {_storage(each) for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and _storage(tensor) not in given:
                self.own.add(_storage(tensor))
        self.log.append((func, args, kwargs, result))
        return result

    def _keep(self, tensor: Tensor) -> None:
        key = _storage(tensor)
        if key not in self.own and key not in self.before:
            whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            self.before[key] = whole, whole.clone()

    def undo(self) -> None:
        for whole, values in self.before.values():
            whole.copy_(values)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class SimulatedRecorder(Recorder):
    """See the module. Counts what was asked of it."""

    def __init__(self) -> None:
        self.warmed = self.recorded = self.replayed = 0

    def warm_up(self, work: Callable[[], T]) -> T:
        self.warmed += 1
        return work()

    def capture(self, work: Callable[[], T], generators: Sequence[torch.Generator]) -> tuple[Callable[[], None], T]:
        self.recorded += 1
        states = [(each, each.get_state()) for each in (torch.default_generator, *generators)]
        recording = _Recording()
        try:
            with recording:
                results = work()
        finally:
            recording.undo()
            for generator, state in states:
                generator.set_state(state)

        def replay() -> None:
            self.replayed += 1
            with torch.no_grad():
                for func, args, kwargs, result in recording.log:
                    again = func(*args, **kwargs)
                    for old, new in zip(tree_iter(result), tree_iter(again), strict=True):
                        if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                            old.detach().copy_(new)

        return replay, tree_map(lambda each: each, results)


@contextmanager
def capturing(recorder: SimulatedRecorder) -> Iterator[None]:
    """Runs capture batches and updates on the CPU wherever they would on a GPU, without the check of each update."""
    gpu = torch.device("cuda")
    obstacle, data_recorder = graphed_update.obstacle, speed.data_recorder

    def obstacle_on_gpu(of: Step, parts: Sequence[object], **kwargs: Any) -> str | None:
        there: Any = copy.copy(of)
        there.mode = SimpleNamespace(device=gpu, ranks=of.mode.ranks)
        there.settings = replace(of.settings, check_now=False)
        return obstacle(there, parts, **kwargs)

    with (
        patch.object(graphed_update, "obstacle", obstacle_on_gpu),
        patch.object(speed, "data_recorder", lambda config, device, parts: data_recorder(config, gpu, parts)),
        patch.object(speed, "Recorder", return_value=recorder),
        patch.object(step, "Recorder", return_value=recorder),
    ):
        yield
