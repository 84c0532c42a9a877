"""The store of a start of the world: texts that prove who has written them, and how the ranks open it."""

from __future__ import annotations

import hmac
import logging
import os
import sys
import time
import uuid
from datetime import timedelta

from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from trainer.distributed.environment import LISTENER, ClusterEnvironment
from trainer.distributed.launch.reachability import LOOPBACK, connection_error, listen
from trainer.distributed.token import draw_token, find_token, sign
from trainer.utils.text import first_few

POLL_INTERVAL_SECONDS = 0.05
NOTICE_SECONDS = 5  # after which a rank under srun says for whom it waits
JOIN_TIMEOUT_SECONDS = 1800  # for all ranks

log = logging.getLogger("trainer")


class SignedStore:
    """Texts in a store of torch, which takes values from everybody. The token of the launch signs each with its key.

    A value without the right signature counts as not written. It is logged.

    Args:
        store: of torch
        token: of the launch
        prefix: of all keys
    """

    def __init__(self, store: Store, token: bytes, prefix: str = ""):
        self._store, self._token, self._prefix = store, token, prefix
        self._refused: set[str] = set()

    def set(self, key: str, value: str) -> None:
        """Write a value."""
        name = self._prefix + key
        self._store.set(name, f"{sign(self._token, name.encode(), value.encode()).decode()} {value}")

    def read(self, key: str) -> str | None:
        """Return a value; None as long as nobody who holds the token has written it."""
        return self._verified(key) if self._store.check([self._prefix + key]) else None

    def get(self, key: str) -> str:
        """Return a value; wait until it has been written."""
        while (value := self._verified(key)) is None:
            time.sleep(POLL_INTERVAL_SECONDS)
        return value

    def below(self, prefix: str) -> SignedStore:
        """Return the part of this store whose keys have a further prefix."""
        return SignedStore(self._store, self._token, f"{self._prefix}{prefix}/")

    def unsigned(self, prefix: str) -> Store:
        """Return a part of this store for process groups: torch signs nothing."""
        return PrefixStore(self._prefix + prefix, self._store)

    def clone(self) -> SignedStore:
        """Return the same store for another thread."""
        return SignedStore(self._store.clone(), self._token, self._prefix)  # pyright: ignore[reportAttributeAccessIssue]

    def _verified(self, key: str) -> str | None:
        name = self._prefix + key
        signature, _, value = self._store.get(name).partition(b" ")
        if hmac.compare_digest(signature, sign(self._token, name.encode(), value)):
            return value.decode()
        if key not in self._refused:
            self._refused.add(key)
            log.warning("refused: whoever wrote %s to the store of this run does not hold its token", key)
        return None


def open_store(environment: ClusterEnvironment, token: bytes | None = None) -> SignedStore:
    """Open the store of this start of the world, at the address of the environment.

    Args:
        environment: the position of this process
        token: of the launch; None: see `find_token`

    Raises:
        TimeoutError: not all ranks have come
        ValueError: there is no token
    """
    if environment.host is None:
        assert environment.world_size == 1, "a world of several ranks needs a launcher: MASTER_ADDR is not set"
        return SignedStore(HashStore(), draw_token())
    token = token or find_token()
    store = SignedStore(_connect(environment), token)
    return store.below(_start_prefix(store, environment))


def _connect(environment: ClusterEnvironment) -> Store:
    """Return torch's store. Rank 0 holds it, unless torchrun does."""
    host, port, timeout = environment.host, environment.port, timedelta(seconds=JOIN_TIMEOUT_SECONDS)
    assert host is not None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return TCPStore(host, port, timeout=timeout, wait_for_workers=False)
    if environment.is_one_machine:
        host = LOOPBACK
    if environment.rank == 0:
        # torch itself would listen on all interfaces, whatever the host.
        inherited = os.environ.get(LISTENER)
        listener = int(inherited or listen(port, LOOPBACK if environment.is_one_machine else None).detach())
        return TCPStore(host, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener)
    if error := connection_error(host, port, NOTICE_SECONDS):
        print_on_node(environment, f"rank {environment.rank} waits for rank 0 at {host}:{port}: {error}")
    return TCPStore(host, port, timeout=timeout, wait_for_workers=False)


def _start_prefix(store: SignedStore, environment: ClusterEnvironment) -> str:
    """Return a prefix of keys for this start of the world, the same on all ranks.

    torchrun's store keeps the keys of earlier starts, and somebody may have copied signed values of another one. Rank 0
    draws a prefix; the others accept what they read when rank 0 has answered under it.
    """
    drawn = uuid.uuid4().hex
    if environment.rank == 0:
        store.set("start", drawn)
        begun = time.monotonic()
        noticed = environment.launched_by != "srun"  # other launchers end the ranks if one of them does not come
        for rank in range(1, environment.world_size):
            while (answer := store.read(f"{drawn}/{rank}")) is None:
                waited = time.monotonic() - begun
                if waited > NOTICE_SECONDS and not noticed:
                    noticed = True
                    print_on_node(environment, _missing_ranks(store, drawn, environment))
                if waited > JOIN_TIMEOUT_SECONDS:
                    raise TimeoutError(_missing_ranks(store, drawn, environment))
                time.sleep(POLL_INTERVAL_SECONDS)
            store.set(f"{drawn}/{rank}/{answer}", "")
        return drawn
    while True:
        start = store.get("start")
        store.set(f"{start}/{environment.rank}", drawn)
        if store.read(f"{start}/{environment.rank}/{drawn}") is not None:
            return start
        time.sleep(POLL_INTERVAL_SECONDS)


def _missing_ranks(store: SignedStore, start: str, environment: ClusterEnvironment) -> str:
    """Describe the ranks that have not come, and what to do."""
    size = environment.world_size
    missing = [rank for rank in range(1, size) if store.read(f"{start}/{rank}") is None]
    text = f"rank 0 waits for {len(missing)} of the {size} ranks: {', '.join(first_few(missing, 8))}"
    if environment.launched_by != "srun":
        return text
    return (
        f"{text}\n  in a shell of srun --pty only one of the {size} tasks runs: start it with --ntasks=1, or type "
        f"srun --overlap --ntasks={size} python -m trainer ... in it"
    )


def print_on_node(environment: ClusterEnvironment, text: str) -> None:
    """Print a line once on each node."""
    if environment.local_rank == 0:
        print(text, file=sys.stderr, flush=True)
