"""The files of a coordinator and of its sites: for their owner alone, and without figures of single sites."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.cli.command import Shell
from trainer.federation.certificates import certify

SIZES = {"berlin": (8017, 3109), "paris": (9631, 4177)}  # to train and to test
COMMON = (
    *("data=npz", "data.validation=0", "model=mlp", "model.inputs=4", "model.classes=3", "algorithm=fedavg"),
    *("rounds=2", "batch_size=512", "metrics.per_client=none", "launch.nproc_per_node=1", "launch.device=cpu"),
    *("launch.threads_per_worker=1", "run_dir=run"),
)


def write_data(path: Path, train: int, test: int) -> None:
    generator = np.random.default_rng(train)
    sizes = {"train": train, "test": test}
    inputs = {f"x_{part}": generator.normal(size=(size, 4)).astype(np.float32) for part, size in sizes.items()}
    # The first site has few of the last class: its counts of labels are its own.
    shares = [0.7, 0.2, 0.1] if train == SIZES["berlin"][0] else [0.2, 0.3, 0.5]
    labels = {f"y_{part}": generator.choice(3, size, p=shares) for part, size in sizes.items()}
    np.savez(path, **inputs, **labels)  # pyright: ignore[reportArgumentType]


def numbers_of_single_sites(folder: Path) -> set[int]:
    """Return numbers of examples and of labels, by site and part, that are large enough not to be others."""
    found = {size for sizes in SIZES.values() for size in sizes}
    for name in SIZES:
        with np.load(folder / f"{name}.npz") as data:
            found |= {int(count) for part in ("y_train", "y_test") for count in np.bincount(data[part])}
    return {number for number in found if number > 1000}


@pytest.mark.long
def test_files_are_private_and_name_no_single_site(new_shell: Callable[[], Shell], tmp_path: Path) -> None:
    certify(tmp_path / "certs", ["coordinator", *SIZES])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shells = {name: new_shell() for name in ("coordinator", *SIZES)}
    certificates = f"site.certificates={tmp_path / 'certs'}"
    listening = (f"site.listen={address}", "site.members=[berlin,paris]")
    started = [shells["coordinator"].start("-m", "trainer", "coordinator", *COMMON, certificates, *listening)]
    for name, (train, test) in SIZES.items():
        write_data(tmp_path / f"{name}.npz", train, test)
        dialling = (f"data.path={tmp_path / name}.npz", f"site.name={name}", f"site.server={address}")
        started.append(shells[name].start("-m", "trainer", *COMMON, certificates, *dialling))
    for command in started:
        ended = command.end()
        assert ended.code == 0, ended.err
    for shell in shells.values():
        run = shell.folder / "run"
        open_to_others = [path for path in (run, *run.rglob("*")) if path.stat().st_mode & 0o077]
        assert not open_to_others
    files = [path for path in (shells["coordinator"].folder / "run").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"metrics.jsonl", "result.json", "console.log", "rank-0.log"}
    assert any("tfevents" in path.name for path in files)
    for path in files:
        content = path.read_bytes()
        assert not re.search(rb"client/|clients/(worst|jain|.*_std)|slowest/", content), path
        for number in numbers_of_single_sites(tmp_path):
            assert not re.search(rb"(?<![\w.])%d(?![\w.])" % number, content), (path, number)
            for kind in ("<q", "<d"):
                assert struct.pack(kind, number) not in content, (path, number)
