"""States of which each process has some entries."""

import torch

from dlopt.parallel.shards import _merged


def test_what_another_has_is_put_in_its_place() -> None:
    meta, one, two = torch.empty(1, device="meta"), torch.ones(1), torch.full((1,), 2.0)
    model = _merged({"a": one, "b": meta}, {"a": meta, "b": two})
    assert list(model.items()) == [("a", one), ("b", two)]
    groups = [{"lr": 0.1, "params": [0, 2, 1]}]
    states = [{"state": {n: {"step": one * n} for n in mine}, "param_groups": groups} for mine in ([0, 2], [1])]
    merged = _merged(*states)
    assert list(merged["state"]) == [0, 1, 2] and merged["param_groups"] == groups
    assert [float(values["step"]) for values in merged["state"].values()] == [0, 1, 2]
