"""Every byte that sites send in a run of two rounds is on the list of what leaves a site."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.folders import composed_tree
from trainer.config.build import build, load_data
from trainer.config.schema import read_config
from trainer.distributed.topology import distributed
from trainer.federation import membership
from trainer.federation.certificates import certify
from trainer.federation.disclosure import ITEMS
from trainer.federation.link import Link
from trainer.federation.membership import open_membership
from trainer.federation.messages import LENGTH_BYTES, Limit, MessageReader
from trainer.loop.fit import fit

SIZES = {"berlin": 37, "paris": 53}
ALLOWED = {"berlin": [], "paris": ["training", "evaluation", "labels", "statistics"]}
CHOICES = ("data=npz", "model=mlp", "model.inputs=6", "model.classes=3", "algorithm=fedavg", "rounds=2", "batch_size=8")
OF_MESSAGES = {"session", "key", "sums", "saved"}
OF_JOINING = {"session", "settings", "info", "withheld"}
OF_QUESTIONS = {"session", "rounds"}


class Recording:
    """Notes all parts that go through a channel."""

    def __init__(self, channel: Any, calls: list[tuple[str, list[bytes]]]):
        self.channel, self.calls = channel, calls

    def stream_stream(self, method: str) -> Any:
        send = self.channel.stream_stream(method)

        def call(parts: Iterator[bytes]) -> Any:
            sent: list[bytes] = []
            self.calls.append((method.rpartition("/")[2], sent))
            return send(part for part in parts if not sent.append(part))  # pyright: ignore[reportOptionalOperand]

        return call

    def close(self) -> None:
        self.channel.close()


@dataclass
class Launches:
    """The results of a coordinator and its sites.

    Attributes:
        calls: what each site has sent: methods, and parts.
        metrics: of the members.
        notices: what their users were told.
    """

    calls: dict[str, list[tuple[str, list[bytes]]]] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    notices: dict[str, str] = field(default_factory=dict)


@contextmanager
def recorded(calls: dict[str, list[tuple[str, list[bytes]]]]) -> Iterator[None]:
    class RecordedLink(Link):
        def __init__(self, server: str, credentials: Any, *others: Any):
            super().__init__(server, credentials, *others)
            self.channel: Any = Recording(self.channel, calls.setdefault(credentials.name, []))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(membership, "Link", RecordedLink)
        yield


def write_data(path: Path, size: int) -> None:
    generator = np.random.default_rng(size)
    inputs, labels = generator.normal(size=(size, 6)).astype(np.float32), generator.integers(0, 3, size)
    cut = size * 3 // 4
    np.savez(path, x_train=inputs[:cut], y_train=labels[:cut], x_test=inputs[cut:], y_test=labels[cut:])


def launch(folder: Path, *overrides: str) -> Launches:
    """Train the sites in threads of this process, each with its own data, over real links."""
    certify(folder / "certs", ["coordinator", *SIZES])
    launches, errors, port = Launches(), [], threading.Event()
    address: list[str] = []

    composed = composed_tree((*CHOICES, "data.path=own.npz", *overrides))  # Hydra composes in one thread at a time

    def work(name: str, site: dict[str, Any]) -> None:
        try:
            options = {**composed["site"], "certificates": str(folder / "certs"), **site}
            data = {**composed["data"], "path": None if name == "coordinator" else str(folder / f"{name}.npz")}
            tree = {**composed, "site": options, "data": data, "run_dir": str(folder / name)}
            config = read_config(tree)
            with open_membership(config.site, tree, topology, lambda: False) as member:
                if name == "coordinator":
                    address.append(f"127.0.0.1:{member.server.port}")  # pyright: ignore[reportAttributeAccessIssue]
                    port.set()
                launches.notices[name] = member.notice
                splits = member.join(lambda: load_data(config, topology))
                run = build(config, member.topology(topology), splits)
                launches.metrics[name] = fit(run, make_exchange=member.make_exchange).metrics
                member.finish()
        except BaseException as error:
            errors.append((name, error))
            port.set()
            raise

    with distributed(device="cpu") as topology, recorded(launches.calls):
        coordinator = {"listen": "127.0.0.1:0", "members": list(SIZES)}
        threads = [threading.Thread(target=work, args=("coordinator", coordinator), daemon=True)]
        threads[0].start()
        assert port.wait(60) and not errors, errors
        for name, size in SIZES.items():
            write_data(folder / f"{name}.npz", size)
            site = {"name": name, "server": address[0], "allow": ALLOWED[name]}
            threads.append(threading.Thread(target=work, args=(name, site), daemon=True))
            threads[-1].start()
        while not errors and any(thread.is_alive() for thread in threads):
            threads[0].join(0.1)
    assert not errors, errors
    return launches


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    return launch(tmp_path_factory.mktemp("launches"))


def messages_of(launches: Launches, name: str, method: str) -> Iterator[Any]:
    for called, parts in launches.calls[name]:
        if called == method:
            reader = MessageReader(Limit(1 << 30))
            for part in parts:
                reader.add(part)
            yield reader.finish()


@pytest.mark.parametrize("name", SIZES)
def test_headers_and_tensors_are_those_of_the_list(launches: Launches, name: str) -> None:
    assert {method for method, _ in launches.calls[name]} == {"Join", "Meet", "Fetch"}
    for message in messages_of(launches, name, "Join"):
        assert message.header.keys() == OF_JOINING and not message.tensors
        assert message.header["info"]["checksum"] == 0
        assert message.header["withheld"] == [each for each in ALLOWED["paris"] if each not in ALLOWED[name]]
    for message in messages_of(launches, name, "Fetch"):
        assert message.header.keys() == OF_QUESTIONS and not message.tensors
    keys = []
    for message in messages_of(launches, name, "Meet"):
        assert message.header.keys() <= OF_MESSAGES
        keys.append(message.header["key"])
        for part in (*message.header.get("sums", ()), *message.tensors):
            items = [item for item in ITEMS if item.has(keys[-1], part)]
            assert items or part == "stopping", (keys[-1], part)
            if items and not items[0].needs <= set(ALLOWED[name]):
                assert part not in message.tensors or not message.tensors[part].any()
                assert not message.header.get("sums", {}).get(part)
    rounds = [f"rounds/{index}/{part}" for index in range(2) for part in ("training", "evaluation")]
    assert keys == ["start/model", *rounds, "end/artifacts", "end/run"]


@pytest.mark.parametrize("name", SIZES)
def test_nothing_else_is_between_them(launches: Launches, name: str) -> None:
    """The parts of a message are its header and its tensors: there is no other byte in the stream."""
    for _, parts in launches.calls[name]:
        described = json.loads(parts[0][LENGTH_BYTES:])
        assert described.pop("__metadata__").keys() == {"protocol", "header"}
        assert sum(map(len, parts[1:])) == max((each["data_offsets"][1] for each in described.values()), default=0)


@pytest.mark.parametrize("name", SIZES)
def test_no_example_no_path_and_no_count_of_labels_leaves(launches: Launches, tmp_path: Path, name: str) -> None:
    sent = b"".join(part for _, parts in launches.calls[name] for part in parts)
    write_data(tmp_path / "again.npz", SIZES[name])
    with np.load(tmp_path / "again.npz") as data:
        examples = [row.tobytes() for part in ("x_train", "x_test") for row in data[part]]
        labels = np.bincount(data["y_train"], minlength=3), np.bincount(data["y_test"], minlength=3)
    assert not [row for row in examples if row[:8] in sent]
    assert f"{name}.npz".encode() not in sent and b"certs" not in sent
    if name == "paris":  # which allows them
        return
    counts = [np.asarray(each, dtype).tobytes() for each in labels for dtype in (np.float64, np.int64, np.float32)]
    assert not [each for each in counts if each in sent]


def test_figures_are_those_of_the_sites_that_allow_them(launches: Launches) -> None:
    (last,) = [each for each in messages_of(launches, "paris", "Meet") if each.header["key"] == "rounds/1/evaluation"]
    units, loss, correct = last.tensors["table/test/clients"][1].tolist()
    (training,) = [each for each in messages_of(launches, "paris", "Meet") if each.header["key"] == "rounds/1/training"]
    sums = training.header["sums"]
    metrics = launches.metrics["coordinator"]
    assert metrics["test/loss"] == loss / units and metrics["test/accuracy"] == correct / units
    assert metrics["train/loss"] == sums["loss_sum"] / sums["units"]
    assert not {name for name in metrics if name.startswith("client/0/test")}
    for name in SIZES:
        assert launches.metrics[name]["test/accuracy"] == metrics["test/accuracy"]


def test_updates_and_weights_leave_whatever_a_site_allows(launches: Launches) -> None:
    (berlin,) = [each for each in messages_of(launches, "berlin", "Meet") if each.header["key"] == "rounds/1/training"]
    assert berlin.tensors["vector/delta"].any()
    assert 0 < berlin.header["sums"]["weight"] <= SIZES["berlin"]


def test_users_are_told_before_the_join(launches: Launches) -> None:
    told = launches.notices
    assert told["paris"].splitlines()[0].startswith("leaves paris, for 127.0.0.1:")
    assert "\n  stays" not in told["paris"]
    assert told["berlin"].count("\n  stays") == sum(bool(item.needs) for item in ITEMS)
    assert torch.tensor([len(line) <= 200 for text in told.values() for line in text.splitlines()]).all()
