"""Metrics of a round and of an evaluation, from sums over all ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.algorithms.client_result import ClientResult, client_result_from_state, merge_client_results
from trainer.algorithms.round import Round
from trainer.loggers import Metrics, higher_is_better
from trainer.loop.exchange import LEFT_OUT, RANKS
from trainer.loop.monitor import COORDINATOR, client_scores
from trainer.loop.pooled_sums import totals
from trainer.loop.run import Run
from trainer.models.buffers import BufferStatistics
from trainer.utils.hardware import peak_memory_bytes

CLIENT_COLUMNS = ("loss_sum", "units", "delta_norm")
SILO_COLUMNS = ("data", "compute")


class RoundAccumulator:
    """Sums a round on one rank. Numbers that are equal on a silo's replicas are counted by its leader alone.

    Attributes:
        weight: of the clients that were counted.
        results: of the clients that have finished.
        norms: of their updates; None of a late client that is dropped, not finite of one that is left out.
        not_started: clients for which there was no time.
        statistics: weighted sums of the batch statistics.
        counts: the largest integer buffers.
    """

    def __init__(self, run: Run, round: Round, buffers: BufferStatistics):
        self.run, self.round, self.buffers = run, round, buffers
        self.weight = 0.0
        self.results: list[ClientResult] = []
        self.norms: list[float | None] = []
        self.not_started = 0
        self.statistics = torch.zeros_like(buffers.vector())
        self.counts = buffers.counts()

    def add(self, result: ClientResult, delta_norm: float | None) -> None:
        """Count a client; its batch statistics are pooled by n_k, and over the ranks of the silo.

        Args:
            result: what the client did.
            delta_norm: the norm of its update; None if it was late and is dropped, not finite if it is left out.
        """
        self.results.append(result)
        self.norms.append(delta_norm)
        if _counts(delta_norm):
            self.weight += result.weight
            if self.buffers.has_buffers:
                self.statistics += self.buffers.vector() * (result.weight / self.run.topology.silo_size)
                self.counts = torch.maximum(self.counts, self.buffers.counts())

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a tree."""
        works = {str(place): result.state_dict() for place, result in enumerate(self.results)}
        sums = {"weight": self.weight, "norms": json.dumps(self.norms)}
        return {"works": works, **sums, "statistics": self.statistics, "counts": self.counts}

    def load_state_dicts(self, states: Sequence[dict[str, Any]], replica: int) -> None:
        """Restore the `state_dict` of this replica, or its part of those of another number of replicas."""
        one, alone = states[0], len(states) == 1
        self.weight, self.norms = one["weight"], json.loads(one["norms"])
        for place in range(len(self.norms)):
            works = [client_result_from_state(state["works"][str(place)]) for state in states]
            self.results.append(works[0] if alone else merge_client_results(works, replica))
        sums = torch.stack([state["statistics"] for state in states]).sum(0)
        self.statistics = sums if alone or replica == 0 else torch.zeros_like(sums)
        self.counts = torch.stack([state["counts"] for state in states]).amax(0)

    def seconds(self) -> Metrics:
        """Return the seconds of this rank by what they were spent on."""
        return {
            "seconds/data": sum(work.seconds_data for work in self.results),
            "seconds/compute": sum(work.seconds_compute for work in self.results),
        }

    def scalars(self) -> dict[str, float]:
        """Return numbers whose sums over all ranks describe the round."""
        counted = [work for work, norm in zip(self.results, self.norms, strict=True) if _counts(norm)]
        on_time = [work for work in counted if not work.timed_out]  # late ones had no last step
        own = {
            "loss_sum": sum(work.loss_sum for work in counted),
            "units": sum(work.units for work in counted),
            "units_seen": sum(work.units for work in self.results),
        }
        equal_in_silo = {
            "trained_weight": self.weight,
            "steps": sum(work.steps for work in self.results),
            "examples_seen": sum(work.examples_seen for work in self.results),
            "clients": len(self.results),
            "counted": len(counted),
            "on_time": len(on_time),
            "gradient_norms": sum(float(work.gradient_norm) for work in on_time),
            "learning_rates": sum(work.learning_rate for work in counted),
            LEFT_OUT: sum(norm is not None and not math.isfinite(norm) for norm in self.norms),
            "late": sum(work.timed_out for work in self.results) + self.not_started,
        }
        return own | (equal_in_silo if self.run.topology.is_leader else dict.fromkeys(equal_in_silo, 0.0))

    def tables(self) -> dict[str, Tensor]:
        """Return float64 tables whose sums over all ranks describe the round: by silo, client and rank, statistics."""
        by_row = {"silos": self._silo_table(), "cohort": self._client_table(), RANKS + "memory": self._memory_table()}
        return by_row | {"statistics": self.statistics, "counts": self._counts_table()}

    def _silo_table(self) -> Tensor:
        """Return seconds [silos, data and compute], zero except in this silo's row."""
        table = torch.zeros(self.run.topology.num_silos, len(SILO_COLUMNS), dtype=torch.float64)
        if self.run.topology.is_leader:
            table[self.run.topology.silo] = torch.tensor(list(self.seconds().values()))
        return table

    def _counts_table(self) -> Tensor:
        """Return the largest integer buffers [silos, m], zero except in this silo's row: a sum has all of them."""
        table = torch.zeros(self.run.topology.num_silos, len(self.counts), dtype=torch.float64)
        if self.run.topology.is_leader:
            table[self.run.topology.silo] = self.counts
        return table

    def _memory_table(self) -> Tensor:
        """Return the peak memory in bytes [ranks], zero except for this rank."""
        table = torch.zeros(self.run.topology.world_size, dtype=torch.float64)
        table[self.run.topology.rank] = peak_memory_bytes(self.run.topology.device)
        return table

    def _client_table(self) -> Tensor:
        """Return the reported columns of each client of the round [clients, columns]; empty if none are reported."""
        rows = (
            {client: [0.0] * len(CLIENT_COLUMNS) for client in self.round.cohort} if reports_clients(self.run) else {}
        )
        for work, norm in zip(self.results, self.norms, strict=True):
            if rows:
                rows[work.client] = [work.loss_sum, work.units, (norm or 0.0) if self.run.topology.is_leader else 0.0]
        return torch.tensor(list(rows.values()), dtype=torch.float64).view(len(rows), len(CLIENT_COLUMNS))


def reports_clients(run: Run) -> bool:
    """Return whether a round has metrics of single clients: there are several, and the run does not hide them."""
    return run.metrics.per_client != "none" and len(run.training_sets) > 1


def _counts(delta_norm: float | None) -> bool:
    return delta_norm is not None and math.isfinite(delta_norm)


def round_metrics(run: Run, round: Round, sums: dict[str, float], tables: dict[str, Tensor]) -> Metrics:
    """Return the metrics of a round's training from the sums over all ranks."""
    metrics: Metrics = {
        "round/examples": int(sums["examples_seen"]),
        "round/steps": int(sums["steps"]),
        "round/units": int(sums["units_seen"]),
        "train/loss": _ratio(sums["loss_sum"], sums["units"]),
        "train/grad_norm": _ratio(sums["gradient_norms"], sums["on_time"]),
        "train/learning_rate": _ratio(sums["learning_rates"], sums["counted"]),
        "clients/trained": int(sums["clients"]),
        "clients/nonfinite": int(sums[LEFT_OUT]),
        "clients/stragglers": int(sums["late"]),
        "memory/peak_bytes": tables[RANKS + "memory"].max().item(),
    }
    if run.metrics.per_client != "none":  # a silo may be a client
        metrics |= slowest_silo(tables["silos"])
    for client, row in zip(round.cohort, tables["cohort"].tolist(), strict=False):
        loss_sum, units, norm = row
        metrics[f"client/{client}/train_loss"] = _ratio(loss_sum, units)
        if run.algorithm.skips_nonfinite_clients:  # the others measure no updates
            metrics[f"client/{client}/delta_norm"] = norm
    return metrics


def evaluation_metrics(run: Run, name: str, sums: Mapping[str, Tensor]) -> Metrics:
    """Return the metrics of an evaluation, pooled over clients and per client.

    Args:
        run: the run.
        name: the prefix of the metrics, such as `test`.
        sums: `clients` is a table [clients, 1 + score sums], the units first; `by_client` has the scores of single
            clients that are made from pooled sums [clients, client_scores]; the others are those of `PooledSums`.
    """
    table, scores = sums["clients"], sums["by_client"]
    pooled = totals({key: part for key, part in sums.items() if key not in ("clients", "by_client")})
    pooled_metrics = run.task.summary(table[:, 1:].sum(0), table[:, 0].sum().item()) | run.task.pooled_summary(pooled)
    metrics = {f"{name}/{key}": value for key, value in pooled_metrics.items()}
    if name == COORDINATOR or not client_scores(run):
        return metrics
    tested = [client for client, row in enumerate(table) if row[0] > 0]
    summaries = [
        dict(zip(run.metrics.client_scores, scores[client].tolist(), strict=True))
        | run.task.summary(table[client, 1:], table[client, 0].item())
        for client in tested
    ]
    group = "clients" if name == "test" else name
    for score in client_scores(run):
        values = [summary[score] for summary in summaries]
        if name != "validation":
            metrics |= {f"client/{client}/{name}_{score}": value for client, value in zip(tested, values, strict=True)}
        metrics |= _spread(group, score, np.array(values))
    values = np.array([summary[run.task.headline] for summary in summaries])
    return metrics | ({f"{group}/jain": _jain(values)} if len(values) else {})


def _spread(group: str, score: str, values: np.ndarray) -> Metrics:
    """Return the worst value of the clients, and their standard deviation. A client without the score is left out."""
    values = values[~np.isnan(values)]
    if not len(values):
        return {}
    worst = float(values.min() if higher_is_better(score) else values.max())
    return {f"{group}/worst_{score}": worst, f"{group}/{score}_std": float(values.std())}


def _jain(values: np.ndarray) -> float:
    """Return the index of Jain et al. 1984: (sum x)^2 / (K sum x^2), from 1/K if one has everything, to 1 if all do."""
    squares = float(np.square(values).sum())
    return float(values.sum()) ** 2 / (len(values) * squares) if squares else 1.0


def slowest_silo(silos: Tensor) -> Metrics:
    """Return the silo for which the others waited, and its seconds; nothing if there is one silo.

    Args:
        silos: seconds [silos, data and compute].
    """
    if len(silos) < 2:
        return {}
    slowest = int(silos.sum(1).argmax())
    return {"slowest/silo": slowest} | {
        f"slowest/{name}": seconds for name, seconds in zip(SILO_COLUMNS, silos[slowest].tolist(), strict=True)
    }


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
