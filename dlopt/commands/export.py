"""`dlopt export`: exports a trained model with its input normalization."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from dlopt._version import __version__
from dlopt.basics.errors import DONE, install, require_package
from dlopt.basics.files import temporary_sibling, write_atomically, write_json
from dlopt.basics.folders import short_path
from dlopt.basics.interruption import print_message
from dlopt.basics.status_line import waiting
from dlopt.commands.shared.command_line import load_torch, on_checkpoint, refuse_folder, writing

USAGE = """\
Export a checkpoint to safetensors, ONNX or torch.export

Usage: dlopt export RUN format=FORMAT [key=value]    # RUN: a run, a checkpoint, or a sweep

Examples:
  dlopt export checkpoint=outputs/train/DATE/checkpoints/best.pt format=onnx

Exports the fp32 model together with its input normalization. Inputs: images with values 0..255 in the size of the
training, any batch size; of a text: tokens, whose tokenizer is written to NAME.tokenizer.json; of a table with
categories, dates or gaps: its features. NAME.columns.json and the metadata describe how to make them. Outputs: logits.
Verifies the file: compares its outputs with the model's on test images.

  format=safetensors :: tensors model.* and normalize.*; classes, input shape and config in the metadata
  format=onnx :: an ONNX graph; requires onnx and onnxscript, and onnxruntime for the verification
  format=torch_export :: a program for torch.export.load, which does not need dlopt
  {export}
  data.root=DIR :: location of the test images for the verification
"""

_READS = ("data", "threads", "allow_packages")
_FORMATS = {  # suffix, and the packages that writing it needs
    "safetensors": (".safetensors", []),
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
    suffix, packages = _FORMATS[format]
    for package in packages:
        require_package(f"format={format}", package, "export")
    target = _target(output, path, suffix)
    tokenizer = target.with_name(f"{target.stem}.tokenizer.json")
    columns = target.with_name(f"{target.stem}.columns.json")
    load_torch()
    from dlopt.trained.exporting import convert, preparation, samples, verify, write
    from dlopt.trained.restore import restore

    with waiting("loading the model ..."):
        trained = restore(path, {**changes, "precision": "fp32", "device": "cpu"})
    if trained.warning is not None:
        print_message(trained.warning)
    # Unreadable data is an error if the user has set data.root or another key of it.
    with waiting("reading samples of the data ..."):
        inputs, source = samples(trained, needs_data=any(key.startswith("data.") for key in changes))
    inputs = convert(inputs, input)
    dtype = str(inputs.dtype).removeprefix("torch.")
    metadata: dict[str, Any] = {
        "classes": trained.classes,
        "input": {"shape": list(trained.window), "type": dtype},
        "config": trained.config,
        "dlopt": __version__,
        **preparation(trained),
    }
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_sibling(target) as temporary:
            with waiting(f"exporting, format={format} ..."):
                write(format, trained, inputs[:2], metadata, temporary)
            with waiting("verifying the file ..."):
                difference = verify(format, temporary, trained, inputs)
            os.replace(temporary, target)  # last: a file of that name has been verified
        if trained.tokenizer is not None:
            write_atomically(tokenizer, trained.tokenizer.description.encode())
        has_encoding = trained.columns is not None and trained.columns.encoding is not None
        if trained.columns is not None and has_encoding:
            write_json(columns, trained.columns.description)
    print(short_path(target))
    if trained.tokenizer is not None:
        print(f"tokenizer: {short_path(tokenizer)}")
    if has_encoding:
        print(f"columns: {short_path(columns)}")
    is_cropped = len(trained.sample) == 3 and trained.window != trained.sample
    centre = "" if not is_cropped else f", the centre of [{', '.join(map(str, trained.sample))}]"
    print(f"input: {dtype} [batch, {', '.join(map(str, trained.window))}]{centre}")
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
