"""`init_from` of files that wrappers and other training scripts write: the right weights, or a refusal with names."""

import argparse
import copy
import gc
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dlopt.adapt import lora
from dlopt.basics.errors import UserError
from dlopt.training.builders.workload import load_weights

State = dict[str, Any]


def net(seed: int = 0, outputs: int = 5, width: int = 6) -> nn.Sequential:
    torch.manual_seed(seed)
    stem = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU())
    layers = {f"layer{i}": nn.Linear(width, width) for i in range(3)}
    model = nn.Sequential(OrderedDict(stem=stem, **layers, head=nn.Linear(width, outputs)))
    model.stem[1].running_mean.uniform_()  # type: ignore[index, union-attr]
    return model.eval()


INPUTS = torch.linspace(-1, 1, 12).view(3, 4)


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path / "w.pt")
    return path / "w.pt"


def prefixed(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def check(path: Path, content: Any, source: nn.Module) -> list[str]:
    """Checks that a model initialized from the file computes the outputs of `source`; returns the lines."""
    target = net(9)
    lines = load_weights(target, saved(path, content), complete=True)
    assert " 15 of 15 tensors loaded" in lines[0]
    with torch.no_grad():
        assert torch.equal(target(INPUTS), source.eval()(INPUTS))
    return lines


def refusal(path: Path, content: Any, *, complete: bool = False) -> str:
    target = net(9)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(UserError) as error:
        load_weights(target, saved(path, content), complete=complete)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    assert str(error.value).startswith(f"init_from={path}") and "\n" not in str(error.value)
    return str(error.value)


# -- wrappers


def test_averaged_model_of_torch(tmp_path: Path) -> None:
    source = net(1)
    average = AveragedModel(source, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    average.update_parameters(net(2))
    average.update_parameters(net(3))
    lines = check(tmp_path, average.state_dict(), average)
    assert lines[1:] == ["  not used: n_averaged"]
    both = {"model": source.state_dict(), "swa_model": average.state_dict()}
    assert "the averaged weights swa_model.*, not model.*" in check(tmp_path, both, average)[0]


def test_averaged_model_of_timm(tmp_path: Path) -> None:
    utils = pytest.importorskip("timm.utils")
    helpers = pytest.importorskip("timm.models")
    source = net(1)
    average = utils.ModelEmaV3(source, decay=0.5)
    average.update(net(2))
    average.update(net(3))
    check(tmp_path, average.state_dict(), average.module)
    content = {
        "epoch": 3,
        "state_dict": source.state_dict(),
        "state_dict_ema": average.state_dict(),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(6, 4)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "args": argparse.Namespace(model="resnet18"),  # as timm's train.py saves it
    }
    lines = check(tmp_path, content, average.module)
    assert "the averaged weights state_dict_ema.*, not state_dict.*" in lines[0] and len(lines) == 1
    theirs = net(4)
    helpers.load_checkpoint(theirs, str(tmp_path / "w.pt"), weights_only=False)
    assert torch.equal(theirs(INPUTS), average.module(INPUTS))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()
    gc.collect()  # its threads end here


@pytest.mark.slow  # importing torch.compile and FSDP takes seconds, as in the two tests below
@pytest.mark.usefixtures("process_group")
def test_parallel_wrappers(tmp_path: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    source = net(1)
    wrapped = nn.parallel.DistributedDataParallel(net(1))
    assert "without the prefix module. of their names" in check(tmp_path, wrapped.state_dict(), source)[0]
    compiled = torch.compile(wrapped)
    check(tmp_path, {"model": compiled.state_dict()}, source)  # type: ignore[attr-defined]
    # The names of FSDP without its hooks, as its parameters and optimizers have them.
    sharded: Any = net(1)
    sharded.layer1 = FullyShardedDataParallel(sharded.layer1, use_orig_params=True, device_id=torch.device("cpu"))
    names = [name for name, _ in sharded.named_parameters()]
    assert "layer1._fsdp_wrapped_module.weight" in names
    values = net(1).state_dict()
    weights = {name: values[name.replace("_fsdp_wrapped_module.", "")] for name in names}
    buffers = {name: value for name, value in values.items() if name not in dict(source.named_parameters())}
    check(tmp_path, {**weights, **buffers}, source)
    check(tmp_path, prefixed("_fsdp_wrapped_module.", {**weights, **buffers}), source)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "model.", "module.", "net.backbone."])
def test_wrappers_inside_names(tmp_path: Path, prefix: str) -> None:
    source = net(1)
    wrapped: Any = net(1)
    wrapped.layer0 = torch.compile(wrapped.layer0)
    wrapped.layer1 = nn.DataParallel(wrapped.layer1)
    wrapped.stem[0] = checkpoint_wrapper(wrapped.stem[0])
    state = wrapped.state_dict()
    assert {"layer0._orig_mod.weight", "layer1.module.weight", "stem.0.weight"} <= state.keys()
    [line] = check(tmp_path, prefixed(prefix, state), source)
    assert "without _orig_mod, module in their names" in line
    state["stem.0._checkpoint_wrapped_module.weight"] = state.pop("stem.0.weight")
    check(tmp_path, prefixed(prefix, state), source)


@pytest.mark.slow
def test_a_model_with_wrappers(tmp_path: Path) -> None:
    """The names of the model may contain wrappers, too."""
    target: Any = net(9)
    target.layer0, target.layer1 = torch.compile(target.layer0), nn.DataParallel(target.layer1)
    load_weights(target, saved(tmp_path, net(1).state_dict()), complete=True)
    assert torch.equal(target.layer1.module.weight, net(1).layer1.weight)  # type: ignore[arg-type, union-attr]
    assert torch.equal(target.layer0._orig_mod.weight, net(1).layer0.weight)  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"])
@pytest.mark.parametrize("layer", ["layer1.", "stem.0.", ""])
def test_names_of_wrappers(tmp_path: Path, wrapper: str, layer: str) -> None:
    """Like the tests above, without the wrappers."""
    source = net(1)
    state = {name.replace(layer, f"{layer}{wrapper}.", 1): value for name, value in source.state_dict().items()}
    assert len(check(tmp_path, state, source)) == 1
    check(tmp_path, {"state_dict": prefixed("model._orig_mod.module.", state)}, source)
    target: Any = net(9)
    target.layer1 = nn.Sequential(OrderedDict([(wrapper, target.layer1)]))
    load_weights(target, tmp_path / "w.pt", complete=True)
    with torch.no_grad():
        assert torch.equal(target(INPUTS), source(INPUTS))


# -- files of training scripts


LAYOUTS: dict[str, Any] = {
    "lightning": lambda state: {
        "state_dict": {
            **prefixed("model.", state),
            "loss.weight": torch.ones(5),
            "criterion.pos_weight": torch.ones(5),
            "val_metrics.confusion.confmat": torch.ones(5, 5),
        },
        "hyper_parameters": {"lr": 0.1},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(6, 4)}}}],
    },
    "deepspeed": lambda state: {"module": prefixed("module.", state), "optimizer": None, "global_steps": 3},
    "mmengine": lambda state: {
        "meta": {"mmengine_version": "0.10"},
        "state_dict": state,
        "ema_state_dict": prefixed("module.", net(5).state_dict()),  # EMAHook exchanges the two
    },
    "lightning_average": lambda state: {
        "state_dict": prefixed("model.", state),
        "current_model_state": prefixed("model.", net(5).state_dict()),
        "averaging_state": {"n_averaged": torch.tensor(3)},
    },
    "torchtitan": lambda state: {
        **state,
        "optimizer": {"state.layer1.weight.exp_avg": torch.ones(6, 6)},
        "train_state": {"step": torch.tensor(7)},
    },
    "peft": lambda state: prefixed("base_model.model.", state),
    "modules": lambda state: {
        key: {name.removeprefix(f"{key}."): value for name, value in state.items() if name.startswith(f"{key}.")}
        for key in ("stem", "layer0", "layer1", "layer2", "head")
    },
    **{key: lambda state, key=key: {key: state, "epoch": 3} for key in ("net", "ema", "model_state", "generator")},
    "twice": lambda state: {"state_dict": state, "best_state_dict": {name: v.clone() for name, v in state.items()}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path: Path, layout: str) -> None:
    source = net(1)
    check(tmp_path, LAYOUTS[layout](source.state_dict()), source)


@pytest.mark.parametrize("kind", ["containers", "prefixes", "without_counters"])
def test_takes_the_averaged_of_two_sets(tmp_path: Path, kind: str) -> None:
    raw, average = net(2).state_dict(), net(1).state_dict()
    if kind == "without_counters":
        average.pop("stem.1.num_batches_tracked")
    is_nested = kind != "prefixes"
    content: State = {"model": raw, "model_ema": average} if is_nested else {}
    if not is_nested:
        content = {"state_dict": {**prefixed("model.", raw), **prefixed("ema_model.", average)}}
    target = net(9)
    [line] = load_weights(target, saved(tmp_path, content), complete=True)
    assert "the averaged weights " in line and "ema" in line and ", not " in line
    assert torch.equal(target(INPUTS), net(1)(INPUTS))


@pytest.mark.parametrize("keys", [("student", "teacher"), ("model", "best_model"), ("ema", "swa")])
def test_refuses_to_choose_between_equal_sets(tmp_path: Path, keys: tuple[str, str]) -> None:
    nested = dict(zip(keys, (net(1).state_dict(), net(2).state_dict()), strict=True))
    flat = {**prefixed(f"{keys[0]}.", nested[keys[0]]), **prefixed(f"{keys[1]}.", nested[keys[1]])}
    first, second = ({**each} for each in nested.values())
    names = list(first)
    del first[names[0]], second[names[-1]]
    for content in (nested, flat, dict(zip(keys, (first, second), strict=True))):
        message = refusal(tmp_path, content)
        assert f"several sets of weights for this model: {keys[0]}.*, {keys[1]}.*; save the one to load" in message


def test_weights_of_another_precision(tmp_path: Path) -> None:
    source = net(1).bfloat16().float()
    stored = {n: v.bfloat16() if v.is_floating_point() else v for n, v in source.state_dict().items()}
    assert "(bfloat16 converted to float32)" in check(tmp_path, stored, source)[0]
    target = net(9).bfloat16()
    [line] = load_weights(target, saved(tmp_path, net(1).state_dict()))
    assert "(float32 converted to bfloat16)" in line


def test_merges_the_adapters_of_a_state_dict(tmp_path: Path) -> None:
    source: Any = net(1).double()
    lora(model=source, generator=torch.Generator(), rank=2, alpha=5, dropout=0.0, targets=["layer*"], train=[])
    source.layer1.lora_b.data.normal_()
    target = net(9).double()
    [line] = load_weights(target, saved(tmp_path, source.state_dict()), complete=True)
    assert "with its adapters merged" in line
    inputs = INPUTS.double()
    assert torch.allclose(target(inputs), source(inputs), rtol=1e-12, atol=1e-12)


# -- parts of a model


def backbone() -> State:
    return {name: value for name, value in net(1).state_dict().items() if not name.startswith("head.")}


@pytest.mark.parametrize("prefix", ["", "backbone.", "module."])
def test_a_new_head(tmp_path: Path, prefix: str) -> None:
    """The documented case: other classes, or a file without a head."""
    content = prefixed(prefix, net(1, outputs=7).state_dict())
    lines = load_weights(net(9), saved(tmp_path, content))
    assert "newly initialized: head.weight (7x6 in the file), head.bias (7 in the file)" in lines[1]
    target = net(9)
    lines = load_weights(target, saved(tmp_path, prefixed(prefix, backbone())))
    assert lines[1].endswith("newly initialized: head.weight, head.bias") and len(lines) == 2
    assert torch.equal(target[:4](INPUTS), net(1)[:4](INPUTS))
    assert "head.weight, head.bias" in refusal(tmp_path, prefixed(prefix, backbone()), complete=True)


def without(state: State, *names: str) -> State:
    return {name: value for name, value in state.items() if not name.startswith(names)}


def other(kind: str) -> tuple[Any, list[str]]:
    """Returns a file with another model, and names in the refusal."""
    model: Any = net(1)
    state = model.state_dict()
    match kind:
        case "inner_layer_missing":
            return without(state, "layer1."), ["lacks layer1.weight, layer1.bias"]
        case "one_stage":
            return {name: value for name, value in state.items() if name.startswith("stem")}, ["lacks layer0.weight"]
        case "unknown_wrapper":
            return {n.replace("layer1.", "layer1.inner."): v for n, v in state.items()}, ["layer1.inner.weight"]
        case "renamed_head":
            return {n.replace("head.", "last."): v for n, v in state.items()}, ["head.weight, and has last.weight"]
        case "head_elsewhere":
            head = {name: value for name, value in state.items() if name.startswith("head")}
            return {**prefixed("backbone.", backbone()), **head}, ["lacks backbone.head.weight, and has head.weight"]
        case "statistics_missing":
            return without(state, "stem.1.running"), ["lacks stem.1.running_mean, stem.1.running_var"]
        case "bias_missing":
            return without(state, "head.bias"), ["lacks head.bias"]
        case "deeper":
            return {**state, "layer3.weight": torch.ones(6, 6)}, ["has layer3.weight, which this model lacks"]
        case "further_tensor_of_a_layer":
            return {**state, "layer1.lora_A": torch.ones(2, 6)}, ["has layer1.lora_A, which this model lacks"]
        case "width":
            return net(1, width=8).state_dict(), ["layer0.weight (8x8 in the file)", "layer2.bias (8 in the file)"]
        case "integers":
            return {**state, "layer1.weight": torch.ones(6, 6, dtype=torch.int8)}, ["layer1.weight: int8 tensors"]
        case "parametrization":
            nn.utils.parametrizations.weight_norm(model.head)
            return model.state_dict(), ["lacks head.weight", "head.parametrizations.weight.original0"]
        case "spectral_norm":
            nn.utils.parametrizations.spectral_norm(model.layer1)
            return model.state_dict(), ["lacks layer1.weight", "layer1.parametrizations.weight.original"]
        case "pruned":
            prune.l1_unstructured(model.layer1, "weight", 0.5)
            return model.state_dict(), ["lacks layer1.weight", "layer1.weight_orig, layer1.weight_mask"]
        case "object":
            return {"state_dict": state, "path": Path("/")}, ["contains pathlib.", "in a file of its own"]
    raise ValueError(kind)


@pytest.mark.parametrize(
    "kind",
    ["inner_layer_missing", "one_stage", "unknown_wrapper", "renamed_head", "head_elsewhere", "statistics_missing",
     "bias_missing", "deeper", "further_tensor_of_a_layer", "width", "integers", "parametrization", "spectral_norm",
     "pruned", "object"],
)  # fmt: skip
def test_refuses_a_part_of_another_model(tmp_path: Path, kind: str) -> None:
    content, names = other(kind)
    message = refusal(tmp_path, content)
    assert all(name in message for name in names), message


def test_a_dict_that_contains_itself(tmp_path: Path) -> None:
    state: State = dict(net(1).state_dict())
    for key in "abc":
        state[key] = state
    check(tmp_path, state, net(1))
