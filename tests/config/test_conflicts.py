"""Every conflict of two features is refused with its reason, all of a run at once."""

import pytest
import torch

from dlopt.basics.errors import UserError
from dlopt.config.conflicts import CONFLICTS, Conflict, splits_model
from dlopt.config.schema import Component
from tests.support.runs import run_config

GROWS = "accumulate={micro_batches:[1,2],steps:[4]}"
GROWTH = "accumulate={micro_batches: [1, 2], steps: [4]}"
LESSON = "loss=distillation loss.teacher=x"
PIXELS = "loss=pixel_cross_entropy model=autoencoder"
TASK = "task=tests.support.own_tasks.{} allow_packages=[tests]"
OWN, COUPLED = "task=tests.support.own_tasks.Noisy", "task=tests.support.own_tasks.Coupled"
GRAPHS = "compile=max-autotune"

# What is typed -> the two features of the message, in the order of the table
TYPED = {
    "dry_run=true resume=auto": "dry_run=true with resume=auto",
    "evaluate.every_steps=5 evaluate.every_epochs=2": "evaluate.every_steps=5 with evaluate.every_epochs=2",
    "diagnostics=[gradients] parallel=fsdp": "diagnostics=[gradients] with parallel=fsdp",
    "diagnostics=[curvature] parallel=ddp parallel.processes=2": "diagnostics=[curvature] with parallel=ddp in 2 "
    "processes",
    "diagnostics=[activations] compile=true": "diagnostics=[activations] with compile=true",
    f"{GROWS} data.batch_size=full": f"{GROWTH} with data.batch_size=full",
    f"{GROWS} parallel=pipeline": f"{GROWTH} with parallel=pipeline",
    f"{GROWS} checkpoint.at_restarts=true": f"checkpoint.at_restarts=true with {GROWTH}",
    "accumulate=2 parallel=ddp parallel.static_graph=true": "parallel.static_graph=true with accumulate=2",
    "on_out_of_memory=halve parallel=ddp parallel.processes=3": "on_out_of_memory=halve with parallel=ddp in 3 "
    "processes",
    "activation_checkpointing=blocks compile=true": "activation_checkpointing=blocks with compile=true",
    "activation_checkpointing=all parallel=pipeline": "activation_checkpointing=all with parallel=pipeline",
    "activation_checkpointing=all parallel=fsdp": "activation_checkpointing=all with parallel=fsdp",
    "compile=true parallel=filter": "compile=true with parallel=filter",
    f"cuda_graphs=true {GRAPHS}": f"cuda_graphs=true with {GRAPHS}",
    f"{GROWS} {GRAPHS}": f"{GROWTH} with {GRAPHS}",
    f"{GRAPHS} parallel=fsdp parallel.processes=2": f"{GRAPHS} with parallel=fsdp in 2 processes",
    "precision=fp16 device=cpu": "precision=fp16 with device=cpu",
    "precision=fp64 device=mps": "precision=fp64 with device=mps",
    "precision=fp16 device=mps parallel=hybrid": "precision=fp16 with parallel=hybrid",
    "precision=bf16_pure parallel=spatial": "precision=bf16_pure with parallel=spatial",
    "ema=0.9 precision=bf16_pure": "ema=0.9 with precision=bf16_pure",
    "precision=bf16_pure optimizer=schedule_free_sgd": "precision=bf16_pure with optimizer=schedule_free_sgd",
    "precision=bf16_pure optimizer=prodigy": "precision=bf16_pure with optimizer=prodigy",
    "stopping=tolerance precision=bf16_pure": "stopping=tolerance with precision=bf16_pure",
    "diagnostics=[curvature] precision=bf16_pure": "diagnostics=[curvature] with precision=bf16_pure",
    "scale_lr=linear optimizer.lr=auto": "scale_lr=linear with optimizer.lr=auto",
    "scale_lr=sqrt optimizer=torch.optim.SGD": "scale_lr=sqrt with optimizer=torch.optim.sgd.SGD",
    "ema=tail optimizer=schedule_free_adamw": "ema=tail with optimizer=schedule_free_adamw",
    "decay.width=inverse": "decay.width=inverse with init=default",
    "init=normal model=torchvision model.pretrained=true": "init=normal with model.pretrained=true",
    "init=mup adapt=lora": "init=mup with adapt=lora",
    "adapt=lora parallel=columns": "adapt=lora with parallel=columns",
    "loss.class_weights=balanced sampler=hard_examples": "loss.class_weights=balanced with sampler=hard_examples",
    "loss=binary_cross_entropy loss.pos_weight=balanced sampler=hard_examples": "loss.pos_weight=balanced with "
    "sampler=hard_examples",
    "on_divergence=skip sampler=hard_examples": "on_divergence=skip with sampler=hard_examples",
    "sampler=hard_examples parallel=pipeline": "sampler=hard_examples with parallel=pipeline",
    f"sampler=hard_examples {LESSON}": "sampler=hard_examples with loss=distillation",
    "loss=pixel_cross_entropy model=mlp": "loss=pixel_cross_entropy with model=mlp",
    f"model.output=sigmoid {PIXELS}": "model.output=sigmoid with loss=pixel_cross_entropy",
    f"parallel=columns {LESSON}": "loss=distillation with parallel=columns",
    f"diagnostics=[activations,gradients] {LESSON}": "diagnostics=[activations,gradients] with loss=distillation",
    "data=drawn": "data=drawn with task=auto",
    f"parallel=filter {TASK.format('Noisy')}": f"{OWN} with parallel=filter",
    f"norm_statistics=exact {TASK.format('Noisy')}": f"norm_statistics=exact with {OWN}",
    f"evaluate.metrics=[tests.support.user_parts.squared_error] {TASK.format('Noisy')}": "evaluate.metrics="
    f"[tests.support.user_parts.squared_error] with {OWN}",
    f"sampler=hard_examples {TASK.format('Noisy')}": f"sampler=hard_examples with {OWN}",
    f"accumulate=2 {TASK.format('Coupled')}": f"accumulate=2 with {COUPLED}",
    f"on_out_of_memory=halve {TASK.format('Coupled')}": f"on_out_of_memory=halve with {COUPLED}",
    f"parallel=ddp {TASK.format('Coupled')}": f"{COUPLED} with parallel=ddp",
}  # fmt: skip


@pytest.mark.parametrize(("row", "words"), [*zip(CONFLICTS, TYPED, strict=True)], ids=lambda value: str(value)[:60])
def test_every_conflict_is_refused(row: Conflict, words: str) -> None:
    with pytest.raises(UserError) as error:
        run_config(*words.split())
    assert str(error.value) == f"{TYPED[words]}: {row.why}; use {row.use}"


def test_all_conflicts_of_a_run_are_in_one_message() -> None:
    with pytest.raises(UserError) as error:
        run_config("ema=0.9", "optimizer=schedule_free_sgd", "parallel=filter", "adapt=lora", "sampler=hard_examples")
    title, *lines = str(error.value).split("\n")
    assert title == f"{len(lines)} conflicts of settings:"
    ends = ["adapt=lora with parallel=filter", "sampler=hard_examples with parallel=filter"]
    assert [line.strip().split(": ")[0] for line in lines] == ["ema=0.9 with optimizer=schedule_free_sgd", *ends]


def test_device_auto_without_an_accelerator_is_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^precision=tf32 with device=auto \(no accelerator\): not supported on a CPU"):
        run_config("precision=tf32")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert run_config("precision=tf32").settings.precision == "tf32"


def test_a_launcher_tells_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^on_out_of_memory=halve with parallel=ddp in 4 processes: "):
        run_config("on_out_of_memory=halve", "parallel=ddp")
    assert run_config("on_out_of_memory=halve").settings.on_out_of_memory == "halve"


def test_the_learning_rate_of_sam_is_that_of_its_base() -> None:
    assert run_config("optimizer=sam", "scale_lr=linear").settings.scale_lr == "linear"


def test_names_of_features_tell_the_conflicts_apart() -> None:
    names = [(row.one.name, row.other.name) for row in CONFLICTS]
    assert len({*names}) == len(names)


def test_a_mode_of_another_package_splits_the_model_unless_it_has_the_attribute() -> None:
    def mine() -> None: ...

    mode = Component("parallel", mine, {}, "mine")
    assert splits_model(mode)
    mine.splits_model = False  # type: ignore[attr-defined]
    assert not splits_model(mode)
