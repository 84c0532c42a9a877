"""Messages between a site and the coordinator: a header in JSON, and tensors as raw bytes, in parts.

A message has the layout of a safetensors file. Its first part is the file's header, with the names, dtypes and shapes
of the tensors; the message's own header is among the metadata there. The other parts are the rest of the file. Nothing
of a message is executed or unpickled. Its size is known, and may be refused, before memory is taken for it.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, BinaryIO, TypeVar

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.utils.annotations import STRICT
from trainer.utils.text import first_few

T = TypeVar("T")
Kind = tuple[torch.dtype, tuple[int | None, ...]]  # of a tensor: its dtype and shape; None: any size

PROTOCOL = 1
PART_BYTES = 1 << 19  # larger parts were slower, smaller ones cost more processor
MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS, MAX_DIMENSIONS = 4096, 16
TABLE, VECTOR = "table/", "vector/"  # begin the names of tensors that are summed, and of the others
HUGE_BYTES = 1 << 25  # from where on memory is worth large pages
LENGTH_BYTES = 8  # of the number at the start of a file: of bytes of the header that follows

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


HEADER = ConfigDict(STRICT, extra="forbid")  # of dataclasses that are headers; a loss may be infinite
Name = Annotated[str, Field(max_length=200)]
Sums = Annotated[dict[Name, float], Field(max_length=200)]


class MessageError(ValueError):
    """A message that is none: the sentence says what is wrong with it."""


@dataclass(frozen=True)
class Message:
    """A header of JSON values, and tensors by name.

    Attributes:
        header: the values.
        tensors: the tensors.
        content: the bytes of all tensors in their order, a uint8 vector, if they lie so; None if they do not.
    """

    header: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    content: Tensor | None = None

    def parts(self) -> Iterator[bytes]:
        """Yield the parts of the message. The tensors must not change until the last one."""
        return map(bytes, self.views())

    def views(self) -> Iterator[bytes | memoryview]:
        """Yield the parts as they lie in memory, without a copy of the tensors; see `parts`."""
        flat = {name: tensor.detach().contiguous().cpu() for name, tensor in self.tensors.items()}
        names = sorted(flat, key=lambda name: (-flat[name].element_size(), name))  # all of them aligned in a file
        yield _first_part(self.header, [(name, flat[name].dtype, list(flat[name].shape)) for name in names])
        small = bytearray()
        for name in names:
            content = _bytes_of(flat[name])
            if len(small) + len(content) > PART_BYTES and small:
                yield bytes(small)
                small.clear()
            if len(content) <= PART_BYTES:
                small += content
            else:
                yield from (content[at : at + PART_BYTES] for at in range(0, len(content), PART_BYTES))
        if small:
            yield bytes(small)


@dataclass(frozen=True)
class Layout:
    """The tensors of a message: names, dtypes and shapes, in the order of their bytes."""

    tensors: list[tuple[str, torch.dtype, list[int]]]

    @classmethod
    def from_json(cls, described: list[Any]) -> Layout:
        """Return the layout of which this is the `to_json`."""
        return cls([(name, DTYPES[dtype], shape) for name, dtype, shape in described])

    def to_json(self) -> list[Any]:
        """Return a value for JSON."""
        return [[name, DTYPE_NAMES[dtype], shape] for name, dtype, shape in self.tensors]

    @property
    def num_bytes(self) -> int:
        """Of all tensors together."""
        return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self.tensors)

    def views(self, content: Tensor) -> dict[str, Tensor]:
        """Return the tensors that lie in these bytes, a uint8 vector."""
        found, end = {}, 0
        for name, dtype, shape in self.tensors:
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            found[name] = content[begin:end].view(dtype).view(shape)
        return found


class PrivateFile(io.BufferedWriter):
    """A new file that its owner alone can read. The disk takes it while more is written, so that a sync is short."""

    AHEAD_BYTES = 1 << 22

    def __init__(self, path: Path):
        def opener(name: str, flags: int) -> int:
            return os.open(name, flags, 0o600)

        super().__init__(io.FileIO(path, "w", opener=opener))
        self._begun = self._written = 0

    def write(self, part: Any) -> int:
        count = super().write(part)
        self._written += count
        size = self._written - self._begun
        if size >= self.AHEAD_BYTES and sys.platform == "linux":
            self.flush()
            os.posix_fadvise(self.fileno(), self._begun, size, os.POSIX_FADV_DONTNEED)  # Linux writes it first
            self._begun = self._written
        return count


@dataclass(frozen=True)
class Limit:
    """The bounds of a message.

    Attributes:
        max_bytes: of its tensors together.
        scalars: the names of its sums; None: any.
        tensors: dtypes and shapes of the tensors that it has, by name; None: any.
        optional: those of tensors of which it has all or none.
    """

    max_bytes: int = 0
    scalars: Collection[str] | None = None
    tensors: Mapping[str, Kind] | None = None
    optional: Mapping[str, Kind] = field(default_factory=dict)

    @classmethod
    def like(
        cls,
        scalars: Iterable[str],
        tensors: Mapping[str, Tensor],
        optional: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Limit:
        """Return the limit of messages with scalars of these names, and tensors like these."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in (*tensors.values(), *optional.values()))
        return cls(size, frozenset(scalars), _kinds(tensors), _kinds(optional))

    def check(self, header: Mapping[str, Any], layout: Layout) -> None:
        """Raise MessageError if a message with this header and layout holds anything else."""
        if layout.num_bytes > self.max_bytes:
            raise MessageError(f"tensors of {layout.num_bytes:,} bytes; at most {self.max_bytes:,} are expected")
        if self.scalars is not None:
            _check_names("scalars", header.get("sums", {}), self.scalars)
        if self.tensors is None:
            return
        found = {name: (dtype, tuple(shape)) for name, dtype, shape in layout.tensors}
        has_optional = bool(found.keys() - self.tensors.keys())
        expected = {**self.tensors, **self.optional} if has_optional else self.tensors
        _check_names("tensors", found, expected)
        for name, kind in expected.items():
            if not _is_of_kind(found[name], kind):
                raise MessageError(f"{name} of {_format_kind(found[name])}; {_format_kind(kind)} is expected")


class MessageReader:
    """Reads a message from its parts, into memory or into a file.

    Args:
        limit: of what it may hold.
        file: gets the parts as they come, in place of memory; the tensors are then not among what `finish` returns.

    Attributes:
        header: of the message, once the first part has come.
        layout: of its tensors, likewise.
        content: the bytes of all tensors, a uint8 vector.
    """

    def __init__(self, limit: Limit, file: BinaryIO | None = None):
        self.limit, self.file = limit, file
        self.header: dict[str, Any] | None = None
        self.layout = Layout([])
        self.content = torch.empty(0, dtype=torch.uint8)
        self._received = self._size = 0

    def add(self, part: bytes) -> None:
        """Take the next part.

        Raises:
            MessageError: it is no part of a message, or the message is too large.
        """
        if self.header is None:
            self.header, self.layout = parse_first_part(part)
            self._size = self.layout.num_bytes
            self.limit.check(self.header, self.layout)
            if self.file is None:
                self.content = _new_bytes(self._size)
        else:
            missing = self._size - self._received
            if not 0 < len(part) <= missing:
                raise MessageError(f"a part of {len(part):,} bytes, and {missing:,} are missing")
            if self.file is None:
                memoryview(self.content.numpy())[self._received : self._received + len(part)] = part  # pyright: ignore[reportArgumentType]
            self._received += len(part)
        if self.file is not None:
            self.file.write(part)

    def finish(self) -> Message:
        """Return the message; raise MessageError if parts of it are missing."""
        if self.header is None or self._received < self._size:
            raise MessageError(f"the message ended early: {self._size - self._received:,} bytes are missing")
        return Message(self.header, {} if self.file else self.layout.views(self.content), self.content)


def parse_first_part(part: bytes) -> tuple[dict[str, Any], Layout]:
    """Return the header of a message, and the layout of its tensors; raise MessageError if it has none."""
    if len(part) > MAX_HEADER_BYTES:
        raise MessageError(f"a header of {len(part):,} bytes; at most {MAX_HEADER_BYTES:,} are valid")
    if int.from_bytes(part[:LENGTH_BYTES], "little") != len(part) - LENGTH_BYTES:
        raise MessageError("the first part is no header")
    content = _parse(part[LENGTH_BYTES:])
    metadata = content.pop("__metadata__", None)
    if not isinstance(metadata, dict):
        raise MessageError("the first part is no header")
    if metadata.get("protocol") != str(PROTOCOL):
        raise MessageError(
            f"protocol {str(metadata.get('protocol'))[:20]}; this side speaks {PROTOCOL}\n"
            "  install the same version of silotrain on both sides"
        )
    text = metadata.get("header")
    header = _parse(text.encode()) if isinstance(text, str) else None
    if header is None or len(content) > MAX_TENSORS:
        raise MessageError("the first part is no header")
    return header, _parse_layout(content)


def parse_header(kind: type[T], header: Mapping[str, Any]) -> T:
    """Return the header of a message as a dataclass; raise MessageError if it is not of this kind."""
    try:
        # As JSON, because only there a strict dataclass accepts a mapping.
        return TypeAdapter(kind).validate_json(json.dumps(header))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part)[:80] for part in first["loc"][:4])
        raise MessageError(f"the header's {place}: {first['msg']}") from error


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of a message in a file."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["header"])


def read_message(path: Path) -> Message:
    """Return a message from a file, whose tensors are mapped into memory: they take none until they are used.

    Raises:
        MessageError: it is no message.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
            return Message(json.loads(file.metadata()["header"]), tensors)
    except (SafetensorError, TypeError, KeyError, ValueError, RuntimeError) as error:
        raise MessageError(f"it is no safetensors file: {error}") from error


def write_message(path: Path, message: Message) -> None:
    """Write a message to a file, aside, and rename it. It may be read before `sync` has it on the disk."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with PrivateFile(aside) as file:
        for part in message.views():
            file.write(part)
    aside.rename(path)


def read_parts(path: Path) -> Iterator[bytes]:
    """Yield the parts of the message in a file."""
    with open(path, "rb") as file:
        length = file.read(LENGTH_BYTES)
        yield length + file.read(int.from_bytes(length, "little"))
        while part := file.read(PART_BYTES):
            yield part


def _first_part(header: Mapping[str, Any], described: list[tuple[str, torch.dtype, list[int]]]) -> bytes:
    tensors, end = {}, 0
    for name, dtype, shape in described:
        assert dtype in DTYPE_NAMES, (name, dtype)
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        tensors[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"protocol": str(PROTOCOL), "header": json.dumps(header)}, **tensors}).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _parse(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text, object_pairs_hook=_without_duplicates)
    except MessageError:
        raise
    except (ValueError, RecursionError) as error:
        raise MessageError("the first part is no JSON") from error
    if not isinstance(content, dict):
        raise MessageError("the first part is no header")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict; two libraries might take another one of two with one name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise MessageError("the first part has a name twice")
    return found


def _parse_layout(content: Mapping[str, Any]) -> Layout:
    """Return the layout that a file's header describes: tensors without gaps, each at a multiple of its element."""
    layout, end = Layout([]), 0
    for name, entry in content.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise MessageError(f"{name[:80]} is not described by its dtype, shape and data_offsets")
        dtype, shape = entry["dtype"], entry["shape"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise MessageError(f"a tensor of dtype {str(dtype)[:40]}; valid: {', '.join(DTYPES)}")
        is_shape = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
        if not is_shape or not all(type(size) is int and 0 <= size < 1 << 48 for size in shape):
            raise MessageError(f"the shape of {name[:80]} is none")
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        if entry["data_offsets"] != [begin, end] or begin % DTYPES[dtype].itemsize:
            raise MessageError(f"the data_offsets of {name[:80]} are none")
        layout.tensors.append((name, DTYPES[dtype], shape))
    return layout


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, Kind]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _is_of_kind(found: Kind, kind: Kind) -> bool:
    (dtype, shape), (expected_dtype, expected) = found, kind
    sizes = zip(shape, expected, strict=False)
    return dtype == expected_dtype and len(shape) == len(expected) and all(b in (a, None) for a, b in sizes)


def _format_kind(kind: Kind) -> str:
    dtype, shape = kind
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    return f"{str(dtype).removeprefix('torch.')} [{sizes}]"


def _check_names(what: str, found: Collection[str], expected: Collection[str]) -> None:
    for names, problem in (({*expected} - {*found}, "misses"), ({*found} - {*expected}, "has unexpected")):
        if names:
            raise MessageError(f"the message {problem} {what}: {', '.join(first_few(sorted(names), 3))[:200]}")


def _new_bytes(size: int) -> Tensor:
    """Return a uint8 vector whose memory is taken as it is written."""
    if size < HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    # The kernel clears and maps new memory page by page, which takes a tenth of the processor time of a large message
    # unless its pages are large.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _bytes_of(tensor: Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
