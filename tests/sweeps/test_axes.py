"""The axes of a sweep: zip(...), seeds=N, and a space with the axes of each optimizer."""

import math
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given

from dlopt.basics.errors import UserError
from dlopt.commands.grid import overrides_of
from dlopt.config.overrides import Axis, grid, key_of, parse_axes, parse_overrides, replaced
from dlopt.sweeps.axes import read_axes
from dlopt.sweeps.search import probes
from dlopt.sweeps.space import parse_space
from tests.support.line import refused
from tests.sweeps.spaces import composer, space

ZIP = "rates=zip(optimizer=choice(adamw,sgd),optimizer.lr=[1e-3,0.1])"
RATES = """
optimizer=sgd:
  optimizer.nesterov: true
  optimizer.lr: 0.03,0.1
  optimizer.momentum: 0.8,0.9
optimizer=adamw:
  optimizer.lr: 0.001,0.003,0.01
optimizer=lion:
  optimizer.lr: 1e-4
"""


def axes(*words: str) -> list[Axis]:
    return read_axes(composer().with_words(*words), words)[2]


def jobs(*words: str) -> list[str]:
    return [" ".join(job) for job in grid(axes(*words))]


@pytest.fixture
def rates(tmp_path: Path) -> str:
    path = tmp_path / "rates.yaml"
    path.write_text(RATES)
    return f"space={path}"


# -- zip(...) and seeds=N


def test_keys_of_a_zip_take_their_values_together() -> None:
    assert [" ".join(job) for job in grid(parse_axes([ZIP, "seeds=2", "epochs=3"]))] == [
        "optimizer=adamw optimizer.lr=0.001 seed=0 epochs=3",
        "optimizer=adamw optimizer.lr=0.001 seed=1 epochs=3",
        "optimizer=sgd optimizer.lr=0.1 seed=0 epochs=3",
        "optimizer=sgd optimizer.lr=0.1 seed=1 epochs=3",
    ]
    spaced = "wide=zip( model.widths = [ [32,32], [64] ] , seed = range(3, 5), +x=choice(b,c) )"
    assert grid(parse_axes([spaced])) == [
        ["model.widths=[32,32]", "seed=3", "+x=b"],
        ["model.widths=[64]", "seed=4", "+x=c"],
    ]


@pytest.mark.parametrize(
    ("key", "plain", "zipped"),
    [
        ("ema", "null,0.9", "[null,0.9]"),
        ("ema", "null,0.9", "choice(null,0.9)"),
        ("name", "'größe',klein", "[größe,klein]"),
        ("name", '"a,b","c"', '["a,b","c"]'),
        ("note", "'null','true'", "['null','true']"),
        ("name", "2024_11_26,1e3", "[2024_11_26,1e3]"),
        ("tags", "[a,b],[c]", "[[a,b],[c]]"),
        ("model.widths", "[32,32],[64]", "[[32,32],[64]]"),
        ("optimizer", "sgd,adamw", "[sgd,adamw]"),
    ],
)
def test_a_zip_takes_the_values_of_a_plain_axis(key: str, plain: str, zipped: str) -> None:
    """Texts stay texts: null, true and dates in quotes, values with commas, letters beyond ASCII."""
    rows = [row for axis in parse_axes([f"{key}={plain}"]) for row in axis.rows()]
    together = grid(parse_axes([f"a=zip({key}={zipped},seed=[0,1])"]))
    assert [job[0] for job in together] == [line for row in rows for line in row]
    assert [job[1] for job in together] == ["seed=0", "seed=1"]


@pytest.mark.parametrize(
    "values",
    [
        "'null','true'", "'1','2_0'", "'1e3',b", "null,'null'", "1,2.5", "'a,b','c'", r"'it\'s','b'", "[1,2],[3]",
        "{a:1},{b:2}", "true,'x y'",
    ],
)  # fmt: skip
def test_values_are_those_of_hydras_parser(values: str) -> None:
    """Of a plain axis, of choice() and of both forms in a zip: a text in quotes stays a text."""
    parser = OverridesParser.create()
    [reference] = parser.parse_overrides([f"model.x={values}"])
    expected = [parser.parse_overrides([f"model.x={each}"])[0].value() for each in reference.sweep_string_iterator()]
    forms = [
        f"model.x={values}",
        f"a=zip(model.x=[{values}],seed=[0,1])",
        f"a=zip(model.x=choice({values}),seed=[0,1])",
    ]
    if "{" not in values:  # choice() of Hydra takes no blocks
        forms.append(f"model.x=choice({values})")
    for form in forms:
        rows = grid(parse_axes([form]))
        own = [parser.parse_overrides([row[0]])[0].value() for row in rows]
        assert own == expected and [type(each) for each in own] == [type(each) for each in expected], form


def test_letters_that_hydras_grammar_rejects() -> None:
    """In a recipe's hydra.sweeper.params, too, which the command line's reader of arguments does not see."""
    expected = [["name='größe'"], ["name=klein"]]
    for form in ("name=größe,klein", "name=choice(größe,klein)"):
        assert grid(parse_axes([form])) == expected
    for form in ("[größe,klein]", "choice(größe,klein)"):
        assert [row[:1] for row in grid(parse_axes([f"a=zip(name={form},seed=[0,1])"]))] == expected


def test_dates_in_a_choice_stay_texts() -> None:
    lines = [line for job in grid(parse_axes(["name=choice(2024_11_26,1e3)"])) for line in job]
    values = [override.value() for override in parse_overrides(lines)]
    assert values == ["2024_11_26", "1e3"]


@given(lengths=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=4))
def test_number_of_jobs_is_the_product_of_the_lengths(lengths: list[tuple[int, int]]) -> None:
    """Of each axis: how many keys it has, and how many values."""
    words = []
    for number, (keys, values) in enumerate(lengths):
        members = [f"k{number}_{key}=choice({','.join(map(str, range(values)))})" for key in range(keys)]
        words.append(members[0] if keys == 1 else f"axis{number}=zip({','.join(members)})")
    found = grid(parse_axes(words))
    assert len(found) == len(set(map(tuple, found))) == math.prod(values for _, values in lengths)
    searched = parse_space(parse_axes(words))
    assert [searched.overrides(point) for point in searched.points()] == found
    assert searched.size() == len(found)
    strides = [math.prod(values for _, values in lengths[i + 1 :]) for i in range(len(lengths))]
    for index, job in enumerate(found):  # the last axis changes fastest
        digits = [index // stride % values for stride, (_, values) in zip(strides, lengths, strict=True)]
        expected = [f"k{i}_{key}={digits[i]}" for i, (keys, _) in enumerate(lengths) for key in range(keys)]
        assert job == expected


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["p=zip(seed=[1,2],epochs=[1,2,3])"], "seed has 2, epochs has 3"),
        (["p=zip(seed=[1,2],epochs=[1,2])", "seed=3"], "seed is also set by p=zip"),
        (["p=zip(seed=[1,2],epochs=[1,2])", "q=zip(steps=[1,2],epochs=[1,2])"], "epochs is also set by p=zip"),
        (["p=zip(seed=[1,2],epochs=[1,2])", "p=zip(steps=[1,2],a.b=[1,2])"], "p is also set by p=zip"),
        (["seed=1,2", "seed=3,4"], "seed is also set by seed=1,2"),
        (["seeds=3", "seed=5"], "set the seeds once"),
        (["seeds=3", "seeds=5"], "set the seeds once"),
        (["seeds=3", "p=zip(seed=[1,2],epochs=[1,2])"], "set the seeds once"),
        (["seeds=0"], "number of seeds"),
        (["seeds=1,2"], "number of seeds"),
        (["p=zip(seed=[1,2])"], "at least two different keys"),
        (["p=zip(seed=[1,2],seed=[3,4])"], "at least two different keys"),
        (["p=zip()"], "at least two different keys"),
        (["p=zip(seed=[],epochs=[])"], "seed has no values"),
        (["p=zip(optimizer.lr=[interval(0,1)],epochs=[1])"], "optimizer.lr needs listed values"),
        (["p=zip(name=größe,seed=[1])"], "name needs listed values"),
        (["p=zip(seed=[1,1],epochs=[2,2])"], "the same values twice"),
        (["p=zip(seed=1,2)"], "seed needs listed values"),
        (["p=zip(seed=[1,2],3)"], "'3' is not KEY=VALUES"),
        (["p=zip(a=interval(0,1),b=[1,2])"], "a needs listed values"),
        (["p=zip(a=shuffle(1,2),b=[1,2])"], "separate values that belong together"),
        (["p=zip(a=zip(b=[1],c=[1]),d=[1])"], "cannot contain another"),
        (["p.q=zip(a=[1],b=[2])"], "must be one word"),
        (["p=shuffle(zip(a=[1,2],b=[1,2]))"], "zip(...) stands alone"),
        (["p=zip(a=[1,2],b=[1,2]"], "( is not closed; quote the whole argument"),
        (["p=zip(a=[1,", "2],b=[1,2])"], "( is not closed"),
    ],
)
def test_refuses_invalid_axes(words: list[str], reason: str) -> None:
    with pytest.raises(UserError) as error:
        parse_axes(words)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_the_command_line_replaces_axes_of_a_file() -> None:
    file = parse_axes(["rates=zip(a=[1,2],b=[3,4])", "seed=0,1"])

    def combined(*words: str) -> list[str]:
        return [" ".join(job) for job in grid(replaced(file, parse_axes(words)))]

    assert combined("seeds=1", "c=5") == ["a=1 b=3 seed=0 c=5", "a=2 b=4 seed=0 c=5"]
    assert combined("rates=zip(a=[6],d=[7])", "seed=0") == ["a=6 d=7 seed=0"]
    assert combined("seed=0", "a=1", "b=2") == ["a=1 seed=0 b=2"]
    with pytest.raises(UserError, match=r"rates=zip\(...\) of the config file: also set b, or replace the whole axis"):
        combined("a=1")


def test_words_of_a_sweep_need_one() -> None:
    with pytest.raises(UserError, match="several values need `dlopt train -m`"):
        composer().compose([ZIP])
    for word in ("seeds=2", "space=benchmark", "trials=3"):
        with pytest.raises(UserError, match=f"{word}: only sweeps have this word; add -m"):
            composer().compose([word])
    with pytest.raises(UserError, match="optimizer is a key of the config; give the axis another name"):
        axes("optimizer=zip(seed=[1,2],epochs=[1,2])")


def test_axes_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/night.yaml").write_text(
        "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {rates: 'zip(optimizer=[sgd,adamw],"
        "optimizer.lr=[0.1,0.001])', seeds: 2}}}\n"
    )
    line = [f"--config-dir={tmp_path}", "experiment=night"]
    assert overrides_of(3, line)[1:4] == ["optimizer=adamw", "optimizer.lr=0.001", "seed=1"]
    assert overrides_of(1, [*line, "seeds=1"])[1:4] == ["optimizer=adamw", "optimizer.lr=0.001", "seed=0"]


def test_lists_of_a_file_are_values(tmp_path: Path) -> None:
    values = "model.widths: [64, 64], tags: [a, größe], +data.y: [x, '1', null], +data.x: [[1, [2.5]], {a: 'b,c'}]"
    (tmp_path / "experiment").mkdir()
    recipe = f"# @package _global_\nhydra: {{sweeper: {{params: {{{values}, seed: '0,1'}}}}}}\n"
    (tmp_path / "experiment/lists.yaml").write_text(recipe)
    (tmp_path / "space.yaml").write_text(f"optimizer=sgd: {{{values}, seed: '0,1'}}\n")
    for line in ([f"--config-dir={tmp_path}", "experiment=lists"], ["optimizer=sgd", f"space={tmp_path}/space.yaml"]):
        for number in range(2):
            words = [each for each in overrides_of(number, line) if not each.startswith("--")]
            row = {key_of(each): parse_overrides([each])[0].value() for each in words}  # as `yaml.safe_load` reads them
            assert (
                row["model.widths"] == [64, 64] and row["tags"] == ["a", "größe"] and row["data.y"] == ["x", "1", None]
            )
            assert row["data.x"] == [[1, [2.5]], {"a": "b,c"}] and row["seed"] == number


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ("seed: [0, 1]", "seed=[0, 1]: input should be a valid integer; allowed: an integer >= 0"),
        (
            "optimizer.lr: [0.03, 0.1]",
            "optimizer.lr=[0.03, 0.1]: input should be a valid number; allowed: a number > 0",
        ),
        ("optimizer: [sgd, adamw]", 'optimizer=["sgd", "adamw"]: must be one of the choices'),
    ],
)
def test_a_list_is_no_axis(params: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    recipe = f"# @package _global_\nhydra: {{mode: MULTIRUN, sweeper: {{params: {{{params}}}}}}}\n"
    (tmp_path / "experiment/lists.yaml").write_text(recipe)
    (tmp_path / "space.yaml").write_text(f"model=mlp: {{{params}}}\n")
    values = params.partition("[")[2].removesuffix("]").replace(" ", "")
    for line in ([f"--config-dir={tmp_path}", "experiment=lists"], ["-m", "model=mlp", f"space={tmp_path}/space.yaml"]):
        message = refused(tmp_path, "train", *line, "dry_run=true")
        assert said in message and message.endswith(f"with -m: {values}\n"), message


# -- a space


def test_each_optimizer_has_its_own_grid(rates: str, tmp_path: Path) -> None:
    expected = [
        "optimizer=sgd optimizer.nesterov=True optimizer.lr=0.03 optimizer.momentum=0.8 seed=0",
        "optimizer=sgd optimizer.nesterov=True optimizer.lr=0.03 optimizer.momentum=0.9 seed=0",
        "optimizer=sgd optimizer.nesterov=True optimizer.lr=0.1 optimizer.momentum=0.8 seed=0",
        "optimizer=sgd optimizer.nesterov=True optimizer.lr=0.1 optimizer.momentum=0.9 seed=0",
        "optimizer=adamw optimizer.lr=0.001 seed=0",
        "optimizer=adamw optimizer.lr=0.003 seed=0",
        "optimizer=adamw optimizer.lr=0.01 seed=0",
    ]
    words = ["optimizer=sgd,adamw", "seed=0", rates]
    assert jobs(*words) == expected
    assert [" ".join(overrides_of(number, words)) for number in (0, 6)] == [expected[0], expected[6]]
    assert jobs(rates, "optimizer=adamw", "optimizer.lr=1,2") == [
        "optimizer=adamw optimizer.lr=1",
        "optimizer=adamw optimizer.lr=2",
    ]
    assert jobs(rates)[-1] == "optimizer.nesterov=True optimizer.lr=0.1 optimizer.momentum=0.9"  # of the default, sgd
    (tmp_path / "more.yaml").write_text(
        "optimizer.nesterov=true: {optimizer.momentum: 0.8}\nepochs=10: {optimizer.lr: 1}"
    )
    more = f"space={tmp_path / 'more.yaml'}"
    assert jobs("epochs=1e1", "optimizer.nesterov=True,False", more) == [
        "epochs=10.0 optimizer.lr=1 optimizer.nesterov=True optimizer.momentum=0.8",
        "epochs=10.0 optimizer.lr=1 optimizer.nesterov=False",
    ]
    zipped = jobs("pair=zip(optimizer=[adamw,sgd],model=[mlp,gpt])", rates)
    assert len(zipped) == 7 and zipped[0] == "optimizer=adamw model=mlp optimizer.lr=0.001"


def test_a_search_draws_a_key_only_for_the_optimizers_that_have_it(rates: str) -> None:
    own = axes("optimizer=sgd,adamw", "seed=0", rates, "pair=zip(epochs=[1,2],data.subset=[100,200])")
    found = parse_space(own)
    combined = grid(own)
    assert found.size() == len(found.points()) == len(combined) == 14
    assert [sorted(found.overrides(point)) for point in found.points()] == list(map(sorted, combined))
    values = {"optimizer": "adamw", "optimizer.lr [optimizer=adamw]": "0.003", "optimizer.lr [optimizer=sgd]": "9"}
    assert found.label(values) == "optimizer=adamw optimizer.lr=0.003"  # an Adam job has no momentum
    assert found.describe()["optimizer.nesterov [optimizer=sgd]"] == "True"
    assert found.describe()["pair"] == "choice(epochs=1 data.subset=100,epochs=2 data.subset=200)"
    for axis in own:  # every value of every axis is in a job that is checked before the first one starts
        for row in axis.rows():
            assert any(set(row) <= set(probe) for probe in probes(found)), row


def test_the_space_of_the_benchmark_gives_each_optimizer_its_trials() -> None:
    words = ["optimizer=sgd,muon", "space=benchmark", "trials=3", "seeds=2"]
    found = jobs(*words)
    assert len(found) == 2 * 3 * 2 and len(set(found)) == len(found)
    assert all(("optimizer.rest_lr" in job) == ("optimizer=muon" in job) for job in found)
    assert jobs(*words[:2], "trials=4", "seeds=2")[:6] == found[:6]  # the first trials stay the same
    recipe = jobs("experiment=study/optimizers", "space=benchmark", "trials=2", "seed=0")
    assert len(recipe) == 2 * 4 and not any("optimizer.lr=0.001 " in job for job in recipe)  # a rate of the recipe
    searched = axes("optimizer=sgd,muon", "space=benchmark", "hydra/sweeper=dlopt_optuna")
    assert parse_space(searched).size() is None
    assert parse_space(searched).describe()["optimizer.rest_lr [optimizer=muon]"] == "tag(log,interval(0.0003,0.3))"


@pytest.mark.parametrize(
    ("content", "words", "reason"),
    [
        ("optimizer=sgdd: {optimizer.lr: 1}", [], "unknown choice; did you mean optimizer=sgd?"),
        ("model.depth=3: {optimizer.lr: 1}", [], "no job sets model.depth"),
        ("optimizer=lion: {optimizer.lr: 1}", [], "no job meets one of its conditions: optimizer=lion"),
        ("optimizer=sgd: {seed: 1}\nmodel=mlp: {seed: 2}", ["model=mlp"], "sections of optimizer= and model="),
        ("optimizer=sgd: 3", [], "must be a condition with keys"),
        ("optimizer: {lr: 1}", [], "must be a condition with keys"),
        ("[1, 2]", [], "must map conditions"),
        ("optimizer=sgd,adamw: {optimizer.lr: 1}", [], "a condition has one value"),
        ("optimizer=(: {optimizer.lr: 1}", [], "is not closed"),
        ("optimizer=sgd: {optimizer.lr: '(1'}", [], "is not closed"),
        ("optimizer=sgd: {hydra.run.dir: a}", [], "only keys of the jobs"),
        ("optimizer=sgd: {seed: '0,1', seed: '2'}", [], "has the key 'seed' twice"),
        ("optimizer=sgd: {name: 2024_11_26}", [], "name: 2024_11_26 is 20241126 in YAML; write a text in quotes"),
        ("optimizer=sgd: {seed: 012}", [], "optimizer=sgd.seed: 012 is 10 in YAML"),
        ("optimizer=sgd: {p: 'zip(seed=[1,2],epochs=[1,2])'}", ["seed=1"], "seed is also set outside the space"),
        ("optimizer=sgd: {optimizer.lr: 1}", ["trials=3"], "nothing to draw"),
        ("optimizer=sgd: {optimizer.lr: 'interval(1,2)'}", ["trials=0"], "from 1 to 10000"),
        ("model=mlp: {optimizer.lr: 1}", ["experiment=a,b"], "each recipe may choose another model; type model="),
        (None, [], "no such file; allowed: benchmark, a YAML file"),
    ],
)
def test_refuses_invalid_spaces(content: str | None, words: list[str], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        axes("optimizer=sgd,adamw", f"space={path}", *words)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_values_of_a_space_are_those_of_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text('optimizer=sgd: {note: "it is, fine", name: "größe,klein", ema: null, model.widths: [4, 5]}\n')
    jobs = grid(axes("optimizer=sgd", f"space={path}"))
    common = ["optimizer=sgd", "note='it is, fine'"]
    assert jobs == [[*common, f"name={name}", "ema=null", "model.widths=[4,5]"] for name in ("'größe'", "klein")]


def test_a_plain_interval_is_still_no_grid() -> None:
    assert space("a=interval(0,1)").size() is None
    with pytest.raises(UserError, match="a grid needs listed values"):
        jobs("optimizer.lr=interval(0,1)")
