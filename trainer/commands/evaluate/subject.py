"""Subjects of an evaluation: the model of a finished run, an exported version, or weights from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import nn

from trainer.checkpoint.run_dir import RunDir
from trainer.commands.evaluate.engine_model import EngineModel
from trainer.commands.exported_version import Version, find_version
from trainer.config.overrides import literal
from trainer.config.preprocessing import Preprocessing
from trainer.config.saved import reading_overrides
from trainer.config.saved_model import Weights, find_weights, load_weights
from trainer.models.pretrained import find_weights_file
from trainer.service.version import CONFIG

NO_ADAPTER = "trainer.models.no_adapter"

# In place of what a run has trained a model with, and of what is in the graph of an exported one.
OF_NO_TRAINING = (
    *("algorithm=sync", "server=average", "optimizer=sgd", "adapter=none", "update_compression=fp32"),
    *("transforms=[]", "task.output=null", "ema_decay=null", "eval.personal_steps=0", "channels_last=false"),
    *("compile_backend=null", "precision.autocast=null", "silos=1"),
)


class Subject(Protocol):
    """Abstract: a model, and how it is made and fed.

    Attributes:
        title: what it is, for people.
        round: the index of the round that it is of.
    """

    @property
    def title(self) -> str: ...

    @property
    def round(self) -> int: ...

    def overrides(self, typed: Sequence[str]) -> list[str]:
        """Return the overrides of its configuration, with those that are typed at the end."""
        ...

    def preprocessing(self) -> Preprocessing | None:
        """Return how its examples are prepared; None: as the data that are given suggest."""
        ...

    def finish(self, module: nn.Module) -> None:
        """Give a module, made by its configuration, its weights."""
        ...


@dataclass(frozen=True)
class FinishedRun:
    """The model of a finished run."""

    folder: RunDir
    weights: Weights

    @property
    def title(self) -> str:
        return str(find_weights(self.folder, self.weights))

    @property
    def round(self) -> int:
        result = self.folder.result()
        return result["best_round" if self.weights == "best" else "round"] - 1

    def overrides(self, typed: Sequence[str]) -> list[str]:
        # Its weights replace the initial ones, unless these are below an adapter, and pruned ones have their zeros in
        # place; an average of them is a model of its own.
        is_plain = self.folder.settings()["adapter"]["_target_"] == NO_ADAPTER
        of_model = ["ema_decay=null", *(["model.init=null", "++model.prune=null"] if is_plain else [])]
        return reading_overrides(self.folder.config, [*of_model, *typed])

    def preprocessing(self) -> Preprocessing:
        return Preprocessing.of_run(self.folder)

    def finish(self, module: nn.Module) -> None:
        load_weights(module, find_weights(self.folder, self.weights))


@dataclass(frozen=True)
class ExportedVersion:
    """An exported version, which its engine computes: raw inputs go in, and the transforms are in the graph."""

    folder: Path
    round = 0

    @property
    def title(self) -> str:
        return str(self.folder)

    def overrides(self, typed: Sequence[str]) -> list[str]:
        engine = f"model._target_={EngineModel.__module__}.{EngineModel.__name__}"
        of_model = ["model=custom", engine, f"+model.path={literal(str(self.folder))}"]
        return reading_overrides(self.folder / CONFIG, [*OF_NO_TRAINING, *of_model, *typed])

    def preprocessing(self) -> Preprocessing:
        version = Version.read(self.folder)
        return Preprocessing({}, version.encoder, tuple(version.description.label_names))

    def finish(self, module: nn.Module) -> None:
        """Do nothing: it has its weights."""


@dataclass(frozen=True)
class WeightsOfRun:
    """Weights from the file of a typed `model.init`, in the model of a run, which prepares the examples too."""

    folder: RunDir
    round = 0

    @property
    def title(self) -> str:
        return f"model.init, in the model of {self.folder.path}"

    def overrides(self, typed: Sequence[str]) -> list[str]:
        return reading_overrides(self.folder.config, ["ema_decay=null", *typed])

    def preprocessing(self) -> Preprocessing:
        return Preprocessing.of_run(self.folder)

    def finish(self, module: nn.Module) -> None:
        """Do nothing: they are the initial weights."""


@dataclass(frozen=True)
class WeightsFile:
    """Weights from a file, in a model that the overrides describe."""

    path: Path
    round = 0

    @property
    def title(self) -> str:
        return str(self.path)

    def overrides(self, typed: Sequence[str]) -> list[str]:
        return [f"++model.init={literal(str(self.path))}", "ema_decay=null", *typed]

    def preprocessing(self) -> None:
        return None

    def finish(self, module: nn.Module) -> None:
        """Do nothing: they are the initial weights."""


def find_subject(path: Path, weights: Weights, typed: Sequence[str] = ()) -> Subject:
    """Return what a path names.

    Args:
        path: a run folder, a version or a model that was exported, or a file or folder of weights.
        weights: which of a run's.
        typed: overrides of the configuration, of which `model.init` names other weights than those of a run.

    Raises:
        ValueError: it names neither, or the run has not finished.
    """
    if version := find_version(path):
        return ExportedVersion(version)
    if (path / "config.yaml").is_file():
        if any(override.lstrip("+").startswith("model.init=") for override in typed):
            return WeightsOfRun(RunDir(path))
        run = FinishedRun(RunDir(path), weights)
        find_weights(run.folder, weights)
        return run
    if path.is_file() or find_weights_file(path / "model.safetensors"):
        return WeightsFile(path)
    raise ValueError(
        f"{path}: there is no such model\n"
        "  valid: a run folder, an exported MODELS/NAME or MODELS/NAME/VERSION, a file of weights, or a folder with "
        "model.safetensors"
    )
