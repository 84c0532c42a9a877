"""Launches of a simulated federation, and their ends: small programs in place of the trainer."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from trainer.commands.train import simulation
from trainer.config.compose import compose_tree
from trainer.distributed.launch import subprocesses

# Runs the program of its part of the federation, with the arguments as `given`.
MODULE = """
import os, signal, sys, time
from pathlib import Path
given = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
part = sys.argv[1] if sys.argv[1] == "coordinator" else given["site.name"]
exec(Path(part + ".py").read_text())
"""
SAVES = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nPath(part + '.up').touch()\ntime.sleep(60)\n"
OVERRIDES = ["algorithm=fedavg", "site.simulate=2", "run_dir=run"]
SECONDS = 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "trainer.py").write_text(MODULE)
    monkeypatch.setattr(subprocesses, "TRAINER", (str(tmp_path / "trainer.py"),))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def simulate(folder: Path, *overrides: str, **programs: str) -> int:
    """Run a federation of two sites; the program of site-0 is `site_0`."""
    for part in ("coordinator", "site-0", "site-1"):
        (folder / f"{part}.py").write_text(programs.get(part.replace("-", "_"), ""))
    given = [*OVERRIDES, *overrides]
    return simulation.simulate(compose_tree(given), given)


def wait_for(folder: Path, *parts: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not all((folder / f"{part}.up").exists() for part in parts):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_each_launch_has_its_place_and_credentials_that_are_removed(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Only the coordinator prints here, and the certificates are readable by their owner alone."""
    program = """
certificates = Path(given["site.certificates"].strip('"'))
print(part, certificates, oct(certificates.stat().st_mode), sorted(file.name for file in certificates.iterdir()))
print(given.get("site.listen"), given.get("site.server"), given["run_dir"], given["site.members"])
"""
    assert simulate(folder, coordinator=program, site_0=program, site_1=program) == 0
    printed = capfd.readouterr().out
    head, place = printed.splitlines()
    part, certificates, mode, names = head.split(" ", 3)
    assert (part, mode) == ("coordinator", "0o40700") and "site-1.key" in names
    listen, server, run_dir, members = place.split(" ")
    assert (server, run_dir, members) == ("None", '"run"', '["site-0","site-1"]')
    for site in ("site-0", "site-1"):
        log = (folder / f"run/sites/{site}.log").read_text().splitlines()
        assert log[2] == f'null {listen} "run/sites/{site}" {members}'
    assert not Path(certificates).exists()


def test_a_site_that_fails_is_shown_and_stops_the_others(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fails = "time.sleep(0.3)\nprint('the disk is gone')\nsys.exit(1)\n"
    assert simulate(folder, coordinator=SAVES, site_0=SAVES, site_1=fails) == 1
    printed = capfd.readouterr().err
    assert "site-1 has ended with exit code 1; the end of run/sites/site-1.log:\nthe disk is gone\n" in printed
    assert "site-0" not in printed


def test_the_others_go_on_without_a_site_that_they_do_not_need(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ended = "while not Path('done').exists(): time.sleep(0.02)\n"
    waits = f"{ended}sys.exit(0)\n"
    fails = "sys.exit(1)\n"
    threading.Timer(1.0, (folder / "done").touch).start()
    assert simulate(folder, "site.min_members=1", coordinator=waits, site_0=waits, site_1=fails) == 0
    assert "site-1 has ended with exit code 1" in capfd.readouterr().err


def test_a_coordinator_that_fails_ends_its_sites(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert simulate(folder, coordinator="sys.exit(2)", site_0=SAVES, site_1=SAVES) == 2
    assert capfd.readouterr().err == ""


def test_bad_input_that_all_find_is_printed_once(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    late = "time.sleep(0.5)\nprint('optimizer.lr=-1', file=sys.stderr)\nsys.exit(2)\n"
    early = "print('optimizer.lr=-1', file=sys.stderr)\nsys.exit(2)\n"
    assert simulate(folder, coordinator=late, site_0=early, site_1=early) == 2
    assert capfd.readouterr().err == "optimizer.lr=-1\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_of_them(number: signal.Signals, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    parts = ("coordinator", "site-0", "site-1")

    def stop() -> None:
        wait_for(folder, *parts)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    assert simulate(folder, coordinator=SAVES, site_0=SAVES, site_1=SAVES) == 75
    thread.join()
    assert capfd.readouterr().err == ""


def test_the_port_is_nobody_elses_while_one_of_ours_may_have_it() -> None:
    with simulation._reserved_port() as port, socket.socket() as other, socket.socket() as ours:
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
        ours.bind(("127.0.0.1", port))
