"""Builds the data of a run: splits, augmentation and task."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace

from dlopt.augment import Pipeline
from dlopt.augment.crops import ResizingCrop
from dlopt.basics.errors import UserError, refused_path
from dlopt.config import validation_sets
from dlopt.config.parameters import show
from dlopt.config.parsing import parse
from dlopt.config.resolve import resolve_saved
from dlopt.config.run_config import RunConfig
from dlopt.config.saved import unwatched
from dlopt.config.schema import Component, dotted_name
from dlopt.data.checks import WARNING, problems
from dlopt.data.identity import difference, identify
from dlopt.data.normalization import Nothing
from dlopt.data.other_data import as_trained, with_classes
from dlopt.data.samples import Dataset, Samples
from dlopt.data.settings import SPLITS
from dlopt.data.splits import equal_samples, prepare, with_validation_set
from dlopt.data.tables.columns import FeatureColumns
from dlopt.data.tables.table import NOT_ENCODED
from dlopt.parallel.mode import Mode
from dlopt.tasks.kinds import chosen
from dlopt.tasks.user import OwnTask, UserTask
from dlopt.training.checkpoint.content import Checkpoint

# Keys by which a run divides its data.
_DIVISION = ("test_split", "val_split", "subset", "split_seed", "folds", "fold", "group", "order")
# Keys that name the data, and keys of their splits, which are not those of other data.
_SOURCES, _SPLITS = ("file", "root", "name", "split", "train"), ("val", "test", "val_file", "test_file")


def prepare_data(
    run_config: RunConfig,
    saved: Checkpoint | None,
    parallel: Mode,
    identified: Sequence[str],
    *,
    tests: bool = False,
    compares: bool = True,
) -> tuple[Dataset, Pipeline | None]:
    """Returns the dataset with its splits and its task, and the augmentation.

    `identified`, `tests`: see `build_workload`. `compares`: look for equal samples.
    """
    ranks, columns, is_other = parallel.ranks, None if saved is None else saved.columns, False
    if tests and saved is not None:
        run_config, source, is_other = _tested(run_config, saved)
    else:
        source = read_source(run_config, saved_tokenizer(run_config, saved), identified, columns)
    if saved is not None and (columns is None or columns.encoding is None) and not source.train.is_encoded:
        raise UserError(f"data: {NOT_ENCODED}")
    operations = run_config.augmentation.arguments.get("operations")
    dataset = prepare(
        source,
        run_config.data_settings,
        device=parallel.device,
        processes=ranks.local_processes,
        random_crops=any(isinstance(each, Component) and each.is_a(ResizingCrop) for each in operations or ()),
        compare=compares and ranks.is_main and not is_other,
    )
    if is_other and ranks.is_main and saved is not None:
        dataset = replace(dataset, notes=(*dataset.notes, *_equal_to_training(saved, dataset)))
    if dataset.layout is not None and run_config.normalize.target is not Nothing:
        raise UserError(f"{run_config.normalize.choice}: {_records_of(run_config, dataset)}; use normalize=none")
    augment: Pipeline | None = None  # also for an empty pipeline, which would seed a generator in every step
    if operations != []:
        arguments = dataset.task.target_arguments
        augment = run_config.augmentation.build(input_shape=dataset.train.shape, train=dataset.train, **arguments)
    return with_task(run_config, dataset, dataset.train.shape if augment is None else augment.output_shape), augment


def _tested(run_config: RunConfig, saved: Checkpoint) -> tuple[RunConfig, Dataset, bool]:
    """Returns the config and the data of a test, and whether the training data are others.

    Of other data, the samples of the test set, or else all samples, are both the training and the test set.
    """
    own, config = saved.config["data"], run_config.config["data"]
    tokenizer = saved_tokenizer(run_config, saved)
    typed = {key for key in own | config if own.get(key) != config.get(key)}
    is_other = not typed.isdisjoint(_SOURCES)
    if not is_other and (keys := [key for key in _DIVISION if key in typed]):
        value, before = (show(each.get(keys[0])) for each in (config, own))
        raise UserError(
            f"data.{keys[0]}={value}: the run has divided these data with {before}, and trained on a part; leave it out"
        )
    with contextlib.suppress(*[UserError] * is_other):  # a small text has no splits
        source = read_source(run_config, tokenizer, ("test",), saved.columns)
        is_same = source.classes == saved.classes and difference(saved.identity or {}, source.identity) is None
        is_other = is_other and not is_same
    # No part of the test is another split.
    settings = replace(run_config.data_settings, val_split=0.0, subset=None, folds=None, fold=None)
    settings = replace(settings, label_noise=0.0, memory=False)
    if is_other:
        if "test_split" not in typed:
            settings = replace(settings, test_split=0.0)
        reset = {key: None for key in _SPLITS if key in own and key not in typed}
        settings = replace(settings, group=None, order=None, weight=None)
        data = replace(run_config.data, arguments={**run_config.data.arguments, **reset})
        run_config = replace(run_config, data=data, data_settings=settings)
        source = read_source(run_config, tokenizer, SPLITS, saved.columns)
    whole = () if config.get("split_column") or not is_other else (source.val, source.train)
    samples = next((each for each in (source.test, *whole) if each is not None), None)
    if samples is None or (not is_other and saved.classes in (None, source.classes)):
        return run_config, source, False
    if run_config.settings.norm_statistics != "running":
        raise UserError("norm_statistics=exact: needs the training data, but other data are tested; use running")
    tested, notes = with_classes(samples, source.classes, saved.classes, leaves_out=True)
    if is_other:
        which = "test" if samples is source.test else "validation" if samples is source.val else "whole"
        notes += (f"{WARNING}other data than those of the run: their {which} set is tested",)
    source = replace(source, train=tested, val=None, test=copy(tested), notes=(*source.notes, *notes))
    return replace(run_config, data_settings=settings), replace(source, classes=saved.classes), True


def _equal_to_training(saved: Checkpoint, dataset: Dataset) -> tuple[str, ...]:
    """Returns a line about test samples of other data that equal training samples."""
    with contextlib.suppress(UserError, OSError):
        own = parse(resolve_saved(unwatched(saved.config)))
        settings = replace(own.data_settings, label_noise=0.0, memory=False)
        trained = prepare(read_source(own, saved.tokenizer, SPLITS, saved.columns), settings, compare=False)
        if difference(saved.identity, trained.identity) is None:
            splits = {"train": trained.train, "val": None, "test": dataset.test}
            return tuple(line for line in equal_samples(trained, splits) if " test samples " in line)
    return (f"{WARNING}the training data cannot be read as they were: test samples equal to them are not counted",)


def read_validation_sets(
    run_config: RunConfig, dataset: Dataset, parallel: Mode, *, identifies: bool
) -> dict[str, Dataset]:
    """Returns the prepared `dataset` of a run with each named validation set as its own, by name.

    Normalization, class names, tokenizer, columns and scale of the targets are those of the training data. The notes
    of each are what was left out, and what looks wrong. `identifies`: computes the identity of each set. Raises
    `UserError` for a set that cannot be read, or is not of the task.
    """
    found, tokenizer = {}, None if dataset.tokenizer is None else dataset.tokenizer.description
    for name, validation_set in run_config.validation.items():
        with _about_set(name):
            source: Dataset = run_config.read_validation_set(name, tokenizer, dataset.columns)
            present = [each for each in ("val", "test", "train") if getattr(source, each) is not None]
            split: str = validation_set.use or present[0]
            samples: Samples | None = getattr(source, split)
            if samples is None:
                raise UserError(f"data.use={split}: {validation_set.data.choice} has no {split} set")
            samples = as_trained(samples, source, dataset)
            settings, processes = run_config.data_settings, parallel.ranks.local_processes
            prepared = with_validation_set(dataset, samples, settings, device=parallel.device, processes=processes)
            identity = identify(replace(source, train=samples, val=None, test=None)) if identifies else None
            found[name] = replace(prepared, identity=identity, notes=tuple(problems(source.notes)))
    return found


@contextlib.contextmanager
def _about_set(name: str) -> Iterator[None]:
    """Makes errors of a validation set name its keys: validation.NAME.file in place of data.file."""
    try:
        yield
    except (UserError, OSError) as error:
        message = str(error) if isinstance(error, UserError) else refused_path(error)
        if message is None:
            raise
        key = f"{validation_sets.KEY}.{name}"
        message = re.sub(r"(?<![\w.])data\.(?=\w)", f"{key}.", message)
        raise UserError(message if key in message else f"{key}: {message}") from None


def read_dataset(
    run_config: RunConfig, *, saved_tokenizer: str | None = None, saved_columns: FeatureColumns | None = None
) -> Dataset:
    """Returns the dataset of a config with the splits of training; images are decoded on access."""
    source = run_config.read_data(saved_tokenizer=saved_tokenizer, saved_columns=saved_columns)
    return prepare(source, replace(run_config.data_settings, memory=False))


def read_source(
    run_config: RunConfig,
    tokenizer: str | None = None,
    identified: Sequence[str] = (),
    columns: FeatureColumns | None = None,
) -> Dataset:
    """Reads the data as they are stored, and identifies them by the content of the splits `identified`, if any.

    Raises `UserError`.
    """
    try:
        source: Dataset = run_config.read_data(saved_tokenizer=tokenizer, saved_columns=columns)
    except OSError as error:
        if (message := refused_path(error)) is None:
            raise
        raise UserError(f"{run_config.data.choice}: {message}") from None
    return replace(source, identity=identify(source, identified)) if identified else source


def saved_tokenizer(run_config: RunConfig, checkpoint: Checkpoint | None) -> str | None:
    """Returns the tokenizer of a checkpoint; None without one. Raises `UserError` if the config sets another."""
    if checkpoint is None:
        return None
    trained, chosen = (config["data"].get("tokenizer") for config in (checkpoint.config, run_config.config))
    if trained != chosen:
        raise UserError(f"data.tokenizer={chosen}: the model reads tokens of data.tokenizer={trained}; leave it out")
    return checkpoint.tokenizer


def with_task(run_config: RunConfig, dataset: Dataset, shape: tuple[int, ...]) -> Dataset:
    """Returns the dataset with the task of the run: the task that the model or the loss sets, else the data's.

    `shape`: of the augmented samples. Raises `UserError` if the task does not fit them.
    """
    if dataset.layout is not None:
        data, target = _records_of(run_config, dataset), run_config.task.target
        if not run_config.task.is_a(UserTask):
            raise UserError(f"{data}; a task of your own reads them: task=mine.Task")
        if getattr(target, "views", 1) > 1:
            raise UserError(f"task={dotted_name(target)}: has several views, but {data}; use views = 1")
    own, user = dataset.task, run_config.task.build()
    if user is not None:
        classes = None if dataset.classes is None else len(dataset.classes)
        path = dotted_name(run_config.task.target)
        return replace(dataset, unlabelled=OwnTask.of(user, path, own, shape, classes, dataset.layout))
    task = chosen(own, shape, *((each.target, each.choice) for each in (run_config.loss, run_config.model)))
    return dataset if task is own else replace(dataset, unlabelled=task)


def _records_of(run_config: RunConfig, dataset: Dataset) -> str:
    return f"{run_config.data.choice}: its items are no pairs (input, label), but have {dataset.layout}"
