"""The run that a version is exported from: its model, now or at its end, and what the version says of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from trainer import __version__
from trainer.checkpoint.resume import newest_complete
from trainer.checkpoint.run_dir import FILE_KEYS, RunDir
from trainer.config.build import InitialModel
from trainer.config.instantiate import instantiate
from trainer.config.saved_model import PARTS, Weights, load_model
from trainer.config.saved_transforms import load_transforms
from trainer.config.schema import read_config
from trainer.config.targets import check_run_targets, find_targets
from trainer.data.sources.signature import DataSignature
from trainer.data.transforms import Compose
from trainer.export.library_layout import TOKENIZER_FILES
from trainer.loggers import Metrics, iter_jsonl
from trainer.models.adapters import is_adapted, merge_adapter
from trainer.models.outputs import SelectOutput
from trainer.models.pretrained import find_weights_file, load_pretrained, load_tensors
from trainer.models.pruning import unpruned
from trainer.service.version import COLUMNS, CONFIG
from trainer.tasks import Task

SETS = ("validation/", "test/")  # begin the names of a version's figures
AVERAGED = "ema/"  # of the averaged weights, on the test set
# Of the configuration, what is not in a version: where the run was, how it was started, who watched it.
OWN_KEYS = ("run_dir", "require_shared_run_dir", "resume", "name", "launch", "run", "loggers", "objective")
PATH_KEYS = (*FILE_KEYS, "data.root", "model.init", "model.path")
DATA_PATH, TOKENIZER_PATH = "data.path", "data.tokenizer"
MISSING = "???"  # of Hydra: whoever reads it has to say where the data are
TOKENIZER = "tokenizer"  # the folder of its files in a version


@dataclass(frozen=True)
class TrainedModel:
    """A model of a run.

    Attributes:
        module: on the CPU, in evaluation mode: one tensor or several in, what the task takes out.
        round: after which it is.
        metrics: of that round, on whole sets.
    """

    module: nn.Module
    round: int
    metrics: dict[str, float | None]


class SourceRun:
    """A run folder.

    Args:
        path: of the folder.

    Attributes:
        folder: the run folder.
        settings: its configuration.
        signature: of its examples.
        task: the task.
        transforms: with what they have measured.

    Raises:
        ValueError: there is no run that has begun to train, or it names code that is not the user's.
    """

    def __init__(self, path: Path):
        self.folder = RunDir(path)
        if not self.folder.config.is_file():
            raise ValueError(f"{path} is no run folder: it has no config.yaml\n  valid: the folder of a run")
        self.settings = dict(self.folder.settings())
        parts = {name: self.settings[name] for name in (*PARTS, "transforms", "task") if name in self.settings}
        check_run_targets(parts, self.folder.config)
        self.trust = [*find_targets(parts)]
        self.config = read_config(self.settings)
        signature = self.folder.signature()
        if signature is None:
            raise ValueError(
                f"{path} does not say what its examples are like, which no server could know: its run has not begun to "
                "train, or its inputs are nested\n  train it, or export its model in a program of your own"
            )
        self.signature = DataSignature.from_json(signature)
        self.transforms: Compose = load_transforms(path, self.trust)
        self.task: Task = instantiate("task", self.settings["task"])

    @property
    def monitor(self) -> str:
        """The name of the metric by which the run chooses its best round."""
        return self.config.monitor or f"validation/{self.task.headline}"

    @property
    def default_name(self) -> str:
        """The name of the model, if none is given: that of the run, or of its data."""
        return self.settings["name"] or self.config.data["_target_"].rpartition(".")[2]

    @property
    def preferred_weights(self) -> Weights:
        """The best, if the run has saved them."""
        return "best" if find_weights_file(self.folder.models["best"]) else "last"

    @property
    def num_silos(self) -> int:
        """The number of silos at the end of the run, or now."""
        saved = newest_complete(self.folder.checkpoints)
        return len(json.loads(saved.load("progress")["json"])["silo_sizes"]) if saved else 1

    def finished(self, weights: Weights) -> TrainedModel:
        """Return the model of the finished run; raise ValueError if it has none."""
        module = load_model(self.folder.path, weights, self.trust)
        result = self.folder.result()
        round = result["best_round"] if weights == "best" else result["round"]
        metrics = self._metrics_of_round(round)
        if weights == "ema":
            averaged = {name.removeprefix(AVERAGED): value for name, value in metrics.items() if AVERAGED in name}
            metrics = {f"test/{name}": value for name, value in averaged.items()}
        return TrainedModel(self._served(module), round, _of_sets(metrics))

    def of_file(self, path: Path) -> TrainedModel:
        """Return the model of the run with weights from a file; raise ValueError if they do not fit."""
        module = InitialModel(self._plain_config(), torch.device("cpu"))()
        load_pretrained(module, path)
        return TrainedModel(module.eval(), 0, {})

    def best_so_far(self, known: int | None) -> TrainedModel | None:
        """Return the model of the best round that a running run has saved; None if it is the known one, or none is."""
        best = self.folder.best_so_far()
        if best is None or best[0] == known:
            return None
        round, load = best
        module = InitialModel(self.config, torch.device("cpu"))()
        load_tensors(module, load())
        module = unpruned(module).eval()
        module = merge_adapter(module) if is_adapted(module) else module
        return TrainedModel(module, round, _of_sets(self._metrics_of_round(round)))

    def rounds(self) -> list[Metrics]:
        """Return the metrics of all rounds."""
        return [line for line in iter_jsonl(self.folder.metrics) if "step" not in line]

    def provenance(self, trained: TrainedModel) -> dict[str, Any]:
        """Return where a version comes from, without paths, hosts or names of people."""
        saved = newest_complete(self.folder.checkpoints)
        return {
            **self.identity(),
            "round": trained.round,
            "data_fingerprint": saved.load("progress")["data"] if saved else None,
            "silotrain": __version__,
            "torch": installed("torch"),
        }

    def identity(self) -> dict[str, Any]:
        """Return by what the versions of this run are known. A run may be given more rounds, and stays the same."""
        settings = {name: value for name, value in yaml.safe_load(self.public_config()).items() if name != "rounds"}
        config = hashlib.sha256(yaml.safe_dump(settings).encode()).hexdigest()
        return {"run": self.folder.path.resolve().name, "seed": self.config.seed, "config_sha256": config}

    def texts(self) -> dict[str, str]:
        """Return the files of a version that are the run's: its configuration, its columns, its tokenizer."""
        texts = {CONFIG: self.public_config()}
        if self.folder.columns.exists():
            texts[COLUMNS] = self.folder.columns.read_text()
        if path := self.settings["data"].get("tokenizer"):
            texts |= _tokenizer_files(Path(path).expanduser())
        return texts

    def public_config(self) -> str:
        """Return the configuration without what it says of this machine."""
        public = deepcopy({name: value for name, value in self.settings.items() if name not in OWN_KEYS})
        for key in PATH_KEYS:
            group, _, name = key.partition(".")
            if public.get(group, {}).get(name) is not None:
                public[group][name] = {DATA_PATH: MISSING, TOKENIZER_PATH: TOKENIZER}.get(key)
        return yaml.safe_dump(public, sort_keys=False)

    def _served(self, module: nn.Module) -> nn.Module:
        """Return a loaded model as it is served: with its adapter merged, and the output that the task takes."""
        module = merge_adapter(module) if is_adapted(module) else module
        if (output := self.config.task["output"]) is not None:
            module.register_forward_hook(SelectOutput(output))
        return module

    def _plain_config(self) -> Any:
        """Return the configuration of the dense model without initial weights."""
        model = {name: value for name, value in self.settings["model"].items() if name not in ("init", "prune")}
        return read_config({**self.settings, "model": {**model, "init": None}})

    def _metrics_of_round(self, round: int) -> Metrics:
        return next((line for line in self.rounds() if line["round"] == round), {})


def _of_sets(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: value for name, value in metrics.items() if name.startswith(SETS)}


def _tokenizer_files(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else sorted({file for each in TOKENIZER_FILES for file in path.glob(each)})
    return {f"{TOKENIZER}/{'tokenizer.json' if file == path else file.name}": file.read_text() for file in files}
