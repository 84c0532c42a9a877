"""Images stored as uint8 and converted to float32 when they are fetched."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trainer.data.sources.column import as_targets, check_not_empty, integer_column, label_column

CHANNELS = (1, 3, 4)


class ImageSource:
    """Source of images, uint8 [N, C, H, W] in memory or memory-mapped: a quarter of the size of float32.

    Batches are float32 [B, C, H, W] in [0, 1] with targets [B, ...].

    Args:
        images: uint8 [N, C, H, W].
        targets: [N, ...].
        client_ids: natural client of every image, int64 [N].
        checksum: stands for the images in the fingerprint where they are too large to be read for it.

    Raises:
        ValueError: there are no images, or targets or client ids differ in length.
    """

    def __init__(
        self, images: Tensor, targets: Tensor, client_ids: np.ndarray | None = None, checksum: int | None = None
    ) -> None:
        assert images.dtype == torch.uint8 and images.ndim == 4, (images.dtype, images.shape)
        if len(images) != len(targets):
            raise ValueError(f"{len(images)} images and {len(targets)} targets: every example needs one of each")
        check_not_empty(len(images))
        self.images = images
        self.targets = as_targets(targets) if targets.ndim == 1 else targets  # larger ones when they are fetched
        self.checksum = checksum
        self.labels = label_column(targets)
        self.client_ids = integer_column("client_ids", client_ids, len(images))

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.images.index_select(0, ids).float().div_(255), as_targets(self.targets.index_select(0, ids))

    def fingerprint_data(self) -> list[np.ndarray]:
        images = self.images.numpy() if self.checksum is None else np.array([self.checksum, *self.images.shape])
        return [images, self.targets.numpy()]


def as_channels_first(images: np.ndarray) -> np.ndarray:
    """Return images [N, H, W], [N, C, H, W] or [N, H, W, C] as [N, C, H, W], where C is 1, 3 or 4.

    Raises:
        ValueError: the shape is another one.
    """
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[1] in CHANNELS:
        return images
    if images.ndim == 4 and images.shape[3] in CHANNELS:
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    raise ValueError(f"uint8 of shape {list(images.shape)} is not images: [N, H, W], [N, C, H, W] or [N, H, W, C]")
