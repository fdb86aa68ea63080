"""Downloaded datasets: MNIST and Fashion-MNIST from IDX files, CIFAR-10 and CIFAR-100 through torchvision."""

import contextlib
import gzip
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from dlopt.basics.errors import FileError, UserError
from dlopt.data.samples import Dataset, InMemory

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
_IDX_STEMS = [f"{split}-{kind}" for split in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
_LONGEST_HEADER = 4 + 4 * 255  # bytes
_MAX_IDX = 1 << 30  # bytes; the largest set of this format, EMNIST, has 640 MB
_FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def mnist(*, root: str | None, download: bool) -> Dataset:
    """Loads MNIST: 60,000 training and 10,000 test images [1, 28, 28] (LeCun et al. 1998)."""
    return _load_idx("mnist", "MNIST", tuple(str(digit) for digit in range(10)), root, download, ())


def fashion_mnist(*, root: str | None, download: bool) -> Dataset:
    """Loads Fashion-MNIST: 60,000 training and 10,000 test images [1, 28, 28] (Xiao et al. 2017).

    If `root` is None, Debian's package dataset-fashion-mnist is searched too.
    """
    system_folders = (DEBIAN_FASHION_MNIST,) if root is None else ()
    return _load_idx("fashion_mnist", "FashionMNIST", _FASHION_CLASSES, root, download, system_folders)


def read_idx(path: Path) -> Tensor:
    """Reads the uint8 tensor in an IDX file, plain or gzipped (format: yann.lecun.com/exdb/mnist).

    Raises:
        UserError: the file cannot be read, is damaged, or has another type than unsigned bytes.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(_LONGEST_HEADER)
            if len(head) < 4 or head[:3] != b"\x00\x00\x08":
                raise UserError(f"{path}: is not an IDX file of unsigned bytes")
            start = 4 + 4 * head[3]
            shape = np.frombuffer(head[4:start].ljust(4 * head[3], b"\0"), dtype=">u4").astype(int).tolist()
            size = math.prod(shape)
            if size > _MAX_IDX or len(head) < start:
                raise FileError(f"{path}: is damaged or too large: the shape {shape} in the header is {size} bytes")
            # No more: a compressed file may expand to any length.
            data = head[start:] + file.read(max(size + 1 - len(head[start:]), 0))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if len(data) != size:
        found = f"{len(data)} bytes" if len(data) < size else f"more than {size} bytes"
        raise FileError(f"{path}: is damaged: {found} of data for the shape {shape} in the header")
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).reshape(shape).copy())


def _load_idx(
    name: str, folder: str, classes: tuple[str, ...], root: str | None, download: bool, system_folders: tuple[Path, ...]
) -> Dataset:
    key = f"data={name}"
    base = data_root(root)
    candidates = (base, base / "raw", base / folder / "raw", *system_folders)
    files = next((found for path in candidates if len(found := _idx_files(path)) == len(_IDX_STEMS)), None)
    if files is None and download:
        import torchvision.datasets

        call_torchvision(key, base, download, lambda: getattr(torchvision.datasets, folder)(base, download=True))
        files = _idx_files(base / folder / "raw")
    if files is None:
        raise UserError(
            f"{key}: no IDX files ({_IDX_STEMS[0]}[.gz], ...) in {', '.join(map(str, candidates))}; "
            "set data.root to the folder that has them, or data.download=true"
        )
    pairs = (files[:2], files[2:])
    train, test = (_load_idx_split(key, images, labels, len(classes)) for images, labels in pairs)
    return Dataset(train, None, test, classes)


def _load_idx_split(key: str, images_path: Path, labels_path: Path, classes: int) -> InMemory:
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.dim() != 3 or len(images) == 0:
        raise UserError(f"{key}: {images_path}: has the shape {list(images.shape)}; expected [N, height, width]")
    if labels.dim() != 1 or len(labels) != len(images):
        raise UserError(f"{key}: {labels_path}: has {list(labels.shape)} labels for {len(images)} images")
    if int(labels.max()) >= classes:
        raise UserError(f"{key}: {labels_path}: has a label {int(labels.max())}; 0 to {classes - 1} are allowed")
    return InMemory(images.unsqueeze(1), labels.to(torch.int64))


def _idx_files(folder: Path) -> list[Path]:
    """Returns the existing ones of the four files, plain or gzipped, in the order of `_IDX_STEMS`."""
    pairs = [(folder / stem, folder / f"{stem}.gz") for stem in _IDX_STEMS]
    found = (next((path for path in pair if path.is_file()), None) for pair in pairs)
    return [path for path in found if path is not None]


def cifar10(*, root: str | None, download: bool) -> Dataset:
    """CIFAR-10: 50,000 training and 10,000 test images [3, 32, 32] of ten classes (Krizhevsky 2009)."""
    return _load_cifar("CIFAR10", root, download)


def cifar100(*, root: str | None, download: bool) -> Dataset:
    """CIFAR-100: 50,000 training and 10,000 test images [3, 32, 32] of a hundred classes (Krizhevsky 2009)."""
    return _load_cifar("CIFAR100", root, download)


def _load_cifar(name: Literal["CIFAR10", "CIFAR100"], root: str | None, download: bool) -> Dataset:
    import torchvision.datasets

    source = getattr(torchvision.datasets, name)
    folder = data_root(root)
    if folder.name == source.base_folder:  # data.root is the batches' own folder
        folder = folder.parent
    splits = []
    for train in (True, False):
        # Safe to unpickle: torchvision compares checksums first.
        source_split = call_torchvision(
            f"data={name.lower()}",
            folder,
            download,
            lambda train=train: source(folder, train=train, download=download),  # type: ignore[misc]
        )
        inputs = torch.from_numpy(source_split.data).permute(0, 3, 1, 2).contiguous()
        splits.append(InMemory(inputs, torch.tensor(source_split.targets, dtype=torch.int64)))
    return Dataset(splits[0], None, splits[1], tuple(source_split.classes))


T = TypeVar("T")


def data_root(root: str | None) -> Path:
    """Returns the absolute path of the folder for downloads: `root`, else $DLOPT_DATA, else ./data."""
    folder = root if root is not None else os.environ.get("DLOPT_DATA") or "data"
    return Path(os.path.expanduser(folder)).absolute()


def call_torchvision(key: str, root: Path, download: bool, load: Callable[[], T]) -> T:
    """Calls `load`, which reads or downloads through torchvision, and converts its errors.

    After an error, removes the folders that `load` created and left empty.

    Raises:
        UserError: the files are missing or damaged, the download failed, or the folder cannot be written.
    """
    import pickle
    import urllib.error
    import zipfile

    below = [root / name / folder for name in ("MNIST", "FashionMNIST") for folder in ("raw", "")]
    new = [folder for folder in (*below, root, *root.parents) if not folder.exists()]
    try:
        return load()
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        for folder in new:
            with contextlib.suppress(OSError):  # was not created, or has files
                folder.rmdir()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        is_network = isinstance(error, urllib.error.URLError | ConnectionError | TimeoutError)
        if is_network or (lines and lines[0].startswith("Error downloading")):  # torchvision: one line per mirror
            raise UserError(
                f"{key}: downloading to {root} failed ({' '.join(lines)}); put the files there and set "
                "data.download=false, or set data.root to a folder that has them"
            ) from error
        reason = (lines or [type(error).__name__])[0].removesuffix(" You can use download=True to download it")
        hint = "" if download else "; set data.download=true, or data.root to the folder that has the files"
        raise UserError(f"{key}: {root}: {reason}{hint}") from error
