"""Distillation: the loss, its gradient and the teacher of a run, against closed forms in float64."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.losses import Distillation
from dlopt.python import api
from dlopt.trained.distillation import with_teacher
from dlopt.trained.restore import restore
from dlopt.training.builders.batches import training_batches
from dlopt.training.builders.trainer import probe_trainer
from dlopt.training.builders.workload import build_workload
from dlopt.training.checkpoint import checkpoints
from tests.support.equality import compare
from tests.support.line import dlopt, refused
from tests.support.modes import SYNC_DDP, SYNC_FSDP
from tests.support.runs import assert_same_run, at_update, execute, resume, run_config, start, terminate
from tests.support.sizes import SMALL

CLASSES = 5
STUDENT = [*SMALL, "model.norm=none", "model.widths=[6]", "epochs=3", "schedule=constant"]


def distillation(temperature: float = 3.0, weight: float = 0.7) -> Distillation:
    keys: dict[str, Any] = {"teacher": "unused", "teacher_sha256": None, "classes": CLASSES}
    return Distillation(temperature=temperature, weight=weight, **keys)


def drawn(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    outputs, teacher = (torch.randn(*shape, CLASSES, generator=draws, dtype=torch.float64) for _ in range(2))
    return outputs, teacher, torch.randint(CLASSES, shape, generator=draws)


def closed_form(outputs: Tensor, targets: Tensor, teacher: Tensor, temperature: float, weight: float) -> Tensor:
    """The formula in the paper's terms: exponentials and sums."""
    own, soft = ((each / temperature).exp() for each in (outputs, teacher))
    p, q = (each / each.sum(-1, keepdim=True) for each in (own, soft))
    divergence = (q * (q / p).log()).sum(-1).mean()
    plain = outputs.exp() / outputs.exp().sum(-1, keepdim=True)
    entropy = -plain.gather(-1, targets.unsqueeze(-1)).log().mean()
    return (1 - weight) * entropy + weight * temperature**2 * divergence


@pytest.mark.parametrize("shape", [(7,), (3, 4)])
@pytest.mark.parametrize("temperature, weight", [(1.0, 0.5), (4.0, 0.9), (3.0, 0.0), (2.0, 1.0)])
def test_equals_the_closed_form(shape: tuple[int, ...], temperature: float, weight: float) -> None:
    outputs, teacher, targets = drawn(*shape)
    outputs.requires_grad_()
    loss = distillation(temperature, weight)
    value, expected = loss(outputs, targets, teacher), closed_form(outputs, targets, teacher, temperature, weight)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(each, outputs)[0] for each in (value, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert loss.state_dict() == {}


def test_evaluation_is_the_plain_cross_entropy() -> None:
    outputs, _, targets = drawn(7)
    loss = distillation().eval()
    torch.testing.assert_close(loss(outputs, targets), torch.nn.functional.cross_entropy(outputs, targets))
    with pytest.raises(UserError, match="the outputs of the teacher are known in training only"):
        loss.train()(outputs, targets)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with dropout and batch norm, whose normalization is that of other samples."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    lines = ["data.subset=400", "model=mlp", "model.widths=[24]", "model.dropout=0.3", "epochs=2", "tracking=[]"]
    assert execute(folder, *lines, "threads=1", "device=cpu") == 0
    return folder


def distilled(teacher: Path, *more: str) -> list[str]:
    return [*STUDENT, "loss=distillation", f"loss.teacher={teacher}", *more]


def test_the_first_update_has_the_gradient_of_the_formula(teacher: Path, tmp_path: Path) -> None:
    """In fp64, with the same augmented samples, which the teacher normalizes in its own way, in two micro-batches."""
    line = distilled(teacher, "precision=fp64", "augmentation=crop_flip", "accumulate=2", "loss.temperature=2")
    trainer = probe_trainer(with_teacher(build_workload(run_config(*line))), tmp_path)
    batch = next(iter(trainer.batches.epoch(0)))
    trainer.step.begin(batch, 0, log_norm=False)
    value = trainer.step.loss_and_gradients().loss
    raw = build_workload(run_config(*line, "normalize=none"))
    images, _ = next(iter(training_batches(raw).epoch(0)))
    trained = restore(teacher / "checkpoints/best.pt", {"precision": "fp64"})
    assert not trained.module.training
    soft = trained.outputs(images).clone()
    assert batch.teacher_inputs is not None and not torch.equal(batch.teacher_inputs, batch.inputs)
    outputs = trainer.module(batch.inputs)
    expected = closed_form(outputs, batch.targets, soft, 2.0, 0.9)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)
    parameters = list(trainer.module.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


def test_a_run(teacher: Path, tmp_path: Path) -> None:
    before = (teacher / "checkpoints/best.pt").read_bytes()
    line = distilled(teacher, "optimizer.weight_decay=0.1")
    result = dlopt(tmp_path, "train", *line, "hydra.run.dir=run")
    assert result.code == 0 and f"teacher: {teacher}/checkpoints/best.pt, epoch " in result.out, result.err
    assert (teacher / "checkpoints/best.pt").read_bytes() == before
    state = checkpoints.load(tmp_path / "run/checkpoints/best.pt").state
    sizes = sum(value.numel() for value in state["model"].values())
    assert sizes == 64 * 6 + 6 + 6 * 10 + 10 and state["ema"] is None  # the student only
    recorded = (teacher / "checkpoints/best.pt.sha256").read_text().split()[0]
    assert state["config"]["loss"]["teacher_sha256"] == recorded
    # The student is evaluated by the plain loss, without its teacher.
    teacher_away = tmp_path / "away"
    shutil.move(teacher, teacher_away)
    try:
        tested = dlopt(tmp_path, "eval", "checkpoint=run")
        summary = json.loads((tmp_path / "run/summary.json").read_text())
        report = json.loads((tmp_path / "run/eval.json").read_text())
        assert tested.code == 0 and report["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-6)
        assert api.load(tmp_path / "run").classes is not None
    finally:
        shutil.move(teacher_away, teacher)


def test_a_teacher_with_adapters_in_bf16(tmp_path: Path) -> None:
    """Its merged weights are fp32, next to a student in bf16."""
    line = [*STUDENT, "precision=bf16_pure", "optimizer=sgd", "epochs=1"]
    start(tmp_path / "teacher", *line, "adapt=lora")
    path = tmp_path / "teacher/checkpoints/best.pt"
    summary = start(tmp_path / "student", *line, "loss=distillation", f"loss.teacher={path}")
    assert summary["status"] == "finished"


def test_an_interrupted_run_is_the_same(teacher: Path, tmp_path: Path) -> None:
    line = distilled(teacher, "augmentation=crop_flip", "model.dropout=0.2")
    start(tmp_path / "whole", *line)
    with at_update(6, terminate):
        start(tmp_path / "resumed", *line)
    resume(tmp_path / "resumed", *line)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def test_several_evaluations_per_update(teacher: Path, tmp_path: Path) -> None:
    """A line search and Hessian-vector products need the teacher, too."""
    for optimizer in ("lbfgs", "newton_cg"):
        summary = start(tmp_path / optimizer, *distilled(teacher, f"optimizer={optimizer}", "epochs=1"))
        assert summary["status"] == "finished"


def test_equal_over_ranks(teacher: Path, tmp_path: Path) -> None:
    line = distilled(teacher, "precision=fp64", "augmentation=crop_flip", "data.batch_size=35", "accumulate=2")
    compare(tmp_path, 2, {"ddp": (line, SYNC_DDP), "fsdp": (line, SYNC_FSDP)})


def test_another_teacher_is_detected(teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "teacher")
    line = [*STUDENT, "loss=distillation", "loss.teacher=teacher", "hydra.run.dir=run"]
    assert dlopt(tmp_path, "train", *line).code == 0
    # The same teacher in another place is the same run.
    shutil.move(tmp_path / "teacher", tmp_path / "moved")
    moved = [each.replace("=teacher", "=moved") for each in line]
    assert dlopt(tmp_path, "train", *moved, "resume=auto", "epochs=4").code == 0
    for name in ("best.pt", "best.pt.sha256"):
        shutil.copy(tmp_path / "run/checkpoints" / name, tmp_path / "moved/checkpoints" / name)
    message = refused(tmp_path, "train", *moved, "resume=auto", "epochs=5")
    assert "has another config (loss.teacher_sha256: saved " in message
    # A job of a sweep, or a rank, has the config of the sweep.
    saved = json.loads(json.dumps(run_config(*distilled(tmp_path / "moved")).config))
    assert saved["loss"]["teacher_sha256"] is None  # the tests compose without a plan
    with pytest.raises(UserError, match=r"^loss.teacher=.*: its checkpoint has the SHA-256 .*, not 000000000000"):
        with_teacher(build_workload(run_config(*distilled(tmp_path / "moved", f"loss.teacher_sha256='{'0' * 64}'"))))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["loss.teacher=nothing"], "loss.teacher=nothing: no such run folder or checkpoint"),
        (["loss.teacher=."], "loss.teacher=.: this folder contains neither best.pt nor last.pt"),
        (["data=wine"], "loss.teacher={teacher}: has 10 classes, the data 3; use a teacher of the same classes"),
        (["data.image_size=10"], "its inputs have the shape [1, 8, 8], those of this run [1, 10, 10]"),
        (["data=text", "data.file=a.txt", "model=gpt_nano"], "its task is classification, that of this run is next"),
        (["data=diabetes"], "loss=distillation: a teacher's predictions are classes"),
        (["data=digit_pairs", "loss=distillation"], "loss=distillation: a teacher's predictions are classes"),
        (
            ["optimizer=sophia", "optimizer.hessian=gnb"],
            "loss=distillation: labels drawn from the model say nothing about the teacher",
        ),
        (["loss.temperature=0"], "loss.temperature=0: "),
    ],
)
def test_refused(more: list[str], message: str, teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc " * 2000)
    line = [f"loss.teacher={teacher}"] if not more[0].startswith("loss.teacher") else []
    is_other = more[0].startswith("data=")
    base = ["model=mlp", "tracking=[]", "threads=1", "device=cpu"] if is_other else STUDENT
    shown = refused(tmp_path, "train", *base, "loss=distillation", *line, *more)
    assert message.replace("{teacher}", str(teacher)) in shown
    assert not (tmp_path / "outputs").exists()


def test_a_language_model(tmp_path: Path) -> None:
    """Tokens have no normalization; the divergence is a mean over tokens."""
    (tmp_path / "a.txt").write_text("".join(f"line {i} of the text\n" for i in range(60)))
    text = ["data=text", "data.file=a.txt", "data.sequence_length=8", "model=gpt_nano", "model.heads=2", "steps=2"]
    text += ["model.depth=1", "tracking=[]", "threads=1", "device=cpu"]
    assert dlopt(tmp_path, "train", *text, "model.width=16", "hydra.run.dir=teacher").code == 0
    line = [*text, "model.width=8", "loss=distillation", "loss.teacher=teacher"]
    result = dlopt(tmp_path, "train", *line, "hydra.run.dir=student")
    assert result.code == 0 and "bits/byte" in result.out, result.err
    message = refused(tmp_path, "train", *line, "data.sequence_length=4")
    assert "loss.teacher=teacher: its inputs have the shape [8], those of this run [4]" in message
