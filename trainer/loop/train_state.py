"""What of a run changes: the model, the algorithm's and clients' state, how far it has come. All of it is saved."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from trainer.algorithms.round import Round
from trainer.checkpoint import Checkpointer, ResumePoint, SharedStorage
from trainer.checkpoint.format import SavedState
from trainer.distributed import collectives
from trainer.distributed.compression import Uncompressed
from trainer.distributed.topology import count_shards
from trainer.distributed.transport import Transport, make_transport
from trainer.loggers import Metrics
from trainer.loop.control import LoopControl
from trainer.loop.local_trainer import LocalTrainer
from trainer.loop.personalization import average_personal_parameters
from trainer.loop.run import Run
from trainer.loop.stopping import BatchWindow, StopReason
from trainer.loop.throughput import ThroughputMeter
from trainer.models.flat import FlatModel, parameter_layout
from trainer.optim.ema import ExponentialMovingAverage


@dataclass
class Progress:
    """How far the run has come; equal on all ranks.

    metrics     of the last round
    unevaluated_metrics     of a round that is trained and combined, but not yet evaluated
    nonfinite_rounds  rounds in a row from which a client was left out
    best_saved_score        the best validation score so far of a round that was saved
    best_score        the best validation score so far
    evaluations_without_improvement     evaluations in a row that brought no better one
    micro_batch_size  the examples that fit, if that was found by trying
    stopped     why the run ends with the last round that was trained, though there may be more
    skipped_windows     windows of batches that are left out
    silo_sizes       the replicas in each
    """

    rounds: int = 0
    examples: int = 0
    steps: int = 0
    units: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    metrics: Metrics = field(default_factory=dict)
    unevaluated_metrics: Metrics | None = None
    nonfinite_rounds: int = 0
    best_saved_score: float | None = None
    best_score: float | None = None
    evaluations_without_improvement: int = 0
    micro_batch_size: int | None = None
    stopped: StopReason | None = None
    skipped_windows: list[BatchWindow] = field(default_factory=list)
    silo_sizes: list[int] = field(default_factory=list)

    def advance(self, metrics: Metrics, seconds: float) -> Metrics:
        """Counts one round; its metrics with the totals so far. `seconds` are those of the round and its evaluation."""
        self.rounds += 1
        self.examples += int(metrics["round/examples"])
        self.steps += int(metrics["round/steps"])
        self.units += int(metrics["round/units"])
        self.seconds += seconds
        self.training_seconds += metrics["seconds/round"]
        totals = {"round": self.rounds, "examples": self.examples, "steps": self.steps, "seconds": self.seconds}
        if self.micro_batch_size:
            totals["micro_batch_size"] = self.micro_batch_size
        self.metrics = totals | metrics
        self.unevaluated_metrics = None
        return self.metrics

    def update_best(self, score: float | None) -> bool:
        """Whether this validation score, of which more is better, is the best so far; notes it if so."""
        if (
            score is None
            or not math.isfinite(score)
            or (self.best_saved_score is not None and score <= self.best_saved_score)
        ):
            return False
        self.best_saved_score = score
        return True

    def has_ended(self, rounds: int) -> bool:
        """Whether there is no more to train or to evaluate, of so many rounds."""
        return self.rounds >= rounds or (self.stopped is not None and self.unevaluated_metrics is None)

    def record_score(self, score: float) -> None:
        """Counts an evaluation that brought this validation score, of which more is better."""
        is_better = math.isfinite(score) and (self.best_score is None or score > self.best_score)
        self.best_score = score if is_better else self.best_score
        self.evaluations_without_improvement = 0 if is_better else self.evaluations_without_improvement + 1

    def result(self) -> dict[str, Any]:
        """What the run is known by: the last round's figures, without single clients, and the rates over all rounds.

        `stopped` is why it ended, if not because its rounds were over.
        """
        hidden = ("client/", "slowest/", "seconds/", "delta/", "round/")
        result = {name: value for name, value in self.metrics.items() if not name.startswith(hidden)}
        done = {"examples_per_second": self.examples, "tokens_per_second": self.units}
        result |= {name: count / max(self.training_seconds, 1e-9) for name, count in done.items() if name in result}
        return result | ({"stopped": self.stopped} if self.stopped else {})


class TrainState:
    """The live objects of a run on this rank. Silos start equal: rank 0's initial model goes to all.

    `transport` takes the place of the run's own, if it is given; `is_stopping` says whether all ranks know that they were told
    to leave; `ema` is that of the weights, if there is one.
    """

    def __init__(self, run: Run, control: LoopControl | None = None, transport: Transport | None = None):
        self.run, self.control = run, control or LoopControl()
        self.progress = Progress()
        # Rounds that each client took part in: with it, every rank knows where any client's stream of batches stands.
        self.participations = torch.zeros(len(run.training_sets), dtype=torch.int64)
        module = run.module.to(run.topology.device)
        algorithm = run.algorithm
        self.transport: Transport = transport or make_transport(
            run.topology, run.update_compression, parameter_layout(module, algorithm.is_shared)
        )
        self.model = FlatModel(module, algorithm.is_shared, algorithm.batchnorm_stats, self.transport.alignment)
        for tensor in (*run.module.parameters(), *run.module.buffers()):
            collectives.broadcast(tensor.detach())
        if run.transforms.needs_fitting:
            self._fit_transforms()
        self.ema = None if run.ema_decay is None else ExponentialMovingAverage(self.model, run.ema_decay)
        self.algorithm = algorithm.setup(self.model, run.optimizer, run.training_weights, self.transport)
        each_step = self.ema if algorithm.moves_global_model else None
        self.trainer = LocalTrainer(run, self.model, self.algorithm, self.control, each_step)
        self.throughput = ThroughputMeter(run)
        self.local_fingerprint = 0
        self.is_stopping = False
        self.seconds_waited = 0.0

    def _fit_transforms(self) -> None:
        """For what preprocessing goes by it. A collective, of sums of numbers alone."""
        run, topology = self.run, self.run.topology
        ids = torch.cat([torch.from_numpy(run.clients.train[client]) for client in run.homes[topology.silo]])
        own = ids[topology.replica :: topology.num_replicas]
        run.transforms.fit(run.data.train, own, collectives.all_reduce_sum, topology.device)

    def take_wait_seconds(self) -> float:
        """The seconds, since this was asked last, in which this rank did nothing but wait for totals of all silos."""
        before, self.seconds_waited = self.seconds_waited, self.transport.wait_seconds
        return self.seconds_waited - before

    def init_new_clients(self, round: Round) -> None:
        """Gives the clients that train for the first time the average of the others' personal tensors. A collective."""
        newcomers = not bool(self.participations[list(round.cohort)].all())
        if newcomers and round.index and self.model.has_personal and self.model.has_shared:
            self.trainer.initial_personal_state = average_personal_parameters(self.trainer)

    def save(self, checkpointer: Checkpointer, is_best: bool = False) -> None:
        """Begins to write the border between two rounds."""
        rounds, suffix = self.progress.rounds, ""
        if self.progress.unevaluated_metrics is not None:
            rounds, suffix = rounds + 1, "-unevaluated"
        everyones = {
            "progress": self.progress_section(),
            "fresh": self.trainer.initial_personal_state,
            "model": self.model.shared_state(),
            "algorithm": self.algorithm.state_dict(),
            **self.ema_section(),
        }
        slices = {"algorithm": self.algorithm.sharded_state_dict()}
        silos = {"clients": self.client_states()}
        name = f"round-{rounds:06d}{suffix}"
        own = {"own": self.rank_client_states(), **self.transport_section()}
        all_write = self.run.algorithm.keeps_client_state or self.transport.stateful
        checkpointer.save_round(name, everyones, slices, silos, own, all_write, is_best)

    def client_states(self, without: int | None = None) -> dict[str, Any]:
        """What the clients of this silo keep, by client, equal on all its replicas."""
        return {
            str(client): {name: part for name, part in state.items() if name != "own"}
            for client, state in self.trainer.client_states.items()
            if client != without
        }

    def rank_client_states(self, without: int | None = None) -> dict[str, Any]:
        """What this replica alone keeps of clients, by client: what it has not sent of their gradients."""
        states = self.trainer.client_states.items()
        return {str(client): state["own"] for client, state in states if client != without and state.get("own")}

    def update_ema_after_round(self) -> None:
        """Takes a round's combination into the average of the weights; that of steps has taken in each of them."""
        if self.ema and not self.run.algorithm.moves_global_model:
            self.ema.update()

    def ema_section(self) -> dict[str, Any]:
        """The average of the weights, if there is one, as a section of its own."""
        return {"ema": self.ema.state_dict()} if self.ema else {}

    def restore_ema(self, saved: SavedState) -> None:
        """Puts `averages` back."""
        if self.ema:
            self.ema.load_state_dict(saved.load("ema"))

    def transport_section(self) -> dict[str, Any]:
        """What this rank's wire keeps, by silo, as a section of its own."""
        return {"residuals": {str(self.run.topology.silo): self.transport.state_dict()}}

    def progress_section(self) -> dict[str, Any]:
        """How far the run has come, and on which data, as a tree."""
        self.progress.silo_sizes = list(self.run.topology.silo_sizes)
        return {
            "json": json.dumps(asdict(self.progress)),
            "participations": self.participations,
            "data": self.run.data_fingerprint,
        }

    def restore_progress(self, saved: SavedState) -> None:
        """Puts `totals` back."""
        totals = saved.load("progress")
        self.progress = Progress(**json.loads(totals["json"]))
        self.participations.copy_(totals["participations"])
        self.transport.bytes_sent = int(
            (self.progress.unevaluated_metrics or self.progress.metrics).get("bytes_between_silos", 0)
        )

    def restore_round_checkpoint(self, saved: SavedState) -> None:
        """Puts a border back. Clients' states are read by client: their silos may be others than those that saved."""
        self.restore_progress(saved)
        self.restore_ema(saved)
        self.model.load_shared_state(saved.load("model"))
        self.algorithm.load_state_dict(saved.load("algorithm"))
        self.trainer.initial_personal_state = saved.load("fresh")
        self.trainer.statistics = (self.model.statistics.vector(), self.model.statistics.counts())
        topology = self.run.topology
        home = set(self.run.training_homes[topology.silo])

        def is_at_home(leaf: str) -> bool:
            return int(leaf.split("/")[0]) in home

        self.restore_client_states(saved.load("clients", is_at_home))
        mine = f"silo-{topology.silo}.replica-{topology.replica}"
        parts = [mine] if self.progress.silo_sizes == list(topology.silo_sizes) else saved.shards
        self.restore_rank_client_states([saved.load_shard(p, "own", is_at_home) for p in parts if p in saved.shards])
        self.restore_transport(saved)

    def restore_client_states(self, clients: dict[str, Any]) -> None:
        """Puts what clients keep back."""
        self.trainer.client_states = {int(client): state for client, state in clients.items()}

    def restore_transport(self, saved: SavedState) -> None:
        """Puts what wires kept back, after the totals. Those of silos that there are no more go to the others."""
        topology = self.run.topology
        kept = saved.load("residuals", lambda leaf: int(leaf.split("/")[0]) % topology.num_silos == topology.silo)
        same_world = self.progress.silo_sizes == list(topology.silo_sizes)
        self.transport.load_state_dicts(kept.values(), self.algorithm.parts, same_world)

    def restore_rank_client_states(self, rank_states: Sequence[dict[str, Any]]) -> None:
        """Puts back what this replica alone keeps of the clients; `rank_states` are those of all if there were others."""
        for client, state in self.trainer.client_states.items():
            if states := [own[str(client)] for own in rank_states if str(client) in own]:
                state["own"] = self.trainer.gradient_reducer.reshard(states)


def validate_resume(run: Run, resume_point: ResumePoint | None, storage: SharedStorage) -> None:
    """Raises ValueError when a run would go on with other data than it was begun with, or without clients' states."""
    if resume_point is None:
        return
    saved = resume_point.states[0].load("progress")
    silos = json.loads(saved["json"])["silos"]
    keeps = run.algorithm.keeps_client_state or not isinstance(run.update_compression, Uncompressed)
    divided = keeps or max(count_shards(silos), run.topology.num_shards) > 1
    if divided and not storage.is_shared and silos != list(run.topology.silo_sizes):
        raise ValueError(
            f"algorithm={type(run.algorithm).__name__} with update_compression={run.update_compression.name} has left "
            "states on the disks of the nodes that trained:\n"
            f"replicas in the silos were {silos}, and are {list(run.topology.silo_sizes)}.\n"
            "  start it on the same nodes, or put run_dir on a disk that all of them share"
        )
    if saved["data"] != run.data_fingerprint:
        raise ValueError(
            "data= or partition= is not what this run was begun with: the examples or their clients have changed.\n"
            "  restore the data, or choose another run_dir"
        )
