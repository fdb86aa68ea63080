"""Training on a text: metrics, resuming, delivery, evaluation, and refused combinations."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dlopt import losses
from dlopt.basics.errors import UserError
from dlopt.commands.eval import evaluate
from dlopt.commands.export import export
from dlopt.commands.summary import summary as print_summary
from dlopt.python.api import load
from dlopt.training.builders.batches import training_batches
from dlopt.training.builders.workload import build_workload
from tests.support.choices import names
from tests.support.processes import run
from tests.support.requires import requires
from tests.support.runs import metrics, run_config, same, start
from tests.support.sizes import without

TEXT = "\n".join(f"def f{number}(x):\n    return x + {number}" for number in range(300))


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(TEXT)
    return [
        "data=text", f"data.file={path}", "data.sequence_length=16", "data.batch_size=40", "model=gpt_nano",
        "model.width=12", "model.depth=2", "optimizer=adamw", "optimizer.lr=0.01", "threads=1", "device=cpu",
        "tracking=[]", "epochs=2",
    ]  # fmt: skip


def test_a_run_reports_bits_per_byte(lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "environment.json").write_text("{}")
    summary = start(tmp_path / "run", *lines, "epochs=3")
    assert summary["best_val_bits_per_byte"] == pytest.approx(summary["best_val_loss"] / math.log(2))
    assert summary["test_bits_per_byte"] < 6 and 0 < summary["test_token_accuracy"] < 1
    assert "test_accuracy" not in summary and "best_val_accuracy" not in summary
    history = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"val_loss", "val_token_accuracy", "val_bits_per_byte", "train_bits_per_byte"} <= set(history[-1])
    assert "train_token_accuracy" not in history[-1]
    start(tmp_path / "counted", *lines, "epochs=3", "evaluate.train_accuracy=true")
    counted, *_ = [json.loads(line) for line in (tmp_path / "counted" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < counted["train_token_accuracy"] < 1 and counted["train_loss"] == history[0]["train_loss"]
    data = json.loads((tmp_path / "run" / "environment.json").read_text())["data"]
    correct = history[-1]["val_token_accuracy"] * data["validation"]["count"]
    assert data["bytes"] == len(TEXT) and data["validation"]["unit"] == "bytes"
    assert correct == pytest.approx(round(correct), abs=1e-6)
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    (tmp_path / "run" / "config.yaml").write_text("")
    evaluate([f"checkpoint={best}"])
    written = json.loads((tmp_path / "run" / "eval.json").read_text())
    for name in ("test_loss", "test_token_accuracy", "test_bits_per_byte"):
        assert written[name] == pytest.approx(summary[name], rel=1e-6)
    with pytest.raises(UserError, match="cannot be averaged"):
        evaluate([f"checkpoint=[{best},{best}]"])
    with pytest.raises(UserError, match="tta=flip: averages predictions of labels"):
        evaluate([f"checkpoint={best}", "tta=flip"])
    for format, suffix in (("safetensors", ".safetensors"), ("torch_export", ".pt2")):
        assert export([f"checkpoint={best}", f"format={format}"]) == 0
        assert best.parent.parent.joinpath("best").with_suffix(suffix).exists()
    assert capsys.readouterr().out.count("verified: outputs match") == 2
    model = load(best)
    tokens = torch.tensor([list(b"def f1(x):\n    r")])
    assert model(tokens).shape == (1, 16, 256)


def test_losses_in_chunks(lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose outputs are processed in chunks of 39 tokens, in training and in evaluation."""
    lines = [*lines, "precision=fp64", "loss.label_smoothing=0.1"]
    whole = start(tmp_path / "whole", *lines)
    monkeypatch.setattr(losses, "_MAX_CHUNK", 10_000)
    chunks = start(tmp_path / "chunks", *lines)
    assert {"best_val_loss", "test_loss", "test_token_accuracy"} <= set(whole)
    for name in whole.keys() - {"seconds", "peak_memory", "peak_memory_of", "status", "parallel", "resumed_from"}:
        assert chunks[name] == pytest.approx(whole[name], rel=1e-9), name
    for plain, chunked in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "chunks"), strict=True):
        assert chunked["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-9)


@pytest.mark.parametrize("choice", ["sophia", "newton_cg", "muon"])
def test_optimizers_with_second_derivatives_and_with_matrices(choice: str, lines: list[str], tmp_path: Path) -> None:
    """Fused attention kernels have no second derivatives."""
    kept = without(lines, "optimizer")
    summary = start(tmp_path / "run", *kept, f"optimizer={choice}", "steps=2")
    assert summary["status"] == "finished" and math.isfinite(summary["test_loss"])


@pytest.mark.slow
@requires("g++")  # compiles for a CPU
@pytest.mark.parametrize("optimizer", ["adamw", "sophia"])
def test_a_compiled_run_equals_an_eager_one(optimizer: str, lines: list[str], tmp_path: Path) -> None:
    """Also where the optimizer needs second derivatives, which a compiled model has not."""
    typed = [*lines, "model.positions=rotary", f"optimizer={optimizer}", "steps=4", "log_every_steps=1"]
    losses = []
    for compiled in ("false", "true"):
        done = run(start, tmp_path / compiled, *typed, f"compile={compiled}")
        assert done.returncode == 0, done.stderr
        text = (tmp_path / compiled / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["train_loss"] for line in text])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rich", [False, True])
def test_exports_to_onnx(rich: bool, lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    extra = ["model.norm=rms", "model.positions=rotary", "model.activation=swiglu", "model.qk_norm=true"]
    start(tmp_path, *lines, *(extra if rich else []), "steps=2")
    assert export([f"checkpoint={tmp_path / 'checkpoints/best.pt'}", "format=onnx"]) == 0
    assert "input: int64 [batch, 16]\nverified: outputs match" in capsys.readouterr().out


def test_batches_do_not_depend_on_their_delivery(lines: list[str]) -> None:
    def batches(*extra: str) -> list[tuple[torch.Tensor, ...]]:
        loop = training_batches(build_workload(run_config(*lines, *extra)))
        try:
            return [tuple(batch) for batch in loop.epoch(1)]
        finally:
            loop.close()

    reference = batches()
    for extra in ("data.memory=false", "data.memory=false data.workers=2"):
        assert same(reference, batches(*extra.split()))
    text = torch.tensor(list(TEXT.encode()))
    for inputs, targets in reference:
        assert torch.equal(inputs[:, 1:], targets[:, :-1]) and inputs.dtype == torch.int64
        for row in inputs[:3]:
            assert (text.unfold(0, 16, 1) == row).all(1).any()


@pytest.mark.parametrize("model", ["lstm", "rnn"])
def test_recurrent_models_read_text(lines: list[str], tmp_path: Path, model: str) -> None:
    kept = without(lines, "model")
    summary = start(tmp_path, *kept, f"model={model}", "model.hidden=16", "epochs=1")
    assert summary["best_val_loss"] < math.log(256)


@pytest.mark.parametrize(
    ("monitor", "best", "extra"),
    [
        ("val_bits_per_byte", min, ()),
        ("val_token_accuracy", max, ("epochs=4",)),
        ("val_perplexity", min, ("data.tokenizer=bpe", "data.vocabulary=280")),
    ],
)
def test_the_metrics_of_a_text_may_be_monitored(
    lines: list[str], tmp_path: Path, monitor: str, best: Callable[[list[float]], float], extra: tuple[str, ...]
) -> None:
    summary = start(tmp_path, *lines, *extra, f"monitor={monitor}", "stopping=early", f"stopping.monitor={monitor}")
    values = [line[monitor] for line in metrics(tmp_path)]
    assert len(set(values)) == 2 and summary["best_epoch"] == 1 + values.index(best(values))
    assert summary[f"best_{monitor}"] == best(values)
    assert monitor.replace("val_", "test_") in summary


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["model=mlp"], "model=mlp: does not read text; use model=gpt"),
        (["normalize=standardize"], "normalize=standardize: tokens have no mean"),
        (["augmentation=crop_flip"], "augmentation.*use augmentation=none"),
        (["init=lsuv"], "init=lsuv: measures images or features, not text"),
        (["sampler=hard_examples"], "sampler=hard_examples: .*use sampler=random"),
        (["evaluate.tta=flip"], r"evaluate\.tta=flip: averages"),
        (["evaluate.metrics=[macro_f1]"], "a next token task has no such metric"),
        (["loss=mse", "monitor=val_accuracy", "evaluate.metrics=[r2]"], "next token"),
        (["monitor=val_accuracy"], "monitor=val_accuracy: a next token task allows auto, val_loss"),
    ],
)
def test_refusals(lines: list[str], tmp_path: Path, extra: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        start(tmp_path, *(without(lines, "model") if extra == ["model=mlp"] else lines), *extra)
    with pytest.raises(UserError, match="model=gpt: reads text"):
        build_workload(run_config("model=gpt", "device=cpu"))


def test_summary_counts_shared_weights_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_summary(["model=gpt_nano", "input_shape=[16]", "vocabulary=256"]) == 0
    assert "parameters: 97,968\n" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", names("optimizer"))
def test_every_optimizer_trains_or_is_refused(lines: list[str], tmp_path: Path, optimizer: str) -> None:
    # The full Hessian of this model takes minutes.
    small = ["optimizer.max_parameters=100"] if optimizer in ("newton", "newton_undamped") else []
    kept = without(lines, "optimizer")
    try:
        summary = start(tmp_path, *kept, f"optimizer={optimizer}", "data.batch_size=100", "steps=2", *small)
        assert math.isfinite(summary["best_val_loss"])
    except UserError as error:
        assert optimizer in str(error) or str(error).startswith("optimizer"), error
