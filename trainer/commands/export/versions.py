"""Versions of a run's model: its graph, and all that is beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from trainer.commands.export.source_run import SourceRun, TrainedModel
from trainer.config.build import build_evaluation
from trainer.config.preprocessing import Preprocessing
from trainer.distributed.topology import distributed
from trainer.export.card import CardFacts, model_card
from trainer.export.graph import Graph, trace
from trainer.export.model_folder import check_model_folder, newest_version, write_version
from trainer.export.quantise import Quantisation, quantise
from trainer.export.raw_examples import calibration_batches, evaluation_batches, evaluation_part
from trainer.export.served_model import ServedModel
from trainer.export.version_files import Format, VersionFiles
from trainer.service.version import ONNX, ModelDescription

HEADLINES = ("validation", "test")


@dataclass(frozen=True)
class Exporter:
    """Writes versions of the model of a run.

    Attributes:
        run: the run.
        models: the folder of all models.
        name: of the model.
        formats: in which it is written.
        keep: number of versions that stay; None: all.
        report: is given what is done next.
    """

    run: SourceRun
    models: Path
    name: str
    formats: Collection[Format]
    keep: int | None
    report: Callable[[str], Any]

    def newest_round(self) -> int | None:
        """Return the round of the newest version, if that is of this run; None if it is not, or there is none."""
        newest = newest_version(self.models / self.name)
        provenance = newest[1].provenance if newest else {}
        mine = self.run.identity()
        return provenance["round"] if mine.items() <= provenance.items() else None

    def export(self, trained: TrainedModel, tolerance: float | None = None) -> Path:
        """Write the next version; return its folder.

        Args:
            trained: the model.
            tolerance: of what quantising may cost; None: it is not quantised.

        Raises:
            ValueError: the model cannot be exported, or quantising costs more. Nothing is left behind.
        """
        check_model_folder(self.models, self.name)
        save = getattr(trained.module, "save_pretrained", None)
        if "huggingface" in self.formats and save is None:
            raise ValueError("--format huggingface: the model is not of transformers\n  leave it out")
        run = self.run
        self.report(f"traces {type(trained.module).__name__}")
        graph = trace(ServedModel(trained.module, run.transforms, run.task, run.signature))
        description = self._describe(trained, graph)
        files = VersionFiles(
            self.name,
            graph,
            description,
            self.formats,
            run.texts(),
            save if "huggingface" in self.formats else None,
            None if tolerance is None else lambda folder: self._quantise(folder, graph, tolerance).describe(),
            self.report,
        )

        def fill(folder: Path) -> ModelDescription:
            described = files(folder)
            for name, text in model_card(described, self._facts(trained, folder)).items():
                (folder / name).write_text(text)
            return described

        return write_version(self.models, self.name, fill, self.keep)

    def _describe(self, trained: TrainedModel, graph: Graph) -> ModelDescription:
        run = self.run
        headlines = (run.monitor, *(f"{part}/{run.task.headline}" for part in HEADLINES))
        return ModelDescription(
            inputs=graph.inputs,
            outputs=graph.outputs,
            task=task_name(run.task),
            headline=next((name for name in headlines if name in trained.metrics), ""),
            sha256={},
            label_names=run.signature.label_names,
            metrics=trained.metrics,
            provenance=run.provenance(trained),
        )

    def _quantise(self, folder: Path, graph: Graph, tolerance: float) -> Quantisation:
        """Replace the graph of a version by a quantised one."""
        self.report("quantises it, on training examples")
        names = [spec.name for spec in graph.inputs]
        with distributed(device="cpu") as topology, tempfile.TemporaryDirectory() as aside:
            settings = replace(self.run.config, silos=1)
            run = build_evaluation(settings, topology, Preprocessing.of_run(self.run.folder))
            part, target = evaluation_part(run), Path(aside) / ONNX
            batches = evaluation_batches(run, part, names)
            found = quantise(folder / ONNX, target, calibration_batches(run, names), batches, run.task, part)
            found.check(tolerance)
            (folder / ONNX).write_bytes(target.read_bytes())
        self.report(str(found))
        return found

    def _facts(self, trained: TrainedModel, folder: Path) -> CardFacts:
        run, config = self.run, self.run.config
        clients = config.clients if isinstance(config.clients, int) else 1
        return CardFacts(
            name=self.name,
            version=int(folder.name.lstrip(".").partition("-")[0]),
            architecture=type(trained.module).__name__,
            parameters=count_parameters(trained.module),
            data=config.data["_target_"].rpartition(".")[2],
            examples=run.signature.examples,
            algorithm=config.algorithm["_target_"].rpartition(".")[2],
            silos=run.num_silos,
            clients=clients,
            seed=config.seed,
            round=trained.round,
            rounds=[{name: value for name, value in line.items() if is_shown(name)} for line in run.rounds()],
        )


def task_name(task: object) -> str:
    """Return the class of a task in words."""
    return "".join(f" {each.lower()}" if each.isupper() else each for each in type(task).__name__).strip()


def count_parameters(module: nn.Module) -> int:
    """Return the number of a model's parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def is_shown(name: str) -> bool:
    """Return whether a metric is one of whole sets, and not of single clients."""
    return name == "round" or name.startswith(("train/", "validation/", "test/"))
