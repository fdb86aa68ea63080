"""TensorBoard event files, written from its protocol buffers.

torch's SummaryWriter hands every event to a queue and a thread, whose death on a full disk raises in the training loop,
and its `add_hparams` opens a second run. Here an event is one record appended to a file, and HParams stand in the run.
"""

import io
import math
import os
import shlex
import shutil
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_STRING
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo

from dlopt.tracking.files import AppendFile
from dlopt.tracking.layout import short_path

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_FLUSH_SECONDS = 2.0
_SIDE = 512  # pixels: small images are enlarged up to this, and of large ones fewer are shown (but at least four)
_STATUS = {
    "finished": api_pb2.STATUS_SUCCESS, "stopped_early": api_pb2.STATUS_SUCCESS, "failed": api_pb2.STATUS_FAILURE
}  # fmt: skip


def _crc_of(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli's polynomial, bits reversed
    return byte


_CRC = [_crc_of(byte) for byte in range(256)]


def _masked_crc(data: bytes) -> int:
    """CRC-32C, rotated and shifted as the TFRecord format wants it."""
    table, crc = _CRC, 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def record(event: bytes) -> bytes:
    """A serialized event in TFRecord framing: length, CRC of the length, data, CRC of the data."""
    length = struct.pack("<Q", len(event))
    return length + struct.pack("<I", _masked_crc(length)) + event + struct.pack("<I", _masked_crc(event))


def _plugin(name: str, content: bytes = b"") -> SummaryMetadata:
    return SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=name, content=content))


def _histogram(values: "Tensor", bins: int = 50) -> HistogramProto:
    counts, edges = values.histogram(bins) if values.max() > values.min() else (values.new_tensor([len(values)]), None)
    limits = [float(values.max())] if edges is None else edges[1:].tolist()
    return HistogramProto(
        min=float(values.min()),
        max=float(values.max()),
        num=len(values),
        sum=float(values.sum()),
        sum_squares=float(values.square().sum()),
        bucket_limit=limits,
        bucket=counts.tolist(),
    )


class TensorBoard:
    """One run's event file in `folder`; nothing here raises because of the disk.

    `purge_step`: events of earlier files with this step or a later one are void (a resumed run writes them anew).
    """

    def __init__(self, folder: Path, complain: Callable[[str], None], *, purge_step: int | None = None) -> None:
        # TensorBoard reads a run's files in the order of their names; two in the same second must not meet.
        stamp = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns() % 10**9:09d}"
        self._file = AppendFile(folder / f"events.out.tfevents.{stamp}", complain)
        self._flushed = time.monotonic()
        self._add(file_version="brain.Event:2")
        if purge_step is not None:
            self.purge(purge_step)

    def purge(self, step: int) -> None:
        """Events so far with this step or a later one are void."""
        self._add(step=step, session_log=SessionLog(status=SessionLog.START))

    def _add(self, *values: Summary.Value, **fields: Any) -> None:
        if values:
            fields["summary"] = Summary(value=values)
        self._file.write(record(Event(wall_time=time.time(), **fields).SerializeToString()))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One event with all the values; written out at the latest two seconds later, at the next call."""
        self._add(*(Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()), step=step)
        now = time.monotonic()
        if now - self._flushed > _FLUSH_SECONDS:
            self._flushed = now
            self._file.flush()

    def images(self, tag: str, step: int, images: "Tensor") -> None:
        """[B, C, H, W] as one grid (see `image_grid`)."""
        picture = image_grid(images)
        file = io.BytesIO()
        picture.save(file, "PNG")
        image = Summary.Image(
            height=picture.height, width=picture.width, colorspace=3, encoded_image_string=file.getvalue()
        )
        self._add(Summary.Value(tag=tag, image=image), step=step)

    def histograms(self, step: int, values: Mapping[str, "Tensor"]) -> None:
        """One event with the distribution of each tensor's finite values in 50 bins."""
        finite = {tag: tensor[tensor.isfinite()].double().cpu() for tag, tensor in values.items()}
        self._add(*(Summary.Value(tag=tag, histo=_histogram(t)) for tag, t in finite.items() if t.numel()), step=step)

    def config(self, config: Mapping[str, Any], hparams: Mapping[str, str | bool | float]) -> None:
        """The config as text, and its flat form as this run's HParams.

        No experiment summary is written: TensorBoard then gathers the columns from all the runs below its folder, where
        with one it would take those of the first run only, and the runs of a sweep need not have the same keys.
        """
        text = f"```yaml\n{yaml.safe_dump(dict(config), sort_keys=False, default_flow_style=None, width=100)}```"
        one = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=one)
        self._add(Summary.Value(tag="config", metadata=_plugin("text"), tensor=tensor), step=0)
        start = SessionStartInfo(start_time_secs=time.time())
        for key, item in hparams.items():
            kind = "bool" if isinstance(item, bool) else "string" if isinstance(item, str) else "number"
            setattr(start.hparams[key], f"{kind}_value", item)
        self._hparams("_hparams_/session_start_info", HParamsPluginData(version=0, session_start_info=start))
        self.flush()

    def end(self, status: str) -> None:
        """Close the HParams session; `status` as in summary.json."""
        info = SessionEndInfo(status=_STATUS.get(status, api_pb2.STATUS_UNKNOWN), end_time_secs=time.time())
        self._hparams("_hparams_/session_end_info", HParamsPluginData(version=0, session_end_info=info))

    def _hparams(self, tag: str, data: HParamsPluginData) -> None:
        # The tensor carries nothing; TensorBoard only requires one.
        empty = TensorProto(dtype=DT_FLOAT, tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=0)]))
        self._add(Summary.Value(tag=tag, metadata=_plugin("hparams", data.SerializeToString()), tensor=empty))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def image_grid(images: "Tensor") -> "Image":
    """[B, C, H, W] -> a picture of at most 64 images in a square grid, one pixel of border between them.

    uint8 is taken as 0..255; float as 0..1, or, where values lie outside (normalized input), stretched from the
    0.2 % to the 99.8 % quantile of what is shown. One or three channels; of any other number the first is shown.
    """
    from PIL import Image

    batch, channels, height, width = images.shape
    columns = min(max(_SIDE // max(height, width), 2), 8, math.ceil(math.sqrt(batch)))
    rows = min(columns, math.ceil(batch / columns))
    shown = images[: rows * columns].detach().cpu()
    if channels not in (1, 3):
        shown = shown[:, :1]
    shown = _to_uint8(shown).permute(0, 2, 3, 1)

    picture = Image.new("RGB", (columns * (width + 1) - 1, rows * (height + 1) - 1), "white")
    for index, pixels in enumerate(shown.numpy()):
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        picture.paste(image, (index % columns * (width + 1), index // columns * (height + 1)))
    enlarge = _SIDE // max(picture.size)
    if enlarge > 1:
        picture = picture.resize((picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST)
    elif max(picture.size) > 2 * _SIDE:
        picture.thumbnail((2 * _SIDE, 2 * _SIDE))
    return picture


def _to_uint8(images: "Tensor") -> "Tensor":
    import torch

    if images.dtype == torch.uint8:
        return images
    images = images.float().nan_to_num(0.0, 0.0, 0.0)
    if images.numel() and (images.min() < 0 or images.max() > 1):
        ordered = images.flatten().sort().values
        last = ordered.numel() - 1
        low, high = ordered[round(0.002 * last)], ordered[round(0.998 * last)]
        images = (images - low) / (high - low).clamp(min=1e-12)
    return (images.clamp(0, 1) * 255).round().byte()


def command(folder: Path) -> str:
    """The line that shows `folder` in TensorBoard, to be pasted into a shell in the current folder."""
    beside = Path(sys.executable).with_name("tensorboard")
    found = shutil.which("tensorboard")
    if found and (not beside.exists() or Path(found).resolve() == beside.resolve()):
        program = "tensorboard"
    elif beside.exists():
        program = shlex.quote(short_path(beside))
    else:
        program = f"{shlex.quote(short_path(Path(sys.executable)))} -m tensorboard.main"
    return f"{program} --logdir {shlex.quote(short_path(folder))}"
