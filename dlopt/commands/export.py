"""`dlopt export`: exports a trained model with its input normalization."""

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from dlopt._version import __version__
from dlopt.basics.errors import DONE, UserError, install, require_package
from dlopt.basics.files import temporary_sibling, write_atomically, write_json
from dlopt.basics.folders import short_path
from dlopt.basics.interruption import print_note
from dlopt.basics.plain_values import read_regular
from dlopt.basics.status_line import waiting
from dlopt.commands.shared.command_line import load_torch, on_checkpoint, refuse_folder, writing
from dlopt.commands.shared.document import show_result
from dlopt.trained.decision import decision_of

if TYPE_CHECKING:
    from dlopt.trained.restore import Trained

USAGE = """\
Export a checkpoint to safetensors, ONNX or torch.export

Usage: dlopt export RUN format=FORMAT [key=value]    # RUN: a run, a checkpoint, or a sweep

Examples:
  dlopt export checkpoint=outputs/train/DATE/checkpoints/best.pt format=onnx

Exports the fp32 model together with its input normalization. Inputs: images with values 0..255 in the size of the
training, any batch size; of a text: tokens, whose tokenizer is written to NAME.tokenizer.json; of a table with
categories, dates or gaps: its features. NAME.columns.json and the metadata describe how to make them. Outputs: logits.
Verifies the file: compares its outputs with the model's on test images.

With include=preprocessing, the graph reads decoded images of any size, uint8 [batch, height, width, 1 or 3], or the
columns of a table by name. Outputs: probabilities, and prediction, the number of the class or the value. Dates, which
ONNX cannot read, are read by NAME.py, which needs NumPy only. Verifies the outputs against those of `dlopt predict`.

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
    include: Annotated[
        Literal["preprocessing"] | None,
        "preprocessing: the graph computes probabilities from decoded images, or from the columns of a table",
        "not with input",
    ] = None,
) -> int:
    """Writes and verifies the file. Raises `UserError`; `RunError` if the model cannot be converted."""
    suffix, packages = _FORMATS[format]
    if include is not None:
        if format != "onnx":
            raise UserError(f"include={include}: needs format=onnx, not format={format}")
        if data := next((key for key in changes if key.split(".")[0] == "data"), None):
            raise UserError(f"{data}: include={include} reads no data; leave it out")
        require_package(f"include={include}", "onnxruntime", "export")
    for package in packages:
        require_package(f"format={format}", package, "export")
    target = _target(output, path, suffix)
    decision = decision_of(path)
    load_torch()
    from dlopt.trained.restore import restore

    with waiting("loading the model ..."):
        trained = restore(path, {**changes, "precision": "fp32", "device": "cpu"}, decision=decision)
    if trained.warning is not None:
        print_note(trained.warning)
    metadata = {
        "classes": trained.classes,
        "config": trained.config,
        "dlopt": __version__,
        **({} if decision is None else {"decision": vars(decision)}),
    }
    if include is not None:
        lines = _write_with_preprocessing(trained, metadata, target)
    else:
        # Unreadable data is an error if the user has set data.root or another key of it.
        needs_data = any(key.startswith("data.") for key in changes)
        lines = _write(format, trained, metadata, target, input, needs_data=needs_data)
    print(short_path(target))
    if decision is not None:
        lines.insert(-2, f"decision, {'applied' if include else 'in the metadata'}: {decision.text}")
    print(*lines, sep="\n")
    show_result({"file": os.path.abspath(target), "classes": metadata["classes"], "decision": metadata.get("decision")})
    return DONE


def _write(
    format: str, trained: "Trained", metadata: dict[str, Any], target: Path, dtype: str | None, *, needs_data: bool
) -> list[str]:
    """Writes and verifies the model with its normalization; returns lines about the files."""
    from dlopt.trained.exporting import convert, preparation, samples, verify, write

    with waiting("reading samples of the data ..."):
        inputs, source = samples(trained, needs_data=needs_data)
    inputs = convert(inputs, dtype)
    kind = str(inputs.dtype).removeprefix("torch.")
    metadata |= {"input": {"shape": list(trained.window), "type": kind}, **preparation(trained)}
    lines = []
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_sibling(target) as temporary:
            with waiting(f"exporting, format={format} ..."):
                write(format, trained, inputs[:2], metadata, temporary)
            with waiting("verifying the file ..."):
                difference = verify(format, temporary, trained, inputs)
            os.replace(temporary, target)  # last: a file of that name has been verified
        if trained.tokenizer is not None:
            tokenizer = target.with_name(f"{target.stem}.tokenizer.json")
            write_atomically(tokenizer, trained.tokenizer.description.encode())
            lines.append(f"tokenizer: {short_path(tokenizer)}")
        if trained.columns is not None and trained.columns.encoding is not None:
            columns = target.with_name(f"{target.stem}.columns.json")
            write_json(columns, trained.columns.description)
            lines.append(f"columns: {short_path(columns)}")
    is_cropped = len(trained.sample) == 3 and trained.window != trained.sample
    centre = "" if not is_cropped else f", the centre of [{', '.join(map(str, trained.sample))}]"
    lines.append(f"input: {kind} [batch, {', '.join(map(str, trained.window))}]{centre}")
    if difference is None:
        lines.append(f"not verified: requires onnxruntime; {install('dlopt[export]')}")
    else:
        lines.append(f"verified: outputs match the model's within {difference:.1g} on {source}")
    return lines


def _write_with_preprocessing(trained: "Trained", metadata: dict[str, Any], target: Path) -> list[str]:
    """Writes and verifies the model with its preprocessing; returns lines about the files."""
    from dlopt.data.checks import listed
    from dlopt.trained.exporting import save_onnx
    from dlopt.trained.preprocessing import ODD, include

    with waiting("exporting and verifying the file ..."):
        found = include(trained, metadata)
    where = "in the graph"
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_sibling(target) as temporary:
            save_onnx(found.model, temporary)
            if found.dates:
                where = f"in {_write_script(target)}, because ONNX cannot read dates ({listed(found.dates)})"
            os.replace(temporary, target)
    inputs = [f"{name} {kind}" for name, kind in found.inputs.items()]
    command = "dlopt predict" + ("" if trained.config["precision"] == "fp32" else " precision=fp32")
    return [
        f"preprocessing: {where}",
        f"input: {listed(inputs)}",
        f"verified: outputs match those of `{command}` within {found.difference:.1g} on {ODD} odd inputs",
    ]


def _write_script(target: Path) -> str:
    """Writes NAME.py beside the file `target`. Raises `UserError` if another program has this name."""
    from dlopt.trained import portable

    content, script = read_regular(portable.__file__), target.with_suffix(".py")
    with contextlib.suppress(FileNotFoundError):
        is_own = False
        with contextlib.suppress(ValueError):  # a folder, a pipe
            is_own = read_regular(script).partition(b"\n")[0] == content.partition(b"\n")[0]
        if not is_own:
            raise UserError(f"output={target}: {short_path(script)} is another program; use another name")
    write_atomically(script, content)
    return short_path(script)


def _target(output: str | None, checkpoint: Path, suffix: str) -> Path:
    if output is None:
        run = checkpoint.absolute().parent.parent
        folder = run if (run / "config.yaml").is_file() else checkpoint.parent
        return folder / f"{checkpoint.stem}{suffix}"
    path = refuse_folder(Path(output))
    return path if path.suffix else path.with_suffix(suffix)
