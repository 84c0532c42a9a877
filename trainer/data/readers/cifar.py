"""Reader of CIFAR-10's binary files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from trainer.data.sources.base import DataSplits
from trainer.data.sources.pixels import ImageSource

CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILES = ("test_batch.bin",)
SHAPE = (3, 32, 32)
RECORD_BYTES = 1 + 3 * 32 * 32
HELP = (
    "set data.root= to the folder of its six files, the binary version;\n"
    "  it can be had from https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
)


def cifar10(root: str | Path) -> DataSplits:
    """Read CIFAR-10 from data_batch_1.bin to data_batch_5.bin and test_batch.bin: 50000 and 10000 examples.

    Inputs are float32 [N, 3, 32, 32] in [0, 1], stored as uint8; targets are int64 in 0..9. Krizhevsky, Learning
    multiple layers of features from tiny images, 2009.

    Args:
        root: folder of the six files.

    Raises:
        ValueError: lists every problem with the files.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise ValueError(f"data.root={root}: there is no folder {folder.absolute()}\n  {HELP}")
    errors: list[str] = []
    train, test = ([_records(folder / name, errors) for name in names] for names in (TRAIN_FILES, TEST_FILES))
    if errors:
        raise ValueError("\n  ".join([f"CIFAR-10 cannot be read from data.root={root}:", *errors, HELP]))
    return DataSplits(_make_source(train), _make_source(test), 10, label_names=CIFAR10_NAMES)


def _records(path: Path, errors: list[str]) -> np.ndarray:
    """Read the records of a file, uint8 [N, 3073]; append what is wrong with them to the errors.

    A record is a byte for the label, then 1024 bytes each for red, green and blue, row by row.
    """
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        errors.append(f"{path.name}: {error.strerror or error}")
        return np.empty((0, RECORD_BYTES), np.uint8)
    count, rest = divmod(len(content), RECORD_BYTES)
    records = content[: count * RECORD_BYTES].reshape(count, RECORD_BYTES)
    if rest or not count:
        errors.append(
            f"{path.name}: {len(content)} bytes are not a multiple of the record size {RECORD_BYTES}: cut short?"
        )
    if (bad := records[:, 0] > 9).any():
        errors.append(f"{path.name}: label {records[bad.argmax(), 0]} of example {bad.argmax()} is outside 0..9")
    return records


def _make_source(files: list[np.ndarray]) -> ImageSource:
    records = torch.from_numpy(np.concatenate(files))
    return ImageSource(records[:, 1:].reshape(-1, *SHAPE), records[:, 0].long())
