"""Records as rows of bytes."""

import torch

from dlopt.data.rows.records import Records, are_records
from dlopt.tasks.layout import Layout


def test_bytes_are_exact_for_all_types() -> None:
    record = {
        "flag": torch.tensor(True),
        "long": torch.tensor([2**62 + 1, -3]),
        "half": torch.randn(2, 3).half(),
        "wide": torch.randn(5, dtype=torch.float64),
        "byte": torch.tensor([[255]], dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
    }
    layout = Layout.of(record, "dict")
    rows = torch.stack([layout.pack(record), layout.pack({name: each.clone() for name, each in record.items()})])
    assert rows.dtype == torch.uint8 and rows.shape == (2, layout.bytes) == (2, 1 + 16 + 12 + 40 + 1)
    unpacked = layout.unpack(rows[torch.tensor([1, 0])], torch.float64)
    assert list(unpacked) == list(record)
    for name, expected in record.items():
        found = unpacked[name]
        dtype = torch.float64 if expected.is_floating_point() else expected.dtype
        assert found.dtype == dtype and torch.equal(found, torch.stack([expected, expected]).to(dtype)), name


def test_pairs_are_no_records() -> None:
    image = torch.zeros(3)
    assert are_records([{"x": image}]) and are_records([(image, 1, 2)])
    assert not are_records([(image, 1)]) and not are_records([image]) and not are_records([])


def test_selects() -> None:
    records = Records([{"x": torch.tensor([float(i)])} for i in range(5)], "data.train")
    rows = records.select(torch.tensor([3, 1])).fetch(torch.tensor([1, 0]))
    assert records.layout.unpack(rows, torch.float32)["x"].flatten().tolist() == [1.0, 3.0]
