"""Generates the tables of extras and versions from pyproject.toml, and reads when pages were typed."""

import re
import tomllib
from pathlib import Path

import yaml
from markup import code, table

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = ROOT / "pyproject.toml"
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"
PURPOSES = {  # extra -> what it adds
    "sweep": "searches with Optuna (`hydra/sweeper=dlopt_optuna`, pruners, samplers), `dlopt benchmark`",
    "schedulefree": "the optimizers `schedule_free_adamw` and `schedule_free_sgd`",
    "pandas": "`to_pandas()` of the runs, trials and metrics that [Python reads](howto/python.md#read-runs)",
    "timm": "the models of timm (`model=timm model.name=resnet18`)",
    "mlflow": "logging to MLflow (`tracking=[mlflow]`)",
    "wandb": "logging to Weights & Biases (`tracking=[wandb]`)",
    "export": "`dlopt export format=onnx`",
    "text": "byte-pair tokenizers (`data=text data.tokenizer=bpe`)",
    "hub": "`data=parquet`, `data=huggingface`, and Parquet files of `data=text`",
    "docs": "building this documentation",
    "test": "running the tests; with the packages of the other extras that they use",
}
SHORT = {"test"}  # a list of packages that only developers need


def metadata() -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    return found


def repository() -> str | None:
    """Returns the address of the repository; None as long as pyproject.toml has none."""
    return metadata().get("urls", {}).get("Repository")  # type: ignore[return-value]


def extras() -> str:
    """Every extra with the command that installs it, what it adds, and its packages."""
    rows = []
    for name, requirements in metadata()["optional-dependencies"].items():
        packages = [code(re.split(r"[<>=\[]", each)[0]) for each in requirements]
        shown = f"{len(packages)} packages" if name in SHORT else ", ".join(packages)
        rows.append((code(f"pip install '.[{name}]'"), PURPOSES[name], shown))
    return table(("Install", "Adds", "Packages"), rows)


def versions() -> str:
    """Every package that dlopt requires, with its lowest version and the one with which the tests run."""
    pinned = {}
    for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        name, separator, version = line.partition(";")[0].strip().partition("==")
        if separator:
            pinned[name] = version
    rows = []
    for requirement in metadata()["dependencies"]:
        name, limits = re.split(r"(?=[<>=])", requirement, maxsplit=1)
        lowest = re.findall(r">=([\w.]+)", limits)[0]
        rows.append((code(name), lowest, pinned[name]))
    return table(("Package", "Lowest", "Tested"), rows)


def printed() -> dict[str, str]:
    """Returns page (without `.md`) -> the day on which scripts/type_pages.py last compared its output."""
    noted = yaml.safe_load((ROOT / "docs" / "printed.yaml").read_text(encoding="utf-8"))
    return {name.removeprefix("docs/").removesuffix(".md"): str(day) for name, (day, _) in noted.items()}
