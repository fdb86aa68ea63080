"""Values that depend on the machine, which the tests pretend to have."""

from types import SimpleNamespace

import pytest
import torch

from dlopt.basics.errors import UserError
from dlopt.config import rules
from tests.support.runs import run_config


def test_precisions_of_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="device=mps: no Apple GPU is available"):
        run_config("device=mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert run_config("device=mps", "precision=fp16").settings.precision == "fp16"
    for available in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)  # noqa: B023
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: available)  # noqa: B023
        for device in ("auto", "cuda") if available else ():
            assert run_config(f"device={device}", "precision=fp16").settings.device == device
    with pytest.raises(UserError, match="device=cuda: no CUDA device is available"):
        run_config("device=cuda")


def test_counts_are_limited_by_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "os", SimpleNamespace(cpu_count=lambda: 2))
    most = run_config("threads=128", "data.workers=128", "parallel=ddp", "parallel.processes=32")
    assert most.settings.threads == 128
    for line, message in (
        (["threads=129"], "threads=129: this machine has 2 cores; at most 128"),
        (["data.workers=129"], "data.workers=129: this machine has 2 cores; at most 128"),
        (["parallel=ddp", "parallel.processes=33"], "parallel.processes=33: this machine has 2 cores; at most 32"),
    ):
        with pytest.raises(UserError, match=message):
            run_config(*line)
