"""Every YAML file of every group composes, is valid, builds, and takes one update on a little data."""

import importlib.util
import json
import math
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain
from dlopt.config.run_config import GROUPS
from dlopt.training.builders.trainer import probe_trainer
from dlopt.training.builders.workload import Workload, build_workload
from tests.support import choices
from tests.support.comparisons import SHIPPED
from tests.support.line import dlopt, only

CONF = Path(__file__).parents[2] / "conf"
CHOICES = [f"{group}={name}" for group in sorted(GROUPS) for name in choices.names(group)]
EXPERIMENTS = sorted(
    str(path.relative_to(CONF / "experiment").with_suffix(""))
    for path in (CONF / "experiment").rglob("*.yaml")
    if not path.stem.startswith("_") and (path.parent.name, path.stem) not in {("lecture", name) for name in SHIPPED}
)
SMALL = ("threads=1", "steps=1", "data.batch_size=20", "tracking=[]", "hydra.run.dir=run")
MLP = ("model=mlp", "model.widths=[4]")
DIGITS = ("data.subset=40",)
TEXT = ("data=text", "data.file=images/text.txt", "data.sequence_length=8")
GPT = ("model=gpt_nano", "model.width=8", "model.depth=1", "model.heads=2")
# 32 pixels with 3 channels, for choices that need images
IMAGES = ("data=image_folder", "data.root=images", "data.val_split=0.5", "data.image_size=32", "data.subset=null")

SLOW = {  # several seconds for one update
    "model=wrn_28_10", "model=two_column_alexnet_224", "model=resnet101", "model=resnet50", "model=resnet34",
    "model=alexnet", "model=two_column_alexnet", "model=gpt2_small",
    "model=resnet110",  # as resnet20, but with more of the same
    "model=resnet32", "model=resnet44", "model=resnet56", "model=plain56",
    "model=resnet18", "model=vgg11", "model=vgg11_bn", "model=wrn_16_4", "model=torchvision", "model=timm",
    "data=python_source", "augmentation=imagenet", "init=alexnet",
}  # fmt: skip
COMBINED = ("optimizer", "init", "schedule", "normalize", "sampler", "parallel", "clip", "stopping")
ALONE = {
    "optimizer=newton", "optimizer=newton_cg", "optimizer=newton_undamped",  # they refuse to be clipped
    "sampler=hard_examples",  # refuses the modes that split a model
}  # fmt: skip
OPTIONAL = {"model=timm": "timm", "data=parquet": "pyarrow", "data=huggingface": "datasets"}


def line(choice: str) -> tuple[str, ...]:
    """Overrides that a choice requires, and a small workload."""
    group = choice.split("=")[0]
    data: tuple[str, ...] = IMAGES if group in ("model", "augmentation") else DIGITS
    model: tuple[str, ...] = () if group == "model" else MLP
    special: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
        "data=image_folder": (IMAGES[1:4], MLP),
        "data=imagenet": (("data.root=images", "data.val_split=0.5", "data.image_size=8"), MLP),
        "data=csv": (("data.file=images/list.csv", "data.val_split=0.5"), MLP),
        "data=parquet": (("data.file=images/shards/*.parquet", "data.val_split=0.5"), MLP),
        "data=webdataset": (("data.file=images/shard.tar", "data.input=png", "data.val_split=0.5"), MLP),
        "data=huggingface": (("data.name=images/saved", "data.val_split=0.5"), MLP),
        "data=text": (TEXT[1:], GPT),
        "data=tokens": (("data.root=images", "data.vocabulary=256", "data.sequence_length=8"), GPT),
        "data=python_source": (("data.sequence_length=8",), GPT),
        "model=gpt": (TEXT, GPT[1:]),
        "model=gpt_nano": (TEXT, ()),
        "model=gpt2_small": (TEXT, ()),
        "init=gpt2": (TEXT, GPT),
        "init=mup": (TEXT, (*GPT, "model.tied_embeddings=false", "optimizer=adamw")),
        "data=custom": (("data.train._target_=torchvision.datasets.FakeData", *FAKE), MLP),
        "data=polynomial": (("loss=mse",), MLP),
        "data=linear": (("loss=mse",), MLP),
        "data=drawn": (("task=tests.support.own_tasks.Noisy", "allow_packages=[tests]"), MLP),
        "data=diabetes": (("loss=mse",), MLP),
        "loss=binary_cross_entropy": (("data=digit_pairs", *DIGITS), MLP),
        "loss=distillation": ((*DIGITS, "loss.teacher=images/teacher"), MLP),
        "loss=pixel_cross_entropy": (DIGITS, ("model=autoencoder", "model.widths=[4]")),
        "data=table": (("data.file=images/table.csv",), MLP),
        "model=polynomial": (("data=polynomial", "loss=mse", "normalize=none"), ()),
        "model=mlp": (DIGITS, ("model.widths=[4]",)),
        "model=residual_mlp": (DIGITS, ()),
        "model=two_column_alexnet_224": ((*IMAGES[:3], "data.image_size=224"), ()),
        "augmentation=imagenet": ((*IMAGES[:3], "data.image_size=256"), ("model=resnet20",)),
        "augmentation=alexnet": ((*IMAGES, "augmentation.operations.0.size=16"), MLP),
        "init=alexnet": (DIGITS, ("model=alexnet", "model.hidden=8")),
        "init=dirac": (IMAGES, ("model=resnet20",)),
        "init=whitening": (IMAGES, ("model=resnet20",)),
        "init=whitening_dirac": (IMAGES, ("model=airbench94",)),
        "stopping=tolerance": (DIGITS, MLP),
        "stopping=target": ((*DIGITS, "stopping.value=0.5"), MLP),
        **{f"decay={name}": (DIGITS, (*MLP, "optimizer=adamw")) for name in choices.names("decay")},
        "parallel=hybrid": ((*DIGITS, "parallel.model_degree=1"), MLP),
    }
    data, model = special.get(choice, (data, model))
    own = (choice,) if choice not in data else ()
    return (*own, *data, *model)


FAKE = (
    "+data.train.size=40",
    "+data.train.image_size=[3,8,8]",
    "+data.train.num_classes=2",
    "+data.train.transform={_target_:torchvision.transforms.ToTensor}",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two classes of images, and the same as a list."""
    folder = tmp_path_factory.mktemp("choices")
    rows = ["path,label"]
    for part in ("train", "val", "test"):
        for label, shade in (("dark", 60), ("light", 180)):
            (folder / "images" / part / label).mkdir(parents=True)
            for i in range(4 if part == "train" else 2):
                path = f"{part}/{label}/{i}.png"
                Image.new("RGB", (40, 36), (shade + i, shade, shade - i)).save(folder / "images" / path)
                rows += [f"{path},{label}"] if part == "train" else []
    (folder / "images/list.csv").write_text("\n".join(rows) + "\n")
    (folder / "images/text.txt").write_text("".join(f"line {i} of the text\n" for i in range(40)))
    for name in ("train", "val"):
        (np.arange(400) % 256).astype(np.uint16).tofile(folder / f"images/{name}.bin")
    (folder / "images/table.csv").write_text("a,b,kind\n" + "".join(f"{i},{i * i},{'xy'[i % 2]}\n" for i in range(60)))
    with tarfile.open(folder / "images/shard.tar", "w") as shard:
        for i in range(16):
            (folder / "label.cls").write_text(str(i % 2))
            shard.add(folder / f"images/train/{'dark' if i % 2 else 'light'}/{i % 4}.png", f"{i:02d}.png")
            shard.add(folder / "label.cls", f"{i:02d}.cls")
    if importlib.util.find_spec("pyarrow") is not None:
        write_tables(folder / "images")
    assert dlopt(folder, "train", *SMALL, *DIGITS, *MLP, "hydra.run.dir=images/teacher").code == 0
    return folder


def write_tables(folder: Path) -> None:
    """Writes images to `shards`, two Parquet files, and to `saved`, as `save_to_disk` of the package datasets does."""
    import pyarrow
    from pyarrow import parquet

    for name in ("shards", "saved"):
        (folder / name).mkdir()
    for number in range(2):
        table = pyarrow.table({"image": [[[20 * i] * 3] * 4 for i in range(8)], "label": [i % 2 for i in range(8)]})
        pixels = table["image"].cast(pyarrow.list_(pyarrow.list_(pyarrow.uint8())))
        table = table.set_column(0, "image", pixels)
        parquet.write_table(table, folder / f"shards/train-{number}.parquet")
    with pyarrow.ipc.new_stream(str(folder / "saved/data.arrow"), table.schema) as stream:
        stream.write_table(table)
    (folder / "saved/dataset_info.json").write_text("{}")
    none = dict.fromkeys(("_format_columns", "_format_type"))
    state = {**none, "_fingerprint": "0", "_format_kwargs": {}, "_output_all_columns": False, "_split": "train"}
    (folder / "saved/state.json").write_text(json.dumps({**state, "_data_files": [{"filename": "data.arrow"}]}))


def missing(choice: str) -> str | None:
    """Why a choice cannot run here."""
    if choice in OPTIONAL and importlib.util.find_spec(OPTIONAL[choice]) is None:
        return f"{OPTIONAL[choice]} is not installed"
    if choice == "parallel=columns":
        return "one process has no second column; tests/parallel has two"
    if choice in ("data=mnist", "data=fashion_mnist", "data=cifar10", "data=cifar100"):
        return "its files have to be downloaded; tests/data reads such files in small"
    return None


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice in SLOW or missing(choice) is not None])
def test_composes_and_is_valid(choice: str) -> None:
    """Tests the choices that `test_takes_one_update` skips here, or runs only as slow tests."""
    plain, _ = to_plain(Composer().compose([each for each in line(choice) if missing(choice) is None] or [choice]))
    parse(plain)


def test_every_choice_names_a_callable_of_dlopt_or_torch() -> None:
    for choice in CHOICES:
        text = (CONF / f"{choice.replace('=', '/')}.yaml").read_text()
        targets = re.findall(r"^_target_: (\S+)", text, re.MULTILINE)
        assert all(target.split(".")[0] in ("dlopt", "torch") for target in targets), choice


def together() -> list[tuple[str, ...]]:
    """Puts all choices into as few runs as possible: those of COMBINED on digits in one run, one of each group."""
    combined: dict[str, list[str]] = {group: [] for group in COMBINED}
    alone = []
    for choice in CHOICES:
        group = choice.split("=")[0]
        if (
            group in combined
            and choice not in ALONE
            and missing(choice) is None
            and {*DIGITS, *MLP} <= set(line(choice))
        ):
            combined[group].append(choice)
        else:
            alone.append((choice,))
    runs = range(max(map(len, combined.values())))
    return [*alone, *(tuple(choices[i % len(choices)] for choices in combined.values()) for i in runs)]


@pytest.mark.parametrize(
    "choices",
    [pytest.param(choices, marks=pytest.mark.slow if set(choices) & SLOW else ()) for choices in together()],
    ids=",".join,
)
def test_takes_one_update(choices: tuple[str, ...], place: Path, tmp_path: Path) -> None:
    reason = missing(choices[0])
    if reason is not None:
        pytest.skip(reason)
    lines = dict.fromkeys(each for choice in choices for each in line(choice))
    located = ("data.root", "data.file", "data.name", "loss.teacher")
    typed = [each.replace("images", str(place / "images")) if each.startswith(located) else each
             for each in (*SMALL, *lines)]  # fmt: skip
    if choices[0].startswith("model=") and choices[0] in SLOW:
        run_config = parse(*to_plain(Composer().compose(typed)))
        takes_one_update_alone(build_workload(run_config), tmp_path)
        return
    if any(choice.startswith("optimizer=") for choice in choices):
        typed = [each for each in typed if "batch_size" not in each]  # some set the full batch
    result = dlopt(tmp_path, "train", *typed)
    assert result.code == 0, result.err
    [metrics] = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert math.isfinite(yaml.safe_load(metrics)["train_loss"])
    assert yaml.safe_load(only(tmp_path, "run/summary.json").read_text())["steps"] == 1


def takes_one_update_alone(workload: Workload, folder: Path) -> None:
    """Without evaluations and checkpoints, which take longer than the update of a large model."""
    trainer = probe_trainer(workload, folder)
    weights = dict(workload.module.named_parameters())
    before = {name: p.detach().clone() for name, p in weights.items()}
    trainer.run_update(next(iter(trainer.batches.epoch(0))), 0)
    assert math.isfinite(trainer.train_metrics.means("train")["train_loss"])
    assert any(not torch.equal(p, before[name]) for name, p in weights.items())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_compose_and_are_valid(name: str) -> None:
    plain, _ = to_plain(Composer().compose([f"experiment={name}"]))
    parse(plain)
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    assert f"experiment={name}" in text.split("defaults:")[0]  # a recipe states its command on top


def test_command_line_overrides_a_recipe() -> None:
    plain, _ = to_plain(Composer().compose(["experiment=resnet20_cifar10", "optimizer.lr=0.5", "data=digits"]))
    assert plain["optimizer"]["lr"] == 0.5 and plain["data"]["_target_"] == "dlopt.data.images.digits.digits"
    assert plain["epochs"] == 200 and plain["optimizer"]["weight_decay"] == 1e-4


def test_finds_all_choices() -> None:
    assert len(CHOICES) > 80 and {choice.split("=")[0] for choice in CHOICES} == set(GROUPS)


def test_every_file_has_a_description() -> None:
    for path in CONF.rglob("*.yaml"):
        assert path.read_text().startswith("# ") or path.stem.startswith("_"), path
