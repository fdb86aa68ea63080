"""Models split over ranks against the same models whole, in fp64."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from dlopt.config.compose import Composer, to_plain
from dlopt.config.parsing import parse
from dlopt.parallel import rendezvous
from dlopt.parallel.collectives import Ranks
from dlopt.parallel.dropout import Place, make_global
from dlopt.parallel.model_parallel import Split, sum_up
from dlopt.parallel.process_group import Group
from dlopt.parallel.shards import full_state as whole_of
from dlopt.parallel.shards import local
from dlopt.parallel.split_layers import distribute

SHAPE, CLASSES = (2, 8, 8), 10


def joined() -> Ranks:
    """All processes of a test, as they are started by `run_ranks`."""
    if not distributed.is_initialized():
        world = rendezvous.current()
        assert world is not None
        Group(world, torch.device("cpu"), minutes=1.0)
    return Ranks()


def build(*overrides: str, shape: tuple[int, ...] = SHAPE) -> nn.Module:
    """The model of these overrides."""
    torch.manual_seed(0)
    plain, saved = to_plain(Composer().compose(list(overrides)), list(overrides))
    model: nn.Module = parse(plain, saved).model.build(input_shape=shape, classes=CLASSES)
    return model


def unusual(model: nn.Module) -> nn.Module:
    """The model in fp64, its norms and biases at no special values."""
    torch.manual_seed(1)
    model = model.double()
    with torch.no_grad():
        for each in [*model.parameters(), *model.buffers()]:
            if each.ndim == 1 and each.is_floating_point():
                each.add_(torch.rand_like(each) * 0.5)
    return model.to(memory_format=torch.channels_last)


def passed(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and loss of a training step whose gradients are left in the parameters."""
    torch.manual_seed(2)
    outputs = model.train()(inputs)
    loss = nn.functional.cross_entropy(outputs, torch.arange(len(inputs)) % outputs.shape[1])
    loss.backward()
    return outputs.detach(), loss.detach()


def assert_equal(name: str, whole: nn.Module, split: nn.Module, inputs: Tensor, settle: Callable[[], None]) -> None:
    """Both give the same outputs, gradients and statistics in training, and the same outputs in evaluation."""

    def check(found: Any, expected: Any, what: str) -> None:
        torch.testing.assert_close(
            found, expected, rtol=1e-10, atol=1e-10, msg=lambda message: f"{name}, {what}: {message}"
        )

    expected, found = passed(whole, inputs), passed(split, inputs)
    settle()
    check(found, expected, "outputs")
    parameters, buffers = dict(whole.named_parameters()), dict(whole.named_buffers())
    assert [n for n, _ in split.named_parameters()] == list(parameters)
    for each, parameter in split.named_parameters():
        check(whole_of(parameter.grad), parameters[each].grad, f"gradient of {each}")
        check(whole_of(parameter.detach()), parameters[each].detach(), each)
    for each, buffer in split.named_buffers():
        check(whole_of(buffer), buffers[each], each)
    with torch.no_grad():
        check(split.eval()(inputs), whole.eval()(inputs), "outputs of evaluation")


def compare(models: Mapping[str, nn.Module], split: Split, shape: Sequence[int] = SHAPE, samples: int = 6) -> None:
    """In each rank."""
    ranks = joined()
    mesh = init_device_mesh("cpu", (ranks.size,))
    for name, model in models.items():
        whole = unusual(model)
        own = copy.deepcopy(whole)
        plan = split(own, tuple(shape), ranks)
        make_global(own, Place(), plan.dropouts)
        distribute(own, mesh, plan.cuts)
        named = dict(own.named_parameters())
        torch.manual_seed(3)
        inputs = torch.randn(samples, *shape).double()
        if len(shape) == 3:
            inputs = inputs.to(memory_format=torch.channels_last)

        def settle(named: dict[str, nn.Parameter] = named, summands: Sequence[str] = plan.summands) -> None:
            sum_up([local(named[each].grad) for each in summands], ranks.group)  # type: ignore[arg-type]

        assert_equal(name, whole, own, inputs, settle)
