"""Writes TensorBoard event files from TensorBoard's protocol buffers.

torch's SummaryWriter passes events to a thread; on a full disk that thread dies, which raises in the training loop. Its
`add_hparams` opens a second run. Here an event is a record appended to a file, and HParams belong to the run itself.
"""

import io
import math
import os
import re
import shlex
import shutil
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_STRING
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo

from dlopt.basics.errors import UserError
from dlopt.basics.folders import short_path
from dlopt.basics.plain_values import read_regular
from dlopt.tracking.metrics import AppendFile

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_FLUSH_SECONDS = 2.0
_MAX_EVENTS = 1 << 30  # bytes of an event file
_SIDE = 512  # pixels of a grid: small images are enlarged, of large ones fewer are shown (but at least four)
_STATUS = {
    "finished": api_pb2.STATUS_SUCCESS, "stopped_early": api_pb2.STATUS_SUCCESS, "failed": api_pb2.STATUS_FAILURE
}  # fmt: skip


def _crc_of_byte(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli's polynomial, bits reversed
    return byte


_CRC_TABLE = [_crc_of_byte(byte) for byte in range(256)]


def _masked_crc(data: bytes) -> int:
    """Returns the CRC-32C in the masked form of the TFRecord format (rotated by 15 bits plus a constant)."""
    table, crc = _CRC_TABLE, 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def record(event: bytes) -> bytes:
    """Frames a serialized event as a TFRecord: length, CRC of the length, data, CRC of the data."""
    # Not tensorboard's RecordWriter: its import takes 0.5 s of CPU time, and an event 28 µs instead of 22 µs.
    length = struct.pack("<Q", len(event))
    return length + struct.pack("<I", _masked_crc(length)) + event + struct.pack("<I", _masked_crc(event))


def read_scalars(folder: Path) -> list[dict[str, float]]:
    """Reads the scalars of a run from its event files: one dict per update, with `step` and a value per tag.

    As TensorBoard does, drops what a resumed run has written again, and stops at a file's first incomplete record.
    Raises `UserError` for an unreadable file.
    """
    scalars: dict[int, dict[str, float]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in _events(path):
            if event.session_log.status == SessionLog.START:
                scalars = {step: values for step, values in scalars.items() if step < event.step}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    scalars.setdefault(event.step, {})[value.tag] = value.simple_value
    return [{"step": step, **scalars[step]} for step in sorted(scalars)]


def _events(path: Path) -> Iterator[Event]:
    """Yields the events of a file in the format of `record`; does not verify the CRCs."""
    try:
        data = read_regular(path, _MAX_EVENTS)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{short_path(path)}: cannot be read: {reason}") from None
    start = 0
    while start + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        start, end = start + 12, start + 12 + length
        if end + 4 > len(data):
            return
        try:
            event = Event.FromString(data[start:end])
        except DecodeError:
            return
        yield event
        start = end + 4


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


_SECOND = re.compile(r"events\.out\.tfevents\.(\d{10})\.")


class TensorBoard:
    """The event file of a run in `folder`. Disk errors never raise.

    `purge_step`: TensorBoard discards events of earlier files from this step on (a resumed run writes them again).
    """

    def __init__(self, folder: Path, warn: Callable[[str], None], *, purge_step: int | None = None) -> None:
        # TensorBoard reads a run's files in the order of their names: a second file in the same second, or after the
        # clock was set back, would come before the first.
        matches = [_SECOND.match(path.name) for path in folder.glob("events.out.tfevents.*")]
        second = max([int(time.time()), *(int(match[1]) + 1 for match in matches if match is not None)])
        stamp = f"{second:010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns() % 10**9:09d}"
        self._file = AppendFile(folder / f"events.out.tfevents.{stamp}", warn)
        self._flushed = time.monotonic()
        self._add(file_version="brain.Event:2")
        if purge_step is not None:
            self._add(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def _add(self, *values: Summary.Value, **fields: Any) -> None:
        if values:
            fields["summary"] = Summary(value=values)
        self._file.write(record(Event(wall_time=time.time(), **fields).SerializeToString()))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one event with all values; flushes if the last flush was more than two seconds ago."""
        tags = {tag.encode(errors="backslashreplace"): value for tag, value in values.items()}  # names of classes
        self._add(*(Summary.Value(tag=tag, simple_value=value) for tag, value in tags.items()), step=step)
        now = time.monotonic()
        if now - self._flushed > _FLUSH_SECONDS:
            self._flushed = now
            self._file.flush()

    def images(self, tag: str, step: int, images: "Tensor") -> None:
        """Adds images [B, C, H, W] as one grid (see `image_grid`)."""
        grid = image_grid(images)
        file = io.BytesIO()
        grid.save(file, "PNG")
        image = Summary.Image(height=grid.height, width=grid.width, colorspace=3, encoded_image_string=file.getvalue())
        self._add(Summary.Value(tag=tag, image=image), step=step)

    def histograms(self, step: int, values: Mapping[str, "Tensor"]) -> None:
        """Adds one event with a histogram of each tensor's finite values in 50 bins."""
        # Waits for the device, only in the updates that diagnostics observe.
        finite = {tag: tensor[tensor.isfinite()].double().cpu() for tag, tensor in values.items()}
        self._add(*(Summary.Value(tag=tag, histo=_histogram(t)) for tag, t in finite.items() if t.numel()), step=step)

    def config(self, config: Mapping[str, Any], hparams: Mapping[str, str | bool | float]) -> None:
        """Adds the config as text and as the run's HParams.

        Writes no experiment summary: with one, TensorBoard would show the columns of the first run only. Without, it
        collects them from all runs, and the runs of a sweep need not have the same keys.
        """
        text = f"```yaml\n{yaml.safe_dump(dict(config), sort_keys=False, default_flow_style=None, width=100)}```"
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=shape)
        self._add(Summary.Value(tag="config", metadata=_plugin("text"), tensor=tensor), step=0)
        start = SessionStartInfo(start_time_secs=time.time())
        for key, value in hparams.items():
            kind = "bool" if isinstance(value, bool) else "string" if isinstance(value, str) else "number"
            setattr(start.hparams[key], f"{kind}_value", value)
        self._hparams("_hparams_/session_start_info", HParamsPluginData(version=0, session_start_info=start))
        self.flush()

    def end(self, status: str) -> None:
        """Closes the HParams session; `status`: as in summary.json."""
        info = SessionEndInfo(status=_STATUS.get(status, api_pb2.STATUS_UNKNOWN), end_time_secs=time.time())
        self._hparams("_hparams_/session_end_info", HParamsPluginData(version=0, session_end_info=info))

    def _hparams(self, tag: str, data: HParamsPluginData) -> None:
        # The data are in the metadata; TensorBoard requires a tensor nevertheless.
        empty = TensorProto(dtype=DT_FLOAT, tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=0)]))
        self._add(Summary.Value(tag=tag, metadata=_plugin("hparams", data.SerializeToString()), tensor=empty))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def image_grid(images: "Tensor") -> "Image":
    """Draws at most 64 images [B, C, H, W] in a square grid with one pixel of border between them.

    uint8 is shown as 0..255 and float as 0..1. If float values are outside (normalized inputs), the range from the
    0.2 % to the 99.8 % quantile is stretched. Other than one or three channels: only the first is shown.
    """
    from PIL import Image

    batch, channels, height, width = images.shape
    columns = min(max(_SIDE // max(height, width), 2), 8, math.ceil(math.sqrt(batch)))
    rows = min(columns, math.ceil(batch / columns))
    shown = images[: rows * columns].detach().cpu()
    if channels not in (1, 3):
        shown = shown[:, :1]
    shown = _to_uint8(shown).permute(0, 2, 3, 1)

    grid = Image.new("RGB", (columns * (width + 1) - 1, rows * (height + 1) - 1), "white")
    for index, pixels in enumerate(shown.numpy()):
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        grid.paste(image, (index % columns * (width + 1), index // columns * (height + 1)))
    scale = _SIDE // max(grid.size)
    if scale > 1:
        grid = grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)
    elif max(grid.size) > 2 * _SIDE:
        grid.thumbnail((2 * _SIDE, 2 * _SIDE))
    return grid


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
    """Returns the shell command that shows `folder` in TensorBoard, for the current folder.

    Prefers the tensorboard of this environment over another one on the PATH.
    """
    own = Path(sys.executable).with_name("tensorboard")
    on_path = shutil.which("tensorboard")
    if on_path and (not own.exists() or Path(on_path).resolve() == own.resolve()):
        program = "tensorboard"
    elif own.exists():
        program = shlex.quote(short_path(own))
    else:
        program = f"{shlex.quote(short_path(Path(sys.executable)))} -m tensorboard.main"
    return f"{program} --logdir {shlex.quote(short_path(folder))}"
