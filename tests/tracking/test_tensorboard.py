import io
import math
import os
import shlex
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as PluginEventAccumulator,
)
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.plugins.hparams import metadata

from dlopt.basics.errors import UserError
from dlopt.tracking.tensorboard import TensorBoard, command, image_grid, read_scalars, record
from dlopt.tracking.tracking import Tracking


def no_complaint(text: str) -> None:
    raise AssertionError(text)


def read(folder: Path) -> Any:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def test_record_framing_equals_tensorboards() -> None:
    for size in (0, 1, 255, 4096):
        data = bytes(index * 7 % 256 for index in range(size))
        length = struct.pack("<Q", size)
        framed = length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
        assert record(data) == framed


def test_scalars_are_read_back_against_the_step(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, no_complaint)
    for step in (5, 10):
        board.scalars(step, {"train/loss": 1 / step, "lr": 0.1})
    board.scalars(12, {"val/accuracy": 0.5, "val/loss": math.nan})
    board.close()
    events = read(tmp_path)
    assert set(events.Tags()["scalars"]) == {"train/loss", "lr", "val/accuracy", "val/loss"}
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("train/loss")] == [(5, 0.2), (10, 0.1)]
    assert math.isnan(events.Scalars("val/loss")[0].value)


def test_tag_that_is_not_utf_8(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, no_complaint)
    board.scalars(1, {"val/class_accuracy/caf\udce9": 0.5})
    board.close()
    assert read(tmp_path).Tags()["scalars"] == ["val/class_accuracy/caf\\udce9"]


def test_resume_purges_events_after_the_checkpoint(tmp_path: Path) -> None:
    first = TensorBoard(tmp_path, no_complaint)
    for step in (10, 20, 30, 40):
        first.scalars(step, {"train/loss": 1.0, "only/once": 1.0})
    first.close()
    second = TensorBoard(tmp_path, no_complaint, purge_step=21)
    second.scalars(30, {"train/loss": 2.0})
    second.close()
    events = read(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 1.0), (20, 1.0), (30, 2.0)]
    assert [e.step for e in events.Scalars("only/once")] == [10, 20]


def test_a_resumed_run_is_read_last_also_if_the_clock_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, clock in enumerate([2e9, 2e9, 1e9, 3e9, 2e9]):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        board = TensorBoard(tmp_path, no_complaint, purge_step=1 + number)
        board.scalars(1 + number, {"train/loss": number})
        board.close()
    assert [(e.step, e.value) for e in read(tmp_path).Scalars("train/loss")] == [(1 + i, i) for i in range(5)]
    assert [(line["step"], line["train/loss"]) for line in read_scalars(tmp_path)] == [(1 + i, i) for i in range(5)]


def test_own_reader_agrees_with_tensorboards(tmp_path: Path) -> None:
    for i, (purge, steps) in enumerate([(None, (10, 20, 30, 40)), (21, (30, 50)), (41, (60,))]):
        board = TensorBoard(tmp_path, no_complaint, purge_step=purge)
        board.config({"seed": 0}, {"seed": 0.0})
        for step in steps:
            board.scalars(step, {"train/loss": step + i / 8, f"of/{i}": 1.0})
        board.images("train/images", 50, torch.zeros(1, 1, 8, 8))
        board.close()
    newest = max(tmp_path.iterdir())
    newest.write_bytes(newest.read_bytes() + record(b"an incomplete record")[:-6])
    events = read(tmp_path)
    tags = events.Tags()["scalars"]
    theirs = {(tag, event.step, event.value) for tag in tags for event in events.Scalars(tag)}
    ours = {(tag, line["step"], value) for line in read_scalars(tmp_path) for tag, value in line.items()}
    assert {each for each in ours if each[0] != "step"} == theirs
    assert [line["step"] for line in read_scalars(tmp_path)] == [10, 20, 30, 60]


def test_reader_of_untrusted_files(tmp_path: Path) -> None:
    assert read_scalars(tmp_path / "nowhere") == []
    path = tmp_path / "events.out.tfevents.1"
    for data in (b"", b"x", b"\xff" * 100, record(b"\xff\xff no event")):
        path.write_bytes(data)
        assert read_scalars(tmp_path) == []
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"events\.out\.tfevents\.1: cannot be read: is not a regular file"):
        read_scalars(tmp_path)


def test_config_and_hparams_are_in_the_same_run(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, no_complaint)
    hparams: dict[str, str | bool | float] = {"optimizer": "sgd", "optimizer.lr": 0.1, "compile": False, "seed": 0}
    board.config({"optimizer": {"lr": 0.1}, "seed": 0}, hparams)
    board.scalars(10, {"test/accuracy": 0.9})
    board.end("finished")
    board.close()
    assert [path.is_file() for path in tmp_path.iterdir()] == [True], "one file, no folder of a second run"

    events = PluginEventAccumulator(str(tmp_path))
    events.Reload()
    text = events.Tensors("config")[0].tensor_proto.string_val[0].decode()
    assert text == "```yaml\noptimizer: {lr: 0.1}\nseed: 0\n```"
    assert "test/accuracy" in events.Tags()["tensors"]
    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    start = metadata.parse_session_start_info_plugin_data(content)
    read_back = {key: getattr(value, value.WhichOneof("kind")) for key, value in start.hparams.items()}
    assert read_back == hparams
    assert isinstance(read_back["compile"], bool)
    content = events.SummaryMetadata(metadata.SESSION_END_INFO_TAG).plugin_data.content
    assert metadata.parse_session_end_info_plugin_data(content).status == 1  # STATUS_SUCCESS


def test_images_are_read_back(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, no_complaint)
    board.images("train/images", 0, torch.zeros(9, 1, 8, 8, dtype=torch.uint8))
    board.close()
    image = read(tmp_path).Images("train/images")[0]
    picture = Image.open(io.BytesIO(image.encoded_image_string))
    assert picture.size == (image.width, image.height)


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (5, 3, 32, 32), (200, 3, 32, 32), (64, 2, 28, 28), (64, 3, 224, 224)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_grid_size_is_limited(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    picture = image_grid(torch.randint(0, 255, shape).to(dtype))
    assert max(picture.size) <= 1024
    assert max(picture.size) >= 64


def test_grid_shows_the_pixels_in_order() -> None:
    levels = torch.tensor([0, 80, 160, 240], dtype=torch.uint8)
    expected = [int(level) for level in levels]
    for images in (levels, levels.float() / 255):
        picture = image_grid(images.view(4, 1, 1, 1).expand(4, 3, 200, 200))
        at = [picture.getpixel(point) for point in ((0, 0), (201, 0), (0, 201), (201, 201))]
        assert at == [(level,) * 3 for level in expected]


def test_normalized_images_are_stretched_not_clipped() -> None:
    ramp = torch.linspace(-2, 2, 64 * 64).view(1, 1, 64, 64)
    levels = torch.tensor(list(image_grid(ramp).convert("L").tobytes()))
    assert levels.min() == 0
    assert levels.max() == 255
    assert abs(levels.float().mean() - 127.5) < 2
    broken = ramp.clone()
    broken[0, 0, 0, 0] = math.nan
    image_grid(broken)


def test_command_survives_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command(tmp_path / "a run's folder"))
    assert words[-2:] == ["--logdir", "a run's folder"]
    assert "tensorboard" in words[0] or words[1:3] == ["-m", "tensorboard.main"]


def test_the_first_cards_show_the_best_epoch_so_far(tmp_path: Path) -> None:
    with Tracking(tmp_path, sinks=["tensorboard"], console=False) as tracking:
        for epoch, (accuracy, best) in enumerate([(0.5, 0.5), (0.25, 0.5), (0.75, 0.75)], 1):
            so_far = {"val_accuracy": best, "val_loss": 1 - best}
            tracking.epoch({"epoch": epoch, "step": epoch, "val_accuracy": accuracy, "val_loss": 0.1}, best=so_far)
        tracking.epoch({"epoch": 4, "step": 4, "val_loss": 0.1}, best={"val_accuracy": None, "val_loss": 0.1})
    lines = read_scalars(tmp_path / "tensorboard")
    assert [line.get("best/val_accuracy") for line in lines] == [0.5, 0.5, 0.75, None]
    assert sorted(lines[0])[:2] == ["best/val_accuracy", "best/val_loss"]
