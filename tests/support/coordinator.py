"""A coordinator that is at work in this process, and calls as anyone may make them."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import torch

from tests.support.folders import composed_tree
from trainer.federation.certificates import Credentials, load_credentials
from trainer.federation.link import JOIN, Link
from trainer.federation.membership import Coordinator
from trainer.federation.messages import Limit, Message
from trainer.federation.options import SiteOptions

MEMBERS = ("berlin", "paris")
KEY = "rounds/0/training"
DELTA = torch.arange(5.0)
LIMIT = Limit.like({"weight"}, {"table/counts": torch.zeros(3)}, {"vector/delta": DELTA})
HONEST = Message({"key": KEY, "sums": {"weight": 2.0}}, {"table/counts": torch.ones(3), "vector/delta": DELTA})
INFO = {
    **{"train": 7, "test": 2, "validation": None, "inputs": "float32 [4]", "targets": "int64 []", "classes": 2},
    **{"label_names": [], "checksum": 0, "has_weights": False},
}


def credentials(folder: Path, name: str) -> Credentials:
    """Return the files of a member, whatever is wrong with them."""
    authority, certificate, key = ((folder / file).read_bytes() for file in ("ca.pem", f"{name}.pem", f"{name}.key"))
    return Credentials(name, authority, certificate, key, datetime.datetime.now(datetime.UTC))


@dataclass
class Federation:
    """A coordinator that is at work, and its answers."""

    coordinator: Coordinator
    certs: Path
    checked: list[str]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.coordinator.server.port}"

    def channel(self, of: Credentials) -> grpc.Channel:
        ssl = grpc.ssl_channel_credentials(of.authority, of.key, of.certificate)
        return grpc.secure_channel(self.address, ssl, [("grpc.ssl_target_name_override", "coordinator")])

    def joining(self, **said: Any) -> dict[str, Any]:
        return {"settings": self.coordinator.settings, "info": INFO, "withheld": [], **said}

    @contextmanager
    def joined(self, name: str) -> Iterator[Link]:
        link = Link(self.address, load_credentials(self.certs, name), 10.0)
        with link.joined(self.joining()):
            yield link

    def is_untouched(self) -> bool:
        registry = self.coordinator.registry
        return not registry.present() and not registry.meetings and not self.coordinator.infos


@contextmanager
def coordinating(certs: Path, folder: Path) -> Iterator[Federation]:
    tree = {**composed_tree(()), "run_dir": str(folder)}
    options = SiteOptions(**{**tree["site"], "listen": "127.0.0.1:0", "members": MEMBERS, "certificates": str(certs)})
    coordinator, checked = Coordinator(options, tree, lambda: False), []
    check_member = coordinator.registry.check_member
    coordinator.registry.check_member = lambda name: [checked.append(name), check_member(name)]  # pyright: ignore
    try:
        yield Federation(coordinator, certs, checked)
    finally:
        coordinator.server.stop(0)


def answer(channel: grpc.Channel, method: str, parts: Any, timeout: float = 10) -> tuple[Any, str]:
    """Return the status and the sentence with which a call ends."""
    try:
        list(channel.stream_stream(method)(iter(parts), timeout=timeout))
    except grpc.RpcError as error:
        status: Any = error
        return status.code(), status.details()
    return grpc.StatusCode.OK, ""


def parts_of(message: Message, **header: Any) -> list[bytes]:
    return list(Message({**message.header, "session": "1", **header}, message.tensors).parts())


@contextmanager
def joined_by_force(federation: Federation, name: str) -> Iterator[grpc.Channel]:
    """Yield the channel of a member that has joined as session 1."""
    with federation.channel(credentials(federation.certs, name)) as channel:
        presence = channel.stream_stream(JOIN)(Message(federation.joining(session="1")).parts())
        presence.initial_metadata()
        try:
            yield channel
        finally:
            presence.cancel()
