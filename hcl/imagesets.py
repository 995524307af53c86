"""The sets of pictures: where each lives on disk, how it is read, checked and fetched.

Every reader gives uint8 arrays (n, C, H, W). torchvision knows the file formats and the checksums;
this module tells a set that is missing from one that is damaged, which torchvision does not.
"""

import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hcl import project_root
from hcl.views import GENTLE, SIMCLR, Augmentation

TINYIMAGENET = (
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "90528d7ca1a48142e341f4ef8d21d0de",  # md5
)
TINYIMAGENET_PER_CLASS = 500
# What readers raise on a cut-off or changed file; torchvision's own checks raise RuntimeError.
_DAMAGE = (
    RuntimeError,
    OSError,
    EOFError,
    pickle.UnpicklingError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
)


class DamagedDataError(RuntimeError):
    """A data set is there, but files are missing, cut short or changed."""


class Splits(NamedTuple):
    """A data set as read: pictures (n, C, H, W) uint8, labels (n,) int64, -1 = unlabelled."""

    classes: Sequence[str]
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def _digits(root: Path, seed: int) -> Splits:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pictures, labels = load_digits(return_X_y=True)  # 0 … 16
    pictures = np.rint(pictures.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    x_train, x_test, y_train, y_test = train_test_split(
        pictures, labels, test_size=0.3, stratify=labels, random_state=seed
    )
    return Splits([str(digit) for digit in range(10)], x_train, y_train, x_test, y_test)


def _torchvision(kind: str) -> Callable[[Path, int], Splits]:
    """A reader of CIFAR-10, CIFAR-100 or Fashion-MNIST through torchvision's class."""

    def read(root: Path, seed: int) -> Splits:
        from torchvision import datasets

        train, test = (getattr(datasets, kind)(root, train=flag) for flag in (True, False))
        x_train, x_test = (np.asarray(part.data) for part in (train, test))  # (n, H, W[, C])
        y_train, y_test = (np.asarray(part.targets) for part in (train, test))
        return Splits(train.classes, _planes(x_train), y_train, _planes(x_test), y_test)

    return read


def _planes(x: np.ndarray) -> np.ndarray:
    """(n, H, W) or (n, H, W, C) as (n, C, H, W)."""
    return x[:, None] if x.ndim == 3 else np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def _stl10(root: Path, seed: int) -> Splits:
    from torchvision.datasets import STL10

    train, test = STL10(root, split="train+unlabeled"), STL10(root, split="test")
    return Splits(train.classes, train.data, train.labels, test.data, test.labels)


def _tinyimagenet(root: Path, seed: int) -> Splits:
    """Train from train/WNID/images, test from val/ with its annotations (test/ has no labels)."""
    folder = root / "tiny-imagenet-200"
    words = dict(_rows(folder / "words.txt"))
    ids = {wnid: i for i, wnid in enumerate((folder / "wnids.txt").read_text().split())}
    train = [
        (path, label) for w, label in ids.items() for path in sorted(folder.glob(f"train/{w}/*/*"))
    ]
    test = [
        (folder / "val" / "images" / row[0], ids[row[1]])
        for row in _rows(folder / "val" / "val_annotations.txt")
    ]
    if len(train) != TINYIMAGENET_PER_CLASS * len(ids):  # an interrupted unpacking
        raise ValueError(f"{len(train)} training pictures of {len(ids)} classes")
    classes = [words[wnid].split(",")[0] for wnid in ids]
    return Splits(classes, *_decode(train, "train"), *_decode(test, "val"))


def _rows(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()]


def _decode(files: list[tuple[Path, int]], what: str) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image
    from tqdm.auto import tqdm

    def pixels(item: tuple[Path, int]) -> np.ndarray:
        with Image.open(item[0]) as picture:
            return np.asarray(picture.convert("RGB"))

    with ThreadPoolExecutor() as pool:
        pictures = list(tqdm(pool.map(pixels, files), what, len(files), leave=False))
    return _planes(np.stack(pictures)), np.array([label for _, label in files])


class Source(NamedTuple):
    """Where a data set comes from: its reader, its folder under data/, the size of its download."""

    read: Callable[[Path, int], Splits]
    folder: str
    megabytes: int
    kind: str  # torchvision's class
    augmentation: Augmentation = SIMCLR


SOURCES = {
    "digits": Source(_digits, "", 0, "", GENTLE),
    "cifar10": Source(_torchvision("CIFAR10"), "cifar-10-batches-py", 170, "CIFAR10"),
    "cifar100": Source(_torchvision("CIFAR100"), "cifar-100-python", 169, "CIFAR100"),
    "stl10": Source(_stl10, "stl10_binary", 2640, "STL10"),
    "fashionmnist": Source(_torchvision("FashionMNIST"), "FashionMNIST", 31, "FashionMNIST"),
    "tinyimagenet": Source(_tinyimagenet, "tiny-imagenet-200", 248, ""),
}


def source_of(name: str) -> Source:
    if name not in SOURCES:
        raise ValueError(f"name={name!r}: choose one of {', '.join(SOURCES)}")
    return SOURCES[name]


def data_root(root: str | Path | None = None) -> Path:
    """The folder of the data sets: `root`, else $HCL_DATA, else data/ of the project."""
    return Path(root or os.environ.get("HCL_DATA") or project_root() / "data").expanduser()


def read(name: str, root: Path, seed: int) -> Splits:
    """Read a data set from its folder under `root`; `seed` draws the split of "digits".

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: the folder is not there; the message says how to get it.
        DamagedDataError: it is there, but incomplete or changed.

    >>> read("digits", Path("data"), seed=0).x_train.shape
    (1257, 1, 8, 8)
    """
    source = source_of(name)
    folder = root / source.folder
    if not folder.is_dir() and name != "digits":
        raise FileNotFoundError(
            f"{name} is not in {folder}: get it with `hcl data {name}` ({source.megabytes} MB), "
            f"or set HCL_DATA to the folder that holds {source.folder}/"
        )
    if source.kind:  # outside the `try`: a broken installation is no damaged data
        import_module("torchvision.datasets")
    try:
        return source.read(root, seed)
    except PermissionError:
        raise
    except _DAMAGE as error:
        raise DamagedDataError(
            f"{name} in {folder} is damaged or incomplete ({type(error).__name__}: {error}): "
            f"delete that folder and get it again with `hcl data {name}`"
        ) from error


def download(name: str, root: str | Path | None = None) -> Path:
    """Fetch a data set with torchvision, check its checksums, and return its folder.

    What is there already and whole is not fetched again.

    Raises:
        ValueError: an unknown name.
    """
    from torchvision import datasets
    from torchvision.datasets.utils import download_and_extract_archive

    source, root = source_of(name), data_root(root)
    if name == "tinyimagenet":
        url, md5 = TINYIMAGENET
        download_and_extract_archive(url, str(root), md5=md5)
    elif name == "stl10":
        datasets.STL10(root, split="unlabeled", download=True)
    elif name != "digits":
        getattr(datasets, source.kind)(root, download=True)
    return root / source.folder
