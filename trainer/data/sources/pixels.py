"""Images as they are stored: a byte a pixel and channel, which become numbers in [0, 1] when they are fetched."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trainer.data.sources.base import column, label_column

CHANNELS = (1, 3, 4)


class ImageSource:
    """Images with labels as a Source: uint8 [N, C, H, W], a quarter of what they take as numbers; may be memory-mapped.

    Batches are float32 [B, C, H, W] in [0, 1] and the targets [B, ...]. `checksum` tells them from others where they
    are too many to be read for it. Raises ValueError when there are no images or not as many targets and owners.
    """

    def __init__(
        self, images: Tensor, targets: Tensor, client_ids: np.ndarray | None = None, checksum: int | None = None
    ) -> None:
        assert images.dtype == torch.uint8 and images.ndim == 4, (images.dtype, images.shape)
        if len(images) != len(targets):
            raise ValueError(f"{len(images)} images and {len(targets)} targets: every example needs one of each")
        self.images = images
        self.targets = targets
        self.checksum = checksum
        self.labels = label_column(targets)
        self.client_ids = column("owners", client_ids, len(images))

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.images.index_select(0, ids).float().div_(255), self.targets.index_select(0, ids)

    def fingerprint_data(self) -> list[np.ndarray]:
        told = self.images.numpy() if self.checksum is None else np.array([self.checksum, *self.images.shape])
        return [told, self.targets.numpy()]


def as_pixels(images: np.ndarray) -> np.ndarray:
    """Images uint8 [N, H, W], [N, C, H, W] or [N, H, W, C] as [N, C, H, W]; C is 1, 3 or 4. ValueError for others."""
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[1] in CHANNELS:
        return images
    if images.ndim == 4 and images.shape[3] in CHANNELS:
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    raise ValueError(f"uint8 of shape {list(images.shape)} are no images: [N, H, W], [N, C, H, W] or [N, H, W, C]")
