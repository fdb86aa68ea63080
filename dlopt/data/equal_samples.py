"""Finds equal samples in the training set and a held-out set, and equal training samples with different labels."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dlopt.data.checks import WARNING

_CHUNK_BYTES = 1 << 18  # hashed at once: they stay in the cache
_SEED = 0  # of the factors of the hash
_NAMES = {"val": "validation", "test": "test"}


def equal_sample_warnings(
    rows: Mapping[str, Tensor | None], targets: Mapping[str, Tensor], *, has_classes: bool
) -> tuple[str, ...]:
    """Returns a line for each held-out split that has samples of the training set, and one for contradictory labels.

    Args:
        rows: the `Samples.digests` of train, val and test. A split with digests of another form is left out.
        targets: of the same splits.
        has_classes: targets are labels; a regression may well have several values of equal inputs.
    """
    train = rows["train"]
    if train is None:
        return ()
    compared = {name: each for name, each in rows.items() if each is not None and _form(each) == _form(train)}
    tensors = [*compared.values()]
    hashes = np.concatenate([_hashes(each) for each in tensors])
    distinct, counts = np.unique(hashes, return_counts=True)
    if len(distinct) == len(hashes):
        return ()
    repeated = np.flatnonzero(np.isin(hashes, distinct[counts > 1]))
    ends = np.cumsum([len(each) for each in tensors])
    splits = np.searchsorted(ends, repeated, side="right")  # 0: the training set
    groups, labels = _groups(tensors, repeated, hashes), np.zeros_like(repeated)
    if has_classes:
        labels = _numbers(_take([targets[name] for name in compared], repeated))
    width = int(labels.max()) + 1
    answers = groups * width + labels
    known = np.unique(answers[splits == 0])
    different = np.bincount(known // width, minlength=int(groups.max()) + 1)[groups]  # labels in the training set
    has_other = different > np.isin(answers, known)
    train_groups = groups[splits == 0]
    distinct_count = len(train) - len(train_groups) + len(np.unique(train_groups))
    # Of few distinct samples, as in a table of two binary columns, equal ones are expected.
    are_few = 2 * distinct_count <= len(train)
    end = f" (of {len(train):,} training samples, {distinct_count:,} {_are(distinct_count)} distinct)" * are_few
    lines = []
    for number, (name, tensor) in enumerate(compared.items()):
        total, others = (int(each[splits == number].sum()) for each in (different > 0, has_other))
        if number == 0:
            continue
        if total:
            line = f"{total:,} of {len(tensor):,} {_NAMES[name]} samples {_are(total)} equal to training samples"
            lines.append(line + (f", {others:,} of them to one with another label" if others else ""))
    if total := int((different[splits == 0] > 1).sum()):
        lines.append(f"{total:,} training samples are equal to one with another label")
    return tuple(f"{WARNING}{line}{end}" for line in lines)


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _form(rows: Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    return rows.dtype, tuple(rows.shape[1:])


def _groups(tensors: Sequence[Tensor], indices: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Numbers the distinct ones of the rows at `indices` of the concatenated tensors, int64 [len(indices)].

    Groups by the hash, and compares each row with the first of its group, so that a collision joins no rows.
    """
    _, first, groups = np.unique(hashes[indices], return_index=True, return_inverse=True)
    size = max(1, _CHUNK_BYTES // max(1, tensors[0][0].numel()))
    differ = [np.empty(0, dtype=np.int64)]
    for start in range(0, len(indices), size):
        part = slice(start, start + size)
        rows, firsts = _take(tensors, indices[part]), _take(tensors, indices[first[groups[part]]])
        differ.append(start + np.flatnonzero((rows != firsts).any(1).numpy()))
    if len(others := np.concatenate(differ)):  # collisions
        groups[others] = len(first) + _numbers(_take(tensors, indices[others]))
    return groups


def _numbers(rows: Tensor) -> np.ndarray:
    """Numbers the distinct rows [N, D], int64 [N]."""
    values = rows[:, 0].numpy() if rows.shape[1] == 1 else rows.numpy()  # sorts numbers much faster than rows
    return np.unique(values, axis=None if values.ndim == 1 else 0, return_inverse=True)[1].reshape(-1)


def _take(tensors: Sequence[Tensor], indices: np.ndarray) -> Tensor:
    """Returns rows of the concatenated tensors as vectors, without concatenating the tensors."""
    ends = np.cumsum([len(tensor) for tensor in tensors])
    which = np.searchsorted(ends, indices, side="right")
    result = tensors[0].new_empty((len(indices), tensors[0][0].numel()))
    for number, tensor in enumerate(tensors):
        slots = np.flatnonzero(which == number)
        rows = torch.from_numpy(indices[slots] - (ends[number] - len(tensor)))
        result[torch.from_numpy(slots)] = tensor[rows].reshape(len(rows), result.shape[1])
    return result


def _hashes(rows: Tensor) -> np.ndarray:
    """Returns a hash of each row, uint64 [N]: the sum of its 32-bit words times random odd factors, modulo 2^64."""
    result = np.empty(len(rows), dtype=np.uint64)
    width = rows[0].numel() * rows.element_size()
    words = -(-width // 4)
    factors = np.random.default_rng(_SEED).integers(0, 2**63, words, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    size = max(1, _CHUNK_BYTES // (4 * words))
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size].contiguous()
        if chunk.is_floating_point():
            chunk = chunk + 0.0  # 0 for -0
        data = chunk.numpy().reshape(len(chunk), -1).view(np.uint8)
        if width % 4:
            data = np.pad(data, ((0, 0), (0, 4 * words - width)))
        result[start : start + size] = np.einsum("ij,j->i", data.view(np.uint32), factors)
    return result
