"""The factors of all schedules over runs of several lengths, as recorded.

    REGENERATE_GOLDEN=1 python -m pytest tests/schedules/test_recorded.py

writes tests/schedules/recorded.json; say in the commit which numbers moved and why.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.choices import names, values
from tests.support.schedules import make

FILE = Path(__file__).with_name("recorded.json")
CASES: dict[str, list[dict[str, Any]]] = {
    "constant": [{"warmup_steps": 3}, {"warmup_steps": 3, "warmup_start": 0.25},
                 {"warmup_steps": 3, "warmup_start": 0.25, "warmup_shape": "constant"}],
    "step": [{}, {"every_epochs": 0.7}, {"every_steps": 5, "gamma": 0.5, "warmup_steps": 2}],
    "multistep": [{}, {"milestones_epochs": [1, 2.5]}, {"milestones_steps": [3, 11], "gamma": 0.5}],
    "exponential": [{"warmup_steps": 2}, {"unit": "steps", "k": 0.1}],
    "time_decay": [{"warmup_steps": 2}, {"unit": "steps", "decay": 0.1}],
    "cosine": [{}, {"final": 0.1, "warmup_epochs": 0.5}, {"decay_steps": 9}, {"decay_epochs": 1.5, "final": 0.2}],
    "linear": [{}, {"decay_steps": 9, "final": 0.3}],
    "polynomial": [{"power": 3.0, "warmup_steps": 2}, {"decay_epochs": 2, "power": 0.5}],
    "wsd": [{"warmup_steps": 2}, {"shape": "cosine", "final": 0.1, "decay_epochs": 1},
            {"shape": "sqrt", "decay_steps": 9}, {"shape": "linear", "decay_fraction": 0.3}],
    "cosine_restarts": [{}, {"cycles": 3, "T_mult": 1.0, "peak_factor": 0.5, "eta_min": 0.2, "eta_min_factor": 0.5},
                        {"T_0_steps": 4, "T_mult": 1.5, "warmup_steps": 2}, {"T_0_epochs": 0.7, "T_mult": 1.0}],
    "cosine_warmup_restarts": [{}, {"T_0_steps": 6, "cycle_warmup_steps": 2, "eta_min": 0.1},
                               {"cycle_warmup_epochs": 0.3, "cycles": 2, "peak_factor": 0.7},
                               {"cycles": 2, "cycle_warmup_fraction": 0.5, "eta_min": 0.9, "peak_factor": 0.5}],
    "one_cycle": [{"warmup_steps": 0}, {"three_phase": True},
                  {"anneal": "linear", "pct_start": 0.5, "three_phase": True},
                  {"pct_start": 0.05, "div_factor": 4.0, "final_div_factor": 10.0}],
}  # fmt: skip
# Its factor follows from the losses of the run.
UNRECORDED = {"plateau"}


def test_every_schedule_is_recorded() -> None:
    """With its momentum, if it has one. A choice counts as recorded if another one of its factory is."""
    targets = {name: values("schedule", name)["_target_"] for name in names("schedule")}
    known = {targets[name] for name in {*CASES, *UNRECORDED}}
    missing = sorted(name for name, target in targets.items() if target not in known)
    assert not missing, f"{missing}: add the keys of a case to CASES of tests/schedules/test_recorded.py"


@pytest.mark.parametrize("name", CASES)
def test_factors(name: str) -> None:
    found, steps = {}, 25
    for number, keys in enumerate(CASES[name]):
        warmup = {} if "warmup_epochs" in keys else {"warmup_steps": 0}
        factor = make(name, steps, 6.25, **{"warmup_epochs": None, "warmup_fraction": 0.0} | warmup | keys)
        times = range(steps + 3)
        lines = {"factor": [factor(t) for t in times]}
        if factor.momentum is not None:
            lines["momentum"] = [factor.momentum(t) for t in times]
        if factor.ended_cycle is not None:
            lines["ended"] = [t for t in times if factor.ended_cycle(t)]
            lines["cycles"] = [factor.ended_cycle(t) or 0 for t in lines["ended"]]
            lines["restarts"] = [*factor.restarts]
        for key, line in lines.items():
            found[f"{name} {number} {key}"] = [float(f"{value:.6g}") for value in line]
    if os.environ.get("REGENERATE_GOLDEN"):
        known = json.loads(FILE.read_text()) if FILE.exists() else {}
        entries = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted((known | found).items())]
        FILE.write_text("{\n" + ",\n".join(entries) + "\n}\n")
    recorded = json.loads(FILE.read_text())
    assert not found.keys() - recorded, (
        f"not in {FILE.name}: run REGENERATE_GOLDEN=1 python -m pytest tests/schedules/test_recorded.py"
    )
    assert found == {key: pytest.approx(recorded[key], rel=1e-5, abs=1e-12) for key in found}
