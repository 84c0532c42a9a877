"""`python -m trainer doctor` with real workers, on one host and on two with a network between them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.network_namespaces import LINK, Host, new_hosts, why_not
from tests.cli.command import HERE, Ended, Shell, Started
from trainer.commands import main as cli

NAMES = ("alpha", "beta")
MEETING = "29417"
ONE_EACH = (
    "launch.nproc_per_node=1",
    "launch.threads_per_worker=1",
    "launch.device=cpu",
    "silos=node",
    "algorithm=fedavg",
)


def doctor(shell: Shell, *overrides: str) -> Ended:
    return shell.start("-m", "trainer", "doctor", *HERE, *overrides).end()


def test_on_one_host_nothing_would_go_wrong_and_no_file_is_left(shell: Shell) -> None:
    before = {path.name for path in shell.folder.iterdir()}
    ended = doctor(shell, "silos=2", "algorithm=fedavg")
    assert (ended.code, ended.err) == (0, "")
    assert "torch 2." in ended.out and "nothing would go wrong" in ended.out
    lines = ended.out.splitlines()
    row = next(line for line in lines if line.startswith("0-1")).split()
    assert row[1] == os.uname().nodename
    between = next(line for line in lines if line.startswith("between silos")).split()
    assert between[2:5] == ["1", "of", "2"] and between[8].endswith("B/s") and float(between[7]) > 0
    assert any(line.startswith("inside hosts") for line in lines)
    assert {path.suffix for path in shell.folder.iterdir() if path.name not in before} == {".out", ".err"}


@pytest.mark.long
def test_all_that_is_wrong_or_slow_is_reported(shell: Shell) -> None:
    """The folder cannot be written, which is an error; too many threads have a note. The shell sets OMP_NUM_THREADS."""
    (shell.folder / "file").touch()
    ended = doctor(shell, "run_dir=file/run", "launch.threads_per_worker=64")
    assert ended.code == 1, ended.out
    assert "run_dir=file/run cannot be written" in ended.out and "choose another run_dir" in ended.out
    assert "2 ranks with launch.threads_per_worker=64 share" in ended.out
    assert "OMP_NUM_THREADS=1 is ignored" in ended.out


@pytest.mark.long
def test_bad_input_of_the_workers_is_one_message(shell: Shell) -> None:
    ended = doctor(shell, "silos=3")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.count("silos=3 does not divide") == 1 and "Traceback" not in ended.err


def test_bad_input_of_the_command_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "sillos=3"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("did you mean silos?") == 1


@pytest.mark.long
def test_it_works_under_torchrun(shell: Shell) -> None:
    options = ("--standalone", "--nproc-per-node", "2")
    ended = shell.start("-m", "torch.distributed.run", *options, "-m", "trainer", "doctor", *HERE).end()
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.count("nothing would go wrong") == 1


def test_the_help_has_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--help"]) == 0
    assert "Exit codes" in capsys.readouterr().out


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    """Two hosts with a link between them."""
    if reason := why_not():
        pytest.skip(f"no hosts can be made here: {reason}")
    with new_hosts(2) as made:
        yield made


@pytest.fixture
def shells(new_shell: Callable[[], Shell]) -> list[Shell]:
    return [new_shell(), new_shell()]


def inside(host: Host, shell: Shell, *commands: str) -> tuple[str, ...]:
    """Return the start of a command on this host, whose name resolves to its loopback, as Debian installs it."""
    name, table = NAMES[host.number], shell.folder / "hosts"
    table.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
    script = "; ".join((f"hostname {name}", f"mount --bind {table} /etc/hosts", *commands, 'exec "$@"'))
    return host.network.inside("unshare", "--uts", "--mount", "sh", "-ec", script, "sh")


def start(host: Host, shell: Shell, first: Host, *overrides: str, commands: tuple[str, ...] = ()) -> Started:
    where = ("launch.nodes=2", f"launch.rdzv_endpoint={first.address}:{MEETING}")
    arguments = ("-m", "trainer", "doctor", *ONE_EACH, *where, *overrides)
    return shell.start(*arguments, inside=inside(host, shell, *commands))


def both(hosts: list[Host], shells: list[Shell], *overrides: str, **commands: tuple[str, ...]) -> list[Ended]:
    """Run the doctor on both hosts, after the shell commands `first` and `second`."""
    message = [commands.get("first", ()), commands.get("second", ())]
    began = [
        start(host, shell, hosts[0], *overrides, commands=each)
        for host, shell, each in zip(hosts, shells, message, strict=True)
    ]
    return [started.end() for started in began]


@pytest.mark.long
def test_a_name_that_resolves_to_the_loopback_is_answered_with_the_interface(
    hosts: list[Host], shells: list[Shell]
) -> None:
    began = time.monotonic()
    first, second = both(hosts, shells)
    assert time.monotonic() - began < 60, "a run would wait for half an hour"
    assert (first.code, second.code) == (1, 1), first.err + second.err
    (out,) = (ended.out for ended in (first, second) if ended.out)
    assert "gloo would use 127.0.1.1 on" in out and all(name in out for name in NAMES)
    assert f"set GLOO_SOCKET_IFNAME={LINK} on every host" in out
    assert "links: not measured" in out


@pytest.mark.long
def test_with_the_interface_nothing_would_go_wrong(hosts: list[Host], shells: list[Shell], tmp_path: Path) -> None:
    """The links between the hosts are measured. Their folders differ, because a mount hides one of them."""
    choose = f"export GLOO_SOCKET_IFNAME={LINK}"
    hide = f"mount -t tmpfs none {tmp_path}"
    first, second = both(hosts, shells, f"run_dir={tmp_path}/run", first=(choose,), second=(choose, hide))
    assert (first.code, second.code) == (0, 0), first.out + first.err + second.out + second.err
    (out,) = (ended.out for ended in (first, second) if ended.out)
    assert any(line.startswith("between silos") and "B/s" in line for line in out.splitlines())
    assert "eth0" in out and "clocks: at most" in out
    assert "is not the same folder on" in out and "each host keeps checkpoints of its own" in out


@pytest.mark.long
def test_an_interface_that_others_do_not_reach_is_reported_with_both_ends(
    hosts: list[Host], shells: list[Shell]
) -> None:
    aside = ("ip link add aside type veth peer name end", "ip address add 198.51.100.9/24 dev aside")
    first, second = both(
        hosts,
        shells,
        first=(f"export GLOO_SOCKET_IFNAME={LINK}",),
        second=(*aside, "ip link set aside up", "ip link set end up", "export GLOO_SOCKET_IFNAME=aside"),
    )
    hosts[1].network.ip("link delete aside")
    assert (first.code, second.code) == (1, 1)
    (out,) = (ended.out for ended in (first, second) if ended.out)
    assert "alpha (rank" in out and "cannot reach beta (rank" in out and "198.51.100.9, interface aside" in out


@pytest.mark.long
def test_a_rendezvous_that_cannot_be_reached_is_reported_within_seconds(hosts: list[Host], shells: list[Shell]) -> None:
    began = time.monotonic()
    ended = start(hosts[1], shells[1], hosts[0]).end()
    assert time.monotonic() - began < 60
    assert (
        ended.code == 1
        and f"launch.rdzv_endpoint={hosts[0].address}:{MEETING} cannot be reached from this host" in ended.err
    )
