"""Computes the gradients of convolutions' weights with one thread while other processes share the cores.

Within such a gradient, oneDNN's threads wait for each other in generated code, which only spins. If the scheduler runs
another process on one of their cores, the others spin until its time slice ends, in every layer of every update. One
thread waits for nobody. It must add in the same order as the threads, or the weights would differ in their last bits
from those of the same run on a free machine. The threads share either the channels, where each sum is the work of one
thread, or the batch, where each thread adds up its part and the parts are added at the end. Which of the two depends on
the shapes and on the processor: `_parts` finds it by comparison, once for each shape.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dlopt import openmp

_OPERATOR = "aten::convolution_backward"
_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of the input, the weight and the bias
_Original = Callable[..., _Gradients]


def adapt() -> None:
    """Starts or ends the use of one thread, as other processes come and go.

    Must be called between updates: no thread may look an operator up while its kernel is replaced.
    """
    global _kernel
    if (_kernel is not None) == openmp.are_cores_shared():
        return
    if _kernel is not None:
        _kernel.close()
        _kernel = None
    elif libraries := openmp.libgomp():
        _kernel = Kernel(libraries)


class Kernel:
    """PyTorch's CPU kernel for the gradients of a convolution, with one thread for those of the weight and bias.

    Replaces PyTorch's kernel until `close`. The gradients are the same bits as those of all threads.
    """

    def __init__(self, libraries: Sequence[ctypes.CDLL]) -> None:
        self._libraries = libraries
        self._found: dict[Any, int | None] = {}
        self._original = torch.library.get_kernel(_OPERATOR, "CPU")
        self._library = torch.library.Library("aten", "IMPL")
        self._library.impl("convolution_backward", self._backward, "CPU", with_keyset=True)

    def close(self) -> None:
        """Restores PyTorch's kernel."""
        self._library._destroy()

    def _backward(
        self, keys: Any, gradient: Tensor, inputs: Tensor, weight: Tensor, biases: Any, *rest: Any
    ) -> _Gradients:
        """Has the arguments of `torch.ops.aten.convolution_backward`; the last one says which gradients are wanted."""
        *geometry, (of_inputs, of_weight, of_bias) = rest

        def original(gradient: Tensor, inputs: Tensor, *mask: bool) -> _Gradients:
            return self._original.call_boxed(keys, gradient, inputs, weight, biases, *geometry, mask)

        if not of_weight or weight.dtype != torch.float32:
            return original(gradient, inputs, of_inputs, of_weight, of_bias)
        shapes = (_layout(gradient), _layout(inputs), _layout(weight), str(geometry), of_bias, torch.get_num_threads())
        if shapes not in self._found:
            self._found[shapes] = self._parts(original, gradient, inputs, of_bias)
        parts = self._found[shapes]
        if parts is None:
            return original(gradient, inputs, of_inputs, of_weight, of_bias)
        found = original(gradient, inputs, True, False, False)[0] if of_inputs else None
        return found, *self._with_one_thread(original, gradient, inputs, of_bias, parts)

    def _with_one_thread(
        self, original: _Original, gradient: Tensor, inputs: Tensor, of_bias: bool, parts: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns the gradients of weight and bias, as sums over `parts` of the batch."""
        total: list[Tensor | None] = []
        with self._one_thread():
            for chunk in zip(gradient.tensor_split(parts), inputs.tensor_split(parts), strict=True):
                _, *found = original(*chunk, False, True, of_bias)
                total = found if not total else [_sum(a, b) for a, b in zip(total, found, strict=True)]
        weight, bias = total
        return weight, bias

    @contextmanager
    def _one_thread(self) -> Iterator[None]:
        threads = torch.get_num_threads()  # a later run in this process may use another number
        # Not torch.set_num_threads, which has effects of its own (see `processor.set_threads`). Of this thread only.
        for library in self._libraries:
            library.omp_set_num_threads(1)
        try:
            yield
        finally:
            for library in self._libraries:
                library.omp_set_num_threads(threads)

    def _parts(self, original: _Original, gradient: Tensor, inputs: Tensor, of_bias: bool) -> int | None:
        """Returns into how many parts the threads divide the batch (1: they divide the channels); None if neither.

        Compares gradients of random numbers: those of the run may be zeros, of which every sum is the same.
        """
        generator = torch.Generator().manual_seed(0)
        gradient = torch.empty_like(gradient).normal_(generator=generator)
        inputs = torch.empty_like(inputs).normal_(generator=generator)
        _, *expected = original(gradient, inputs, False, True, of_bias)
        threads = torch.get_num_threads()
        for parts in [n for n in range(1, threads + 1) if threads % n == 0 and n <= len(inputs)]:
            found = self._with_one_thread(original, gradient, inputs, of_bias, parts)
            if all(a is None or b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
                return parts
        return None


def _layout(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    return tensor.shape, tensor.stride()


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a.add_(b)


_kernel: Kernel | None = None
