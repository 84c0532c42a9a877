"""The transforms of a run folder, with what they have measured of its training examples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from trainer.checkpoint.run_dir import RunDir
from trainer.config.instantiate import instantiate_all
from trainer.config.schema import ComponentConfigs
from trainer.config.targets import check_trusted
from trainer.data.transforms import Compose


def load_transforms(run_dir: str | os.PathLike[str], trust: Sequence[str] = ()) -> Compose:
    """Load the transforms of a run, as its evaluation applies them: `for_evaluation`. No data is read.

    As the data is not there, `classes` is None.

    Args:
        run_dir: the run folder.
        trust: dotted names of classes of your own that may be imported and called, as for `load_model`.

    Raises:
        ValueError: the folder holds no run, names other code, or lacks statistics that the transforms need.
    """
    folder = RunDir(Path(run_dir))
    if not folder.config.is_file():
        raise ValueError(f"{folder.path} is no run folder: it has no config.yaml")
    settings = folder.settings()
    if missing := [name for name in ("transforms", "channels_last") if name not in settings]:
        raise ValueError(f"{folder.path}/config.yaml has no {', '.join(missing)}: it is of another version, or damaged")
    check_trusted({"transforms": settings["transforms"]}, trust, folder.path)
    transforms = make_transforms(settings["transforms"], None, settings["channels_last"])
    return transforms.with_state(folder.transforms())


def make_transforms(components: ComponentConfigs, classes: int | None, channels_last: bool) -> Compose:
    """Make the transforms of a configuration."""
    keys = {name: component["key"] for name, component in components.items() if component.get("key")}
    return Compose(instantiate_all("transforms", components), classes, channels_last, keys)
