"""Decode images to uint8 arrays by Pillow, in threads: it releases the GIL."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from trainer.utils.text import first_few

Encoded = Path | bytes
Channels = Literal[1, 3]
Size = int | list[int] | None  # of both sides, or [height, width], or None for the size of the images

PILLOW_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # raised for damaged files
MODES = {1: "L", 3: "RGB"}
MAX_NAMED = 5  # images named in a message
CHUNK = 1024  # images submitted to the threads at once


def shape_of(images: Mapping[str, Encoded], size: Size, channels: Channels) -> tuple[int, int, int]:
    """Return the shape (C, H, W) that `decode` gives each image; raise ValueError if none can be read."""
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < 1:
            raise ValueError(f"data.size={size}\n  valid: at least 1 pixel, such as 64 or [48,64]")
        return channels, height, width
    first_error = ""
    for name, image in images.items():
        try:
            with Image.open(_as_file(image)) as opened:
                return channels, opened.height, opened.width
        except PILLOW_ERRORS as error:
            first_error = first_error or f"{name}: {_reason(error)}"
    raise ValueError(f"none of {len(images)} images can be read, such as {first_error}")


def decode(images: Mapping[str, Encoded], into: np.ndarray, is_resized: bool, workers: int) -> None:
    """Write the pixels of the images to `into`, uint8 [N, C, H, W], in order.

    Resizing keeps the aspect ratio: images are scaled to cover H x W and cropped in the middle.

    Raises:
        ValueError: counts and names the images that cannot be read or, unless resized, have another size.
    """
    names, errors = list(images), list[str]()
    read = partial(_decode_one, shape=into.shape[1:], is_resized=is_resized)
    with ThreadPoolExecutor(workers) as threads:
        for start in range(0, len(names), CHUNK):
            chunk = names[start : start + CHUNK]
            for row, pixels in enumerate(threads.map(read, chunk, map(images.get, chunk)), start):
                if isinstance(pixels, str):
                    errors.append(pixels)
                else:
                    into[row] = pixels
    if errors:
        raise ValueError("\n".join([f"{len(errors)} of {len(names)} images:", *first_few(errors, MAX_NAMED)]))


def _decode_one(name: str, image: Encoded, shape: tuple[int, int, int], is_resized: bool) -> np.ndarray | str:
    """Return uint8 [C, H, W], or an error message."""
    channels, height, width = shape
    try:
        with Image.open(_as_file(image)) as opened:
            decoded = opened.convert(MODES[channels])
    except PILLOW_ERRORS as error:
        return f"{name}: {_reason(error)}"
    if is_resized:
        decoded = ImageOps.fit(decoded, (width, height))
    elif decoded.size != (width, height):
        size = f"{decoded.height} x {decoded.width}"
        return f"{name}: {size} pixels, and the first image has {height} x {width}. Set data.size="
    return np.asarray(decoded).reshape(height, width, channels).transpose(2, 0, 1)


def _as_file(image: Encoded) -> Path | BytesIO:
    return BytesIO(image) if isinstance(image, bytes) else image


def _reason(error: Exception) -> str:
    return "not an image, or damaged" if isinstance(error, Image.UnidentifiedImageError) else str(error)
