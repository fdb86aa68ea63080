"""Forms of command lines: keys that exclude or need each other, lists without values, and folders that are named."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from dlopt.basics.errors import UserError
from dlopt.commands.shared.usage import check_forms, command_keys
from tests.support.line import refused


@dataclass(frozen=True, kw_only=True)
class Keys:
    images: Annotated[str | None, "DIR: images", "required without table"] = None
    table: Annotated[str | None, "FILE: a table (default: none)"] = None
    json: Annotated[bool, "--: a document", "not with images or watch"] = False
    watch: Annotated[bool, "--: again and again"] = False


def test_keys_that_are_not_set_exclude_nothing() -> None:
    check_forms(Keys, {"images": None, "table": "", "json": True, "watch": False})
    with pytest.raises(UserError, match="--json with images with --watch: only one of them may be set"):
        check_forms(Keys, {"images": "a", "json": True, "watch": True})


def test_the_help_shows_how_keys_go_with_others() -> None:
    assert [key.help for key in command_keys(Keys)] == [
        "images; required without table", "a table (default: none)",
        "a document; not with images or watch", "again and again",
    ]  # fmt: skip

    def misspelled(*, size: Annotated[int, "N: a size", "not wiht shape"] = 3) -> None: ...

    with pytest.raises(TypeError, match="size: declare its help"):
        command_keys(misspelled)


NO_VALUE = "=[]: list should have at least 1 item"


@pytest.mark.parametrize(
    ("typed", "message"),
    {
        "summary input_shape=[3,8,8]": "input_shape: needs classes=N or vocabulary=N\n",
        "summary classes=2": "classes: needs input_shape=[C,H,W]\n",
        "summary vocabulary=2": "vocabulary: needs input_shape=[C,H,W]\n",
        "summary input_shape=[8] classes=2 vocabulary=3": "classes with vocabulary: only one of them may be set\n",
        "predict a.pt": "images=PATH or file=FILE: one of them is required\n",
        "predict a.pt images=a file=b": "images with file: only one of them may be set\n",
        "predict a.pt images=a per=line": "per: needs file=FILE\n",
        "predict a.pt file=a max_errors=1": "max_errors: needs images=PATH\n",
        "sample a.pt prompt= file=b": "file with prompt: only one of them may be set\n",
        "runs --paths --json": "--json with --paths: only one of them may be set\n",
        "report . --json --watch": "--json with --watch: only one of them may be set\n",
        "report . --json --open": "--json with --open: only one of them may be set\n",
        "eval a.pt b.pt checkpoint=c": "a.pt: checkpoint=c is set, too; name the run once\n",
        "eval init_from=a checkpoint=b": "init_from and checkpoint: set one of them; a checkpoint contains its config",
        "report": "report: needs a folder of runs: dlopt report outputs/NAME\n",
        "runs diff": "runs diff: needs two run folders, not 0: dlopt runs diff outputs/a outputs/b\n",
        "runs diff . . .": "runs diff: needs two run folders, not 3: ",
        "runs tag": "runs tag needs the folder of a run: ",
        "sweep status": "sweep status: needs the folder of one sweep: dlopt sweep status outputs/train/DATE\n",
        "sweep stop a b": "sweep stop: needs the folder of one sweep: ",
        "benchmark report": "dlopt benchmark report: one folder is needed: dlopt benchmark report FOLDER\n",
        "benchmark targets . .": "dlopt benchmark targets: one folder is needed: ",
        "benchmark targets none": "none: not a folder for `dlopt benchmark targets`: it has no benchmark.json\n",
        "ladder report": "dlopt ladder report: one folder is needed: ",
        "ladder report .": ".: not a folder for `dlopt ladder report`: it has no ladder.json\n",
        "scaling allreduce=[]": f"allreduce{NO_VALUE}",
        "scaling simulate=true devices=[]": f"devices{NO_VALUE}",
        "scaling speedup=true devices=[]": f"devices{NO_VALUE}",
        "scaling device=[cpu] sizes=[]": f"sizes{NO_VALUE}",
        "benchmark optimizer=sgd workloads=[]": f"workloads{NO_VALUE}",
        "ladder optimizer=sgd model=gpt rungs=[]": f"rungs{NO_VALUE}",
        "ladder optimizer=sgd model=gpt arms=[]": f"arms{NO_VALUE}",
        "ladder optimizer=sgd model=gpt tokens_per_parameter=[]": f"tokens_per_parameter{NO_VALUE}",
    }.items(),
)
def test_refused(tmp_path: Path, typed: str, message: str) -> None:
    (tmp_path / "a.pt").touch()
    (tmp_path / "b.pt").touch()
    assert refused(tmp_path, *typed.split()).startswith(f"dlopt: {message}")
