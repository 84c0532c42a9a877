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

# Raised for damaged files.
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning)
# Others are refused whatever a file is named: for some of them Pillow starts programs, such as Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 89_478_485  # of an image, as Pillow has it: a header of a few bytes may claim any number
MODES = {1: "L", 3: "RGB"}
ORIENTATION, BITS_PER_SAMPLE = 0x0112, 0x0102  # tags of EXIF and of TIFF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
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
            upright = _open_upright(image)
            return channels, upright.height, upright.width
        except PILLOW_ERRORS as error:
            first_error = first_error or f"{name}: {_reason(error)}"
    raise ValueError(f"none of {len(images)} images can be read, such as {first_error}")


def decode(images: Mapping[str, Encoded], into: np.ndarray, is_resized: bool, threads: int) -> None:
    """Write the pixels of the images to `into`, uint8 [N, C, H, W], in order.

    Resizing keeps the aspect ratio: images are scaled to cover H x W and cropped in the middle.

    Raises:
        ValueError: counts and names the images that cannot be read or, unless resized, have another size.
    """
    names, errors = list(images), list[str]()
    read = partial(_decode_one, shape=into.shape[1:], is_resized=is_resized)
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(names), CHUNK):
            chunk = names[start : start + CHUNK]
            for row, pixels in enumerate(pool.map(read, chunk, map(images.get, chunk)), start):
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
        decoded = _to_eight_bits(_open_upright(image)).convert(MODES[channels])
    except PILLOW_ERRORS as error:
        return f"{name}: {_reason(error)}"
    if is_resized:
        decoded = ImageOps.fit(decoded, (width, height))
    elif decoded.size != (width, height):
        size = f"{decoded.height} x {decoded.width}"
        return f"{name}: {size} pixels, and the first image has {height} x {width}. Set data.size="
    return np.asarray(decoded).reshape(height, width, channels).transpose(2, 0, 1)


def _open_upright(image: Encoded) -> Image.Image:
    """Return the image as it was seen: a camera that was held sideways says so in the EXIF tag, and turns no pixel."""
    with Image.open(BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(f"{opened.height} x {opened.width} pixels, and {MAX_PIXELS} are allowed. Scale it down")
        opened.load()
    method = UPRIGHT.get(_orientation(opened))
    return opened if method is None else opened.transpose(method)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # whatever Pillow raises for damaged EXIF, which says nothing of the pixels
        return 1


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Return the upper eight bits of grey images of 9 to 16 bits, which `convert` would clip to white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]
        return Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))
    if image.mode in ("I", "F"):
        numbers = "floating-point numbers" if image.mode == "F" else "integers of 32 bits"
        raise ValueError(f"its pixels are {numbers}, which have no white. Save it with 8 or 16 bits")
    return image


def _reason(error: Exception) -> str:
    return "not an image, or damaged" if isinstance(error, Image.UnidentifiedImageError) else str(error)
