import contextlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dlopt.basics.errors import UserError
from dlopt.config.schema import Component
from dlopt.data.samples import Dataset, InMemory
from dlopt.losses import CrossEntropy
from dlopt.machine.device import choose_device
from dlopt.parallel.mode import Mode
from dlopt.python.api import load
from dlopt.training.builders import dataset as build_module
from dlopt.training.builders import model_check
from dlopt.training.builders.batches import training_batches
from dlopt.training.builders.optimizer import build_optimizer
from dlopt.training.builders.trainer import probe_trainer
from dlopt.training.builders.workload import build_workload
from dlopt.training.checkpoint.content import Checkpoint
from dlopt.training.stopping import Stopping
from tests.support import own_optimizers
from tests.support.runs import run_config, same, small_workload, start
from tests.support.sizes import SMALL, without
from tests.support.user_parts import FlattenNet, ViewNet

# -- the machine


def test_device_auto_prefers_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    for found, expected in (("cuda", "cuda"), ("mps", "mps"), ("xpu", "cpu"), (None, "cpu")):
        device = None if found is None else torch.device(found)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda found=found: found is not None)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda device=device: device)
        assert choose_device("auto") == torch.device(expected)


@pytest.mark.parametrize(("memory", "module"), [("auto", "splits"), ("false", "batches")])
def test_ranks_of_a_machine_share_its_cores(memory: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shared_by: list[int] = []

    def worker_count(workers: object, samples: object, processes: int = 1) -> int:
        shared_by.append(processes)
        return 0

    monkeypatch.setattr(f"dlopt.data.{module}.worker_count", worker_count)
    mode = Mode(torch.device("cpu"))
    mode.ranks.local_processes = 4
    training_batches(build_workload(run_config(*SMALL, f"data.memory={memory}"), parallel=mode))
    assert set(shared_by) == {4}


# -- model and weights


def test_initial_weights_depend_on_init_seed_only() -> None:
    first = dict(small_workload("seed=1", "init_seed=7").module.state_dict())
    torch.rand(5)  # whatever was drawn before
    assert same(first, dict(small_workload("seed=2", "init_seed=7").module.state_dict()))
    assert not same(first, dict(small_workload("seed=1").module.state_dict()))


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
def test_initial_weights_do_not_depend_on_precision(precision: str) -> None:
    reference = small_workload("precision=fp32").module
    workload = small_workload(f"precision={precision}")
    dtype = torch.float64 if precision == "fp64" else torch.float32
    for a, b in zip(reference.parameters(), workload.module.parameters(), strict=True):
        assert b.dtype == dtype and torch.equal(a.to(dtype), b)
    inputs, _ = next(training_batches(workload).epoch(0))
    assert inputs.dtype == dtype


class _Spectral(nn.Module):
    """Multiplies the spectrum by complex weights."""

    def __init__(self, *, input_shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.size = math.prod(input_shape)
        self.weight = nn.Parameter(torch.randn(self.size // 2 + 1, dtype=torch.complex64))
        self.head = nn.Linear(self.size, classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(torch.fft.irfft(torch.fft.rfft(inputs.flatten(1)) * self.weight, n=self.size))
        return outputs


@pytest.mark.parametrize("overrides", [["clip=norm"], ["clip=value", "optimizer=adamw", "precision=fp64"]])
def test_complex_weights_stay_complex(overrides: list[str], tmp_path: Path) -> None:
    checked = replace(run_config(*SMALL, "ema=0.9", *overrides), model=Component("model", _Spectral, {}))
    trainer = probe_trainer(build_workload(checked), tmp_path)
    module, average = trainer.module, trainer.average
    before = module.weight.detach().clone()
    assert before.is_complex() and before.imag.any()
    for number, batch in enumerate(trainer.batches.epoch(0)):
        trainer.run_update(batch, number)
    assert (module.weight.imag != before.imag).any()
    assert average is not None
    with average.swapped_in():
        averaged = module.weight.detach().clone()
    assert (averaged.imag != before.imag).any() and (averaged.imag != module.weight.imag).any()


@pytest.mark.parametrize("widths", ["[1000000000]", "[1000000000,10000000000,100000000000]"])
def test_refuses_a_model_that_exceeds_the_memory_before_building_it(widths: str) -> None:
    with pytest.raises(UserError, match=r"^model\.widths=\[1000000000.* (GiB are available|or more)"):
        small_workload(f"model.widths={widths}")


def test_the_memory_check_counts_parameters_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = sum(parameter.numel() for parameter in small_workload().module.parameters())
    for available, fits in ((8 * parameters, True), (8 * parameters - 1, False)):
        monkeypatch.setattr(model_check, "available_memory", lambda available=available: available)
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match=f"{parameters:,} parameters and"):
            small_workload()


@pytest.mark.parametrize("model", ["vit", "resnet20"])
def test_the_memory_check_draws_nothing(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, the first random function imports 1,000 modules."""
    component, runtime = run_config(f"model={model}").model, {"input_shape": (3, 32, 32), "classes": 10}
    drawn: list[str] = []

    class Draws(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            drawn.extend([str(function)] if "normal_" in str(function) or "uniform_" in str(function) else [])
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(model_check, "available_memory", lambda: 0)
    with Draws(), pytest.raises(UserError, match=r"parameters need"):
        model_check.check_memory(component, runtime, has_gradients=False)
    assert drawn == []


class _Outputs(nn.Module):
    """Returns 12 values, with an operation that has no meta implementation if `reads`."""

    def __init__(self, *, input_shape: tuple[int, ...], count: int, reads: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(math.prod(input_shape), count)
        self.reads = reads

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.linear(inputs.flatten(1))
        return outputs + outputs.sum().item() if self.reads else outputs


class _Tied(nn.Module):
    """Uses one matrix twice."""

    def __init__(self, *, input_shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.head = nn.Linear(64, classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(self.second(self.first(inputs.flatten(1))))
        return outputs


class _Lazy(nn.Module):
    def __init__(self, *, input_shape: tuple[int, ...], classes: int, unused: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.LazyLinear(classes)
        self.unused = nn.LazyLinear(1) if unused else None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(self.norm(self.conv(images)).flatten(1))
        return outputs


def test_lazy_layers_get_their_sizes_and_seeded_weights() -> None:
    config = replace(run_config(*SMALL), model=Component("model", _Lazy, {}))
    first, second = build_workload(config).module, build_workload(config).module
    assert first.head.weight.shape == (10, 4 * 36) and first.norm.num_batches_tracked == 0
    assert same(first.state_dict(), second.state_dict())
    on_meta = model_check.model_on_meta(config.model, {"input_shape": (1, 8, 8), "classes": 10})
    assert {name: t.shape for name, t in on_meta.state_dict().items()} == {
        name: t.shape for name, t in first.state_dict().items()
    }


OUTPUTS = r"_Outputs: returns \[batch, 12\] values, but the data has 10 classes; .*num_classes=10$"
SIGNALS = (
    r"fails for inputs of shape \[batch, 1, 8, 8\]: .*; "
    r"items \[8, 8\] are read as grey images \[H, W\]: data\.sequences=true reads \[channels, length\]$"
)
POINTWISE = {"out_channels": 10, "kernel_size": 1}
MODELS: list[tuple[type[nn.Module], dict[str, Any], str | None]] = [
    (_Tied, {}, None),
    *((_Outputs, {"count": count, "reads": reads}, said) for count, said in ((10, None), (12, OUTPUTS))
      for reads in (False, True)),
    (nn.Conv2d, {**POINTWISE, "in_channels": 3}, r"Conv2d: fails for inputs of shape \[batch, 1, 8, 8\]: .*3 channels"),
    (nn.Conv1d, {**POINTWISE, "in_channels": 1}, SIGNALS),
    (nn.LazyConv1d, POINTWISE, SIGNALS),
    (_Lazy, {"unused": True}, r"_Lazy: the size of unused.weight is not known"),
    (nn.LazyConv2d, {"out_channels": 10, "kernel_size": 9},
     r"LazyConv2d: fails for inputs of shape \[batch, 1, 8, 8\]: .*[Kk]ernel size"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "keys", "message"), MODELS)
def test_refuses_a_custom_model_that_cannot_be_trained(
    target: type[nn.Module], keys: dict[str, Any], message: str | None
) -> None:
    with contextlib.nullcontext() if message is None else pytest.raises(UserError, match=message):
        build_workload(replace(run_config(*SMALL), model=Component("model", target, keys)))


def _wrong() -> dict[str, int]:
    return {}


def test_parts_of_a_user_must_be_what_they_are_called() -> None:
    wrong = Component("model", _wrong, {})
    with pytest.raises(UserError, match=r"^model=.*_wrong: returns dict; must return a torch Module$"):
        build_workload(replace(run_config(*SMALL), model=wrong))
    with pytest.raises(UserError, match=r"^loss=.*_wrong: returns dict; must return a torch Module$"):
        build_workload(replace(run_config(*SMALL), loss=replace(wrong, key="loss")))
    with pytest.raises(UserError, match=r"^sampler=.*_wrong: returns dict without order; must return a dlopt Sampler$"):
        training_batches(build_workload(replace(run_config(*SMALL), sampler=replace(wrong, key="sampler"))))
    with pytest.raises(UserError, match=r"^optimizer=.*_wrong: returns dict; must return a torch Optimizer$"):
        build_optimizer(build_workload(replace(run_config(*SMALL), optimizer=replace(wrong, key="optimizer"))))
    rateless = Component("optimizer", own_optimizers.WithoutRate, {})
    with pytest.raises(UserError, match=r"^optimizer=.*: the parameter groups of WithoutRate have no lr"):
        build_optimizer(build_workload(replace(run_config(*SMALL), optimizer=rateless)))


class _Loss(nn.Module):
    def __init__(self, *, result: str) -> None:
        super().__init__()
        self.result = result

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> Any:
        losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
        return {"all": losses, "number": 1.0, "detached": losses.detach().mean(), "mean": losses.mean()}[self.result]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("all", r"returns a tensor of shape \[\d+\]; must return the mean"),
        ("number", "returns float; must return the mean"),
        ("detached", "its result has no gradient"),
    ],
)
def test_a_custom_loss_is_a_mean_with_a_gradient(result: str, message: str, tmp_path: Path) -> None:
    def update(result: str) -> None:
        loss = Component("loss", _Loss, {"result": result})
        trainer = probe_trainer(build_workload(replace(run_config(*SMALL), loss=loss)), tmp_path)
        trainer.run_update(next(trainer.batches.epoch(0)), 0)

    update("mean")
    with pytest.raises(UserError, match=rf"^loss=.*_Loss: {message}"):
        update(result)


def test_number_of_outputs_follows_the_data() -> None:
    inputs = torch.zeros(4, 3)

    def outputs(targets: torch.Tensor, classes: tuple[str, ...] | None) -> int:
        return Dataset(InMemory(inputs, targets), None, None, classes).task.outputs

    assert outputs(torch.zeros(4, dtype=torch.int64), ("a", "b", "c")) == 3
    assert outputs(torch.zeros(4), None) == 1
    assert outputs(torch.zeros(4, 5), None) == 5


@pytest.mark.parametrize("layout", ["auto", "true", "false"])
@pytest.mark.parametrize("model", ["resnet20", "mlp"])
def test_memory_format(layout: str, model: str) -> None:
    lines = without(SMALL, "model")
    workload = build_workload(run_config(*lines, f"model={model}", f"channels_last={layout}"))
    expected = layout == "true" or (layout == "auto" and model == "resnet20")
    assert (workload.memory_format == torch.channels_last) is expected
    inputs, _ = next(training_batches(workload).epoch(0))
    assert inputs.is_contiguous(memory_format=workload.memory_format)


def test_memory_format_of_a_custom_model_is_one_that_it_reads() -> None:
    lines = [*SMALL, "precision=fp64"]
    view = Component("model", ViewNet, {})
    flatten = Component("model", FlattenNet, {})
    for model, expected in ((view, torch.contiguous_format), (flatten, torch.channels_last)):
        workload = build_workload(replace(run_config(*lines), model=model))
        assert workload.memory_format == expected
        inputs, _ = next(training_batches(workload).epoch(0))
        assert workload.model(inputs).shape == (len(inputs), 10)
    with pytest.raises(UserError, match=r"^channels_last=true: model._target_=.*ViewNet fails .*: view size is not"):
        build_workload(replace(run_config(*lines, "channels_last=true"), model=view))


def test_channels_last_changes_nothing_for_a_custom_model_without_convolutions() -> None:
    model = Component("model", _Tied, {})
    workload = build_workload(replace(run_config(*SMALL, "channels_last=true"), model=model))
    inputs, _ = next(training_batches(workload).epoch(0))
    assert workload.model(inputs).shape == (len(inputs), 10)


def test_normalization_is_loaded_from_a_checkpoint() -> None:
    first = small_workload()
    state = {name: value * 2 for name, value in first.normalize.state_dict().items()}
    saved = Checkpoint({"normalize": state, "config": first.run_config.config, "progress": {"data": {}}})
    resumed = build_workload(run_config(*SMALL), saved)
    assert same(dict(resumed.normalize.state_dict()), state)
    assert not same(dict(first.normalize.state_dict()), state)


# -- weights from a file


@pytest.mark.parametrize(("choice", "crops"), [("none", False), ("crop_flip", False), ("inception", True)])
def test_images_stay_in_files_only_for_random_crops(choice: str, crops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    original = build_module.prepare

    def prepare(*arguments: Any, random_crops: bool, **keys: Any) -> Dataset:
        seen.append(random_crops)
        return original(*arguments, random_crops=random_crops, **keys)

    monkeypatch.setattr(build_module, "prepare", prepare)
    small_workload(f"augmentation={choice}")
    assert seen == [crops]


def test_statistics_per_pixel_need_images_of_one_size() -> None:
    lines = ["normalize=standardize", "normalize.per=pixel", "augmentation=inception"]
    small_workload(*lines)
    with pytest.raises(UserError, match=r"^normalize\.per=pixel: fitted to samples of .*8, 8.*, not .*6, 6"):
        small_workload(*lines, "augmentation.operations.0.size=6")


def test_balanced_class_weights_count_the_training_split(tmp_path: Path) -> None:
    """Before and after loading; the validation samples and the noise-free labels do not count."""
    lines = [*SMALL, "loss.class_weights=balanced", "data.label_noise=0.5", "epochs=1"]
    workload = build_workload(run_config(*lines))
    counts = workload.dataset.train.targets.bincount(minlength=10)
    assert isinstance(workload.loss, CrossEntropy) and workload.loss.weight is not None
    assert workload.loss.weight.tolist() == pytest.approx((90 / (10 * counts)).tolist(), rel=1e-6)
    assert len(set(workload.loss.weight.tolist())) > 1
    start(tmp_path, *lines)
    load(tmp_path / "checkpoints" / "best.pt")  # without the data


class Doubled:
    """A sampler of the user, which draws every sample of class 3 twice."""

    def __init__(self, *, targets: Tensor) -> None:
        self._order = torch.cat([torch.arange(len(targets)), (targets == 3).nonzero().flatten()])

    def __len__(self) -> int:
        return len(self._order)

    def order(self, epoch: int) -> Tensor:
        return self._order


OWN = [f"sampler._target_={__name__}.Doubled", f"allow_packages=[{__name__}]"]
BALANCED = {
    "each class once": (["sampler=class_balanced"], lambda counts: torch.ones(10)),
    "a part of the samples": (["sampler=random", "sampler.epoch_size=20"], lambda counts: 90 / (10 * counts)),
    "replacement": (["sampler=with_replacement"], lambda counts: 90 / (10 * counts)),
    "batches": (["sampler=diverse"], lambda counts: 90 / (10 * counts)),
    "own": (OWN, lambda counts: (90 + counts[3]) / (10 * torch.where(torch.arange(10) == 3, 2 * counts, counts))),
}


@pytest.mark.parametrize("name", BALANCED)
def test_balanced_class_weights_count_the_draws(name: str) -> None:
    """A weight times the fraction of the draws that its class has is 1 / K."""
    keys, expected = BALANCED[name]
    workload = small_workload("loss.class_weights=balanced", *keys)
    counts = workload.dataset.train.targets.bincount(minlength=10).double()
    assert isinstance(workload.loss, CrossEntropy) and workload.loss.weight is not None
    torch.testing.assert_close(workload.loss.weight.double(), expected(counts).double(), rtol=1e-6, atol=0)


def test_balanced_class_weights_need_labels() -> None:
    with pytest.raises(UserError, match=r"^loss.class_weights=balanced: needs labels, which a next token task has not"):
        build_workload(run_config("data=python_source", "model=gpt_nano", "loss.class_weights=balanced", "device=cpu"))


class _OwnLoss(nn.CrossEntropyLoss):
    """A loss of the user, with attributes that dlopt's own loss has for a teacher."""

    further, trained, task = 3, True, "classification"


def test_attributes_of_a_users_loss_mean_nothing_to_a_run(tmp_path: Path) -> None:
    checked = replace(run_config(*SMALL), loss=Component("loss", _OwnLoss, {}))
    trainer = probe_trainer(build_workload(checked), tmp_path)
    batch = next(iter(trainer.batches.epoch(0)))
    loss = trainer.run_update(batch, 0).loss
    assert loss is not None and math.isfinite(loss)


class _ThreeArguments(nn.Module):
    def forward(self, outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return outputs.mean()


class _OtherOrder(Doubled):
    def order(self) -> Tensor:  # type: ignore[override]
        return self._order


class _ListOrder(Doubled):
    def order(self, epoch: int) -> Any:
        return self._order.tolist()


class _NoState(Doubled):
    def observe(self, losses: Tensor) -> None: ...


class _OtherUpdate(Stopping):
    def update(self) -> None:  # type: ignore[override]
        pass


def _norm_only() -> Any:
    return lambda parameters: None


@pytest.mark.parametrize(
    ("group", "target", "message"),
    [
        ("loss", _ThreeArguments, "must be callable as forward(outputs, targets)"),
        ("sampler", _OtherOrder, "must be callable as order(epoch)"),
        ("sampler", _ListOrder, "_ListOrder.order must return indices, a tensor of integers"),
        ("sampler", _NoState, "has observe(losses), and must also have maximum, begin(), serve(step, indices)"),
        ("stopping", _OtherUpdate, "must be callable as update(metrics)"),
        ("stopping", object, "object without should_stop, update, state_dict, load_state_dict; must return a dlopt"),
        ("clip", _norm_only, "must be callable as clip(parameters, norm)"),
    ],
)
def test_refuses_parts_of_ones_own_that_cannot_be_called(group: str, target: Any, message: str) -> None:
    config = replace(run_config(*SMALL), **{group: Component(group, target, {})})
    with pytest.raises(UserError) as error:
        next(iter(probe_trainer(build_workload(config), Path()).batches.epoch(0)))
    assert message in str(error.value)
