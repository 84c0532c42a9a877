"""A version of an exported model, with what its run says of its examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.data import TableEncoder
from trainer.service.version import COLUMNS, CONFIG, DESCRIPTION, ModelDescription, read_version, version_numbers


@dataclass(frozen=True)
class Version:
    """An exported version.

    Attributes:
        folder: of its files.
        description: of the model.
        data: the configuration of the data that it was trained on; empty if it is not known.
        encoder: of the columns of a table; None if it takes none.
    """

    folder: Path
    description: ModelDescription
    data: Mapping[str, Any]
    encoder: TableEncoder | None

    @staticmethod
    def read(folder: Path) -> Version:
        """Read a version.

        Raises:
            ValueError: it is no whole version.
        """
        description = read_version(folder)
        config, columns = folder / CONFIG, folder / COLUMNS
        settings = yaml.safe_load(config.read_bytes()) if config.name in description.sha256 else {}
        encoder = TableEncoder.load(columns) if columns.name in description.sha256 else None
        return Version(folder, description, settings.get("data", {}), encoder)


def find_version(path: Path) -> Path | None:
    """Return the folder of a version that a path names, or that of the newest version of a model; None for neither."""
    if (path / DESCRIPTION).is_file():
        return path
    numbers = version_numbers(path) if path.is_dir() else []
    return path / str(numbers[-1]) if numbers and (path / str(numbers[-1]) / DESCRIPTION).is_file() else None


def open_version(path: Path) -> Version:
    """Return the version of an exported model that a path names; of a model the newest, of a run its best round.

    Raises:
        ValueError: it names none, one that is not whole, or a run that cannot be exported.
    """
    folder = find_version(path) or (_export(path) if (path / CONFIG).is_file() else None)
    if folder is None:
        raise ValueError(
            f"{path} is no exported model\n  valid: MODELS/NAME or MODELS/NAME/VERSION, by export, or a run folder"
        )
    return Version.read(folder)


def _export(run: Path) -> Path | None:
    """Export a finished run into the folder `export` in it, unless that has been done; return the version."""
    try:
        from trainer.commands.export.main import export_run
        from trainer.commands.export.source_run import SourceRun

        return find_version(export_run(run) / SourceRun(run).default_name)
    except ImportError as error:
        raise ValueError(f"export needs the package {error.name}\n  pip install silotrain[export]") from error
