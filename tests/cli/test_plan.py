"""`python -m trainer plan` as a user types it, with real workers."""

from __future__ import annotations

import json

import pytest

from tests.cli.command import HERE, Ended, Shell, work
from tests.cli.refusals import building
from trainer.commands import main as cli
from trainer.distributed.topology import distributed

FEDERATED = ("algorithm=fedavg", "silos=2")
SITE = ("algorithm=fedavg", "site.certificates=certs")


def plan(shell: Shell, *overrides: str) -> Ended:
    return shell.start("-m", "trainer", "plan", *HERE, *overrides).end()


def row_of(ended: Ended, name: str) -> list[str]:
    """Return the words after a name."""
    return next(line for line in ended.out.splitlines() if line.startswith(name)).removeprefix(name).split()


@pytest.mark.long
def test_a_plan_is_printed_and_no_file_is_left(ranks, shell: Shell) -> None:
    """The bytes are those of the run; the digits CNN has 43,056 numbers including padding."""
    before = {path.name for path in shell.folder.iterdir()}
    ended = plan(shell, *FEDERATED, "rounds=2")
    assert (ended.code, ended.err) == (0, "")
    assert {path.suffix for path in shell.folder.iterdir() if path.name not in before} == {".out", ".err"}
    assert "2 ranks on cpu: 2 silos of 1 replica" in ended.out and ended.out.count("measured") == 1
    assert float(row_of(ended, "the whole round")[0]) > 0
    ranks(2).run(work, [*FEDERATED, "rounds=2", "run_dir=run"], str(shell.folder))
    last = json.loads((shell.folder / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert row_of(ended, "between silos, by all in the run")[-2:] == [f"{last['bytes_between_silos'] / 1000:.1f}", "kB"]


@pytest.mark.long
def test_a_run_on_other_machines_can_be_planned(shell: Shell) -> None:
    """With 8 silos the header and the vectors take 14 sequential messages each."""
    options = ("plan.ranks=16", "plan.bandwidth=100Mbit", "plan.latency=100ms", "plan.bandwidth_inside=1GB/s")
    ended = plan(shell, "algorithm=fedavg", "silos=8", "plan.seconds_per_step=0.5", "round.steps=3", *options)
    assert (ended.code, ended.err) == (0, "")
    assert "16 ranks on cpu: 8 silos of 2 replicas" in ended.out
    assert "12.5 MB/s, 1.4 s for a small all-reduce, as given" in ended.out
    assert "1 GB/s, 0 us for a small all-reduce, as given" in ended.out
    assert row_of(ended, "computing: the steps")[0] == "1.5000"
    assert float(row_of(ended, "sending between silos, then inside")[0]) == pytest.approx(2.824, abs=0.02)


@pytest.mark.long
def test_it_works_under_torchrun(shell: Shell) -> None:
    options = ("--standalone", "--nproc-per-node", "2")
    ended = shell.start("-m", "torch.distributed.run", *options, "-m", "trainer", "plan", *HERE, *FEDERATED).end()
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.count("the whole round") == 1


@pytest.mark.long
def test_what_a_run_refuses_is_refused_with_the_same_text(shell: Shell) -> None:
    overrides = ["algorithm=scaffold", "silos=2", "optimizer=adam"]
    ended = plan(shell, *overrides, "launch.nproc_per_node=1", "plan.ranks=2", "plan.bandwidth=1Gbit")
    assert (ended.code, ended.out) == (2, "")
    with distributed(device="cpu") as topology:
        assert ended.err.rstrip() == building(overrides, topology)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["silos=2", "plan.ranks=8"], "plan.ranks=8 without plan.bandwidth"),
        (["silos=3", "plan.ranks=8", "plan.bandwidth=1Gbit"], "silos=3 does not divide the world of 8 ranks"),
        (
            ["silos=2", "plan.ranks=8", "plan.bandwidth=1Gbit", "launch.nproc_per_node=1"],
            "plan.bandwidth_inside is not set",
        ),
        (
            [*SITE, "site.name=berlin", "site.server=host:7070"],
            "plan.bandwidth is not set, and the link to the coordinator",
        ),
        ([*SITE, "site.listen=host:7070", "site.members=[berlin]"], "site.listen=host:7070: a plan plays rounds"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_workers_start(
    overrides: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "launch.device=cpu", "algorithm=fedavg", *overrides]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(text)


def test_all_bad_input_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "plan.bandwith=1Gbit", "plan.latency=far", "sillos=2"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    for expected in ("did you mean plan.bandwidth?", "plan.latency=far\n  valid: ", "did you mean silos?"):
        assert printed.err.count(expected) == 1


def test_the_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--help"]) == 0
    usage = capsys.readouterr().out
    for key in ("bandwidth", "latency", "bandwidth_inside", "ranks", "seconds_per_step"):
        assert f"  plan.{key}=" in usage
