"""Sharded checkpoints of two processes: complete or absent, whichever rank crashes or fails, at any call."""

import json
import logging
import os
import pickle
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as torch_checkpoint

from dlopt.basics.errors import RunError, UserError
from dlopt.basics.files import sha256, synced, write, write_digests
from dlopt.basics.folders import FORMAT
from dlopt.parallel import shard_files
from dlopt.parallel.processes import rendezvous
from dlopt.parallel.processes.process_group import ProcessGroup
from dlopt.parallel.shard_files import ShardWriter
from dlopt.training.checkpoint import sharded
from dlopt.training.checkpoint.checkpoints import Checkpoints, is_intact, load
from dlopt.training.checkpoint.content import KEYS
from dlopt.training.checkpoint.weight_files import read_weights
from tests.support.checkpoints import Crashes
from tests.support.checkpoints import state as small_state
from tests.support.faults import empty, flip_bit, truncate
from tests.support.runs import same

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")


def state(step: int, **more: Any) -> dict[str, Any]:
    """Returns a state with tensors whose shards are unequal, or empty on one of two ranks."""
    weights = torch.arange(15.0).reshape(5, 3) + step
    return {
        **small_state(step),
        "model": {"a.weight": weights, "b.weight": weights[:1] / 3, "b.running_mean": torch.full((2,), float(step))},
        "optimizer": {
            "state": {0: {"step": torch.tensor(float(step)), "momentum_buffer": weights.double()}, 1: {}},
            "param_groups": [{"lr": 0.1, "params": [0, 1]}],
        },
        **more,
    }


def shard_state(state: dict[str, Any]) -> dict[str, Any]:
    """Called on all ranks: returns the state with weights as DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))

    def shard_value(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: shard_value(each, str(key)) for key, each in value.items()}
        if isinstance(value, torch.Tensor) and ("weight" in name or "momentum" in name):
            return distribute_tensor(value, mesh, [Shard(0)])
        return value

    return {key: shard_value(each, key) for key, each in state.items()}


def in_ranks(
    folder: Path, function: Callable[[Checkpoints, int], object], processes: int = 2, **options: Any
) -> list[int]:
    """Calls `function(checkpoints, rank)` in processes; returns their wait statuses."""
    import torch._dynamo  # DTensor imports it, which takes seconds: here once, not in every process

    folder.mkdir(parents=True, exist_ok=True)
    store = folder / f"store{time.monotonic_ns()}"
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ.update(DLOPT_RANK=str(rank), DLOPT_PROCESSES=str(processes), DLOPT_STORE=str(store))
                world = rendezvous.current()
                assert world is not None
                ProcessGroup(world, torch.device("cpu"), minutes=0.5)
                function(checkpoints_of(folder, rank, **options), rank)
                code = 0
            except Exception as error:
                print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    store.unlink(missing_ok=True)
    return statuses


def checkpoints_of(folder: Path, rank: int, **options: Any) -> Checkpoints:
    shards = ShardWriter(rank, minutes=0.5)
    return Checkpoints(folder / "checkpoints", writes=rank == 0, shards=shards, **options)


def saved(folder: Path, *steps: int, best: bool = False, **options: Any) -> Path:
    """Saves checkpoints after these updates; returns their folder."""

    def save(checkpoints: Checkpoints, rank: int) -> None:
        for step in steps:
            checkpoints.save(shard_state(state(step)), best=best and step == steps[0])
        checkpoints.wait()

    assert in_ranks(folder, save, **options) == [0, 0]
    return folder / "checkpoints"


def newest_step(folder: Path) -> int | None:
    loaded = Checkpoints(folder).load_newest()
    return None if loaded is None else loaded.step


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_dir()} | {
        path.name for path in folder.glob("*.pt")
    }


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("shared"), 1, 2, best=True)


@pytest.fixture
def folder(shared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared, tmp_path / "checkpoints"))


# -- saving and loading


def test_sharded_checkpoints_load_like_one_file(folder: Path) -> None:
    loaded = load(folder / "last.pt").state
    assert set(loaded) == KEYS and loaded["format"] == FORMAT
    assert same({key: loaded[key] for key in state(2)}, state(2))
    assert list(loaded["model"]) == list(state(2)["model"])
    assert same(load(folder / "best.pt").model, state(1)["model"])
    assert same(read_weights(folder / "best.pt")[0], state(1)["model"])
    raw = torch.load(folder / "last.pt", weights_only=True)
    assert raw["model"]["a.weight"] is None and raw["model"]["b.running_mean"] is not None
    assert sorted(each.name for each in (folder / "shards/step-2").iterdir()) == [
        "rank-0.safetensors",
        "rank-1.safetensors",
    ]
    assert is_intact(folder / "last.pt")


@pytest.mark.parametrize("options", [{}, {"asynchronous": True}, {"keep": 3}, {"keep": 1}], ids=str)
def test_shards_are_kept_with_their_checkpoints(tmp_path: Path, options: dict[str, Any]) -> None:
    """Kept: the best one and the `keep` newest."""
    folder = saved(tmp_path, 8, 9, 10, 11, best=True, **options)
    steps = [9, 10, 11][-options.get("keep", 2) :]
    assert {each.name for each in (folder / "shards").iterdir()} == {f"step-{step}" for step in (8, *steps)}
    assert names(folder) >= {"last.pt", "best.pt", *(f"step-{step}.pt" for step in steps[:-1])}
    assert newest_step(folder) == 11 and load(folder / "best.pt").step == 8


def test_saving_the_same_step_again_keeps_existing_shards(folder: Path) -> None:
    """As after resuming from an earlier checkpoint."""
    before = sha256(folder / "shards/step-2/rank-0.safetensors")

    def save(checkpoints: Checkpoints, rank: int) -> None:
        checkpoints.save(shard_state(state(2, ema={"weight": torch.zeros(3)})), best=False)

    assert in_ranks(folder.parent, save) == [0, 0]
    assert load(folder / "last.pt").state["ema"] is not None
    assert sharded.shard_folder(folder / "last.pt") == "step-2-1"
    assert sha256(folder / "shards/step-2/rank-0.safetensors") == before, "step-2.pt's"


def test_unsharded_checkpoints_replace_shards(folder: Path) -> None:
    checkpoints = Checkpoints(folder)
    for step in (3, 4, 5):
        checkpoints.save(small_state(step), best=step == 3)
    assert not (folder / "shards").exists() and newest_step(folder) == 5


# -- what is written

VALUES = torch.arange(-7, 8).reshape(5, 3)
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.complex64, torch.complex128,
]  # fmt: skip
TENSORS = {
    **{str(dtype): VALUES.to(dtype) for dtype in DTYPES},
    "imaginary": VALUES * (1 - 2j),
    "scalar": torch.tensor(0.1),
    "empty": torch.empty(0, 3),
    "without columns": torch.empty(4, 0),
    "one row": torch.ones(1, 2),
    "transposed": torch.arange(35.0).reshape(5, 7).T,
    "expanded": torch.tensor([[1.0], [2.0], [3.0]]).expand(3, 4),
    "ünïcode \u2028": torch.ones(3),
}


def write_on_meshes(checkpoints: Checkpoints, _: int) -> None:
    """Called on four ranks: writes the tensors, sharded in several ways."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    folder, writer = checkpoints.folder, checkpoints.shards
    assert writer is not None
    writer.join()
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    for name, mesh, placements in (
        ("fsdp", line, [Shard(0)]),
        ("hsdp", square, [Replicate(), Shard(0)]),
        ("2d", square, [Shard(0), Shard(1)]),
        ("twice", square, [Shard(0), Shard(0)]),
        ("replicated", line, [Replicate()]),
    ):
        tensors = {
            key: distribute_tensor(
                value, mesh, placements if value.ndim == 2 else [Replicate()] * mesh.ndim, src_data_rank=None
            )
            for key, value in TENSORS.items()
        }
        local = {key: tensor.to_local() for key, tensor in tensors.items()}
        tensors["tied"] = tensors["transposed"]
        tied = tensors["tied"]
        strided = local["transposed"].T.contiguous().T
        tensors["strided"] = DTensor.from_local(
            strided, mesh, tied.placements, shape=tied.shape, stride=tied.stride(), run_check=False
        )
        writer.write(folder, name, tensors)
    partial = DTensor.from_local(torch.ones(2), line, [torch.distributed.tensor.Partial()])
    for tensor, message in (
        (partial, "x: placements=.*Partial.* cannot be saved"),
        (DTensor.from_local(torch.ones(4).to(torch.float8_e4m3fnuz), line, [Shard(0)]), "x: dtype=.* cannot be saved"),
    ):
        with pytest.raises(RunError, match=message):
            writer.write(folder, "refused", {"x": tensor})


@pytest.fixture(scope="module")
def meshes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("meshes")
    assert in_ranks(folder, write_on_meshes, processes=4) == [0] * 4
    return folder / "checkpoints"


@pytest.mark.parametrize("name", ["fsdp", "hsdp", "2d", "twice", "replicated"])
def test_all_tensors_survive(meshes: Path, name: str) -> None:
    files = sorted(path.name for path in (meshes / name).iterdir())
    assert files == [f"rank-{rank}.safetensors" for rank in range(4)]
    transposed = TENSORS["transposed"]
    expected = {**TENSORS, "tied": transposed, "strided": transposed}
    read = shard_files.read(meshes / name, files)
    assert read.keys() == expected.keys()
    assert [name for name in expected if not same(as_bytes(read[name]), as_bytes(expected[name]))] == []
    elements = sum(value.nbytes for value in TENSORS.values()) + 2 * transposed.nbytes
    headers = sum(int.from_bytes(path.read_bytes()[:8], "little") + 8 for path in (meshes / name).iterdir())
    assert sum(path.stat().st_size for path in (meshes / name).iterdir()) == elements + headers, "replicas once"


def as_bytes(tensor: torch.Tensor) -> tuple[object, ...]:
    """torch.equal does not compare all data types."""
    return tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8)


def test_the_reader_of_torch_reads_the_files(meshes: Path) -> None:
    names = ["torch.float32", "torch.bfloat16", "torch.int64", "transposed", "one row", "scalar"]
    read = {name: torch.zeros_like(TENSORS[name]) for name in names}
    with pytest.warns(UserWarning, match="torch.distributed"):
        torch_checkpoint.load(
            read, storage_reader=torch_checkpoint.HuggingFaceStorageReader(str(meshes / "2d")), no_dist=True
        )
    assert same(read, {name: TENSORS[name] for name in names})


def test_replicas_share_the_writing(meshes: Path) -> None:
    sizes = [path.stat().st_size for path in sorted((meshes / "hsdp").iterdir())]
    assert max(sizes) < 2 * min(sizes)


# -- damage


def flip(file: Path) -> None:
    flip_bit(file, random.Random(0))


def remove_all(file: Path) -> None:
    shutil.rmtree(file.parent)


DAMAGES = {
    "flipped": flip, "truncated": partial(truncate, draws=random.Random(0)), "empty": partial(empty, draws=None),
    "removed": Path.unlink, "all removed": remove_all,
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["rank-0.safetensors", "rank-1.safetensors"])
def test_damaged_shard_is_reported_and_previous_checkpoint_loaded(
    folder: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder / "shards/step-2" / name)
    assert not is_intact(folder / "last.pt")
    what = "the folder of its shards" if damage is remove_all else f"the shard .*step-2/{name}"
    with pytest.raises(UserError, match=rf"last\.pt: {what}"):
        load(folder / "last.pt")
    with caplog.at_level(logging.WARNING):
        assert newest_step(folder) == 1
    assert "step-2" in caplog.text and "trying the previous checkpoint" in caplog.text
    damage(folder / "shards/step-1" / name)
    with pytest.raises(RunError, match=r"all checkpoints in .* are damaged \(last\.pt, step-1\.pt\)"):
        newest_step(folder)


def test_missing_shards_raise(folder: Path, tmp_path: Path) -> None:
    for name in ("last.pt", "last.pt.sha256"):
        shutil.copy(folder / name, tmp_path)
    with pytest.raises(UserError, match=r"the folder of its shards is missing: .*/shards/step-2"):
        load(tmp_path / "last.pt")
    sharded.copy(folder / "last.pt", sharded.load_without_shards(folder / "last.pt"), tmp_path)
    assert load(tmp_path / "last.pt").step == 2


def test_saving_continues_after_damage(folder: Path) -> None:
    flip(folder / "shards/step-2/rank-1.safetensors")

    def save(checkpoints: Checkpoints, rank: int) -> None:
        checkpoints.save(shard_state(state(3)), best=False)

    assert in_ranks(folder.parent, save) == [0, 0]
    assert newest_step(folder) == 3
    flip(folder / "shards/step-3/rank-1.safetensors")
    assert newest_step(folder) == 1, "the damaged checkpoint was not kept as a previous one"


# -- hostile files


def signed(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Returns last.pt with changed shards and a matching checksum, as an attacker could write it."""
    path = folder / "last.pt"
    raw = torch.load(path, weights_only=True)
    change(raw["shards"])
    path.unlink()
    write(path, lambda file: torch.save(raw, file))
    return path


@pytest.mark.parametrize(
    "entry",
    [
        {"folder": "../shards/step-2"}, {"folder": "/etc"}, {"folder": ".hidden"}, {"folder": 3}, {"files": {}},
        {"files": [1]}, {"files": 3}, {"files": {"": "0"}}, {"files": {"..": "0"}}, {"files": {"../step-1/x": "0"}},
        {"files": {"/etc/passwd": "0"}}, {"tensors": {"x": ["model", "x"]}}, {"tensors": {}}, {"tensors": 7},
    ],
    ids=str,
)  # fmt: skip
def test_invalid_shard_entries_are_refused(folder: Path, entry: dict[str, Any]) -> None:
    path = signed(folder, lambda shards: shards.update(entry))
    with pytest.raises(UserError, match=r"last\.pt: (the shard|the folder of|its list of)"):
        load(path)


def test_unlisted_files_are_not_read(folder: Path) -> None:
    shards = folder / "shards/step-2"
    shutil.copy(shards / "rank-1.safetensors", shards / "rank-2.safetensors")
    assert same(load(folder / "last.pt").model, state(2)["model"])
    path = signed(folder, lambda entry: entry["files"].pop("rank-1.safetensors"))
    with pytest.raises(UserError, match=r"the shards cannot be read: the shards of .* do not add up"):
        load(path)


ROWS = torch.arange(6.0).reshape(2, 3)
LINE = torch.arange(6.0)


def put(path: Path, tensor: torch.Tensor, offsets: Any, shape: Any, **more: Any) -> None:
    position = {"saved_offsets": offsets, "full_shape": shape, **more}
    save_file({"a": tensor}, path, {"DCP_SHARDING_INFO": json.dumps({"a": position})})


def test_shards_that_safetensors_wrote_are_read(tmp_path: Path) -> None:
    put(tmp_path / "x", ROWS[:1], [0, 0], [2, 3])
    put(tmp_path / "y", ROWS[1:, :2].contiguous(), [1, 0], [2, 3])
    put(tmp_path / "z", ROWS[1:, 2:].contiguous(), [1, 2], [2, 3])
    assert same(shard_files.read(tmp_path, ["y", "z", "x"]), {"a": ROWS})


INVALID = (None, 0, "00", [0], [0, 0, 0], [0, "0"], [0, 0.0], [False, 0], [0, -1], [0, 2**70])
POSITIONS: dict[str, tuple[str | None, str]] = {
    "no metadata": (None, "x: the position of 'a' is missing"),
    "no JSON": ("{", "x: Expecting"),
    "nested JSON": ("[" * 100_000, "x: maximum recursion depth"),
    "a list": ("[1]", "x: the position of 'a' is missing"),
    "of another tensor": ('{"b": {"saved_offsets": [0, 0], "full_shape": [2, 3]}}', "the position of 'a' is missing"),
    **{
        f"{key}={value}": (json.dumps({"a": {**position, key: value}}), "x: the position of 'a' is missing or invalid")
        for position in [{"saved_offsets": [0, 0], "full_shape": [2, 3]}]
        for key in position
        for value in INVALID
    },
}


@pytest.mark.parametrize(("positions", "message"), POSITIONS.values(), ids=POSITIONS)
def test_invalid_positions_are_refused(tmp_path: Path, positions: str | None, message: str) -> None:
    save_file({"a": ROWS}, tmp_path / "x", None if positions is None else {"DCP_SHARDING_INFO": positions})
    with pytest.raises(ValueError, match=message):
        shard_files.read(tmp_path, ["x"])


SUM = "the shards of 'a' do not add up to the tensor"
DIFFER = "the shards of 'a' differ in their data types or full shapes"
COMBINATIONS: dict[str, tuple[list[tuple[Any, ...]], str]] = {
    "missing": ([(ROWS[:1], [0, 0], [2, 3])], SUM),
    "outside": ([(ROWS, [1, 0], [2, 3])], SUM),
    "one outside": ([(ROWS[:1, :1], [1, 0], [1, 1])], SUM),
    "far outside": ([(LINE[:4], [0], [6]), (LINE[4:], [2**62], [6])], SUM),
    "another shape": ([(ROWS, [0, 0], [3, 2])], SUM),
    "oversize": ([(ROWS, [0, 0], [10**9, 10**9])], SUM),
    "twice": ([(ROWS, [0, 0], [2, 3]), (ROWS, [0, 0], [2, 3])], SUM),
    "overlap": ([(LINE[:4], [0], [6]), (LINE[3:], [3], [6])], SUM),
    "overlap and hole": ([(LINE[:3], [0], [6]), (LINE[1:3], [1], [6]), (LINE[5:], [5], [6])], SUM),
    "other types": ([(ROWS[:1], [0, 0], [2, 3]), (ROWS[1:].int(), [1, 0], [2, 3])], DIFFER),
    "other shapes": ([(ROWS[:1], [0, 0], [2, 3]), (ROWS[1:], [1, 0], [3, 3])], DIFFER),
    "half complex": ([(ROWS[:1], [0, 0], [2, 3], True), (ROWS[1:], [1, 0], [2, 3])], DIFFER),
    "complex without pairs": ([(ROWS, [0, 0], [2, 3], True)], "must have a last dimension of size 2"),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "message"), COMBINATIONS.values(), ids=COMBINATIONS)
def test_shards_that_are_not_a_tensor_are_refused(tmp_path: Path, parts: list[tuple[Any, ...]], message: str) -> None:
    for number, (tensor, offsets, shape, *is_complex) in enumerate(parts):
        put(tmp_path / f"{number}", tensor.clone(), offsets, shape, complex=bool(is_complex))
    with pytest.raises((ValueError, RuntimeError), match=message):
        shard_files.read(tmp_path, map(str, range(len(parts))))


def raw(data: bytes = bytes(24), **changes: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}
    positions = {"a": {"saved_offsets": [0, 0], "full_shape": [2, 3]}}
    text = json.dumps({"__metadata__": {"DCP_SHARDING_INFO": json.dumps(positions)}, "a": entry}).encode()
    return len(text).to_bytes(8, "little") + text + data


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "x: "),
    "text": (b"text without a header", "x: Error while deserializing header"),
    "pickle": (pickle.dumps(print), "x: Error while deserializing header"),
    "oversize header": ((2**60).to_bytes(8, "little") + b"{}", "x: Error while deserializing header"),
    "truncated": (raw()[:-1], "x: Error while deserializing header"),
    "trailing bytes": (raw() + b"x", "x: Error while deserializing header"),
    "oversize tensor": (raw(shape=[10**6, 10**6]), "x: Error while deserializing header"),
    "overflow": (raw(shape=[2**62, 2**62]), "x: Error while deserializing header"),
    "negative size": (raw(shape=[-2, -3]), "x: Error while deserializing header"),
    "outside": (raw(data_offsets=[0, 10**12]), "x: Error while deserializing header"),
    "other bytes": (raw(data_offsets=[8, 24]), "x: Error while deserializing header"),
    "unknown type": (raw(dtype="F4", shape=[2, 24]), "'a' has the unsupported data type F4|deserializing header"),
    "no type": (raw(dtype="X"), "x: Error while deserializing header"),
}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES)
def test_hostile_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(raw())
    assert same(shard_files.read(tmp_path, ["x"]), {"a": torch.zeros(2, 3)})
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        shard_files.read(tmp_path, ["x"])


@pytest.mark.parametrize("name", ["rank-0.safetensors"])
@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_shards_that_are_no_regular_files_are_refused(folder: Path, tmp_path: Path, name: str, kind: str) -> None:
    """A link could lead to a file elsewhere, and reading a FIFO never ends."""
    shard, elsewhere = folder / "shards/step-2" / name, tmp_path / "elsewhere"
    shard.rename(elsewhere)
    shard.symlink_to(elsewhere) if kind == "link" else os.mkfifo(shard)
    assert not is_intact(folder / "last.pt")
    with pytest.raises(UserError, match=rf"last\.pt: the shard .*{name} is not a regular file"):
        load(folder / "last.pt")


def test_the_checkpoint_file_is_checked_before_its_shards(folder: Path) -> None:
    write_digests(folder / "last.pt", ["0" * 64])
    with pytest.raises(UserError, match="the file is damaged"):
        load(folder / "last.pt")


# -- crashes and failures


class AnyCrash(Crashes):
    """Kills the process at the n-th call that changes the file system."""

    def install(self) -> None:
        super().install()
        for name in ("mkdir", "rename", "rmdir"):
            setattr(os, name, self._wrap(getattr(os, name)))
        shard_files.synced = self._half_written  # type: ignore[assignment]

    @contextmanager
    def _half_written(self, path: Path) -> Iterator[Any]:
        with synced(path) as file:

            class Halves:
                def write(_, data: Any) -> None:
                    half = len(data) // 2
                    file.write(data[:half])
                    file.flush()
                    self._wrap(file.write)(data[half:])

            yield Halves()


def crash(folder: Path, crashing_rank: int, boundary: int, after: bool) -> bool:
    """Kills a rank in a save, checks the files it leaves and that saving continues; returns whether it was killed."""

    def save(checkpoints: Checkpoints, rank: int) -> None:
        for step in (8, 9):
            checkpoints.save(shard_state(state(step)), best=step == 8)
        if rank == crashing_rank:
            AnyCrash(boundary, after).install()
        checkpoints.save(shard_state(state(10)), best=True)

    statuses = in_ranks(folder, save)
    died = os.WIFSIGNALED(statuses[crashing_rank])
    checkpoint_folder = folder / "checkpoints"
    loaded = Checkpoints(checkpoint_folder).load_newest()
    assert loaded is not None
    step = loaded.step
    assert step in (9, 10) and (died or step == 10)
    assert same({key: loaded.state[key] for key in state(step)}, state(step))
    assert load(checkpoint_folder / "best.pt").step in ((8, 10) if step == 10 else (8,))

    def save_again(checkpoints: Checkpoints, rank: int) -> None:
        for step in (11, 12):
            checkpoints.save(shard_state(state(step)), best=step == 11)

    assert in_ranks(folder, save_again) == [0, 0]
    expected = {"last.pt", "best.pt", "step-11.pt", "shards", "shards/step-11", "shards/step-12"}
    assert names(checkpoint_folder) == expected
    assert not [path for path in checkpoint_folder.rglob("*.tmp")]
    return died


@pytest.mark.parametrize(("crashing_rank", "boundary"), [(0, 4), (0, 12), (1, 2)])
def test_killed_rank_leaves_complete_checkpoints(tmp_path: Path, crashing_rank: int, boundary: int) -> None:
    assert crash(tmp_path, crashing_rank, boundary, after=False)


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("crashing_rank", [0, 1])
def test_killed_at_any_call_leaves_complete_checkpoints(tmp_path: Path, crashing_rank: int, after: bool) -> None:
    """At every fifth call of rank 0 (about 60 calls), and at every call of rank 1."""
    stride = 5 if crashing_rank == 0 else 1
    boundary = 1 + int(after)
    while crash(tmp_path / f"{boundary}", crashing_rank, boundary, after):
        boundary += stride
    assert boundary > (20 if crashing_rank == 0 else 3), "fewer calls: they were not intercepted"


@pytest.mark.parametrize("crashing_rank", [0, 1])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_full_disk_on_one_rank_raises_on_all(
    tmp_path: Path, crashing_rank: int, asynchronous: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def save(checkpoints: Checkpoints, rank: int) -> None:
        checkpoints.save(shard_state(state(1)), best=False)
        checkpoints.wait()
        original, os.fsync = os.fsync, fail if rank == crashing_rank else os.fsync
        try:
            checkpoints.save(shard_state(state(2)), best=False)
            checkpoints.wait()
        except RunError as error:
            assert str(error).startswith(f"the checkpoint {checkpoints.last} could not be written: ")
            assert f"rank {crashing_rank}: No space left on device" in str(error)
        else:
            raise AssertionError("no error was raised")
        os.fsync = original
        if rank == 0:
            assert newest_step(checkpoints.folder) == 1
            assert not list(checkpoints.folder.rglob("*.tmp"))
        checkpoints.save(shard_state(state(3)), best=False)
        checkpoints.wait()

    assert in_ranks(tmp_path, save, asynchronous=asynchronous) == [0, 0], capfd.readouterr().err
    assert newest_step(tmp_path / "checkpoints") == 3


def test_unshared_file_system_raises(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def save(checkpoints: Checkpoints, rank: int) -> None:
        if rank == 1:  # a local disk with folders of the same name
            checkpoints.folder = tmp_path / "elsewhere"
            (checkpoints.folder / "shards/.step-1.tmp").mkdir(parents=True)
        with pytest.raises(
            RunError, match=r"rank 0 does not see .*, which rank 1 has written: .* checkpoint\.sharded=false"
        ):
            checkpoints.save(shard_state(state(1)), best=False)

    assert in_ranks(tmp_path, save) == [0, 0], capfd.readouterr().err


def test_asynchronous_saves_copy_the_state_first(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def save(checkpoints: Checkpoints, rank: int) -> None:
        original = sharded.write

        def slow(*arguments: Any) -> dict[str, Any]:
            time.sleep(0.1)
            return original(*arguments)

        sharded.write = slow
        sharded_state = shard_state(state(1))
        checkpoints.save(sharded_state, best=True)
        sharded_state["model"]["a.weight"].zero_()
        checkpoints.wait()

    assert in_ranks(tmp_path, save, asynchronous=True) == [0, 0], capfd.readouterr().err
    assert same(load(tmp_path / "checkpoints/last.pt").model, state(1)["model"])
