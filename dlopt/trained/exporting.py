"""File formats of exported models: safetensors, ONNX and torch.export."""

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlopt.augment.pipeline import CentreCrop
from dlopt.basics.errors import RunError, UserError
from dlopt.basics.secrets import redacted
from dlopt.data.normalization import ScaleShift
from dlopt.trained.restore import Trained
from dlopt.training.builders.dataset import read_dataset

_SAMPLES = 16  # for the verification
OPSET = 20  # the first with operators on texts
_TOLERANCE = 1e-4  # relative to the largest output: other tools sum in a different order


class Deployed(nn.Module):
    """A model with its normalization: images [B, *window] of 0..255 (or vectors) -> outputs [B, K].

    A model of a text maps tokens [B, T] to outputs [B, T, K].
    """

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.normalize = trained.task.normalization(trained.normalize)
        self.model = trained.module
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.model(self.normalize(images))
        return outputs


def samples(trained: Trained, *, needs_data: bool) -> tuple[Tensor, str]:
    """Returns inputs [N, *window] for the verification and their description.

    Random ones if the data cannot be read; with `needs_data` raises `UserError` instead.
    """
    try:
        tokenizer = None if trained.tokenizer is None else trained.tokenizer.description
        dataset = read_dataset(trained.run_config, saved_tokenizer=tokenizer, saved_columns=trained.columns)
        split = dataset.test if dataset.test is not None else dataset.train
        inputs = split.fetch(torch.linspace(0, len(split) - 1, min(_SAMPLES, len(split))).long())
        if tuple(inputs.shape[1:]) != trained.sample:
            raise UserError(f"data: samples have shape {list(inputs.shape[1:])}, not {list(trained.sample)}")
        source = f"{len(inputs)} samples of the {'training' if dataset.test is None else 'test'} set"
    except UserError as error:
        if needs_data:
            raise
        generator = torch.Generator().manual_seed(0)
        inputs = trained.task.random_samples((_SAMPLES, *trained.sample), generator)
        source = f"{_SAMPLES} random samples, because the data cannot be read ({error})"
    inputs, _ = trained.task.split(inputs, torch.zeros(len(inputs)))
    if not trained.task.accepts(tuple(inputs.shape[1:]), trained.window):
        inputs = CentreCrop(trained.window).crop(inputs)
    return inputs.contiguous(), source


def preparation(trained: Trained) -> dict[str, Any]:
    """Returns how images or rows of a table become inputs of the model, for the metadata of its file."""
    facts: dict[str, Any] = {}
    channels, *size = trained.sample
    if reads_images(trained):
        rule = {"mode": "L" if channels == 1 else "RGB", "background": "white", "resize": "cover", "filter": "bilinear"}
        facts["image"] = {**rule, "size": size, "crop": list(trained.window[1:])}
    if trained.columns is not None:
        facts["columns"] = trained.columns.description
    if isinstance(trained.normalize, ScaleShift):
        saved = {name: each.double().flatten() for name, each in trained.normalize.state_dict().items()}
        mean, std = saved.get("center", 0.0) - saved["shift"] / saved["scale"], 1 / saved["scale"]
        facts |= {"normalize": {"mean": mean.tolist(), "std": std.tolist()}}
    return facts


def reads_images(trained: Trained) -> bool:
    """Returns whether image files can be inputs: grey or coloured images with values 0..255."""
    return len(trained.sample) == 3 and trained.sample[0] in (1, 3) and trained.task.white == 255


def convert(inputs: Tensor, dtype: str | None) -> Tensor:
    """Converts samples to the type of the exported model's input; None for the data set's. Raises `UserError`."""
    if dtype is not None and inputs.dtype == torch.int64:
        raise UserError(f"input={dtype}: the model reads tokens (int64); leave it out")
    if dtype == "uint8" and inputs.dtype != torch.uint8:
        raise UserError("input=uint8: the data set is floating-point; use input=float32")
    return inputs.float() if dtype == "float32" else inputs


def write(format: str, trained: Trained, inputs: Tensor, metadata: Mapping[str, Any], path: Path) -> None:
    """Exports the model for inputs like `inputs` [B, *window], with a dynamic batch size.

    Raises `RunError` if torch cannot convert the model.
    """
    module = Deployed(trained)
    if format == "safetensors":
        from safetensors.torch import save

        # Clones, because safetensors refuses tensors that share memory.
        tensors = {name: value.clone().contiguous() for name, value in module.state_dict().items()}
        path.write_bytes(save(tensors, texts_of(metadata)))
        return
    if len(inputs) == 1:  # torch specializes a program to a batch of one sample
        inputs = torch.cat([inputs, inputs])
    with converting(format):
        if format == "torch_export":
            program = torch.export.export(module, (inputs,), dynamic_shapes=_batch())
            file = io.BytesIO()  # torch aborts the process where it cannot write to a path
            torch.export.save(program, file, extra_files={"metadata.json": json.dumps(redacted(metadata))})
            path.write_bytes(file.getvalue())
        else:
            model = onnx_model(module, inputs, ["outputs"])
            import onnx  # type: ignore[import-not-found, import-untyped, unused-ignore]

            onnx.helper.set_model_props(model, texts_of(metadata))
            save_onnx(model, path)


def verify(format: str, path: Path, trained: Trained, inputs: Tensor) -> float | None:
    """Returns how far the outputs of the exported file are from the model's; None if its runtime is not installed.

    Raises `RunError` if they differ, or if the file does not accept `inputs`: torch may specialize a model to the
    traced batch size.
    """
    try:
        outputs = _read(format, path, trained, inputs)
    except Exception as error:  # any error of the other tool
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"format={format}: the exported file does not accept {len(inputs)} inputs: {reason}") from error
    if outputs is None:
        return None
    with torch.inference_mode():
        expected = Deployed(trained)(inputs)
    difference = (outputs - expected).abs().max().item()
    if not difference <= _TOLERANCE * max(expected.abs().max().item(), 1.0):  # also for a NaN
        raise RunError(f"format={format}: outputs differ from the model's by {difference:.2g}; nothing was written")
    return difference


def _read(format: str, path: Path, trained: Trained, inputs: Tensor) -> Tensor | None:
    if format == "safetensors":
        from safetensors.torch import load_file

        module = copy.deepcopy(Deployed(trained))
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


def texts_of(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Returns the metadata without secrets, as texts: JSON, except of what is a text."""
    found = redacted(metadata)
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}


def onnx_model(module: nn.Module, inputs: Tensor, outputs: Sequence[str]) -> Any:
    """Returns `module` as an ONNX model with the input `images`, which has any number of samples like `inputs`."""
    program = torch.onnx.export(
        module,
        (inputs,),
        dynamo=True,
        dynamic_shapes=_batch(),
        input_names=["images"],
        output_names=outputs,
        verbose=False,
        opset_version=OPSET,
    )
    assert program is not None
    return program.model_proto


def save_onnx(model: Any, path: Path) -> None:
    import onnx  # type: ignore[import-not-found, import-untyped, unused-ignore]

    onnx.checker.check_model(model)
    onnx.save(model, path)


def _batch() -> Any:
    """Returns the dynamic dimensions of `images`."""
    return {"images": {0: torch.export.Dim("batch")}}


@contextlib.contextmanager
def converting(format: str) -> Iterator[None]:
    """Turns an error of torch's exporters in the block into a `RunError`."""
    try:
        with _quiet(), torch.no_grad():
            yield
    except OSError:
        raise
    except Exception as error:  # tracing runs the model's code, which may raise anything
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0]}"
        raise RunError(f"format={format}: torch cannot convert this model: {reason}") from error


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
