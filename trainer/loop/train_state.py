"""What of a run changes: the model, the algorithm's and clients' state, how far it has come. All of it is saved."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from trainer.algorithms.round import Round
from trainer.checkpoint import Checkpoints, Disk, Start
from trainer.checkpoint.format import Saved
from trainer.distributed import collectives
from trainer.distributed.compression import Full
from trainer.distributed.topology import slices_of
from trainer.distributed.transport import Wire, wire_of
from trainer.loggers import Metrics
from trainer.loop.control import Contact
from trainer.loop.local_trainer import LocalTrainer
from trainer.loop.personalization import average_personal
from trainer.loop.run import Run
from trainer.loop.stopping import Reason, Window
from trainer.loop.throughput import Speed
from trainer.models.flat import FlatModel, places_of
from trainer.optim.ema import MovingAverage


@dataclass
class Progress:
    """How far the run has come; equal on all ranks.

    metrics     of the last round
    trained     of a round that is trained and combined, but not yet evaluated
    bad_rounds  rounds in a row from which a client was left out
    best        the best validation score so far of a round that was saved
    peak        the best validation score so far
    in_vain     evaluations in a row that brought no better one
    micro_batch_size  the examples that fit, if that was found by trying
    stopped     why the run ends with the last round that was trained, though there may be more
    skipped     windows of batches that are left out
    silos       the replicas in each
    """

    rounds: int = 0
    examples: int = 0
    steps: int = 0
    units: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    metrics: Metrics = field(default_factory=dict)
    trained: Metrics | None = None
    bad_rounds: int = 0
    best: float | None = None
    peak: float | None = None
    in_vain: int = 0
    micro_batch_size: int | None = None
    stopped: Reason | None = None
    skipped: list[Window] = field(default_factory=list)
    silos: list[int] = field(default_factory=list)

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
        self.trained = None
        return self.metrics

    def is_best(self, score: float | None) -> bool:
        """Whether this validation score, of which more is better, is the best so far; notes it if so."""
        if score is None or not math.isfinite(score) or (self.best is not None and score <= self.best):
            return False
        self.best = score
        return True

    def has_ended(self, rounds: int) -> bool:
        """Whether there is no more to train or to evaluate, of so many rounds."""
        return self.rounds >= rounds or (self.stopped is not None and self.trained is None)

    def note(self, score: float) -> None:
        """Counts an evaluation that brought this validation score, of which more is better."""
        is_better = math.isfinite(score) and (self.peak is None or score > self.peak)
        self.peak = score if is_better else self.peak
        self.in_vain = 0 if is_better else self.in_vain + 1

    def result(self) -> dict[str, Any]:
        """What the run is known by: the last round's figures, without single clients, and the rates over all rounds.

        `stopped` is why it ended, if not because its rounds were over.
        """
        hidden = ("client/", "slowest/", "seconds/", "delta/", "round/")
        result = {name: value for name, value in self.metrics.items() if not name.startswith(hidden)}
        done = {"examples_per_second": self.examples, "tokens_per_second": self.units}
        result |= {name: count / max(self.training_seconds, 1e-9) for name, count in done.items() if name in result}
        return result | ({"stopped": self.stopped} if self.stopped else {})


class State:
    """The live objects of a run on this rank. Silos start equal: rank 0's initial model goes to all.

    `wire` takes the place of the run's own, if it is given; `leaving` says whether all ranks know that they were told
    to leave; `average` is that of the weights, if there is one.
    """

    def __init__(self, run: Run, contact: Contact | None = None, wire: Wire | None = None):
        self.run, self.contact = run, contact or Contact()
        self.progress = Progress()
        # Rounds that each client took part in: with it, every rank knows where any client's stream of batches stands.
        self.participations = torch.zeros(len(run.training_sets), dtype=torch.int64)
        module = run.module.to(run.topology.device)
        algorithm = run.algorithm
        self.wire: Wire = wire or wire_of(run.topology, run.update_compression, places_of(module, algorithm.is_shared))
        self.model = FlatModel(module, algorithm.is_shared, algorithm.batchnorm_stats, self.wire.unit)
        for tensor in (*run.module.parameters(), *run.module.buffers()):
            collectives.broadcast(tensor.detach())
        if run.transforms.goes_by_training_set:
            self._measure_training_set()
        self.average = None if run.ema_decay is None else MovingAverage(self.model, run.ema_decay)
        self.algorithm = algorithm.setup(self.model, run.optimizer, run.training_weights, self.wire)
        each_step = self.average if algorithm.moves_global_model else None
        self.trainer = LocalTrainer(run, self.model, self.algorithm, self.contact, each_step)
        self.speed = Speed(run)
        self.local_fingerprint = 0
        self.leaving = False
        self.seconds_waited = 0.0

    def _measure_training_set(self) -> None:
        """For what preprocessing goes by it. A collective, of sums of numbers alone."""
        run, topology = self.run, self.run.topology
        ids = torch.cat([torch.from_numpy(run.clients.train[client]) for client in run.homes[topology.silo]])
        own = ids[topology.replica :: topology.num_replicas]
        run.transforms.measure(run.data.train, own, collectives.total, topology.device)

    def stood_still(self) -> float:
        """The seconds, since this was asked last, in which this rank did nothing but wait for totals of all silos."""
        before, self.seconds_waited = self.seconds_waited, self.wire.seconds_waited
        return self.seconds_waited - before

    def welcome(self, round: Round) -> None:
        """Gives the clients that train for the first time the average of the others' personal tensors. A collective."""
        newcomers = not bool(self.participations[list(round.cohort)].all())
        if newcomers and round.index and self.model.has_personal and self.model.has_shared:
            self.trainer.fresh = average_personal(self.trainer)

    def save(self, checkpoints: Checkpoints, is_best: bool = False) -> None:
        """Begins to write the border between two rounds."""
        rounds, suffix = self.progress.rounds, ""
        if self.progress.trained is not None:
            rounds, suffix = rounds + 1, "-unevaluated"
        everyones = {
            "progress": self.totals(),
            "fresh": self.trainer.fresh,
            "model": self.model.shared_state(),
            "algorithm": self.algorithm.state_dict(),
            **self.averages(),
        }
        slices = {"algorithm": self.algorithm.sharded_state_dict()}
        silos = {"clients": self.clients()}
        name = f"round-{rounds:06d}{suffix}"
        own = {"own": self.own_of_clients(), **self.residuals()}
        all_write = self.run.algorithm.keeps_client_state or self.wire.stateful
        checkpoints.save_border(name, everyones, slices, silos, own, all_write, is_best)

    def clients(self, without: int | None = None) -> dict[str, Any]:
        """What the clients of this silo keep, by client, equal on all its replicas."""
        return {
            str(client): {name: part for name, part in state.items() if name != "own"}
            for client, state in self.trainer.states.items()
            if client != without
        }

    def own_of_clients(self, without: int | None = None) -> dict[str, Any]:
        """What this replica alone keeps of clients, by client: what it has not sent of their gradients."""
        states = self.trainer.states.items()
        return {str(client): state["own"] for client, state in states if client != without and state.get("own")}

    def average_after_round(self) -> None:
        """Takes a round's combination into the average of the weights; that of steps has taken in each of them."""
        if self.average and not self.run.algorithm.moves_global_model:
            self.average.update()

    def averages(self) -> dict[str, Any]:
        """The average of the weights, if there is one, as a section of its own."""
        return {"ema": self.average.state_dict()} if self.average else {}

    def restore_averages(self, saved: Saved) -> None:
        """Puts `averages` back."""
        if self.average:
            self.average.load_state_dict(saved.load("ema"))

    def residuals(self) -> dict[str, Any]:
        """What this rank's wire keeps, by silo, as a section of its own."""
        return {"residuals": {str(self.run.topology.silo): self.wire.state_dict()}}

    def totals(self) -> dict[str, Any]:
        """How far the run has come, and on which data, as a tree."""
        self.progress.silos = list(self.run.topology.silo_sizes)
        return {
            "json": json.dumps(asdict(self.progress)),
            "participations": self.participations,
            "data": self.run.data_fingerprint,
        }

    def restore_totals(self, saved: Saved) -> None:
        """Puts `totals` back."""
        totals = saved.load("progress")
        self.progress = Progress(**json.loads(totals["json"]))
        self.participations.copy_(totals["participations"])
        self.wire.bytes_sent = int((self.progress.trained or self.progress.metrics).get("bytes_between_silos", 0))

    def restore_border(self, saved: Saved) -> None:
        """Puts a border back. Clients' states are read by client: their silos may be others than those that saved."""
        self.restore_totals(saved)
        self.restore_averages(saved)
        self.model.load_shared_state(saved.load("model"))
        self.algorithm.load_state_dict(saved.load("algorithm"))
        self.trainer.fresh = saved.load("fresh")
        self.trainer.statistics = (self.model.statistics.vector(), self.model.statistics.counts())
        topology = self.run.topology
        home = set(self.run.training_homes[topology.silo])

        def is_at_home(leaf: str) -> bool:
            return int(leaf.split("/")[0]) in home

        self.restore_clients(saved.load("clients", is_at_home))
        mine = f"silo-{topology.silo}.replica-{topology.replica}"
        parts = [mine] if self.progress.silos == list(topology.silo_sizes) else saved.parts
        self.restore_own_of_clients([saved.load_of(p, "own", is_at_home) for p in parts if p in saved.parts])
        self.restore_residuals(saved)

    def restore_clients(self, clients: dict[str, Any]) -> None:
        """Puts what clients keep back."""
        self.trainer.states = {int(client): state for client, state in clients.items()}

    def restore_residuals(self, saved: Saved) -> None:
        """Puts what wires kept back, after the totals. Those of silos that there are no more go to the others."""
        topology = self.run.topology
        kept = saved.load("residuals", lambda leaf: int(leaf.split("/")[0]) % topology.num_silos == topology.silo)
        same_world = self.progress.silos == list(topology.silo_sizes)
        self.wire.load_state_dicts(kept.values(), self.algorithm.parts, same_world)

    def restore_own_of_clients(self, owns: Sequence[dict[str, Any]]) -> None:
        """Puts back what this replica alone keeps of the clients; `owns` are those of all if there were others."""
        for client, state in self.trainer.states.items():
            if states := [own[str(client)] for own in owns if str(client) in own]:
                state["own"] = self.trainer.gradients.redistributed(states)


def check_start(run: Run, start: Start | None, disk: Disk) -> None:
    """Raises ValueError when a run would go on with other data than it was begun with, or without clients' states."""
    if start is None:
        return
    saved = start.saved[0].load("progress")
    silos = json.loads(saved["json"])["silos"]
    keeps = run.algorithm.keeps_client_state or not isinstance(run.update_compression, Full)
    divided = keeps or max(slices_of(silos), run.topology.num_slices) > 1
    if divided and not disk.is_shared and silos != list(run.topology.silo_sizes):
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
