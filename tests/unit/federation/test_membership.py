"""The ranks of a site, of which the first talks to the coordinator."""

from __future__ import annotations

import time
from contextlib import ExitStack
from threading import Thread
from unittest.mock import patch

import torch

from tests.support.coordinator import HONEST, INFO, LIMIT, MEMBERS, coordinating
from trainer.data.loading.silo_files import DatasetInfo
from trainer.distributed import collectives
from trainer.distributed.topology import distributed
from trainer.federation import membership
from trainer.federation.certificates import certify
from trainer.federation.link import LinkLostError
from trainer.federation.membership import Site
from trainer.federation.messages import Limit, Message, MessageReader
from trainer.federation.options import SiteOptions

OPTIONS = SiteOptions(
    name="berlin",
    server="localhost:1",
    listen=None,
    members=(),
    certificates=None,
    allow=(),
    min_members=None,
    grace_seconds=None,
    retry_seconds=1.0,
    monitor=None,
    simulate=None,
)


class SlowLink:
    """A link to a coordinator that answers, or is lost, after a while."""

    def __init__(self, seconds, error):
        self.seconds, self.error = seconds, error

    def meet(self, message, limit):
        time.sleep(self.seconds)
        if self.error:
            raise self.error
        reader = MessageReader(limit)
        for part in Message(message.header, {"total": torch.arange(5.0)}).parts():
            reader.add(part)
        return reader.finish()


def meet(folder, error=None):
    """Return what a rank of a site gets of a meeting that takes half a second, and how often it has heard of it."""
    heard, broadcast_text = [], collectives.broadcast_text

    def listen(text):
        heard.append(text)
        return broadcast_text(text)

    with (
        distributed(device="cpu") as world,
        ExitStack() as stack,
        patch.object(membership, "_credentials", lambda *_: None),
        patch.object(membership, "Link", lambda *_: SlowLink(0.5, error)),
        patch.object(membership, "NEWS_SECONDS", 0.1),
        patch.object(collectives, "broadcast_text", listen),
    ):
        site = Site(OPTIONS, {"run_dir": folder, "metrics": {"per_client": "full"}}, world, lambda: False, stack)
        try:
            result = site.meet(Message({"key": "a"}), Limit(40))
        except LinkLostError as lost:
            return str(lost), len(heard)
        return (dict(result.header), result.tensors["total"].tolist()), len(heard)


def test_all_ranks_of_a_site_get_the_result_and_hear_of_the_first_meanwhile(ranks, tmp_path):
    """A round may take longer than the ranks of a site wait for each other."""
    answers = ranks(2).run(meet, str(tmp_path))
    for (header, total), heard in answers:
        assert header == {"key": "a", "saved": 0} and total == [0, 1, 2, 3, 4]
        assert heard > 2


def test_all_ranks_of_a_site_learn_that_the_coordinator_is_lost(ranks, tmp_path):
    for answer, _ in ranks(2).run(meet, str(tmp_path), LinkLostError("out of reach")):
        assert answer == "out of reach"


def test_the_coordinator_says_who_is_away_and_who_is_back(tmp_path, capsys):
    certify(tmp_path / "certs", ["coordinator", *MEMBERS])
    with coordinating(tmp_path / "certs", tmp_path / "run") as federation, ExitStack() as stack:
        coordinator = federation.coordinator
        coordinator.registry.grace_seconds, coordinator.registry.min_members = 0.0, 1
        coordinator.infos |= dict.fromkeys(MEMBERS, DatasetInfo(**INFO))
        links = [stack.enter_context(federation.joined("berlin"))]
        for index in range(4):
            if index == 2:
                links.append(stack.enter_context(federation.joined("paris")))
            key = f"rounds/{index}/training"
            message = Message({**HONEST.header, "key": key}, HONEST.tensors)
            meets = [Thread(target=link.meet, args=(message, LIMIT)) for link in links]
            for meet in meets:
                meet.start()
            assert coordinator.gather(key, LIMIT, None).keys() == set(MEMBERS[: len(links)])
            coordinator.publish(key, message)
            for meet in meets:
                meet.join(20)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("round")]
    assert said == ["round 1: paris is away, the others go on", "round 3: paris is back"]
