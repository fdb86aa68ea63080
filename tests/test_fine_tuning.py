"""Tests of fine-tuning: loaded and skipped weights, weights of other tools, the warning about small batches."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dlopt.basics.errors import UserError
from dlopt.optim.parameters import idle_rules
from dlopt.training.batch_norm import norm_notes
from dlopt.training.builders.workload import load_weights
from dlopt.training.checkpoint import checkpoints
from tests.support.runs import resume, small_workload, start
from tests.support.sizes import SMALL


def test_keeps_and_lists_a_head_for_other_classes(tmp_path: Path) -> None:
    target = small_workload("init_seed=2")
    own = {name: value.clone() for name, value in target.module.state_dict().items()}
    head = [name for name, value in own.items() if value.shape[:1] == (10,)]
    assert head, "the last layer has ten outputs"
    state = {name: torch.ones_like(value) for name, value in own.items()}
    for name in head:
        state[name] = torch.ones(3, *own[name].shape[1:])
    torch.save({**state, "extra.weight": torch.ones(2)}, tmp_path / "weights.pt")
    lines = load_weights(target.module, tmp_path / "weights.pt")
    loaded = target.module.state_dict()
    assert all(torch.equal(loaded[name], own[name]) for name in head)
    assert all(torch.equal(loaded[name], state[name]) for name in own if name not in head)
    assert all(name in lines[1] for name in head) and "extra.weight" in lines[2]


@pytest.mark.parametrize("key", ["state_dict", "model", "state_dict_ema", None])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", ""])
def test_loads_files_of_other_tools(tmp_path: Path, key: str | None, prefix: str) -> None:
    """Nested as training scripts save them, with the prefixes of wrappers; averaged weights first."""
    source, target = small_workload("init_seed=1"), small_workload("init_seed=2")
    weights = {f"{prefix}{name}": value for name, value in source.module.state_dict().items()}
    other = {name: torch.zeros_like(value) for name, value in weights.items()}
    nested = weights if key is None else {"epoch": 3, "optimizer": {"lr": 0.1}, key: weights}
    if key == "state_dict_ema":
        nested["state_dict"] = other  # type: ignore[assignment]
    torch.save(nested, tmp_path / "weights.pth")
    [line] = load_weights(target.module, tmp_path / "weights.pth")
    assert not prefix or f"without the prefix {prefix}" in line
    pairs = zip(source.module.state_dict().values(), target.module.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_format_of_another_tool_is_no_checkpoint(tmp_path: Path) -> None:
    """Only dlopt's own checkpoints have a checksum file."""
    source, target = small_workload("init_seed=1"), small_workload("init_seed=2")
    torch.save({"format": "pt", "state_dict": source.module.state_dict()}, tmp_path / "weights.pt")
    load_weights(target.module, tmp_path / "weights.pt")
    assert torch.equal(source.module.layer1.linear.weight, target.module.layer1.linear.weight)  # type: ignore[union-attr]


def test_loads_safetensors(tmp_path: Path) -> None:
    source, target = small_workload("init_seed=1"), small_workload("init_seed=2")
    save_file({name: value.clone() for name, value in source.module.state_dict().items()}, tmp_path / "w.safetensors")
    load_weights(target.module, tmp_path / "w.safetensors")
    pairs = zip(source.module.state_dict().values(), target.module.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    (tmp_path / "w.safetensors").write_bytes(b"{}")
    with pytest.raises(UserError, match=r"init_from=.*cannot be loaded as weights"):
        load_weights(target.module, tmp_path / "w.safetensors")


def test_names_the_keys_of_a_file_without_weights(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "history": [1.0]}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"contains no weights by name .*its keys: epoch, history"):
        load_weights(small_workload().module, tmp_path / "weights.pt")


def test_rejects_weights_of_another_model(tmp_path: Path) -> None:
    torch.save({"some.weight": torch.ones(2)}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"init_from=.*none of its 1 weights matches"):
        load_weights(small_workload().module, tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (["model.norm=batch", "data.batch_size=7"], True),
        (["model.norm=batch", "data.batch_size=8"], False),
        (["model.norm=batch", "data.batch_size=16", "accumulate=4"], True),
        (["model.norm=layer", "data.batch_size=4"], False),
        (["model.norm=batch", "data.batch_size=256", "sampler.epoch_size=4"], True),
        (["model.norm=batch", "data.batch_size=full", "sampler.epoch_size=12"], False),
    ],
)
def test_warns_about_small_norm_batches(overrides: list[str], warned: bool) -> None:
    lines = norm_notes(small_workload(*overrides))
    assert any("model.norm=group" in line and "sync_batchnorm" in line for line in lines) is warned


def test_a_last_layer_of_other_classes_is_reported(tmp_path: Path) -> None:
    """Its outputs are in the order of the classes of the checkpoint."""
    source, target = small_workload("init_seed=1"), small_workload("init_seed=2")
    classes = target.class_names
    assert classes is not None
    checkpoint = SimpleNamespace(
        merged_weights=source.module.state_dict(), classes=classes[::-1], data={"classes": list(classes[::-1])}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dlopt.training.checkpoint.weight_files.is_checkpoint", lambda _: True)
        patch.setattr("dlopt.training.checkpoint.weight_files.load", lambda _: checkpoint)
        torch.save(source.module.state_dict(), path := tmp_path / "best.pt")
        *_, line = load_weights(target.module, path, classes=classes)
        assert (
            f"warning: the last layer, too, although it was trained with other classes: class 0 is {classes[-1]}"
            in line
        )
        assert len(load_weights(target.module, path, classes=classes[::-1])) == 1
        with pytest.raises(
            UserError, match=r"init_from=.*trained with other classes than those of the data: class 0 is"
        ):
            load_weights(target.module, path, complete=True, classes=classes)


@pytest.mark.parametrize("keys", [[], ["clip=norm"], ["accumulate=4", "ema=0.9"]])
def test_a_run_goes_on_when_the_schedule_has_frozen_everything(tmp_path: Path, keys: list[str]) -> None:
    """The parameters stay those of the update after which the last rate is zero, also after a resume."""
    lines = [*SMALL, "model.norm=none", "schedule=linear", *keys, "checkpoint.every_epochs=1"]
    rules = "optimizer.groups=[{match: '*', horizon: 0.25}, {match: 'head*', horizon: 0.5}]"
    start(tmp_path / "run", *lines, rules, "epochs=2", "schedule_epochs=4")
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    before = dict(checkpoints.load(last).model)
    summary = resume(tmp_path / "run", *lines, rules, "epochs=4", "schedule_epochs=4")
    after = dict(checkpoints.load(last).model)
    assert summary["status"] == "finished" and all(torch.equal(after[name], before[name]) for name in before)


def test_states_what_frozen_batch_norms_do() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Linear(3, 2), nn.LayerNorm(2))
    workload = replace(small_workload(), module=model)
    assert norm_notes(workload) == []
    model[0].weight.requires_grad_(False)  # type: ignore[union-attr]
    assert norm_notes(workload) == []  # its bias trains
    model.requires_grad_(False)
    assert norm_notes(workload) == ["2 frozen batch norms: running statistics still follow the training data"]


def test_states_what_changes_nothing() -> None:
    """A rule of frozen weights, and exact statistics of a model that has none."""
    rules = 'optimizer.groups=[{match: "*weight", lr: 0.1}, {match: "*lora_a", lr: 2}, {match: "*", weight_decay: 0}]'
    workload = small_workload("adapt=lora", "model.norm=none", "norm_statistics=exact", rules)
    what = "all parameters that it matches are frozen; it changes nothing"
    assert idle_rules(workload.module, workload.run_config.grouping) == [f"optimizer.groups.0.match=*weight: {what}"]
    frozen = small_workload("adapt=lora", 'optimizer.groups=[{match: "*weight", freeze: true}]')
    assert frozen.already_frozen == [f"optimizer.groups.0.match=*weight: {what}"]
    [line] = norm_notes(workload)
    assert line == "norm_statistics=exact: changes nothing; the model has no batch norm with running statistics"
    assert norm_notes(small_workload("norm_statistics=exact", "model.norm=batch")) == []
