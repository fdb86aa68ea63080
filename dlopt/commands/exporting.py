"""Trained models as files for other tools, with their input normalization."""

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlopt.errors import RunError, UserError
from dlopt.extras import install
from dlopt.train.restore import Trained

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch_export": ".pt2"}
_NEEDS = {"safetensors": ("safetensors",), "onnx": ("onnx", "onnxscript"), "torch_export": ()}


class Deployed(nn.Module):
    """Images [B, *window] with values 0..255 (or vectors, as in the data) -> outputs [B, K] of the model."""

    def __init__(self, normalize: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.model(self.normalize(images))
        return outputs


def check_installed(form: str) -> None:
    """Raises `UserError` when a package that the format needs is missing."""
    missing = [name for name in _NEEDS[form] if find_spec(name) is None]
    if missing:
        raise UserError(f"format={form}: needs {' and '.join(missing)}, not installed here; {install('dlopt[export]')}")


def write(form: str, trained: Trained, inputs: Tensor, metadata: Mapping[str, Any], path: Path) -> None:
    """Writes the model for inputs of the type and shape of `inputs` [B, *window] and any batch size.

    Raises `RunError` when torch cannot bring this model into the format.
    """
    module = Deployed(trained.normalize, trained.module).eval()
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


def read(form: str, path: Path, trained: Trained, inputs: Tensor) -> Tensor | None:
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


def _read(form: str, path: Path, trained: Trained, inputs: Tensor) -> Tensor | None:
    if form == "safetensors":
        from safetensors.torch import load_file

        module = copy.deepcopy(Deployed(trained.normalize, trained.module)).eval()
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


def _write_onnx(module: nn.Module, inputs: Tensor, batch: Any, texts: Mapping[str, str], path: Path) -> None:
    import onnx  # type: ignore[import-not-found, import-untyped, unused-ignore]

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
