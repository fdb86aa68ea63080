"""Configs that are composed from memory equal those of Hydra, also after files have changed."""

import pickle
import textwrap
from collections.abc import Callable
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from hypothesis import assume, example, given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from dlopt.basics.errors import UserError
from dlopt.config.choices import config_folder, version_base
from dlopt.config.compose import Composer
from dlopt.config.overrides import key_of, quoted_plain, text_of
from dlopt.config.recall import recall
from dlopt.config.run_config import GROUPS
from tests.support.choices import names

HAS_HYDRA_1_4 = hydra.__version__ >= "1.4"
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
    ["optimizer=../data/digits", "model=mlp"],
)


def hydras(lines: list[str], mode: RunMode) -> Any:
    """The config of Hydra itself with its interpolations, or None for an error."""
    GlobalHydra.instance().clear()
    initialize_config_dir(str(config_folder()), job_name="train", **version_base())
    try:
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("train", lines, mode, from_shell=False)
        if HAS_HYDRA_1_4:  # there it is an interpolation
            with flag_override(config, "readonly", False):
                config.hydra.job.override_dirname = config.hydra.job.override_dirname
        return config
    except HydraException:
        return None
    finally:
        GlobalHydra.instance().clear()


def described(config: DictConfig | None) -> Any:
    if config is None:
        return None
    found = repr(OmegaConf.to_container(config, resolve=False))  # of types, NaN and the order of keys, too
    return found, OmegaConf.is_struct(config), OmegaConf.is_readonly(config.hydra), OmegaConf.get_type(config.hydra)


@pytest.mark.parametrize("lines", LINES, ids=" ".join)
def test_equals_hydras_own(lines: list[str]) -> None:
    mode = RunMode.MULTIRUN if "seed=1,2" in lines else RunMode.RUN
    composer = Composer()  # registers the folders of packages, too
    expected = described(hydras(lines, mode))
    for _ in range(2):  # the second time from memory
        try:
            config = composer._compose(composer.parse(lines), mode == RunMode.MULTIRUN)
        except HydraException:
            config = None
        assert described(config) == expected


# Each row has the n-th choice of every group, or one choice that sets more than its group.
ROWS = list(zip_longest(*([f"{group}={name}" for name in names(group)] for group in sorted(GROUPS))))
EXPERIMENTS = config_folder() / "experiment"
RECIPES = [
    (f"experiment={path.relative_to(EXPERIMENTS).with_suffix('')}",)
    for path in sorted(EXPERIMENTS.rglob("[!_]*.yaml"))[::5]
]
FEW = [
    *ROWS[:3],
    ("experiment=resnet20_fashion_mnist_short", "model=mlp"),  # includes a recipe, and asks for choices
    ("experiment=benchmark/gpt", "optimizer=newton"),
    ("data=text", "model=gpt_nano"),  # ask for others; the typed choice wins
    ("experiment=lecture/dropout", "data=digit_pairs"),
]


@pytest.mark.parametrize(
    "rows", [FEW, pytest.param([*ROWS, *FEW, *RECIPES], marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_replaces_the_blocks_of_choices_as_hydra_does(
    rows: list[tuple[str | None, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def load(self: Composer, choices: list[Override], mode: RunMode) -> DictConfig:
        loaded.append([text_of(each) for each in choices])
        return hydra_loads(self, choices, mode)

    hydra_loads = Composer._load
    monkeypatch.setattr(Composer, "_load", load)
    monkeypatch.setattr("dlopt.config.recall._memory", {})
    composer = Composer()
    composer._compose([])
    for row in rows:
        lines = [line for line in row if line is not None]
        config = composer._compose(composer.parse(lines))
        assert described(config) == described(hydras(lines, RunMode.RUN)), lines
    assert len(loaded) <= 1 + len(rows) // 8, loaded  # of the default config, and of choices with Hydra's own keys


# Keys of values: numbers, texts, lists, blocks, null, typed keys of Hydra, new keys, keys inside a value or a list.
KEYS = (
    "seed", "name", "epochs", "optimizer.lr", "optimizer.betas", "optimizer.betas.0", "optimizer.betas.9", "optimizer",
    "model.widths", "model.widths.x", "evaluate", "evaluate.test", "data.subset", "tags", "tracking.wandb", "new",
    "new.deeper", "model.new", "optimizer.lr.x", "comparison", "hydra.run.dir", "hydra.job.num", "hydra.job.env_set",
    "hydra.job.env_set.A", "hydra.verbose", "hydra.sweeper.params", "hydra.searchpath", "hydra.mode", "hydra.nope",
    "hydra.job.config.override_dirname.exclude_keys",
)  # fmt: skip
CHOICES = ("optimizer=adam", "optimizer=nope", "+optimizer=sgd", "~optimizer", "model=mlp", "hydra/launcher=joblib",
           "hydra/nope=x", "optimizer@model=sgd", "experiment=study/schedules", "optimizer=null")  # fmt: skip
TEXTS = st.text("aZ0_ ,:=[]{}()'\"\\$#~+-.%@?*é\t\n", max_size=6) | st.sampled_from(
    ["${seed}", "x${oc.env:HOME}", "${nothing}", "${optimizer.lr}", "???", "null", "true", "1e-3", "nan", "sweep"]
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["lr", "a", "0", "b"]), inner, max_size=2)
    ),
    max_leaves=4,
)
VALUES = PLAIN.map(quoted_plain) | st.sampled_from(["${seed}", "a_${seed}", "${oc.env:HOME}", "???", "''", "", "1,2"])
VALUE_OVERRIDES = st.builds("{}{}={}".format, st.sampled_from(["", "", "+", "++", "~"]), st.sampled_from(KEYS), VALUES)
ERRORS = (HydraException, OmegaConfBaseException, ValueError, TypeError, AttributeError, AssertionError)


def result(compose: Callable[[], DictConfig | None]) -> Any:
    """The values of a config; None for an error."""
    try:
        return described(compose())
    except ERRORS:
        return None


@cache
def own() -> Composer:
    return Composer()


@cache
def base() -> bytes:
    composer = own()
    return pickle.dumps(composer._load(composer.parse(["optimizer=adam", "model=mlp"]), RunMode.RUN))


def replaces_block(values: list[Override]) -> bool:
    """Returns whether something else is put in place of a block, which `recall` leaves to the check of the block."""
    config, blocks = pickle.loads(base()), set()
    for each in values:
        key, value = each.key_or_group, None if each.is_delete() else each.value()
        if isinstance(value, dict):
            blocks.add(key)
        elif not each.is_delete() and (
            key in blocks or isinstance(OmegaConf.select(config, key, throw_on_resolution_failure=False), DictConfig)
        ):
            return True
    return False


@given(st.lists(VALUE_OVERRIDES, min_size=1, max_size=3))
@example(["+new={a:[1,{b:2}]}", "new.a.1.b=3", "++new.c.d=4"])
@example(["optimizer={lr:1}", "+optimizer={more:${seed}}", "optimizer.more=null"])
@example(["tracking.wandb=true"])  # a key inside a list
@example(["~seed"])
@example(["+seed=1"])  # exists
@example(["new=1"])  # does not exist
@example(["hydra.job.num=x"])  # of another type
def test_sets_values_as_hydra_does(lines: list[str]) -> None:
    """Sets them in a composed config: the file merging of Hydra, which takes long, is that of the tests around."""
    try:
        values = own().parse(lines)
    except UserError:  # not in Hydra's grammar
        assume(False)
    values = [each for each in values if not each.is_sweep_override()]
    assume(all(each.key_or_group != "optimizer" or isinstance(each.value(), dict) for each in values))  # a choice
    assume(not replaces_block(values))

    def hydras_own() -> DictConfig:
        config: DictConfig = pickle.loads(base())
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        return config

    expected = result(hydras_own)
    found = result(lambda: recall(values, lambda: pickle.loads(base()), "test_sets_values"))
    for_hydra = any(each.is_delete() or key_of(each) == "hydra.searchpath" for each in values)
    assert found == expected or (found is None and for_hydra)


@pytest.mark.slow
@given(st.lists(VALUE_OVERRIDES | st.sampled_from(CHOICES), min_size=1, max_size=4), st.sampled_from(RunMode))
def test_composes_as_hydra_does(lines: list[str], mode: RunMode) -> None:
    composer = own()
    try:
        parsed = composer.parse(lines)
    except UserError:
        assume(False)
    assume(mode == RunMode.MULTIRUN or not any(each.is_sweep_override() for each in parsed))
    values = [each for each in parsed if each.key_or_group not in composer.groups() and not each.is_sweep_override()]
    assume(not replaces_block(values))
    expected = result(lambda: hydras(lines, mode))
    assert result(lambda: composer._compose(parsed, mode == RunMode.MULTIRUN)) == expected


def test_composes_a_selection_of_files_once(monkeypatch: pytest.MonkeyPatch) -> None:
    composer = Composer()
    composer.compose(["model=mlp", "optimizer.lr=0.5"])

    def read_files(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Composer, "_load", read_files)
    for each in (composer, Composer()):
        other = each.compose(["seed=2", "model=mlp"])
        assert other.seed == 2 and other.optimizer.lr != 0.5
        assert each.compose(["model=mlp"]).seed == 0


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


@pytest.mark.skipif(HAS_HYDRA_1_4, reason="Hydra refuses ${oc.env:NAME} in a defaults list")
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
    typed = [f"hydra.searchpath=[{tmp_path / 'there'}]", "+things=one", "things.key=2"]
    assert Composer("mine", str(tmp_path / "here"), typed).compose(["+things=one"]).things.key == 1
    assert Composer(words=typed).compose(typed).things.key == 2
    write(tmp_path / "there/experiment/mine.yaml", "# @package _global_\nseed: 5\n")  # a choice of an existing group
    assert Composer(words=typed).compose([typed[0], "experiment=mine"]).seed == 5


def test_notices_what_is_registered_with_hydra() -> None:
    for value in (1, 2):
        ConfigStore.instance().store(group="optimizer", name="registered", node={"lr": value})
        assert [Composer().compose(["optimizer=registered"]).optimizer.lr for _ in range(2)] == [value, value]
    del ConfigStore.instance().repo["optimizer"]["registered.yaml"]


def test_lists_groups_and_choices_as_hydra_does(tmp_path: Path) -> None:
    write(tmp_path / "optimizer/mine.yaml", "lr: 1\n")
    write(tmp_path / "optimizer/folder/mine.yaml", "lr: 2\n")
    write(tmp_path / "things/one.yaml", "key: 1\n")
    composer = Composer(config_dir=str(tmp_path))
    for group in ("", "optimizer", "optimizer/folder", "things", "hydra", "hydra/launcher", "experiment", "nothing"):
        for kind in (ObjectType.CONFIG, ObjectType.GROUP):
            assert composer._listed(group, kind) == composer._loader.get_group_options(group, kind)
    assert {"mine", "folder/mine"} < set(composer.choices("optimizer")) and "things" in composer.groups()


def test_the_configs_that_were_used_last_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlopt.config.recall._memory", {})
    monkeypatch.setattr("dlopt.config.recall._MOST", 2)
    loaded = []

    def load(name: str) -> DictConfig:
        loaded.append(name)
        config: DictConfig = pickle.loads(base())
        return config

    for name in ("a", "b", "a", "c", "a", "b"):
        assert recall([], lambda name=name: load(name), name) is not None  # type: ignore[misc]
    assert loaded == ["a", "b", "c", "b"]
