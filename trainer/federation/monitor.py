"""The coordinator's state for whoever watches over it: /healthz, and /metrics for Prometheus."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SOCK_STREAM, getaddrinfo
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

from trainer.federation.exchange import TRAINING, Gatherings
from trainer.federation.messages import Limit, Message
from trainer.federation.registry import Registry
from trainer.federation.server import Server
from trainer.federation.spool import round_of

try:
    from prometheus_client import (
        CONTENT_TYPE_LATEST,
        CollectorRegistry,
        Gauge,
        ProcessCollector,
        Summary,
        disable_created_metrics,
    )
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.exposition import generate_latest
except ImportError as error:
    raise ValueError("site.monitor= needs the package prometheus-client\n  pip install silotrain[sites]") from error

disable_created_metrics()  # a time beside each number, which only OpenMetrics knows

log = logging.getLogger(__name__)

IDLE_SECONDS = 10  # until a connection that asks nothing is closed


class Meter:
    """The meetings of a coordinator, measured.

    Args:
        gatherings: the coordinator's, of which this has the methods.
        registry: the members.
        server: counts their bytes.
        version: the number of rounds that are done.
    """

    def __init__(self, gatherings: Gatherings, registry: Registry, server: Server, version: int):
        self.gatherings, self.registry, self.server = gatherings, registry, server
        self.version, self._waited = version, 0.0
        self._round_began: float | None = None
        self._metrics = CollectorRegistry()
        self._round = Summary("silotrain_round_seconds", "From a version to the next", registry=self._metrics)
        self._wait = Summary("silotrain_wait_seconds", "Of those, spent waiting for members", registry=self._metrics)
        self._counted = Gauge("silotrain_members_counted", "Members in the newest version", registry=self._metrics)
        self._metrics.register(self)  # pyright: ignore[reportArgumentType]
        ProcessCollector(registry=self._metrics)

    def gather(self, key: str, limit: Limit, make_state: Callable[[], Message] | None) -> dict[str, Message] | None:
        began = monotonic()
        if self._round_began is None:
            self._round_began = began
        brought = self.gatherings.gather(key, limit, make_state)
        self._waited += monotonic() - began
        if brought is not None and key.endswith(TRAINING):
            self._counted.set(len(brought))
        return brought

    def publish(self, key: str, result: Message) -> None:
        self.gatherings.publish(key, result)
        index = round_of(key)
        if index is not None and key.endswith(TRAINING):
            now = monotonic()
            self._round.observe(now - (self._round_began or now))
            self._wait.observe(self._waited)
            self.version, self._round_began, self._waited = index + 1, now, 0.0

    def health(self) -> dict[str, Any]:
        """Return what /healthz says."""
        return {"version": self.version, "present": self.registry.present(), "members": list(self.registry.members)}

    def collect(self) -> Iterator[Metric]:
        """Yield what is asked of others whenever Prometheus asks."""
        present = self.registry.present()
        yield GaugeMetricFamily("silotrain_version", "Rounds whose result is the global model", self.version)
        yield GaugeMetricFamily("silotrain_meetings_open", "Meetings without a result", self.registry.count_open())
        presence = GaugeMetricFamily("silotrain_member_present", "Whether a member is there", labels=["member"])
        received = CounterMetricFamily("silotrain_received_bytes", "Bytes from a member", labels=["member"])
        sent = CounterMetricFamily("silotrain_sent_bytes", "Bytes to a member", labels=["member"])
        for name in self.registry.members:
            presence.add_metric([name], float(name in present))
            received.add_metric([name], self.server.received.of(name))
            sent.add_metric([name], self.server.sent.of(name))
        yield from (presence, received, sent)

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' format."""
        return generate_latest(self._metrics)


class Monitor:
    """An HTTP server of /healthz and /metrics, while its block runs.

    Args:
        listen: host:port; port 0 is a free one.
        meter: what it shows.

    Attributes:
        port: where it listens.

    Raises:
        ValueError: the address cannot be had.
    """

    def __init__(self, listen: str, meter: Meter):
        address = urlsplit(f"//{listen}")
        try:
            family, _, _, _, place = getaddrinfo(address.hostname, address.port, type=SOCK_STREAM)[0]
            self._server = _Server(family, place, partial(_Answer, meter))
        except OSError as error:
            raise ValueError(
                f"site.monitor={listen} cannot be had: {error.strerror}\n"
                "  valid: an address of this host and a free port, such as 127.0.0.1:9090"
            ) from error
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="monitor", daemon=True)

    def __enter__(self) -> Monitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    """A server whose connections end with the process."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, family: int, place: Any, answer: Callable[..., BaseHTTPRequestHandler]):
        self.address_family = family
        super().__init__(place, answer)

    def handle_error(self, request: object, client_address: object) -> None:
        log.info("a connection to the monitor broke", exc_info=True)


class _Answer(BaseHTTPRequestHandler):
    """The answer to one connection."""

    timeout = IDLE_SECONDS
    server_version, sys_version = "silotrain", ""

    def __init__(self, meter: Meter, *arguments: Any):
        self.pages = {
            "/healthz": ("application/json", lambda: json.dumps(meter.health()).encode()),
            "/metrics": (CONTENT_TYPE_LATEST, meter.exposition),
        }
        super().__init__(*arguments)

    def do_GET(self) -> None:
        if self.path not in self.pages:
            self.send_error(HTTPStatus.NOT_FOUND, explain=f"valid: {', '.join(self.pages)}")
            return
        kind, make = self.pages[self.path]
        content = make()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: it is asked every few seconds."""
