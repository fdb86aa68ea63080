"""`dlopt export`: a trained model with its input normalization as a file for other tools."""

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
from typing import TYPE_CHECKING, Any, Literal

import dlopt
from dlopt.commands.command import on_checkpoint, read_dataset, refuse_folder, writing
from dlopt.config.compose import resolve_saved
from dlopt.config.saved import with_changes
from dlopt.errors import DONE, RunError, UserError, install
from dlopt.files import temporary_sibling
from dlopt.tracking.layout import short_path

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dlopt.training.restore import Trained

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
  output=FILE          (NAME of the checkpoint with the format's ending, in the run folder)
"""

_IMAGES = 16
_TOLERANCE = 1e-4  # times the largest output: fp32 sums in another order

_SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch_export": ".pt2"}
_NEEDS = {"safetensors": ("safetensors",), "onnx": ("onnx", "onnxscript"), "torch_export": ()}


@on_checkpoint("export", _USAGE, ("data", "threads", "allow_packages"))
def export(
    path: Path,
    changes: dict[str, Any],
    *,
    format: Literal["safetensors", "onnx", "torch_export"],
    output: str | None = None,
    input: Literal["uint8", "float32"] | None = None,
) -> int:
    """Writes the file and compares it. Raises `UserError`, and `RunError` when the model cannot be converted."""
    from dlopt.training.restore import restore

    missing = [name for name in _NEEDS[format] if find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        raise UserError(f"format={format}: needs {names}, not installed here; {install('dlopt[export]')}")
    target = _target(output, path, _SUFFIXES[format])
    trained = restore(path, {**changes, "precision": "fp32", "device": "cpu"})
    inputs, source = _inputs(trained, changes, path)
    inputs = _typed(inputs, input)
    kind = str(inputs.dtype).removeprefix("torch.")
    metadata: dict[str, Any] = {
        "classes": trained.classes,
        "input": {"shape": list(trained.window), "type": kind},
        "config": trained.config,
        "dlopt": dlopt.__version__,
    }
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_sibling(target) as temporary:
            write(format, trained, inputs[:2], metadata, temporary)
            verdict = _compare(read(format, temporary, trained, inputs), trained, inputs, source, format)
            os.replace(temporary, target)
    print(short_path(target))
    print(f"input: {kind} [batch, {', '.join(map(str, trained.window))}]")
    print(verdict)
    return DONE


def _target(output: str | None, checkpoint: Path, suffix: str) -> Path:
    if output is None:
        run = checkpoint.absolute().parent.parent
        folder = run if (run / "config.yaml").is_file() else checkpoint.parent
        return folder / f"{checkpoint.stem}{suffix}"
    path = refuse_folder(Path(output))
    return path if path.suffix else path.with_suffix(suffix)


def _inputs(trained: "Trained", changes: Mapping[str, Any], path: Path) -> tuple["Tensor", str]:
    """Samples to compare on, cut to the model's window, and what they are: of the data, or random where these are
    not there."""
    import torch

    from dlopt.augment.pipeline import CentreCrop
    from dlopt.config.parsing import parse

    experiment = parse(resolve_saved(with_changes(trained.config, changes, path)))
    try:
        dataset = read_dataset(experiment)
        samples = dataset.test if dataset.test is not None else dataset.train
        inputs = samples.fetch(torch.linspace(0, len(samples) - 1, min(_IMAGES, len(samples))).long())
        if tuple(inputs.shape[1:]) != trained.sample:
            raise UserError(f"data: samples of shape {list(inputs.shape[1:])}, not {list(trained.sample)}")
        what = f"{len(inputs)} samples of the {'training' if dataset.test is None else 'test'} set"
    except UserError as error:
        if any(key.startswith("data.") for key in changes):  # then they are meant to be there
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


# -- the file formats


def _deployed(trained: "Trained") -> "nn.Module":
    """Images [B, *window] with values 0..255 (or vectors, as in the data) -> outputs [B, K] of the model."""
    from torch import nn

    class Deployed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normalize = trained.normalize
            self.model = trained.module

        def forward(self, images: "Tensor") -> "Tensor":
            outputs: Tensor = self.model(self.normalize(images))
            return outputs

    return Deployed().eval()


def write(form: str, trained: "Trained", inputs: "Tensor", metadata: Mapping[str, Any], path: Path) -> None:
    """Writes the model for inputs of the type and shape of `inputs` [B, *window] and any batch size.

    Raises `RunError` when torch cannot bring this model into the format.
    """
    import torch

    module = _deployed(trained)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    if form == "safetensors":
        from safetensors.torch import save  # which takes no two names of one memory

        path.write_bytes(save({name: value.clone().contiguous() for name, value in module.state_dict().items()}, texts))
        return
    batch = {"images": {0: torch.export.Dim("batch")}}
    try:
        with _quiet(), torch.no_grad():
            if form == "torch_export":
                program = torch.export.export(module, (inputs,), dynamic_shapes=batch)
                torch.export.save(program, path, extra_files={"metadata.json": json.dumps(dict(metadata))})
            else:
                _write_onnx(module, inputs, batch, texts, path)
    except OSError:
        raise
    except Exception as error:  # torch's tracing raises whatever the model's code makes it raise
        lines = str(error).strip().splitlines() or [""]
        raise RunError(f"format={form}: torch cannot convert this model: {type(error).__name__}: {lines[0]}") from error


def read(form: str, path: Path, trained: "Trained", inputs: "Tensor") -> "Tensor | None":
    """What the written file makes of `inputs`; None where what is needed to run it is not installed.

    Raises `RunError` when the file does not take them: torch may bind a model to the batch that it was traced with.
    """
    try:
        return _read(form, path, trained, inputs)
    except Exception as error:  # of another tool's reader
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"format={form}: the file written by torch does not take {len(inputs)} inputs: {reason}"
        ) from error


def _read(form: str, path: Path, trained: "Trained", inputs: "Tensor") -> "Tensor | None":
    import torch

    if form == "safetensors":
        from safetensors.torch import load_file

        module = copy.deepcopy(_deployed(trained))
        module.load_state_dict({name: torch.zeros_like(value) for name, value in module.state_dict().items()})
        module.load_state_dict(load_file(path))
        with torch.inference_mode():
            found: Tensor = module(inputs)
        return found
    if form == "torch_export":
        with _quiet(), torch.inference_mode():
            outputs: Tensor = torch.export.load(path).module()(inputs)
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
    """Without what torch's exporters print and warn about on the way: of no use to who has not written the model."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
