"""`dlopt export`: a trained model as a file for other tools."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import dlopt
from dlopt.config.compose import resolve_saved
from dlopt.config.saved import refuse_others, take_path, typed_values, with_changes
from dlopt.config.schema import check_arguments
from dlopt.errors import RunError, UserError
from dlopt.extras import install
from dlopt.job import DONE
from dlopt.tracking.layout import short_path

if TYPE_CHECKING:
    from torch import Tensor

    from dlopt.train.restore import Trained

_MAY_CHANGE = ("data", "threads", "allow_packages")
_USAGE = """\
dlopt export checkpoint=PATH format=safetensors|onnx|torch_export [output=FILE] [input=uint8|float32] [data.root=...]

Writes the model in a checkpoint (outputs/NAME/DATE/checkpoints/best.pt) together with its input normalization, in
fp32: it takes batches of images with values 0..255, of any batch size and of the size that the model sees, and gives
outputs before the softmax. The file is read again and its outputs are compared with the model's on images of the test
set.

  format=safetensors   tensors model.* and normalize.*; classes, input and config stand in the file's metadata
  format=onnx          one graph; needs onnx and onnxscript, and onnxruntime for the comparison
  format=torch_export  a program that torch.export.load reads without dlopt
  input=TYPE           of the images; the data's own where nothing is typed
  output=FILE          (NAME of the checkpoint with the format's ending, in the run folder)"""

_IMAGES = 16
_TOLERANCE = 1e-4  # times the largest output: fp32 sums in another order


@dataclass(frozen=True, kw_only=True)
class _Own:
    """The keys of this command alone."""

    format: Literal["safetensors", "onnx", "torch_export"]
    output: str | None = None
    input: Literal["uint8", "float32"] | None = None


def export(arguments: list[str]) -> int:
    """Writes the file and compares it. Raises `UserError`, and `RunError` when the model cannot be converted."""
    if {"-h", "--help"} & set(arguments):
        print(_USAGE)
        return DONE
    values = typed_values(arguments)
    path = take_path(values, "export")
    own = _Own(**check_arguments("", _Own, {key: values.pop(key) for key in _OWN if key in values}))
    refuse_others(values, _MAY_CHANGE, _OWN)

    from dlopt.commands import exporting
    from dlopt.train.restore import restore

    exporting.check_installed(own.format)
    output = _output(own, path, exporting.SUFFIXES[own.format])
    trained = restore(path, {**values, "precision": "fp32", "device": "cpu"})
    inputs, source = _inputs(trained, values, path)
    inputs = _typed(inputs, own.input)
    kind = str(inputs.dtype).removeprefix("torch.")
    metadata: dict[str, Any] = {
        "classes": trained.classes,
        "input": {"shape": list(trained.window), "type": kind},
        "config": trained.config,
        "dlopt": dlopt.__version__,
    }
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        exporting.write(own.format, trained, inputs[:2], metadata, temporary)
        verdict = _compare(exporting.read(own.format, temporary, trained, inputs), trained, inputs, source, own.format)
        os.replace(temporary, output)
    except OSError as error:
        raise UserError(f"output={output}: cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    print(short_path(output))
    print(f"input: {kind} [batch, {', '.join(map(str, trained.window))}]")
    print(verdict)
    return DONE


_OWN = ("format", "output", "input")


def _output(own: _Own, checkpoint: Path, suffix: str) -> Path:
    if own.output is None:
        run = checkpoint.absolute().parent.parent
        folder = run if (run / "config.yaml").is_file() else checkpoint.parent
        return folder / f"{checkpoint.stem}{suffix}"
    path = Path(own.output)
    if path.is_dir():
        raise UserError(f"output={own.output}: this is a folder; name a file in it")
    return path if path.suffix else path.with_suffix(suffix)


def _inputs(trained: "Trained", overrides: Mapping[str, Any], path: Path) -> tuple["Tensor", str]:
    """Samples to compare on, cut to the model's window, and what they are: of the data, or random where these are
    not there."""
    import torch

    from dlopt.augment.pipeline import CentreCrop
    from dlopt.config.parsing import parse
    from dlopt.data.samples import Dataset
    from dlopt.data.splits import prepare

    experiment = parse(resolve_saved(with_changes(trained.config, overrides, path)))
    try:
        source: Dataset = experiment.data.build(**vars(experiment.data_settings))
        dataset = prepare(source, replace(experiment.data_settings, memory=False))
        samples = dataset.test if dataset.test is not None else dataset.train
        inputs = samples.fetch(torch.linspace(0, len(samples) - 1, min(_IMAGES, len(samples))).long())
        if tuple(inputs.shape[1:]) != trained.sample:
            raise UserError(f"data: samples of shape {list(inputs.shape[1:])}, not {list(trained.sample)}")
        what = f"{len(inputs)} samples of the {'training' if dataset.test is None else 'test'} set"
    except UserError as error:
        if any(key.startswith("data.") for key in overrides):  # then they are meant to be there
            raise
        draws = torch.Generator().manual_seed(0)
        inputs = torch.randint(256, (_IMAGES, *trained.sample), generator=draws, dtype=torch.uint8)
        if len(trained.sample) == 1:
            inputs = inputs / 255
        what = f"{_IMAGES} random samples, for the data cannot be read ({error})"
    if trained.window != trained.sample:
        inputs, _ = CentreCrop(trained.window)(inputs, inputs)
    return inputs.contiguous(), what


def _typed(inputs: "Tensor", wanted: str | None) -> "Tensor":
    import torch

    if wanted == "uint8" and inputs.dtype != torch.uint8:
        raise UserError("input=uint8: the data are floating-point numbers; use input=float32")
    return inputs.float() if wanted == "float32" else inputs


def _compare(found: "Tensor | None", trained: "Trained", inputs: "Tensor", source: str, form: str) -> str:
    import torch

    if found is None:
        return f"not compared with the model: that needs onnxruntime; {install('dlopt[export]')}"
    with torch.inference_mode():
        expected = trained.module(trained.normalize(inputs))
    error = (found - expected).abs().max().item()
    if not error <= _TOLERANCE * max(expected.abs().max().item(), 1.0):
        raise RunError(f"format={form}: the file's outputs differ from the model's by {error:.2g}; nothing was written")
    return f"equal to the model within {error:.1g} on {source}"
