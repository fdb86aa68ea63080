"""The features that crossings combine: choices and keys, with two or more values each, and rows of them.

A row chooses a value of every feature. `KIND` comes first: the data and the model, which say what else is possible.
`array` draws rows in which every pair of values occurs, except pairs that `dlopt.config.conflicts.CONFLICTS` excludes
and values that a kind of data does not have.
"""

import functools
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlopt.basics.errors import UserError
from dlopt.config.conflicts import CONFLICTS, Run
from tests.support.runs import run_config

Row = dict[str, str]
"""The value of each feature, by the names of both."""
Choice = tuple[str, str]
"""A feature and its value."""


@dataclass(frozen=True)
class Value:
    """A value of a feature.

    Attributes:
        words: its overrides; `{folder}` is that of the drawn files.
        kinds: those that have it; empty: all.
        acts: the run differs with it, or says that it does not.
    """

    words: str = ""
    kinds: tuple[str, ...] = ()
    acts: bool = False


TABLES = ("table", "binary", "regression")
IMAGES = ("mlp", "resnet", "vit", "folder", "pairs", "own", "autoencoder")
CLASSES = ("mlp", "resnet", "vit", "folder", "table", "binary", "recurrent")
NORMS = ("mlp", "resnet", "folder", *TABLES, "pairs", "own")
WITHOUT_VAL = ("mlp", "resnet", "vit", "autoencoder", "own")  # of its own
LINEAR = ("mlp", "vit", "folder", *TABLES, "pairs", "gpt", "own", "autoencoder")

_DIGITS = "data.subset=60 data.val_split=0.25 data.batch_size=20"
_MLP = "model=mlp model.widths=[6,5]"
BASE = (
    "data.workers=0 threads=1 device=cpu tracking=[] epochs=3 schedule=constant optimizer.lr=0.03 "
    "checkpoint.every_steps=2 checkpoint.keep=100"
)  # fmt: skip

KIND = "kind"
_TABLE = "data.split_column=split data.ignore=[id,weight,person,day] data.batch_size=20"
FEATURES: dict[str, dict[str, Value]] = {
    KIND: {
        "mlp": Value(f"{_DIGITS} {_MLP} model.norm=none"),
        "resnet": Value(f"{_DIGITS} model=resnet20 model.depth=8 model.width=4"),
        "vit": Value(f"{_DIGITS} model=vit model.patch=4 model.width=8 model.depth=2 model.heads=2"),
        "folder": Value(f"data=image_folder data.root={{folder}}/images data.batch_size=20 {_MLP} model.norm=none"),
        "pairs": Value(
            f"data=digit_pairs data.train_size=45 data.val_size=15 data.test_size=30 data.batch_size=20 {_MLP} "
            "model.norm=none"
        ),
        "autoencoder": Value(f"{_DIGITS} model=autoencoder model.widths=[8] model.code=3"),
        "table": Value(f"data=table data.file={{folder}}/classes.csv {_TABLE} {_MLP} model.norm=none"),
        "binary": Value(f"data=table data.file={{folder}}/binary.csv {_TABLE} {_MLP} model.norm=none"),
        "regression": Value(
            f"data=table data.file={{folder}}/values.csv data.labels=value loss=mse {_TABLE} {_MLP} model.norm=none"
        ),
        "gpt": Value(
            "data=text data.file={folder}/text.txt data.sequence_length=8 data.batch_size=20 model=gpt model.width=8 "
            "model.depth=2 model.heads=2"
        ),
        "recurrent": Value(
            "data=copying data.length=5 data.train_size=45 data.val_size=15 data.test_size=30 data.batch_size=20 "
            "model=lstm model.hidden=6"
        ),
        "own": Value(f"{_DIGITS} {_MLP} model.norm=none task=tests.support.own_tasks.Noisy allow_packages=[tests]"),
    },
    "norm": {
        "kind's": Value(),
        "batch": Value("model.norm=batch", tuple(kind for kind in NORMS if kind != "resnet"), acts=True),
        "layer": Value("model.norm=layer", NORMS, acts=True),
    },
    "dropout": {"0": Value(), "0.2": Value("model.dropout=0.2", acts=True)},
    "optimizer": {
        "sgd": Value(),
        "nesterov": Value("optimizer.nesterov=true optimizer.weight_decay=0.01", acts=True),
        "adamw": Value("optimizer=adamw optimizer.lr=0.03 optimizer.weight_decay=0.1", acts=True),
        "muon": Value("optimizer=muon", acts=True),
        "sam": Value("optimizer=sam", acts=True),
        "lbfgs": Value("optimizer=lbfgs optimizer.max_iter=3", acts=True),
        "schedule_free": Value("optimizer=schedule_free_adamw", acts=True),
        "prodigy": Value("optimizer=prodigy optimizer.lr=1", acts=True),
        "adafactor": Value("optimizer=adafactor", acts=True),
        "soap": Value("optimizer=soap", acts=True),
        "newton_cg": Value("optimizer=newton_cg optimizer.lr=0.1", acts=True),
    },
    "schedule": {
        "constant": Value(),
        "cosine": Value("schedule=cosine_warmup", acts=True),
        "plateau": Value("schedule=plateau schedule.patience=0 schedule.threshold=0.5", acts=True),
        "restarts": Value("schedule=cosine_restarts schedule.cycles=2 checkpoint.at_restarts=true", acts=True),
        "wsd": Value("schedule=wsd schedule.warmup_steps=1 schedule.decay_fraction=0.5", acts=True),
        "one_cycle": Value("schedule=one_cycle", acts=True),
    },
    "decay": {
        "constant": Value(),
        "cosine": Value("decay=cosine optimizer.weight_decay=0.1", acts=True),
        "independent": Value("decay=independent optimizer.weight_decay=0.1"),
        "weights": Value("decay_norm_and_bias=false optimizer.weight_decay=0.1"),
    },
    "clip": {
        "none": Value(),
        "norm": Value("clip=norm clip.max_norm=0.01", acts=True),
        "value": Value("clip=value clip.max_value=0.001", acts=True),
        "adaptive": Value("clip=adaptive clip.clipping=0.0001", acts=True),
    },
    "average": {"none": Value(), "ema": Value("ema=0.9", acts=True), "tail": Value("ema=tail", acts=True)},
    "accumulate": {
        "1": Value(),
        "2": Value("accumulate=2"),
        "grows": Value("accumulate={micro_batches:[1,2],epochs:[1]}", acts=True),
    },
    "scale": {"none": Value(), "linear": Value("scale_lr=linear", acts=True), "sqrt": Value("scale_lr=sqrt")},
    "augmentation": {
        "none": Value(),
        "crop": Value("augmentation=crop_flip", IMAGES, acts=True),
        "mixup": Value("augmentation=mixup", tuple(kind for kind in IMAGES if kind != "own"), acts=True),
        "noise": Value("augmentation=noise", IMAGES, acts=True),
    },
    "sampler": {
        "random": Value(),
        "balanced": Value("sampler=class_balanced", CLASSES, acts=True),
        "hard": Value("sampler=hard_examples", acts=True),
        "replaced": Value("sampler=with_replacement", acts=True),
        "sequential": Value("sampler=sequential", acts=True),
    },
    "loss": {
        "plain": Value(),
        "smooth": Value("loss.label_smoothing=0.1", (*CLASSES, "pairs", "gpt"), acts=True),
        "weighted": Value("loss.class_weights=balanced", CLASSES, acts=True),
        "pos_weight": Value("loss.pos_weight=balanced", ("pairs",), acts=True),
        "pixels": Value("loss=pixel_cross_entropy", ("autoencoder",), acts=True),
    },
    "groups": {
        "none": Value(),
        "frozen": Value('optimizer.groups=[{match:"*bias",freeze:true}]', acts=True),
        "slower": Value('optimizer.groups=[{match:"*weight",lr:0.1}]', acts=True),
        "horizon": Value("optimizer.groups=[{match:'*bias',horizon:0.5}]"),
    },
    "layers": {"equal": Value(), "decay": Value("optimizer.layer_decay=0.7", acts=True)},
    "adapt": {"none": Value(), "lora": Value("adapt=lora adapt.rank=2 adapt.alpha=2", LINEAR, acts=True)},
    "statistics": {"running": Value(), "exact": Value("norm_statistics=exact", acts=True)},
    "precision": {
        "fp32": Value(),
        "fp64": Value("precision=fp64", acts=True),
        "bf16": Value("precision=bf16", acts=True),
        "bf16_pure": Value("precision=bf16_pure", acts=True),
    },
    "recompute": {
        "none": Value(),
        "blocks": Value("activation_checkpointing=blocks", ("resnet", "vit", "gpt")),
        "all": Value("activation_checkpointing=all"),
    },
    "stopping": {
        "none": Value(),
        "early": Value("stopping=early stopping.patience=1 stopping.min_delta=0.2"),
        "tolerance": Value("stopping=tolerance"),
        "target": Value("stopping=target stopping.monitor=train_loss stopping.value=1.5"),
    },
    "validation": {
        "one": Value(),
        "two": Value("+validation.other.use=train"),
        "samples": Value("evaluate.samples=12", acts=True),
        "none": Value("data.val_split=0", (*WITHOUT_VAL, "gpt")),
    },
    "split": {
        "kind's": Value(),
        "rows": Value(
            "data.split_column=null data.ignore=[id,weight,person,day,split] data.test_split=0.2 data.val_split=0.2",
            TABLES,
        ),
        "files": Value("data.root={folder}/images/train data.test_split=0.2 data.val_split=0.2", ("folder",)),
    },
    "division": {
        "rows": Value(),
        "groups": Value("data.group=person", TABLES),
        "time": Value("data.order=day", TABLES),
    },
    "folds": {"none": Value(), "second": Value("data.folds=3 data.fold=1", (*WITHOUT_VAL, *TABLES), acts=True)},
    "weight": {"none": Value(), "column": Value("data.weight=weight", TABLES, acts=True)},
    "metrics": {
        "usual": Value(),
        "classes": Value("evaluate.metrics=[macro_f1,matthews_correlation,class_accuracy]", CLASSES),
        "monitored": Value("evaluate.metrics=[calibration_error] monitor=val_macro_f1", CLASSES),
        "values": Value("evaluate.metrics=[r2,mae] monitor=val_r2", ("regression",)),
        "own": Value("evaluate.metrics=[tests.support.user_parts.spread] allow_packages=[tests]"),
    },
    "evaluations": {
        "epochs": Value(),
        "steps": Value("evaluate.every_steps=2"),
        "seldom": Value("evaluate.every_epochs=2"),
    },
    "size": {"kind's": Value(), "smaller": Value("data.image_size=6", ("mlp", "resnet", "folder", "own"), acts=True)},
    "noise": {"0": Value(), "0.3": Value("data.label_noise=0.3", CLASSES, acts=True)},
    "reading": {
        "memory": Value(),
        "workers": Value("data.memory=false data.workers=1"),
        "drop_last": Value("data.drop_last=true", acts=True),
    },
    "normalize": {
        "kind's": Value(),
        "unit": Value("normalize=unit", (*IMAGES, *TABLES), acts=True),
        "whitened": Value("normalize=pca_whiten", (*IMAGES, *TABLES), acts=True),
        "none": Value("normalize=none", acts=True),
    },
    "init": {
        "default": Value(),
        "kaiming": Value("init=kaiming_normal", acts=True),
        "lsuv": Value("init=lsuv", acts=True),
        "mup": Value("init=mup init.base_width=4"),
    },
    "length": {"epochs": Value(), "steps": Value("epochs=20 steps=7"), "horizon": Value("schedule_epochs=5")},
    "divergence": {"stop": Value(), "skip": Value("on_divergence=skip")},
    "diagnostics": {
        "none": Value(),
        "gradients": Value("diagnostics=[gradients,activations] diagnostics_every=2"),
        "curvature": Value("diagnostics=[curvature] diagnostics_every=1"),
    },
    "observer": {
        "none": Value(),
        "own": Value("observers=[{_target_:tests.support.user_parts.Recorder}] allow_packages=[tests]"),
    },
    "tta": {"none": Value(), "flip": Value("evaluate.tta=flip", ("mlp", "resnet", "vit", "folder", "pairs"))},
    "writing": {"at once": Value(), "asynchronous": Value("checkpoint.asynchronous=true")},
    "seeds": {"one": Value(), "several": Value("init_seed=3 order_seed=4 augmentation_seed=5")},
}  # fmt: skip
DEFAULTS: Row = {feature: next(iter(values)) for feature, values in FEATURES.items()}


def overrides(row: Mapping[str, str], folder: Path) -> list[str]:
    """Returns the command line of a row, whose drawn files lie in `folder`. A later word replaces one of its key."""
    words = dict[str, str]()
    for line in (BASE, *(FEATURES[feature][value].words for feature, value in row.items())):
        for word in line.replace("{folder}", str(folder)).split():
            key = word.partition("=")[0]
            if key == "optimizer" and "optimizer.lr" in words:  # of the optimizer that this one replaces
                del words["optimizer.lr"]
            words[key] = word
    if "data.folds" in words:  # in its place
        words.pop("data.val_split", None)
    return sorted(words.values(), key=lambda word: ("." in word.partition("=")[0], "=" not in word))


def changed(row: Row) -> Row:
    """Returns the features of a row that differ from the first value of each, and its kind."""
    return {feature: value for feature, value in row.items() if feature == KIND or value != DEFAULTS[feature]}


def is_possible(feature: str, value: str, kind: str) -> bool:
    kinds = FEATURES[feature][value].kinds
    return not kinds or kind in kinds


def _kind_of(feature: str, value: str) -> str:
    """Returns a kind that has this value."""
    return value if feature == KIND else (*FEATURES[feature][value].kinds, DEFAULTS[KIND])[0]


@functools.cache
def _found(feature: str, value: str, folder: Path) -> frozenset[str]:
    """Returns the names of the features of `CONFLICTS` that a value turns on."""
    row = {KIND: _kind_of(feature, value), feature: value}
    try:
        config = run_config(*overrides(row, folder))
    except UserError:
        return frozenset()
    run = Run(config.settings, config.config, config)
    return frozenset(each.name for row in CONFLICTS for each in (row.one, row.other) if each.find(run) is not None)


def exclusions(folder: Path, features: Mapping[str, Sequence[str]]) -> set[frozenset[Choice]]:
    """Returns the pairs of values that do not go together: a value with a kind that has it not, and `CONFLICTS`."""
    found = {(feature, value): _found(feature, value, folder) for feature in features for value in features[feature]}
    usual = {(feature, value): found[KIND, _kind_of(feature, value)] for feature, value in found}
    own = {choice: names if choice[0] == KIND else names - usual[choice] for choice, names in found.items()}
    excluded = set[frozenset[Choice]]()
    for one, other in itertools.combinations(own, 2):
        alone = own[one], own[other]
        if one[0] == other[0]:
            continue
        if one[0] == KIND and not is_possible(*other, kind=one[1]):
            excluded.add(frozenset((one, other)))
        for row in CONFLICTS:
            names = {row.one.name, row.other.name}
            if names <= alone[0] | alone[1] and not names <= alone[0] and not names <= alone[1]:
                excluded.add(frozenset((one, other)))
    return excluded


def array(
    seed: int, folder: Path, strength: int = 2, takes_part: Callable[[str, str], bool] = lambda feature, value: True
) -> Iterator[Row]:
    """Draws the rows of a covering array, those that cover most first (greedily, as AETG; Cohen et al. 1997).

    Packages that know constraints in general take half an hour for these; pairs that exclude each other are enough.

    `takes_part`: whether a value, by the names of its feature and its own, occurs in the array.
    """
    draw = random.Random(seed)
    features = {f: [value for value in values if takes_part(f, value)] for f, values in FEATURES.items()}
    excluded = exclusions(folder, features)

    def goes_with(choice: Choice, chosen: Iterable[Choice]) -> bool:
        return not any(frozenset((choice, each)) in excluded for each in chosen)

    left = {
        frozenset(choices)
        for some in itertools.combinations(features, strength)
        for choices in itertools.product(*([(feature, value) for value in features[feature]] for feature in some))
        if all(frozenset(pair) not in excluded for pair in itertools.combinations(choices, 2))
    }
    while left:
        start = draw.choice(sorted(left, key=sorted))
        row = dict(sorted(start))
        for feature in draw.sample(list(features), len(features)):
            if feature in row:
                continue
            covered = Counter[str]()
            for value in draw.sample(features[feature], len(features[feature])):
                choice = feature, value
                if goes_with(choice, row.items()):
                    others = itertools.combinations(row.items(), strength - 1)
                    covered[value] = sum(frozenset((choice, *each)) in left for each in others)
            if not covered:
                break
            row[feature] = max(covered, key=lambda value: covered[value])
        left.discard(start)  # also of a row that cannot be completed
        if len(row) == len(features):
            left -= {frozenset(each) for each in itertools.combinations(row.items(), strength)}
            yield {feature: row[feature] for feature in FEATURES}
