"""How a run has prepared its examples: what a model must know of them to be given others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from trainer.checkpoint.run_dir import RunDir
from trainer.data import DataSplits, TableEncoder
from trainer.data.sources.signature import DataSignature
from trainer.utils.text import format_value


@dataclass(frozen=True)
class Preprocessing:
    """Statistics of a run's training examples, and the names of their labels.

    Attributes:
        transforms: the statistics of its transforms, by `Compose.state_dict`.
        encoder: of the columns of its table; None if it had none.
        label_names: names of the classes, by label; empty if they had none.
    """

    transforms: Mapping[str, Tensor] = field(default_factory=dict)
    encoder: TableEncoder | None = None
    label_names: tuple[str, ...] = ()

    @staticmethod
    def of_run(folder: RunDir) -> Preprocessing:
        """Read it from a run folder; raise ValueError if a file is damaged."""
        encoder = TableEncoder.load(folder.columns) if folder.columns.exists() else None
        signature = folder.signature()
        names = DataSignature.from_json(signature).label_names if signature else ()
        return Preprocessing(folder.transforms(), encoder, tuple(names))

    def check_labels(self, splits: DataSplits) -> None:
        """Raise ValueError if labels of a data set mean other classes."""
        if self.label_names and splits.label_names and splits.label_names != self.label_names:
            raise ValueError(
                f"data= has the classes {format_value(list(splits.label_names))}, and the model was trained on "
                f"{format_value(list(self.label_names))}.\n  give it examples of all its classes, and of no others"
            )
