import hashlib
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from dlopt.basics.errors import UserError
from dlopt.data.images.digits import digit_pairs, digits, shaded_digits
from dlopt.data.samples import InMemory, Samples
from dlopt.data.splits import DataSettings, prepare


def test_digits_match_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    ours, theirs = digits(), load_digits()
    assert isinstance(ours.train, InMemory) and isinstance(ours.test, InMemory)
    inputs = torch.cat([ours.train.inputs, ours.test.inputs])
    targets = torch.cat([ours.train.targets, ours.test.targets])
    assert inputs.shape == (1797, 1, 8, 8) and inputs.dtype == torch.uint8 and ours.classes == tuple("0123456789")
    rows = {(bytes(image.flatten().tolist()), int(label)) for image, label in zip(inputs, targets, strict=True)}
    scaled = (torch.from_numpy(theirs.images) * 255 / 16).round().to(torch.uint8)
    expected = {
        (bytes(image.flatten().tolist()), int(label)) for image, label in zip(scaled, theirs.target, strict=True)
    }
    assert rows == expected and len(rows) == 1797


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_the_test_split_is_fixed_and_stratified(settings: Callable[..., DataSettings], seed: int) -> None:
    """The hash ensures that test metrics of all versions can be compared."""
    parts = prepare(digits(), settings(split_seed=seed, val_split=0.1))
    assert isinstance(parts.test, InMemory)
    digest = hashlib.sha256(parts.test.inputs.numpy().tobytes() + parts.test.targets.numpy().tobytes()).hexdigest()
    assert digest == "9e7b638abe2c9e6883c2f1cf614903abc8a2cafc0751212893b2f1dd8d60beec"
    counts = torch.bincount(parts.test.targets)
    whole = counts + torch.bincount(digits().train.targets)
    assert len(parts.test) == 359 and ((counts - 0.2 * whole).abs() <= 1).all()


def test_pairs_of_digits() -> None:
    """Each half of an image is a digit of the pool of its split, and the labels are those of the two halves."""
    data, source = digit_pairs(train_size=200, val_size=50, test_size=60), digits()
    assert isinstance(source.train, InMemory) and isinstance(source.test, InMemory)
    assert data.classes == source.classes and data.task.kind == "multi-label" and data.task.outputs == 10

    def halves(samples: Samples) -> set[bytes]:
        assert isinstance(samples, InMemory) and samples.shape == (1, 8, 16)
        return {half.numpy().tobytes() for image in samples.inputs for half in image[0].split(8, 1)}

    known = {image.numpy().tobytes(): int(label) for image, label in zip(
        torch.cat([source.train.inputs, source.test.inputs]), torch.cat([source.train.targets, source.test.targets]),
        strict=True,
    )}  # fmt: skip
    splits = [data.train, data.val, data.test]
    for samples in splits:
        assert isinstance(samples, InMemory) and samples.targets.dtype == torch.float32
        for image, target in zip(samples.inputs, samples.targets, strict=True):
            found = {known[half.contiguous().numpy().tobytes()] for half in image[0].split(8, 1)}
            assert found == set(target.nonzero().flatten().tolist()) and target.sum() == len(found)
    train, val, test = (halves(samples) for samples in splits if samples is not None)
    assert not train & val and not (train | val) & test
    assert test <= {image.numpy().tobytes() for image in source.test.inputs}
    again = digit_pairs(train_size=200, val_size=0, test_size=0)
    assert again.val is None and again.test is None
    assert isinstance(again.train, InMemory) and isinstance(data.train, InMemory)
    assert torch.equal(again.train.inputs, data.train.inputs)


def test_neither_scikit_learn_nor_torchvision_is_imported() -> None:
    heavy = "{'sklearn', 'torchvision', 'PIL'}"
    code = f"import sys; from dlopt.data.images.digits import digits; digits(); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"data=digits: .*pip install scikit-learn"):
        digits()


def test_shaded_digits_differ_by_a_gradient_of_light() -> None:
    """Without the digit, an image is a plane; everything is reproducible and within 0..255."""
    plain, shaded, again = digits(), shaded_digits(), shaded_digits()
    for name in ("train", "test"):
        before, after = getattr(plain, name), getattr(shaded, name)
        assert torch.equal(after.targets, before.targets) and torch.equal(after.inputs, getattr(again, name).inputs)
        light = after.inputs.double() - 0.4 * before.inputs
        axis = torch.linspace(-1, 1, 8).double()
        rows, columns = axis.repeat_interleave(8), axis.repeat(8)
        basis = torch.stack([torch.ones(64).double(), columns, rows], 1)
        slopes = torch.linalg.lstsq(basis, light.flatten(1).T).solution
        assert (basis @ slopes - light.flatten(1).T).abs().max() < 1.1  # rounding
        assert (slopes[0] - 76.5).abs().max() < 0.5 and slopes[1:].std() > 20
