"""`dlopt export`: exports a trained model with its input normalization."""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import dlopt
from dlopt.command_line.line import on_checkpoint, read_dataset, refuse_folder, saved_experiment, writing
from dlopt.errors import DONE, UserError, install
from dlopt.files import temporary_sibling, write_atomically
from dlopt.job import print_error
from dlopt.tracking.layout import short_path

if TYPE_CHECKING:
    from torch import Tensor

    from dlopt.training.restore import Trained

USAGE = """\
Export a checkpoint for other tools

Usage: dlopt export checkpoint=PATH format=FORMAT [key=value]

Examples:
  dlopt export checkpoint=outputs/train/DATE/checkpoints/best.pt format=onnx

Exports the fp32 model together with its input normalization. Inputs: images with values 0..255 in the size of the
training, any batch size; of a text: tokens, whose tokenizer is written to NAME.tokenizer.json. Outputs: logits.
Verifies the file: compares its outputs with the model's on test images.

  format=safetensors :: tensors model.* and normalize.*; classes, input shape and config in the metadata
  format=onnx :: an ONNX graph; requires onnx and onnxscript, and onnxruntime for the verification
  format=torch_export :: a program for torch.export.load, which does not need dlopt
  checkpoint=PATH :: a checkpoint, or a run folder: its best.pt, or else last.pt
  {export}
  data.root=DIR :: location of the test images for the verification
"""

_READS = ("data", "threads", "allow_packages")
_IMAGES = 16  # for the verification
_FORMATS = {  # suffix, and the packages that writing it needs
    "safetensors": (".safetensors", ["safetensors"]),
    "onnx": (".onnx", ["onnx", "onnxscript"]),
    "torch_export": (".pt2", []),
}


@on_checkpoint("export", _READS)
def export(
    path: Path,
    changes: dict[str, Any],
    *,
    format: Annotated[Literal["safetensors", "onnx", "torch_export"], "NAME: one of those above"],
    output: Annotated[
        str | None,
        "FILE: output file (default: NAME of the checkpoint with the suffix of the format, in the run folder)",
    ] = None,
    input: Annotated[
        Literal["uint8", "float32"] | None, "uint8|float32: type of the images (default: that of the data set)"
    ] = None,
) -> int:
    """Writes and verifies the file. Raises `UserError`; `RunError` if the model cannot be converted."""
    from dlopt.training.exporting import verify, write
    from dlopt.training.restore import restore

    suffix, packages = _FORMATS[format]
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        raise UserError(f"format={format}: requires {names}; {install('dlopt[export]')}")
    target = _target(output, path, suffix)
    trained = restore(path, {**changes, "precision": "fp32", "device": "cpu"})
    if trained.warning is not None:
        print_error(trained.warning)
    inputs, source = _inputs(trained, changes, path)
    inputs = _convert(inputs, input)
    dtype = str(inputs.dtype).removeprefix("torch.")
    metadata: dict[str, Any] = {
        "classes": trained.classes,
        "input": {"shape": list(trained.window), "type": dtype},
        "config": trained.config,
        "dlopt": dlopt.__version__,
    }
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_sibling(target) as temporary:
            write(format, trained, inputs[:2], metadata, temporary)
            difference = verify(format, temporary, trained, inputs)
            os.replace(temporary, target)
        if trained.tokenizer is not None:
            write_atomically(_tokenizer_file(target), trained.tokenizer.description.encode())
    print(short_path(target))
    if trained.tokenizer is not None:
        print(f"tokenizer: {short_path(_tokenizer_file(target))}")
    print(f"input: {dtype} [batch, {', '.join(map(str, trained.window))}]")
    if difference is None:
        print(f"not verified: requires onnxruntime; {install('dlopt[export]')}")
    else:
        print(f"verified: outputs match the model's within {difference:.1g} on {source}")
    return DONE


def _target(output: str | None, checkpoint: Path, suffix: str) -> Path:
    if output is None:
        run = checkpoint.absolute().parent.parent
        folder = run if (run / "config.yaml").is_file() else checkpoint.parent
        return folder / f"{checkpoint.stem}{suffix}"
    path = refuse_folder(Path(output))
    return path if path.suffix else path.with_suffix(suffix)


def _tokenizer_file(target: Path) -> Path:
    return target.with_name(f"{target.stem}.tokenizer.json")


def _inputs(trained: "Trained", changes: Mapping[str, Any], path: Path) -> tuple["Tensor", str]:
    """Returns samples [N, *window] for the verification and their description; random ones if the data is missing."""
    import torch

    from dlopt.augment.pipeline import CentreCrop

    experiment = saved_experiment(trained.config, changes, path)
    try:
        tokenizer = None if trained.tokenizer is None else trained.tokenizer.description
        dataset = read_dataset(experiment, saved_tokenizer=tokenizer)
        samples = dataset.test if dataset.test is not None else dataset.train
        inputs = samples.fetch(torch.linspace(0, len(samples) - 1, min(_IMAGES, len(samples))).long())
        if tuple(inputs.shape[1:]) != trained.sample:
            raise UserError(f"data: samples have shape {list(inputs.shape[1:])}, not {list(trained.sample)}")
        source = f"{len(inputs)} samples of the {'training' if dataset.test is None else 'test'} set"
    except UserError as error:
        if any(key.startswith("data.") for key in changes):  # the user has said where the data is
            raise
        generator = torch.Generator().manual_seed(0)
        vocabulary = trained.task.vocabulary
        inputs = torch.randint(vocabulary or 256, (_IMAGES, *trained.sample), generator=generator)
        if vocabulary is None:
            is_bytes = len(trained.sample) == 3 and trained.task.white == 255
            inputs = inputs.to(torch.uint8) if is_bytes else inputs / 255
        source = f"{_IMAGES} random samples, because the data cannot be read ({error})"
    if trained.task.vocabulary is not None:
        return inputs[:, :-1].long().contiguous(), source
    if trained.window != trained.sample:
        inputs, _ = CentreCrop(trained.window)(inputs, inputs)
    return inputs.contiguous(), source


def _convert(inputs: "Tensor", dtype: str | None) -> "Tensor":
    import torch

    if dtype is not None and inputs.dtype == torch.int64:
        raise UserError(f"input={dtype}: the model reads tokens (int64); leave it out")
    if dtype == "uint8" and inputs.dtype != torch.uint8:
        raise UserError("input=uint8: the data set is floating-point; use input=float32")
    return inputs.float() if dtype == "float32" else inputs
