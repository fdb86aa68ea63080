"""Tests of the values chosen for `auto`, and of the refusals of `true`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import PropertyMock, patch

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dlopt.augment import HorizontalFlip, Pipeline, RandomMix
from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain
from dlopt.config.run_config import RunConfig
from dlopt.models.known import treats_samples_alone
from dlopt.parallel.mode import Mode
from dlopt.training.builders import speed
from dlopt.training.builders.batches import evaluation_batches, evaluation_model, training_batches
from dlopt.training.builders.precision import Precision
from dlopt.training.builders.trainer import probe_trainer
from dlopt.training.builders.workload import Workload, build_workload
from dlopt.training.graphed_update import GraphedUpdate
from dlopt.training.step import Step
from tests.support.gpt import CONTEXT, VOCABULARY, gpt
from tests.support.line import refused
from tests.support.processes import run
from tests.support.runs import at_update, metrics, result, resume, same, start, terminate


def run_config(*overrides: str) -> RunConfig:
    return parse(to_plain(Composer().compose(list(overrides)))[0])


def mode(device: str = "cuda", processes: int = 1) -> Any:
    mode = Mode(torch.device(device), "filter")
    mode.ranks.processes = processes
    return mode


def net(*overrides: str) -> nn.Module:
    built: nn.Module = run_config(*overrides).model.build(input_shape=(3, 32, 32), classes=10)
    return built


@pytest.mark.parametrize(
    ("model", "published"),
    [("resnet20", 0.243), ("resnet18", 3.33)],  # of forward and backward, in 1e9 per image of 32 x 32
)
def test_flops_equal_published_counts(model: str, published: float) -> None:
    module = net(f"model={model}")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert 3 * speed.forward_flops(module, (3, 32, 32)) / 1e9 == pytest.approx(published, rel=0.01)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_flops_of_a_gpt_with_tied_embeddings():
    width, depth = 24, 3
    linear = CONTEXT * (12 * width**2 * depth + VOCABULARY * width)
    attention = depth * 2 * CONTEXT**2 * width  # scores, and weighted sums of the values
    assert speed.forward_flops(gpt(width=width, depth=depth), (CONTEXT,)) == 2 * (linear + attention)


def test_flops_of_a_model_that_does_not_run_on_the_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reads(nn.Linear):
        def forward(self, inputs):  # type: ignore[no-untyped-def]
            torch.rand(1)
            return super().forward(inputs) * float(inputs.sum())

    model, draws = Reads(4, 4), torch.get_rng_state()
    assert speed.training_flops(model, (4,)) is None
    assert torch.equal(torch.get_rng_state(), draws)
    assert speed.training_flops(nn.Linear(4, 5), (4,)) == 3 * 2 * 4 * 5
    monkeypatch.setattr(speed, "find_spec", lambda name: object())
    monkeypatch.setenv("CC", "cc")
    assert "FLOPs" in speed.compile_obstacle(run_config("compile=auto"), mode(), None, 50_000)


LONG, SHORT = ("model=wrn_16_4", "epochs=400"), ("model=resnet20", "epochs=200")


@pytest.mark.parametrize(
    ("typed", "parallel", "reason"),
    [
        (("compile=false", *LONG), mode(), "compile=false"),
        (("compile=true", *SHORT), mode("cpu"), ""),
        (("compile=auto", *LONG), mode("cpu"), "saves on cpu"),
        (("compile=auto", *LONG, "parallel=filter"), mode(processes=2), "parallel=filter communicates between layers"),
        (("compile=auto", *LONG, "diagnostics=[gradients]"), mode(), "the hooks of diagnostics"),
        (("compile=auto", *LONG), mode(), ""),
        (("compile=auto", *SHORT), mode(), "this short"),
        (("compile=auto", *LONG, "steps=100"), mode(), "this short"),
        (("compile=auto", *LONG, "steps=800", "data.batch_size=full"), mode(), ""),  # 800 epochs
    ],
)
def test_compile_obstacle(typed: tuple[str, ...], parallel: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "find_spec", lambda name: object())
    monkeypatch.setenv("CC", "cc")
    flops = speed.training_flops(net(typed[1]), (3, 32, 32))
    obstacle = speed.compile_obstacle(run_config(*typed), parallel, flops, 50_000)
    assert bool(obstacle) == bool(reason) and reason in obstacle


def test_compile_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "find_spec", lambda name: None)
    obstacle = speed.compile_obstacle(run_config("compile=auto", *LONG), mode(), 1e12, 50_000)
    assert "Triton" in obstacle


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("compile=reduce-overhead device=cpu", "compile=reduce-overhead: replays CUDA graphs, which cpu does not have"),
        ("compile=max-autotune optimizer=lbfgs", "compile=max-autotune: LBFGS evaluates the loss several times"),
        ("compile=blocks", "compile=blocks: model=mlp has no repeated blocks; use compile=true"),
        (
            "compile=fast",
            "allowed: true | false | auto | blocks | reduce-overhead | max-autotune | max-autotune-no-cudagraphs",
        ),
    ],
)
def test_modes_of_compilation_refuse_what_they_cannot_do(tmp_path: Path, typed: str, message: str) -> None:
    line = ("model=mlp", "data.subset=40", "hydra.run.dir=run", *typed.split())
    assert message in refused(tmp_path, "train", *line)


@pytest.mark.parametrize(
    ("setting", "torch_mode", "copies"),
    [
        (True, None, False), ("auto", None, False), ("blocks", None, False),
        ("reduce-overhead", "reduce-overhead", True), ("max-autotune", "max-autotune", True),
        ("max-autotune-no-cudagraphs", "max-autotune-no-cudagraphs", False),
    ],
)  # fmt: skip
def test_compiles_in_the_mode_of_torch(
    setting: bool | str, torch_mode: str | None, copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs of torch's graphs are copied: the next replay overwrites them, and metrics keep them."""
    modes, output = [], torch.ones(2)

    def compile_(model: nn.Module, *, mode: str | None, dynamic: bool) -> Callable[[torch.Tensor], torch.Tensor]:
        assert not dynamic
        modes.append(mode)
        return lambda inputs: output

    monkeypatch.setattr(torch, "compile", compile_)
    result = speed.compiled(nn.Identity(), setting)(torch.zeros(2))
    assert modes == [torch_mode] and torch.equal(result, output) and (result is not output) == copies


def test_compiles_again_after_parameters_were_frozen_and_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a frozen layer costs what a trained one does, and a released one never trains (torch 2.11)."""
    trained: list[int] = []  # parameters that need a gradient, by compilation

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
        trained.append(sum(each.requires_grad for each in inputs))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    model, inputs = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.ones(5, 3)
    compiled = speed.compiled(lambda x: model(x).sum(), True)
    for requires_grad in (False, True, False):
        model[0].requires_grad_(requires_grad)
        compiled(inputs)
        compiled(inputs)
    assert trained == [2, 4]


def test_cuda_graphs_true_is_rejected_on_cpu(tmp_path: Path) -> None:
    line = ("cuda_graphs=true", "device=cpu", "model=mlp", "data.subset=40", "hydra.run.dir=run")
    message = "cuda_graphs=true: CUDA graphs are not available on cpu; use cuda_graphs=auto"
    assert message in refused(tmp_path, "train", *line)


def test_updates_are_eager_on_cpu(tmp_path: Path) -> None:
    chosen = run_config("device=cpu", "threads=1", "model=mlp", "model.widths=[4]", "data.subset=40")
    trainer = probe_trainer(build_workload(chosen), tmp_path)
    assert type(trainer.step) is Step and trainer.graph_obstacle == "CUDA graphs are not available on cpu"
    assert speed.data_recorder(chosen, torch.device("cpu"), []) is None


@pytest.mark.parametrize(
    ("typed", "recorded"), [((), True), (("cuda_graphs=false",), False), (("profile=true",), False)]
)
def test_data_path_is_captured_unless_observed(typed: tuple[str, ...], recorded: bool) -> None:
    assert (speed.data_recorder(run_config(*typed), torch.device("cuda"), []) is not None) == recorded


def test_the_data_path_is_not_captured_with_parts_of_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph would repeat the numbers that they compute in Python."""

    class Theirs(HorizontalFlip):
        pass

    found: list[Sequence[object]] = []
    monkeypatch.setattr(speed, "data_recorder", lambda *arguments: found.append(arguments[-1]))
    workload = build_workload(run_config("device=cpu", "model=mlp", "data.subset=40", "augmentation=crop_flip"))
    training_batches(workload)
    assert isinstance(workload.augment, Pipeline)
    workload.augment.operations.append(RandomMix(n=1, operations=[HorizontalFlip(p=0.5), Theirs(p=0.5)]))
    training_batches(workload)
    monkeypatch.undo()
    chosen, cuda = run_config(), torch.device("cuda")
    assert [speed.data_recorder(chosen, cuda, parts) is not None for parts in found] == [True, False]


@pytest.mark.parametrize(("task", "size"), [(None, 1024), ("tokens", 20)])
def test_evaluation_batches_on_a_gpu(task: str | None, size: int, tmp_path: Path) -> None:
    """Larger than those of training, but not for texts: their outputs are logits of every token."""
    (tmp_path / "a.txt").write_text("def f(x): return x\n" * 300)
    text = ["data=text", f"data.file={tmp_path / 'a.txt'}", "data.sequence_length=8", "model=gpt_nano"]
    keys = ["model=mlp"] if task is None else text
    workload = build_workload(run_config(*keys, "device=cpu", "data.batch_size=20"))
    seen: dict[str, Any] = {}
    with (
        patch.object(Workload, "device", PropertyMock(return_value=torch.device("cuda"))),
        patch("dlopt.training.builders.batches.Batches", lambda *_, **keys: seen.update(keys) or nn.Identity()),
    ):
        evaluation_batches(workload, workload.dataset.test)
    assert seen["batch_size"] == size


def test_describes_auto_values() -> None:
    precision = Precision("bf16", torch.device("cuda"))
    all_auto = run_config("precision=auto", "compile=auto", "cuda_graphs=auto")
    assert speed.describe_auto(all_auto, precision, "", None) == (
        "precision=auto: bf16 | compile=auto: true | cuda_graphs=auto: true"
    )
    assert speed.describe_auto(all_auto, precision, "too short", "it waits").endswith(
        "compile=auto: false (too short) | cuda_graphs=auto: false (it waits)"
    )
    on_cpu = Precision("fp32", torch.device("cpu"))
    assert speed.describe_auto(run_config(), on_cpu, "compile=false", "none on cpu") == ""


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [("sgd", "constant"), ("adamw", "constant"), ("muon", "constant"), ("sgd", "one_cycle"), ("adamw", "one_cycle")],
)
@pytest.mark.parametrize("augmentation", ["crop_flip", "shift_alternating_flip", "randaugment"])
def test_captured_updates_equal_eager_ones_on_gpu(
    tmp_path: Path, optimizer: str, schedule: str, augmentation: str
) -> None:
    typed = [
        "device=cuda", "data.batch_size=64", f"optimizer={optimizer}", f"augmentation={augmentation}",
        # A graph keeps the rate in a tensor of fp32, which represents these numbers.
        "optimizer.lr=0.0078125", f"schedule={schedule}", "schedule.warmup_epochs=0",
        *(["optimizer.rest_lr=0.0078125"] if optimizer == "muon" else []),
    ]  # fmt: skip
    weights = []
    for graphs in ("false", "true"):
        workload = build_workload(run_config(*typed, "deterministic=true", f"cuda_graphs={graphs}"))
        trainer = probe_trainer(workload, tmp_path)
        assert isinstance(trainer.run_update, GraphedUpdate) == (graphs == "true")
        step = 0
        for epoch in range(2):
            for batch in trainer.batches.epoch(epoch, 0, step):
                trainer.run_update(batch, step)
                step += 1
        trainer.step.check_updates()
        if isinstance(trainer.run_update, GraphedUpdate):
            assert trainer.run_update._graphed._replay is not None
        weights.append(workload.module.state_dict())
    assert same(*weights)


def test_one_thread_is_chosen_by_the_size_of_the_layers():
    narrow, wide = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 10)), nn.Linear(2048, 2048)
    assert speed.prefers_one_thread(narrow, (64,), 64)
    assert not speed.prefers_one_thread(narrow, (64,), 4096)
    assert not speed.prefers_one_thread(wide, (2048,), 64)


def test_work_of_a_convolution_grows_with_the_image():
    layer = nn.Conv2d(1, 16, 3, padding=1)  # 2 * 9 * 16 FLOPs per pixel
    limit = speed._WORTH_THREADS / (2 * 9 * 16 * 8 * 8)
    assert speed.prefers_one_thread(layer, (1, 8, 8), int(limit))
    assert not speed.prefers_one_thread(layer, (1, 8, 8), int(limit) + 1)
    assert not speed.prefers_one_thread(layer, (1, 16, 16), int(limit))


def test_models_without_known_layers_use_all_threads():
    class TakesTwo(nn.Linear):
        def forward(self, first, second):  # type: ignore[override]
            return first + second

    assert not speed.prefers_one_thread(TakesTwo(4, 4), (4,), 1)
    assert not speed.prefers_one_thread(nn.PReLU(), (4,), 1)


def test_counting_work_changes_no_statistics_and_leaves_no_hook():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    state, draws = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    speed.prefers_one_thread(model, (4,), 8)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), draws) and model.training and not model[0]._forward_hooks


@pytest.mark.parametrize(
    ("overrides", "threads"),
    [((), 1), (("data.batch_size=1024",), 3), (("threads=3",), 3)],
    ids=["small layers", "large batch", "typed"],
)
def test_threads_of_a_run(monkeypatch, overrides, threads):
    set_to: list[int] = []
    monkeypatch.setattr("dlopt.machine.threads.usable_cores", lambda: 3)
    monkeypatch.setattr("dlopt.machine.device.torch.set_num_threads", set_to.append)
    monkeypatch.setattr("dlopt.machine.device.torch.get_num_threads", lambda: set_to[-1] if set_to else 0)
    build_workload(run_config("model=mlp", "model.widths=[128]", *overrides))
    assert set_to[-1] == threads


def test_compiles_batches_their_remainder_and_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the last batches of validation and test set, whose sizes differ."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # counts, and generates no code
    counters.clear()
    start(
        tmp_path, "model=mlp", "model.widths=[8]", "data=digits", "data.subset=300", "data.batch_size=25",
        "compile=true", "epochs=2", "tracking=[]", "threads=1",
    )  # fmt: skip
    assert counters["stats"]["unique_graphs"] == 3


VIT = ["model=vit", "model.patch=4", "model.width=8", "model.heads=2", "model.depth=4", "data=digits", "threads=1"]


def test_compiles_equal_blocks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block and the loss, for batches and their remainder; the block for the evaluation."""
    keys = [*VIT, "data.subset=300", "data.batch_size=25", "epochs=2", "tracking=[]"]
    start(tmp_path / "eager", *keys)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    counters.clear()
    start(tmp_path / "blocks", *keys, "compile=blocks")
    assert counters["stats"]["unique_graphs"] == 2 * 2 + 1
    assert same(result(tmp_path / "eager"), result(tmp_path / "blocks"))  # also the names of the weights


@pytest.mark.slow
def test_compiled_blocks_train_as_a_compiled_model(tmp_path: Path) -> None:
    keys = [*VIT, "model.depth=2", "data.subset=60", "data.batch_size=54", "epochs=2", "tracking=[]", "precision=fp64"]
    keys.append("evaluate.test=false")
    losses = []
    for setting in ("false", "true", "blocks"):
        start(tmp_path / setting, *keys, f"compile={setting}")
        losses.append([line["train_loss"] for line in metrics(tmp_path / setting)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-12) and losses[2] == pytest.approx(losses[0], rel=1e-12)


def test_blocks_are_compiled_only_while_the_model_runs() -> None:
    def call(x: Tensor) -> Tensor:
        if x.sum() > 0:
            raise ValueError
        return blocks[1](blocks[0](x))

    blocks = [nn.Linear(2, 2), nn.Linear(2, 2)]
    own = vars(blocks[1])["forward"] = lambda x: x
    seen: list[object] = []
    with patch.object(speed, "compiled", lambda function, setting: lambda x: seen.append(function) or function(x)):
        model = speed.with_compiled_blocks(call, blocks)
    model(torch.zeros(1, 2))
    with pytest.raises(ValueError):
        model(torch.ones(1, 2))
    assert seen == [blocks[0].forward, own]
    assert "forward" not in vars(blocks[0]) and blocks[1].forward is own


@pytest.mark.parametrize(
    "keys", [["model=mlp", "model.norm=batch"], ["model=resnet20", "channels_last=true"]], ids=["mlp", "resnet20"]
)
def test_fills_the_last_batch_of_an_evaluation_without_changing_its_outputs(keys: Sequence[str]) -> None:
    workload = build_workload(run_config(*keys, "data=digits", "data.batch_size=25", "threads=1"))
    workload.module.eval()
    batches = evaluation_batches(workload, workload.dataset.test)
    called: list[torch.Size] = []

    def model(inputs: Tensor) -> Tensor:
        called.append(inputs.shape)
        assert inputs.is_contiguous(memory_format=workload.memory_format)
        outputs: Tensor = workload.module(inputs)
        return outputs

    evaluated = evaluation_model(replace(workload, model=model, compile_obstacle=""), batches)
    *_, (inputs, _) = batches.epoch(0)
    with torch.no_grad():
        torch.testing.assert_close(evaluated(inputs), workload.module(inputs))
    assert len(inputs) == 9 and [shape[0] for shape in called] == [25]


def test_fills_no_batch_of_a_model_that_may_compare_samples() -> None:
    assert treats_samples_alone(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    assert not treats_samples_alone(nn.BatchNorm1d(3, track_running_stats=False))

    class Own(nn.Module):
        """A layer of a user."""

    assert not treats_samples_alone(nn.Sequential(nn.Linear(4, 3), Own()))


@pytest.mark.slow
def test_a_compiled_run_does_not_depend_on_the_batches_before(tmp_path: Path) -> None:
    """Resumed at the last batch of an epoch, which is smaller, and as the second run of a process: bitwise equal."""
    keys = ["model=mlp", "data=digits", "data.subset=300", "compile=true", "epochs=4", "tracking=[]", "threads=1"]

    for function in (_interrupt, resume):
        done = run(function, tmp_path / "resumed", *keys)
        assert done.returncode == 0, done.stderr
    done = run(_start_two, [tmp_path / "first", tmp_path / "second"], *keys)
    assert done.returncode == 0, done.stderr
    first = result(tmp_path / "first")
    assert same(first, result(tmp_path / "second")) and same(first, result(tmp_path / "resumed"))


def _interrupt(folder: Path, *keys: str) -> None:
    with at_update(4, terminate):
        start(folder, *keys)


def _start_two(folders: list[Path], *keys: str) -> None:
    for folder in folders:
        start(folder, *keys)
