import logging
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dlopt.basics import files as durable
from dlopt.basics.errors import RunError, UserError
from dlopt.basics.files import sha256, write_digests
from dlopt.training.checkpoint.checkpoints import Checkpoints, load
from dlopt.training.checkpoint.content import KEYS
from dlopt.training.checkpoint.weight_files import read_weights
from tests.support.checkpoints import Crashes, Payload, names, state, with_checksums
from tests.support.faults import DAMAGES, flip_bit
from tests.support.runs import in_fork, same


def folder_of(tmp_path: Path, *steps: int, keep: int = 2, best: bool = False) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep)
    for step in steps:
        checkpoints.save(state(step), best=best)
    return checkpoints


def newest_step(checkpoints: Checkpoints) -> int | None:
    found = Checkpoints(checkpoints.folder, checkpoints.keep).load_newest()
    return None if found is None else found.step


# -- contents


def test_truncated_files_are_damaged_checkpoints(tmp_path: Path) -> None:
    checkpoints = folder_of(tmp_path, 3, best=True)
    torch.save(torch.zeros(3000), checkpoints.best)
    checkpoints.best.write_bytes(checkpoints.best.read_bytes()[:-1])  # torch reports an invalid argument
    assert checkpoints.has_best(0, None)  # the epoch of a damaged file is not known


def test_later_checkpoints_are_known(tmp_path: Path) -> None:
    checkpoints = folder_of(tmp_path, 3, 9, 10, keep=3)
    assert [checkpoints.has_later(step) for step in (3, 9, 10)] == [True, True, False]
    damage(checkpoints.last)
    assert [checkpoints.has_later(step) for step in (3, 9)] == [True, False]


def test_roundtrip_is_bitwise_identical(tmp_path: Path) -> None:
    checkpoints = folder_of(tmp_path, 3)
    found = load(checkpoints.last).state
    assert set(found) == KEYS == {"format", *state(3)}
    assert same({key: found[key] for key in state(3)}, state(3))


@pytest.mark.parametrize(
    ("keep", "earlier"), [(1, []), (2, ["step-10.pt"]), (3, ["step-9.pt", "step-10.pt"]), (9, ["step-8.pt"])]
)
def test_keeps_the_newest_by_number(tmp_path: Path, keep: int, earlier: list[str]) -> None:
    """Step 10 is newer than step 9."""
    checkpoints = folder_of(tmp_path, 8, 9, 10, 11, keep=keep)
    assert with_checksums("last.pt", *earlier) <= names(checkpoints)
    assert len(names(checkpoints)) == 2 * min(keep, 4)
    assert newest_step(checkpoints) == 11
    for number in (11, 10, 9, 8)[: min(keep, 4) - 1]:
        damage(checkpoints.last if number == 11 else checkpoints.folder / f"step-{number}.pt")
        assert newest_step(checkpoints) == number - 1


def test_best_is_not_overwritten(tmp_path: Path) -> None:
    checkpoints = folder_of(tmp_path)
    for step, best in ((1, True), (2, True), (3, False)):
        checkpoints.save(state(step), best=best)
    assert load(checkpoints.best).step == 2
    assert load(checkpoints.last).step == 3
    damage(checkpoints.last)
    assert load(checkpoints.best).step == 2, "files are replaced, not written over"


def test_a_snapshot_is_also_the_last_checkpoint(tmp_path: Path) -> None:
    checkpoints = folder_of(tmp_path, 1)
    checkpoints.save(state(2), best=False, snapshot="cycle-1")
    assert newest_step(checkpoints) == 2
    checkpoints.save(state(3), best=False)
    assert newest_step(checkpoints) == 3
    assert load(checkpoints.folder / "cycle-1.pt").step == 2


def test_new_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "checkpoints").load_newest() is None


def test_resumed_run_keeps_its_starting_point(tmp_path: Path) -> None:
    """The checkpoint from which a run resumed is kept until there are two newer ones."""
    folder_of(tmp_path, 10)
    resumed = Checkpoints(tmp_path / "checkpoints")
    resumed.save(state(20), best=False)
    damage(resumed.last)
    assert newest_step(resumed) == 10


def test_resumed_run_does_not_keep_damaged_files(tmp_path: Path) -> None:
    damage(folder_of(tmp_path, 10, 20).last)
    resumed = Checkpoints(tmp_path / "checkpoints")
    assert newest_step(resumed) == 10
    resumed.save(state(20), best=False)
    damage(resumed.last)
    assert newest_step(resumed) == 10


# -- damage


def damage(path: Path) -> None:
    flip_bit(path, random.Random(0))


def empty_checksum(path: Path) -> None:
    path.with_name(f"{path.name}.sha256").write_text("")


def binary_checksum(path: Path) -> None:
    path.with_name(f"{path.name}.sha256").write_bytes(bytes(range(256)))


SPOILED = {**{name: partial(spoil, draws=random.Random(0)) for name, spoil in DAMAGES.items()},
           "empty checksum": empty_checksum, "binary checksum": binary_checksum}  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_damaged_last_falls_back_to_the_previous(
    tmp_path: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = folder_of(tmp_path, 1, 2, 3)
    spoil(checkpoints.last)
    with caplog.at_level(logging.WARNING):
        assert newest_step(checkpoints) == 2
    assert "last.pt" in caplog.text and "trying the previous checkpoint" in caplog.text


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_raises_if_all_are_damaged(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    checkpoints = folder_of(tmp_path, 1, 2)
    for name in ("last.pt", "step-1.pt"):
        spoil(checkpoints.folder / name)
    with pytest.raises(RunError, match=r"all checkpoints in .* are damaged \(last\.pt, step-1\.pt\)"):
        newest_step(checkpoints)


def test_detects_flipped_bits(tmp_path: Path) -> None:
    checkpoints = folder_of(tmp_path, 1)
    data = checkpoints.last.read_bytes()
    for position in range(0, len(data), max(1, len(data) // 50)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        checkpoints.last.write_bytes(flipped)
        with pytest.raises(UserError, match="damaged: its SHA-256"):
            load(checkpoints.last)
    checkpoints.last.write_bytes(data)
    load(checkpoints.last)


@pytest.mark.parametrize("position", [0, 5, 63])
def test_detects_flipped_bits_of_the_checksum(tmp_path: Path, position: int) -> None:
    checkpoints = folder_of(tmp_path, 1, 2)
    path = checkpoints.folder / "last.pt.sha256"
    digits = bytearray(path.read_bytes())
    digits[position] ^= 1
    path.write_bytes(digits)
    assert newest_step(checkpoints) == 1


# -- crashes


@pytest.mark.parametrize(
    ("keep", "after"),
    [(1, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, False), (2, False), (2, True)))],
)
def test_crash_at_any_call_leaves_intact_files(tmp_path: Path, keep: int, after: bool) -> None:
    """Killed at every call while a best checkpoint replaces an older one; the run can then resume."""
    boundary = 0
    died = True
    while died:
        boundary += 1
        checkpoints = folder_of(tmp_path / f"{boundary}", 8, 9, keep=keep, best=True)

        def save(checkpoints: Checkpoints = checkpoints, boundary: int = boundary) -> None:
            Crashes(boundary, after).install()
            checkpoints.save(state(10, best_epoch=10), best=True)

        died = os.WIFSIGNALED(in_fork(save))
        resumed = Checkpoints(checkpoints.folder, keep)
        found = resumed.load_newest()
        assert found is not None
        step = found.step
        assert step in (9, 10)
        assert same(found.model, state(step)["model"])
        if step == 10:
            resumed.restore_best(found.state)
        best = load(resumed.best)
        assert best.step == step, "a best that last.pt speaks of is there"
        for number in (10, 11, 12):
            resumed.save(state(number), best=number == 11)
        kept = ["step-11.pt"] if keep == 2 else []
        assert names(resumed) == with_checksums("last.pt", "best.pt", *kept), "no stray files once it has gone on"
        assert load(resumed.best).step == 11
    assert boundary > 15, "otherwise the calls were not seen"
    assert step == 10


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_crash_in_the_first_save(tmp_path: Path, after: bool) -> None:
    boundary, died, seen = 0, True, set()
    while died:
        boundary += 1
        checkpoints = Checkpoints(tmp_path / f"{boundary}")

        def save(checkpoints: Checkpoints = checkpoints, boundary: int = boundary) -> None:
            Crashes(boundary, after).install()
            checkpoints.save(state(1), best=False)

        died = os.WIFSIGNALED(in_fork(save))
        seen.add(newest_step(checkpoints))
        checkpoints.save(state(2), best=False)
        assert newest_step(checkpoints) == 2
    assert seen == {None, 1}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_full_disk_gives_one_error_and_no_stray_files(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each writing call fails once; earlier files stay, and the next save works."""
    boundary, failed = 0, True
    while failed:
        boundary += 1
        failed = False
        checkpoints = folder_of(tmp_path / f"{boundary}", 8, 9, best=True)
        before = names(checkpoints)
        left = boundary

        def failing(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                nonlocal left, failed
                left -= 1
                if left == 0:
                    failed = True
                    raise error
                return function(*arguments, **named)

            return call

        with monkeypatch.context() as patch:
            for name in ("replace", "fsync"):
                patch.setattr(os, name, failing(getattr(os, name)))
            patch.setattr(torch, "save", failing(torch.save))
            try:
                checkpoints.save(state(10), best=True)
            except RunError as told:
                assert str(told).startswith(f"the checkpoint {checkpoints.last} could not be written: ")
        assert names(checkpoints) - before <= with_checksums("step-9.pt"), "no stray temporary file"
        assert newest_step(checkpoints) in ((9, 10) if failed else (10,))
        load(checkpoints.best)
        checkpoints.save(state(11), best=True)
        assert newest_step(checkpoints) == 11
        assert not [name for name in names(checkpoints) if ".tmp" in name]
    assert boundary > 8


def test_an_interrupted_write_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = folder_of(tmp_path, 1)

    def save(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(state(2), best=False)
    assert newest_step(checkpoints) == 1
    assert not [name for name in names(checkpoints) if ".tmp" in name]


def test_syncs_before_renaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def replaced(source: Any, target: Any) -> None:
        calls.append(("replace", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    folder_of(tmp_path, 1)
    for name in ("last.pt", "last.pt.sha256"):
        at = calls.index(("replace", name))
        assert any(call == "fsync" and fnmatch(file, f".{name}.[0-9]*-*.tmp") for call, file in calls[:at])
        assert ("fsync", "checkpoints") in calls[at:]


def test_copies_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*arguments: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    checkpoints = folder_of(tmp_path, 1, 2, 3, best=True)
    assert names(checkpoints) == with_checksums("last.pt", "best.pt", "step-2.pt")
    assert load(checkpoints.best).step == 3
    assert load(checkpoints.folder / "step-2.pt").step == 2


# -- hostile and foreign files


def sign(path: Path) -> Path:
    """Writes a valid checksum, as an attacker could."""
    durable.write_digests(path, [durable.sha256(path)])
    return path


@pytest.mark.parametrize("read", [load, read_weights])
@pytest.mark.parametrize("kind", ["torch", "pickle", "legacy"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_does_not_run_pickled_code(tmp_path: Path, kind: str, read: Callable[[Path], Any]) -> None:
    marker, path = tmp_path / "marker", tmp_path / "last.pt"
    content = {"format": 1, **state(1), "config": Payload(marker)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(UserError, match=r"cannot be loaded as weights|not a dlopt checkpoint"):
        read(sign(path))
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists(), "the payload works where pickle is let loose"


@pytest.mark.parametrize("form", [99, "2", None, 1.5, [1], True])
def test_rejects_unknown_formats(tmp_path: Path, form: Any) -> None:
    path = tmp_path / "last.pt"
    torch.save({**state(1), "format": form}, path)
    shown = "none" if form is None else form
    with pytest.raises(UserError) as error:
        load(sign(path))
    assert f"written by another version of dlopt (format {shown}; this version reads" in str(error.value)


@pytest.mark.parametrize("content", [{"weight": torch.zeros(2)}, [1, 2], torch.zeros(3)])
def test_rejects_files_of_weights(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(UserError, match="init_from="):
        load(sign(path))


@pytest.mark.parametrize("key", sorted(KEYS - {"format"}))
def test_names_missing_keys(tmp_path: Path, key: str) -> None:
    path = tmp_path / "last.pt"
    torch.save({k: v for k, v in {"format": 1, **state(1)}.items() if k != key}, path)
    with pytest.raises(UserError, match=f": {key} missing"):
        load(sign(path))


def test_rejects_missing_files_folders_and_noise(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "nothing.pt")
    with pytest.raises(UserError, match=r"is a folder; set a file"):
        load(tmp_path)
    noise = tmp_path / "noise.pt"
    noise.write_bytes(random.Random(0).randbytes(1000))
    with pytest.raises(UserError, match="not a dlopt checkpoint"):
        load(sign(noise))


def test_read_weights(tmp_path: Path) -> None:
    checkpoints = folder_of(tmp_path, 4)
    assert same(read_weights(checkpoints.last)[0], state(4)["model"])
    averaged = {**state(5), "ema": {"weight": torch.zeros(300)}}
    checkpoints.save(averaged, best=False)
    assert same(read_weights(checkpoints.last)[0], averaged["ema"]), "the average where there is one"
    plain = tmp_path / "weights.pt"
    torch.save({"weight": torch.ones(2)}, plain)
    assert same(read_weights(plain)[0], {"weight": torch.ones(2)})
    torch.save({"epoch": 3, "model": {"net": {"weight": torch.ones(2)}}}, plain)
    assert same(read_weights(plain)[0], {"model/net/weight": torch.ones(2)}), "nested twice"
    torch.save({"weight": 3}, plain)
    with pytest.raises(UserError, match="no weights by name"):
        read_weights(plain)
    damage(checkpoints.last)
    with pytest.raises(UserError):
        read_weights(checkpoints.last)


def test_compressed_entries_are_refused(tmp_path: Path) -> None:
    """They may expand to any size, and torch.save writes none."""
    torch.save({"weight": torch.zeros(100)}, tmp_path / "plain.pt")
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry))
    assert torch.load(bomb, weights_only=True), "torch would expand it"
    write_digests(bomb, [sha256(bomb)])
    for reader in (load, read_weights):
        with pytest.raises(UserError, match="has compressed entries"):
            reader(bomb)
    assert read_weights(tmp_path / "plain.pt")[0].keys() == {"weight"}
