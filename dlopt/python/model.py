"""Trained models from Python: `dlopt.load` returns a module that maps raw images to outputs."""

import contextlib
import itertools
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dlopt.augment.pipeline import CentreCrop
from dlopt.basics.errors import RunError, UserError
from dlopt.basics.locks import global_state_held
from dlopt.data.images.decoding import Source, Stored
from dlopt.data.rows.wrapped import channels_first, described
from dlopt.data.tables.columns import texts_of
from dlopt.machine.device import WORKSPACE, set_deterministic
from dlopt.machine.openmp import adapt_waiting
from dlopt.machine.threads import set_threads
from dlopt.trained.classify import changes, classify, image_files, refuse_other_inputs
from dlopt.trained.decision import decision_of
from dlopt.trained.predict_tables import predicted
from dlopt.trained.restore import Trained, restore
from dlopt.training import rng
from dlopt.training.builders.precision import Precision


@dataclass(frozen=True)
class Prediction:
    """A prediction for an image, or for a row of a table.

    Attributes:
        image: its path, or images[NUMBER] without one; empty for a row.
        label: the class that the decision beside the checkpoint names (`dlopt eval threshold=RULE`), without one the
            most probable class; None for a regression, for a model of several labels per image, and where an output of
            the model is NaN.
        values: the probabilities of the classes, or of the labels, in the order of `Model.classes`; the outputs of a
            regression, in the unit of the label.
        labels: of a model of several labels per image: those with a probability of at least 0.5.
        probability: of `label`; None without one.
    """

    image: str
    label: str | None
    values: tuple[float, ...]
    labels: tuple[str, ...] = ()
    probability: float | None = None


class Model(nn.Module):
    """A trained model in evaluation mode, with its input normalization and centre crop.

    Maps images [B, C, H, W] with values 0..255 (or vectors, as in the data set) to outputs [B, K], and tokens [B, T]
    (int64) to outputs [B, T, K].

    Attributes:
        classes: names of the K classes, or of the K labels that an image may have; None if there are no labels.
    """

    def __init__(self, trained: Trained, path: Path) -> None:
        super().__init__()
        self.normalize = trained.normalize
        self.module = trained.module
        self.classes = trained.classes
        self._task = trained.task
        self._sample, self._window = trained.sample, trained.window
        self._dtype = trained.precision.dtype
        self._trained, self._path = trained, path
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        shape = tuple(inputs.shape[1:])
        if shape == self._sample and not self._task.accepts(shape, self._window):
            inputs, shape = CentreCrop(self._window).crop(inputs), self._window
        if not self._task.accepts(shape, self._window) and not torch.compiler.is_compiling():
            warnings.warn(
                f"the inputs have the shape {list(shape)}, those of the training had {list(self._window)}", stacklevel=2
            )
        outputs: Tensor = self.module(self._task.normalized(inputs, self.normalize, self._dtype))
        return outputs

    def features(self, table: Any) -> Tensor:
        """Returns the inputs [B, F] for the rows of a table, encoded as in the training.

        Warns of values that the training rows lack. `table`: columns by name, such as a dict of lists or a DataFrame of
        pandas; or a list of rows, each a dict. Raises `UserError`.
        """
        columns = self._trained.columns
        if columns is None or not columns.features:
            raise UserError("features(): the model was not trained on a table whose columns have names")
        if isinstance(table, list) and all(isinstance(row, Mapping) for row in table):
            table = {name: [row.get(name) for row in table] for name in dict.fromkeys(itertools.chain(*table))}
        if not isinstance(table, Mapping) and not hasattr(table, "columns"):
            raise UserError("the model reads rows of a table: columns by name, a DataFrame, or a list of dicts")
        columns.require([*table], "features()")
        fields = {name: texts_of(list(table[name])) for name in columns.features}
        unknown: dict[str, Counter[str]] = {}
        rows = columns.matrix(fields, lambda row: f"features(), row {row}", unknown)
        for finding in columns.findings(unknown):
            warnings.warn(finding, stacklevel=2)
        parameter = next(self.parameters(), torch.zeros(()))
        return torch.from_numpy(rows).float().to(parameter.device)

    def predict(
        self,
        images: Any,
        *,
        batch_size: int = 64,
        max_errors: int = 10,
    ) -> list[Prediction]:
        """Classifies images like `dlopt predict`, in the order of their paths or of the list, or rows of a table.

        Scales the images to the size of the training images and takes the centre crop. Warns of what was done to the
        images, and of unreadable files, which are skipped.

        Args:
            images: a file, a folder (searched recursively), the content of a file as bytes, a PIL image, an array of
                uint8 (as the items of `data=custom`), or a list of these but folders. Of a model of a table: its rows,
                see `features`.
            batch_size: images or rows per forward pass.
            max_errors: maximum number of files to skip.

        Raises:
            UserError: no images or rows, or a model of other inputs.
            RunError: more than `max_errors` files are unreadable.
        """
        if isinstance(images, Tensor):
            raise UserError("predict(): takes image files; to map a tensor [B, C, H, W], call the model: model(images)")
        for name, value, least in (("batch_size", batch_size, 1), ("max_errors", max_errors, 0)):
            if value < least:
                raise UserError(f"predict({name}={value}): must be >= {least}")
        if self._trained.columns is not None and len(self._sample) == 1:
            return self._predict_rows(images, batch_size)
        if isinstance(images, str | PathLike):
            files: Sequence[Source] = image_files(fspath(images))[0]
        else:
            several = enumerate(images if isinstance(images, list | tuple) else [images])
            files = [_source(each, f"images[{number}]") for number, each in several]
        if not files:
            raise UserError("predict(images=[]): needs at least one image")
        refuse_other_inputs(self._trained, self._path)
        predictions, errors, stored = [], 0, Counter[Stored]()
        for path, values in classify(files, self._placed(), batch_size):
            if not isinstance(values, str):
                predictions.append(self._prediction(path, values.values, values.best))
                stored[values.stored] += 1
                continue
            errors += 1
            if errors > max_errors:
                raise RunError(f"max_errors={max_errors}: exceeded by unreadable files")
            warnings.warn(f"skipped: {values}", stacklevel=2)
        if (changed := changes(stored, self._sample)) is not None:
            warnings.warn(changed, stacklevel=2)
        return predictions

    def _predict_rows(self, table: Any, batch_size: int) -> list[Prediction]:
        if isinstance(table, str | PathLike):
            raise UserError(
                "predict(): the model reads rows of a table, not images; read the file with pandas, or use "
                f"dlopt predict {self._path} file={fspath(table)}"
            )
        trained, predictions = self._placed(), list[Prediction]()
        for batch in self.features(table).split(batch_size):
            predictions += [self._prediction("", values, best) for values, best in predicted(trained, batch)]
        return predictions

    def _prediction(self, path: str, values: Sequence[float], best: int) -> Prediction:
        label, labels = self._task.label(best, self.classes), self._task.labels_of(list(values), self.classes)
        return Prediction(path, label, tuple(values), labels, None if label is None else values[best])

    def _placed(self) -> Trained:
        """Returns what `dlopt predict` uses, on the device to which the caller may have moved the model."""
        device = next((parameter.device for parameter in self.parameters()), self._trained.precision.device)
        self._trained.loss.to(device)
        return replace(self._trained, precision=Precision(self._trained.precision.name, device))


def _source(image: Any, name: str) -> Source:
    """Returns an image as `classify` reads it. Raises `UserError`."""
    if isinstance(image, np.ndarray):
        from PIL import Image

        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise UserError(f"predict(): {name}: is {described(image)}; must be uint8 [H, W] or [H, W, C]")
        pixels = image if image.ndim == 2 else channels_first(image, f"predict(): {name}").transpose(1, 2, 0)
        return Image.fromarray(np.ascontiguousarray(pixels if pixels.shape[2:] != (1,) else pixels[..., 0]))
    if isinstance(image, str | PathLike):
        return fspath(image)
    if not isinstance(image, bytes) and not hasattr(image, "tobytes"):  # of a PIL image: avoids importing PIL
        raise UserError(f"predict(): {name}: is {described(image)}; must be a path, bytes, a PIL image or uint8")
    return image


def load(run: str | PathLike[str], *, allow_packages: Sequence[str] = ()) -> Model:
    """Loads the best model of a run folder (by its validation metric), or a checkpoint. Raises `UserError`.

    `allow_packages`: packages whose code the run may call, in addition to those of dlopt.

    Warns if the run was evaluated with norm_statistics=exact: a checkpoint has the running statistics.
    """
    path = Path(run)
    if path.is_dir():
        best = path / "checkpoints" / "best.pt"
        path = best if best.exists() else best.with_name("last.pt")
    with preserve_global_state("load()", may_be_nested=True):  # as a teacher in a model of the user
        changed = {"allow_packages": list(allow_packages)} if allow_packages else {}
        trained = restore(path, changed, decision=decision_of(path))
    if trained.warning is not None:
        warnings.warn(trained.warning, stacklevel=2)
    return Model(trained, path)


@contextlib.contextmanager
def preserve_global_state(call: str, *, may_be_nested: bool = False) -> Iterator[None]:
    """Restores the random generators of Python, NumPy and torch, and torch's global flags.

    `call`, `may_be_nested`, and the `UserError` of two calls at once: see `global_state_held`.
    """
    with global_state_held(call, may_be_nested=may_be_nested), _restored():
        yield


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    rng_state = rng.state()
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn, grad = torch.backends.cudnn, torch.is_grad_enabled()
    tf32, benchmark = cudnn.allow_tf32, cudnn.benchmark
    workspace = os.environ.get(WORKSPACE)
    try:
        yield
    finally:
        rng.restore(rng_state)
        set_threads(threads)
        adapt_waiting(1)  # ends the watch: the caller's threads wait as before
        torch.set_float32_matmul_precision(precision)
        set_deterministic(deterministic, warn_only=warn_only)
        if workspace is None and not deterministic:
            os.environ.pop(WORKSPACE, None)
        cudnn.allow_tf32, cudnn.benchmark = tf32, benchmark
        torch.set_grad_enabled(grad)
