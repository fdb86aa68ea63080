"""GPT in every parallel mode against one process, in fp64."""

from pathlib import Path

import pytest

from dlopt.basics.errors import UserError
from dlopt.parallel.modes import chain
from dlopt.parallel.modes.columns import split_columns
from dlopt.parallel.modes.filter import split_filters
from dlopt.parallel.modes.spatial import split_rows
from tests.support.equality import Cases, compare
from tests.support.gpt import CONTEXT, gpt
from tests.support.sizes import BASE, without
from tests.support.split_models import FirstOf

RICH = [
    "model.norm=rms", "model.positions=rotary", "model.activation=swiglu", "model.qk_norm=true", "model.dropout=0.2",
]  # fmt: skip
MODES = ("ddp", "fsdp", "pipeline", "filter")


def lines(folder: Path) -> list[str]:
    """88 windows: the last of four batches has one, so that all ranks but one have an empty shard."""
    path = folder / "a.txt"
    path.write_text("\n".join(f"def f{number}(x): return {number}" for number in range(60)))
    kept = without(BASE, "data.subset", "data.val_split")
    return [
        *kept, "data=text", f"data.file={path}", "data.sequence_length=12", "data.batch_size=29", "model=gpt_nano",
        "model.width=16", "model.heads=4", "model.depth=2", "optimizer=adamw", "optimizer.lr=0.01", "clip=norm",
        "epochs=2",
    ]  # fmt: skip


def cases(folder: Path, modes: tuple[str, ...], *rich: str) -> Cases:
    base = lines(folder)
    return {
        mode: (
            [*base, *rich, *(["model.tied_embeddings=false"] if mode == "pipeline" else [])],
            [f"parallel={mode}", *(["parallel.unit_parameters=1"] if mode == "fsdp" else [])],
        )
        for mode in modes
    }


def test_tied_embeddings_stay_tied_when_heads_are_split(tmp_path: Path) -> None:
    compare(tmp_path, 2, cases(tmp_path, ("filter",), "steps=4"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_every_mode_equals_one_process(tmp_path: Path, processes: int) -> None:
    for name, rich in (("plain", []), ("rich", RICH)):
        (tmp_path / name).mkdir()
        modes = (*MODES, "hybrid") if processes == 4 else MODES  # two replicas of two processes
        compare(tmp_path / name, processes, cases(tmp_path / name, modes, *rich))


@pytest.mark.slow
def test_compiled_processes_equal_one_that_is_not_compiled(tmp_path: Path) -> None:
    single = cases(tmp_path, ("ddp", "fsdp"), "epochs=1")
    compare(tmp_path, 2, {mode: (both, [*alone, "compile=true"]) for mode, (both, alone) in single.items()})


def test_names_what_cannot_be_split() -> None:
    with pytest.raises(UserError, match=r"model\.heads=3 cannot be divided evenly among 2 processes"):
        split_filters(gpt(), (CONTEXT,), FirstOf(2))
    with pytest.raises(UserError, match="parallel=spatial: splits images"):
        split_rows(gpt(), (CONTEXT,), FirstOf(2))
    with pytest.raises(UserError, match="parallel=columns: GPT has no columns"):
        split_columns(gpt(), (CONTEXT,), FirstOf(2))
    tied = chain.flatten(gpt(), 2)
    with pytest.raises(UserError, match=r"parallel=pipeline: head shares weights.*model\.tied_embeddings=false"):
        chain.check_tied_weights([tied[:2], tied[2:]])
