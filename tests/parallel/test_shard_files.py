"""Checkpoints of which two processes write their shards: whole or absent, whoever dies or fails, wherever."""

import logging
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dlopt.errors import RunError, UserError
from dlopt.files import sha256, write, write_digests
from dlopt.parallel import rendezvous, shard_files
from dlopt.parallel.process_group import Group
from dlopt.parallel.shard_files import ShardWriter
from dlopt.training import sharded
from dlopt.training.checkpoint import FORMAT, KEYS, Checkpoints, is_intact, load, load_weights
from tests.training.runs import same
from tests.training.test_checkpoint import Crashes, Payload
from tests.training.test_checkpoint import state as small_state

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")


def state(step: int, **more: Any) -> dict[str, Any]:
    """With tensors that two processes cannot share equally, and one of which only one of them has something."""
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


def cut(state: dict[str, Any]) -> dict[str, Any]:
    """In each rank: the same with weights as every process has them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))

    def own(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: own(each, str(key)) for key, each in value.items()}
        if isinstance(value, torch.Tensor) and ("weight" in name or "momentum" in name):
            return distribute_tensor(value, mesh, [Shard(0)])
        return value

    return {key: own(each, key) for key, each in state.items()}


def in_ranks(folder: Path, function: Callable[[Checkpoints, int], object], **words: Any) -> list[int]:
    """Calls `function(checkpoints, rank)` in two processes; their wait statuses."""
    folder.mkdir(parents=True, exist_ok=True)
    meeting = folder / f"meeting{time.monotonic_ns()}"
    children = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ.update(DLOPT_RANK=str(rank), DLOPT_PROCESSES="2", DLOPT_STORE=str(meeting))
                found = rendezvous.current()
                assert found is not None
                Group(found, torch.device("cpu"), minutes=0.5)
                function(saver(folder, rank, **words), rank)
                code = 0
            except Exception as error:
                print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    meeting.unlink(missing_ok=True)
    return statuses


def saver(folder: Path, rank: int, **words: Any) -> Checkpoints:
    shards = ShardWriter(rank, minutes=0.5)
    return Checkpoints(folder / "checkpoints", writes=rank == 0, shards=shards, **words)


def saved(folder: Path, *steps: int, best: bool = False, **words: Any) -> Path:
    """The folder with checkpoints after these updates."""

    def save(checkpoints: Checkpoints, rank: int) -> None:
        for step in steps:
            checkpoints.save(cut(state(step)), best=best and step == steps[0])
        checkpoints.wait()

    assert in_ranks(folder, save, **words) == [0, 0]
    return folder / "checkpoints"


def newest_step(folder: Path) -> int | None:
    found = Checkpoints(folder).load_newest()
    return None if found is None else int(found["progress"]["step"])


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


# -- what is there


def test_what_is_saved_comes_back_as_from_one_file(folder: Path) -> None:
    found = load(folder / "last.pt")
    assert set(found) == KEYS and found["format"] == FORMAT
    assert same({key: found[key] for key in state(2)}, state(2))
    assert list(found["model"]) == list(state(2)["model"])
    assert same(load(folder / "best.pt")["model"], state(1)["model"])
    assert same(load_weights(folder / "best.pt"), state(1)["model"])
    raw = torch.load(folder / "last.pt", weights_only=True)
    assert raw["model"]["a.weight"] is None and raw["model"]["b.running_mean"] is not None
    assert sorted(each.name for each in (folder / "shards/step-2").iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
    ]
    assert is_intact(folder / "last.pt")


@pytest.mark.parametrize("words", [{}, {"asynchronous": True}, {"keep": 3}, {"keep": 1}], ids=str)
def test_shards_stay_as_long_as_their_checkpoints(tmp_path: Path, words: dict[str, Any]) -> None:
    """Those of the best stay, and those of `keep` newest."""
    folder = saved(tmp_path, 8, 9, 10, 11, best=True, **words)
    steps = [9, 10, 11][-words.get("keep", 2) :]
    assert {each.name for each in (folder / "shards").iterdir()} == {f"step-{step}" for step in (8, *steps)}
    assert names(folder) >= {"last.pt", "best.pt", *(f"step-{step}.pt" for step in steps[:-1])}
    assert newest_step(folder) == 11 and load(folder / "best.pt")["progress"]["step"] == 8


def test_the_same_step_again_does_not_touch_what_was_there(folder: Path) -> None:
    """A run that went back to an earlier checkpoint comes by again."""
    before = sha256(folder / "shards/step-2/__0_0.distcp")

    def save(checkpoints: Checkpoints, rank: int) -> None:
        checkpoints.save(cut(state(2, ema={"weight": torch.zeros(3)})), best=False)

    assert in_ranks(folder.parent, save) == [0, 0]
    assert load(folder / "last.pt")["ema"] is not None
    assert sharded.shard_folder(folder / "last.pt") == "step-2-1"
    assert sha256(folder / "shards/step-2/__0_0.distcp") == before, "step-2.pt's"


def test_a_run_that_goes_on_in_one_file_leaves_no_shards(folder: Path) -> None:
    checkpoints = Checkpoints(folder)
    for step in (3, 4, 5):
        checkpoints.save(small_state(step), best=step == 3)
    assert not (folder / "shards").exists() and newest_step(folder) == 5


# -- damage


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def remove(file: Path) -> None:
    file.unlink()


def remove_all(file: Path) -> None:
    shutil.rmtree(file.parent)


@pytest.mark.parametrize("spoil", [flip, truncate, empty, remove, remove_all], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata"])
def test_a_damaged_shard_is_named_and_the_checkpoint_before_taken(
    folder: Path, name: str, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    spoil(folder / "shards/step-2" / name)
    assert not is_intact(folder / "last.pt")
    with pytest.raises(UserError, match=r"last\.pt: the shard.*step-2" + ("" if spoil is remove_all else f"/{name}")):
        load(folder / "last.pt")
    with caplog.at_level(logging.WARNING):
        assert newest_step(folder) == 1
    assert "step-2" in caplog.text and "trying the one before" in caplog.text
    spoil(folder / "shards/step-1" / name)
    with pytest.raises(RunError, match=r"all checkpoints in .* are damaged \(last\.pt, step-1\.pt\)"):
        newest_step(folder)


def test_a_file_without_its_shards_says_so(folder: Path, tmp_path: Path) -> None:
    for name in ("last.pt", "last.pt.sha256"):
        shutil.copy(folder / name, tmp_path)
    with pytest.raises(UserError, match=r"the folder of its shards is missing: .*/shards/step-2"):
        load(tmp_path / "last.pt")
    sharded.copy(folder / "last.pt", tmp_path)
    assert load(tmp_path / "last.pt")["progress"]["step"] == 2


def test_after_damage_the_run_goes_on(folder: Path) -> None:
    flip(folder / "shards/step-2/__1_0.distcp")

    def save(checkpoints: Checkpoints, rank: int) -> None:
        checkpoints.save(cut(state(3)), best=False)

    assert in_ranks(folder.parent, save) == [0, 0]
    assert newest_step(folder) == 3
    flip(folder / "shards/step-3/__1_0.distcp")
    assert newest_step(folder) == 1, "what was damaged was not kept in its place"


# -- hostile files


def signed(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """last.pt as somebody has changed it who writes checksums, too."""
    path = folder / "last.pt"
    raw = torch.load(path, weights_only=True)
    change(raw["shards"])
    path.unlink()
    write(path, lambda file: torch.save(raw, file))
    return path


def test_code_in_metadata_does_not_run(folder: Path, tmp_path: Path) -> None:
    marker, metadata = tmp_path / "marker", folder / "shards/step-2/.metadata"
    metadata.write_bytes(pickle.dumps(Payload(marker)))
    path = signed(folder, lambda said: said["files"].update({".metadata": sha256(metadata)}))
    with pytest.raises(UserError, match=r"the shards cannot be read: .* is not allowed"):
        load(path)
    assert not marker.exists()
    pickle.loads(metadata.read_bytes())
    assert marker.exists(), "the payload works where pickle is let loose"


@pytest.mark.parametrize(
    "said",
    [
        {"folder": "../shards/step-2"}, {"folder": "/etc"}, {"folder": ".hidden"}, {"folder": 3}, {"files": {}},
        {"files": [1]}, {"files": 3}, {"tensors": {"x": ["model", "x"]}}, {"tensors": 7},
    ],
    ids=str,
)  # fmt: skip
def test_a_file_that_says_nonsense_of_its_shards_is_refused(folder: Path, said: dict[str, Any]) -> None:
    path = signed(folder, lambda entry: entry.update(said))
    with pytest.raises(UserError, match=r"last\.pt: (the shard|the folder of|its list of)"):
        load(path)


def test_a_shard_elsewhere_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = folder / "shards/step-2/.metadata"
    found = pickle.loads(metadata.read_bytes())
    for info in found.storage_data.values():
        info.relative_path = f"../step-1/{info.relative_path}"
    metadata.write_bytes(pickle.dumps(found))
    path = signed(folder, lambda said: said["files"].update({".metadata": sha256(metadata)}))
    with pytest.raises(UserError, match=r"the shards cannot be read: there is no file \.\./step-1/"):
        load(path)


def test_the_file_itself_is_checked_first(folder: Path) -> None:
    write_digests(folder / "last.pt", ["0" * 64])
    with pytest.raises(UserError, match="the file is damaged"):
        load(folder / "last.pt")


# -- crashes and failures


class AnyCrash(Crashes):
    """At the n-th call that changes the file system, in one of the processes."""

    def install(self) -> None:
        super().install()
        for name in ("mkdir", "rename", "rmdir"):
            setattr(os, name, self._wrap(getattr(os, name)))


def crash(folder: Path, who: int, boundary: int, after: bool) -> bool:
    """Whether a process died in the save; what it leaves is checked, and that the run goes on."""

    def save(checkpoints: Checkpoints, rank: int) -> None:
        os.fsync = lambda descriptor: None  # what is killed is no disk
        for step in (8, 9):
            checkpoints.save(cut(state(step)), best=step == 8)
        if rank == who:
            AnyCrash(boundary, after).install()
        checkpoints.save(cut(state(10)), best=True)

    statuses = in_ranks(folder, save)
    died = os.WIFSIGNALED(statuses[who])
    place = folder / "checkpoints"
    found = Checkpoints(place).load_newest()
    assert found is not None
    step = found["progress"]["step"]
    assert step in (9, 10) and (died or step == 10)
    assert same({key: found[key] for key in state(step)}, state(step))
    assert load(place / "best.pt")["progress"]["step"] in ((8, 10) if step == 10 else (8,))

    def go_on(checkpoints: Checkpoints, rank: int) -> None:
        for step in (11, 12):
            checkpoints.save(cut(state(step)), best=step == 11)

    assert in_ranks(folder, go_on) == [0, 0]
    assert names(place) == {"last.pt", "best.pt", "step-11.pt", "shards", "shards/step-11", "shards/step-12"}
    assert not [path for path in place.rglob("*.tmp")]
    return died


@pytest.mark.parametrize(("who", "boundary"), [(0, 4), (0, 12), (1, 2)])
def test_a_killed_process_leaves_whole_checkpoints(tmp_path: Path, who: int, boundary: int) -> None:
    assert crash(tmp_path, who, boundary, after=False)


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("who", [0, 1])
def test_killed_at_calls(tmp_path: Path, who: int, after: bool) -> None:
    """At every third of the main process's calls, which are some sixty, and at every one of the other's."""
    stride = 3 if who == 0 else 1
    boundary = 1 + int(after)
    while crash(tmp_path / f"{boundary}", who, boundary, after):
        boundary += stride
    assert boundary > (20 if who == 0 else 3), "otherwise the calls were not seen"


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("behind", [False, True], ids=["before going on", "behind"])
def test_a_disk_that_is_full_for_one_of_them(
    tmp_path: Path, who: int, behind: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def save(checkpoints: Checkpoints, rank: int) -> None:
        checkpoints.save(cut(state(1)), best=False)
        checkpoints.wait()
        original, torch.save = torch.save, fail if rank == who else torch.save
        try:
            checkpoints.save(cut(state(2)), best=False)
            checkpoints.wait()
        except RunError as error:
            assert str(error).startswith(f"the checkpoint {checkpoints.last} could not be written: ")
            assert f"rank {who}: No space left on device" in str(error)
        else:
            raise AssertionError("nothing was said")
        torch.save = original
        if rank == 0:
            assert newest_step(checkpoints.folder) == 1
            assert not list(checkpoints.folder.rglob("*.tmp"))
        checkpoints.save(cut(state(3)), best=False)
        checkpoints.wait()

    assert in_ranks(tmp_path, save, asynchronous=behind) == [0, 0], capfd.readouterr().err
    assert newest_step(tmp_path / "checkpoints") == 3


def test_a_file_system_that_is_not_shared_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def save(checkpoints: Checkpoints, rank: int) -> None:
        if rank == 1:  # its own disk has folders of the same name
            checkpoints.folder = tmp_path / "elsewhere"
            (checkpoints.folder / "shards/.step-1.tmp").mkdir(parents=True)
        with pytest.raises(
            RunError, match=r"rank 0 does not see .*, which rank 1 has written: .* checkpoint\.sharded=false"
        ):
            checkpoints.save(cut(state(1)), best=False)

    assert in_ranks(tmp_path, save) == [0, 0], capfd.readouterr().err


def test_the_state_is_that_of_the_call_whatever_comes_after(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def save(checkpoints: Checkpoints, rank: int) -> None:
        original = torch.save

        def slow(*arguments: Any) -> None:
            time.sleep(0.1)
            original(*arguments)

        torch.save = slow
        given = cut(state(1))
        checkpoints.save(given, best=True)
        given["model"]["a.weight"].zero_()
        checkpoints.wait()

    assert in_ranks(tmp_path, save, asynchronous=True) == [0, 0], capfd.readouterr().err
    assert same(load(tmp_path / "checkpoints/last.pt")["model"], state(1)["model"])


def test_only_what_torch_writes_of_tensors_is_known() -> None:
    for module, name in (
        ("os", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch.storage", "_load_from_bytes"),
    ):
        with pytest.raises(pickle.UnpicklingError, match=f"{module}.{name} is not allowed"):
            shard_files._Unpickler(sys.stdin.buffer).find_class(module, name)  # type: ignore[arg-type]
