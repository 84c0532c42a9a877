"""Small students alone, and taught by a large model: synchronous, and by FedAvg over clients of Dirichlet(0.3).

One teacher, of seed 0, teaches the students of all seeds. Temperature and weight were chosen once for all data sets, by
the mean validation loss of synchronous students of the digits of seeds 10, 11 and 12, and never by the test set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scripts.reproduce.curves import final
from scripts.reproduce.markdown import spread, table
from scripts.reproduce.trials import Series, Trial

WAYS = ("sync", "fedavg")
FEDERATED = ("algorithm=fedavg", "silos=1", "partition=dirichlet", "partition.alpha=0.3")
SETTINGS = ("task.temperature=4", "task.weight=0.7")


@dataclass(frozen=True)
class DistillationTable:
    """The table of a data set.

    Attributes:
        SEEDS: of the students.
        lr: the learning rate of all.
        of_all: overrides of teacher and students.
        of_teacher: those of the teacher alone.
        of_students: those of the students alone.
        of_fedavg: those of the federated students.
        teacher: its description.
        student: likewise.
    """

    SEEDS: tuple[int, ...]
    lr: float
    of_all: tuple[str, ...]
    of_teacher: tuple[str, ...]
    of_students: tuple[str, ...]
    of_fedavg: tuple[str, ...]
    teacher: str
    student: str

    def trials(self, seeds: Sequence[int]) -> list[Trial]:
        """Return the runs of the table, the teacher first."""
        teacher = Trial("teacher", self.lr, 0, (*self.of_all, *self.of_teacher))
        return [teacher, *(student for seed in seeds for student in self._students(seed, teacher.name))]

    def _students(self, seed: int, teacher: str) -> Iterator[Trial]:
        ways = {"sync": ("algorithm=sync",), "fedavg": (*FEDERATED, *self.of_fedavg)}
        for way, overrides in ways.items():
            common = (*self.of_all, *self.of_students, *overrides)
            yield Trial(f"{way}-alone", self.lr, seed, common)
            yield Trial(f"{way}-distilled", self.lr, seed, (*common, *SETTINGS), teacher=teacher)

    def text(self, series: Series) -> str:
        """Return the test accuracies at the end in percent: mean and standard deviation over the seeds."""
        rows = [
            [f"teacher: {self.teacher}", self._accuracy(series, "teacher"), "–"],
            *(
                [f"{self.student}, {kind}", *(self._accuracy(series, f"{way}-{kind}") for way in WAYS)]
                for kind in ("alone", "distilled")
            ),
            ["seeds in which the distilled one is better", *(self._wins(series, way) for way in WAYS)],
        ]
        return table(["test accuracy, %", "synchronous", "FedAvg"], rows)

    def _accuracy(self, series: Series, cell: str) -> str:
        values = _values(series, cell)
        return spread(values) if values else "–"

    def _wins(self, series: Series, way: str) -> str:
        alone, distilled = (_values(series, f"{way}-{kind}") for kind in ("alone", "distilled"))
        if not alone or not distilled:
            return "–"
        return f"{sum(ours > theirs for ours, theirs in zip(distilled, alone, strict=True))} of {len(alone)}"

    def figures(self, series: Series, seeds: Sequence[int]) -> dict[str, list[str]]:
        """Return no pictures."""
        return {}


def _values(series: Series, cell: str) -> list[float]:
    """Return the test accuracies of a cell by seed; none until all its runs have ended."""
    mine = [trial for trial in series.trials if trial.cell == cell]
    if not all(map(series.is_over, mine)):
        return []
    return [final(series.of(trial), "test/accuracy", last=1) for trial in mine]


DIGITS = DistillationTable(
    SEEDS=(0, 1, 2, 3, 4),
    lr=0.05,
    of_all=("data=digits",),
    of_teacher=("rounds=30",),
    of_students=("model.channels=4", "rounds=8"),
    of_fedavg=("clients=4", "round.epochs=5"),
    teacher="`digits_cnn`, 43,050 parameters",
    student="`model.channels=4`, 4,998 parameters",
)


def _of_images(data: str) -> DistillationTable:
    return DistillationTable(
        SEEDS=(0, 1, 2),
        lr=0.05,
        of_all=(f"data={data}", "model=mlp", "rounds=10", "batch_size=64", "optimizer=momentum", "schedule=cosine"),
        of_teacher=("model.hidden=200",),
        of_students=("model.hidden=16",),
        of_fedavg=("clients=10",),
        teacher="the 2NN, 199,210 parameters",
        student="`model.hidden=16`, 13,002 parameters",
    )


MNIST, FASHION = _of_images("mnist"), _of_images("fashion_mnist")
