"""The folder MODELS/<name>/ of a model: a new version appears in it by one rename, and old ones are removed.

A kill at any moment leaves no half version: one is written as `.N-<letters>/`, and removed as such.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from trainer.checkpoint.files import sync, write_text
from trainer.export.triton import config_pbtxt, labelled_output, labels_txt
from trainer.service.version import DESCRIPTION, ONNX, ModelDescription, checksums, read_version, version_numbers

NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,99}")  # it is part of addresses
TRITON_CONFIG, LABELS = "config.pbtxt", "labels.txt"
ASIDE = re.compile(r"\.\d+-[0-9a-f]{8}")
LEFT_AFTER_SECONDS = 60  # the oldest leftover that may not have been locked yet by its exporter


def write_version(models: Path, name: str, fill: Callable[[Path], ModelDescription], keep: int | None = None) -> Path:
    """Write the next version of a model; return its folder. Of two writers at once each gets a number of its own.

    Args:
        models: the folder of all models.
        name: of the model.
        fill: writes the files of the version into a folder, and returns their description, without checksums.
        keep: the number of versions that stay, this one among them; None: all.

    Raises:
        ValueError: the folder is not that of a model, or its versions take other inputs or give other outputs.
    """
    model = models / name
    check_model_folder(models, name)
    model.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(model)
    try:
        with _aside(model, _next_number(model)) as aside:
            description = fill(aside)
            _check_same_signature(model, description)
            description = replace(description, sha256=checksums(aside))
            write_text(aside / DESCRIPTION, description.to_json())
            _sync_all(aside)
            _write_model_files(model, description)
            version = _publish(aside, model)
    finally:
        with suppress(OSError):  # not of a folder that holds versions
            model.rmdir()
    for number in version_numbers(model)[: -keep if keep else 0]:
        _remove(model, number)
    return version


def check_model_folder(models: Path, name: str) -> None:
    """Raise ValueError if a version of a model cannot be written into its folder, or must not be."""
    if not NAME.fullmatch(name):
        raise ValueError(f"--name {name}\n  valid: letters, digits, dots, dashes and underscores, a letter first")
    model = models / name
    for path in (models, model):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file\n  choose another folder by --to, or another --name")
    if not model.is_dir():
        return
    foreign = [path.name for path in sorted(model.iterdir()) if path.name[0] != "." and not _is_exported(path)]
    if foreign:
        raise ValueError(
            f"{model} holds {foreign[0]}, and is not the folder of an exported model: nothing was written\n"
            "  choose another folder by --to, or another --name"
        )


def _is_exported(path: Path) -> bool:
    """Return whether a file or folder below that of a model is an exporter's, or has been removed by one meanwhile."""
    if path.name in (TRITON_CONFIG, LABELS):
        return True
    return (path.name.isdigit() and (path / DESCRIPTION).is_file()) or not path.exists()


def newest_version(model: Path) -> tuple[Path, ModelDescription] | None:
    """Return the newest whole version of a model, and its description; None if there is none."""
    for number in reversed(version_numbers(model) if model.is_dir() else []):
        with suppress(ValueError):
            return model / str(number), read_version(model / str(number))
    return None


def _next_number(model: Path) -> int:
    return max(version_numbers(model), default=0) + 1


@contextmanager
def _aside(model: Path, number: int) -> Iterator[Path]:
    """Make a folder beside the versions, locked by this process; remove it if the block does not move it."""
    folder = model / f".{number}-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _publish(aside: Path, model: Path) -> Path:
    """Rename a folder to the next version: whoever renames first has the number."""
    while True:
        version = model / str(_next_number(model))
        try:
            os.rename(aside, version)
        except OSError:
            if not version.exists():
                raise
        else:
            sync(model)
            return version


def _check_same_signature(model: Path, description: ModelDescription) -> None:
    newest = newest_version(model)
    if newest is None:
        return
    folder, before = newest
    for side, ours, theirs in (
        ("inputs", description.inputs, before.inputs),
        ("outputs", description.outputs, before.outputs),
    ):
        if ours != theirs:
            listed = [
                ", ".join(f"{spec.name} {spec.datatype} {spec.shape}" for spec in specs) for specs in (ours, theirs)
            ]
            raise ValueError(
                f"the model has the {side} {listed[0]}, and {folder} has {listed[1]}: its clients would fail\n"
                "  choose another --name"
            )


def _write_model_files(model: Path, description: ModelDescription) -> None:
    """Write what is the same for all versions, if it is not there yet."""
    texts: dict[str, str] = {}
    if labelled_output(description):
        texts[LABELS] = labels_txt(description)
    if ONNX in description.sha256:
        texts[TRITON_CONFIG] = config_pbtxt(model.name, description, LABELS)
    for file, text in texts.items():
        if not (model / file).is_file() or (model / file).read_text() != text:
            write_text(model / file, text)


def _sync_all(folder: Path) -> None:
    """Have a folder and all that is in it on the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def _remove(model: Path, number: int) -> None:
    """Remove a version, of which no half is ever seen."""
    removed = model / f".{number}-{uuid.uuid4().hex[:8]}"
    with suppress(FileNotFoundError):  # another exporter was first
        os.rename(model / str(number), removed)
        shutil.rmtree(removed)


def _remove_leftovers(model: Path) -> None:
    """Remove what exporters that were killed have left: folders that nobody has locked."""
    for folder in [path for path in model.iterdir() if ASIDE.fullmatch(path.name)]:
        with suppress(OSError):  # its exporter lives, or has removed it
            if time.time() - folder.stat().st_mtime < LEFT_AFTER_SECONDS:
                continue
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(descriptor)
