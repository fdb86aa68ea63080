"""ONNX files that read decoded images, or the columns of a table, instead of the inputs of the model.

Their preprocessing is that of `dlopt predict`: equal pixels, equal features. Requires onnx and onnxruntime.
"""

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import onnx  # type: ignore[import-not-found, import-untyped, unused-ignore]
import onnxruntime  # type: ignore[import-not-found, import-untyped, unused-ignore]
import torch
from onnx import TensorProto, helper
from torch import Tensor

from dlopt.augment.pipeline import CentreCrop
from dlopt.basics.errors import RunError, UserError
from dlopt.data.checks import GAPS, number
from dlopt.data.tables.columns import ColumnEncoding, Form
from dlopt.tasks.classification import Classification
from dlopt.tasks.labels import MultiLabel
from dlopt.tasks.regression import Regression
from dlopt.trained import portable
from dlopt.trained.classify import Classified, classify
from dlopt.trained.exporting import Deployed, converting, onnx_model, reads_images, texts_of
from dlopt.trained.predict_tables import predicted
from dlopt.trained.restore import Trained

if TYPE_CHECKING:
    from PIL.Image import Image

KEY = "include=preprocessing"
ODD = 200
"""Inputs of the verification."""
_BOUND = 1e-3
_BATCH = 64
_UNIT = 2.0**22  # Pillow's weights of pixels are multiples of 1 / _UNIT
_COLOURS = np.array([19595.0, 38470.0, 7471.0])[:, None, None]  # Pillow's weights of red, green and blue, in 1 / 65536
_SPACE = "[" + "".join(rf"\x{{{code:x}}}" for code in range(0x3001) if chr(code).isspace()) + "]*"  # as str.strip()
_INTEGER = re.compile("[+-]?[0-9]+")
_DATES = ("%Y-%m-%d %H:%M", "%d/%m/%Y", "%m/%d/%Y %H:%M", "%Y-%m-%dT%H:%M+02:00")  # of the forms, for the verification


@dataclass(frozen=True)
class Included:
    """A model with its preprocessing.

    Attributes:
        model: onnx.ModelProto.
        inputs: type and shape of each.
        dates: columns that ONNX cannot read: the input is `features`, which `dlopt.trained.portable` computes.
        difference: the largest from `dlopt predict`: of a probability; of a value in standard deviations of the label,
            relative to the value if it is farther from the mean than one.
    """

    model: Any
    inputs: Mapping[str, str]
    dates: Sequence[str]
    difference: float


def include(trained: Trained, metadata: Mapping[str, Any]) -> Included:
    """Returns the model with its preprocessing and `metadata`, verified against `dlopt predict`.

    Its outputs are `probabilities` [B, K] and `prediction`, the number of the class [B]; of several labels only the
    probabilities; of a regression `prediction` [B, K], in the unit of the label.

    Raises `UserError` if it reads neither image files nor a table, `RunError` if it cannot be converted or differs.
    """
    outputs, columns = _outputs(trained), _columns(trained)
    dates = [each.name for each in columns if each.kind == "date"]
    graph = _Graph("preprocessing/")
    if not columns:
        inputs = {"image": (TensorProto.UINT8, ["batch", "height", "width", "channels"])}
        prepared = _pixels(graph, trained.sample)
    elif dates:
        inputs = {"features": (TensorProto.FLOAT, ["batch", str(trained.sample[0])])}
        prepared = graph("Identity", "features")
    else:
        kinds = {"category": TensorProto.STRING, "number": TensorProto.DOUBLE}
        inputs = {each.name: (kinds[each.kind], ["batch"]) for each in columns}
        prepared = _features(graph, columns)
    if taken := [name for name in outputs if name in inputs]:
        raise UserError(f"{KEY}: the table has a column {taken[0]!r}, the name of an output of the file; rename it")
    samples = trained.task.random_samples((2, *trained.sample), torch.Generator().manual_seed(0))
    with converting("onnx"):
        model = _merged(graph, inputs, prepared, onnx_model(_Predicting(trained), samples, outputs))
    shown = {
        name: f"{TensorProto.DataType.Name(kind).lower()} [{', '.join(shape)}]"
        for name, (kind, shape) in inputs.items()
    }
    facts = {**metadata, "input": shown}
    if dates and trained.columns is not None:
        facts["columns"] = {"encoding": trained.columns.saved["encoding"]}
    helper.set_model_props(model, texts_of(facts))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found, expected = _of_rows(session, trained, columns) if columns else _of_images(session, trained)
    mean, scale = _unit(trained)
    difference = _largest_difference((found - mean) / scale, (expected - mean) / scale)
    if not difference <= _BOUND:  # also for a NaN
        raise RunError(
            f"{KEY}: a prediction differs from that of `dlopt predict` by {difference:.2g}, more than {_BOUND:g}; "
            "nothing was written"
        )
    facts["preprocessing"] = {"odd_inputs": ODD, "largest_difference": difference}
    helper.set_model_props(model, texts_of(facts))
    return Included(model, shown, dates, difference)


class _Predicting(Deployed):
    """Samples, before normalization -> what `dlopt predict` shows of them: the outputs of `include`."""

    def __init__(self, trained: Trained) -> None:
        super().__init__(trained)
        self._trained = trained
        self.mean, self.scale = (torch.tensor(each, dtype=torch.float64) for each in _unit(trained))

    def forward(self, images: Tensor) -> Any:
        trained = self._trained
        if not trained.task.accepts(tuple(images.shape[1:]), trained.window):
            images = CentreCrop(trained.window).crop(images)
        outputs = super().forward(images)
        if isinstance(trained.task, Regression):  # as Trained.values(), whose numbers torch would export as float32
            return outputs.double() * self.scale + self.mean
        values = trained.values(outputs).float()
        if isinstance(trained.task, MultiLabel):
            return values
        # onnxruntime's maximum of several numbers is not NaN if one of them is.
        return values, trained.predicted(outputs).masked_fill(outputs.isnan().any(-1), -1)


def _unit(trained: Trained) -> tuple[float, float]:
    """Returns mean and scale of the values of a regression, whose outputs are (value - mean) / scale."""
    if trained.columns is None or not isinstance(trained.task, Regression):
        return 0.0, 1.0
    return trained.columns.mean, trained.columns.scale


def _outputs(trained: Trained) -> list[str]:
    match trained.task:
        case Classification():
            return ["probabilities", "prediction"]
        case MultiLabel():
            return ["probabilities"]
        case Regression():
            return ["prediction"]
    raise UserError(f"{KEY}: the model is of the task {trained.task.name}; must predict classes, labels or values")


def _columns(trained: Trained) -> Sequence[ColumnEncoding]:
    """Returns the columns of a table; () for images. Raises `UserError` for inputs of other kinds."""
    found = trained.columns
    if reads_images(trained):
        return ()
    if len(trained.sample) != 1 or found is None or not found.features:
        raise UserError(f"{KEY}: the data are neither image files nor a table of named columns; leave it out")
    if found.encoding is not None:
        return found.encoding.columns
    if len(found.features) != trained.sample[0]:
        raise UserError(f"{KEY}: a column of the table has lists of numbers; leave it out")
    return [ColumnEncoding(name, "number", (), math.nan, False, False) for name in found.features]  # NaN stays NaN


# -- graphs


class _Graph:
    """The nodes of an ONNX graph. Their inputs are names of outputs and constants; a number is a float64."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[Any] = []

    def __call__(self, operator: str, *inputs: str | float | np.ndarray, **attributes: Any) -> str:
        """Adds a node and returns the name of its output."""
        names = [
            each if isinstance(each, str) else self("Constant", value=onnx.numpy_helper.from_array(np.asarray(each)))
            for each in inputs
        ]
        name = f"{self.prefix}{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, names, [name], **attributes))
        return name


def _merged(graph: _Graph, inputs: Mapping[str, tuple[int, list[str]]], result: str, model: Any) -> Any:
    """Returns `model`, whose input `images` is `result`, after the nodes of `graph`, which read `inputs`."""
    own = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    output = helper.make_value_info(result, model.graph.input[0].type)
    proto = helper.make_graph(graph.nodes, graph.prefix, own, [output])
    first = helper.make_model(proto, opset_imports=model.opset_import, ir_version=model.ir_version)
    # Names of the model may be names of columns.
    second = onnx.compose.add_prefix(model, "model/", rename_outputs=False)
    return onnx.compose.merge_models(first, second, io_map=[(result, second.graph.input[0].name)])


def _pixels(graph: _Graph, sample: tuple[int, ...]) -> str:
    """Adds what `dlopt.data.images.decoding` does to images, uint8 [B, H, W, 1 or 3]; returns uint8 [B, *sample].

    The resizing is Pillow's, bilinear with anti-aliasing: integer weights of the pixels along one axis, then along the
    other, rounded to 8 bits after each. float64 computes it exactly.
    """
    import PIL

    channels, *size = sample
    targets = np.array(size, dtype=np.float64)
    lengths = graph("Cast", graph("Shape", "image", start=1, end=3), to=TensorProto.DOUBLE)
    extents = graph("Mul", graph("ReduceMin", graph("Div", lengths, targets)), targets)
    left = graph("Div", graph("Sub", lengths, extents), 2.0)
    # Pillow takes a box of float32.
    starts = graph("Cast", graph("Max", left, 0.0), to=TensorProto.FLOAT)
    ends = graph("Cast", graph("Min", graph("Add", left, extents), lengths), to=TensorProto.FLOAT)
    scales = graph("Div", graph("Cast", graph("Sub", ends, starts), to=TensorProto.DOUBLE), targets)
    starts = graph("Cast", starts, to=TensorProto.DOUBLE)
    weights = []  # [size, length] of height and width
    for axis, count in enumerate(size):
        start, scale, length = (graph("Gather", each, np.array(axis)) for each in (starts, scales, lengths))
        centres = graph("Add", start, graph("Mul", np.arange(count)[:, None] + 0.5, scale))
        positions = graph("Add", graph("Range", 0.0, length, 1.0), 0.5)
        distances = graph("Div", graph("Abs", graph("Sub", positions, centres)), graph("Max", scale, 1.0))
        triangles = graph("Max", graph("Sub", 1.0, distances), 0.0)
        shares = graph("Div", triangles, graph("ReduceSum", triangles, np.array([1])))
        weights.append(graph("Floor", graph("Add", graph("Mul", shares, _UNIT), 0.5)))
    # Since Pillow 13, heights that shrink by more pixels than twice the widths are resized first.
    heights, widths = (graph("Gather", graph("Sub", lengths, targets), np.array(axis)) for axis in (0, 1))
    is_tall = graph("Greater", heights, graph("Mul", graph("Max", widths, 0.0), 2.0))
    if int(PIL.__version__.split(".")[0]) < 13:
        is_tall = graph("Identity", np.array(False))
    pixels = graph("Cast", graph("Transpose", "image", perm=[0, 3, 1, 2]), to=TensorProto.DOUBLE)
    branches = {}
    for name, order in (("then", (0, 1)), ("else", (1, 0))):
        branch, result = _Graph(f"preprocessing/{name}/"), pixels
        for axis in order:
            operands = (result, branch("Transpose", weights[1], perm=[1, 0])) if axis else (weights[0], result)
            rounded = branch("Floor", branch("Add", branch("Div", branch("MatMul", *operands), _UNIT), 0.5))
            result = branch("Clip", rounded, 0.0, 255.0)
        output = helper.make_tensor_value_info(result, TensorProto.DOUBLE, None)
        branches[f"{name}_branch"] = helper.make_graph(branch.nodes, name, [], [output])
    colours = graph("Expand", graph("If", is_tall, **branches), np.array([1, 3, 1, 1]))  # fails for 2 or 4 channels
    if channels == 1:
        total = graph("ReduceSum", graph("Mul", colours, _COLOURS), np.array([1]))
        colours = graph("Floor", graph("Add", graph("Div", total, 65536.0), 0.5))
    return graph("Cast", colours, to=TensorProto.UINT8)


def _features(graph: _Graph, columns: Sequence[ColumnEncoding]) -> str:
    """Adds what `dlopt.data.tables.columns` does to numbers (NaN: a gap) and texts [B]; returns float32 [B, F]."""
    parts = []
    for column in columns:
        values = graph("Unsqueeze", column.name, np.array([1]))
        if column.kind == "category":
            is_gap = graph("RegexFullMatch", values, pattern=f"{_SPACE}(?i:{'|'.join(map(_escaped, GAPS))}){_SPACE}")
            matches = [graph("RegexFullMatch", values, pattern=_pattern(text)) for text in column.values]
            if matches:
                filled = np.array([[text == column.fill for text in column.values]])
                known = graph("Concat", *matches, axis=1)
                parts.append(graph("Cast", graph("Or", known, graph("And", is_gap, filled)), to=TensorProto.FLOAT))
        else:
            is_gap = graph("IsNaN", values)
            parts.append(graph("Cast", graph("Where", is_gap, float(column.fill or 0.0), values), to=TensorProto.FLOAT))
        if column.has_gaps:
            parts.append(graph("Cast", is_gap, to=TensorProto.FLOAT))
    return graph("Concat", *parts, axis=1)


def _escaped(text: str) -> str:
    return "".join(rf"\x{{{ord(each):x}}}" for each in text)


def _pattern(category: str) -> str:
    """Returns the regular expression of fields that have this category: 1.0 is the category 1."""
    decimals = r"(\.0*)?" if _INTEGER.fullmatch(category) else ""
    return f"{_SPACE}{_escaped(category)}{decimals}{_SPACE}"


# -- the verification


def _largest_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest difference; of values beyond -1 to 1, relative to them. Two NaN are equal."""
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        relative = np.abs(found - expected) / np.maximum(1.0, np.abs(expected))
    return float(np.where(same, 0.0, relative).max())


def _of_images(session: Any, trained: Trained) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values of odd images by the file, and by `dlopt predict`."""
    images = _odd_images(trained.sample[1], trained.sample[2])
    arrays = [np.asarray(each).reshape(1, each.height, each.width, -1) for each in images]
    found = [session.run(None, {"image": each})[0][0] for each in arrays]
    expected = [result.values for _, result in classify(images, trained, _BATCH) if isinstance(result, Classified)]
    return np.array(found, dtype=np.float64), np.array(expected)


def _odd_images(height: int, width: int) -> "list[Image]":
    """Draws grey and coloured images of noise, black and white pixels, and gradients, in many sizes and ratios."""
    from PIL import Image

    draws = np.random.default_rng(0)
    sizes = [(1, 1), (1, 3 * width), (3 * height, 1), (height, width), (height + 1, width), (2, 2)]
    while len(sizes) < ODD:
        rows = height * 2 ** draws.uniform(-2, 1.5)
        sizes.append((math.ceil(rows), math.ceil(rows * width / height * 3 ** draws.uniform(-1, 1))))
    images = []
    for position, (rows, columns) in enumerate(sizes):
        noise = draws.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
        gradient = np.linspace(0, draws.integers(256, size=3), columns) + np.linspace(0, 99, rows)[:, None, None]
        pixels = (noise, noise // 128 * 255, np.clip(gradient, 0, 255).astype(np.uint8))[position % 3]
        images.append(Image.fromarray(pixels[..., 0] if position % 2 else pixels))
    return images


def _of_rows(session: Any, trained: Trained, columns: Sequence[ColumnEncoding]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values of odd rows of a table by the file, and by `dlopt predict`."""
    assert trained.columns is not None
    draws = random.Random(0)
    may_have_gaps = trained.columns.encoding is not None
    fields = {each.name: [_odd_field(each, draws, may_have_gaps) for _ in range(ODD)] for each in columns}
    features = torch.from_numpy(trained.columns.matrix(fields, lambda row: f"{KEY}, row {row}")).float()
    expected = [values for batch in features.split(_BATCH) for values, _ in predicted(trained, batch)]
    if any(each.kind == "date" for each in columns):
        found = portable.predict(session, [{name: texts[row] for name, texts in fields.items()} for row in range(ODD)])
    else:
        texts = {each.name for each in columns if each.kind == "category"}
        arrays = {name: np.array(each if name in texts else [*map(number, each)]) for name, each in fields.items()}
        found = session.run(None, arrays)
    return np.asarray(found[0], dtype=np.float64), np.array(expected)


def _odd_field(column: ColumnEncoding, draws: random.Random, may_have_gaps: bool) -> str:
    """Draws a field of a column: a gap, an unknown category, a huge or negative number, with spaces around it."""
    if may_have_gaps and draws.random() < 0.15:
        return draws.choice(sorted(GAPS)).upper()
    if column.kind == "number":
        usual = float(column.fill or 0.0) if may_have_gaps else 0.0
        text = repr(draws.choice([usual, 0.0]) + draws.choice([-1, 1]) * 10 ** draws.uniform(-3, draws.choice([3, 12])))
    elif column.kind == "date":
        day = datetime(1950, 1, 1, tzinfo=UTC) + timedelta(minutes=draws.randrange(100 * 365 * 24 * 60))
        text = day.strftime(_DATES[get_args(Form).index(column.form)])
    else:
        text = draws.choice([*column.values, "unknown", "Zürich 💡", '"', "a'b,c;\\d", "(.*)"])
        text += ".0" if _INTEGER.fullmatch(text) and draws.random() < 0.5 else ""
    return draws.choice(["", " ", "\t"]) + text + draws.choice(["", "  "])
