"""Sharded checkpoints of two processes: complete or absent, whichever rank crashes or fails, at any call."""

import io
import logging
import os
import pickle
import random
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint import save as save_shards
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from dlopt.errors import RunError, UserError
from dlopt.files import sha256, write, write_digests
from dlopt.parallel import rendezvous, shard_files
from dlopt.parallel.process_group import ProcessGroup
from dlopt.parallel.shard_files import ShardWriter
from dlopt.training import sharded
from dlopt.training.checkpoint import FORMAT, KEYS, Checkpoints, is_intact, load
from dlopt.training.weights import read_weights
from tests.support.checkpoints import Crashes, Payload
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


def in_ranks(folder: Path, function: Callable[[Checkpoints, int], object], **options: Any) -> list[int]:
    """Calls `function(checkpoints, rank)` in two processes; returns their wait statuses."""
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / f"store{time.monotonic_ns()}"
    children = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ.update(DLOPT_RANK=str(rank), DLOPT_PROCESSES="2", DLOPT_STORE=str(store))
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
    return None if loaded is None else int(loaded["progress"]["step"])


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.name[:2] != "__" and path.is_dir()} | {
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
    loaded = load(folder / "last.pt")
    assert set(loaded) == KEYS and loaded["format"] == FORMAT
    assert same({key: loaded[key] for key in state(2)}, state(2))
    assert list(loaded["model"]) == list(state(2)["model"])
    assert same(load(folder / "best.pt")["model"], state(1)["model"])
    assert same(read_weights(folder / "best.pt"), state(1)["model"])
    raw = torch.load(folder / "last.pt", weights_only=True)
    assert raw["model"]["a.weight"] is None and raw["model"]["b.running_mean"] is not None
    assert sorted(each.name for each in (folder / "shards/step-2").iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
    ]
    assert is_intact(folder / "last.pt")


@pytest.mark.parametrize("options", [{}, {"asynchronous": True}, {"keep": 3}, {"keep": 1}], ids=str)
def test_shards_are_kept_with_their_checkpoints(tmp_path: Path, options: dict[str, Any]) -> None:
    """Kept: the best one and the `keep` newest."""
    folder = saved(tmp_path, 8, 9, 10, 11, best=True, **options)
    steps = [9, 10, 11][-options.get("keep", 2) :]
    assert {each.name for each in (folder / "shards").iterdir()} == {f"step-{step}" for step in (8, *steps)}
    assert names(folder) >= {"last.pt", "best.pt", *(f"step-{step}.pt" for step in steps[:-1])}
    assert newest_step(folder) == 11 and load(folder / "best.pt")["progress"]["step"] == 8


def test_saving_the_same_step_again_keeps_existing_shards(folder: Path) -> None:
    """As after resuming from an earlier checkpoint."""
    before = sha256(folder / "shards/step-2/__0_0.distcp")

    def save(checkpoints: Checkpoints, rank: int) -> None:
        checkpoints.save(shard_state(state(2, ema={"weight": torch.zeros(3)})), best=False)

    assert in_ranks(folder.parent, save) == [0, 0]
    assert load(folder / "last.pt")["ema"] is not None
    assert sharded.shard_folder(folder / "last.pt") == "step-2-1"
    assert sha256(folder / "shards/step-2/__0_0.distcp") == before, "step-2.pt's"


def test_unsharded_checkpoints_replace_shards(folder: Path) -> None:
    checkpoints = Checkpoints(folder)
    for step in (3, 4, 5):
        checkpoints.save(small_state(step), best=step == 3)
    assert not (folder / "shards").exists() and newest_step(folder) == 5


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
@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata"])
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
    sharded.copy(folder / "last.pt", tmp_path)
    assert load(tmp_path / "last.pt")["progress"]["step"] == 2


def test_saving_continues_after_damage(folder: Path) -> None:
    flip(folder / "shards/step-2/__1_0.distcp")

    def save(checkpoints: Checkpoints, rank: int) -> None:
        checkpoints.save(shard_state(state(3)), best=False)

    assert in_ranks(folder.parent, save) == [0, 0]
    assert newest_step(folder) == 3
    flip(folder / "shards/step-3/__1_0.distcp")
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


def test_code_in_metadata_is_not_executed(folder: Path, tmp_path: Path) -> None:
    marker, metadata = tmp_path / "marker", folder / "shards/step-2/.metadata"
    metadata.write_bytes(pickle.dumps(Payload(marker)))
    path = signed(folder, lambda entry: entry["files"].update({".metadata": sha256(metadata)}))
    with pytest.raises(UserError, match=r"the shards cannot be read: .* is not allowed"):
        load(path)
    assert not marker.exists()
    pickle.loads(metadata.read_bytes())
    assert marker.exists(), "the payload works with an unrestricted unpickler"


@pytest.mark.parametrize(
    "entry",
    [
        {"folder": "../shards/step-2"}, {"folder": "/etc"}, {"folder": ".hidden"}, {"folder": 3}, {"files": {}},
        {"files": [1]}, {"files": 3}, {"tensors": {"x": ["model", "x"]}}, {"tensors": 7},
    ],
    ids=str,
)  # fmt: skip
def test_invalid_shard_entries_are_refused(folder: Path, entry: dict[str, Any]) -> None:
    path = signed(folder, lambda shards: shards.update(entry))
    with pytest.raises(UserError, match=r"last\.pt: (the shard|the folder of|its list of)"):
        load(path)


def test_shards_outside_their_folder_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = folder / "shards/step-2/.metadata"
    contents = pickle.loads(metadata.read_bytes())
    for info in contents.storage_data.values():
        info.relative_path = f"../step-1/{info.relative_path}"
    metadata.write_bytes(pickle.dumps(contents))
    path = signed(folder, lambda entry: entry["files"].update({".metadata": sha256(metadata)}))
    with pytest.raises(UserError, match=r"the shards cannot be read: there is no file \.\./step-1/"):
        load(path)


SHARDS = ("__0_0.distcp", ".metadata")
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7), "c": torch.empty(0, 3)}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of shards that one process has written."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with pytest.warns(UserWarning, match="torch.distributed"):
        save_shards(dict(TENSORS), storage_writer=FileSystemWriter(tmp_path / "x"), planner=planner, no_dist=True)
    return tmp_path / "x"


def test_shards_of_one_process_are_read(shards: Path) -> None:
    assert same(shard_files.read(shards, SHARDS), TENSORS)


def chunk(metadata: Metadata) -> ChunkStorageMetadata:
    return entry(metadata).chunks[0]


def entry(metadata: Metadata) -> TensorStorageMetadata:
    found = metadata.state_dict_metadata["a"]
    assert isinstance(found, TensorStorageMetadata)
    return found


def place(metadata: Metadata) -> Any:
    return metadata.storage_data[MetadataIndex("a", [0, 0])]


def resize(metadata: Metadata, *size: Any) -> None:
    entry(metadata).size = chunk(metadata).sizes = torch.Size(size)


def grow_file(metadata: Metadata) -> None:
    resize(metadata, 10**6, 10**6)
    place(metadata).length = 10**13


def twice(metadata: Metadata) -> None:
    entry(metadata).chunks.append(chunk(metadata))
    entry(metadata).size = torch.Size([4, 3])


def in_two_tensors(metadata: Metadata) -> None:
    for number in range(3):
        metadata.state_dict_metadata[f"a{number}"] = entry(metadata)
        metadata.storage_data[MetadataIndex(f"a{number}", [0, 0])] = place(metadata)


def of_bytes(metadata: Metadata) -> None:
    metadata.state_dict_metadata["a"] = BytesStorageMetadata()


class Other(Metadata):
    """A subclass."""


HOSTILE: dict[str, tuple[Callable[[Metadata], Any], str]] = {
    "bytes": (of_bytes, "BytesStorageMetadata is not allowed"),
    "a subclass": (lambda m: setattr(m, "__class__", Other), "Other is not allowed"),
    "a program": (lambda m: setattr(m, "planner_data", print), "builtins.print is not allowed"),
    "an oversize tensor": (lambda m: resize(m, 10**6, 10**6), "a is larger than its file"),
    "an oversize tensor and length": (grow_file, "bytes outside"),
    "a negative size": (lambda m: resize(m, -2, -3), "invalid Size"),
    "a size of text": (lambda m: setattr(entry(m), "size", "23"), "a str in place of a Size"),
    "a long integer": (lambda m: resize(m, 2, 3) or setattr(place(m), "length", 2**70), "bytes outside"),
    "a boolean": (lambda m: setattr(place(m), "offset", False), "bytes outside"),
    "a negative offset": (lambda m: setattr(place(m), "offset", -1), "bytes outside"),
    "a long offset": (lambda m: setattr(place(m), "offset", 10**9), "bytes outside"),
    "an absolute path": (lambda m: setattr(place(m), "relative_path", "/etc/passwd"), "there is no file /etc/passwd"),
    "an unlisted file": (lambda m: setattr(place(m), "relative_path", "unlisted"), "there is no file unlisted"),
    "the metadata": (lambda m: setattr(place(m), "relative_path", ".metadata"), r"there is no file \.metadata"),
    "no path": (lambda m: setattr(place(m), "relative_path", None), "there is no file None"),
    "a transform": (lambda m: setattr(place(m), "transform_descriptors", ["zstd"]), "is transformed"),
    "a shard outside": (lambda m: setattr(chunk(m), "offsets", torch.Size([1, 0])), "a shard outside the tensor"),
    "a shard of other dimensions": (lambda m: setattr(chunk(m), "sizes", torch.Size([6])), "outside the tensor"),
    "a hole": (lambda m: setattr(entry(m), "size", torch.Size([3, 3])), "do not add up"),
    "a shard twice": (twice, "do not add up"),
    "bytes in several tensors": (in_two_tensors, "overlap in their files"),
    "another type": (lambda m: setattr(entry(m).properties, "dtype", torch.int32), "another type or shape"),
    "no type": (lambda m: setattr(entry(m).properties, "dtype", 3), "a has an invalid type"),
    "another shape": (lambda m: resize(m, 3, 2), "another type or shape"),
    "no shards": (lambda m: setattr(entry(m), "chunks", None), "invalid shards"),
    "no file of a shard": (lambda m: m.storage_data.pop(MetadataIndex("a", [0, 0])), "a shard that is in no file"),
    "no tensors": (lambda m: setattr(m, "state_dict_metadata", None), "has no state_dict_metadata"),
    "no files": (lambda m: setattr(m, "storage_data", []), "has no storage_data"),
}


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_metadata_is_refused(shards: Path, change: Callable[[Metadata], Any], message: str) -> None:
    (shards / "unlisted").write_bytes((shards / SHARDS[0]).read_bytes())
    metadata = pickle.loads((shards / ".metadata").read_bytes())
    change(metadata)
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises((ValueError, pickle.UnpicklingError), match=message):
        shard_files.read(shards, SHARDS)


@pytest.mark.parametrize("content", [Payload, lambda _: torch.nn.Parameter(torch.zeros(2, 3)), lambda _: {"a": 1}])
def test_hostile_shards_are_refused(shards: Path, tmp_path: Path, content: Callable[[Path], object]) -> None:
    buffer = io.BytesIO()
    torch.save(content(tmp_path / "marker"), buffer)
    (shards / SHARDS[0]).write_bytes(buffer.getvalue().ljust(10_000, b"\0"))
    metadata = pickle.loads((shards / ".metadata").read_bytes())
    place(metadata).length = len(buffer.getvalue())
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises((ValueError, pickle.UnpicklingError), match=r"not a plain tensor|Weights only load failed"):
        shard_files.read(shards, SHARDS)
    assert not (tmp_path / "marker").exists()


def test_compressed_shards_are_refused(shards: Path) -> None:
    """A few bytes could inflate to terabytes."""
    buffer, packed = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(300, 300), buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    (shards / SHARDS[0]).write_bytes(packed.getvalue().ljust(10_000, b"\0"))
    metadata = pickle.loads((shards / ".metadata").read_bytes())
    place(metadata).length = len(packed.getvalue())
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="is compressed"):
        shard_files.read(shards, SHARDS)


@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_shards_that_are_no_regular_files_are_refused(folder: Path, tmp_path: Path, name: str, kind: str) -> None:
    """A link could lead to a file elsewhere, and reading a FIFO never ends."""
    shard, elsewhere = folder / "shards/step-2" / name, tmp_path / "elsewhere"
    shard.rename(elsewhere)
    shard.symlink_to(elsewhere) if kind == "link" else os.mkfifo(shard)
    assert not is_intact(folder / "last.pt")
    with pytest.raises(UserError, match=rf"last\.pt: the shard .*{name} is not a regular file"):
        load(folder / "last.pt")


@pytest.mark.parametrize("names", [("../x/.metadata", *SHARDS), ("", *SHARDS), ("..", *SHARDS)])
def test_only_files_of_the_folder_are_read(shards: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"is not a (file name|regular file)"):
        shard_files.read(shards, names)


def test_the_unpickler_calls_and_changes_nothing() -> None:
    """A pickle can call what it names, and set attributes of it: here of pathlib's class, in this process."""
    attack = b"cpathlib\nPosixPath\n(N(dS'name'\nS'x'\nstb."
    with pytest.raises(TypeError):
        shard_files._Unpickler(io.BytesIO(attack)).load()
    assert Path("/a/b").name == "b"
    for module, name in (
        ("os", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch", "Size.__class__"),
        ("torch.distributed.checkpoint.metadata", "os"),
    ):
        with pytest.raises(pickle.UnpicklingError, match=f"{module}.{name} is not allowed"):
            shard_files._Unpickler(io.BytesIO()).find_class(module, name)


class Attribute:
    """Pickled as getattr(owner, name)."""

    def __init__(self, owner: object, name: str) -> None:
        self.arguments = owner, name

    def __reduce__(self) -> Any:
        return getattr, self.arguments


def test_enums_are_read_as_python_3_11_2_pickles_them(shards: Path) -> None:
    metadata = pickle.loads((shards / ".metadata").read_bytes())
    metadata.planner_data = Attribute(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    assert same(shard_files.read(shards, SHARDS), TENSORS)


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
    step = loaded["progress"]["step"]
    assert step in (9, 10) and (died or step == 10)
    assert same({key: loaded[key] for key in state(step)}, state(step))
    assert load(checkpoint_folder / "best.pt")["progress"]["step"] in ((8, 10) if step == 10 else (8,))

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
    """At every third call of rank 0 (about 60 calls), and at every call of rank 1."""
    stride = 3 if crashing_rank == 0 else 1
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
        original, torch.save = torch.save, fail if rank == crashing_rank else torch.save
        try:
            checkpoints.save(shard_state(state(2)), best=False)
            checkpoints.wait()
        except RunError as error:
            assert str(error).startswith(f"the checkpoint {checkpoints.last} could not be written: ")
            assert f"rank {crashing_rank}: No space left on device" in str(error)
        else:
            raise AssertionError("no error was raised")
        torch.save = original
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
        original = torch.save

        def slow(*arguments: Any) -> None:
            time.sleep(0.1)
            original(*arguments)

        torch.save = slow
        sharded_state = shard_state(state(1))
        checkpoints.save(sharded_state, best=True)
        sharded_state["model"]["a.weight"].zero_()
        checkpoints.wait()

    assert in_ranks(tmp_path, save, asynchronous=True) == [0, 0], capfd.readouterr().err
    assert same(load(tmp_path / "checkpoints/last.pt")["model"], state(1)["model"])
