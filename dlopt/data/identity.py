"""Identifies data by their content: what a checkpoint stores, and what a resumed run compares.

Names and places of files do not count: a moved folder with equal content is the same data.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from dlopt.data.samples import Dataset, Samples, as_bytes
from dlopt.data.settings import SPLITS

_NAMES = {"train": "training", "val": "validation", "test": "test"}
_TEXTS = {
    "targets": "the {name} set has other labels, or the same ones in another order",
    "further": "the {name} set has other groups, weights, times or further tensors",
    "content": "the {name} set has other inputs, or the same ones in another order",
}

Identity = Mapping[str, Any]
"""For each split `samples` or `tokens` (its size), `targets`, `further` and `content` (SHA-256)."""


def identify(dataset: Dataset, contents: Sequence[str] = SPLITS) -> Identity:
    """Identifies a dataset as read, before a subset or a validation set is taken from it.

    Keeps the digests of files and rows that are read as a whole, for `dlopt.data.equal_samples`.

    Hashes contents of up to 1 GiB (and 131,072 files) as a whole, larger ones at 128 evenly spaced places of 1 MiB. Of
    a dataset of the user: 16 evenly spaced items, if they are the same when they are read twice. Generated data have no
    hashes, because their config defines them; rounding may differ between processors.

    `contents`: the splits whose inputs are hashed.
    """
    splits = {name: getattr(dataset, name) for name in SPLITS}
    return {
        name: _identify(samples, has_hashes=not dataset.is_generated, has_content=name in contents)
        for name, samples in splits.items()
        if samples is not None
    }


def difference(saved: Identity | None, current: Identity | None) -> str | None:
    """Describes the first difference between two identities; None if there is none, or one of them is unknown."""
    if saved is None or current is None:
        return None
    named = [key for key in saved if key not in SPLITS and key in current]  # validation sets with a name
    for split in (*SPLITS, *named):
        old, new, name = saved.get(split), current.get(split), _NAMES.get(split, split)
        if old is None and new is None:
            continue
        if old is None or new is None:
            return f"they have {'a' if old is None else 'no'} {name} set"
        for size in ("samples", "tokens"):
            if old.get(size) != new.get(size):
                return f"the {name} set has {new.get(size, 0):,} {size}, not {old.get(size, 0):,}"
        for key, text in _TEXTS.items():
            if key in old and key in new and old[key] != new[key]:
                return text.format(name=name)
    return None


def _identify(samples: Samples, *, has_hashes: bool, has_content: bool) -> dict[str, Any]:
    found: dict[str, Any] = samples.size()
    if has_hashes and "samples" in found:
        found["targets"] = hashlib.sha256(as_bytes(samples.targets)).hexdigest()
        if samples.further:
            found["further"] = hashlib.sha256(b"".join(map(as_bytes, samples.further.values()))).hexdigest()
    if has_hashes and has_content and (content := samples.content()) is not None:
        found["content"] = content.digest()
    return found
