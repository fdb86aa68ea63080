import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.training.builders.precision import Precision, bf16_slowdown, choose_precision
from dlopt.training.checkpoint import checkpoints
from tests.support.choices import REFUSED_IN_PURE_BF16
from tests.support.line import dlopt, refused
from tests.support.runs import at_update, metrics, result, resume, same, start, terminate
from tests.support.sizes import SMALL

CPU = torch.device("cpu")
CONF = Path(__file__).resolve().parents[3] / "conf"
OPTIMIZERS = sorted(file.stem for file in (CONF / "optimizer").glob("[!_]*.yaml") if file.stem != "custom")


@pytest.mark.parametrize(
    ("name", "weights", "outputs"),
    [
        ("fp32", torch.float32, torch.float32),
        ("tf32", torch.float32, torch.float32),
        ("bf16", torch.float32, torch.bfloat16),
        ("fp64", torch.float64, torch.float64),
        ("bf16_pure", torch.bfloat16, torch.float32),
    ],
)
def test_dtypes(name: str, weights: torch.dtype, outputs: torch.dtype) -> None:
    precision = choose_precision(name, CPU)
    assert precision.dtype == weights
    layer = nn.Linear(3, 2).to(precision.dtype)
    result = precision.autocast(layer)(torch.randn(4, 3, dtype=precision.dtype))
    assert result.dtype == outputs
    result.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == weights
    assert not torch.is_autocast_enabled("cpu")
    assert precision.scaler() is None


@pytest.mark.parametrize("name", ["fp32", "tf32", "fp64"])
def test_fp32_has_no_wrapper(name: str) -> None:
    layer = nn.Linear(3, 2)
    assert Precision(name, CPU).autocast(layer) is layer


@pytest.mark.parametrize("has_it", [True, False])
def test_auto_selects_bf16_if_supported(has_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlopt.training.builders.precision._has_bf16", lambda device: has_it)
    assert choose_precision("auto", CPU).name == ("bf16" if has_it else "fp32")


@pytest.mark.parametrize("limit", ["AVX512_CORE", "avx2"])
def test_a_limit_of_the_instruction_set_is_regarded(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert Precision("bf16", CPU).is_emulated and not Precision("fp32", CPU).is_emulated
    assert choose_precision("auto", CPU).name == "fp32"


class Costly(nn.Module):
    """Takes 12 s of its own clock under autocast, otherwise 1 s, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.clock = [0.0]

    def __deepcopy__(self, memo: Any) -> "Costly":
        copied = Costly.__new__(Costly)
        nn.Module.__init__(copied)
        copied.layers, copied.clock = copy.deepcopy(self.layers, memo), self.clock
        return copied

    def forward(self, inputs: Tensor) -> Tensor:
        self.clock[0] += 12 if torch.is_autocast_enabled("cpu") else 1
        outputs: Tensor = self.layers(inputs)
        return outputs


def test_slowdown_of_bf16_is_measured_without_side_effects() -> None:
    module, inputs, targets = Costly(), torch.randn(20, 3), torch.randint(4, (20,))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    random = torch.get_rng_state()
    assert bf16_slowdown(module, nn.CrossEntropyLoss(), inputs, targets, lambda: module.clock[0]) == 12
    assert all(tensor.equal(before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.get_rng_state().equal(random)


def test_emulated_bf16_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [*SMALL, "precision=bf16", "epochs=1", "augmentation=crop_flip", "model.dropout=0.3"]
    start(tmp_path / "fast", *keys)
    monkeypatch.setattr("dlopt.training.builders.precision._has_bf16", lambda device: False)
    monkeypatch.setattr("dlopt.training.reporting.bf16_slowdown", lambda *arguments, name: 12.34)
    start(tmp_path / "slow", *keys)
    log = (tmp_path / "slow" / "train.log").read_text()
    assert log.count("takes 12.3 times as long as fp32 (measured); use precision=fp32") == 1
    assert log.index("12.3") < log.index("epoch 1")
    assert metrics(tmp_path / "slow")[0]["train_loss"] == metrics(tmp_path / "fast")[0]["train_loss"]


PURE = [*SMALL, "precision=bf16_pure", "model.norm=batch", "augmentation=crop_flip", "model.dropout=0.3", "epochs=4"]


def test_pure_bf16_keeps_batch_norm_and_the_optimizer_in_fp32(tmp_path: Path) -> None:
    start(tmp_path, *PURE, "optimizer=adamw")
    state = checkpoints.load(tmp_path / "checkpoints/last.pt").state
    norms = {name: value.dtype for name, value in state["model"].items() if value.ndim == 1 and "norm" in name}
    others = {value.dtype for name, value in state["model"].items() if name not in norms and value.ndim}
    assert set(norms.values()) == {torch.float32} and others == {torch.bfloat16}
    [moments] = [values["exp_avg"] for values in state["optimizer"]["state"].values() if values["exp_avg"].ndim == 2][
        :1
    ]
    assert moments.dtype == torch.float32
    assert {value.dtype for value in state["normalize"].values()} == {torch.float32}


def test_pure_bf16_reports_losses_in_fp32(tmp_path: Path) -> None:
    start(tmp_path, *PURE)
    loss = metrics(tmp_path)[-1]["val_loss"]
    assert torch.tensor(loss).bfloat16().item() != pytest.approx(loss, rel=1e-6)


def test_norm_layers_are_not_rounded_to_bf16() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    nn.init.constant_(module[1].weight, 1.001)
    placed = Precision("bf16_pure", CPU).place(module)
    assert placed[1].weight.tolist() == pytest.approx([1.001] * 4, rel=1e-6)  # type: ignore[index, union-attr]


def test_pure_bf16_keeps_shared_weights_shared() -> None:
    module = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    module[1].weight = module[0].weight
    placed = Precision("bf16_pure", CPU).place(module)
    assert placed[0].weight is placed[1].weight and placed[1].weight.dtype == torch.bfloat16  # type: ignore[index]


@pytest.mark.parametrize("typed", [[], ["precision=fp32"]], ids=["bf16_pure", "fp32"])
def test_a_pure_bf16_checkpoint_is_evaluated(tmp_path: Path, typed: list[str]) -> None:
    summary = start(tmp_path / "run", *PURE)
    result = dlopt(tmp_path, "eval", "checkpoint=run/checkpoints/best.pt", "output=out", *typed)
    assert result.code == 0, result.err
    tested = json.loads((tmp_path / "out/eval.json").read_text())
    assert tested["test_loss"] == pytest.approx(summary["test_loss"], rel=0.02 if typed else 1e-6)


VARIED = ("momentum", "muon", "soap", *REFUSED_IN_PURE_BF16)
EACH = [pytest.param(name, marks=() if name in VARIED else pytest.mark.slow) for name in OPTIMIZERS]


@pytest.mark.parametrize("optimizer", EACH)
def test_every_optimizer_trains_and_resumes_in_pure_bf16_or_is_refused(tmp_path: Path, optimizer: str) -> None:
    keys = [*PURE, f"optimizer={optimizer}", "schedule=constant", "epochs=2", "evaluate.test=false"]
    if optimizer in REFUSED_IN_PURE_BF16:
        with pytest.raises(UserError, match=f"precision=bf16_pure.* {REFUSED_IN_PURE_BF16[optimizer]}"):
            start(tmp_path, *keys)
        return
    start(tmp_path / "whole", *keys)
    losses = [line["train_loss"] for line in metrics(tmp_path / "whole")]
    assert losses[-1] < losses[0]
    with at_update(7, terminate):
        start(tmp_path / "resumed", *keys)
    resume(tmp_path / "resumed", *keys)
    assert same(result(tmp_path / "whole"), result(tmp_path / "resumed"))


def test_pure_bf16_refuses_layers_that_torch_does_not_have(tmp_path: Path) -> None:
    keys = [key for key in SMALL if not key.startswith("model.")]
    message = refused(tmp_path, "train", *keys, "precision=bf16_pure", "model=alexnet", "hydra.run.dir=run")
    assert "precision=bf16_pure: torch has no LocalResponseNorm in bf16 on a CPU" in message


def test_slowdown_of_pure_bf16_is_measured_with_bf16_weights() -> None:
    dtypes = set()
    module = nn.Linear(3, 4)
    module.register_forward_pre_hook(lambda layer, inputs: dtypes.add(layer.weight.dtype))
    slowdown = bf16_slowdown(module, nn.CrossEntropyLoss(), torch.randn(8, 3), torch.zeros(8).long(), name="bf16_pure")
    assert slowdown > 0 and dtypes == {torch.bfloat16, torch.float32} and module.weight.dtype == torch.float32


@pytest.mark.gpu
def test_float16_scales_the_loss() -> None:
    precision = choose_precision("fp16", torch.device("cuda"))
    scaler = precision.scaler()
    assert scaler is not None and precision.dtype == torch.float32
    layer = nn.Linear(3, 2, device="cuda")
    assert precision.autocast(layer)(torch.randn(4, 3, device="cuda")).dtype == torch.float16


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "allowed"), [("tf32", True), ("fp32", False), ("bf16", False)])
def test_tf32_is_enabled_by_its_precision_only(name: str, allowed: bool) -> None:
    choose_precision(name, torch.device("cuda"))
    assert torch.backends.cuda.matmul.allow_tf32 is allowed
    assert torch.backends.cudnn.allow_tf32 is allowed
