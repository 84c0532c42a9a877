"""Messages between a site and the coordinator: a header in JSON, and tensors as raw bytes, in parts.

The first part is the header, with the names, dtypes and shapes of the tensors. Their bytes follow in that order; a part
holds bytes of one tensor. Nothing of a message is executed or unpickled. Its size is known, and may be refused, before
memory is taken for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PROTOCOL = 1
PART_BYTES = 1 << 19  # larger parts were slower, smaller ones cost more processor
MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS, MAX_DIMENSIONS = 4096, 16

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


class MessageError(ValueError):
    """A message that is none: the sentence says what is wrong with it."""


@dataclass(frozen=True)
class Message:
    """A header of JSON values, and tensors by name."""

    header: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def parts(self) -> Iterator[bytes]:
        """Yield the parts of the message. The tensors must not change until the last one."""
        flat = {name: tensor.detach().contiguous().cpu() for name, tensor in self.tensors.items()}
        described = [[name, _dtype_name(tensor), list(tensor.shape)] for name, tensor in flat.items()]
        yield json.dumps({"protocol": PROTOCOL, "header": self.header, "tensors": described}).encode()
        for tensor in flat.values():
            content = memoryview(tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else b"")
            for start in range(0, len(content), PART_BYTES):
                yield bytes(content[start : start + PART_BYTES])


class MessageReader:
    """Reads a message from its parts.

    Args:
        max_bytes: of all tensors together.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.header: dict[str, Any] | None = None
        self._tensors: dict[str, Tensor] = {}
        self._missing: list[memoryview] = []  # of the tensors that are not whole, the first one's rest first

    def add(self, part: bytes) -> None:
        """Take the next part.

        Raises:
            MessageError: it is no part of a message, or the message is too large.
        """
        if self.header is None:
            self._read_header(part)
            return
        if not part or not self._missing or len(part) > len(self._missing[0]):
            raise MessageError(f"a part of {len(part):,} bytes, and {sum(map(len, self._missing)):,} are missing")
        rest = self._missing[0]
        rest[: len(part)] = part
        if len(part) < len(rest):
            self._missing[0] = rest[len(part) :]
        else:
            del self._missing[0]

    def finish(self) -> Message:
        """Return the message; raise MessageError if parts of it are missing."""
        if self.header is None or self._missing:
            raise MessageError(f"the message ended early: {sum(map(len, self._missing)):,} bytes are missing")
        return Message(self.header, self._tensors)

    def _read_header(self, part: bytes) -> None:
        content = _parse(part)
        if content.get("protocol") != PROTOCOL:
            raise MessageError(
                f"protocol {content.get('protocol')!r}; this side speaks {PROTOCOL}\n"
                "  install the same version of silotrain on both sides"
            )
        header, described = content.get("header"), content.get("tensors")
        if not isinstance(header, dict) or not isinstance(described, list) or len(described) > MAX_TENSORS:
            raise MessageError("the first part is no header")
        layout = [_described(entry) for entry in described]
        size = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in layout)
        if size > self.max_bytes:
            raise MessageError(f"tensors of {size:,} bytes; at most {self.max_bytes:,} are expected")
        if len({name for name, _, _ in layout}) < len(layout):
            raise MessageError("two tensors have one name")
        self._tensors = {name: torch.empty(shape, dtype=dtype) for name, dtype, shape in layout}
        whole = (tensor for tensor in self._tensors.values() if tensor.numel())
        self._missing = [memoryview(tensor.view(-1).view(torch.uint8).numpy()) for tensor in whole]
        self.header = header


def _parse(part: bytes) -> dict[str, Any]:
    if len(part) > MAX_HEADER_BYTES:
        raise MessageError(f"a header of {len(part):,} bytes; at most {MAX_HEADER_BYTES:,} are valid")
    try:
        content = json.loads(part)
    except (ValueError, RecursionError) as error:
        raise MessageError("the first part is no JSON") from error
    if not isinstance(content, dict):
        raise MessageError("the first part is no header")
    return content


def _described(entry: Any) -> tuple[str, torch.dtype, list[int]]:
    if not isinstance(entry, list) or len(entry) != 3:
        raise MessageError("a tensor is described by its name, dtype and shape")
    name, dtype, shape = entry
    if not isinstance(name, str) or not isinstance(dtype, str) or dtype not in DTYPES:
        raise MessageError(f"a tensor of dtype {str(dtype)[:40]}; valid: {', '.join(DTYPES)}")
    is_shape = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
    if not is_shape or not all(type(size) is int and 0 <= size < 1 << 48 for size in shape):
        raise MessageError(f"the shape of {name[:80]} is none")
    return name, DTYPES[dtype], shape


def _dtype_name(tensor: Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    assert name in DTYPES, name
    return name
