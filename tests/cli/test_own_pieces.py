"""Components from a user's module in the working directory; metrics of single clients."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.cli.command import Shell, printed_by_work, work

OWN = """
import torch
from torch import nn
from torch.utils.data import Dataset
from trainer.algorithms import FedAvg
from trainer.data import DataSplits, Iid
from trainer.data.client_sampling.sampling import ClientSampler
from trainer.distributed.compression import Cast

class Points(Dataset):
    '''Two clouds of points around -shift and shift.'''
    def __init__(self, examples, shift, seed):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(examples) % 2
        self.points = torch.randn(examples, 2, generator=generator) + shift * (2 * self.labels[:, None] - 1)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.points[index], self.labels[index]

def points(examples, shift=3.0):
    return DataSplits(Points(examples, shift, seed=0), Points(100, shift, seed=1), classes=2)

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))

    def forward(self, points):
        return self.layers(points)

def averaging(server, weighting):
    return FedAvg(server=server, weighting=weighting)

def fading(last):
    return lambda progress: 1.0 if progress < 0.5 else last

class Shuffled:
    def split(self, train, test, clients, seed):
        return Iid().split(train, test, clients, seed)

class Everyone(ClientSampler):
    def sample(self, clients, seed, index):
        return tuple(range(clients))

def half_precision():
    return Cast('bfloat16')

class Lines:
    '''A sink that writes lines to a file of the run folder.'''
    def __init__(self, folder, settings, word):
        self.file = (folder / 'lines.txt').open('w')
        self.say(word, settings['rounds'])

    def say(self, *words):
        print(*words, file=self.file)

    def log_round(self, metrics):
        self.say('round', metrics['round'])

    def finalize(self, result, artifacts):
        self.say('finished', result['round'])

    def close(self):
        self.file.close()
"""
OVERRIDES = (
    "data=custom",
    "data._target_=own.points",
    "+data.examples=210",
    "model=custom",
    "model._target_=own.Net",
    "+model.width=7",
    "optimizer=custom",
    "optimizer._target_=torch.optim.NAdam",
    "+optimizer.lr=0.02",
    "algorithm=fedavg",
    "silos=2",
    "clients=3",
    "rounds=4",
    "metrics.per_client=scores",
    "+loggers.lines={_target_: own.Lines, word: begins}",
    "run_dir=run",
)

ROUNDS = ("data=digits", "silos=2", "clients=3", "rounds=2", "round.steps=2", "optimizer=momentum")
OWN_CHOICES = (
    *("algorithm=custom", "algorithm._target_=own.averaging", "+algorithm.weighting=equal"),
    *("server=custom", "server._target_=torch.optim.SGD", "+server.lr=0.5", "+server.momentum=0.9"),
    *("schedule=custom", "schedule._target_=own.fading", "+schedule.last=0.1"),
    *("partition=custom", "partition._target_=own.Shuffled"),
    *("client_sampling=custom", "client_sampling._target_=own.Everyone"),
    *("update_compression=custom", "update_compression._target_=own.half_precision"),
    *(
        "gradient_compression=custom",
        "gradient_compression._target_=trainer.distributed.gradients.FullPrecisionReducer",
    ),
)
SAME_CHOICES = (
    *("algorithm=fedavg", "algorithm.weighting=equal", "server=momentum", "server.lr=0.5", "server.fused=null"),
    *("schedule=step", "schedule.milestones=[0.5]", "update_compression=bf16"),
)


@pytest.fixture(scope="module")
def out(ranks, shell: Shell) -> str:
    """Train, and return what is printed."""
    (shell.folder / "own.py").write_text(OWN)
    return ranks(2).run(printed_by_work, list(OVERRIDES), str(shell.folder))[0]


def test_own_pieces_are_trained(out: str, shell: Shell) -> None:
    assert "model     Net, 37 parameters" in out
    assert "examples  189 to train, 21 to validate, 100 to test" in out
    assert json.loads((shell.folder / "run/result.json").read_text())["test/accuracy"] > 0.95


def test_an_own_sink_is_told_of_the_run(out: str, shell: Shell) -> None:
    lines = (shell.folder / "run/lines.txt").read_text().splitlines()
    assert lines == ["begins 4", "round 1", "round 2", "round 3", "round 4", "finished 4"]


@pytest.mark.long
def test_a_sink_that_cannot_be_made_is_bad_input(shell: Shell, out: str) -> None:
    refused = shell.train(*OVERRIDES[:-2], "+loggers.lines={_target_: own.Lines}", "run_dir=without")
    assert refused.code == 2 and "loggers.lines.word has no value" in refused.err


def test_own_choices_of_the_other_groups_train_as_those_they_are_made_of(ranks, out: str, shell: Shell) -> None:
    for run_dir, choices in (("own", OWN_CHOICES), ("same", SAME_CHOICES)):
        ranks(2).run(work, [*ROUNDS, *choices, f"run_dir={run_dir}"], str(shell.folder))
    ours, theirs = (load_file(shell.folder / run_dir / "model.safetensors") for run_dir in ("own", "same"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    stored = yaml.safe_load((shell.folder / "own/config.yaml").read_text())
    assert stored["algorithm"] == {"_target_": "own.averaging", "weighting": "equal"}, "no keys of another choice"


def test_own_pieces_are_kept_by_name(out: str, shell: Shell) -> None:
    stored = yaml.safe_load((shell.folder / "run/config.yaml").read_text())
    assert stored["model"] == {"init": None, "freeze": None, "prune": None, "_target_": "own.Net", "width": 7}
    assert stored["optimizer"] == {
        "exclude_norm_bias_decay": False,
        "lr_multipliers": [],
        "_target_": "torch.optim.NAdam",
        "lr": 0.02,
    }
    ours = {"validation": "auto", "files": None, "cache_on_gpu": "auto"}
    reading = {"workers": 0, "prefetch_factor": 2, "pin_memory": "auto", "persistent_workers": True}
    reading |= {"collate_fn": "torch.utils.data.default_collate"}
    assert stored["data"] == ours | reading | {"_target_": "own.points", "examples": 210}


def test_scores_of_clients_are_told_without_their_labels(out: str, shell: Shell) -> None:
    """metrics.per_client=scores gives metrics of single clients, but no table of their labels."""
    assert "clients   3" in out and "validation  test" not in out
    last = json.loads((shell.folder / "run/metrics.jsonl").read_text().splitlines()[-1])
    for client in range(3):
        for figure in ("train_loss", "delta_norm", "test_accuracy"):
            assert f"client/{client}/{figure}" in last
    assert last["clients/worst_accuracy"] == min(last[f"client/{client}/test_accuracy"] for client in range(3))
