"""The format of checkpoints: shards, each a safetensors file, and beside it a manifest by which damage is noticed.

Several ranks write one state together without communication. Each manifest names all the shards of the state, which is
complete as soon as all of them are there. A manifest is written last, and every file aside and renamed, so a kill at
any instant leaves a complete state or none. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trainer.checkpoint.direct_io import DirectFile
from trainer.checkpoint.files import sync, write_text
from trainer.utils.disk import naming_disk

FORMAT = 5
TENSORS, MANIFEST = ".safetensors", ".json"

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}

Tree = Mapping[str, Any]  # names to trees, tensors, numbers and texts


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is written.

    Attributes:
        dtype: of the tensor.
        shape: likewise.
        read: returns it.
    """

    dtype: torch.dtype
    shape: torch.Size
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """A shard to be written.

    Attributes:
        name: of this shard.
        parts: the names of all shards of the state.
        attempt: identifies the start of the run, so that shards of two starts are not mixed.
    """

    name: str
    shards: tuple[str, ...]
    attempt: str


@dataclass(frozen=True)
class SavedState:
    """A complete state on disk; `errors` verifies its checksums.

    Attributes:
        folder: where it is.
        shards: their names.
    """

    folder: Path
    shards: tuple[str, ...]

    def load(
        self, section: str, is_wanted: Callable[[str], bool] = bool, part: int = 0, copy: bool = True
    ) -> dict[str, Any]:
        """Return the tree of a section, merged from all shards. Leaves that are not wanted are not read.

        Args:
            section: its name.
            is_wanted: says of the name of a leaf whether it is.
            part: of the model, if it was saved in parts.
            copy: whether tensors are copied into memory; else they stay mapped, and are read where they are looked at.
        """
        tree: dict[str, Any] = {}
        for shard in self.shards:
            _load(self.folder / (shard + TENSORS), f"{part_name(part)}/{section}/", is_wanted, tree, copy)
        return tree

    def load_shard(self, shard: str, section: str, is_wanted: Callable[[str], bool] = bool) -> dict[str, Any]:
        """Return the tree of a section in one shard. Leaves that are not wanted are not read."""
        tree: dict[str, Any] = {}
        _load(self.folder / (shard + TENSORS), f"{section}/", is_wanted, tree, copy=True)
        return tree

    def errors(self, index: int = 0, count: int = 1) -> list[str]:
        """Verify this share of the shards, so that ranks may divide the work; return sentences about damage."""
        return [fault for part in self.shards[index::count] for fault in _errors(self.folder, part)]


def part_name(part: int) -> str:
    """Return the name under which the tree of a part of the model is saved."""
    return f"part-{part}"


def find_saved(folder: Path) -> SavedState | None:
    """Return the state in a folder if all shards that a manifest names are there. Only manifests are read."""
    notes = {path.name.removesuffix(MANIFEST): _read_manifest(path) for path in folder.glob(f"*{MANIFEST}")}
    for note in filter(None, notes.values()):
        named = [notes.get(part) for part in note["parts"]]
        if all(other and other["attempt"] == note["attempt"] for other in named):
            return SavedState(folder, tuple(note["parts"]))
    return None


def damaged_manifests(folder: Path) -> list[str]:
    """Return sentences about damaged manifests. They are renamed when complete, so no kill leaves a damaged one."""
    return [f"{path} is damaged" for path in sorted(folder.glob(f"*{MANIFEST}")) if _read_manifest(path) is None]


def write_shard(folder: Path, shard: Shard, tree: Tree) -> None:
    """Write a shard and its manifest.

    Raises:
        DiskError: the disk cannot be written to.
    """
    aside = folder / f".{shard.name}.partial"
    with naming_disk(folder, "this checkpoint is not written, the ones before it are whole"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            size, checksum = _write_leaves(aside, dict(iter_leaves(tree)))
            os.rename(aside, folder / (shard.name + TENSORS))
            note = {"format": FORMAT, "attempt": shard.attempt, "parts": shard.shards, "bytes": size, "crc32": checksum}
            write_text(folder / (shard.name + MANIFEST), _manifest_text(note))
        except OSError:
            if aside.is_file():
                aside.unlink()
            raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor | LazyTensor]) -> None:
    """Write named tensors as one safetensors file, aside and renamed."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        _write_leaves(aside, tensors)
        os.rename(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the named tensors of a safetensors file.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except Exception as error:  # the library does not document what it raises for a file of another format
        raise ValueError(f"{path} cannot be read: {error}") from error


def unsavable(tensors: Mapping[str, Any]) -> list[str]:
    """Return what a checkpoint cannot hold of these values, such as "mask of torch.complex128"."""
    found = []
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            found.append(f"{name} of {type(tensor).__name__}")
        elif tensor.layout is not torch.strided:
            found.append(f"{name} of {tensor.layout}")
        elif tensor.dtype not in DTYPES:
            found.append(f"{name} of {tensor.dtype}")
    return found


def iter_leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a tree with their paths, such as ("model/0.weight", tensor); an empty tree is a leaf.

    A slash in a name becomes ~1 and a tilde ~0, as in a JSON pointer.
    """
    for name, value in tree.items():
        path = prefix + name.replace("~", "~0").replace("/", "~1")
        if isinstance(value, Mapping) and value:
            yield from iter_leaves(value, f"{path}/")
        else:
            yield path, value


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree with these leaves."""
    tree: dict[str, Any] = {}
    for name, value in leaves.items():
        _insert(tree, name, value)
    return tree


def _load(path: Path, prefix: str, is_wanted: Callable[[str], bool], tree: dict[str, Any], copy: bool) -> None:
    with safe_open(path, framework="pt") as file:
        values = json.loads(file.metadata()["values"])
        for name in (*file.keys(), *values):
            leaf = name.removeprefix(prefix)
            if name.startswith(prefix) and is_wanted(leaf):
                # Copied out of the file, which is mapped: matrix products of memory at other addresses than torch's own
                # have other last bits.
                value = values[name] if name in values else file.get_tensor(name)
                _insert(tree, leaf, value.clone() if copy and isinstance(value, Tensor) else value)


def _errors(folder: Path, part: str) -> list[str]:
    path, note = folder / (part + TENSORS), _read_manifest(folder / (part + MANIFEST))
    if note is None:
        return [f"{folder / (part + MANIFEST)} is missing or damaged"]
    if note["format"] != FORMAT:
        return [f"{path} has format {note['format']}; this version reads {FORMAT}"]
    if not path.exists():
        return [f"{path} is missing"]
    if _checksum(path) != (note["bytes"], note["crc32"]):
        return [f"{path} is damaged: its size or checksum is not the one that was noted"]
    return []


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """Return a manifest; None if it is missing or damaged."""
    try:
        text = path.read_text()
        note = json.loads(text[: text.rindex("}") + 1])
        return note if text == _manifest_text(note) and isinstance(note["format"], int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _manifest_text(note: dict[str, Any]) -> str:
    """Return a manifest as text, with its own checksum in the last line."""
    body = json.dumps(note, indent=1, sort_keys=True)
    return f"{body}\n{zlib.crc32(body.encode()):08x}\n"


def _write_leaves(path: Path, leaves: Mapping[str, Any]) -> tuple[int, int]:
    """Write tensors and values by name as a safetensors file; return its size in bytes and its crc32.

    The format is the length of a JSON header, the header, and the bytes of the tensors. The library's own writer takes
    2.7 times as long: it copies every tensor once more, and the checksum would have to be made by reading back.
    """
    tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor | LazyTensor)}
    values = {name: leaf for name, leaf in leaves.items() if name not in tensors}
    # Without "format" huggingface_hub refuses the file.
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "values": json.dumps(values)}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with DirectFile(path) as file:
        for content in (len(text).to_bytes(8, "little"), text, *map(_bytes_of, tensors.values())):
            file.write(content)
    return file.size, file.crc32


def _bytes_of(leaf: Tensor | LazyTensor) -> memoryview:
    tensor = leaf if isinstance(leaf, Tensor) else leaf.read()
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _checksum(path: Path) -> tuple[int, int]:
    """Return the size of a file in bytes, and its crc32."""
    crc, size = 0, 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return size, crc


def _insert(tree: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = (part.replace("~1", "/").replace("~0", "~") for part in name.split("/"))
    for parent in parents:
        tree = tree.setdefault(parent, {})
    if value == {}:  # others may have put something there
        tree.setdefault(last, {})
    else:
        tree[last] = value
