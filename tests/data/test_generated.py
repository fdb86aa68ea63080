"""Generated tasks: functions of one variable and of features with different ranges, and recall of a symbol."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlopt.data.generated import copying, linear, polynomial, recall
from dlopt.data.samples import Dataset, InMemory
from dlopt.data.splits import DataSettings, prepare
from tests.support.line import dlopt

# -- functions of one variable


EXACT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sine": lambda x: np.sin(np.pi * x),
    "runge": lambda x: 1 / (1 + 25 * x * x),
    "cubic": lambda x: np.polynomial.legendre.legval(x, [0, 0, 0, 1]),
    "step": np.sign,
}


def make_polynomial(**changed: Any) -> Dataset:
    keys: dict[str, Any] = {
        "function": "sine",
        "interval": (-1.0, 1.0),
        "noise": 0.3,
        "train_size": 20,
        "val_size": 30,
        "test_size": 40,
        "seed": 0,
    }
    return polynomial(**keys | changed)


def arrays(samples: object) -> tuple[np.ndarray, np.ndarray]:
    assert isinstance(samples, InMemory)
    return samples.inputs[:, 0].double().numpy(), samples.targets.double().numpy()


@pytest.mark.parametrize("function", EXACT)
@pytest.mark.parametrize("interval", [(-1.0, 1.0), (0.5, 3.0)])
def test_without_noise_the_targets_are_the_function(function: str, interval: tuple[float, float]) -> None:
    parts = make_polynomial(function=function, interval=interval, noise=0.0)
    assert parts.classes is None
    for part, size in ((parts.train, 20), (parts.val, 30), (parts.test, 40)):
        x, y = arrays(part)
        assert part is not None and part.shape == (1,) and len(part) == len(x) == size
        assert part.targets.shape == (size,) and part.targets.dtype == torch.float32
        assert part.fetch(torch.tensor([1])).dtype == torch.float32
        assert x.min() >= interval[0] and x.max() <= interval[1] and x.std() > 0.2 * (interval[1] - interval[0])
        np.testing.assert_allclose(y, EXACT[function](x), rtol=1e-5, atol=1e-5)


def test_noise_is_normal_and_independent_of_x_and_split() -> None:
    from scipy import stats

    parts = make_polynomial(noise=0.5, train_size=4000, val_size=4000, test_size=4000)
    residuals = []
    for part in (parts.train, parts.val, parts.test):
        x, y = arrays(part)
        residuals.append(y - EXACT["sine"](x))
        assert stats.kstest(residuals[-1], stats.norm(0, 0.5).cdf).pvalue > 1e-3
        assert stats.kstest(x, stats.uniform(-1, 2).cdf).pvalue > 1e-3
        assert abs(np.corrcoef(x, residuals[-1])[0, 1]) < 0.06
    assert abs(np.corrcoef(residuals) - np.eye(3)).max() < 0.06


@given(
    sizes=st.tuples(st.integers(1, 50), st.integers(0, 50)), other=st.integers(1, 50), seed=st.integers(-(2**40), 2**40)
)
def test_size_of_one_split_does_not_change_the_others(sizes: tuple[int, int], other: int, seed: int) -> None:
    train_size, val_size = sizes
    first = make_polynomial(train_size=train_size, val_size=val_size, seed=seed)
    second = make_polynomial(train_size=other, val_size=other, seed=seed)
    for ours, theirs in zip(arrays(first.test), arrays(second.test), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (first.val is None) == (val_size == 0)


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_samples_do_not_depend_on_the_runs_seed(settings: Callable[..., DataSettings], seed: int) -> None:
    """The hash ensures that metrics of all versions can be compared. Only the subset depends on the run's seed."""
    parts = prepare(make_polynomial(), settings(split_seed=seed, subset=10))
    test, val = arrays(parts.test), arrays(parts.val)
    # rounded: the last bit of a sine is the processor's
    digest = hashlib.sha256(np.concatenate([*test, *val]).round(4).tobytes()).hexdigest()
    assert digest == "7c825fc2a4501d85495a7818a4da169abf69359bf453cd68fa24e5f12efab7a9"
    assert len(parts.train) == 10 and set(arrays(parts.train)[0]) < set(arrays(make_polynomial().train)[0])
    assert (arrays(make_polynomial(seed=1).test)[0] != test[0]).all()


def test_size_of_zero_omits_a_split(settings: Callable[..., DataSettings]) -> None:
    parts = make_polynomial(val_size=0, test_size=0)
    assert parts.val is None and parts.test is None
    cut = prepare(parts, settings(val_split=0.25))
    assert cut.val is not None and (len(cut.train), len(cut.val)) == (15, 5)


def test_regression_has_no_accuracy(tmp_path: Path) -> None:
    keys = "data=polynomial model=polynomial normalize=none loss=mse data.batch_size=full epochs=3 threads=1"
    done = dlopt(tmp_path, "train", *keys.split(), "hydra.run.dir=run")
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(line["val_loss"] > 0 and line["train_loss"] > 0 for line in lines)
    assert not [key for line in lines for key in line if "accuracy" in key]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_loss"] > 0 and summary["best_val_loss"] == min(line["val_loss"] for line in lines)
    assert not [key for key, value in summary.items() if "accuracy" in key and value is not None]
    shown = done.out + done.err + (tmp_path / "run" / "train.log").read_text()
    assert "val" in shown and "accuracy" not in shown and "acc " not in shown


# -- recall of a symbol, and features with different ranges


SIZES = {"train_size": 300, "val_size": 20, "test_size": 0, "seed": 0}


def tensors(samples: Any) -> tuple[torch.Tensor, torch.Tensor]:
    assert isinstance(samples, InMemory)
    return samples.inputs, samples.targets


def test_copying_hides_the_label_in_the_first_step() -> None:
    keys = {"length": 7, "symbols": 3, "noise": 0.5}
    dataset = copying(**keys, **SIZES)  # type: ignore[arg-type]
    inputs, labels = tensors(dataset.train)
    assert inputs.shape == (300, 1, 7, 3) and dataset.classes == ("0", "1", "2") and dataset.test is None
    assert torch.equal(inputs[:, 0, 0].argmax(1), labels) and torch.equal(inputs[:, 0, 0].sum(1), torch.ones(300))
    rest = inputs[:, 0, 1:]
    assert float(rest.std()) == pytest.approx(0.5, rel=0.03)
    means = torch.stack([rest[labels == k].mean(0) for k in range(3)])
    assert float(means.abs().max()) < 0.2  # about 4 standard errors: the rest does not depend on the label
    again, other = (copying(**keys, **{**SIZES, "seed": seed}) for seed in (0, 1))  # type: ignore[arg-type]
    assert torch.equal(tensors(again.train)[0], inputs) and not torch.equal(tensors(other.train)[0], inputs)
    longer = copying(**keys, **{**SIZES, "train_size": 400})  # type: ignore[arg-type]
    assert torch.equal(tensors(longer.val)[0], tensors(dataset.val)[0])


def test_recall_labels_the_marked_symbol() -> None:
    inputs, labels = tensors(recall(length=12, symbols=3, **SIZES).train)
    assert inputs.shape == (300, 1, 12, 4)
    symbols, marks = inputs[:, 0, :, :3], inputs[:, 0, :, 3]
    assert torch.equal(symbols.sum(2), torch.ones(300, 12)) and torch.equal(marks.sum(1), torch.ones(300))
    assert torch.equal((symbols * marks.unsqueeze(2)).sum(1).argmax(1), labels)
    assert set(marks.argmax(1).tolist()) == {0, 1, 2}  # the first quarter
    agreement = (symbols.argmax(2) == labels.unsqueeze(1)).float().mean(0)
    assert float(agreement[3:].max()) < 0.45  # chance is 1/3; later symbols do not reveal the label


def test_linear_features_have_their_ranges_and_equal_weight() -> None:
    intervals = ((1.0, 2.0), (100.0, 200.0))
    dataset = linear(intervals=intervals, noise=0.0, **SIZES)
    x, y = tensors(dataset.train)
    for column, (low, high) in zip(x.T, intervals, strict=True):
        assert low <= float(column.min()) < low + 0.05 * (high - low)
        assert high >= float(column.max()) > high - 0.05 * (high - low)
    torch.testing.assert_close(y, (2 * x[:, 0] - 3) + (x[:, 1] - 150) / 50, rtol=1e-4, atol=1e-4)
    noisy = tensors(linear(intervals=intervals, noise=0.3, **{**SIZES, "train_size": 5000}).train)
    residual = noisy[1] - (2 * noisy[0][:, 0] - 3) - (noisy[0][:, 1] - 150) / 50
    assert float(residual.std()) == pytest.approx(0.3, rel=0.04)
