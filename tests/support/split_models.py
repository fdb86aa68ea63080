"""Compares models split over ranks with the same models on one process, in fp64."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain
from dlopt.parallel.collectives import ModelGroup
from dlopt.parallel.dropout import CurrentShard, convert_dropout
from dlopt.parallel.modes.model_parallel import SplitFunction, all_reduce_buckets
from dlopt.parallel.modes.split_layers import distribute
from dlopt.parallel.processes import rendezvous
from dlopt.parallel.processes.process_group import ProcessGroup
from dlopt.parallel.shards import TensorShards, local

SHAPE, CLASSES = (2, 8, 8), 10


def join_all() -> ModelGroup:
    """Returns the model group of all processes started by `run_ranks`."""
    if not distributed.is_initialized():
        world = rendezvous.current()
        assert world is not None
        ProcessGroup(world, torch.device("cpu"), minutes=1.0)
    return ModelGroup()


def build(*overrides: str, shape: tuple[int, ...] = SHAPE) -> nn.Module:
    """Builds the model of these config overrides."""
    torch.manual_seed(0)
    plain, saved = to_plain(Composer(words=overrides).compose(overrides))
    model: nn.Module = parse(plain, saved).model.build(input_shape=shape, classes=CLASSES)
    return model


def randomized(model: nn.Module) -> nn.Module:
    """Returns the model in fp64, with norms and biases moved away from 0 and 1."""
    torch.manual_seed(1)
    model = model.double()
    convert_dropout(model, CurrentShard())  # as in a single process
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.5)
    return model.to(memory_format=torch.channels_last)


def train_step(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Runs forward and backward; returns outputs and loss."""
    torch.manual_seed(2)
    outputs = model.train()(inputs)
    loss = nn.functional.cross_entropy(outputs, torch.arange(len(inputs)) % outputs.shape[1])
    loss.backward()
    return outputs.detach(), loss.detach()


def assert_equal(
    name: str, full: nn.Module, split: nn.Module, inputs: Tensor, reduce_gradients: Callable[[], None]
) -> None:
    """Compares outputs, gradients and buffers in training, and outputs in evaluation."""

    def check(actual: Any, expected: Any, what: str) -> None:
        torch.testing.assert_close(
            actual, expected, rtol=1e-10, atol=1e-10, msg=lambda message: f"{name}, {what}: {message}"
        )

    expected, actual = train_step(full, inputs), train_step(split, inputs)
    reduce_gradients()
    check(actual, expected, "outputs")
    parameters, buffers = dict(full.named_parameters()), dict(full.named_buffers())
    assert [n for n, _ in split.named_parameters()] == list(parameters)
    for key, parameter in split.named_parameters():
        check(TensorShards().full(parameter.grad), parameters[key].grad, f"gradient of {key}")
        check(TensorShards().full(parameter.detach()), parameters[key].detach(), key)
    for key, buffer in split.named_buffers():
        check(TensorShards().full(buffer), buffers[key], key)
    with torch.no_grad():
        check(split.eval()(inputs), full.eval()(inputs), "outputs of evaluation")


def compare(
    models: Mapping[str, nn.Module], split: SplitFunction, shape: Sequence[int] = SHAPE, samples: int = 6
) -> None:
    """Compares each model with its split copy; called on all ranks."""
    model_group = join_all()
    mesh = init_device_mesh("cpu", (model_group.size,))
    for name, model in models.items():
        full = randomized(model)
        split_model = copy.deepcopy(full)
        plan = split(split_model, tuple(shape), model_group)
        convert_dropout(split_model, CurrentShard(), plan.dropouts)
        distribute(split_model, mesh, plan.shard_specs)
        named = dict(split_model.named_parameters())
        torch.manual_seed(3)
        inputs = torch.randn(samples, *shape).double()
        if len(shape) == 3:
            inputs = inputs.to(memory_format=torch.channels_last)

        def reduce_gradients(
            named: dict[str, nn.Parameter] = named, partial_grads: Sequence[str] = plan.partial_grads
        ) -> None:
            all_reduce_buckets([local(named[key].grad) for key in partial_grads], model_group.process_group)  # type: ignore[arg-type]

        assert_equal(name, full, split_model, inputs, reduce_gradients)


class FirstOf(ModelGroup):
    """Rank 0 of several, without a process group."""

    def __init__(self, size: int) -> None:
        self.process_group, self.rank, self.size = None, 0, size
