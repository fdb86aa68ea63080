"""Configs that are composed from memory equal those of Hydra's own loader, also after files have changed."""

import textwrap
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.types import RunMode
from omegaconf import OmegaConf

from dlopt.config import loader
from dlopt.config.choices import config_folder
from dlopt.config.compose import Composer

LINES = (
    ["optimizer.lr=0.5", "optimizer=adam", "+model.new={a:1,b:[2]}", "hydra.run.dir=x", "++seed=4", "~tracking"],
    ["model=mlp", "model.widths=[4]", "hydra/launcher=joblib", "hydra.job.env_copy=[HOME]", "name='a=b'"],
    ["model=mlp", "model.widths=[8,8]", "hydra/launcher=joblib", "optimizer={lr:1}", "hydra.job.env_set.A=b"],
    ["experiment=study/schedules", "name=${oc.env:HOME}", "hydra.job.config.override_dirname.exclude_keys=[name]"],
    ["seed=1,2", "optimizer=sgd,adam"],
    # errors
    ["optimizer=nope", "seed=1"],
    ["optimizer.nope=1"],
    ["+seed=1"],
    ["optimizer.lr=1", "optimizer@model=sgd"],
    ["seed.x=1"],
    ["~model.nope"],
)


def composed(loader: ConfigLoaderImpl, lines: list[str], mode: RunMode = RunMode.RUN, name: str = "train") -> Any:
    """The config with its interpolations, or the error."""
    try:
        config = loader.load_configuration(name, lines, mode, from_shell=False)
    except Exception as error:
        return type(error), str(error).split("\nConfig search path")[0]
    found: Any = OmegaConf.to_container(config, resolve=False)
    del found["hydra"]["runtime"]["config_sources"]  # the folders have a scheme of their own
    return found, OmegaConf.is_struct(config), OmegaConf.is_readonly(config.hydra), OmegaConf.get_type(config.hydra)


def own(search_path: ConfigSearchPath) -> ConfigLoaderImpl:
    """Hydra's loader of the same folders."""
    for element in search_path.get_path():
        element.path = element.path.replace("dlopt://", "file://")
    return ConfigLoaderImpl(search_path)


def test_equals_hydras_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remembering, hydras = Composer().loader, own(Composer().loader.get_search_path())
    for lines in LINES:
        mode = RunMode.MULTIRUN if "seed=1,2" in lines else RunMode.RUN
        expected = composed(hydras, lines, mode)
        assert composed(remembering, lines, mode) == expected, lines
        assert composed(remembering, lines, mode) == expected, f"{lines}: from memory"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "elsewhere")
    assert composed(remembering, LINES[1]) == composed(hydras, LINES[1])


def test_composes_a_selection_of_files_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_remembered", {})
    Composer().compose(["model=mlp", "optimizer.lr=0.5"])

    def read_files(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", read_files)
    other = Composer().compose(["seed=2", "model=mlp"])
    assert other.seed == 2 and other.optimizer.lr != 0.5
    assert Composer().compose(["model=mlp"]).seed == 0


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


def test_notices_changed_and_new_files(tmp_path: Path) -> None:
    def rate() -> Any:
        return Composer(config_dir=str(tmp_path)).compose(["optimizer=mine"]).optimizer.lr

    mine = tmp_path / "optimizer/mine.yaml"
    write(mine, "defaults: [/fragments/rate, _self_]\n_target_: torch.optim.SGD\n")
    write(tmp_path / "fragments/rate.yaml", "# @package optimizer\nlr: 1\n")
    assert (rate(), rate()) == (1, 1)
    write(tmp_path / "fragments/rate.yaml", "# @package optimizer\nlr: 20\n")
    assert (rate(), rate()) == (20, 20)
    write(mine, "defaults: [/fragments/rate, {optional /extras@_here_: one}, _self_]\n_target_: torch.optim.SGD\n")
    assert (rate(), rate()) == (20, 20)
    write(tmp_path / "extras/one.yaml", "lr: 3\n")
    assert (rate(), rate()) == (3, 3)
    (tmp_path / "extras/one.yaml").unlink()
    assert (rate(), rate()) == (20, 20)


def test_choices_that_depend_on_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "mine.yaml", "defaults: [train, {override optimizer: '${oc.env:CHOICE}'}, _self_]\n")
    for choice in ("adam", "sgd", "adam"):
        monkeypatch.setenv("CHOICE", choice)
        config = Composer("mine", str(tmp_path)).compose([])
        assert config.hydra.runtime.choices.optimizer == choice


def test_choices_that_follow_another_choice(tmp_path: Path) -> None:
    write(tmp_path / "mine.yaml", "defaults: [train, {things: one}, {others: '${things}'}, _self_]\n")
    for name in ("things/one", "things/two", "others/one", "others/two"):
        write(tmp_path / f"{name}.yaml", f"name: {name}\n")
    for typed, others in (
        ([], "others/one"),
        (["things=two"], "others/two"),
        (["others=one", "things=two"], "others/one"),
    ):
        assert Composer("mine", str(tmp_path)).compose(typed).others.name == others


def test_other_search_path(tmp_path: Path) -> None:
    write(tmp_path / "here/mine.yaml", f"""\
        defaults: [train, _self_]
        hydra:
          searchpath: [{tmp_path / "there"}]
        """)  # fmt: skip
    write(tmp_path / "there/things/one.yaml", "key: 1\n")
    assert Composer("mine", str(tmp_path / "here")).compose(["+things=one"]).things.key == 1
    typed = [f"hydra.searchpath=[{tmp_path / 'there'}]", "+things=one", "things.key=2"]
    assert Composer().compose(typed).things.key == 2
    write(tmp_path / "there/experiment/mine.yaml", "# @package _global_\nseed: 5\n")  # a choice of an existing group
    assert Composer().compose([typed[0], "experiment=mine"]).seed == 5


def test_notices_what_is_registered_with_hydra() -> None:
    for value in (1, 2):
        ConfigStore.instance().store(group="optimizer", name="registered", node={"lr": value})
        assert [Composer().compose(["optimizer=registered"]).optimizer.lr for _ in range(2)] == [value, value]
    del ConfigStore.instance().repo["optimizer"]["registered.yaml"]


# -- the files


def test_values_and_errors_are_those_of_omegaconf(tmp_path: Path) -> None:
    texts = [path.read_text() for path in (config_folder() / "train.yaml", *config_folder().glob("optimizer/*.yaml"))]
    texts += [
        "a: 1e-3\nb: 1_000\nc: 0x1F\nd: 010\ne: 2026-01-01\nf: on\ng: ~\nh: .inf\ni: 1:30\nj: '1'\n",
        "k: &x [1, {y: 2}]\nl: *x\n",
        "a: ${b}\nb: ???\nc: größe\n? d\n: |\n  long\n  text\ne: >-\n  folded\n  text\n",
        "", "# only a comment\n", "- 1\n- [a]\n", "a text\n",
    ]  # fmt: skip
    source = loader.YamlFolder("main", f"dlopt://{tmp_path}")
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.yaml").write_text(text)
        found = source.load_config(str(number)).config
        expected = OmegaConf.load(tmp_path / f"{number}.yaml")
        assert repr(found) == repr(expected) and type(found) is type(expected)
    bad = {"a: 1\na: 2\n": "duplicate key a", "a: [1\n": "line", "a: !!python/name:os.system\n": "tag"}
    for text, part in bad.items():
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(Exception, match=part):
            source.load_config("bad")
    (tmp_path / "bad.yaml").write_text("5\n")
    with pytest.raises(OSError, match="int"):
        source.load_config("bad")


def test_lists_groups_and_choices(tmp_path: Path) -> None:
    for path in ("group/b.yaml", "group/a.yaml", "group/inner/c.yaml", "group/__pycache__/x.pyc", "group/README"):
        write(tmp_path / path, "")
    source = loader.YamlFolder("main", f"dlopt://{tmp_path}")
    assert source.list("group", loader.ObjectType.CONFIG) == ["a", "b"]
    assert source.list("group", loader.ObjectType.GROUP) == ["inner"]
    assert source.list("group", None) == ["a", "b", "inner"]
    assert source.is_group("group") and source.is_config("group/a") and not source.is_config("group/inner")
