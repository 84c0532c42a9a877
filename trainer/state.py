"""What of a run changes: the model, the algorithm's and clients' state, how far it has come. All of it is saved."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from trainer import comm
from trainer.checkpoint import Checkpoints, Saved
from trainer.flat import FlatModel
from trainer.local import LocalTrainer
from trainer.metrics import Metrics
from trainer.run import Run
from trainer.wires import Plain


@dataclass
class Progress:
    """How far the run has come; equal on all ranks."""

    rounds: int = 0
    examples: int = 0
    steps: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    metrics: Metrics = field(default_factory=dict)

    def advance(self, metrics: Metrics, seconds: float) -> Metrics:
        """Counts one round; its metrics with the totals so far. `seconds` are those of the round and its evaluation."""
        self.rounds += 1
        self.examples += int(metrics["round/examples"])
        self.steps += int(metrics["round/steps"])
        self.seconds += seconds
        self.training_seconds += metrics["seconds/round"]
        totals = {"round": self.rounds, "examples": self.examples, "steps": self.steps, "seconds": self.seconds}
        self.metrics = totals | metrics
        return self.metrics

    def result(self) -> Metrics:
        """What the run is known by: the last round's figures, without single clients, and the rate over all rounds."""
        hidden = ("client/", "slowest/", "seconds/", "delta/", "round/")
        result = {name: value for name, value in self.metrics.items() if not name.startswith(hidden)}
        return result | {"examples_per_second": self.examples / max(self.training_seconds, 1e-9)}


class State:
    """The live objects of a run on this rank. Silos start equal: rank 0's initial model goes to all."""

    def __init__(self, run: Run):
        self.run = run
        self.progress = Progress()
        # Rounds that each client took part in: with it, every rank knows where any client's stream of batches stands.
        self.participations = torch.zeros(len(run.training_sets), dtype=torch.int64)
        self.model = FlatModel(run.module.to(run.topology.device), run.algorithm.is_shared)
        for tensor in (*run.module.parameters(), *run.module.buffers()):
            comm.broadcast(tensor.detach())
        run.algorithm.setup(self.model)
        self.trainer = LocalTrainer(run, self.model)
        self.wire = Plain(run.topology)
        self.local_fingerprint = 0

    def save(self, checkpoints: Checkpoints) -> None:
        """Writes the border between two rounds. Rank 0 writes what all share, each leader its silo's clients."""
        topology = self.run.topology
        sections: dict[str, Any] = {}
        if topology.rank == 0:
            sections["model"] = self.model.shared_state()
            sections["algorithm"] = self.run.algorithm.state_dict()
            sections["progress"] = {"json": json.dumps(asdict(self.progress)), "participations": self.participations}
        if topology.is_leader:
            clients = {str(client): state for client, state in self.trainer.states.items()}
            sections[f"silo-{topology.silo}"] = {"has_stepped": self.trainer.has_stepped, "clients": clients}
        checkpoints.save(f"round-{self.progress.rounds:06d}", sections)

    def restore(self, saved: Saved) -> None:
        """Puts a border back. Clients' states are read by client: their silos may be others than those that saved."""
        self.model.load_shared_state(saved.load("model"))
        self.run.algorithm.load_state_dict(saved.load("algorithm"))
        progress = saved.load("progress")
        self.participations.copy_(progress["participations"])
        self.progress = Progress(**json.loads(progress["json"]))
        self.wire.bytes_sent = int(self.progress.metrics["bytes_between_silos"])
        self.trainer.statistics = (self.model.statistics.vector(), self.model.statistics.counts())
        self._restore_clients(saved)

    def _restore_clients(self, saved: Saved) -> None:
        home = {0} if self.run.algorithm.pools_data else set(self.run.homes[self.run.topology.silo])
        for name in saved.sections("silo-"):
            section = saved.load(name, lambda leaf: not leaf.startswith("clients/") or int(leaf.split("/")[1]) in home)
            self.trainer.states |= {int(client): state for client, state in section.get("clients", {}).items()}
            if name == f"silo-{self.run.topology.silo}" and section["has_stepped"]:
                self.trainer.warm_up()
