"""From sums to figures: what a round says of itself, on the console, in metrics.jsonl and in TensorBoard alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.cohort import Round
from trainer.flat import Statistics
from trainer.local import Work
from trainer.metrics import Metrics
from trainer.run import Run

CLIENT_COLUMNS = ("loss_sum", "units", "delta_norm")
SILO_COLUMNS = ("data", "compute")


class Tally:
    """One rank's sums of a round. What is equal on the replicas of a silo is counted by its leader alone."""

    def __init__(self, run: Run, round: Round, buffers: Statistics):
        self.run, self.round, self.buffers = run, round, buffers
        self.examples = 0.0
        self.works: list[Work] = []
        self.norms: list[float] = []
        self.statistics = torch.zeros_like(buffers.vector())
        self.counts = buffers.counts()

    def add(self, work: Work, delta_norm: float) -> None:
        """Counts a client's work; BatchNorm statistics are pooled by n_k, and over the replicas of the silo."""
        self.works.append(work)
        self.norms.append(delta_norm)
        if math.isfinite(delta_norm):
            self.examples += work.examples
            self.statistics += self.buffers.vector() * (work.examples / self.run.topology.num_replicas)
            self.counts = torch.maximum(self.counts, self.buffers.counts())

    def seconds(self) -> Metrics:
        """What this rank spent its time on."""
        return {
            "seconds/data": sum(work.seconds_data for work in self.works),
            "seconds/compute": sum(work.seconds_compute for work in self.works),
        }

    def header(self, algorithm: dict[str, float]) -> dict[str, Tensor]:
        """Float64 tensors whose sums over the world describe the round."""
        once = float(self.run.topology.is_leader)
        scalars = {
            **algorithm,
            "examples": self.examples,
            "steps": sum(work.steps for work in self.works),
            "examples_seen": sum(work.examples_seen for work in self.works),
            "clients": len(self.works),
            "gradient_norms": sum(float(work.gradient_norm) for work in self.works),
            "learning_rates": sum(work.learning_rate for work in self.works),
            "left_out": sum(not math.isfinite(norm) for norm in self.norms),
        }
        header = {name: torch.tensor(value * once, dtype=torch.float64) for name, value in scalars.items()}
        counted = [work for work, norm in zip(self.works, self.norms, strict=True) if math.isfinite(norm)]
        header["loss_sum"] = torch.tensor(sum(work.loss_sum for work in counted), dtype=torch.float64)
        header["units"] = torch.tensor(sum(work.units for work in counted), dtype=torch.float64)
        header["silos"] = self._silo_table(once)
        header["cohort"] = self._client_table(once)
        header["statistics"] = self.statistics
        return header

    def _silo_table(self, once: float) -> Tensor:
        """Seconds [silos, data and compute]; this silo's row, zeros elsewhere."""
        table = torch.zeros(self.run.topology.num_silos, len(SILO_COLUMNS), dtype=torch.float64)
        for work in self.works:
            table[self.run.topology.silo] += once * torch.tensor([work.seconds_data, work.seconds_compute])
        return table

    def _client_table(self, once: float) -> Tensor:
        """What is reported of each client of the cohort [clients, columns]; empty if nothing is."""
        rows = len(self.round.cohort) if reports_clients(self.run) else 0
        table = torch.zeros(rows, len(CLIENT_COLUMNS), dtype=torch.float64)
        for work, norm in zip(self.works, self.norms, strict=True):
            if rows:
                row = self.round.cohort.index(work.client)
                table[row] = torch.tensor([work.loss_sum, work.units, once * norm])
        return table


def reports_clients(run: Run) -> bool:
    """Whether rounds speak of single clients: there are several, trained apart, and the run does not hide them."""
    return run.per_client != "none" and len(run.training_sets) > 1


def round_metrics(run: Run, round: Round, totals: dict[str, Tensor], update_norm: float) -> Metrics:
    """The figures of a round's training from the world's sums. `update_norm` is that of the combined delta."""
    clients = totals["clients"].item() or math.nan
    metrics: Metrics = {
        "round/examples": int(totals["examples_seen"]),
        "round/steps": int(totals["steps"]),
        "train/loss": _ratio(totals["loss_sum"].item(), totals["units"].item()),
        "train/gradient_norm": totals["gradient_norms"].item() / clients,
        "train/learning_rate": totals["learning_rates"].item() / clients,
        "clients/trained": int(totals["clients"]),
        "clients/left_out": int(totals["left_out"]),
    }
    metrics |= slowest_silo(totals["silos"])
    if "weighted_norms" in totals:
        metrics["delta/norm"] = update_norm
        metrics["delta/cosine"] = mean_cosine(totals, update_norm)
    for client, row in zip(round.cohort, totals["cohort"].tolist(), strict=False):
        loss_sum, units, norm = row
        metrics[f"client/{client}/train_loss"] = _ratio(loss_sum, units)
        metrics[f"client/{client}/delta_norm"] = norm
    return metrics


def mean_cosine(totals: dict[str, Tensor], update_norm: float) -> float:
    """The mean cosine between pairs of clients' deltas, weighted by w_i |d_i| w_j |d_j|; NaN for a single client.

    (|sum w_i d_i|^2 - sum w_i^2 |d_i|^2) / ((sum w_i |d_i|)^2 - sum w_i^2 |d_i|^2): three sums of scalars and one norm,
    so no client's delta is sent anywhere.
    """
    weight = totals["weight"].item()
    if not weight:
        return math.nan
    squares = totals["squared_weighted_norms"].item() / weight**2
    pairs = (totals["weighted_norms"].item() / weight) ** 2 - squares
    # A single client leaves the rounding of 0 / 0.
    return (update_norm**2 - squares) / pairs if pairs > 1e-9 * squares else math.nan


def evaluation_metrics(run: Run, name: str, table: Tensor) -> Metrics:
    """The figures of an evaluation, pooled over clients and per client, from sums [clients, units, loss, scores]."""
    figures = run.task.summary(table[:, 1:].sum(0), table[:, 0].sum().item())
    metrics = {f"{name}/{key}": value for key, value in figures.items()}
    if name != "test" or run.per_client == "none" or len(table) < 2:
        return metrics
    headline = run.task.headline
    judged = {}
    for client, row in enumerate(table):
        if row[0] > 0:
            judged[client] = run.task.summary(row[1:], row[0].item())[headline]
            metrics[f"client/{client}/test_{headline}"] = judged[client]
    if judged:
        worst = min if headline == "accuracy" else max
        metrics[f"clients/worst_{headline}"] = worst(judged.values())
    return metrics


def slowest_silo(silos: Tensor) -> Metrics:
    """Which silo the others waited for, and what it spent its time on; nothing when there is only one.

    `silos` holds seconds [silos, data and compute].
    """
    if len(silos) < 2:
        return {}
    slowest = int(silos.sum(1).argmax())
    return {"slowest/silo": slowest} | {
        f"slowest/{name}": seconds for name, seconds in zip(SILO_COLUMNS, silos[slowest].tolist(), strict=True)
    }


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
