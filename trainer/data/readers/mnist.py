"""Readers of small grey images: scikit-learn's digits, MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from trainer.data.readers.cache import package_folder
from trainer.data.readers.idx import read_idx
from trainer.data.sources.base import DataSplits, TensorSource
from trainer.utils.seeding import numpy_generator

DIGIT_NAMES = tuple("0123456789")
FASHION_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DIGITS_TEST_FRACTION = 0.2
FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"
IDX_FILES = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte"
MNIST_HELP = (
    "set data.root= to the folder of its four files, available from\n  https://ossci-datasets.s3.amazonaws.com/mnist/"
)
FASHION_HELP = (
    "on Debian and Ubuntu: apt-get install dataset-fashion-mnist, and data.root=auto;\n"
    "  elsewhere set data.root= to the folder of its four files, available from\n"
    "  https://github.com/zalandoresearch/fashion-mnist"
)


def digits() -> DataSplits:
    """Read the 1797 digits of scikit-learn: 1438 training and 359 test examples, always the same ones.

    Inputs are float32 [N, 1, 8, 8] in [0, 1], targets int64 in 0..9. They are read from the installed package, without
    importing it. Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
    Repository 1998.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    folder = package_folder("scikit-learn", install="pip install scikit-learn")
    with gzip.open(folder / "sklearn/datasets/data/digits.csv.gz") as file:
        table = torch.from_numpy(np.loadtxt(file, dtype=np.uint8, delimiter=","))
    images, labels = table[:, :-1].reshape(-1, 1, 8, 8).float().div_(16), table[:, -1].long()
    order = torch.from_numpy(numpy_generator("digits", "split").permutation(len(labels)))
    test, train = order.tensor_split([int(DIGITS_TEST_FRACTION * len(labels))])
    return DataSplits(
        TensorSource(images[train], labels[train]),
        TensorSource(images[test], labels[test]),
        10,
        label_names=DIGIT_NAMES,
    )


def mnist(root: str | Path) -> DataSplits:
    """Read MNIST from its four IDX files in the folder `root`: 60000 training and 10000 test examples.

    Inputs are float32 [N, 1, 28, 28] in [0, 1], targets int64 in 0..9. The files may be gzipped, and have '.' or '-'
    before 'idx' in their names. LeCun et al., Gradient-based learning applied to document recognition, 1998.

    Raises:
        ValueError: lists every problem with the files.
    """
    return _read_splits("MNIST", root, Path(root).expanduser(), MNIST_HELP, DIGIT_NAMES)


def fashion_mnist(root: str | Path = "auto") -> DataSplits:
    """Read Fashion-MNIST, which has the format of `mnist`; root="auto" is where Debian's dataset-fashion-mnist is.

    Xiao, Rasul and Vollgraf, Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms, 2017.
    """
    folder = Path(FASHION_FOLDER if root == "auto" else root).expanduser()
    return _read_splits("Fashion-MNIST", root, folder, FASHION_HELP, FASHION_NAMES)


def _read_splits(name: str, root: str | Path, folder: Path, help: str, label_names: tuple[str, ...]) -> DataSplits:
    if not folder.is_dir():
        raise ValueError(
            f"data.root={root}: there is no folder {folder.absolute()}\n"
            f"  valid: a folder with the four files of {name}, plain or .gz: {IDX_FILES}\n  {help}"
        )
    errors: list[str] = []
    train, test = _read_part(folder, "train", errors), _read_part(folder, "t10k", errors)
    if train is None or test is None:
        raise ValueError("\n  ".join([f"{name} cannot be read from data.root={root}:", *errors, help]))
    return DataSplits(_make_source(*train), _make_source(*test), 10, label_names=label_names)


def _read_part(root: Path, part: str, errors: list[str]) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the images and labels of a part, or None after appending errors."""
    before = len(errors)
    images, labels = _read_array(root, f"{part}-images", 3, errors), _read_array(root, f"{part}-labels", 1, errors)
    if images is None or labels is None:
        return None
    errors.extend(_part_errors(part, images, labels))
    return (images, labels) if len(errors) == before else None


def _read_array(root: Path, stem: str, dimensions: int, errors: list[str]) -> np.ndarray | None:
    names = [f"{stem}{mark}idx{dimensions}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
    path = next((root / name for name in names if (root / name).is_file()), None)
    if path is None:
        errors.append(f"{names[0]}: missing, with '-' or '.' before idx, with and without .gz")
        return None
    try:
        return read_idx(path)
    except ValueError as error:
        errors.append(str(error))
        return None


def _part_errors(part: str, images: np.ndarray, labels: np.ndarray) -> Iterator[str]:
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1:] != (28, 28) or len(images) == 0:
        yield f"{part}-images: {images.dtype} of shape {list(images.shape)}, not uint8 [N, 28, 28]"
    if labels.dtype != np.uint8 or labels.ndim != 1:
        yield f"{part}-labels: {labels.dtype} of shape {list(labels.shape)}, not uint8 [N]"
    elif labels.size and labels.max() > 9:
        first = int(np.argmax(labels > 9))
        yield f"{part}-labels: label {labels[first]} of example {first} is outside 0..9"
    if len(images) != len(labels):
        yield f"{part}: {len(images)} images and {len(labels)} labels"


def _make_source(images: np.ndarray, labels: np.ndarray) -> TensorSource:
    inputs = torch.from_numpy(np.divide(images, 255, dtype=np.float32))
    return TensorSource(inputs.unsqueeze(1), torch.from_numpy(labels.astype(np.int64)))
