"""`dlopt export`: exports a trained model with its input normalization."""

import contextlib
import copy
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import dlopt
from dlopt.commands.command import on_checkpoint, read_dataset, refuse_folder, saved_experiment, writing
from dlopt.errors import DONE, RunError, UserError, install
from dlopt.files import temporary_sibling
from dlopt.job import print_error
from dlopt.tracking.layout import short_path

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dlopt.training.restore import Trained

USAGE = """\
Export a checkpoint for other tools

Usage: dlopt export checkpoint=PATH format=FORMAT [key=value]

Examples:
  dlopt export checkpoint=outputs/train/DATE/checkpoints/best.pt format=onnx

Exports the fp32 model together with its input normalization. Inputs: images with values 0..255 in the size of the
training, any batch size. Outputs: logits. Verifies the file: compares its outputs with the model's on test images.

  format=safetensors :: tensors model.* and normalize.*; classes, input shape and config in the metadata
  format=onnx :: an ONNX graph; requires onnx and onnxscript, and onnxruntime for the verification
  format=torch_export :: a program for torch.export.load, which does not need dlopt
  checkpoint=PATH :: a checkpoint, or a run folder: its best.pt, or else last.pt
  {export}
  data.root=DIR :: location of the test images for the verification
"""

_READS = ("data", "threads", "allow_packages")
_IMAGES = 16
_TOLERANCE = 1e-4  # relative to the largest output: other tools sum in a different order

_SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch_export": ".pt2"}
_NEEDS = {"safetensors": ("safetensors",), "onnx": ("onnx", "onnxscript"), "torch_export": ()}


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
    from dlopt.training.restore import restore

    missing = [name for name in _NEEDS[format] if find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        raise UserError(f"format={format}: requires {names}; {install('dlopt[export]')}")
    target = _target(output, path, _SUFFIXES[format])
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
            result = _verify(read(format, temporary, trained, inputs), trained, inputs, source, format)
            os.replace(temporary, target)
    print(short_path(target))
    print(f"input: {dtype} [batch, {', '.join(map(str, trained.window))}]")
    print(result)
    return DONE


def _target(output: str | None, checkpoint: Path, suffix: str) -> Path:
    if output is None:
        run = checkpoint.absolute().parent.parent
        folder = run if (run / "config.yaml").is_file() else checkpoint.parent
        return folder / f"{checkpoint.stem}{suffix}"
    path = refuse_folder(Path(output))
    return path if path.suffix else path.with_suffix(suffix)


def _inputs(trained: "Trained", changes: Mapping[str, Any], path: Path) -> tuple["Tensor", str]:
    """Returns samples [N, *window] for the verification and their description; random ones if the data is missing."""
    import torch

    from dlopt.augment.pipeline import CentreCrop

    experiment = saved_experiment(trained.config, changes, path)
    try:
        dataset = read_dataset(experiment)
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


def _verify(outputs: "Tensor | None", trained: "Trained", inputs: "Tensor", source: str, format: str) -> str:
    import torch

    if outputs is None:
        return f"not verified: requires onnxruntime; {install('dlopt[export]')}"
    with torch.inference_mode():
        expected = _deployed(trained)(inputs)
    error = (outputs - expected).abs().max().item()
    if not error <= _TOLERANCE * max(expected.abs().max().item(), 1.0):  # also for a NaN
        raise RunError(f"format={format}: outputs differ from the model's by {error:.2g}; nothing was written")
    return f"verified: outputs match the model's within {error:.1g} on {source}"


# -- the file formats


def _deployed(trained: "Trained") -> "nn.Module":
    """Returns the model with its normalization: images [B, *window] of 0..255 (or vectors) -> outputs [B, K].

    A model of a text maps tokens [B, T] to outputs [B, T, K].
    """
    from torch import nn

    class Deployed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normalize = nn.Identity() if trained.task.vocabulary is not None else trained.normalize
            self.model = trained.module

        def forward(self, images: "Tensor") -> "Tensor":
            outputs: Tensor = self.model(self.normalize(images))
            return outputs

    return Deployed().eval()


def write(format: str, trained: "Trained", inputs: "Tensor", metadata: Mapping[str, Any], path: Path) -> None:
    """Exports the model for inputs like `inputs` [B, *window], with a dynamic batch size.

    Raises `RunError` if torch cannot convert the model.
    """
    import torch

    module = _deployed(trained)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    if format == "safetensors":
        from safetensors.torch import save

        # Clones, because safetensors refuses tensors that share memory.
        path.write_bytes(save({name: value.clone().contiguous() for name, value in module.state_dict().items()}, texts))
        return
    batch = {"images": {0: torch.export.Dim("batch")}}
    try:
        with _quiet(), torch.no_grad():
            if format == "torch_export":
                program = torch.export.export(module, (inputs,), dynamic_shapes=batch)
                torch.export.save(program, path, extra_files={"metadata.json": json.dumps(dict(metadata))})
            else:
                _write_onnx(module, inputs, batch, texts, path)
    except OSError:
        raise
    except Exception as error:  # tracing runs the model's code, which may raise anything
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0]}"
        raise RunError(f"format={format}: torch cannot convert this model: {reason}") from error


def read(format: str, path: Path, trained: "Trained", inputs: "Tensor") -> "Tensor | None":
    """Runs the exported file on `inputs`; returns None if its runtime is not installed.

    Raises `RunError` if the file does not accept them: torch may specialize a model to the traced batch size.
    """
    try:
        return _read(format, path, trained, inputs)
    except Exception as error:  # any error of the other tool
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"format={format}: the exported file does not accept {len(inputs)} inputs: {reason}") from error


def _read(format: str, path: Path, trained: "Trained", inputs: "Tensor") -> "Tensor | None":
    import torch

    if format == "safetensors":
        from safetensors.torch import load_file

        module = copy.deepcopy(_deployed(trained))
        module.load_state_dict({name: torch.zeros_like(value) for name, value in module.state_dict().items()})
        module.load_state_dict(load_file(path))
        with torch.inference_mode():
            outputs: Tensor = module(inputs)
        return outputs
    if format == "torch_export":
        with _quiet(), torch.inference_mode():
            outputs = torch.export.load(path).module()(inputs)
        return outputs
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime  # type: ignore[import-not-found, import-untyped, unused-ignore]

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": inputs.numpy()})[0])


def _write_onnx(module: "nn.Module", inputs: "Tensor", batch: Any, texts: Mapping[str, str], path: Path) -> None:
    import onnx  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import torch

    program = torch.onnx.export(
        module,
        (inputs,),
        dynamo=True,
        dynamic_shapes=batch,
        input_names=["images"],
        output_names=["outputs"],
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, dict(texts))
    onnx.checker.check_model(model)
    onnx.save(model, path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the output and the warnings of torch's exporters, which do not concern the user of a model."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
