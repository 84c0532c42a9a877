"""Encoded images as bytes of pixels: read by Pillow, some at a time in threads, which it lets run side by side."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

Encoded = Path | bytes
Channels = Literal[1, 3]
Size = int | list[int] | None  # of both sides, or [height, width], or None: as the images are

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for damaged files
MODES = {1: "L", 3: "RGB"}
MAX_NAMED = 5  # images, in a message
MANY = 1024  # are given to the threads at once


def shape_of(images: Mapping[str, Encoded], size: Size, channels: Channels) -> tuple[int, int, int]:
    """What `decode` makes of each of these images: (C, H, W). ValueError when none of them can be read."""
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < 1:
            raise ValueError(f"data.size={size}: at least 1 pixel")
        return channels, height, width
    fault = ""
    for name, image in images.items():
        try:
            with Image.open(_opened(image)) as opened:
                return channels, opened.height, opened.width
        except UNREADABLE as error:
            fault = fault or f"{name}: {_reason(error)}"
    raise ValueError(f"not one of {len(images)} images can be read, such as {fault}")


def decode(images: Mapping[str, Encoded], into: np.ndarray, is_resized: bool, workers: int) -> None:
    """Writes the pixels of the images into uint8 [N, C, H, W], in their order.

    Resized images keep their proportions: they are scaled until they cover H x W, and cropped in the middle.
    Raises one ValueError that counts and names images that cannot be read or, unless resized, are of another size.
    """
    names, errors = list(images), list[str]()
    read = partial(_pixels, shape=into.shape[1:], is_resized=is_resized)
    with ThreadPoolExecutor(workers) as threads:
        for start in range(0, len(names), MANY):
            some = names[start : start + MANY]
            for place, pixels in enumerate(threads.map(read, some, map(images.get, some)), start):
                if isinstance(pixels, str):
                    errors.append(pixels)
                else:
                    into[place] = pixels
    if errors:
        more = [f"and {len(errors) - MAX_NAMED} more"] if len(errors) > MAX_NAMED else []
        raise ValueError("\n".join([f"{len(errors)} of {len(names)} images:", *errors[:MAX_NAMED], *more]))


def _pixels(name: str, image: Encoded, shape: tuple[int, int, int], is_resized: bool) -> np.ndarray | str:
    """uint8 [C, H, W]; or what is wrong."""
    channels, height, width = shape
    try:
        with Image.open(_opened(image)) as opened:
            decoded = opened.convert(MODES[channels])
    except UNREADABLE as error:
        return f"{name}: {_reason(error)}"
    if is_resized:
        decoded = ImageOps.fit(decoded, (width, height))
    elif decoded.size != (width, height):
        found = f"{decoded.height} x {decoded.width}"
        return f"{name}: {found} pixels, and the first image has {height} x {width}. Set data.size="
    return np.asarray(decoded).reshape(height, width, channels).transpose(2, 0, 1)


def _opened(image: Encoded) -> Path | BytesIO:
    return BytesIO(image) if isinstance(image, bytes) else image


def _reason(error: Exception) -> str:
    return "no image, or damaged" if isinstance(error, Image.UnidentifiedImageError) else str(error)
