"""The work of an update, counted on fake tensors: what would make it slow on a GPU shows without one."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from dlopt.config.run_config import GROUPS
from dlopt.config.schema import ALLOWED_PACKAGES, Component, component
from dlopt.parallel.mode import Mode
from dlopt.schedules import Scheduler
from dlopt.tasks.classification import Classification
from dlopt.tasks.text import NextToken
from dlopt.training.builders.model_check import build_on_meta
from dlopt.training.builders.optimizer import can_fuse
from dlopt.training.builders.precision import Precision
from dlopt.training.graphed_update import obstacle
from dlopt.training.step import StepSettings
from tests.support.choices import CONF, names, values
from tests.support.runs import run_config

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("roofline", BENCH / "roofline.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


roofline = _load()
CARD = roofline.Card()


def test_counts_products_traffic_and_what_is_compiled() -> None:
    """A linear layer 32 -> 1030 in fp32 on 16 samples, compiled, and the sum of its outputs, which is not."""
    regions, samples, inputs, outputs = roofline.Regions(), 16, 32, 1030
    with FakeTensorMode() as mode:
        layer, x = nn.Linear(inputs, outputs, bias=False), torch.empty(samples, inputs)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, fused=True)
    compiled = regions.compile(layer)

    def update() -> None:
        optimizer.zero_grad()
        compiled(x.view(samples, inputs)).sum().backward()  # a view costs nothing
        optimizer.step()

    counted = roofline.Program(mode, regions, update, [optimizer]).count(CARD)
    work = {(name, is_compiled): each for (name, _, is_compiled), each in counted.operations.items()}
    weights, results = 4 * inputs * outputs, 4 * samples * outputs
    product = 2 * samples * inputs * outputs
    # Forward, and the gradient of the weights from one number that is expanded: the inputs have none.
    assert work["mm", True].calls == 2 and work["mm", True].flops == 2 * product
    assert work["mm", True].bytes == 2 * weights + 2 * 4 * samples * inputs + results + 4
    assert work["sum", False].bytes == results + 4
    assert work["_fused_sgd_", False].bytes == 5 * weights  # reads three tensors, writes weights and momentum
    assert counted.parameter_bytes == 6 * weights  # these, and the gradient, which the backward pass writes
    assert counted.unaligned == [(16, 32, 1030), (1030, 16, 32)]
    summary = counted.summary(CARD)
    assert summary["GB fused"] == summary["GB"] and summary["launches outside"] == summary["launches"] - 2
    assert summary["lower ms"] < summary["fused ms"] <= summary["upper ms"]


# Work of the files that the configs follow, counted by
#   python scripts/bench/roofline.py --only gpt2_small --nanogpt FOLDER model.depth=2
#   python scripts/bench/roofline.py --only cifar10_speed --airbench FILE
# at the commits 3adf61e of karpathy/nanoGPT and f1c599c of KellerJordan/cifar10-airbench.
NANOGPT = {"TFLOP": 10.74, "GB": 95.82, "GB fused": 18.55, "fused ms": 11.52}
AIRBENCH = {"TFLOP": 1.422, "GB": 8.260, "GB fused": 2.581, "fused ms": 1.598}


@pytest.mark.parametrize(
    ("name", "changed", "reference"),
    [("gpt2_small", ("model.depth=2",), NANOGPT), ("cifar10_speed", (), AIRBENCH)],
)
def test_does_no_more_work_than_the_program_that_it_follows(
    name: str, changed: tuple[str, ...], reference: dict[str, float]
) -> None:
    overrides, sample = roofline.SUBJECTS[name]
    config = run_config(*overrides, *roofline.RUN, *changed)
    counted = roofline.dlopt_program(config, *sample).count(CARD)
    summary = counted.summary(CARD)
    assert summary["TFLOP"] == pytest.approx(reference["TFLOP"], rel=0.02), "another computation"
    assert counted.unaligned == []
    assert {key for key in reference if summary[key] > 1.3 * reference[key]} == set(), summary


@pytest.mark.slow
@pytest.mark.parametrize("subject", roofline.TIMM)
def test_does_no_more_work_than_the_training_step_of_timm(subject: str) -> None:
    overrides, sample = roofline.SUBJECTS[subject]
    config = run_config(*overrides, *roofline.RUN)
    own = roofline.dlopt_program(config, *sample).count(CARD).summary(CARD)
    timms = roofline.timm_program(config, *sample, subject).count(CARD).summary(CARD)
    assert own["TFLOP"] == pytest.approx(timms["TFLOP"], rel=0.01), "another computation"
    for key in ("GB", "GB fused", "GB of parameters", "launches", "launches outside", "fused ms", "upper ms"):
        assert own[key] <= timms[key], key


TOKENS = (NextToken(50257, predictions=2), (2,))
IMAGES = (Classification(10), (3, 32, 32))
SHAPES = {"polynomial": (1,), "two_column_alexnet_224": (3, 224, 224)}
# Of a very deep network, the shallowest of the same layers.
DEPTHS = {"resnet110": 8}
FOREIGN = {"timm", "torchvision"}  # layers of other packages are not known


def model_of(choice: str, **changed: Any) -> Component:
    return component("model", values("model", choice), GROUPS["model"].runtime, ALLOWED_PACKAGES).partial(**changed)


@pytest.mark.parametrize(("choice", "changed"), [("gpt", {"depth": 1}), ("rnn", {}), ("lstm", {})])
def test_models_have_no_unaligned_product_with_the_vocabulary_of_gpt2(choice: str, changed: dict[str, Any]) -> None:
    config = run_config("data=tokens", "data.root=.", "data.batch_size=2", *roofline.RUN)
    program = roofline.dlopt_program(replace(config, model=model_of(choice, **changed)), *TOKENS)
    assert program.count(CARD).unaligned == []


CUDA = torch.device("cuda")


def obstacle_to_a_graph(module: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    parts = {"schedule": Scheduler(optimizer, lambda step: 1.0), "precision": Precision("bf16", CUDA)}
    settings = StepSettings(check_now=False)
    step: Any = SimpleNamespace(module=module, optimizer=optimizer, mode=Mode(CUDA), settings=settings, **parts)
    return obstacle(step, [])


def test_every_model_fits_a_gpu() -> None:
    """A CUDA graph records its layers, and its large weights are aligned (of those for text: the test above)."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1, fused=True)
    for choice in sorted(set(names("model")) - FOREIGN):
        task, shape = TOKENS if choice.startswith("gpt") else (IMAGES[0], SHAPES.get(choice, IMAGES[1]))
        changed = {"depth": DEPTHS[choice]} if choice in DEPTHS else {}
        arguments = task.model_arguments(shape)
        module = build_on_meta(model_of(choice, **changed), arguments)
        Mode(torch.device("cpu")).place(module, shape)
        assert obstacle_to_a_graph(module, optimizer) is None, choice
        sides = {side for parameter in module.parameters() if parameter.ndim > 1 for side in parameter.shape[:2]}
        assert not [
            side for side in sides if side >= 1024 and side % 8 and side != task.model_arguments(shape)["vocabulary"]
        ], choice


def test_every_optimizer_of_a_recipe_fits_a_graph() -> None:
    """Except those that evaluate the loss of the whole training set several times per update."""
    recipes = "".join(path.read_text() for path in (CONF / "experiment").rglob("*.yaml"))
    chosen = {"sgd", *re.findall(r"override /optimizer: (\w+)", recipes)} - {"custom"}
    obstacles = {}
    for choice in sorted(chosen):
        module = nn.Linear(2, 2)
        parameters = list(module.parameters())
        built = component("optimizer", values("optimizer", choice), ("params",), ALLOWED_PACKAGES)
        optimizer = built.build(params=parameters, **({"fused": True} if can_fuse(built, parameters) else {}))
        obstacles[choice] = obstacle_to_a_graph(module, optimizer)
    assert {choice for choice, reason in obstacles.items() if reason is not None} == {"lbfgs"}
