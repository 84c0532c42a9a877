"""State on disk: safetensors files and a manifest with their checksums, written aside and renamed. Never pickle.

checkpoints/
  latest                   the name of the newest
  round-000012/
    manifest.json          the format's version, and each section's size and crc32
    model.safetensors      the global model, by the names of its tensors
    algorithm.safetensors  the algorithm's own state, such as a server optimizer's
    progress.safetensors   rounds, examples, seconds, ...
    silo-0.safetensors     what the clients of silo 0 keep: optimizer states, personal tensors
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer import comm

FORMAT = 1
SUFFIX = ".safetensors"

Tree = Mapping[str, Any]  # names to trees, tensors, numbers and texts


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk whose checksums are right."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def rounds(self) -> int:
        """The rounds that were done when it was saved."""
        return int(self.folder.name.removeprefix("round-"))

    def sections(self, beginning: str) -> list[str]:
        """The names of the sections that begin so."""
        return [name for name in self.manifest["sections"] if name.startswith(beginning)]

    def load(self, section: str, wanted: Callable[[str], bool] = bool) -> dict[str, Any]:
        """The tree of a section, of the leaves whose names are wanted; other tensors are not read."""
        tree: dict[str, Any] = {}
        with safe_open(self.folder / (section + SUFFIX), framework="pt") as file:
            for name in filter(wanted, file.keys()):
                _insert(tree, name, file.get_tensor(name))
            for name, value in json.loads(file.metadata()["values"]).items():
                if wanted(name):
                    _insert(tree, name, value)
        return tree


class Checkpoints:
    """The checkpoints of one run, of which the newest `keep` stay. Every rank makes one and calls it alike."""

    def __init__(self, folder: Path, is_first: bool, keep: int = 2):
        self.folder, self.is_first, self.keep = folder, is_first, keep

    def save(self, name: str, sections: Mapping[str, Tree]) -> None:
        """Writes a checkpoint of the sections that the ranks bring: all of it, or none. A collective."""
        partial = self.folder / f".{name}.partial"
        if self.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        comm.barrier()
        written = {section: _write(partial / (section + SUFFIX), tree) for section, tree in sections.items()}
        everywhere = comm.gather_texts(json.dumps(written))
        if self.is_first:
            listed = {section: facts for text in everywhere for section, facts in json.loads(text).items()}
            write_text(partial / "manifest.json", _manifest_text({"format": FORMAT, "sections": listed}))
            self._publish(partial, self.folder / name)
        comm.barrier()

    def newest(self) -> Saved | None:
        """The checkpoint to go on from, or None, chosen by rank 0 for all. A collective."""
        name = comm.broadcast_text(self._newest_name() if self.is_first else "")
        return open_checkpoint(self.folder / name) if name else None

    def _newest_name(self) -> str:
        latest = self.folder / "latest"
        return latest.read_text().strip() if latest.exists() else ""

    def _publish(self, partial: Path, final: Path) -> None:
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        write_text(self.folder / "latest", final.name)
        for old in sorted(self.folder.glob("round-*"))[: -self.keep]:
            shutil.rmtree(old)


def open_checkpoint(folder: Path) -> Saved:
    """The checkpoint in this folder; ValueError when a section is missing or damaged."""
    manifest = _read_manifest(folder / "manifest.json")
    faults = []
    if manifest["format"] != FORMAT:
        raise ValueError(f"The checkpoint {folder} has format {manifest['format']}; this version reads {FORMAT}.")
    for section, facts in manifest["sections"].items():
        path = folder / (section + SUFFIX)
        if not path.exists():
            faults.append(f"{path.name} is missing")
        elif _checksum(path) != facts:
            faults.append(f"{path.name} is damaged: its size or checksum differs from the manifest's")
    if faults:
        listed = "\n  ".join(faults)
        raise ValueError(f"The checkpoint {folder} cannot be used:\n  {listed}\n  start anew in another run_dir")
    return Saved(folder, manifest)


def _manifest_text(manifest: dict[str, Any]) -> str:
    """The manifest as text, with a checksum of its own in the last line."""
    body = json.dumps(manifest, indent=1, sort_keys=True)
    return f"{body}\n{zlib.crc32(body.encode()):08x}\n"


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        manifest = json.loads(text[: text.rindex("}") + 1])
        if text == _manifest_text(manifest) or manifest["format"] != FORMAT:
            return manifest
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"The checkpoint {path.parent} cannot be used: its {path.name} is missing or damaged.")


def write_text(path: Path, text: str) -> None:
    """Writes a file aside, makes sure that it is on the disk, and renames it: readers see the old or the new one."""
    aside = path.with_name(f".{path.name}.partial")
    with open(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(aside, path)


def _write(path: Path, tree: Tree) -> dict[str, int]:
    leaves = dict(_leaves(tree))
    # Cloned, because saving a view would write the whole vector it looks into.
    tensors = {name: leaf.detach().clone().contiguous() for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    values = {name: leaf for name, leaf in leaves.items() if not isinstance(leaf, Tensor)}
    save_file(tensors, path, metadata={"values": json.dumps(values)})
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return _checksum(path)


def _checksum(path: Path) -> dict[str, int]:
    crc, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return {"bytes": size, "crc32": crc}


def _leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _insert(tree: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value
