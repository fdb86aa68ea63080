"""Merging model and optimizer states of which each rank holds some entries."""

import torch

from dlopt.parallel.shards import _merge


def test_merge_fills_meta_tensors_and_missing_entries() -> None:
    meta, one, two = torch.empty(1, device="meta"), torch.ones(1), torch.full((1,), 2.0)
    model = _merge({"a": one, "b": meta}, {"a": meta, "b": two})
    assert list(model.items()) == [("a", one), ("b", two)]
    groups = [{"lr": 0.1, "params": [0, 2, 1]}]
    states = [{"state": {n: {"step": one * n} for n in numbers}, "param_groups": groups} for numbers in ([0, 2], [1])]
    merged = _merge(*states)
    assert list(merged["state"]) == [0, 1, 2] and merged["param_groups"] == groups
    assert [float(values["step"]) for values in merged["state"].values()] == [0, 1, 2]
